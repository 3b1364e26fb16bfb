"""How do late and joint fusion gain from more training clips, at equal steps?"""

from pathlib import Path

SIZES = (64, 256, 1024)
WORLD = Path("data/world")


def _part(count: int) -> str:
    """Returns the manifest of the world's first clips, written beside the whole one if that is there."""
    whole, part = WORLD / "train.jsonl", WORLD / f"train-{count}.jsonl"
    if whole.is_file() and not part.is_file():
        lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
        part.write_text("".join(lines[:count]), encoding="utf-8")
    return str(part)


def get_study(quick: bool) -> dict:
    variants = {
        f"{kind}, {count} clips": (f"trunk.fusion.kind={kind}", f"data.train={_part(count)}")
        for kind in ("late", "joint")
        for count in SIZES
    }
    variants |= {f"{kind}, all clips": (f"trunk.fusion.kind={kind}",) for kind in ("late", "joint")}
    return dict(
        config="configs/world_fusion.py" + (":quick" if quick else ""),
        variants=variants,
        seeds=(0, 1, 2),
        score="labels/VA/both",
        scores=("labels/VA/video", "labels/VA/audio", "labels/VA/order"),
        chance={f"labels/VA/{name}": 0.5 for name in ("both", "video", "audio", "order")},
        against="joint, all clips",
    )
