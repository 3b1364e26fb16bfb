"""What does fusion buy? A small video + audio classifier of the world's planted facts; no text, which would tell them.

Two layers of fusion, whatever its kind: a bottleneck needs two, one to write and one to read. `quick`
is smaller and shorter.
"""

from common import WORLD_LABELS, as_config, check, world_data

FACTS = ("video", "audio", "either", "both", "order", "sync")


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "quick")
    quick = variant == "quick"
    width, heads = (64, 4) if quick else (96, 4)
    encoder = dict(width=width, depth=1 if quick else 2, heads=heads)
    labels = {name: WORLD_LABELS[name] for name in FACTS}
    return dict(
        seed=0,
        steps=300 if quick else 2000,
        batch=64,
        data=world_data(clip=dict(seconds=2.0, frames=8, size=32, sample_rate=16000, text_length=24), labels=labels),
        trunk=dict(
            encoders=dict(
                video=dict(kind="video", tubelet=(2, 16, 16), **encoder),
                audio=dict(kind="audio", bins=64, patch=(8, 64), **encoder),
            ),
            fusion=dict(kind="bottleneck", width=width, depth=2, heads=heads),
        ),
        views=dict(clean={}),
        objectives=dict(labels=dict(kind="classify", labels=labels)),
        optim=dict(learning_rate=1e-3, warmup=50, weight_decay=0.05, ema=0.99),
        evals=dict(labels=dict(kind="classification", data="data/world/test.jsonl", subsets=("V", "A", "VA"))),
        save_every=250,
        log_every=25,
    )
