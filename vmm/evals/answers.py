"""Answers to questions: written freely, or chosen of several."""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vmm.errors import UserError, one_of
from vmm.evals.captions import likeliest, written
from vmm.evals.classification import label_of, score_classes
from vmm.evals.scored import Classes, Measured, Measuring, Scored

WAYS = ("open", "choices")


def normalised(text: str) -> str:
    """Returns the text in lower case, without punctuation and articles, words apart by one space (Rajpurkar et al. 2016)."""
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def exact(answer: str, accepted: Sequence[str]) -> float:
    """Returns 1 where the normalised answer is one of those accepted, else 0."""
    return float(normalised(answer) in {normalised(text) for text in accepted})


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """Returns the best F1, over accepted answers, of the words that both have (Rajpurkar et al. 2016); two without words: 1."""
    mine, best = collections.Counter(normalised(answer).split()), 0.0
    for text in accepted:
        theirs = collections.Counter(normalised(text).split())
        whole = mine.total() + theirs.total()
        best = max(best, 2 * (mine & theirs).total() / whole if whole else 1.0)
    return best


@dataclasses.dataclass(frozen=True)
class Answers(Measuring):
    """Answers to the question that is the stream of text (data.text), whether written or chosen.

    data: manifest; a row is one question about a clip. objective: name of the captioning objective in the config, which
    writes the answers. ways: of WAYS. "open": what beam search writes, against texts.ANSWER of the row, a string or a
    list of all that is right; rows without one are left out. "choices": that choice is taken which the objective holds for
    likeliest (its field `choices`); the right one is the label `label`. subsets: keys of types.SUBSETS, those of them
    that name streams the model has: the question is one. by: name of a text of the row, "": none; each of its values is
    scored apart too, as the kind of question. beams, penalty, length: see Captioning.generate.

    Notes: what is right by chance: one of the choices, or the most frequent answer of the dataset.
    """

    hub_task = ("video-text-to-text", "Text of clips")

    asks = True

    data: str
    objective: str = "captioning"
    ways: tuple[str, ...] = WAYS
    answer: str = "answer"
    label: str = "answer"
    subsets: tuple[str, ...] = ("VAT",)
    by: str = ""
    beams: int = 1
    penalty: float = 0.0
    length: int = 0

    def __post_init__(self):
        for way in self.ways:
            if way not in WAYS:
                raise UserError(f"evals: answers come in no way {way!r}; {one_of(way, WAYS)}")

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns the scores under "subset/open" and "subset/choices", and of each kind of question under "…/KIND"."""
        scored, notes = [], {}
        for subset in self.subsets:
            for way in self.ways:
                found = getattr(self, f"_{way}")(predict, subset)
                if found is not None:
                    scored += found[0]
                    notes |= found[1]
        return Measured(scored, notes)

    def _kinds(self, predict: Callable, row: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Returns (end of the name, which rows): all, and each kind of question."""
        result = [("", np.ones(len(row), bool))]
        if self.by:
            clips = predict.rows(self.data)
            kinds = np.array([str(clips[i].texts.get(self.by, "")) for i in row], str)
            result += [(f" {kind}", kinds == kind) for kind in sorted(set(kinds) - {""})]
        return result

    def _open(self, predict: Callable, subset: str) -> tuple | None:
        rows = written(predict, self, subset)
        if rows is None:
            return None
        clips = predict.rows(self.data)
        best = [i for i in likeliest(rows) if clips[rows["row"][i]].texts.get(self.answer)]
        if not best:
            raise UserError(f"dataset {self.data}: no row has texts.{self.answer}, which evals (answers) asks for")
        texts = np.array([rows["texts"][i] for i in best], str)
        truths = [clips[rows["row"][i]].texts[self.answer] for i in best]
        truths = [[own] if isinstance(own, str) else own for own in truths]
        row = rows["row"][best]
        means = {
            "exact": np.array([exact(*pair) for pair in zip(texts, truths)]),
            "f1": np.array([token_f1(*pair) for pair in zip(texts, truths)]),
        }
        most = collections.Counter(normalised(own[0]) for own in truths).most_common(1)[0][1]
        scored = [
            Scored(
                f"{subset}/open{kind}", self.data, subset, row[use],
                {name: score[use] for name, score in means.items()}, {"text": texts[use]},
            )
            for kind, use in self._kinds(predict, row)
        ]  # fmt: skip
        return scored, {"questions": float(len(best)), "chance/open": most / len(best)}

    def _choices(self, predict: Callable, subset: str) -> tuple | None:
        rows = predict(self.data, subset)
        if rows is None:
            return None
        key = f"{self.objective}/choices"
        if key not in rows:
            raise UserError(
                f"evals (answers): the objective {self.objective!r} tells of no choices; name their target in "
                f"objectives.{self.objective}.choices, or leave choices out of `ways`"
            )
        labels = label_of(rows, self.label, self.data, "evals (answers).label")
        there = np.isfinite(rows[key])
        wrong = labels >= there.sum(1)
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            clip = predict.rows(self.data)[rows["row"][i]]
            raise UserError(
                f"dataset {self.data}: clip {clip.id!r} has labels.{self.label} {labels[i]}, but {there[i].sum()} choices"
            )
        use = labels >= 0
        scored = []
        for kind, mine in self._kinds(predict, rows["row"]):
            keep = use & mine
            said = Classes(self.label, rows[key][keep], labels[keep])
            scored.append(score_classes(f"{subset}/choices{kind}", self.data, subset, rows["row"][keep], said))
        chance = float((1 / there[use].sum(1)).mean()) if use.any() else float("nan")
        return scored, {"chance/choices": chance}
