"""Texts that were written: against texts that people wrote (BLEU, ROUGE-L, CIDEr-D), and for the facts in them."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vmm.data.text import decode_ids, end_id
from vmm.errors import UserError, one_of
from vmm.evals.classification import label_of
from vmm.evals.scored import Measured, Measuring, Scored

ORDERS = 4  # n-grams of 1 to 4 words
METRICS = ("bleu", "rouge_l", "cider")


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation; "it's" is one."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def grams(words: Sequence[str], order: int) -> collections.Counter:
    """Returns how often each run of `order` words stands there."""
    return collections.Counter(zip(*(words[i:] for i in range(order))))


def bleu_counts(words: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns what BLEU needs of one text, int [2 + 2 · ORDERS]: its length, that of the reference nearest in length (of
    two, the shorter), the n-grams that a reference has too, each as often at most (Papineni et al. 2002, sec. 2.1), and all.
    """
    nearest = min((abs(len(r) - len(words)), len(r)) for r in references)[1]
    shared, whole = [], []
    for order in range(1, ORDERS + 1):
        mine, most = grams(words, order), collections.Counter()
        for reference in references:
            most |= grams(reference, order)
        shared.append((mine & most).total())
        whole.append(mine.total())
    return np.array([len(words), nearest, *shared, *whole])


def bleu(counts: np.ndarray) -> dict[str, float]:
    """Returns "bleu1" to "bleu4" of a corpus (Papineni et al. 2002, sec. 2.3), not smoothed. counts: from bleu_counts, [n …].

    BLEU-N = min(1, exp(1 − r / c)) · (Π_{n ≤ N} p_n)^{1/N}
    """
    length, nearest, *rest = counts.sum(0)
    shared, whole = np.array(rest[:ORDERS]), np.array(rest[ORDERS:])
    brevity = math.exp(min(0.0, 1 - nearest / length)) if length else 0.0
    precision = np.where(whole > 0, shared / np.maximum(whole, 1), 0.0)
    means = [float(np.prod(precision[:n]) ** (1 / n)) for n in range(1, ORDERS + 1)]
    return {f"bleu{n}": brevity * mean for n, mean in enumerate(means, 1)}


def longest(one: Sequence[str], two: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence."""
    row = [0] * (len(two) + 1)
    for word in one:
        before = 0
        for i, other in enumerate(two, 1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    return row[-1]


def rouge_l(words: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2) -> float:
    """Returns ROUGE-L (Lin 2004, eq. 2 to 4): (1 + β²) P R / (R + β² P) of the longest common subsequence.

    β, and of several references the best P and the best R, are those of the COCO caption evaluation (Chen et al. 2015).
    """
    common = [longest(words, reference) for reference in references]
    precision = max(common) / len(words) if words else 0.0
    recall = max(c / len(r) if r else 0.0 for c, r in zip(common, references))
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


class Cider:
    """CIDEr-D (Vedantam et al. 2015, sec. 5, with σ = 6): how much a text has of the n-grams that tell its clip from others.

    references: texts of each clip as words: in how many clips an n-gram stands is counted over them. Of fewer than two
    clips, nothing tells one from another: all scores are 0.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]], sigma: float = 6.0):
        self.sigma, self.clips = sigma, max(len(references), 1)
        self.found = [collections.Counter() for _ in range(ORDERS)]
        for texts in references:
            for order, found in enumerate(self.found, 1):
                found.update({gram for words in texts for gram in grams(words, order)})

    def _weights(self, words: Sequence[str], order: int) -> dict:
        """n-gram → its count, times the logarithm of the clips over those that have it."""
        found = self.found[order - 1]
        return {gram: count * math.log(self.clips / max(found[gram], 1)) for gram, count in grams(words, order).items()}

    def __call__(self, words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Returns the score of a text for a clip, 0 to 10: the mean over references, and over n, of

        10 · exp(−(l_c − l_r)² / 2σ²) · Σ min(c, r) r / (‖c‖ ‖r‖),  c and r the weights of the n-grams.
        """
        total = 0.0
        for order in range(1, ORDERS + 1):
            mine = self._weights(words, order)
            size = math.sqrt(sum(w * w for w in mine.values()))
            for reference in references:
                theirs = self._weights(reference, order)
                norm = size * math.sqrt(sum(w * w for w in theirs.values()))
                if norm:
                    shared = sum(min(w, theirs[gram]) * theirs[gram] for gram, w in mine.items() if gram in theirs)
                    total += shared / norm * math.exp(-((len(words) - len(reference)) ** 2) / (2 * self.sigma**2))
        return 10.0 * total / (ORDERS * len(references))


def names(text: str, phrases: Sequence[str | Sequence[str]]) -> np.ndarray:
    """Returns bool [Y]: which classes a text names, by a phrase of theirs, word for word. phrases: of each class."""
    whole = f" {' '.join(words_of(text))} "
    several = [[own] if isinstance(own, str) else own for own in phrases]
    return np.array([any(f" {' '.join(words_of(phrase))} " in whole for phrase in own) for own in several])


def written(predict: Callable, evaluator, subset: str) -> dict | None:
    """Returns the rows that the objective of an evaluator wrote, and under "texts" what they spell; None for a subset
    that the model has not. evaluator: its data, objective, beams, penalty and length.
    """
    tokenizer = predict.tokenizer
    options = dict(beams=evaluator.beams, penalty=evaluator.penalty, length=evaluator.length)
    rows = predict.ask(
        evaluator.data, subset, method="generate", objective=evaluator.objective, end=end_id(tokenizer), **options
    )
    if rows is None:
        return None
    return {**rows, "texts": [decode_ids(tokenizer, ids) for ids in rows[f"{evaluator.objective}/ids"]]}


def likeliest(rows: Mapping) -> np.ndarray:
    """Returns for each clip the place of that view [n] whose text is likeliest; views of a clip stand together."""
    key = next(key for key in rows if key.endswith("/likelihood"))
    order = np.lexsort((-rows[key], rows["row"]))
    return order[np.unique(rows["row"][order], return_index=True)[1]]


@dataclasses.dataclass(frozen=True)
class Captions(Measuring):
    """Texts that an objective writes, against all phrasings of the clip's caption, where it has one.

    data: manifest. objective: name of the captioning objective in the config. subsets: keys of types.SUBSETS, those
    of them that name streams the model has. beams, penalty, length: see Captioning.generate. metrics: of METRICS, all
    but BLEU clip by clip. facts: label → phrase, or phrases, of each class in order: a fact is named right where
    the text has a phrase of the clip's class, and none of another. Of several views of a clip, the likeliest text counts.
    """

    hub_task = ("video-text-to-text", "Text of clips")

    asks = True

    data: str
    objective: str = "captioning"
    subsets: tuple[str, ...] = ("VAT",)
    beams: int = 4
    penalty: float = 0.6
    length: int = 0
    metrics: tuple[str, ...] = METRICS
    facts: Mapping = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for metric in self.metrics:
            if metric not in METRICS:
                raise UserError(f"evals: captions have no metric {metric!r}; {one_of(metric, METRICS)}")

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns the scores under the subset, those of facts under "subset/facts"; note: clips."""
        scored, notes = [], {}
        for subset in self.subsets:
            rows = written(predict, self, subset)
            if rows is None:
                continue
            clips = predict.rows(self.data)
            every = likeliest(rows)
            best = [i for i in every if clips[rows["row"][i]].captions]
            texts = [rows["texts"][i] for i in best]
            truths = [clips[rows["row"][i]].captions for i in best]
            scored.append(score_texts(subset, self.data, subset, rows["row"][best], texts, truths, self.metrics))
            scored += self._facts(rows, every, subset)
            notes["clips"] = float(len(best))
        return Measured(scored, notes)

    def _facts(self, rows: Mapping, best: np.ndarray, subset: str) -> list[Scored]:
        right, known = np.zeros((len(best), len(self.facts))), np.zeros((len(best), len(self.facts)), bool)
        for column, (label, phrases) in enumerate(self.facts.items()):
            labels = label_of(rows, label, self.data, f"evals (captions).facts.{label}")[best]
            if len(labels) and labels.max() >= len(phrases):
                raise UserError(
                    f"evals (captions).facts.{label}: {len(phrases)} phrases, but a clip of {self.data} has class {labels.max()}"
                )
            said = [names(rows["texts"][i], phrases) for i in best]
            known[:, column] = labels >= 0
            right[:, column] = [own.sum() == 1 and own[label] for own, label in zip(said, labels)]
        result = []
        for column, label in enumerate(self.facts):
            use = known[:, column]
            row = rows["row"][best][use]
            result.append(Scored(f"{subset}/{label}", self.data, subset, row, {"": right[use, column]}))
        if self.facts:
            use = known.any(1)
            share = (right * known).sum(1)[use] / known.sum(1)[use]
            result.append(Scored(f"{subset}/facts", self.data, subset, rows["row"][best][use], {"": share}))
        return result


def score_texts(
    name: str, data: str, subset: str, row: np.ndarray, texts: Sequence[str], truths: Sequence[Sequence[str]],
    metrics: Sequence[str] = METRICS,
) -> Scored:  # fmt: skip
    """Returns the scores of texts [n], each against several [n …]; see Scored for the other arguments."""
    mine, theirs = [words_of(text) for text in texts], [[words_of(text) for text in several] for several in truths]
    means = {}
    if "cider" in metrics:
        cider = Cider(theirs)
        means["cider"] = np.array([cider(*pair) for pair in zip(mine, theirs)])
    if "rouge_l" in metrics:
        means["rouge_l"] = np.array([rouge_l(*pair) for pair in zip(mine, theirs)])
    counts = np.array([bleu_counts(*pair) for pair in zip(mine, theirs)]).reshape(len(mine), -1)
    rest = (lambda places: bleu(counts[places])) if "bleu" in metrics and len(mine) else None
    return Scored(name, data, subset, row, means, {"text": np.array(texts, str)}, rest)
