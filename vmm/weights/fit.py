"""Weights of one model into the parameters of another: what is the same is taken, what differs in size is resampled.

Names are parameter paths with dots. Layers of a source that the target's encoder has no room for go on in its fusion.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

_LAYER = re.compile(r"^(model\.encoder_(\w+?)\.stack\.blocks\.layer_)(\d+)\.block\.(.+)$")
_SCANNED = ".layers."


class Report(NamedTuple):
    """Names, ours: loaded as they are; resampled, (name, what was done); missing: of the target, left as they were;
    left: of the source, not used; mismatched, (name, what does not fit): neither used nor resampled."""

    loaded: list
    resampled: list
    missing: list
    left: list
    mismatched: list


def unstack(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors with scanned layers written out: layers.x [n …] → layer_0.x, layer_1.x, …"""
    result = {}
    for name, value in tensors.items():
        if _SCANNED in name:
            for i in range(len(value)):
                result[name.replace(_SCANNED, f".layer_{i}.", 1)] = value[i]
        else:
            result[name] = value
    return result


def fit(
    source: Mapping[str, np.ndarray],
    target: Mapping[str, np.ndarray],
    tubelets: Mapping[str, tuple[tuple, tuple]],
) -> tuple[dict[str, np.ndarray], Report]:
    """Returns the target's tensors with the source's in them, and the report.

    Args:
      source, target: parameter path → array, in any of the two layouts of layers. tubelets: video encoder → the
        source's tubelet, the target's.
    """
    room = unstack(target)
    moved = {_moved(name, room): value for name, value in unstack(source).items()}
    values, report = dict(room), Report([], [], [], [], [])
    for name, value in moved.items():
        if name not in room:
            report.left.append(name)
        elif value.shape == room[name].shape:
            values[name] = value
            report.loaded.append(name)
        else:
            fitted = _resample(name, value, room[name].shape, tubelets)
            told = f"{list(value.shape)} → {list(room[name].shape)}"
            if fitted is None:
                report.mismatched.append((name, told))
            else:
                values[name] = fitted
                report.resampled.append((name, told))
    taken = {*report.loaded, *(name for name, _ in report.resampled)}
    report.missing.extend(name for name in room if name not in taken)
    return _restack(values, target), report


def _restack(values: dict, target: Mapping) -> dict:
    result = {}
    for name, like in target.items():
        if _SCANNED in name:
            names = [name.replace(_SCANNED, f".layer_{i}.", 1) for i in range(len(like))]
            result[name] = np.stack([np.asarray(values[each]) for each in names])
        else:
            result[name] = np.asarray(values[name])
    return {name: np.asarray(value, target[name].dtype) for name, value in result.items()}


def _moved(name: str, room: Mapping) -> str:
    """Returns the target's name of a source's layer: in the encoder while it has such a layer, else in the fusion."""
    found = _LAYER.match(name)
    if not found:
        return name
    prefix, modality, layer, rest = found.group(1), found.group(2), int(found.group(3)), found.group(4)
    depth = len({n[len(prefix) :].split(".")[0] for n in room if n.startswith(prefix)})
    if layer < depth:
        return name
    for place in (
        f"model.fuse.{modality}.blocks.layer_{layer - depth}.block.{rest}",  # late
        f"model.fuse.stack.blocks.layer_{layer - depth}.block.{rest}",  # joint
        f"model.fuse.blocks.layer_{layer - depth}.{modality}.{rest}",  # a block for each stream
    ):
        if place in room:
            return place
    return name


def _resample(name: str, value: np.ndarray, shape: tuple, tubelets: Mapping) -> np.ndarray | None:
    if ".positions." in name and value.ndim == len(shape) and value.shape[-1] == shape[-1]:
        if "encoder_text" in name:  # cut; the places of a longer text are not known
            return value[: shape[0]] if shape[0] < value.shape[0] else None
        return np.asarray(jax.image.resize(value, shape, "cubic", antialias=False))
    for encoder, (old, new) in tubelets.items():
        if name == f"model.encoder_{encoder}.embed.kernel" and value.shape[1] == shape[1]:
            return resize_patches(value, old, new)
    return None


def resize_patches(kernel: np.ndarray, old: tuple[int, int, int], new: tuple[int, int, int]) -> np.ndarray:
    """Returns the patch embedding [(p q r C) D] of tubelets of another size.

    Over space by the pseudo-inverse of bilinear resizing, so that a resized patch gives the same token (FlexiViT,
    Beyer et al. 2023, sec. 3.4); over time by repeating and dividing, so that a still clip does (inflation, Carreira
    & Zisserman 2017).
    """
    width = kernel.shape[-1]
    values = kernel.reshape(old[0], old[1] * old[2], -1)  # [p (q r) (C D)]
    if old[1:] != new[1:]:
        up = _bilinear(old[1:], new[1:])  # [(q r)' (q r)]: x' = up @ x; wanted: w'ᵀ up x = wᵀ x
        values = np.einsum("nm,pmc->pnc", np.linalg.pinv(up.T), values)
    if old[0] != new[0]:
        values = np.repeat(values.mean(0, keepdims=True), new[0], axis=0) * (old[0] / new[0])
    return values.reshape(-1, width).astype(kernel.dtype)


def _bilinear(old: tuple, new: tuple) -> np.ndarray:
    unit = np.eye(old[0] * old[1], dtype=np.float32).reshape(*old, -1)
    return np.asarray(jax.image.resize(unit, (*new, unit.shape[-1]), "linear", antialias=False)).reshape(
        -1, unit.shape[-1]
    )
