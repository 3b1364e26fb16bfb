"""Published families of models: how their config.json and tensors become ours, and back.

Contract of a module here, held for every entry by tests/test_families.py:

    PREFIX: str                             of base tensors in files that hold heads too; "" if there is none
    parts(names) → frozenset[str]           which optional parts a file's tensors hold ("decoder", "head", …)
    describe(config, parts) → model         their config.json → our {"trunk", "views", "objectives", "clip"}
    config(model) → (config, parts)         the reverse, with "model_type" and "architectures"
    rules(config, parts) → [Rule]           how tensors correspond, see layout.py
    PROCESSOR: {key: value}                 of the image processor's file, where the family sees; see published.py
    LEFT: {pattern: what it is}             tensors of theirs that ours has no use for, if there are such

FAMILIES: "model_type" of config.json → module.
"""

import re
from types import ModuleType

from vmm.weights.families import (
    ast,
    bert,
    cav_mae,
    clip,
    siglip,
    timesformer,
    videomae,
    videoprism,
    vit,
    vit_mae,
    vivit,
    vjepa2,
    whisper,
)

FAMILIES: dict[str, ModuleType] = {
    "audio-spectrogram-transformer": ast,
    "bert": bert,
    "cav_mae": cav_mae,
    "clip": clip,
    "siglip": siglip,
    "timesformer": timesformer,
    "videomae": videomae,
    "videoprism": videoprism,
    "videoprism_vision_model": videoprism,
    "vit": vit,
    "vit_mae": vit_mae,
    "vivit": vivit,
    "vjepa2": vjepa2,
    "whisper": whisper,
}


def reason(family: str, name: str) -> str | None:
    """Returns what a tensor of theirs is that is left on purpose; None: nobody knows of it."""
    known = vars(FAMILIES[family]).get("LEFT", {})
    return next((what for pattern, what in known.items() if re.search(pattern, name)), None)
