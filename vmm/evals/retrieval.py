"""Retrieval among clips, in every direction, from the embeddings of a contrastive objective."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vmm.errors import UserError, one_of
from vmm.evals.classification import objectives_of
from vmm.evals.scored import Measured, Measuring, Scored
from vmm.types import SUBSETS


def unit(x: np.ndarray) -> np.ndarray:
    """Returns vectors [… E] of length 1: the mean over several views of a clip is shorter. Zero stays zero, and what is not finite."""
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def ranks(
    queries: np.ndarray, keys: np.ndarray, owners: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, per query, how many keys beat the best of its own, and how many others and how many of its own are level with it.

    queries: [n E]; keys: [m E]. owners: int [n] and [m], which video each is of: a query's own keys are those of its video,
    at least one; None: key i is of query i. Not-a-number counts as beaten by all.
    """
    scores = queries.astype(np.float64) @ keys.astype(np.float64).T
    mine, theirs = (np.arange(len(queries)), np.arange(len(keys))) if owners is None else owners
    own = mine[:, None] == theirs[None]
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    best = np.where(own, scores, -np.inf).max(1, initial=-np.inf)[:, None]
    above = (~own & (scores > best)).sum(1)
    level = (~own & (scores == best)).sum(1)
    right = (own & (scores == best)).sum(1)
    bad = ~np.isfinite(best[:, 0])
    above[bad], level[bad], right[bad] = (~own[bad]).sum(1), 0, 1
    return above, level, right


def found(above: np.ndarray, level: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """Returns each query's chance [n] that a key of its own is among the first k, ties broken at random: constants give chance.

    above, level, right: as of `ranks`. Of level + right that tie, k − above are taken: none of them is right in
    C(level, k − above) of C(level + right, k − above) cases.
    """
    tied, taken = level + right, k - above
    miss = np.ones(len(above))
    for i in range(int(right.max(initial=0))):  # the places of the right ones, all among those that are not taken
        share = np.clip((tied - taken - i) / np.maximum(tied - i, 1), 0.0, 1.0)
        miss *= np.where(i < right, share, 1.0)
    return 1.0 - miss


def recall(above: np.ndarray, level: np.ndarray, right: np.ndarray, k: int) -> float:
    """Returns R@k in [0, 1], the mean of `found`."""
    return float(found(above, level, right, k).mean())


def score(
    name: str, data: str, subset: str, row: np.ndarray, queries: np.ndarray, keys: np.ndarray,
    owners: tuple[np.ndarray, np.ndarray] | None = None,
) -> Scored:  # fmt: skip
    """Returns R@1, R@5, R@10 (in [0, 1]) and the median rank (1 is best, ties: the expected one). See Scored, `ranks`.

    Queries are what a resample draws; the keys that they are compared with stay.
    """
    above, level, right = ranks(queries, keys, owners)
    rank = 1 + above + level / (right + 1)  # of the first right one, where ties are in random order

    def rest(places: np.ndarray) -> dict[str, float]:
        return {"median_rank": float(np.median(rank[places]))}

    means = {f"R@{k}": found(above, level, right, k) for k in (1, 5, 10)}
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

    As MSR-VTT's, MSVD's and COCO's several captions are scored: each caption is a query of its own, and a video that asks for
    text has found it with any of its own captions, of which the others are then no wrong answers. Rows of one video (one
    file, one span) are one candidate, and their captions are all its own. Under the corruption wrong_caption, only the first
    of several captions is wrong.
    """

    hub_task = ("feature-extraction", "Retrieval among clips")
    compares_streams = True

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

    def prepare(self, predict: Callable) -> "Gallery | None":
        """Returns the videos and captions behind the rows; None where each row is one video with at most one caption."""
        rows, phrasings = predict.rows(self.data), predict.phrasings(self.data)
        _, video = np.unique([repr((row.path, row.record, row.start, row.end)) for row in rows], return_inverse=True)
        if len(set(video)) == len(rows) and all(len(texts) <= 1 for texts in phrasings):
            return None
        more = [(row, text) for row, texts in enumerate(phrasings) for text in texts[1:]]
        key = f"{self.objective}/text"
        told = bool(more) and predict.knows("T")
        found = predict.embed([text for _, text in more]).get(key) if told else None
        return Gallery(video, np.array([row for row, _ in more], int), found)

    def measure(self, predict: Callable, prepared: "Gallery | None") -> Measured:
        """Returns the scores under "V→T" and so on."""
        rows = predict(self.data, "VAT")
        names = [name for name in ("video", "audio", "text") if f"{self.objective}/{name}" in rows]
        if not names:
            hint = one_of(self.objective, objectives_of(rows))
            raise UserError(f"evals (kind 'retrieval'): objective {self.objective!r} embeds nothing; {hint}")
        complete = np.logical_and.reduce([rows[f"present/{name}"] for name in names])
        if not complete.any():
            return Measured([], {"clips": 0.0})
        row = rows["row"][complete]
        embedding = {name: unit(rows[f"{self.objective}/{name}"][complete]) for name in names}
        video = row if prepared is None else prepared.video[row]
        _, first, of_video = np.unique(video, return_index=True, return_inverse=True)
        row = row[first[of_video]]  # all rows of a video are one clip, called as its first
        first.sort()  # the clips' order
        # Captions: place of the row that has it, embedding.
        place, text = np.arange(len(row)), embedding.get("text")
        if prepared is not None and prepared.more is not None and text is not None:
            where = {number: place for place, number in enumerate(rows["row"][complete].tolist())}
            kept = np.array([number in where for number in prepared.row.tolist()], bool)
            place = np.concatenate([place, [where[number] for number in prepared.row[kept].tolist()]]).astype(int)
            # A text that is hidden, by a corruption, is hidden in all its phrasings.
            seen = text[place[len(text) :]].any(1, keepdims=True)
            text = np.concatenate([text, unit(prepared.more[kept]) * seen])
            order = np.argsort(place, kind="stable")
            place, text = place[order], text[order]
        scored = []
        for letters, modalities in SUBSETS.items():
            if not set(modalities) <= set(names):
                continue
            asks = place if "text" in modalities else first
            query = np.sum([text if name == "text" else embedding[name][asks] for name in modalities], axis=0)
            for target in names:
                if target not in modalities and self._compared(modalities, target):
                    direction = f"{letters}→{target[0].upper()}"
                    among = place if target == "text" else first
                    keys = text if target == "text" else embedding[target][first]
                    owners = video[asks], video[among]
                    scored.append(score(direction, self.data, letters, row[asks], query, keys, owners))
        notes = {"clips": float(len(first)), "chance/R@1": 1.0 / len(first)}
        several = text is not None and len(text) > len(first)
        return Measured(scored, notes | ({"captions": float(len(text))} if several else {}))


class Gallery(NamedTuple):
    """What stands behind a manifest's rows. video: int [rows], which video each is. row, more: the row of every caption that
    is not its row's first, and its embedding [m E]; None: there are none, or the model embeds no text."""

    video: np.ndarray
    row: np.ndarray
    more: np.ndarray | None
