"""Fine-tuning to a number: the mood of a scene from −1 (all shapes are cold) to 1 (all are warm), as sentiment is told.

On `vmm data scenes data/scenes`. "": the number itself (mean error, correlation, and the accuracy of its sign, as for CMU-MOSI,
Zadeh et al. 2016). `small` runs in seconds. Sentiment in classes is configs/finetune_classify.py with other labels.
"""

from common import as_config, check, scenes_data, scenes_trunk


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "small")
    small = variant == "small"
    return dict(
        seed=0,
        steps=20 if small else 400,
        batch=8 if small else 16,
        data=scenes_data(targets=dict(mood=dict(kind="value", of="mood"))),
        trunk=scenes_trunk(small),
        views=dict(clean={}),
        objectives=dict(numbers=dict(kind="regress", values=("mood",), bound=1.2, pooling="attention")),
        optim=dict(learning_rate=1e-3, warmup=5 if small else 50, weight_decay=0.05, ema=0.99),
        evals=dict(
            sentiment=dict(
                kind="regression", data="data/scenes/test.jsonl", objective="numbers", subsets=("V", "A", "VA")
            )
        ),
        save_every=10 if small else 200,
        log_every=5 if small else 10,
    )
