"""Fusion mechanisms at equal depth, over seeds, on labels that need one stream, either, or both."""

FUSIONS = ("late", "joint", "cross", "bottleneck")
OTHERS = ("video", "audio", "either", "order", "sync")


def get_study(quick: bool) -> dict:
    return dict(
        config="configs/world_fusion.py" + (":quick" if quick else ""),
        variants={name: (f"trunk.fusion.kind={name}",) for name in FUSIONS},
        seeds=(0, 1, 2),
        score="labels/VA/both",
        scores=tuple(f"labels/VA/{name}" for name in OTHERS),
        chance={f"labels/VA/{name}": 0.5 for name in ("both", *OTHERS)},
    )
