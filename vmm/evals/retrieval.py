"""Retrieval among clips, in every direction, from the embeddings of a contrastive objective."""

import dataclasses
from collections.abc import Callable

import numpy as np

from vmm.types import SUBSETS


def ranks(queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns, per query i, how many keys beat key i and how many others tie with it.

    queries, keys: [n E]; key i is the truth of query i. Not-a-number counts as beaten by all.
    """
    scores = queries.astype(np.float64) @ keys.astype(np.float64).T
    own = np.diagonal(scores)[:, None]
    bad = ~np.isfinite(own[:, 0])
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    above = (scores > own).sum(1)
    level = (scores == own).sum(1) - 1
    above[bad], level[bad] = len(keys) - 1, 0
    return above, level


def recall(above: np.ndarray, level: np.ndarray, k: int) -> float:
    """Returns R@k in [0, 1], ties broken at random in expectation: constant scores give chance."""
    return float(np.clip((k - above) / (level + 1.0), 0.0, 1.0).mean())


def table(queries: np.ndarray, keys: np.ndarray) -> dict[str, float]:
    """Returns R@1, R@5, R@10 (in [0, 1]) and the median rank (1 is best, ties at their middle)."""
    above, level = ranks(queries, keys)
    values = {f"R@{k}": recall(above, level, k) for k in (1, 5, 10)}
    return values | {"median_rank": float(np.median(1 + above + level / 2))}


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Text ↔ video ↔ audio retrieval, every subset of streams against every other stream.

    data: manifest. objective: name of the contrastive objective in the config.
    Clips that lack any of the embedded streams are left out, so that all directions are over the
    same candidates. A query of several streams is the sum of their unit embeddings.
    """

    data: str
    objective: str = "contrast"

    def __call__(self, predict: Callable) -> dict[str, float]:
        rows = predict(self.data, "VAT")
        names = [name for name in ("video", "audio", "text") if f"{self.objective}/{name}" in rows]
        complete = np.logical_and.reduce([rows[f"present/{name}"] for name in names])
        embedding = {name: rows[f"{self.objective}/{name}"][complete] for name in names}
        result = {"clips": float(complete.sum())}
        if not complete.any():
            return result
        for letters, modalities in SUBSETS.items():
            if not set(modalities) <= set(names):
                continue
            query = np.sum([embedding[name] for name in modalities], axis=0)
            for target in names:
                if target not in modalities:
                    direction = f"{letters}→{target[0].upper()}"
                    result |= {f"{direction}/{key}": value for key, value in table(query, embedding[target]).items()}
        return result | {"chance/R@1": 1.0 / complete.sum()}
