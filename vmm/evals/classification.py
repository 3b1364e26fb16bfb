"""Accuracy of a classify objective's own heads, per modality subset."""

import dataclasses
from collections.abc import Callable

import numpy as np

from vmm.types import SUBSETS


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of labelled rows whose label has the highest logit; ties share the hit.

    logits [n Y]; labels [n], -1 where unknown. Not-a-number never hits. Nan if nothing is labelled.
    """
    known = labels >= 0
    if not known.any():
        return float("nan")
    logits, labels = logits[known].astype(np.float64), labels[known]
    best = np.nanmax(np.where(np.isnan(logits), -np.inf, logits), axis=1, keepdims=True)
    hits = (logits == best) & np.isfinite(logits)
    own = hits[np.arange(len(labels)), labels]
    return float((own / np.maximum(hits.sum(1), 1)).mean())


@dataclasses.dataclass(frozen=True)
class Classification:
    """Accuracy per label and per subset of the streams shown.

    data: manifest. objective: name of the classify objective in the config. subsets: keys of
    types.SUBSETS, those of them that name streams the model has.
    """

    data: str
    objective: str = "labels"
    subsets: tuple[str, ...] = tuple(SUBSETS)

    def __call__(self, predict: Callable) -> dict[str, float]:
        result = {}
        for subset in self.subsets:
            rows = predict(self.data, subset)
            if rows is None:
                continue
            shown = np.logical_or.reduce(
                [rows[f"present/{name}"] for name in SUBSETS[subset] if f"present/{name}" in rows]
            )
            for key, logits in rows.items():
                objective, _, label = key.partition("/")
                if objective == self.objective:
                    labels = np.where(shown, rows[f"label/{label}"], -1)
                    result[f"{subset}/{label}"] = accuracy(logits, labels)
        return result
