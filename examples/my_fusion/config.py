"""The demo's small model with the fusion of this package. Not reproduced: it shows the way, not a number."""

from pathlib import Path

from vmm.build import load_config

DEMO = Path(__file__).parent.parent.parent / "configs" / "demo.py"


def get_config(variant: str = "") -> dict:
    if variant:
        raise ValueError(f"no variant {variant!r}")
    config = load_config(f"{DEMO}:small")
    config["trunk"]["fusion"] = dict(kind="my_fusion", width=32, depth=1, heads=2, strength=0.5)
    return config
