"""Fine-tuning to tags, of which a clip has any number: which shapes, colours and sounds a scene holds (mAP, ROC).

On `vmm data scenes data/scenes`; "": from scratch, video and sound. `small` runs in seconds. From a pretrained model: init_from, with its
encoders in the trunk. Moderation is the same with other tags: data.tags, and the labels of the objective.
"""

from common import as_config, check, scenes_data, scenes_trunk

TAGS = dict(shapes=6, colours=8, sounds=6)


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "small")
    small = variant == "small"
    return dict(
        seed=0,
        steps=20 if small else 600,
        batch=8 if small else 16,
        data=scenes_data(tags=TAGS),
        trunk=scenes_trunk(small),
        views=dict(clean={}),
        objectives=dict(tags=dict(kind="classify", labels=TAGS, pooling="attention")),
        optim=dict(learning_rate=1e-3, warmup=5 if small else 50, weight_decay=0.05, ema=0.99),
        evals=dict(
            tags=dict(kind="tagging", data="data/scenes/test.jsonl", objective="tags", subsets=("V", "A", "VA"))
        ),
        save_every=10 if small else 200,
        log_every=5 if small else 10,
    )
