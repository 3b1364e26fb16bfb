"""How deep in the model a parameter is, by its path, and the learning rates that follow from it."""

import re

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

_PART = re.compile(r"(?:adapters/)?model/(encoder_\w+|fuse)/(.*)")
_LAYER = re.compile(r"layer_(\d+)")
_RUN = re.compile(r"run_(\d+)")
_LAST = re.compile(r"(?:.*/)?(?:norm|leave)/.*")  # behind the last layer


def _layer(path: str) -> tuple[tuple, int] | None:
    """Returns which stretch of layers a path within an encoder or the fusion is of, stretches in order, and its number there.

    None: it is of no layer. Scanned layers are number 0, the first of all that the parameter holds.
    """
    words = path.split("/")
    run = next((int(found.group(1)) for word in words if (found := _RUN.fullmatch(word))), 0)
    layer = next((int(found.group(1)) for word in words if (found := _LAYER.fullmatch(word))), None)
    if layer is None and "layers" not in words:
        return None
    return ("temporal" in words, run), layer or 0


def layer_rates(decay: float, params) -> dict:
    """Returns the tree of rate multipliers decay ^ (layers above a parameter), as BEiT and MAE are fine-tuned (Bao et al.
    2022, app. E; the rule is that of Clark et al. 2020). Scanned layers have an array, one number along their first axis.

    Heads and all else outside the trunk: 1. Of F fusion layers, layer j (from 0): decay ^ (F − j); what enters them:
    decay ^ F, as each encoder's last norm; the fusion's last norm: 1. Of an encoder of n layers, layer i: decay ^ (F + n − i),
    its embeddings: decay ^ (F + n + 1). An adapter counts as what it adapts.

    params: tree of arrays or shapes.
    """
    flat = flatten_dict(params)
    parts = {path: found.groups() for path in flat if (found := _PART.fullmatch("/".join(path)))}
    # Streams side by side in a late fusion are one stretch: their layers are at one depth.
    depths: dict[str, dict[tuple, int]] = {"fuse": {}}
    for path, (part, rest) in parts.items():
        stretches, layer = depths.setdefault(part, {}), _layer(rest)
        if layer is not None:
            size = flat[path].shape[0] if "layers" in path else layer[1] + 1
            stretches[layer[0]] = max(stretches.get(layer[0], 0), size)

    def rate(path: tuple):
        if path not in parts:
            return 1.0
        part, rest = parts[path]
        stretches, layer = depths[part], _layer(rest)
        above = sum(depths["fuse"].values()) if part != "fuse" else 0
        if layer is not None:
            below = sum(size for stretch, size in stretches.items() if stretch < layer[0]) + layer[1]
            left = above + sum(stretches.values()) - below
            if "layers" not in path:
                return decay**left
            count, axes = flat[path].shape[0], len(flat[path].shape) - 1
            return (decay ** (left - np.arange(count))).astype(np.float32).reshape(count, *(1,) * axes)
        if _LAST.fullmatch(rest):
            return decay**above
        # What comes before a fusion's layers goes with the first of them.
        return decay ** (above + sum(stretches.values()) + (part != "fuse"))

    return unflatten_dict({path: rate(path) for path in flat})
