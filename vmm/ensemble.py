"""vmm ensemble: the predictions of several models, averaged, under the evaluators of the first."""

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from vmm.build import digest, write_text
from vmm.config import numbers
from vmm.data.manifest import Row, manifest_digest
from vmm.errors import UserError, one_of
from vmm.evaluate import Predict, measure, print_tables, write_found
from vmm.experiment import Experiment
from vmm.objectives.base import Prediction
from vmm.progress import progress
from vmm.run import commit, open_run, weights
from vmm.training.metrics import read_rows

_EMBEDDINGS = ("encoded", "fused")  # places in a space that each model has for itself
_TOLD = ("present", "label", "target", "hidden", "row", "start")


class Ensemble:
    """Several models with the interface of evaluate.Predict: what they predict is averaged, see `blend`."""

    def __init__(self, members: Sequence[Predict]):
        self.members, self.experiment = list(members), members[0].experiment

    @property
    def tokenizer(self) -> Tokenizer:
        """As Predict.tokenizer."""
        return self.members[0].tokenizer

    @property
    def seconds(self) -> float:
        """As Predict.seconds."""
        return self.members[0].seconds

    @property
    def writes(self) -> bool:
        """As Predict.writes."""
        return self.members[0].writes

    def remarks(self) -> list[str]:
        """As Predict.remarks, of all models: what all of them say once."""
        return list(dict.fromkeys(told for member in self.members for told in member.remarks()))

    def tell(self, tell: Callable[..., None]) -> None:
        """Has each model tell its progress, and which it is."""
        for number, member in enumerate(self.members, 1):
            member.tell = functools.partial(_tell_of, tell, f"model {number} of {len(self.members)}")

    def knows(self, subset: str) -> bool:
        """Whether all models have the streams of a subset."""
        return all(member.knows(subset) for member in self.members)

    def __call__(self, manifest: str, subset: str) -> dict | None:
        if not self.knows(subset):
            return None
        return blend([member(manifest, subset) for member in self.members], self.experiment)

    def ask(self, manifest: str, subset: str, method: str = "predict", **static) -> dict | None:
        """As Predict.ask; raises UserError for texts, which have no mean."""
        if method != "predict":
            raise UserError(f"ensemble: what {method!r} writes has no mean; choose other evaluators with --evals")
        if not self.knows(subset):
            return None
        found = [member.ask(manifest, subset, method, **static) for member in self.members]
        return blend(found, self.experiment)

    def rows(self, manifest: str) -> list[Row]:
        """As Predict.rows."""
        return self.members[0].rows(manifest)

    def phrasings(self, manifest: str) -> list[tuple[str, ...]]:
        """As Predict.phrasings."""
        return self.members[0].phrasings(manifest)

    def embed(self, texts: Sequence[str]) -> dict:
        """As Predict.embed."""
        return blend([member.embed(texts) for member in self.members], self.experiment)

    def corrupted(self, manifest: str, subsets: Collection[str], name: str) -> dict[int, dict[str, dict]]:
        """As Predict.corrupted."""
        known = [subset for subset in subsets if self.knows(subset)]
        found = [member.corrupted(manifest, known, name) for member in self.members]
        return {
            severity: {subset: blend([one[severity][subset] for one in found], self.experiment) for subset in known}
            for severity in found[0]
        }


def _tell_of(tell: Callable[..., None], who: str, done: int, total: int, doing: str) -> None:
    tell(done, total, f"{who}: {doing}")


def blend(found: Sequence[Mapping], experiment: Experiment) -> dict:
    """Returns the mean of models' predictions of the same clips.

    Logits of classes, of tags and of tokens give way to the logarithm of the mean probability, so that each model has one
    vote, however sure it is (the mean of logits is the geometric one). Embeddings are laid side by side, each 1 / √n:
    their dot product is the mean of the models'. Anything else: the mean. What is told of a clip is the first model's.

    Args:
      found: of each model, as Predict gives it. experiment: of the first.

    Raises:
      UserError: the models were shown other clips, or predict what has no mean.
    """
    result = {}
    for key, first in found[0].items():
        values = [np.asarray(one[key]) if key in one else None for one in found]
        if any(value is None for value in values):
            raise UserError(f"ensemble: not every model predicts {key!r}; give runs of one task")
        part = key.partition("/")[0]
        if part in _TOLD:
            same = part in ("target", "start") or all(np.array_equal(first, value) for value in values)
            if not same:
                raise UserError(f"ensemble: the models were shown other clips ({key} differs); read the same data")
            result[key] = first
            continue
        objective = experiment.objectives.get(part)
        label = key.partition("/")[2]
        if objective is not None:
            rule = objective.prediction(label, experiment.data.tags)
        else:
            rule = Prediction("embedding" if part in _EMBEDDINGS else "mean")
        if rule.how == "none":
            raise UserError(
                f"ensemble: {key!r} tells {rule.reason}, which have no mean; choose other evaluators with --evals"
            )
        if rule.how == "embedding":
            result[key] = np.concatenate(values, -1) / np.float32(np.sqrt(len(values)))
            continue
        if len({value.shape for value in values}) > 1:
            raise UserError(f"ensemble: the models predict {key!r} in shapes {[value.shape for value in values]}")
        result[key] = _mean(rule.how, values).astype(first.dtype)
    return result


def _mean(how: str, values: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the mean of models as objectives.base.Prediction says."""
    models = np.stack([np.asarray(value, np.float64) for value in values])
    with np.errstate(divide="ignore"):
        if how == "sigmoid":
            # log p / (1 − p) of the mean; by logarithms, so that 1 − p does not vanish.
            return _log_mean(-np.logaddexp(0, -models)) - _log_mean(-np.logaddexp(0, models))
        if how == "log":
            return _log_mean(models)
        if how == "softmax":
            return _log_mean(models - np.logaddexp.reduce(models, axis=-1, keepdims=True))
    return models.mean(0)


def _log_mean(logs: np.ndarray) -> np.ndarray:
    """Returns the logarithm of the mean over the first axis of what these are logarithms of."""
    return np.logaddexp.reduce(logs, axis=0) - np.log(len(logs))


def ensemble(workdirs: Sequence[str | Path], evals: Sequence[str] = (), predictions: str | Path | None = None) -> dict:
    """Evaluates several runs as one model by the first run's evaluators; prints tables.

    Args:
      evals: names of evaluators of the first run's config; none: all. predictions: file for each clip's, for `vmm compare`.

    Returns:
      The record, appended to ensembles.jsonl of the first run: members, data, commit, values, intervals.

    Raises:
      UserError: fewer than two runs, no such evaluator, or as blend.
    """
    if len(workdirs) < 2:
        raise UserError("ensemble: give at least two runs")
    runs = [open_run(workdir) for workdir in workdirs]
    first = runs[0].experiment
    for name in evals:
        if name not in first.evals:
            raise UserError(f"ensemble: {runs[0].workdir} has no evaluator {name!r}; {one_of(name, first.evals)}")
    if evals:
        first.evals = {name: first.evals[name] for name in evals}
    models = Ensemble([Predict(run.experiment, weights(run.state), run.mesh) for run in runs])
    with progress("evaluating") as tell:
        models.tell(tell)
        found = measure(first, models)
    specs = [spec for name, spec in runs[0].config["evals"].items() if name in first.evals]
    manifests = sorted({spec[key] for spec in specs for key in ("data", "train") if key in spec})
    members = [
        {"run": str(run.workdir), "step": run.step, "config": digest(numbers(run.config))} for run in runs
    ]  # fmt: skip
    identity = {"members": members, "data": {manifest: manifest_digest(manifest) for manifest in manifests}}
    record = identity | {"commit": commit(), "values": found.values, "intervals": found.intervals()}
    path = runs[0].workdir / "ensembles.jsonl"
    write_text(path, "".join(json.dumps(row) + "\n" for row in [*read_rows(path), record]))
    if predictions is not None:
        write_found(runs[0], found, identity, Path(predictions))
    print("".join(f"{told}\n" for told in models.remarks()), end="")
    print_tables(first, record["values"], record["intervals"])
    return record
