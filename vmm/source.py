"""Any folder of weights → a model's config and tensors: published by vmm, whole or as adapters, in a family's layout, or a run."""

import dataclasses
import hashlib
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

import vmm
from vmm.build import plain
from vmm.encoders import ENCODERS
from vmm.errors import UserError, one_of
from vmm.experiment import Experiment
from vmm.plugins import admit
from vmm.run import open_run, weights
from vmm.sizes import check_claims
from vmm.told import follow, is_own
from vmm.weights import fit, load_tensors, parameter_tree
from vmm.weights.families import reason
from vmm.weights.fit import unstack
from vmm.weights.published import read_config, read_published

FORMAT = 1  # of folders that vmm publishes
ASKED = ("labels", "tags", "targets", "text")  # of a config's data: what heads are for, what the stream of text is
# A tokenizer and what lies beside it: how its special tokens are called, what `transformers` reads.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "spiece.model",
)  # fmt: skip
_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    *TOKENIZER,
    "*.npz",
    "README.md",
]


class Source(NamedTuple):
    """Weights and what they are weights of.

    kind: "vmm", "run" or a family. model: {"trunk", "views", "objectives"}. clip: as in a config's data; asked: ASKED of it.
    tensors: parameter path with dots → array. left: names in the file that nothing was made of, and why. tokenizer: file, or None.
    classes: label → names of its classes, where they are told.
    """

    kind: str
    model: dict
    clip: dict
    asked: dict
    tensors: dict
    left: list
    tokenizer: Path | None
    classes: dict = {}


def open_source(
    source: str | Path, base: str | Mapping[str, str] | None = None, plugins: Collection[str] = ()
) -> Source:
    """Reads a folder, or a Hub repository ("owner/name[@revision]", old ones "name"). Nothing is ever unpickled.

    base: of a folder of adapters (`vmm publish --adapters`): what they are put on, as `init_from`; None: where it was
    when they were trained. plugins: modules that may be imported for kinds that are named by import path (plugins.py).

    Raises:
      UserError: there is none, it is not whole, names a kind whose module is not allowed, or of a format or family that is not known.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(source)
    run = (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
    config = {}
    if not run and (not list(folder.glob("*.npz")) or (folder / "config.json").is_file()):
        config = read_config(folder)
    admit(config, plugins, folder)
    ours = config.get("library_name") == "vmm"
    if ours and "base" in config:
        return _adapted(folder, config, base)
    if base is not None:
        raise UserError(f"{source}: holds a whole model, no adapters; leave `base` out")
    if run:
        return _run(folder, plugins)
    if ours:
        return _vmm(folder, config)
    if "model_type" not in config and not list(folder.glob("*.npz")):
        raise UserError(
            f"{folder}: holds no model published by `vmm publish`, nor one with a model_type (config.json has "
            f"{sorted(config)[:5]})"
        )
    imported = read_published(folder)
    model = {key: imported.model[key] for key in ("trunk", "views", "objectives")}
    left = [f"{name} ({reason(imported.family, name) or 'unknown'})" for name in imported.left]
    asked = {"labels": imported.model.get("labels", {})}
    return Source(
        imported.family,
        model,
        imported.model["clip"],
        asked,
        imported.tensors,
        left,
        imported.tokenizer,
        imported.model.get("classes", {}),
    )


def _vmm(folder: Path, config: dict) -> Source:
    model, clip, asked = _read(folder, config)
    tensors = load_tensors(folder / "model.safetensors")
    _check(folder, model, tensors)
    tokenizer = folder / "tokenizer.json"
    return Source(
        "vmm", model, clip, asked, tensors, [], tokenizer if tokenizer.is_file() else None, _classes(folder, config)
    )


def _classes(folder: Path, config: dict) -> dict:
    """Returns label → names of a folder's config, {} where it tells none."""
    classes = config.get("classes", {})
    if not isinstance(classes, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in classes.values()
    ):
        raise UserError(f"{folder / 'config.json'}: classes must be label → list of names")
    return classes


def _read(folder: Path, config: dict) -> tuple[dict, dict, dict]:
    """Returns model, clip and what is asked of a folder's config."""
    path = folder / "config.json"
    try:
        config = plain(config)
        known, model, clip = config["format"] == FORMAT, config["model"], config["clip"]
        asked = {"labels": config["labels"], **asked_of(config)}
        model["trunk"]["encoders"].items()
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: holds no model published by `vmm publish` (config.json: {error!r})") from None
    if not known:
        raise UserError(f"{path}: format {config['format']!r} is not known to vmm {vmm.__version__}; upgrade vmm")
    return model, clip, asked


def _check(folder: Path, model: dict, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises UserError: the config tells of sizes that its tensors cannot have."""
    scanned = [len(value) for name, value in tensors.items() if ".layers." in name and value.ndim]
    check_claims(model, [value.shape for value in tensors.values()], scanned, str(folder / "config.json"))


def asked_of(data: Mapping) -> dict:
    """Returns the entries of ASKED that a group has."""
    return {key: data[key] for key in ASKED if key in data}


def _run(folder: Path, plugins: Collection[str]) -> Source:
    run = open_run(folder, alone=True, plugins=plugins)
    flat = flatten_dict(run.experiment.merged(jax.device_get(weights(run.state))), sep=".")
    data = run.config["data"]
    model = {key: run.config[key] for key in ("trunk", "views", "objectives", "balance") if key in run.config}
    tensors = {name: np.asarray(value) for name, value in flat.items()}
    return Source(
        "run",
        model,
        data.get("clip", {}),
        asked_of(data),
        tensors,
        [],
        Path(data["tokenizer"]) if data.get("tokenizer") else None,
    )


def experiment_of(source: Source, adapt: tuple = ()) -> Experiment:
    """Returns the published part of a config, within a config that trains nothing."""
    data = {"train": "", "tokenizer": str(source.tokenizer or ""), "clip": source.clip, **source.asked}
    config = {"steps": 1, "batch": 1, **source.model, "optim": {"ema": 0.9}, "data": data, "adapt": adapt}
    try:
        return Experiment(config)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the config is data of whoever published it: what it breaks is its own
        line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"config.json: its model cannot be built ({type(error).__name__}: {line[:200]})") from error


def _paths(init_from: str | Mapping[str, str]) -> dict[str | None, str]:
    return {None: init_from} if isinstance(init_from, str) else dict(init_from)


def open_bases(init_from: str | Mapping[str, str]) -> dict[str | None, Source]:
    """Returns modality (None: all) → the source of a config's init_from; raises UserError as open_source."""
    return {modality: open_source(path) for modality, path in _paths(init_from).items()}


def fit_base(
    init_from: str | Mapping[str, str],
    values: Mapping[str, np.ndarray],
    experiment: Experiment,
    opened: Mapping[str | None, Source] | None = None,
) -> tuple[dict, dict]:
    """Returns a model's tensors with those of other models in them, and source → its Report.

    Args:
      init_from: a source that vmm.load takes, for all its parameters; or modality → source, for one encoder each.
      values: parameter path with dots → array, of the experiment's model. opened: of open_bases, None: opened here.

    Raises:
      UserError: a source cannot be read, lacks the modality, or nothing of it fits.
    """
    values, reports, bases = dict(values), {}, open_bases(init_from) if opened is None else opened
    for modality, path in _paths(init_from).items():
        base = bases[modality]
        if modality is not None and modality not in base.model["trunk"]["encoders"]:
            known = sorted(base.model["trunk"]["encoders"])
            raise UserError(f"init_from.{modality}: {path} has no encoder of {modality}; {one_of(modality, known)}")
        tensors = base.tensors
        if modality is not None:
            tensors = {name: x for name, x in tensors.items() if name.startswith(f"model.encoder_{modality}.")}
        values, report = fit(tensors, values, _tubelets(base.model, experiment))
        if not report.loaded:
            raise UserError(f"init_from: nothing of {path} fits the config; the first left is {report.left[:1]}")
        reports[path] = report._replace(missing=[] if modality is not None else report.missing)
    return values, reports


def _tubelets(model: Mapping, experiment: Experiment) -> dict:
    """Returns encoder → (the source's tubelet, ours), for video encoders in both."""
    default = {f.name: f.default for f in dataclasses.fields(ENCODERS["video"])}["tubelet"]
    old, new = model["trunk"]["encoders"], experiment.config.trunk["encoders"]
    return {
        name: (tuple(old[name].get("tubelet", default)), tuple(new[name].get("tubelet", default)))
        for name in set(old) & set(new)
        if old[name]["kind"] == new[name]["kind"] == "video"
    }


def base_tensors(
    init_from: str | Mapping[str, str], experiment: Experiment, opened: Mapping[str | None, Source] | None = None
) -> dict[str, np.ndarray]:
    """Returns the tensors of an experiment's model that come whole from its base, as a run begins with them.

    Raises:
      UserError: as fit_base.
    """
    shapes = flatten_dict(nn.unbox(experiment.shapes), sep=".")
    blank = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    values, reports = fit_base(init_from, blank, experiment, opened)
    taken = {name for r in reports.values() for name in (*r.loaded, *(resampled for resampled, _ in r.resampled))}
    # The reports name scanned layers one by one.
    return {name: value for name, value in values.items() if taken.issuperset(unstack({name: value}))}


def fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of tensors: names, types, shapes and bytes, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        total.update(f"{name} {value.dtype} {value.shape}\n".encode())
        total.update(value.tobytes())
    return total.hexdigest()


def _adapted(folder: Path, config: dict, base: str | Mapping[str, str] | None) -> Source:
    """Reads a folder of adapters and puts them on their base: a model without adapters."""
    model, clip, labels = _read(folder, config)
    try:
        adapt, digest, told = config["adapt"], config["base_sha256"], config["base"]
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'}: is of no folder of adapters ({error} is missing)") from None
    base = told_base(told, folder) if base is None else base
    own, tokenizer = load_tensors(folder / "adapters.safetensors"), folder / "tokenizer.json"
    source = Source("vmm", model, clip, labels, own, [], tokenizer if tokenizer.is_file() else None)
    try:
        opened = open_bases(base)
    except UserError as error:
        raise UserError(f"{folder}: its base cannot be read; give it as `base` ({error})") from None
    _check(folder, model, own | {f"{of}.{name}": x for of, one in opened.items() for name, x in one.tensors.items()})
    experiment = experiment_of(source, plain(adapt))
    try:
        under = base_tensors(base, experiment, opened)
    except UserError as error:
        raise UserError(f"{folder}: its base does not fit; give another as `base` ({error})") from None
    under = {name: value for name, value in under.items() if name not in own}
    if fingerprint(under) != digest:
        raise UserError(
            f"{folder}: these adapters are of another base than {base} (SHA-256 of its tensors "
            f"{fingerprint(under)[:12]}, theirs {digest[:12]}); give the one they were trained on as `base`"
        )
    tree = parameter_tree({**under, **own}, nn.unbox(experiment.shapes), folder)
    return source._replace(tensors=flatten_dict(experiment.merged(tree), sep="."))


def told_base(told, folder: Path) -> str | dict[str, str]:
    """Returns the base that a folder of adapters tells, as vmm.load takes it from here; raises UserError as told.follow."""
    return follow(told, folder, is_own(folder / "config.json"), "`base` (--base)")


def _from_hub(source: str | Path) -> Path:
    # What cannot be a name of the Hub, or begins with a folder that is here, is a path: the Hub is not asked for it.
    words = str(source).partition("@")[0].split("/")
    here = Path(words[0]).is_dir() if len(words) == 2 else Path(words[0]).exists()
    if len(words) > 2 or not all(words) or words[0] in (".", "..") or here:
        raise UserError(f"{source}: no such folder; give a published folder, a run, or [OWNER/]NAME of the Hub")
    source = str(source)
    print(f"{source}: no such folder; asking the Hub", file=sys.stderr)
    from huggingface_hub import snapshot_download  # slow to import, and most sources are folders
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"{source}: neither a folder in {Path.cwd()} nor a model that can be had from the Hub ({line})"
        ) from None
