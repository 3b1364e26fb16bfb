"""Several labels a clip: average precision, ROC, precision-recall curves."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vmm.errors import UserError
from vmm.evals.classification import check_labels, every_head, label_of
from vmm.evals.scored import Measured, Measuring, Scored
from vmm.types import SUBSETS


def lowest(scores: np.ndarray) -> np.ndarray:
    """Returns the scores [n Y] in float64; what is not finite stands below all of its column: it never hits."""
    scores = np.asarray(scores, np.float64)
    if np.isfinite(scores).all():
        return scores
    floor = np.where(np.isfinite(scores), scores, np.inf).min(0)
    return np.where(np.isfinite(scores), scores, np.where(np.isfinite(floor), floor - 1.0, 0.0))


def average_precision(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns each class's average precision [Y]: Σ (recall gained × precision) over thresholds; nan without a positive.

    Rows of one score lie under one threshold, so that constant scores give the share of positives.

    scores: [n Y], see `lowest`. truth: [n Y], 1 or 0, below 0 where unknown.
    """
    scores, known = lowest(scores), truth >= 0
    # Unknown rows go last, with no weight.
    order = np.argsort(-np.where(known, scores, -np.inf), axis=0, kind="stable")
    sorted_scores = np.take_along_axis(np.where(known, scores, -np.inf), order, 0)
    right = np.cumsum(np.take_along_axis((truth > 0) & known, order, 0), 0, dtype=np.float64)
    seen = np.cumsum(np.take_along_axis(known, order, 0), 0, dtype=np.float64)
    last = np.ones_like(sorted_scores, bool)  # of its threshold
    last[:-1] = sorted_scores[1:] < sorted_scores[:-1]
    result = np.full(scores.shape[1], np.nan)
    for y in range(scores.shape[1]):
        found, count = right[last[:, y], y], seen[last[:, y], y]
        if len(found) and found[-1]:
            result[y] = float((np.diff(found, prepend=0.0) * found / np.maximum(count, 1)).sum() / found[-1])
    return result


def roc_area(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns each class's area under the ROC curve [Y]: how often a positive beats a negative, ties half.

    Nan where a class lacks positives or negatives. Arguments: see `average_precision`.
    """
    from scipy.stats import rankdata  # a second to import, which training does without

    scores, result = lowest(scores), np.full(scores.shape[1], np.nan)
    for y in range(scores.shape[1]):
        known = truth[:, y] >= 0
        positive = truth[known, y] > 0
        many, few = int(positive.sum()), int((~positive).sum())
        if many and few:
            ranks = rankdata(scores[known, y])
            result[y] = (ranks[positive].sum() - many * (many + 1) / 2) / (many * few)
    return result


def curves(scores: np.ndarray, truth: np.ndarray) -> dict[str, list]:
    """Returns one class's ROC and precision-recall curves: fpr, tpr; recall, precision. scores, truth [n]: as above."""
    from sklearn.metrics import precision_recall_curve, roc_curve  # two seconds to import, as above

    known = truth >= 0
    values, positive = lowest(scores[:, None])[known, 0], truth[known] > 0
    if not positive.any() or positive.all():
        return {"fpr": [], "tpr": [], "recall": [], "precision": []}
    fpr, tpr, _ = roc_curve(positive, values)
    precision, recall, _ = precision_recall_curve(positive, values)
    return {"fpr": fpr.tolist(), "tpr": tpr.tolist(), "recall": recall.tolist(), "precision": precision.tolist()}


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns labels as truth [n Y]: 1, 0, or -1 for every class where the label is unknown.

    labels: int [n], -1 where unknown; or [n Y], which it leaves as they are.
    """
    if labels.ndim == 2:
        return labels
    truth = (labels[:, None] == np.arange(classes)).astype(np.int32)
    return np.where(labels[:, None] >= 0, truth, -1)


def mean_over(values: np.ndarray) -> float:
    """Returns the mean over classes that have a value."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


@dataclasses.dataclass(frozen=True)
class Tagging(Measuring):
    """Each class against all others: mAP and mean ROC area over classes, per label and subset.

    A label with one class a clip counts as the others' negative. data, objective, subsets: as of Classification.
    absent: whether classes without a clip are left out of the means; else they are an error.
    """

    hub_task = ("video-classification", "Classification")

    data: str
    objective: str = "labels"
    subsets: tuple[str, ...] = tuple(SUBSETS)
    absent: bool = False

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns "subset/label/mAP", "…/ROC_area"."""
        return Measured([self._label(*given) for given in every_head(predict, self, "tagging")], {})

    def _label(self, rows: dict, subset: str, label: str, logits: np.ndarray, shown: np.ndarray) -> Scored:
        labels = label_of(rows, label, self.data, f"objectives.{self.objective}.labels.{label}")
        where, classes = f"dataset {self.data}, labels.{label}", logits.shape[1]
        if labels.ndim == 1:
            check_labels(labels, classes, where)
        elif labels.shape[1] != classes:
            raise UserError(f"{where}: tells of {labels.shape[1]} classes, the head of {classes}; make them equal")
        truth = one_hot(labels, classes)
        without = np.flatnonzero(~(truth > 0).any(0))
        if len(without) and not self.absent:
            raise UserError(
                f"{where}: no clip of class {without[0]} ({len(without)} of {classes} classes have none); "
                "mAP needs all, or absent=True leaves them out"
            )
        use = shown & (truth >= 0).any(1)
        scores, truth = logits[use], truth[use]

        def rest(places: np.ndarray) -> dict[str, float]:
            drawn, true = scores[places], truth[places]
            return {
                "mAP": mean_over(average_precision(drawn, true)),
                "ROC_area": mean_over(roc_area(drawn, true)),
            }

        return Scored(f"{subset}/{label}", self.data, subset, rows["row"][use], rest=rest)
