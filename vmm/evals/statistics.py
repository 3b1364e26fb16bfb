"""How sure a number is, and whether two differ: bootstrap intervals, paired tests, corrections for many comparisons.

Everywhere a clip is the unit: `groups` names each row's clip, and all rows of a clip are drawn, or change sides,
together; None: every row is a clip of its own. All draws follow from the seed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
_CELLS = 4_000_000  # resamples × groups that are held at once


def intervals(
    scores: np.ndarray, groups: np.ndarray | None = None, *, level: float = 0.95, resamples: int = RESAMPLES,
    kind: str = "bca", seed: int = 0, shares: bool | Sequence[bool] = True,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Returns (low, high), each [M], of the interval of each column's mean.

    Args:
      scores: float [n M], finite; a row's share in each metric.
      groups: int [n] or None.
      level: of confidence. resamples: how many are drawn.
      kind: "percentile" or "bca" (bias-corrected and accelerated, Efron 1987).
      shares: scores lie in [0, 1], of all columns or each. Where all rows of a column are 0, or all are 1, the bootstrap knows nothing but that
        value; the ends are then Clopper & Pearson's (1934): of n right out of n, from (α / 2)^(1 / n) to 1.

    Raises:
      ValueError: no rows, a score that is not finite, or another kind.
    """
    scores = np.asarray(scores, np.float64)
    _check(scores, kind)
    sums, sizes = _by_group(scores, groups)
    drawn = np.concatenate([(c @ sums) / (c @ sizes)[:, None] for c in _draws(len(sums), resamples, seed)])
    left = (sums.sum(0) - sums) / np.maximum(sizes.sum() - sizes, 1)[:, None]
    low, high = _ends(drawn, sums.sum(0) / sizes.sum(), left if kind == "bca" else None, level)
    bound = ((1 - level) / 2) ** (1 / len(sums))
    never, always = ((scores == end).all(0) & np.asarray(shares) for end in (0, 1))
    return np.where(always, bound, low), np.where(never, 1 - bound, high)


def intervals_of(
    function: Callable[[np.ndarray], np.ndarray], rows: int, groups: np.ndarray | None = None, *, level: float = 0.95,
    resamples: int = 400, kind: str = "percentile", seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Returns (low, high), each [M], for numbers that are no means, as F1 or the median.

    Args:
      function: (places int [m] in the rows, repeats included) → the numbers [M] of these rows. A resample that it gives
        not-a-number for (a class that was not drawn) is left out of that number.
      rows: n. The rest: see `intervals`; "bca" calls the function once more for every group.

    Raises:
      ValueError: no rows, or another kind.
    """
    _check(np.zeros((rows, 1)), kind)
    members = _members(rows, groups)
    drawn, alone = [], np.concatenate(members) if len(members) == rows else None
    for counts in _draws(len(members), resamples, seed):
        for count in counts.astype(np.int64):
            if alone is not None:  # a row a clip: the usual case, and a quick one
                places = np.repeat(alone, count)
            else:
                places = np.concatenate([np.tile(m, k) for m, k in zip(members, count) if k])
            drawn.append(function(places))
    left = None
    if kind == "bca":
        left = np.stack([function(np.concatenate(members[:i] + members[i + 1 :])) for i in range(len(members))])
    return _ends(np.stack(drawn), function(np.arange(rows)), left, level)


def _check(scores: np.ndarray, kind: str) -> None:
    if kind not in ("bca", "percentile"):
        raise ValueError(f"unknown kind of interval {kind!r}; known: bca, percentile")
    if not len(scores) or not np.isfinite(scores).all():
        raise ValueError("an interval needs at least one row, and finite scores")


def _members(rows: int, groups: np.ndarray | None) -> list[np.ndarray]:
    """Returns the rows of each group."""
    if groups is None:
        return list(np.arange(rows)[:, None])
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(np.asarray(groups)[order])) + 1)


def _by_group(scores: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns each group's sum of scores [G M] and its number of rows [G]."""
    if groups is None:
        return scores, np.ones(len(scores))
    names, of_row = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), scores.shape[1]))
    np.add.at(sums, of_row, scores)
    return sums, np.bincount(of_row).astype(np.float64)


def _draws(groups: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each resample drew each group, float64 [r G], until there are `resamples` rows."""
    rng = np.random.default_rng(seed)
    at_once = max(1, _CELLS // groups)
    for start in range(0, resamples, at_once):
        r = min(at_once, resamples - start)
        flat = rng.integers(groups, size=(r, groups)) + groups * np.arange(r)[:, None]
        yield np.bincount(flat.ravel(), minlength=r * groups).reshape(r, groups).astype(np.float64)


def _ends(drawn: np.ndarray, found: np.ndarray, left: np.ndarray | None, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of the intervals from the resamples [R M]; left: the numbers without each group, for BCa."""
    from scipy import stats  # a second to import, which training does without

    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    ends = np.full((2, len(found)), np.nan)
    for m in range(len(found)):
        values = drawn[np.isfinite(drawn[:, m]), m]
        if not len(values):
            continue
        shares = tails
        if left is not None and np.ptp(values):
            below = ((values < found[m]).sum() + 0.5 * (values == found[m]).sum()) / len(values)
            bias = stats.norm.ppf(np.clip(below, 1 / (len(values) + 1), len(values) / (len(values) + 1)))
            away = left[:, m].mean() - left[:, m]
            speed = (away**3).sum() / (6 * max((away**2).sum() ** 1.5, 1e-300))
            z = bias + stats.norm.ppf(tails)
            shares = stats.norm.cdf(bias + z / (1 - speed * z))
        ends[:, m] = np.quantile(values, shares)
    return ends[0], ends[1]


# ---- two systems on the same clips ----------------------------------------------------------------


class Paired(NamedTuple):
    """Two systems on n rows. difference: mean of theirs − ours, from low to high; p: of no difference."""

    rows: int
    ours: float
    theirs: float
    difference: float
    low: float
    high: float
    p: float


def paired(
    ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray | None = None, *, level: float = 0.95, seed: int = 0
) -> Paired:
    """Compares the means of two systems' scores [n] of the same rows: paired bootstrap (BCa) and sign-flip test.

    Where one system is right and the other wrong on every row, the interval is as of `intervals` with shares.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = theirs - ours
    side = -1.0 if (difference == -1).all() else 1.0
    whole = bool((side * difference == 1).all())
    low, high = sorted(
        side * end for end in intervals(side * difference[:, None], groups, level=level, seed=seed, shares=whole)
    )
    return Paired(
        len(ours), float(ours.mean()), float(theirs.mean()), float(difference.mean()),
        float(low[0]), float(high[0]), sign_flip(difference, groups, seed=seed),
    )  # fmt: skip


def sign_flip(difference: np.ndarray, groups: np.ndarray | None = None, *, flips: int = 20_000, seed: int = 0) -> float:
    """Returns the two-sided p-value that paired differences [n] have mean 0: the sides of each clip may be exchanged.

    Exact, over all 2^G changes of sign, for up to 14 clips that differ at all; else over `flips` draws, the observed one
    counted among them (Phipson & Smyth 2010), so that p is never 0.
    """
    sums = _by_group(np.asarray(difference, np.float64)[:, None], groups)[0][:, 0]
    sums = sums[sums != 0]
    found = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    if len(sums) <= 14:
        signs = 1 - 2.0 * ((np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1)
        return float((np.abs(signs @ sums) >= found).mean())
    rng, beyond, at_once = np.random.default_rng(seed), 0, max(1, _CELLS // len(sums))
    for start in range(0, flips, at_once):
        signs = rng.integers(0, 2, size=(min(at_once, flips - start), len(sums)), dtype=np.int8)
        beyond += int((np.abs((2.0 * signs - 1) @ sums) >= found).sum())
    return (beyond + 1) / (flips + 1)


class McNemar(NamedTuple):
    """only_ours, only_theirs: rows that one system alone has right. p: that both are right equally often."""

    only_ours: int
    only_theirs: int
    p: float


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> McNemar:
    """Returns McNemar's test (1947), exact by the binomial distribution, of right (1) or wrong (0) [n]."""
    from scipy import stats  # as above

    ours, theirs = np.asarray(ours) == 1, np.asarray(theirs) == 1
    mine, yours = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    p = float(stats.binomtest(mine, mine + yours).pvalue) if mine + yours else 1.0
    return McNemar(mine, yours, p)


# ---- many comparisons -----------------------------------------------------------------------------


def holm(p: np.ndarray) -> np.ndarray:
    """Returns p-values [m] so adjusted that rejecting those up to α errs at all with probability α (Holm 1979)."""
    p = np.asarray(p, np.float64)
    order = np.argsort(p)
    result = np.empty_like(p)
    result[order] = np.minimum(np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))), 1.0)
    return result


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Returns p-values [m] so adjusted that of those up to α a share of α is false (Benjamini & Hochberg 1995)."""
    p = np.asarray(p, np.float64)
    order = np.argsort(p)[::-1]
    result = np.empty_like(p)
    result[order] = np.minimum(np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1)), 1.0)
    return result
