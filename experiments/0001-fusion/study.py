"""Fusion mechanisms at equal depth, over seeds, on labels that need one stream, either, or both.

Without `quick` also: where of a fixed depth fusion begins, and how many bottlenecks it has.
"""

FUSIONS = ("late", "joint", "cross", "bottleneck")
OTHERS = ("video", "audio", "either", "order", "sync")
SPLITS = (1, 3)  # layers of fusion of the four that a stream passes; 2 is the config's
BOTTLENECKS = (1, 2, 16)  # 4 is the mechanism's default


def _split(kind: str, depth: int, whole: int = 4) -> tuple[str, ...]:
    """Returns overrides: `depth` layers of fusion, the rest in the encoders."""
    encoders = tuple(f"trunk.encoders.{name}.depth={whole - depth}" for name in ("video", "audio"))
    return (f"trunk.fusion.kind={kind}", f"trunk.fusion.depth={depth}", *encoders)


def get_study(quick: bool) -> dict:
    variants = {name: (f"trunk.fusion.kind={name}",) for name in FUSIONS}
    if not quick:
        # A bottleneck needs two layers, one to write and one to read.
        variants |= {
            f"{kind}, {depth} of 4": _split(kind, depth)
            for kind in ("joint", "cross", "bottleneck")
            for depth in SPLITS
            if kind != "bottleneck" or depth > 1
        }
        variants |= {
            f"bottleneck, {count} tokens": ("trunk.fusion.kind=bottleneck", f"trunk.fusion.bottlenecks={count}")
            for count in BOTTLENECKS
        }
    return dict(
        config="configs/world_fusion.py" + (":quick" if quick else ""),
        variants=variants,
        seeds=(0, 1, 2),
        score="labels/VA/both",
        scores=tuple(f"labels/VA/{name}" for name in OTHERS),
        chance={f"labels/VA/{name}": 0.5 for name in ("both", *OTHERS)},
    )
