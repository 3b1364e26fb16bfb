"""Any folder of weights → a model's config and tensors: published by vmm, published in a family's layout, or a run."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

import vmm
from vmm.build import plain
from vmm.errors import UserError
from vmm.run import open_run, weights
from vmm.weights import load_tensors
from vmm.weights.families import reason
from vmm.weights.published import read_config, read_published

FORMAT = 1  # of folders that vmm publishes
_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "*.npz",
    "README.md",
]


class Source(NamedTuple):
    """Weights and what they are weights of.

    kind: "vmm", "run" or a family. model: {"trunk", "views", "objectives"}. clip, labels: as in a config's data.
    tensors: parameter path with dots → array. left: names in the file that nothing was made of, and why. tokenizer: file, or None.
    """

    kind: str
    model: dict
    clip: dict
    labels: dict
    tensors: dict
    left: list
    tokenizer: Path | None


def open_source(source: str | Path) -> Source:
    """Reads a folder, or a Hub repository ("owner/name[@revision]"). Nothing is ever unpickled.

    Raises:
      UserError: there is none, it is not whole, or of a format or family that is not known.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source))
    if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        return _run(folder)
    config = read_config(folder) if not list(folder.glob("*.npz")) or (folder / "config.json").is_file() else {}
    if config.get("library_name") == "vmm":
        return _vmm(folder, config)
    if "model_type" not in config and not list(folder.glob("*.npz")):
        raise UserError(
            f"{folder}: holds no model published by `vmm publish`, nor one with a model_type (config.json has "
            f"{sorted(config)[:5]})"
        )
    imported = read_published(folder)
    model = {key: imported.model[key] for key in ("trunk", "views", "objectives")}
    left = [f"{name} ({reason(imported.family, name) or 'unknown'})" for name in imported.left]
    labels = imported.model.get("labels", {})
    return Source(imported.family, model, imported.model["clip"], labels, imported.tensors, left, imported.tokenizer)


def _vmm(folder: Path, config: dict) -> Source:
    path = folder / "config.json"
    try:
        config = plain(config)
        known, model, clip, labels = config["format"] == FORMAT, config["model"], config["clip"], config["labels"]
        model["trunk"]["encoders"].items()
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: holds no model published by `vmm publish` (config.json: {error!r})") from None
    if not known:
        raise UserError(f"{path}: format {config['format']!r} is not known to vmm {vmm.__version__}; upgrade vmm")
    tensors = load_tensors(folder / "model.safetensors")
    tokenizer = folder / "tokenizer.json"
    return Source("vmm", model, clip, labels, tensors, [], tokenizer if tokenizer.is_file() else None)


def _run(folder: Path) -> Source:
    run = open_run(folder, alone=True)
    flat = flatten_dict(jax.device_get(weights(run.state)), sep=".")
    data = run.config["data"]
    model = {key: run.config[key] for key in ("trunk", "views", "objectives", "balance") if key in run.config}
    tensors = {name: np.asarray(value) for name, value in flat.items()}
    return Source("run", model, data.get("clip", {}), data.get("labels", {}), tensors, [], Path(data["tokenizer"]))


def _from_hub(source: str) -> Path:
    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"{source}: neither a folder nor a model that can be had from the Hub ({line})") from None
