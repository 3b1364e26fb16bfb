"""Retrieval among clips, in every direction, from the embeddings of a contrastive objective."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vmm.errors import UserError, one_of
from vmm.evals.classification import objectives_of
from vmm.evals.scored import Measured, Measuring, Scored
from vmm.types import SUBSETS


def unit(x: np.ndarray) -> np.ndarray:
    """Returns vectors [… E] of length 1: the mean over several views of a clip is shorter. Zero stays zero, and what is not finite."""
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


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


def found(above: np.ndarray, level: np.ndarray, k: int) -> np.ndarray:
    """Returns each query's chance [n] that its key is among the first k, ties broken at random: constants give chance."""
    return np.clip((k - above) / (level + 1.0), 0.0, 1.0)


def recall(above: np.ndarray, level: np.ndarray, k: int) -> float:
    """Returns R@k in [0, 1], the mean of `found`."""
    return float(found(above, level, k).mean())


def score(name: str, data: str, subset: str, row: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> Scored:
    """Returns R@1, R@5, R@10 (in [0, 1]) and the median rank (1 is best, ties at their middle). See Scored, `ranks`.

    Queries are what a resample draws; the keys that they are compared with stay.
    """
    above, level = ranks(queries, keys)
    rank = 1 + above + level / 2

    def rest(places: np.ndarray) -> dict[str, float]:
        return {"median_rank": float(np.median(rank[places]))}

    means = {f"R@{k}": found(above, level, k) for k in (1, 5, 10)}
    return Scored(name, data, subset, row, means, {"rank": rank}, rest)


def table(queries: np.ndarray, keys: np.ndarray) -> dict[str, float]:
    """Returns R@1, R@5, R@10 and the median rank of key i for query i."""
    scored = score("", "", "", np.arange(len(queries)), queries, keys).numbers()
    return {key.removeprefix("/"): value for key, value in scored.items()}


@dataclasses.dataclass(frozen=True)
class Retrieval(Measuring):
    """Text ↔ video ↔ audio retrieval, every subset of streams against every other stream that it was trained with.

    data: manifest. objective: name of the contrastive objective in the config.
    pairs: pairs of streams that are compared; a query of several streams needs all of them. (): those that the objective was
    trained on, which the experiment puts here: of others the embeddings say nothing, and their numbers are chance.
    Clips that lack any of the embedded streams are left out, so that all directions are over the
    same candidates. A query of several streams is the sum of their unit embeddings.
    """

    data: str
    objective: str = "contrast"
    pairs: tuple[tuple[str, str], ...] = ()

    def trained_on(self, objectives: Mapping[str, Any]) -> "Retrieval":
        """Returns the evaluator with the pairs of its objective, where it names none."""
        pairs = getattr(objectives.get(self.objective), "pairs", ())
        return self if self.pairs else dataclasses.replace(self, pairs=tuple(map(tuple, pairs)))

    def _compared(self, query: tuple[str, ...], target: str) -> bool:
        known = {frozenset(pair) for pair in self.pairs}
        return not known or all(frozenset((name, target)) in known for name in query)

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns the scores under "V→T" and so on."""
        rows = predict(self.data, "VAT")
        names = [name for name in ("video", "audio", "text") if f"{self.objective}/{name}" in rows]
        if not names:
            hint = one_of(self.objective, objectives_of(rows))
            raise UserError(f"evals (kind 'retrieval'): objective {self.objective!r} embeds nothing; {hint}")
        complete = np.logical_and.reduce([rows[f"present/{name}"] for name in names])
        embedding = {name: unit(rows[f"{self.objective}/{name}"][complete]) for name in names}
        if not complete.any():
            return Measured([], {"clips": 0.0})
        scored = []
        for letters, modalities in SUBSETS.items():
            if not set(modalities) <= set(names):
                continue
            query = np.sum([embedding[name] for name in modalities], axis=0)
            for target in names:
                if target not in modalities and self._compared(modalities, target):
                    direction = f"{letters}→{target[0].upper()}"
                    scored.append(score(direction, self.data, letters, rows["row"][complete], query, embedding[target]))
        return Measured(scored, {"clips": float(complete.sum()), "chance/R@1": 1.0 / complete.sum()})
