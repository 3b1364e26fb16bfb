"""vmm eval: a run's weights → every evaluator of its config → tables and evals.jsonl."""

import functools
import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tokenizers import Tokenizer

from vmm.build import digest, write_text
from vmm.config import numbers
from vmm.corrupt import SEVERITIES, Captions, corrupt
from vmm.data.account import Account
from vmm.data.loader import evaluation_batches
from vmm.data.manifest import Row, manifest_digest, read_manifest
from vmm.data.targets import fill
from vmm.data.text import encode, load_tokenizer
from vmm.errors import UserError
from vmm.evals.predictions import lines, write_predictions
from vmm.evals.scored import Measured, Measuring
from vmm.evals.tables import grid, show, show_interval
from vmm.experiment import Experiment
from vmm.model import sample_keys
from vmm.paths import to_path
from vmm.progress import progress
from vmm.run import Run, commit, open_run, weights
from vmm.sharding import batch_sharding, host_place, to_device
from vmm.suites import SUITES, print_suite
from vmm.training.metrics import read_rows
from vmm.types import SUBSETS, Batch

_TEXTS = 256  # embedded at a time


class Predict:
    """(manifest, subset) → predictions of every clip, computed once each; the evaluators' only view of a model.

    A prediction is a dict of NumPy arrays [n …] in the manifest's order: what Recipe.predict gives,
    plus `present/<modality>`, `label/<name>`, `target/<name>` and `row`. None for a subset with a stream that the
    model has not. Of several views of a clip it is their mean; `ask` gives each.
    """

    def __init__(self, experiment: Experiment, params, mesh, strict: bool = True):
        """strict: a manifest must have the labels and targets of data.labels, tags and targets."""
        self.experiment, self.params, self.mesh, self.strict = experiment, params, mesh, strict
        self.memory: dict = {}
        self.captions: dict = {}
        self.accounts: dict[str, Account] = {}  # manifest → what became of its files
        self.tell: Callable[..., None] = lambda *_: None  # of progress.progress, where somebody waits
        self.forward = self._jit("predict")
        named = (getattr(evaluator, "subsets", ()) for evaluator in experiment.evals.values())
        self.asked = {"VAT"}.union(*named)  # subsets that the evaluators ask for

    @functools.cached_property
    def untrained(self) -> "Predict":
        """The same of the network before its training, at the run's own initial parameters."""
        experiment = self.experiment
        # The whole state's program, not that of the parameters alone: training has compiled it.
        with jax.set_mesh(self.mesh):
            state = experiment.program(self.mesh).init(jax.random.key(experiment.config.seed))
        before = Predict(experiment, experiment.merged(state.params), self.mesh, self.strict)
        before.asked = set()  # one subset at a time: few are asked for
        return before

    def _jit(self, method: str, **static) -> Callable:
        """Returns (params, batch) → what a method of the recipe says; randomness is of each clip's place in the manifest."""

        recipe, known = self.experiment.recipe, self.experiment.forwards
        name = (self.mesh, method, *sorted(static.items()))

        def forward(params, batch: Batch) -> dict:
            keys = sample_keys(jax.random.key(0), batch.index)
            return recipe.apply({"params": params}, batch, keys=keys, method=method, **static)

        if name not in known:  # evaluations while training compile once
            known[name] = jax.jit(forward, in_shardings=(None, batch_sharding(self.mesh)))
        return known[name]

    def remarks(self) -> list[str]:
        """Returns what there is to say of the files that were read, [] where all was as in them."""
        return [told for manifest, account in self.accounts.items() for told in account.lines(f"{manifest}: ")]

    def knows(self, subset: str) -> bool:
        """Whether the model has the streams of a subset; "VAT" is all that it has."""
        return subset == "VAT" or set(SUBSETS[subset]) <= set(self.experiment.config.trunk["encoders"])

    def __call__(self, manifest: str, subset: str) -> dict | None:
        if not self.knows(subset):
            return None
        if (manifest, subset) not in self.memory:
            # One pass over the data for all subsets that are asked for: decoding costs more than predicting.
            wanted = [s for s in SUBSETS if self.knows(s) and (s == subset or s in self.asked)]
            for (mine, _), values in self._run(manifest, wanted).items():
                self.memory[manifest, mine] = mean_of_views(values, SUBSETS[mine])
        return self.memory[manifest, subset]

    def ask(self, manifest: str, subset: str, method: str = "predict", **static) -> dict | None:
        """Returns what a method of Recipe says of every view of every clip, computed once each; None as when called.

        Rows [n …] are views, windows of a clip in their order: `row` is the clip's number, `start` the second of the file
        at which the window begins. static: arguments of the method, hashable.
        """
        if not self.knows(subset):
            return None
        key = (manifest, subset, method, *sorted(static.items()))
        if key not in self.memory:
            found = self._run(manifest, [subset], forward=self._jit(method, **static))
            self.memory[key] = found[subset, None]
        return self.memory[key]

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the config's data: what ids mean."""
        return load_tokenizer(self.experiment.data.tokenizer)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return jax.process_index() == 0

    @property
    def seconds(self) -> float:
        """Length of a window."""
        return self.experiment.clip.seconds

    def rows(self, manifest: str) -> list[Row]:
        """Returns the clips of a manifest, by the numbers that `row` gives."""
        return read_manifest(manifest, bool(self.experiment.data.remote))

    def phrasings(self, manifest: str) -> list[tuple[str, ...]]:
        """Returns each clip's texts as the model may read them: data.text filled with each of its captions."""
        template = self.experiment.data.text
        filled = (
            dict.fromkeys(fill(template, row, caption) for caption in row.captions or ("",))
            for row in self.rows(manifest)
        )
        return [tuple(text for text in texts if text) for texts in filled]

    def embed(self, texts: Sequence[str]) -> dict:
        """Returns what the model predicts [n …] of texts alone: prompts, for example."""
        tokenizer, length = self.tokenizer, self.experiment.clip.text_length
        ids = np.stack([encode(tokenizer, text, length) for text in texts])
        parts = [self._embed(ids[start : start + _TEXTS]) for start in range(0, len(ids), _TEXTS)]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _embed(self, ids: np.ndarray) -> dict:
        experiment, count = self.experiment, len(ids)
        split = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows = math.ceil(count / split) * split
        blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), experiment.batch_shapes(rows))
        ids = np.pad(ids, ((0, rows - len(ids)), (0, 0)), mode="edge")
        there = {name: np.full(rows, name == "text") for name in blank.present}
        host, hosts = host_place(self.mesh)
        batch = blank._replace(inputs=blank.inputs | {"text": ids}, present=there, valid=np.ones(rows, bool))
        mine = slice(host * rows // hosts, (host + 1) * rows // hosts)
        batch = jax.tree.map(lambda leaf: leaf[mine], batch)
        with jax.set_mesh(self.mesh):
            values = self.forward(self.params, to_device(batch, self.mesh))
        return {key: value[:count] for key, value in _whole(values).items()}

    def corrupted(self, manifest: str, subsets: Collection[str], name: str) -> dict[int, dict[str, dict]]:
        """Returns severity → subset → predictions of clips under a corruption (vmm/corrupt.py), in one pass; not kept.

        Which streams a clip has is told as for the clean clips, so that every score is of the same clips. Empty where
        nothing can be corrupted so: captions that are all the same.
        """
        if name == "wrong_caption" and not self._captions(manifest).differ:
            return {}
        found = self._run(
            manifest, [s for s in subsets if self.knows(s)], [(name, severity) for severity in SEVERITIES]
        )
        result: dict = {severity: {} for severity in SEVERITIES}
        for (subset, (_, severity)), values in found.items():
            result[severity][subset] = mean_of_views(values, SUBSETS[subset])
        return result

    def _captions(self, manifest: str) -> Captions:
        if manifest not in self.captions:
            data, length = self.experiment.data, self.experiment.clip.text_length
            texts = [fill(data.text, row, (*row.captions, "")[0]) for row in self.rows(manifest)]
            tokenizer = load_tokenizer(data.tokenizer)
            self.captions[manifest] = Captions(texts, np.stack([encode(tokenizer, text, length) for text in texts]))
        return self.captions[manifest]

    def _run(
        self, manifest: str, subsets: list[str], noises: Sequence[tuple[str, int] | None] = (None,), forward=None
    ) -> dict:
        """Returns (subset, noise) → predictions of every view, in one pass over the data. noise: (corruption, severity), or None."""
        forward = forward or self.forward
        experiment, (host, hosts) = self.experiment, host_place(self.mesh)
        split = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        size = math.ceil(min(experiment.config.batch, 256) / split) * split
        parts: dict = {(subset, noise): [] for noise in noises for subset in subsets}
        wrong = any(noise is not None and noise[0] == "wrong_caption" for noise in noises)
        captions = self._captions(manifest) if wrong else None
        account = self.accounts.setdefault(manifest, Account())
        batches = evaluation_batches(
            manifest, experiment.data, experiment.clip, batch=size, host=host, hosts=hosts,
            views=experiment.evaluation, modalities=experiment.modalities, strict=self.strict, account=account,
        )  # fmt: skip
        for batch, rows, starts in batches:
            self.tell(int(rows[batch.valid].max(initial=-1)) + 1, len(account.rows), f"reading {manifest}")
            told = {f"present/{name}": there for name, there in batch.present.items()}
            told |= {f"label/{name}": label for name, label in batch.labels.items()}
            told |= flatten_dict({"target": dict(batch.targets)}, sep="/")
            told |= {"row": rows, "start": starts, "valid": batch.valid}
            # Laid out as the predictions are, so that both come back in one order on any number of hosts.
            told = _whole(to_device(told, self.mesh))
            keep = told.pop("valid")
            for noise in noises:
                seen = batch
                if noise is not None:
                    seen = corrupt(batch, rows, *noise, experiment.clip.sample_rate, captions)
                for subset in subsets:
                    shown = {
                        name: there if name in SUBSETS[subset] else np.zeros_like(there)
                        for name, there in seen.present.items()
                    }
                    with jax.set_mesh(self.mesh):
                        values = forward(self.params, to_device(seen._replace(present=shown), self.mesh))
                    values = {**_whole(values), **told}
                    parts[subset, noise].append({key: value[keep] for key, value in values.items()})
        result = {}
        for key, pieces in parts.items():
            whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
            if not len(whole["row"]):
                raise UserError(f"dataset {manifest}: none of its clips can be decoded; see `vmm data check`")
            result[key] = whole
        return result


def mean_of_views(values: Mapping, shown: Sequence[str]) -> dict:
    """Returns one row a clip: the mean over its views of what is predicted (floats), the first of what is told.

    Views that have none of the streams shown are left out where others have some: they say nothing of the clip. A clip has
    a stream if any of its views has.

    values: arrays [n …] with "row", the clip's number, ascending, and "present/…". shown: streams.
    """
    _, first, of_clip = np.unique(values["row"], return_index=True, return_inverse=True)
    if len(first) == len(values["row"]):
        return dict(values)
    some = np.logical_or.reduce([values[f"present/{name}"] for name in shown if f"present/{name}" in values])
    none = ~np.logical_or.reduceat(some, first)
    weight = np.where(none[of_clip], 1.0, some)
    count = np.add.reduceat(weight, first)
    result = {}
    for key, value in values.items():
        if key.startswith("present/"):
            result[key] = np.logical_or.reduceat(value, first)
        elif not np.issubdtype(value.dtype, np.floating) or key == "start" or key.startswith("target/"):
            result[key] = value[first]
        else:
            each = weight.reshape(-1, *(1,) * (value.ndim - 1))
            # Not 0 times: what is said of nothing may be anything.
            total = np.add.reduceat(np.where(each > 0, value.astype(np.float64), 0.0), first)
            result[key] = (total / count.reshape(-1, *(1,) * (value.ndim - 1))).astype(value.dtype)
    return result


def _whole(values: Mapping) -> dict:
    """Device arrays, split over hosts → NumPy arrays, whole on every host."""
    if jax.process_count() > 1:
        return dict(multihost_utils.process_allgather(values, tiled=True))
    return jax.device_get(dict(values))


def run_evals(experiment: Experiment, params, mesh) -> dict[str, float]:
    """Returns evaluator/name → number for every evaluator of the config.

    Raises:
      UserError: the config names no evaluator, or a manifest is missing.
    """
    return measure(experiment, Predict(experiment, jax.tree.map(jnp.asarray, params), mesh)).values


class Found(NamedTuple):
    """values: evaluator/name → number. measured, prepared: evaluator → what it found, and what it fitted before."""

    values: dict[str, float]
    measured: dict[str, Measured]
    prepared: dict[str, Any]

    def intervals(self) -> dict[str, list[float]]:
        """Returns evaluator/name → [low, high] of 95 %, for numbers of clips."""
        return {
            f"{name}/{key}": list(ends)
            for name, measured in self.measured.items()
            for key, ends in measured.intervals().items()
        }


def measure(experiment: Experiment, predict: Predict) -> Found:
    """Runs every evaluator of the config; raises UserError as run_evals."""
    if not experiment.evals:
        raise UserError("evals: the config names no evaluator; add one, as configs/common.py does")
    found = Found({}, {}, {})
    for name, evaluator in experiment.evals.items():
        if isinstance(evaluator, Measuring):
            found.prepared[name] = evaluator.prepare(predict)
            found.measured[name] = evaluator.measure(predict, found.prepared[name])
            values = found.measured[name].numbers()
        else:
            values = evaluator(predict)
        found.values.update({f"{name}/{key}": value for key, value in values.items()})
    return found


def evaluate(
    workdir: str | Path,
    again: bool = False,
    suites: Sequence[str] = ("standard",),
    predictions: str | Path | None = None,
) -> dict:
    """Evaluates the newest checkpoint of a run, writes the record into evals.jsonl and prints tables.

    A checkpoint that was evaluated already on the same data is not evaluated again, unless `again`.

    Args:
      suites: of suites.SUITES; "standard" are the config's evaluators, on which the others build.
      predictions: file for every clip's predictions; "": predictions.jsonl in the workdir; None: none.

    Returns:
      The record: step, config, data (manifest → SHA-256), commit, values, intervals (name → low, high), suites.
    """
    run = open_run(workdir)
    manifests = sorted(
        {
            value
            for spec in run.config.get("evals", {}).values()
            for key, value in spec.items()
            if key in ("data", "train")
        }
    )
    for manifest in manifests:
        if not Path(manifest).is_file():
            raise UserError(
                f"dataset {manifest}: no such file; make the data, or correct evals.*.data (paths begin in {Path.cwd()})"
            )
    identity = {
        "step": run.step,
        "config": digest(numbers(run.config)),
        "evals": digest({"evals": run.config.get("evals", {}), "views": run.config["data"].get("evaluation", {})}),
        "data": {manifest: manifest_digest(manifest) for manifest in manifests},
    }
    path, rows = run.workdir / "evals.jsonl", read_rows(run.workdir / "evals.jsonl")
    # Records of before there were intervals are not known.
    known = [row for row in rows if "intervals" in row and all(row.get(k) == value for k, value in identity.items())]
    wanted = [suite for suite in suites if suite != "standard"]
    record = known[-1] if known and not again else None
    missing = [suite for suite in wanted if record is None or suite not in record["suites"]]
    if record is None or missing or predictions is not None:
        predict = Predict(run.experiment, weights(run.state), run.mesh)
        with progress("evaluating") as predict.tell:
            found = measure(run.experiment, predict)
            suited = {suite: SUITES[suite](run.experiment, predict, found) for suite in missing}
        if record is None:
            record = identity | {
                "commit": commit(), "values": found.values, "intervals": found.intervals(), "suites": {},
            }  # fmt: skip
        else:
            rows.remove(record)
        record["suites"] |= suited
        if predictions is not None:
            write_found(run, found, identity, to_path(predictions or run.workdir / "predictions.jsonl"))
        # Written whole: nothing can be appended to a file in a bucket.
        write_text(path, "".join(json.dumps(row) + "\n" for row in [*rows, record]))
        print("".join(f"{told}\n" for told in predict.remarks()), end="")
    print_tables(run.experiment, record["values"], record["intervals"])
    for suite in wanted:
        print_suite(suite, record["suites"][suite], record)
    return record


def write_found(run: Run, found: Found, identity: Mapping, path: Path) -> None:
    """Writes the file of predictions (evals/predictions.py) of what was found. identity: what its first line tells."""
    ids, told = {}, []
    for name, measured in found.measured.items():
        for scored in measured.scored:
            if scored.data not in ids:
                ids[scored.data] = [
                    row.id for row in read_manifest(scored.data, bool(run.experiment.data.remote))
                ]  # fmt: skip
            told += lines(name, scored, ids[scored.data])
    write_predictions(path, {"run": run.workdir.name, **identity}, told)
    print(f"{path}: {len(told)} predictions written")


def print_tables(
    experiment: Experiment, values: Mapping[str, float], intervals: Mapping[str, Sequence[float]] | None = None
) -> None:
    """Prints each evaluator's numbers as rows × columns, each with its interval below it."""
    console, ends = Console(), intervals or {}
    for name in experiment.evals:
        mine = {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
        rows, columns, cells, notes = grid(mine)
        texts = {}
        for row, column in itertools.product(rows, columns):
            around = ends.get(f"{name}/{row}/{column}")
            texts[row, column] = show(column, cells.get((row, column)))
            if around is not None:
                texts[row, column] += f"\n[dim]{show_interval(column, around)}[/dim]"
        if len(columns) > len(rows):  # the longer side runs down: a terminal is narrow
            rows, columns, texts = columns, rows, {(column, row): text for (row, column), text in texts.items()}
        notes = [f"{key} {value:g}" for key, value in notes.items()]
        notes += ["below: 95 % interval, bootstrap over clips"] if ends else []
        table = Table(title=escape(name), caption=escape("  ".join(notes)) or None)
        table.add_column("")
        for column in columns:
            table.add_column(escape(column), justify="right", no_wrap=True)
        for row in rows:
            table.add_row(escape(row), *(texts[row, column] for column in columns))
        console.print(table)
