"""The health panel's numbers by hand and against numpy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmm.training import health

B, D = 24, 6
ALL = np.ones(B, bool)
SOME = np.arange(B) % 3 != 1


def draw(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def wild(x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Rows that are not valid hold something large."""
    return np.where(valid[:, None], x, 50.0).astype(np.float32)


def reference_rank(x: np.ndarray) -> float:
    values = np.linalg.svd((x - x.mean(0)).astype(np.float64), compute_uv=False)
    share = values[values > 1e-9] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize("valid", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("width", [D, 40], ids=["narrow", "wide"])
def test_effective_rank_is_that_of_the_singular_values(valid, width: int):
    x = draw(B, width) * np.linspace(0.1, 3, width, dtype=np.float32) + 2.0
    rank = jax.jit(health.effective_rank)(wild(x, valid), valid)
    assert float(rank) == pytest.approx(reference_rank(x[valid]), rel=1e-3)


def test_effective_rank_of_known_features():
    rank = jax.jit(health.effective_rank)
    # One direction: 1. All the same, in float32 with its rounding: 1 at most, never a rank of noise.
    line = np.outer(draw(B), draw(D, seed=1)).astype(np.float32)
    assert float(rank(line, ALL)) == pytest.approx(1.0, abs=1e-3)
    assert float(rank(np.full((B, D), 0.1, np.float32) + line * 1e-9, ALL)) <= 1.001
    # Isotropic: each axis and its opposite, alike: all D.
    axes = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)
    assert float(rank(axes, np.ones(2 * D, bool))) == pytest.approx(D, rel=1e-4)
    # Two of six axes, and rows beyond the 256th are not read.
    flat = axes * (np.arange(D) < 2)
    long = np.concatenate([np.tile(flat, (32, 1))[:256], draw(100, D)])
    assert float(rank(long, np.ones(len(long), bool))) == pytest.approx(2.0, rel=1e-2)
    assert np.isfinite(rank(line, np.zeros(B, bool)))


def test_deviation():
    x = draw(B, D) * np.arange(1, D + 1, dtype=np.float32) + 5
    np.testing.assert_allclose(health.deviation(wild(x, SOME), SOME), x[SOME].std(0), rtol=1e-5)
    assert not np.asarray(health.deviation(np.ones((B, D), np.float32), ALL)).any()


def test_alignment_uniformity_and_gap():
    one, two = unit(draw(B, D)), unit(draw(B, D, seed=1) + 0.7)
    mine, theirs = one[SOME].astype(np.float64), two[SOME].astype(np.float64)
    args = wild(one, SOME), wild(two, SOME), SOME
    assert float(health.alignment(*args)) == pytest.approx(np.square(mine - theirs).sum(1).mean(), rel=1e-5)
    assert float(health.gap(*args)) == pytest.approx(np.linalg.norm(mine.mean(0) - theirs.mean(0)), rel=1e-5)
    pairs = [np.exp(-2 * np.square(a - b).sum()) for i, a in enumerate(mine) for j, b in enumerate(mine) if i != j]
    assert float(health.uniformity(wild(one, SOME), SOME)) == pytest.approx(math.log(np.mean(pairs)), rel=1e-4)


def test_pairs_of_known_embeddings():
    """Identical streams: alignment 0, gap 0. One point: uniformity 0. Opposite points: alignment 4, gap 2."""
    x, point = unit(draw(B, D)), np.tile(np.eye(D, dtype=np.float32)[:1], (B, 1))
    values = health.of_pairs({"video-text": (x, x, ALL), "audio-text": (point, -point, ALL)})
    assert float(values["health/video-text/alignment"]) == 0.0
    assert float(values["health/video-text/gap"]) == 0.0
    assert float(values["health/video-text/uniformity"]) < -1.0
    assert float(values["health/audio-text/alignment"]) == pytest.approx(4.0)
    assert float(values["health/audio-text/gap"]) == pytest.approx(2.0)
    assert float(values["health/audio-text/uniformity"]) == pytest.approx(0.0, abs=1e-6)


def test_names_are_stable():
    values = health.of_features({"video/encoded": (draw(B, D), ALL), "audio/fused": (draw(B, D), ALL)})
    assert set(values) == {
        f"health/{name}_{what}" for name in ("video/encoded", "audio/fused") for what in ("rank", "std", "std_min")
    }
    assert float(values["health/video/encoded_std_min"]) <= float(values["health/video/encoded_std"])


def test_gradient_shares_are_of_the_encoders():
    gradient = {
        "model": {
            "encoder_video": {"a": {"kernel": jnp.array([3.0, 0.0])}, "b": jnp.array([[4.0]])},
            "encoder_audio": {"kernel": jnp.full((4, 4), 3.75)},
            "fuse": {"kernel": jnp.array([100.0])},
        },
        "objective_x": {"kernel": jnp.array([100.0])},
    }
    values = health.of_gradient(gradient)
    assert {name: float(value) for name, value in values.items()} == pytest.approx(
        {"health/video/gradient_share": 0.25, "health/audio/gradient_share": 0.75}
    )
    assert health.of_gradient({"objective_x": {}}) == {}


def test_gates_are_means_by_place():
    loop = {
        "fuse": {"layer_0": {"self": (jnp.array([0.0, 1.0]), jnp.array([1.0, 1.0]))}, "layer_1": {"self": jnp.ones(2)}}
    }
    assert {k: float(v) for k, v in health.of_gates({"model": loop}).items()} == {
        "health/gates/fuse/layer_0/self": 0.75,
        "health/gates/fuse/layer_1/self": 1.0,
    }
    scanned = {"fuse": {"blocks": {"layers": {"self": (jnp.array([[0.0, 1.0], [1.0, 1.0]]),)}}}}
    assert {k: float(v) for k, v in health.of_gates({"model": scanned}).items()} == {
        "health/gates/fuse/layer_0/self": 0.5,
        "health/gates/fuse/layer_1/self": 1.0,
    }


def test_what_is_not_measured_is_not_a_number_and_stops_no_gradient():
    @jax.jit
    def function(x, now):
        def loss(x):
            return (x**2).sum(), health.when(now, lambda x: {"sum": x.sum()}, x)

        return jax.value_and_grad(loss, has_aux=True)(x)

    x = jnp.arange(3.0)
    for now in (True, False):
        (_, values), gradient = function(x, now)
        assert (float(values["sum"]) == 3.0) if now else math.isnan(values["sum"])
        np.testing.assert_allclose(gradient, 2 * x)
