"""Fine-tuning to identities: embeddings held apart by an angular margin, tested on identities never trained on.

On the world, where who is seen is a pair of shape and colour, from `make demo`'s published model (ArcFace, Deng et al. 2019; verification ROC,
equal error rate, rank-1). `scratch`: without a start. `small` runs in seconds, without a start too.
"""

from common import as_config, check, world_data


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "scratch", "small")
    small = variant == "small"
    width, depth, heads = (32, 1, 2) if small else (128, 3, 4)
    head = dict(kind="identify", label="identity", classes=36, width=32 if small else 64, pooling="attention")
    return dict(
        seed=0,
        steps=20 if small else 300,
        batch=16 if small else 32,
        data=world_data(train="data/world/identity_train.jsonl", labels=dict(identity=48)),
        trunk=dict(
            encoders=dict(video=dict(kind="video", tubelet=(8, 16, 16), width=width, depth=depth, heads=heads)),
            fusion=dict(kind="late", width=width, depth=0, heads=heads),
        ),
        views=dict(clean={}),
        objectives=dict(identity=head),
        optim=dict(learning_rate=1e-3, warmup=5 if small else 30, weight_decay=0.05, ema=0.99),
        init_from={} if variant in ("scratch", "small") else dict(video="runs/demo/published"),
        evals=dict(
            identity=dict(kind="identity", data="data/world/identity_test.jsonl", label="identity", subsets=("V",))
        ),
        save_every=10 if small else 100,
        log_every=5 if small else 10,
    )
