"""Fusion mechanisms on real audio-visual clips: handwritten digits that move, and the same digit spoken, few of them labelled.

Three layers that a stream passes, of which the last two fuse. Without `quick` also: where of them fusion begins, and how many
bottlenecks it has.
"""

DATA = "data/digits"  # experiments/0007-real/make.py SHARED_DATA data/digits


def _fused(kind: str, depth: int = 2, *more: str) -> tuple[str, ...]:
    """Returns overrides: `depth` of three layers fuse, the rest are the encoders'."""
    encoders = tuple(f"trunk.encoders.{name}.depth={3 - depth}" for name in ("video", "audio"))
    return (f"trunk.fusion.kind={kind}", f"trunk.fusion.depth={depth}", *encoders, *more)


def get_study(quick: bool) -> dict:
    common = (f"data.train={DATA}/train-40-0.jsonl", f"evals.digits.data={DATA}/test.jsonl")
    common += ("steps=100", "optim.warmup=20", "save_every=100") if quick else ()
    variants = {kind: _fused(kind) for kind in ("late", "joint", "cross", "bottleneck")}
    if not quick:
        variants |= {f"{kind}, 1 of 3": _fused(kind, 1) for kind in ("joint", "cross")}
        variants |= {
            f"bottleneck, {count} tokens": _fused("bottleneck", 2, f"trunk.fusion.bottlenecks={count}")
            for count in (1, 16)
        }
    return dict(
        config="configs/real_digits.py:scratch",
        variants={name: (*overrides, *common) for name, overrides in variants.items()},
        seeds=(0, 1, 2),
        score="digits/VA/digit",
        scores=("digits/V/digit", "digits/A/digit"),
        chance={"digits/VA/digit": 0.1, "digits/V/digit": 0.1, "digits/A/digit": 0.1},
    )
