"""Does withholding a stream while training help when a stream is missing, and what does it cost when none is?"""

DROPS = (0.0, 0.1, 0.3, 0.5)


def get_study(quick: bool) -> dict:
    variants = {f"drop {drop}": ("trunk.fusion.kind=joint", f"data.augment.drop={drop}") for drop in DROPS}
    return dict(
        config="configs/world_fusion.py" + (":quick" if quick else ""),
        variants=variants,
        seeds=(0, 1, 2) if quick else (0, 1, 2, 3, 4),
        score="labels/VA/both",
        scores=("labels/VA/video", "labels/V/video", "labels/VA/audio", "labels/A/audio"),
        chance={name: 0.5 for name in ("labels/VA/both", "labels/V/video", "labels/A/audio")},
        against="drop 0.0",
    )
