"""Accuracy and per-class scores of a classify objective's own heads, per modality subset."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from vmm.errors import UserError, one_of
from vmm.evals.calibration import softmax
from vmm.evals.scored import Classes, Measured, Measuring, Scored
from vmm.types import SUBSETS, TOLD

METRICS = ("accuracy", "top5", "macro_precision", "macro_recall", "macro_f1")


def hits(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """Returns each row's chance [n] that its label is among the k highest logits, where ties fall at random.

    logits [n Y]; labels [n] ≥ 0. A label whose logit is not finite is never a hit; constant logits give min(k, Y) / Y.
    """
    logits = np.asarray(logits, np.float64)
    own = logits[np.arange(len(labels)), labels][:, None]
    above, level = (logits > own).sum(1), (logits == own).sum(1)
    return np.where(np.isfinite(own[:, 0]), np.clip((k - above) / np.maximum(level, 1), 0.0, 1.0), 0.0)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of labelled rows whose label has the highest logit; ties share the hit.

    logits [n Y]; labels [n], -1 where unknown. Not-a-number never hits. Nan if nothing is labelled.
    """
    known = labels >= 0
    return float(hits(logits[known], labels[known]).mean()) if known.any() else float("nan")


def votes(logits: np.ndarray) -> np.ndarray:
    """Returns what each row predicts [n Y]: 1 for the highest logit, shared among ties; all 0 where none is finite."""
    logits = np.asarray(logits, np.float64)
    logits = np.where(np.isfinite(logits), logits, -np.inf)
    best = (logits == logits.max(1, keepdims=True)) & np.isfinite(logits)
    return best / np.maximum(best.sum(1, keepdims=True), 1)


def predicted(logits: np.ndarray) -> np.ndarray:
    """Returns the class with the highest logit [n], the first of ties; -1 where none is finite."""
    cast = votes(logits)
    return np.where(cast.any(1), cast.argmax(1), -1)


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns [Y Y]: how many rows of each class (down) are taken for each (across). labels [n] ≥ 0."""
    table = np.zeros((logits.shape[1], logits.shape[1]))
    np.add.at(table, labels, votes(logits))
    return table


class PerClass(NamedTuple):
    """Scores of each class [Y]; nan for a class that has no row. count: its rows."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    count: np.ndarray


def per_class(cast: np.ndarray, labels: np.ndarray) -> PerClass:
    """Returns precision, recall and F1 of each class; the precision of a class that is never predicted is 0.

    cast: from `votes`, [n Y]. labels [n] ≥ 0.
    """
    classes = cast.shape[1]
    count = np.bincount(labels, minlength=classes)
    right = np.bincount(labels, cast[np.arange(len(labels)), labels], minlength=classes)
    taken = cast.sum(0)
    there = np.where(count > 0, 1.0, np.nan)
    precision = right / np.where(taken > 0, taken, 1.0) * there
    recall = right / np.maximum(count, 1) * there
    return PerClass(precision, recall, 2 * right / np.maximum(count + taken, 1e-12) * there, count)


def macro(cast: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the means of precision, recall and F1 over the classes that have a row. Arguments: see `per_class`."""
    scores = per_class(cast, labels)
    there = scores.count > 0
    return {
        f"macro_{name}": float(getattr(scores, name)[there].mean()) if there.any() else float("nan")
        for name in ("precision", "recall", "f1")
    }


def score_classes(
    name: str, data: str, subset: str, row: np.ndarray, said: Classes, metrics: tuple[str, ...] = ("accuracy",)
) -> Scored:
    """Returns the scores of labelled rows under METRICS; see Scored for the arguments."""
    logits, labels = said.logits, said.labels
    chance, first = softmax(logits), predicted(logits)
    means = {"": hits(logits, labels)} if "accuracy" in metrics else {}
    if "top5" in metrics:
        means["top5"] = hits(logits, labels, 5)
    cast, wanted = votes(logits), [metric for metric in metrics if metric.startswith("macro_")]

    def rest(places: np.ndarray) -> dict[str, float]:
        found = macro(cast[places], labels[places])
        return {metric: found[metric] for metric in wanted}

    of_first = chance[np.arange(len(first)), np.maximum(first, 0)]
    told = {"label": labels, "prediction": first, "probability": np.where(first >= 0, of_first, np.nan)}
    return Scored(name, data, subset, row, means, told, rest if wanted else None, said)


def check_labels(labels: np.ndarray, classes: int, where: str) -> None:
    """Raises UserError: a label is no class of the head that is to name it. where: manifest and label, for the line."""
    if labels.size and labels.max() >= classes:
        raise UserError(
            f"{where}: has class {int(labels.max())}, but the head knows {classes} (0 to {classes - 1}); "
            "raise its number of classes, or correct the data"
        )


def label_of(rows: dict, label: str, data: str, where: str) -> np.ndarray:
    """Returns the clips' classes; raises UserError where the batch has no such label."""
    if f"label/{label}" not in rows:
        known = [key.removeprefix("label/") for key in rows if key.startswith("label/")]
        raise UserError(
            f"{where}: dataset {data} was read without label {label!r} (data.labels); {one_of(label, known)}"
        )
    return rows[f"label/{label}"]


def known_labels(predict: Callable, rows: dict, label: str, data: str, where: str) -> np.ndarray:
    """Returns the clips' classes [n], −1 where unknown, also of a label that is not in data.labels: then the manifest's.

    Raises:
      UserError: no clip of the manifest has it, or it is a tag, of which a clip has any number.
    """
    if f"label/{label}" in rows:
        found = rows[f"label/{label}"]
    else:
        told = [row.labels for row in predict.rows(data)]
        known = {name for labels in told for name in labels}
        if label not in known:
            raise UserError(f"{where}: no clip of {data} has a label {label!r}; {one_of(label, known)}")
        wrong = any(isinstance(labels.get(label), list) for labels in told)
        found = None if wrong else np.array([told[row].get(label, -1) for row in rows["row"]])
    if found is None or found.ndim > 1:
        raise UserError(f"{where}: {label!r} of {data} are tags, any number a clip; they are scored by kind 'tagging'")
    return found


def shown_clips(rows: dict, subset: str) -> np.ndarray:
    """Returns which clips [n] have any of the streams that a subset shows."""
    return np.logical_or.reduce([rows[f"present/{name}"] for name in SUBSETS[subset] if f"present/{name}" in rows])


def objectives_of(rows: dict) -> set[str]:
    """Returns the names of the objectives that predicted."""
    return {key.partition("/")[0] for key in rows if "/" in key} - set(TOLD)


def heads(rows: dict, objective: str, kind: str) -> dict[str, np.ndarray]:
    """Returns label → logits [n Y] of an objective; raises UserError where it says nothing."""
    known = objectives_of(rows)
    if objective not in known:
        raise UserError(
            f"evals (kind {kind!r}): no objective {objective!r} predicts anything; {one_of(objective, known)}"
        )
    return {key.partition("/")[2]: value for key, value in rows.items() if key.partition("/")[0] == objective}


def every_head(predict: Callable, evaluator, kind: str) -> Iterator[tuple]:
    """Yields (rows, subset, label, logits [n Y], shown bool [n]) for every subset and label of an evaluator.

    evaluator: its data, objective and subsets; kind: its own, for error lines. Subsets that the model lacks are left out.
    """
    for subset in evaluator.subsets:
        rows = predict(evaluator.data, subset)
        if rows is not None:
            for label, logits in heads(rows, evaluator.objective, kind).items():
                yield rows, subset, label, logits, shown_clips(rows, subset)


@dataclasses.dataclass(frozen=True)
class Classification(Measuring):
    """Scores per label and per subset of the streams shown, of clips that have any of them.

    data: manifest. objective: name of the classify objective in the config. subsets: keys of
    types.SUBSETS, those of them that name streams the model has. metrics: of METRICS; macro averages are means over
    classes. absent: whether classes without a clip are left out of macro averages; else they are an error.
    """

    hub_task = ("video-classification", "Classification")
    bare_metric = "accuracy"

    data: str
    objective: str = "labels"
    subsets: tuple[str, ...] = tuple(SUBSETS)
    metrics: tuple[str, ...] = ("accuracy",)
    absent: bool = False

    def __post_init__(self):
        for metric in self.metrics:
            if metric not in METRICS:
                raise UserError(f"evals: classification has no metric {metric!r}; {one_of(metric, METRICS)}")

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns the scores under "subset/label"."""
        scored = []
        for rows, subset, label, logits, shown in every_head(predict, self, "classification"):
            labels = label_of(rows, label, self.data, f"objectives.{self.objective}.labels.{label}")
            if labels.ndim > 1:  # tags: see Tagging
                continue
            check_labels(labels, logits.shape[1], f"dataset {self.data}, labels.{label}")
            self._check_absent(labels, logits.shape[1], label)
            use = shown & (labels >= 0)
            said = Classes(label, logits[use], labels[use])
            scored.append(score_classes(f"{subset}/{label}", self.data, subset, rows["row"][use], said, self.metrics))
        return Measured(scored, {})

    def _check_absent(self, labels: np.ndarray, classes: int, label: str) -> None:
        if self.absent or not any(metric.startswith("macro_") for metric in self.metrics):
            return
        without = sorted(set(range(classes)) - set(labels[labels >= 0].tolist()))
        if without:
            raise UserError(
                f"dataset {self.data}, labels.{label}: no clip of class {without[0]} ({len(without)} of {classes} classes "
                "have none); a macro average needs all, or absent=True leaves them out"
            )
