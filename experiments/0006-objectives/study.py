"""Contrast, masked modelling, or both: what does each mix leave in the features?"""

# Weights of the contrastive and of the masked loss.
MIXES = ((1.0, 0.0), (1.0, 0.25), (1.0, 0.5), (1.0, 1.0), (0.0, 1.0))


def get_study(quick: bool) -> dict:
    length = ("steps=300", "optim.warmup=30", "log_every=25", "save_every=100") if quick else ()
    # Of the demo's objectives these two alone, on streams in small tubelets.
    alone = (
        "trunk.encoders.video.tubelet=(8, 8, 8)",
        *(f"objectives.{name}.weight=0.0" for name in ("words", "together")),
        "objectives.masked.modalities=('video', 'audio')",
        "views.masked.video.kind=tube",
        "views.masked.video.ratio=0.75",
        "views.masked.audio.ratio=0.6",
        "views.clean={}",
        "objectives.contrast.view=clean",
    )
    variants = {
        f"contrast {contrast:g}, masked {masked:g}": (
            *alone,
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
