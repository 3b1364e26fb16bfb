"""Fine-tuning to a curve: how important each half second of a scene is, from which its summary is made (`vmm summarise`).

On `vmm data scenes data/scenes`, where what is heard is worth most. Scored as TVSum is (Song et al. 2015): the F-score of the
knapsack's summaries, and rank correlation (Otani et al. 2019). `windows`: windows of 4 s, which overlap by half in evaluation. `small` runs in seconds.
"""

from common import as_config, check, scenes_data, scenes_trunk


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "windows", "small")
    small, seconds = variant == "small", 4.0 if variant == "windows" else 8.0
    width, depth, heads = (32, 1, 2) if small else (96, 1, 4)
    points = round(2 * seconds)
    data = scenes_data(targets=dict(importance=dict(kind="curve", of="importance", points=points)))
    data["clip"] |= dict(seconds=seconds, frames=round(4 * seconds))
    data["evaluation"] = dict(stride=seconds / 2)
    line = dict(seconds=seconds, steps=points, width=width, depth=depth, heads=heads)
    return dict(
        seed=0,
        steps=20 if small else 400,
        batch=8 if small else 16,
        data=data,
        trunk=scenes_trunk(small),
        views=dict(clean={}),
        objectives=dict(moments=dict(kind="moments", curves=("importance",), **line)),
        optim=dict(learning_rate=1e-3, warmup=5 if small else 50, weight_decay=0.05, ema=0.99),
        evals=dict(summary=dict(kind="summary", data="data/scenes/test.jsonl", subsets=("V", "A", "VA"), share=0.25)),
        save_every=10 if small else 200,
        log_every=5 if small else 10,
    )
