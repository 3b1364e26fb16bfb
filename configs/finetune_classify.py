"""Fine-tuning to labels: a pretrained video encoder, a head for each label; the ways to adapt are its variants.

On the world, from `make demo`'s published model. "": everything is trained, with label smoothing. `probe`: the encoder is
frozen, the head attends to its tokens. `lora`: adapters of rank 2 on patches and attention, the encoder frozen (Hu et
al. 2022); with the head 1.3 % of the parameters. `layer_decay`: each layer at 0.75 of the rate above it (Bao et al. 2022). `scratch`:
as "", without a start. `small` runs in seconds, without a start too. Other data: data.train, data.labels, the labels of the
objective, and the encoder of the base. `vmm publish RUN FOLDER --adapters` writes adapters and head alone.
"""

from common import WORLD_LABELS, as_config, check, world_data

LABEL = "motion"


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "probe", "lora", "layer_decay", "scratch", "small")
    small = variant == "small"
    labels = {LABEL: WORLD_LABELS[LABEL]}
    head = dict(kind="classify", labels=labels, smoothing=0.0 if variant == "probe" else 0.1)
    optim = dict(learning_rate=1e-3, warmup=30, weight_decay=0.05, ema=0.99)
    groups = {}
    if variant == "probe":
        head |= dict(pooling="attention")
        optim |= dict(rate_rules=(("objective_.*", 1.0), (".*", 0.0)))
    if variant == "lora":
        groups["adapt"] = ((".*/(embed|query|value|out)/kernel", dict(kind="lora", rank=2, alpha=4.0)),)
        optim |= dict(learning_rate=2e-3)
    if variant == "layer_decay":
        optim |= dict(layer_decay=0.75)
    width, depth, heads = (32, 1, 2) if small else (128, 3, 4)
    return dict(
        seed=0,
        steps=20 if small else 300,
        batch=16 if small else 32,
        data=world_data(labels=labels),
        trunk=dict(
            encoders=dict(video=dict(kind="video", tubelet=(8, 16, 16), width=width, depth=depth, heads=heads)),
            fusion=dict(kind="late", width=width, depth=0, heads=heads),
        ),
        views=dict(clean={}),
        objectives=dict(labels=head),
        optim=optim | (dict(warmup=5) if small else {}),
        init_from={} if variant in ("scratch", "small") else dict(video="runs/demo/published"),
        evals=dict(labels=dict(kind="classification", data="data/world/test.jsonl", subsets=("V",))),
        save_every=10 if small else 100,
        log_every=5 if small else 10,
        **groups,
    )
