"""PSNR and SSIM against hands and loops; the evaluator on scores whose means are known; the sheet of pictures."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmm.errors import UserError
from vmm.evals import EVALS
from vmm.evals.pictures import Pictures, sheet
from vmm.evals.tables import show, show_interval
from vmm.objectives import likeness
from vmm.objectives.likeness import CEILING, charbonnier, edge_error


def psnr(one, other, **options):
    return likeness.psnr(jnp.asarray(one, jnp.float32), jnp.asarray(other, jnp.float32), **options)


def ssim(one, other, **options):
    return likeness.ssim(jnp.asarray(one, jnp.float32), jnp.asarray(other, jnp.float32), **options)


def ssim_reference(one: np.ndarray, other: np.ndarray, peak: float = 255.0, size: int = 11) -> float:
    """Window by window in float64: means, variances and covariance as weighted sums of deviations (Wang et al. 2004)."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    place = np.arange(size) - size // 2
    weight = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    weight /= weight.sum()
    first, second = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    found = []
    for y in range(one.shape[0] - size + 1):
        for x in range(one.shape[1] - size + 1):
            for c in range(one.shape[2]):
                a, b = one[y : y + size, x : x + size, c], other[y : y + size, x : x + size, c]
                mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
                variance_a, variance_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
                covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
                found.append(
                    (2 * mean_a * mean_b + first)
                    * (2 * covariance + second)
                    / ((mean_a**2 + mean_b**2 + first) * (variance_a + variance_b + second))
                )
    return float(np.mean(found))


def picture(seed: int, shape: tuple = (17, 14, 3)) -> np.ndarray:
    """A smooth picture with an edge, 0 … 255."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = np.sin(0.4 * y + rng.uniform(0, 6)) + np.cos(0.3 * x + rng.uniform(0, 6)) + (x + y > rng.integers(8, 20))
    return np.clip(90 + 50 * waves[..., None] + rng.normal(0, 3, shape), 0, 255).round().astype(np.float32)


def test_psnr_by_hand():
    blank = np.zeros((2, 4, 5, 3), np.float32)
    # A difference of 16 everywhere, and of 120 in one value of sixty.
    other = blank.copy()
    other[0] += 16
    other[1, 2, 3, 1] = 120
    expected = [20 * math.log10(255 / 16), 10 * math.log10(255**2 / (120**2 / 60))]
    np.testing.assert_allclose(psnr(blank, other), expected, rtol=1e-6)
    np.testing.assert_array_equal(psnr(other, other), CEILING)
    np.testing.assert_allclose(psnr(blank / 127.5, other / 127.5, peak=2.0), expected, rtol=1e-6)
    # Black against white, the worst there is.
    np.testing.assert_allclose(psnr(blank, blank + 255), 0.0, atol=1e-5)


@pytest.mark.parametrize(("shape", "window"), [((17, 14, 3), 11), ((11, 11, 1), 11), ((9, 8, 3), 7)], ids=str)
def test_ssim_is_that_of_a_loop(shape: tuple, window: int):
    rng = np.random.default_rng(5)
    one = picture(0, shape)
    others = [picture(1, shape), np.clip(one + rng.normal(0, 20, shape), 0, 255), 255 - one, rng.uniform(0, 255, shape)]
    stacked = np.stack(others).astype(np.float32)
    found = ssim(np.broadcast_to(one, stacked.shape), stacked)
    expected = [ssim_reference(one, other, size=window) for other in stacked]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(
        ssim(np.broadcast_to(one / 127.5, stacked.shape), stacked / 127.5, peak=2.0), expected, atol=2e-5
    )
    np.testing.assert_allclose(ssim(one, one), 1.0, atol=1e-6)


def test_ssim_by_hand():
    """Flat pictures have no structure: what is left is the term of brightness."""
    a, b, first = 100.0, 150.0, (0.01 * 255) ** 2
    flat = np.full((13, 12, 3), 1.0, np.float32)
    assert float(ssim(a * flat, b * flat)) == pytest.approx((2 * a * b + first) / (a * a + b * b + first), abs=1e-5)
    # Two unrelated pictures of noise are as alike as chance.
    rng = np.random.default_rng(0)
    assert abs(float(ssim(*rng.uniform(0, 255, (2, 64, 64, 3)).astype(np.float32))) - 0.0) < 0.02


def test_ssim_and_edges_can_be_trained_on():
    """Gradients against differences of the loop in float64; finite where pictures are the same."""
    one, other = picture(2, (12, 13, 1)), picture(3, (12, 13, 1))
    gradient = np.asarray(jax.jit(jax.grad(lambda x: ssim(x, other)))(one))
    for y, x in ((0, 0), (5, 6), (11, 3)):
        sides = []
        for step in (0.5, -0.5):
            moved = one.astype(np.float64)
            moved[y, x, 0] += step
            sides.append(ssim_reference(moved, other))
        assert gradient[y, x, 0] == pytest.approx(sides[0] - sides[1], rel=2e-2, abs=1e-7)
    assert np.isfinite(jax.grad(lambda x: ssim(x, other) + edge_error(x, jnp.asarray(other)))(jnp.asarray(other))).all()


def test_charbonnier_and_edges_by_hand():
    x = jnp.asarray([[0.0, 3.0], [-4.0, 0.0]])
    np.testing.assert_allclose(
        charbonnier(x, jnp.zeros((2, 2)), 1.0), [(1 + math.sqrt(10)) / 2, (math.sqrt(17) + 1) / 2], rtol=1e-6
    )
    # One bright pixel inside 3 × 3: two steps down of six, two across of six, each of 6.
    one = np.zeros((3, 3, 1), np.float32)
    one[1, 1] = 6
    assert float(edge_error(*map(jnp.asarray, (one, 0 * one)))) == pytest.approx(2.0)
    assert float(edge_error(*map(jnp.asarray, (one + 5, one)))) == 0.0


def rows_of(scores: dict, share, there=None, row=None, name: str = "frames") -> dict:
    rows = {f"{name}/{key}": np.asarray(value, np.float32) for key, value in scores.items()}
    count = len(share)
    rows |= {f"{name}/share": np.asarray(share, np.float32), "row": np.arange(count) if row is None else np.array(row)}
    return rows | {"present/video": np.ones(count, bool) if there is None else np.array(there)}


def ask_of(rows: dict):
    """A stand-in of evaluate.Predict that has been asked for one view."""

    def ask(manifest, subset, method, **static):
        assert (manifest, method, static) == ("m", "predict", {"view": "shown"})
        return rows if subset == "VAT" else None

    return SimpleNamespace(ask=ask)


def test_the_evaluator_is_the_mean_over_frames_and_then_clips():
    evaluator = EVALS["pictures"](data="m", view="shown")
    assert isinstance(evaluator, Pictures)
    assert (
        evaluator.asks
    )  # no robustness suite: what is predicted of noisy clips is only of the view that hides nothing
    # Three clips of three frames; the second lacks its video; frames that were shown are not counted.
    share = [[0, 1, 1], [0, 1, 1], [0, 0, 0.25]]
    scores = {
        "psnr/made": [[99, 30, 34], [0, 0, 0], [99, 99, 20]],
        "psnr/nearest": [[99, 20, 22], [0, 0, 0], [99, 99, 18]],
        "psnr/blend": [[99, 32, 36], [0, 0, 0], [99, 99, 20]],
        "ssim/made": [[1, 0.9, 0.7], [0, 0, 0], [1, 1, 0.6]],
        "ssim/nearest": [[1, 0.5, 0.5], [0, 0, 0], [1, 1, 0.5]],
        "ssim/blend": [[1, 0.9, 0.9], [0, 0, 0], [1, 1, 0.5]],
    }
    found = evaluator.measure(ask_of(rows_of(scores, share, there=[True, False, True])), None)
    expected = {
        "clips": 2, "frames": 3,
        "model/PSNR": 26, "model/SSIM": 0.7, "nearest/PSNR": 19.5, "nearest/SSIM": 0.5, "blend/PSNR": 27, "blend/SSIM": 0.7,
        "over nearest/PSNR": 6.5, "over nearest/SSIM": 0.2, "over blend/PSNR": -1, "over blend/SSIM": 0,
    }  # fmt: skip
    assert found.numbers() == pytest.approx(expected, abs=1e-6)
    assert set(found.intervals()) == set(expected) - {"clips", "frames"}
    # Windows of a clip are rows of one clip.
    windows = rows_of(scores, share, there=[True, False, True], row=[0, 1, 0])
    assert evaluator.measure(ask_of(windows), None).notes == {"clips": 1, "frames": 3}


def test_the_interval_is_of_differences_within_clips():
    """Clips differ by far more than the model from the copy: the gain is certain, though the scores' intervals overlap."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(15, 40, (60, 1))
    scores = {
        f"{metric}/{who}": np.zeros((60, 1)) for metric in ("psnr", "ssim") for who in ("made", "nearest", "blend")
    }
    scores |= {"psnr/made": hard + 1 + rng.normal(0, 0.2, (60, 1)), "psnr/nearest": hard}
    ends = Pictures("m", view="shown").measure(ask_of(rows_of(scores, np.ones((60, 1)))), None).intervals()
    assert ends["model/PSNR"][0] < ends["nearest/PSNR"][1]
    assert 0.9 < ends["over nearest/PSNR"][0] < 1 < ends["over nearest/PSNR"][1] < 1.1


def test_truth_is_perfect_and_noise_is_chance():
    rng = np.random.default_rng(0)
    truth = np.stack([[picture(10 * clip + frame, (24, 24, 3)) for frame in range(2)] for clip in range(6)])
    noise = rng.uniform(0, 255, truth.shape).astype(np.float32)
    scores = {}
    for who, made in (("made", truth), ("nearest", noise), ("blend", noise)):
        scores |= {f"psnr/{who}": psnr(made, truth), f"ssim/{who}": ssim(made, truth)}
    found = Pictures("m", view="shown")(ask_of(rows_of(scores, np.ones((6, 2)))))
    assert found["model/PSNR"] == CEILING
    assert found["model/SSIM"] == pytest.approx(1.0, abs=1e-6)
    # Uniform noise against a picture of mean m and variance v: E d² = (m − 127.5)² + v + 255² / 12.
    squared = ((truth - 127.5) ** 2).mean((-3, -2, -1)) + 255**2 / 12
    assert found["nearest/PSNR"] == pytest.approx(np.mean(10 * np.log10(255**2 / squared)), abs=0.1)
    assert abs(found["nearest/SSIM"]) < 0.05


def test_what_cannot_be_scored_is_an_error():
    rows = rows_of({"psnr/made": [[1.0]]}, [[1.0]], name="between")
    with pytest.raises(UserError, match="no pixels objective 'frames' reads the view 'shown'.*between"):
        Pictures("m", view="shown")(ask_of(rows))


def test_decibels_and_ssim_are_no_per_cent():
    assert show("PSNR", 31.257) == "31.26"
    assert show("SSIM", 0.93125) == "0.9313"
    assert show("accuracy", 0.93125) == "93.1 %"
    assert show_interval("PSNR", (-1.0, 2.5)) == "-1.00–2.50"


def test_the_sheet_has_a_row_for_each_kind_of_picture():
    names = ("truth", "made", "blend", "nearest")
    pictures = {name: np.full((3, 2, 4, 5, 3), 10.0 * i) for i, name in enumerate(names)}
    pictures["made"][2, 1] = 200
    page = sheet(pictures, [0, 2])
    assert page.dtype == np.uint8
    assert page.shape == (2 * 4 * 4 + 6 * 2 + 2 + 4, 10, 3)
    assert [int(page[6 * i, 0, 0]) for i in range(4)] == [0, 10, 20, 30]
    assert (page[4:6] == 255).all()
    assert (page[28 + 6 : 28 + 10, 5:] == 200).all()
    assert (page[28 + 6 : 28 + 10, :5] == 10).all()
