"""This fusion beside two of vmm's, over three seeds: vmm ablate examples/my_fusion."""

from pathlib import Path


def get_study(quick: bool) -> dict:
    return dict(
        config=str(Path(__file__).parent / "config.py"),
        seeds=(0,) if quick else (0, 1, 2),
        score="probe/VA/both",
        variants={
            "my fusion": ("trunk.fusion.kind=my_fusion",),
            "late": ("~trunk.fusion.strength", "trunk.fusion.kind=late"),
            "joint": ("~trunk.fusion.strength", "trunk.fusion.kind=joint"),
        },
    )
