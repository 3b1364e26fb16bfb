"""Contrast, masked modelling, or both: what does each mix leave in the features?"""

# Weights of the contrastive and of the masked loss.
MIXES = ((1.0, 0.0), (1.0, 0.25), (1.0, 0.5), (1.0, 1.0), (0.0, 1.0))


def get_study(quick: bool) -> dict:
    length = ("steps=300", "optim.warmup=30", "log_every=25", "save_every=100") if quick else ()
    variants = {
        f"contrast {contrast:g}, masked {masked:g}": (
            f"objectives.contrast.weight={contrast}",
            f"objectives.masked.weight={masked}",
            *length,
        )
        for contrast, masked in MIXES
    }
    return dict(
        config="configs/demo.py" + (":small" if quick else ""),
        variants=variants,
        seeds=(0, 1, 2),
        score="retrieval/VA→T/R@1",
        scores=("probe/V/shape", "probe/V/motion", "probe/A/rhythm", "probe/VA/both"),
        chance={"probe/V/shape": 1 / 6, "probe/V/motion": 1 / 8, "probe/A/rhythm": 1 / 6, "probe/VA/both": 0.5},
        against="contrast 1, masked 0",
    )
