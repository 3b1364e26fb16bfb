"""Video summaries: moments' scores → the segments worth most that fit into a length → F-score against people's."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vmm.errors import UserError, one_of
from vmm.evals.classification import objectives_of
from vmm.evals.scored import Measured, Measuring, Scored
from vmm.types import SUBSETS

_DRAWS = 20  # of random scores, for chance


def knapsack(values: np.ndarray, lengths: np.ndarray, room: int) -> np.ndarray:
    """Returns bool [n]: the items of the highest total value whose lengths sum to at most `room`; exact.

    values: float [n] ≥ 0. lengths: int [n] > 0. By dynamic programming over rooms, O(n · room).
    """
    best = np.zeros((len(values) + 1, room + 1))
    for i, (value, length) in enumerate(zip(values, lengths)):
        best[i + 1] = best[i]
        if length <= room:
            best[i + 1, length:] = np.maximum(best[i, length:], best[i, : room + 1 - length] + value)
    chosen, left = np.zeros(len(values), bool), room
    for i in reversed(range(len(values))):
        if best[i + 1, left] > best[i, left]:
            chosen[i] = True
            left -= lengths[i]
    return chosen


def summarise(scores: np.ndarray, segment: int, share: float) -> np.ndarray:
    """Returns bool [n], the moments of the summary: whole segments, of the highest total score, of at most `share` of the clip.

    scores: float [n], evenly over the clip. segment: moments of each, the last one shorter.
    """
    first = np.arange(0, len(scores), segment)
    lengths = np.diff(np.append(first, len(scores)))
    least = min(scores.min(initial=0.0), 0.0)
    values = np.add.reduceat(scores - least, first)
    return np.repeat(knapsack(values, lengths, int(np.floor(share * len(scores) + 1e-9))), lengths)


def f_score(said: np.ndarray, true: np.ndarray) -> float:
    """Returns 2 · precision · recall / (precision + recall) of two summaries, bool [n]; 0 where they share nothing."""
    both = (said & true).sum()
    return float(2 * both / (said.sum() + true.sum())) if both else 0.0


def merged(start: np.ndarray, curves: np.ndarray, step: float, times: np.ndarray | None = None) -> np.ndarray:
    """Returns one curve [m] of a clip from those of its windows: where these overlap, their mean; nan where none tells.

    start: seconds [w] of the windows. curves: [w n], evenly over each. step: seconds between its numbers. times: [m] of the
    curve's numbers; None: from the first window to the end of the last.
    """
    first = start.min() if times is None else times[0]
    place = np.rint((start - first) / step).astype(int)[:, None] + np.arange(curves.shape[1])
    total, count = (np.zeros(place.max() + 1 if times is None else len(times)) for _ in range(2))
    there = np.isfinite(curves) & (place >= 0) & (place < len(total))
    np.add.at(total, place[there], curves[there])
    np.add.at(count, place[there], 1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def agreement(said: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Returns Kendall's τ and Spearman's ρ of two curves; 0 where either does not vary (Otani et al. 2019)."""
    from scipy.stats import kendalltau, spearmanr  # a second to import, which training does without

    if np.ptp(said) == 0 or np.ptp(true) == 0:
        return 0.0, 0.0
    return float(kendalltau(said, true).statistic), float(spearmanr(said, true).statistic)


@dataclasses.dataclass(frozen=True)
class Summary(Measuring):
    """Summaries made of a `moments` objective's curve, against those made of the true one in the same way (TVSum, Song et al. 2015).

    F: of the two summaries, each of at most `share` of the clip, of whole segments of `segment` seconds. kendall, spearman: of
    the curves. data: manifest. curve: name in data.targets. objective: name in the config. subsets: of types.SUBSETS.
    Windows of long clips are merged, see data.evaluation.stride. Chance, F of random curves, stands beside.
    """

    data: str
    curve: str = "importance"
    objective: str = "moments"
    subsets: tuple[str, ...] = ("V", "A", "VA")
    share: float = 0.15
    segment: float = 0.5

    asks = True  # more than predict(manifest, subset)

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns "subset/F", "/kendall", "/spearman"."""
        scored, notes = [], {}
        for subset in self.subsets:
            rows = predict.ask(self.data, subset)
            if rows is None:
                continue
            said, true = (self._of(rows, *key) for key in ((self.objective, "predicted"), ("target", "asked for")))
            shown = np.logical_or.reduce([rows[f"present/{n}"] for n in SUBSETS[subset] if f"present/{n}" in rows])
            scored.append(self._score(subset, rows, shown, said, true, notes))
        return Measured(scored, notes)

    def _of(self, rows: dict, whose: str, how: str) -> np.ndarray:
        if f"{whose}/{self.curve}" not in rows:
            known = [key.partition("/")[2] for key in rows if key.startswith("target/")]
            hint = one_of(self.curve, known) if whose == "target" else one_of(whose, objectives_of(rows))
            raise UserError(f"evals (kind 'summary'): no curve {self.curve!r} is {how} ({whose}/{self.curve}); {hint}")
        return rows[f"{whose}/{self.curve}"].astype(np.float64)

    def _score(self, subset, rows, shown, said, true, notes) -> Scored:
        numbers, found, chance = [], {"F": [], "kendall": [], "spearman": []}, []
        # The window's length is told with the answers: a curve's numbers are evenly over it.
        seconds = rows[f"{self.objective}/seconds"]
        for row in np.unique(rows["row"]):
            mine = (rows["row"] == row) & shown
            if not mine.any() or not np.isfinite(true[mine]).any():
                continue
            step = float(seconds[mine][0]) / true.shape[1]
            curves = [merged(rows["start"][mine], curve[mine], step) for curve in (said, true)]
            known = np.isfinite(curves[0]) & np.isfinite(curves[1])
            one, two = (curve[known] for curve in curves)
            segment = max(1, round(self.segment / step))
            wanted = summarise(two, segment, self.share)
            if not wanted.any():  # nothing of the clip is worth anything, or all of it is shorter than a segment
                continue
            found["F"].append(f_score(summarise(one, segment, self.share), wanted))
            for name, value in zip(("kendall", "spearman"), agreement(one, two)):
                found[name].append(value)
            rng = np.random.default_rng([int(row)])
            drawn = [summarise(rng.uniform(size=len(two)), segment, self.share) for _ in range(_DRAWS)]
            chance.append(np.mean([f_score(one, wanted) for one in drawn]))
            numbers.append(row)
        notes[f"chance/{subset}"] = float(np.mean(chance)) if chance else float("nan")
        means = {name: np.array(values) for name, values in found.items()}
        return Scored(subset, self.data, subset, np.array(numbers, int), means, amounts=("kendall", "spearman"))
