"""vmm eval: a run's weights → every evaluator of its config → a table and evals.jsonl."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.table import Table

from vmm.build import digest, write_text
from vmm.data.loader import evaluation_batches
from vmm.data.manifest import manifest_digest
from vmm.errors import UserError
from vmm.experiment import Experiment, numbers
from vmm.run import commit, open_run, weights
from vmm.sharding import batch_sharding, host_place, to_device
from vmm.training.metrics import read_rows
from vmm.types import SUBSETS


class Predict:
    """(manifest, subset) → predictions of every clip, computed once each; the evaluators' only view of a model.

    A prediction is a dict of NumPy arrays [n …] in the manifest's order: what Recipe.predict gives,
    plus `present/<modality>`, `label/<name>` and `row`. None for a subset with a stream that the
    model has not.
    """

    def __init__(self, experiment: Experiment, params, mesh):
        self.experiment, self.params, self.mesh = experiment, params, mesh
        self.memory: dict = {}
        self.forward = jax.jit(
            lambda params, batch: experiment.recipe.apply({"params": params}, batch, method="predict"),
            in_shardings=(None, batch_sharding(mesh)),
        )

    def __call__(self, manifest: str, subset: str) -> dict | None:
        if not set(SUBSETS[subset]) <= set(self.experiment.config.trunk["encoders"]) and subset != "VAT":
            return None
        if (manifest, subset) not in self.memory:
            self._run(manifest)
        return self.memory[manifest, subset]

    def _run(self, manifest: str) -> None:
        """One pass over the data for all subsets: decoding costs more than predicting."""
        experiment, (host, hosts) = self.experiment, host_place(self.mesh)
        split = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        size = math.ceil(min(experiment.config.batch, 256) / split) * split
        wanted = [s for s in SUBSETS if s == "VAT" or set(SUBSETS[s]) <= set(experiment.config.trunk["encoders"])]
        parts: dict = {subset: [] for subset in wanted}
        batches = evaluation_batches(
            manifest, experiment.data, experiment.clip, batch=size, host=host, hosts=hosts,
            views=experiment.evaluation, modalities=experiment.modalities,
        )  # fmt: skip
        for batch, rows in batches:
            for subset in wanted:
                shown = {
                    name: there if name in SUBSETS[subset] else np.zeros_like(there)
                    for name, there in batch.present.items()
                }
                with jax.set_mesh(self.mesh):
                    values = self.forward(self.params, to_device(batch._replace(present=shown), self.mesh))
                values = {**_whole(values)}
                told = {f"present/{name}": there for name, there in batch.present.items()}
                told |= {f"label/{name}": label for name, label in batch.labels.items()}
                told |= {"row": rows, "valid": batch.valid}
                # Laid out as the predictions are, so that both come back in one order on any number of hosts.
                values |= _whole(to_device(told, self.mesh))
                keep = values.pop("valid")
                parts[subset].append({key: value[keep] for key, value in values.items()})
        for subset, pieces in parts.items():
            whole = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
            self.memory[manifest, subset] = mean_of_views(whole)


def mean_of_views(values: Mapping) -> dict:
    """Returns one row a clip: the mean over its views of what is predicted (floats), the first of what is told.

    values: arrays [n …] with "row", the clip's number, ascending.
    """
    _, first, of_clip, count = np.unique(values["row"], return_index=True, return_inverse=True, return_counts=True)
    if len(first) == len(values["row"]):
        return dict(values)
    result = {}
    for key, value in values.items():
        if not np.issubdtype(value.dtype, np.floating):
            result[key] = value[first]
            continue
        total = np.zeros((len(first), *value.shape[1:]), np.float64)
        np.add.at(total, of_clip, value)
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
    if not experiment.evals:
        raise UserError("evals: the config names no evaluator; add one, as configs/common.py does")
    predict = Predict(experiment, jax.tree.map(jnp.asarray, params), mesh)
    return {
        f"{name}/{key}": value
        for name, evaluator in experiment.evals.items()
        for key, value in evaluator(predict).items()
    }


def evaluate(workdir: str | Path, again: bool = False) -> dict:
    """Evaluates the newest checkpoint of a run, appends the record to evals.jsonl and prints tables.

    A checkpoint that was evaluated already on the same data is not evaluated again, unless `again`.

    Returns:
      The record: step, config, data (manifest → SHA-256), commit, values.
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
            raise UserError(f"dataset {manifest}: no such file; correct evals.*.data or make the data")
    identity = {
        "step": run.step,
        "config": digest(numbers(run.config)),
        "evals": digest({"evals": run.config.get("evals", {}), "views": run.config["data"].get("evaluation", {})}),
        "data": {manifest: manifest_digest(manifest) for manifest in manifests},
    }
    path = run.workdir / "evals.jsonl"
    known = [row for row in read_rows(path) if all(row.get(key) == value for key, value in identity.items())]
    if known and not again:
        record = known[-1]
    else:
        values = run_evals(run.experiment, weights(run.state), run.mesh)
        record = identity | {"commit": commit(), "values": values}
        # Written whole: nothing can be appended to a file in a bucket.
        write_text(path, "".join(json.dumps(row) + "\n" for row in [*read_rows(path), record]))
    print_tables(run.experiment, record["values"])
    return record


def print_tables(experiment: Experiment, values: Mapping[str, float]) -> None:
    """Prints each evaluator's numbers as rows × columns."""
    console = Console()
    for name in experiment.evals:
        mine = {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
        rows, columns, cells, notes = grid(mine)
        texts = {(row, column): show(column, cells.get((row, column))) for row in rows for column in columns}
        if len(columns) > len(rows):  # the longer side runs down: a terminal is narrow
            rows, columns, texts = columns, rows, {(column, row): text for (row, column), text in texts.items()}
        table = Table(title=name, caption="  ".join(f"{key} {value:g}" for key, value in notes.items()) or None)
        table.add_column("")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row, *(texts[row, column] for column in columns))
        console.print(table)


def grid(values: Mapping[str, float]) -> tuple[list, list, dict, dict]:
    """Parts "row/column" names: returns (rows, columns, {(row, column): value}, the rest)."""
    cells = {
        tuple(key.split("/", 1)): value for key, value in values.items() if "/" in key and not key.startswith("chance")
    }
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    return rows, columns, cells, {key: value for key, value in values.items() if tuple(key.split("/", 1)) not in cells}


def show(column: str, value: float | None) -> str:
    """Returns a cell: shares as per cent, ranks as numbers."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.1f}" if "rank" in column else f"{100 * value:.1f} %"
