"""Whether the clips that lie nearest to a clip are like it: recommendation by embeddings, judged by labels."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vmm.errors import UserError
from vmm.evals.classification import known_labels
from vmm.evals.prompts import embedded
from vmm.evals.scored import Measured, Measuring, Scored


def relevance(labels: dict[str, np.ndarray]) -> np.ndarray:
    """Returns float [n n] in [0, 1]: of the labels that both clips have, the share that are the same; 0 where they share none.

    labels: name → int [n], −1: unknown.
    """
    same = sum(((y[:, None] == y) & (y[:, None] >= 0)).astype(float) for y in labels.values())
    both = sum(((y[:, None] >= 0) & (y >= 0)).astype(float) for y in labels.values())
    return np.where(both > 0, same / np.maximum(both, 1), 0.0)


def discounted(gains: np.ndarray) -> np.ndarray:
    """Returns DCG [n] = Σ gain / log₂(place + 1) of gains [n k] in their order (Järvelin and Kekäläinen 2002)."""
    return (gains / np.log2(np.arange(gains.shape[1]) + 2)).sum(1)


@dataclasses.dataclass(frozen=True)
class Recommendation(Measuring):
    """For each clip, the k others of the nearest embeddings: nDCG@k and precision@k of the labels shared.

    How relevant another clip is: the share of `labels` that both have alike. nDCG@k compares with the best order there
    is; precision@k is the mean relevance of the k. data: manifest. objective: a contrastive one; subsets: of
    types.SUBSETS, the streams embedded. Chance stands beside, the mean relevance of all others.
    """

    data: str
    labels: tuple[str, ...]
    objective: str = "contrast"
    subsets: tuple[str, ...] = ("V", "A", "VA")
    k: int = 10

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns "subset/nDCG@k", "subset/precision@k"."""
        scored, notes = [], {}
        for subset in self.subsets:
            rows = predict(self.data, subset)
            if rows is None:
                continue
            x, there = embedded(rows, self.objective, subset, "recommendation")
            where = "evals (kind 'recommendation').labels"
            labels = {name: known_labels(predict, rows, name, self.data, where)[there] for name in self.labels}
            count = int(there.sum())
            if count <= self.k:
                raise UserError(f"dataset {self.data}: {count} clips with the streams {subset}; k {self.k} needs more")
            likeness, gain = x[there] @ x[there].T, relevance(labels)
            np.fill_diagonal(likeness, -np.inf)
            np.fill_diagonal(gain, -1.0)  # a clip is not recommended to itself
            nearest = np.argsort(-likeness, axis=1, kind="stable")[:, : self.k]
            got, best = np.take_along_axis(gain, nearest, 1), -np.sort(-gain, axis=1)[:, : self.k]
            ideal = discounted(best)
            means = {
                f"nDCG@{self.k}": np.where(ideal > 0, discounted(got) / np.maximum(ideal, 1e-12), 0.0),
                f"precision@{self.k}": got.mean(1),
            }
            scored.append(Scored(subset, self.data, subset, rows["row"][there], means))
            notes[f"chance/{subset}"] = float((gain.sum() + count) / (count * (count - 1)))
        return Measured(scored, notes)
