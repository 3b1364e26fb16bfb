"""Parameter tree ↔ one .safetensors file, named by path with dots."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vmm.errors import UserError


def save_params(params: Mapping, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a parameter tree; "a/b/kernel" is stored as "a.b.kernel"."""
    flat = {name: np.asarray(jax.device_get(value), order="C") for name, value in flatten_dict(params, sep=".").items()}
    save_arrays(flat, path, {"format": "np", **(metadata or {})})


def save_arrays(tensors: Mapping[str, np.ndarray], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Writes arrays by name to a .safetensors file, with the rights that any new file has: safetensors' are its owner's alone."""
    with open(path, "wb") as file:
        rights = os.fstat(file.fileno()).st_mode & 0o777
    save_file(dict(tensors), str(path), metadata=metadata)
    os.chmod(path, rights)


def load_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a .safetensors file: name → array. Raises UserError: it is missing or broken."""
    if not Path(path).is_file():
        raise UserError(f"weights {path}: no such file")
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"weights {path}: not a whole safetensors file ({error})") from None


def parameter_tree(tensors: Mapping[str, np.ndarray], shapes: Mapping, where: str | Path) -> dict:
    """Returns named tensors as a parameter tree, checked against the model's.

    Args:
      tensors: parameter path with dots → array. shapes: the model's tree of arrays or shapes. where: their file.

    Raises:
      UserError: names, shapes or dtypes differ (which, by name), or a value is not finite.
    """
    wanted = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in flatten_dict(shapes, sep=".").items()}
    there = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    wrong = sorted(name for name in set(wanted) | set(there) if wanted.get(name) != there.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"weights {where}: {len(wrong)} tensors do not fit the config, the first {name}: "
            f"file {there.get(name, 'lacks it')}, model {wanted.get(name, 'lacks it')}"
        )
    broken = next(
        (name for name, value in tensors.items() if not np.isfinite(np.asarray(value, np.float32)).all()), None
    )
    if broken is not None:
        raise UserError(f"weights {where}: {broken} holds values that are not finite; the file is broken")
    return unflatten_dict(dict(tensors), sep=".")
