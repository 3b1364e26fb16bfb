"""Attention a head and some queries at a time against attention of all at once: values, gradients, what it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmm.layers import chunks, dense, kernels
from vmm.layers.attention import attention
from vmm.training.metrics import count_flops

B, Q, K, HEADS, WIDTH = 2, 37, 29, 3, 8


def draw(*shape, seed: int = 0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def streams(dtype=jnp.float32):
    """Returns query, key, value, validity (of the second sample nothing), and what pulls at the result."""
    query, *keys = (
        draw(B, Q, HEADS, WIDTH, dtype=dtype),
        *(draw(B, K, HEADS, WIDTH, seed=i, dtype=dtype) for i in (1, 2)),
    )
    valid = jnp.asarray(np.stack([np.arange(K) % 4 > 0, np.zeros(K, bool)]))
    return query, *keys, valid, draw(B, Q, HEADS, WIDTH, seed=3)


def masks():
    rng = np.random.default_rng(4)
    causal = np.tril(np.ones((Q, K), bool), -1)  # the first query sees nothing
    return {
        "none": None, "causal": causal, "heads": rng.random((HEADS, Q, K)) > 0.3,
        "samples": rng.random((B, 1, Q, K)) > 0.3, "all": rng.random((B, HEADS, Q, K)) > 0.6,
    }  # fmt: skip


def value_and_gradients(function, query, key, value, pull):
    result, back = jax.vjp(function, query, key, value)
    return result, *back(pull.astype(result.dtype))


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize(("cap", "rows"), [(0.0, 8), (1.5, 37)])
def test_in_chunks_it_is_the_same(name, cap, rows):
    query, key, value, valid, pull = streams()
    mask = masks()[name]
    mask = None if mask is None else jnp.asarray(mask)
    assert Q * K < 128 * 128  # so that `attention` is the plain form

    @jax.jit
    def both(query, key, value, pull):
        plain = value_and_gradients(lambda *x: attention(*x, valid, mask, cap), query, key, value, pull)
        parts = value_and_gradients(lambda *x: chunks.chunked(*x, valid, mask, cap, rows), query, key, value, pull)
        return plain, parts

    plain, parts = both(query, key, value, pull)
    assert all(np.abs(leaf[0]).max() > 0.1 for leaf in plain)
    for ours, theirs in zip(parts, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max(), rtol=1e-5)
        assert not ours[1].any()  # no valid key: exactly zero, and no gradient


def test_keys_that_are_not_valid_change_nothing():
    query, key, value, valid, pull = streams()
    there = valid[:, :, None, None]
    run = jax.jit(
        lambda key, value: value_and_gradients(
            lambda *x: chunks.chunked(*x, valid, None, 0.0, 10), query, key, value, pull
        )
    )
    clean = run(key, value)
    for ours, theirs in zip(run(jnp.where(there, key, 1e4), jnp.where(there, value, -1e4)), clean, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for leaf in clean[2:]:
        assert not leaf[~np.asarray(valid)].any()


def test_half_precision_is_near():
    query, key, value, valid, pull = streams(jnp.bfloat16)
    half = jax.jit(lambda *x: value_and_gradients(lambda *x: chunks.chunked(*x, valid, None, 0.0, 10), *x))
    whole = jax.jit(lambda *x: value_and_gradients(lambda *x: attention(*x, valid), *x))
    for ours, theirs in zip(
        half(query, key, value, pull), whole(*(x.astype(jnp.float32) for x in (query, key, value)), pull), strict=True
    ):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.04 * np.abs(theirs).max())


def test_large_logits_stay_finite():
    query, key, value, valid, pull = streams()
    run = jax.jit(lambda *x: value_and_gradients(lambda *x: chunks.chunked(*x, valid, None, 0.0, 10), *x))
    assert all(np.isfinite(leaf).all() for leaf in run(query * 300, key * 300, value, pull))


@pytest.mark.parametrize(("queries", "keys"), [(1568, 1568), (160, 160), (1408, 1568), (1569, 1569), (10, 100_000)])
def test_chunks_are_of_one_size_and_hardly_more_than_there_are(queries, keys):
    rows = chunks.rows_of(queries, keys)
    parts = -(-queries // rows)
    assert 0 <= parts * rows - queries < min(parts, 0.05 * queries + 1)
    assert rows * keys <= max(64 * keys, 420_000)


def test_long_sequences_go_in_chunks_and_count_as_what_they_cost(monkeypatch):
    long, heads, width = 600, 2, 4
    x = jax.ShapeDtypeStruct((1, long, heads, width), jnp.float32)
    valid = jnp.ones((1, long), bool)
    one = 2 * long * long * heads * width  # of a product
    forward = jax.jit(lambda *x: attention(*x, valid))
    both = jax.jit(lambda *x: jax.vjp(lambda *x: attention(*x, valid), *x)[1](x[0]))
    assert long % chunks.rows_of(long, long) == 0
    assert count_flops(forward, x, x, x) == 2 * one
    assert "scan" in str(forward.trace(x, x, x).jaxpr)
    assert count_flops(both, x, x, x) == 7 * one
    monkeypatch.setattr(kernels, "on_one_cpu", lambda: False)
    elsewhere = jax.jit(lambda *x: attention(*x, valid))
    assert "scan" not in str(elsewhere.trace(x, x, x).jaxpr)
    assert count_flops(elsewhere, x, x, x) == 2 * one


@pytest.mark.parametrize(("features", "inputs"), [((3, 4), 1), ((5,), 2), ((40,), 1)])
def test_a_linear_map_is_the_same_on_one_cpu(monkeypatch, features, inputs):
    x = draw(2, 3, 100, 6)
    layer = dense.Dense(features, (None,) * (inputs + len(features)), inputs)
    kernel = draw(*x.shape[4 - inputs :], *features, seed=1)
    params = {"params": {"kernel": kernel, "bias": draw(*features, seed=2)}}

    def run():
        return jax.jit(
            lambda x, params: jax.value_and_grad(lambda x, p: jnp.sin(layer.apply(p, x)).sum(), (0, 1))(x, params)
        )(x, params)

    ours = run()
    monkeypatch.setattr(dense, "on_one_cpu", lambda: False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), ours, run())
