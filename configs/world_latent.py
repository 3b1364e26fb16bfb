"""Latent prediction on the synthetic world, V-JEPA kind (Bardes et al. 2024): video and sound, no captions, no labels.

The running average sees whole clips; the student sees what blocks leave over, and predicts the average's tokens at the
hidden places: each stream's own after its encoder, and both after the fusion, where each has seen the other. Probes tell
what the features hold; `random` is the same model untrained, to hold them against; `small` runs in seconds.
"""

from common import WORLD_LABELS, as_config, check, world_data


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "small", "random")
    small, random = variant == "small", variant == "random"
    width, depth, heads = (32, 1, 2) if small else (64, 2, 4)
    encoder = dict(width=width, depth=depth, heads=heads)
    predictor = dict(kind="latent", view="masked", target="target", width=width // 2, depth=1 if small else 2, heads=2)
    steps = 20 if small else 1 if random else 1000
    root = "data/world"
    return dict(
        seed=0,
        steps=steps,
        batch=16 if small else 64,
        data=world_data(root, labels=WORLD_LABELS),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(2, 12, 12), **encoder),
                audio=dict(kind="audio", bins=64, patch=(8, 64), **encoder),
            ),
            fusion=dict(kind="joint", width=width, depth=1, heads=heads),
        ),
        views=dict(
            masked=dict(video=dict(kind="block", ratio=0.6), audio=dict(kind="block", ratio=0.5)),
            target=dict(teacher=True),
        ),
        objectives=dict(
            own=dict(stage="encoded", layers=1 if small else 2, **predictor), joint=dict(stage="fused", **predictor)
        ),
        optim=dict(
            learning_rate=0.0 if random else 1e-3,
            warmup=0 if random else steps // 10,
            weight_decay=0.05,
            ema=0.99,
            ema_end=0.999,
        ),
        evals=dict(
            encoded=dict(
                kind="probe",
                train=f"{root}/train.jsonl",
                data=f"{root}/test.jsonl",
                stream="encoded",
                subsets=("V", "A"),
            ),
            fused=dict(kind="probe", train=f"{root}/train.jsonl", data=f"{root}/test.jsonl", subsets=("VA",)),
        ),
        save_every=10 if small else 300,
        log_every=5 if small else 10,
        health=10 if small else 50,
    )
