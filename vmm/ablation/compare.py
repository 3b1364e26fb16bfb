"""Do two variants differ? Paired over the clips that both were tested on and over the seeds that both were trained with."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from vmm.evals.statistics import holm, paired
from vmm.training.metrics import read_rows

_ALL = 5  # so many variants are all compared with one another; more with the first alone


class Comparison(NamedTuple):
    """theirs − ours of a score, and how sure it is. low, high: 95 % over clips. p: the larger of p_clips and p_seeds."""

    ours: str
    theirs: str
    difference: float
    low: float
    high: float
    p_clips: float
    p_seeds: float
    p: float
    adjusted: float
    clips: int
    seeds: int


def clip_scores(path, score: str) -> dict[str, float]:
    """Returns id → score of each clip in a file of predictions; empty where it has none of the score.

    score: "evaluator/name/metric", or "evaluator/name" of accuracy.
    """
    evaluator, _, rest = score.partition("/")
    whole, (name, _, metric) = (rest, "accuracy"), rest.rpartition("/")
    found = {}
    for row in read_rows(path)[1:]:
        if row["evaluator"] == evaluator and (row["name"], "accuracy") == whole and "accuracy" in row["scores"]:
            found[row["id"]] = row["scores"]["accuracy"]
        elif row["evaluator"] == evaluator and row["name"] == name and metric in row["scores"]:
            found[row["id"]] = row["scores"][metric]
    return {key: value for key, value in found.items() if value is not None}


def pairs(variants: Sequence[str], against: str = "") -> list[tuple[str, str]]:
    """Returns what is compared: all pairs of up to five variants; of more, or if `against` names one, each with that."""
    if len(variants) <= _ALL and not against:
        return list(itertools.combinations(variants, 2))
    against = against or variants[0]
    return [(against, name) for name in variants if name != against]


def over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Returns the two-sided p-value of a paired t-test over seeds; not-a-number for fewer than two."""
    difference = np.asarray(theirs, np.float64) - np.asarray(ours, np.float64)
    if len(difference) < 2:
        return math.nan
    spread = difference.std(ddof=1)
    if spread == 0:  # all the same: no t, and two equal seeds prove nothing by themselves
        return 1.0 if difference[0] == 0 else 2.0 ** (1 - len(difference))
    t = difference.mean() / spread * math.sqrt(len(difference))
    return float(2 * stats.t.sf(abs(t), len(difference) - 1))


def compare(
    values: Mapping[str, Mapping[int, float]],
    clips: Mapping[str, Mapping[int, Mapping[str, float]]],
    which: Sequence[tuple[str, str]],
) -> list[Comparison]:
    """Compares pairs of variants; p-values are adjusted for their number (Holm 1979).

    Two tests: over clips (all seeds of a clip together change sides: would it hold on other clips?), over seeds (paired t: on other
    trainings?). A difference counts where both say so.

    Args:
      values: variant → seed → score. clips: variant → seed → id → score, empty where there are none.
    """
    found = []
    for ours, theirs in which:
        seeds = sorted(set(values[ours]) & set(values[theirs]))
        a, b = ([values[name][seed] for seed in seeds] for name in (ours, theirs))
        p_seeds, low, high, p_clips = over_seeds(a, b), math.nan, math.nan, math.nan
        rows = [
            (key, clips[ours][seed][key], clips[theirs][seed][key])
            for seed in seeds
            for key in sorted(set(clips[ours].get(seed, {})) & set(clips[theirs].get(seed, {})))
        ]
        count = len({row[0] for row in rows})
        if count > 1:
            _, of_row = np.unique([row[0] for row in rows], return_inverse=True)
            _, _, _, _, low, high, p_clips = paired(
                np.array([row[1] for row in rows]), np.array([row[2] for row in rows]), of_row
            )
        told = [p for p in (p_clips, p_seeds) if not math.isnan(p)]
        p = max(told) if told else math.nan
        difference = float(np.mean(b) - np.mean(a))
        found.append(Comparison(ours, theirs, difference, low, high, p_clips, p_seeds, p, math.nan, count, len(seeds)))
    known = [item for item in found if not math.isnan(item.p)]
    adjusted = iter(holm(np.array([item.p for item in known])) if known else ())
    return [item if math.isnan(item.p) else item._replace(adjusted=float(next(adjusted))) for item in found]


def compared_table(comparisons: Sequence[Comparison]) -> list[dict]:
    """Returns one dict a comparison: column → text; differences in %."""

    def p(value: float) -> str:
        return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"

    table = []
    for item in comparisons:
        around = "" if math.isnan(item.low) else f" ({100 * item.low:+.1f} to {100 * item.high:+.1f})"
        table.append(
            {
                "pair": f"{item.theirs} − {item.ours}",
                "difference": f"{100 * item.difference:+.1f}{around}",
                f"p, {item.clips} clips" if item.clips else "p, clips": p(item.p_clips),
                f"p, {item.seeds} seeds": p(item.p_seeds),
                "p, adjusted": p(item.adjusted),
            }
        )
    # Variants may have been tested on different numbers of clips: then the columns tell none.
    if len({tuple(line) for line in table}) > 1:
        plain = ("pair", "difference", "p, clips", "p, seeds", "p, adjusted")
        table = [dict(zip(plain, line.values())) for line in table]
    return table
