"""The demo: a small video + audio + text model on the synthetic world, minutes on two cores.

Contrastive between caption and each of video and audio, masked modelling of all three streams
through a bottleneck fusion. Video and audio are not contrasted with each other: in this world they
share only the bright background and its hum, and the pair would teach the video encoder just that.
Each pair has its own share of the space: a caption tells of both, and sound, learned first, would
else fill it (experiments/LOG.md).
"""

from common import check, world_data, world_evals


def get_config(variant: str = "") -> dict:
    check(variant, "small")
    small = variant == "small"  # the same shape of run, in seconds: for a look, and for tests
    width, depth, heads = (32, 1, 2) if small else (128, 3, 4)
    encoder = dict(width=width, depth=depth, heads=heads)
    return dict(
        seed=0,
        steps=20 if small else 1200,
        batch=16 if small else 32,
        data=world_data(),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(8, 8, 8), **encoder),
                audio=dict(kind="audio", bins=64, patch=(8, 64), **encoder),
                text=dict(kind="text", vocabulary=512, **encoder),
            ),
            fusion=dict(kind="bottleneck", width=width, depth=2, heads=heads, bottlenecks=4),
        ),
        views=dict(
            clean={},
            masked=dict(
                video=dict(kind="tube", ratio=0.75),
                audio=dict(kind="random", ratio=0.6),
                text=dict(kind="random", ratio=0.3),
            ),
        ),
        objectives=dict(
            contrast=dict(
                kind="contrastive",
                view="clean",
                weight=1.0,
                width=width,
                pooling="attention",
                pairs=(("video", "text"), ("audio", "text")),
                separate=True,
            ),
            masked=dict(
                kind="masked", view="masked", weight=0.5, width=width // 2, depth=1, heads=2, standardise=False
            ),
        ),
        optim=dict(learning_rate=1e-3, warmup=5 if small else 60, weight_decay=0.05, ema=0.99),
        evals=world_evals(),
        save_every=10 if small else 250,
        log_every=5 if small else 10,
    )
