"""Pictures of the synthetic world from other pictures: a pixel decoder that starts as the blend of its neighbours.

Every other of 9 frames is made from those between which it lies (frame interpolation); `future`: the last two from the
seven before; `denoise`: all, from all under noise of 0.1 of the range; `adversary`: interpolation with a critic besides.
`pictures` scores them beside the nearest frame and the blend. `small` runs in seconds.
"""

from common import WORLD_LABELS, as_config, check, world_data


@as_config
def get_config(variant: str = "") -> dict:
    check(variant, "future", "denoise", "adversary", "small")
    small = variant == "small"
    tubelet, width, heads, steps = (1, 8, 8), 32 if small else 96, 2 if small else 4, 20 if small else 600
    if variant == "denoise":
        shown = dict(noise=0.1)
    elif variant == "future":
        shown = dict(kind="frames", ratio=2 / 9, hide=(-2, -1))
    else:
        shown = dict(kind="frames", ratio=4 / 9, hide=(1, 3, 5, 7))
    root = "data/world"
    return dict(
        seed=0,
        steps=steps,
        batch=8 if small else 16,
        data=world_data(
            root,
            labels=WORLD_LABELS,
            clip=dict(seconds=2.0, frames=9, size=24 if small else 48, text_length=24),
        ),
        trunk=dict(
            encoders=dict(video=dict(kind="video", tubelet=tubelet, width=width, depth=1, heads=heads)),
            fusion=dict(kind="late", width=width, depth=0, heads=heads),
        ),
        views=dict(shown=dict(video=shown)),
        objectives=dict(
            frames=dict(
                kind="pixels",
                view="shown",
                tubelet=tubelet,
                width=width,
                depth=1 if small else 2,
                heads=heads,
                similarity=0.1,
                adversary=dict(weight=0.003) if variant == "adversary" else {},
            )
        ),
        optim=dict(learning_rate=2e-3, warmup=5 if small else 50, weight_decay=0.01, ema=0.99),
        evals=dict(pictures=dict(kind="pictures", data=f"{root}/test.jsonl", objective="frames", view="shown")),
        save_every=10 if small else 300,
        log_every=5 if small else 10,
    )
