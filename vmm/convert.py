"""vmm convert: published weights → a folder that vmm loads, or a model of ours → the layout of a published family."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vmm
from vmm.build import build, class_of, differences, plain, write_text
from vmm.encoders import ENCODERS
from vmm.errors import StorageError, UserError
from vmm.experiment import Experiment
from vmm.fusion import FUSIONS
from vmm.layers import Block
from vmm.objectives import OBJECTIVES
from vmm.source import FORMAT, TOKENIZER, Source, experiment_of, fit_base, open_source
from vmm.training.step import State
from vmm.weights import Report, parameter_tree, save_params
from vmm.weights.families import FAMILIES
from vmm.weights.fit import unstack
from vmm.weights.published import write_published

# What speeds a model up and leaves its numbers alone: no published layout speaks of it.
_SPEED = ("scan", "remat", "dtype")
_STYLE = ("norm", "activation", "epsilon", "cap")  # what a `block` group says; heads and ratio stand beside it


def convert(source: str | Path, out: str | Path, to: str | None = None) -> Path:
    """Converts weights and prints what became of every tensor.

    Args:
      source: a folder, run or Hub repository that vmm.load takes. out: folder to write. to: None: ours; else a family
        of FAMILIES: the folder then loads with `from_pretrained` of `transformers`.

    Raises:
      UserError: the source cannot be read, or is not of that family. StorageError: the folder cannot be written.
    """
    out, opened = Path(out), open_source(source)
    if to is not None and to not in FAMILIES:
        raise UserError(f"--to {to}: no such family; known: {', '.join(sorted(FAMILIES))}")
    if out.exists() and Path(source).is_dir() and out.samefile(source):
        raise UserError(f"convert: {out} is the source itself; choose another folder")
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = _to_vmm(opened, out, source) if to is None else _to_family(opened, out, to)
        if opened.tokenizer is not None and opened.tokenizer.is_file():
            shutil.copyfile(opened.tokenizer, out / "tokenizer.json")
            for name in TOKENIZER[1:] if opened.kind != "run" else ():
                if (beside := opened.tokenizer.with_name(name)).is_file():
                    shutil.copyfile(beside, out / name)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror}: {error.filename})") from None
    except UserError:
        if made and not any(out.iterdir()):
            out.rmdir()
        raise
    show(written, f"{source} → {out}")
    return out


def _to_vmm(source: Source, out: Path, name: str | Path) -> Report:
    experiment = experiment_of(source)
    params = parameter_tree(source.tensors, nn.unbox(experiment.shapes), name)
    save_params(params, out / "model.safetensors", {"source": source.kind})
    config = {
        "library_name": "vmm",
        "format": FORMAT,
        "version": vmm.__version__,
        "converted_from": source.kind,
        "model": source.model,
        "clip": source.clip,
        **{"labels": {}, **source.asked},
        **({"classes": source.classes} if source.classes else {}),
    }
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(out / "README.md", _card(source, experiment))
    return Report(sorted(source.tensors), [], [], source.left, [])


def _card(source: Source, experiment: Experiment) -> str:
    takes = " + ".join(experiment.modalities)
    return (
        f"---\nlibrary_name: vmm\n---\n\n# {source.kind}\n\nA {takes} model of {experiment.parameters():,} parameters, "
        f"converted by vmm {vmm.__version__} from the layout `{source.kind}`. The license of the source holds.\n\n"
        '```python\nimport vmm\n\nmodel = vmm.load("path/of/this/folder")\n```\n'
    )


def _to_family(source: Source, out: Path, family: str) -> Report:
    model = _filled(source.model) | {
        "clip": source.clip, "labels": source.asked.get("labels", {}), "classes": source.classes,
    }  # fmt: skip
    module = FAMILIES[family]
    try:
        config, parts = module.config(model)
        told = module.describe(config, parts)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"--to {family}: the model is not of this family ({error!r} in its config)") from None
    # What the family's own words, read back, do not say of this model is what it cannot be.
    ours, theirs = _without_pixels(model["trunk"]), _without_pixels(_filled(told)["trunk"])
    fusion = model["trunk"]["fusion"]
    if getattr(build(FUSIONS, fusion, "trunk.fusion"), "keeps_streams", False):
        ours, theirs = {"encoders": ours["encoders"]}, {"encoders": theirs["encoders"]}
    wrong = differences(plain(ours), plain(theirs), "trunk.")
    if wrong:
        raise UserError(f"--to {family}: cannot say (model → {family}):\n  " + "\n  ".join(wrong))
    tensors = unstack(source.tensors)
    wanted = {name for rule in module.rules(config, parts) for name in rule.ours}
    left = sorted(set(tensors) - wanted)
    trunk = [name for name in left if name.startswith("model.")]
    if trunk:
        raise UserError(f"--to {family}: has no place for {len(trunk)} parameters of the trunk, the first {trunk[0]}")
    write_published(out, family, model, {name: value for name, value in tensors.items() if name in wanted})
    return Report(sorted(wanted), [], [], left, [])


def _without_pixels(trunk: Mapping) -> dict:
    """Returns the trunk's config without what pixels are divided by: that is in a file of its own, not in config.json."""
    encoders = dict(trunk["encoders"])
    if "video" in encoders:
        encoders["video"] = {k: v for k, v in encoders["video"].items() if k not in ("mean", "deviation")}
    return dict(trunk) | {"encoders": encoders}


def _filled(model: Mapping) -> dict:
    """Returns the model's config with every default written out."""

    def fill(spec: Mapping, table: Mapping) -> dict:
        fields = {}
        for field in dataclasses.fields(class_of(table, spec, "model")):
            if field.name not in ("parent", "name"):
                made = field.default_factory is not dataclasses.MISSING
                fields[field.name] = field.default_factory() if made else field.default
        filled = fields | dict(spec)
        if "block" in filled:
            filled["block"] = style | dict(filled["block"])
        return {key: value for key, value in filled.items() if value is not dataclasses.MISSING and key not in _SPEED}

    style = {field.name: field.default for field in dataclasses.fields(Block) if field.name in _STYLE}
    trunk = model["trunk"]
    encoders = {name: fill(spec, ENCODERS) for name, spec in trunk["encoders"].items()}
    objectives = {name: fill(spec, OBJECTIVES) for name, spec in model["objectives"].items()}
    fusion = fill(trunk["fusion"], FUSIONS)
    return dict(model) | {"trunk": {"encoders": encoders, "fusion": fusion}, "objectives": objectives}


def warm_start(state: State, experiment: Experiment, init_from: str | Mapping[str, str]) -> State:
    """Returns a new run's state with weights of others in its parameters and their average; prints the report.

    Args:
      init_from: a source that vmm.load takes, for all its parameters; or modality → source, for one encoder each.

    Raises:
      UserError: a source cannot be read, lacks the modality, or nothing of it fits.
    """
    params = state.params
    if jax.process_count() > 1:  # some of it lies on other hosts
        from jax.experimental import multihost_utils

        params = multihost_utils.process_allgather(params, tiled=True)
    flat = flatten_dict(jax.device_get(params), sep=".")
    values, reports = fit_base(init_from, {name: np.asarray(value) for name, value in flat.items()}, experiment)
    for path, report in reports.items() if jax.process_index() == 0 else ():
        show(report, f"init_from {path}")
    tree = unflatten_dict(values, sep=".")

    def place(old, new):
        return jax.device_put(new.astype(old.dtype), old.sharding)

    params = jax.tree.map(place, state.params, tree)
    ema = jax.tree.map(place, state.ema, tree) if jax.tree.leaves(state.ema) else state.ema
    return state._replace(params=params, ema=ema)


def show(report: Report, title: str) -> None:
    """Prints what became of the tensors: counts, and names where something is not as it was."""
    table = Table("what", "tensors", title=escape(title), title_justify="left")
    table.add_column("which", overflow="fold")
    table.add_row("loaded", str(len(report.loaded)), "")
    for what, items in (("resampled", report.resampled), ("mismatched, not loaded", report.mismatched)):
        if items:
            table.add_row(what, str(len(items)), escape("\n".join(f"{name} {told}" for name, told in items[:8])))
    for what, names in (("left in the source", report.left), ("kept as initialised", report.missing)):
        if names:
            more = [f"… and {len(names) - 8} more"] if len(names) > 8 else []
            table.add_row(what, str(len(names)), escape("\n".join([*names[:8], *more])))
    Console().print(table)
