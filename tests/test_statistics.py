"""Intervals, tests and corrections against values by hand, exact distributions, SciPy and scikit-learn."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from vmm.evals.calibration import brier, expected_error, log_loss, reliability, softmax
from vmm.evals.statistics import (
    benjamini_hochberg,
    holm,
    intervals,
    intervals_of,
    mcnemar,
    paired,
    sign_flip,
)


def mean_of(scores):
    return lambda places: np.array([scores[places].mean()])


def test_percentile_interval_of_two_rows_by_hand():
    """Of rows 0 and 1 the resampled mean is 0, ½, 1 with probability ¼, ½, ¼."""
    scores = np.array([[0.0], [1.0]])
    for level, ends in ((0.4, (0.5, 0.5)), (0.9, (0.0, 1.0))):
        low, high = intervals(scores, kind="percentile", level=level)
        assert (low[0], high[0]) == ends
        assert intervals_of(mean_of(scores[:, 0]), 2, level=level, resamples=2000) == ([ends[0]], [ends[1]])


@pytest.mark.parametrize("kind", ["percentile", "bca"])
def test_intervals_agree_with_scipy(kind):
    scores = np.random.default_rng(0).exponential(size=60)  # skewed: the kinds differ
    method = {"bca": "BCa"}.get(kind, kind)
    expected = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method=method, rng=1).confidence_interval
    low, high = intervals(scores[:, None], kind=kind, resamples=20_000)
    spread = scores.std() / math.sqrt(60)
    assert [low[0], high[0]] == pytest.approx(list(expected), abs=0.06 * spread)
    one, two = intervals_of(mean_of(scores), 60, kind=kind, resamples=4000)
    assert [one[0], two[0]] == pytest.approx(list(expected), abs=0.15 * spread)
    if kind == "bca":
        plain = intervals(scores[:, None], kind="percentile", resamples=20_000)
        assert low[0] > plain[0][0] + 0.05 * spread, "the long tail is above: BCa lies higher"


def test_interval_covers_the_truth():
    """Of 300 samples of 40, about 95 % of the intervals hold the true mean."""
    rng = np.random.default_rng(2)
    low, high = intervals((rng.uniform(size=(40, 300)) < 0.7).astype(float))
    covered = ((low <= 0.7) & (high >= 0.7)).mean()
    assert 0.9 < covered < 0.985


def test_clips_are_drawn_whole():
    """Four rows of each of 25 clips, all alike: as wide as of the 25 clips, not as of 100 rows."""
    clips = np.random.default_rng(3).normal(size=(25, 1))
    groups = np.repeat(np.arange(25), 4)
    rows = np.repeat(clips, 4, axis=0)
    for kind in ("bca", "percentile"):
        np.testing.assert_allclose(
            intervals(rows, groups, kind=kind, shares=False), intervals(clips, kind=kind, shares=False)
        )
    shuffled = np.random.default_rng(4).permutation(100)
    one = intervals_of(mean_of(rows[shuffled, 0]), 100, groups[shuffled], resamples=100)
    np.testing.assert_allclose(one, intervals_of(mean_of(clips[:, 0]), 25, resamples=100))
    wide, narrow = intervals(rows, groups), intervals(rows)
    assert (wide[1] - wide[0])[0] > 1.7 * (narrow[1] - narrow[0])[0]


def test_clips_of_unequal_rows_weigh_by_their_rows():
    scores, groups = np.array([1.0, 1.0, 1.0, 0.0]), np.array([7, 7, 7, 9])
    low, high = intervals(scores[:, None], groups, kind="percentile", level=0.4)
    assert (low[0], high[0]) == (0.75, 0.75), "one of each: three rows of four"
    low, high = intervals(scores[:, None], groups, kind="percentile", level=0.9)
    assert (low[0], high[0]) == (0, 1), "one clip twice: two rows of 0, or six of 1"


def test_all_right_is_not_certain():
    """20 of 20: the exact interval of Clopper and Pearson begins at 0.025^(1/20)."""
    low, high = intervals(np.stack([np.ones(20), np.zeros(20), np.full(20, 0.5)], 1))
    assert low == pytest.approx([0.025 ** (1 / 20), 0.0, 0.5]) and high == pytest.approx([1.0, 1 - low[0], 0.5])
    exact = stats.binomtest(20, 20).proportion_ci(method="exact")
    assert (low[0], high[0]) == pytest.approx((exact.low, exact.high))


def test_the_seed_decides_and_bad_rows_are_refused():
    scores = np.random.default_rng(5).uniform(size=(30, 2))
    assert np.array_equal(intervals(scores), intervals(scores))
    assert not np.array_equal(intervals(scores), intervals(scores, seed=1))
    for wrong in (np.zeros((0, 1)), np.array([[np.nan]])):
        with pytest.raises(ValueError, match="at least one row, and finite"):
            intervals(wrong)
    with pytest.raises(ValueError, match="unknown kind"):
        intervals(scores, kind="basic")


def test_numbers_that_a_resample_cannot_give_are_left_out():
    """The number of rows of a class that one resample in three lacks."""
    labels = np.array([0, 1, 1])
    counts = intervals_of(
        lambda places: np.array([np.where((labels[places] == 0).any(), 7.0, np.nan), np.nan]), 3, resamples=50
    )
    assert counts[0][0] == counts[1][0] == 7.0
    assert np.isnan(counts[0][1])


# ---- two systems ----------------------------------------------------------------------------------


def test_sign_flip_by_hand_and_against_scipy():
    assert sign_flip(np.array([1.0, 1.0, 1.0])) == 0.25, "+++ and −−− of eight"
    assert sign_flip(np.array([2.0, -1.0])) == 1.0, "|±1| and |±3| are all at least 1"
    assert sign_flip(np.array([3.0, 1.0, 0.0])) == 0.5, "|4| of ±4, ±2"
    assert sign_flip(np.zeros(5)) == 1.0
    difference = np.random.default_rng(6).normal(0.5, 1, size=11)
    expected = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    ).pvalue
    assert sign_flip(difference) == pytest.approx(expected)


def test_drawn_sign_flips_are_near_the_exact_ones():
    difference = np.random.default_rng(7).normal(0.4, 1, size=16)
    signs = np.array(list(itertools.product((1, -1), repeat=16)))
    exact = (np.abs(signs @ difference) >= abs(difference.sum()) - 1e-9).mean()
    assert sign_flip(difference) == pytest.approx(exact, abs=0.01)
    assert sign_flip(np.ones(200)) == pytest.approx(1 / 20_001), "never 0"


def test_a_clip_changes_sides_whole():
    """One clip of many rows is one difference: no evidence at all."""
    assert sign_flip(np.ones(40), np.zeros(40)) == 1.0
    assert sign_flip(np.ones(40), np.repeat([0, 1, 2, 3], 10)) == 2 / 16


def test_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(8)
    p = np.array([sign_flip(rng.normal(size=12)) for _ in range(200)])
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_paired_is_narrower_than_its_parts():
    rng = np.random.default_rng(9)
    ours = rng.uniform(size=200)
    theirs = ours + rng.normal(0.02, 0.05, size=200)
    result = paired(ours, theirs)
    assert result.rows == 200 and result.difference == pytest.approx((theirs - ours).mean())
    spread = 1.96 * (theirs - ours).std() / math.sqrt(200)
    assert [result.low, result.high] == pytest.approx(
        [result.difference - spread, result.difference + spread], abs=0.15 * spread
    )
    assert result.p < 0.001
    alone = intervals(ours[:, None])
    assert alone[1][0] - alone[0][0] > 5 * (result.high - result.low)
    same = paired(ours, ours)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    worse = paired(np.ones(9), np.zeros(9))
    assert (worse.difference, worse.low, worse.high) == pytest.approx((-1, -1, -(0.025 ** (1 / 9))))


def test_mcnemar_by_hand():
    ours = np.array([1.0] * 5 + [0] * 9 + [1] * 1 + [0] * 3)
    theirs = np.array([1.0] * 5 + [1] * 9 + [0] * 1 + [0] * 3)
    result = mcnemar(ours, theirs)
    assert (result.only_ours, result.only_theirs) == (1, 9)
    assert result.p == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(ours, ours).p == 1.0


def test_corrections_by_hand():
    p = np.array([0.04, 0.01, 0.03, 0.005])
    assert holm(p) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert benjamini_hochberg(p) == pytest.approx([0.04, 0.02, 0.04, 0.02])
    assert holm(np.array([0.5, 0.9])).tolist() == [1.0, 1.0]
    many = np.random.default_rng(10).uniform(size=20) ** 3
    assert benjamini_hochberg(many) == pytest.approx(stats.false_discovery_control(many))


# ---- calibration ----------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    """Two bins: (0, ½] holds 0.5 and 0.4, (½, 1] holds 0.9, 0.7, 1."""
    sure, right = np.array([0.5, 0.4, 0.9, 0.7, 1.0]), np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    bins = reliability(sure, right, 2)
    assert bins.count.tolist() == [2, 3]
    assert bins.confidence == pytest.approx([0.45, 2.6 / 3]) and bins.accuracy == pytest.approx([0.5, 2 / 3])
    assert expected_error(sure, right, 2) == pytest.approx((2 * 0.05 + 3 * 0.2) / 5)
    edges = reliability(np.array([0.7, 0.1, 0.0]), np.ones(3), 10)
    assert edges.count.tolist() == [2, 0, 0, 0, 0, 0, 1, 0, 0, 0], "an upper edge belongs to its bin"
    assert np.isnan(expected_error(np.zeros(0), np.zeros(0)))


def test_calibrated_and_overconfident_guesses():
    rng = np.random.default_rng(11)
    sure = rng.uniform(0.3, 1.0, size=20_000)
    right = (rng.uniform(size=20_000) < sure).astype(float)
    assert expected_error(sure, right) < 0.02
    assert expected_error(np.ones(1000), right[:1000]) == pytest.approx(1 - right[:1000].mean())


def test_brier_and_log_loss():
    from sklearn import metrics

    chance = np.array([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    labels = np.array([0, 2, 0])
    assert brier(chance, labels) == pytest.approx([0.09 + 0.04 + 0.01, 0.0, 2.0])
    assert log_loss(chance, labels) == pytest.approx([-math.log(0.7), 0.0, -math.log(1e-7)])
    drawn = softmax(np.random.default_rng(12).normal(size=(50, 3)))
    truth = np.random.default_rng(13).integers(0, 3, 50)
    assert log_loss(drawn, truth).mean() == pytest.approx(metrics.log_loss(truth, drawn))


def test_softmax_of_what_says_nothing():
    inf = np.inf
    got = softmax(np.array([[0.0, math.log(3)], [np.nan, 5], [-inf, 2], [-inf, -inf]]))
    assert got == pytest.approx(np.array([[0.25, 0.75], [0.5, 0.5], [0, 1], [0.5, 0.5]]))
