"""Attention a head and some queries at a time, as a CPU is quick at it: the logits of all queries are never held."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_LOGITS = 400_000  # held at a time, 1.6 MB: about a core's cache; 200,000 to 1,200,000 were within 3 %
_HIDDEN = -1e30


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def chunked(
    query: Float[Array, "B Q A d"],
    key: Float[Array, "B K A d"],
    value: Float[Array, "B K A d"],
    valid: Bool[Array, "B K"],
    mask: Bool[Array, "... Q K"] | None,
    cap: float,
    rows: int,
) -> Float[Array, "B Q A d"]:
    """attention.attention, of at most `rows` queries at a time.

    The gradient computes the logits again from the kept log of the softmax's sum (FlashAttention, Dao et al. 2022,
    algorithm 4), keys first, so that none of its five products takes a transposed operand: those run at two thirds of
    the speed. FLOPs: 4 Q K A d forward, 10 Q K A d backward a sample, where Q is filled up to a multiple of the chunk.
    """
    return _forward(query, key, value, valid, mask, cap, rows)[0]


def rows_of(queries: int, keys: int) -> int:
    """Returns how many queries to take at a time: parts of one size, at least 64 queries each."""
    return math.ceil(queries / math.ceil(queries / max(64, _LOGITS // keys)))


def _forward(query, key, value, valid, mask, cap, rows):
    batch, count, heads, width = query.shape
    padded = _padded(mask, rows)

    def head(given):
        number, queries, key, value = given

        def part(given):
            place, query = given
            allowed = _allowed(number, place, valid, padded, heads, rows)
            logits = jnp.where(allowed, _cap(_product(query, key.T), cap), _HIDDEN)
            top = logits.max(-1, keepdims=True)
            weights = jnp.exp(logits - top)
            total = weights.sum(-1, keepdims=True)
            sees = top > _HIDDEN / 2
            mixed = jnp.where(sees, _product(weights.astype(value.dtype), value) / total, 0.0)
            # e to the power of any logit less this is a weight; 0 where a query sees nothing.
            return mixed.astype(value.dtype), jnp.where(sees, top + jnp.log(total), -_HIDDEN)[:, 0]

        return jax.lax.map(part, (jnp.arange(len(queries)), queries))

    scaled = _chunks(query * jnp.asarray(width**-0.5, query.dtype), rows)
    mixed, log_total = jax.lax.map(head, (jnp.arange(batch * heads), scaled, _heads(key), _heads(value)))
    mixed = _whole(mixed, batch, count)
    return mixed, (query, key, value, valid, mask, mixed, log_total)


def _backward(cap, rows, kept, gradient):
    query, key, value, valid, mask, mixed, log_total = kept
    batch, count, heads, width = query.shape
    padded = _padded(mask, rows)
    drift = (gradient.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1, keepdims=True)

    def head(given):
        number, queries, key, value, gradients, log_totals, drifts = given
        key_columns = key.T

        def part(sums, given):
            place, query, gradient, log_total, drift = given
            logits = _cap(_product(key, query.T), cap)
            allowed = _allowed(number, place, valid, padded, heads, rows).T
            weights = jnp.exp(jnp.where(allowed, logits, _HIDDEN) - log_total)
            change = weights * (_product(value, gradient.T) - drift[:, 0])
            if cap:
                change = change * (1.0 - jnp.square(logits / cap))
            change, weights = change.astype(key.dtype), weights.astype(key.dtype)
            sums = sums[0] + _product(change, query), sums[1] + _product(weights, gradient)
            return sums, _product(key_columns, change)

        zeros = jnp.zeros(key.shape, jnp.float32)
        given = jnp.arange(len(queries)), queries, gradients, log_totals, drifts
        sums, by_query = jax.lax.scan(part, (zeros, zeros), given)
        return by_query.swapaxes(1, 2), *sums

    scale = jnp.asarray(width**-0.5, query.dtype)
    given = _chunks(query * scale, rows), _heads(key), _heads(value), _chunks(gradient, rows)
    by_query, by_key, by_value = jax.lax.map(head, (jnp.arange(batch * heads), *given, log_total, _chunks(drift, rows)))
    by_query = _whole(by_query, batch, count).astype(query.dtype) * scale
    by_key, by_value = (x.reshape(batch, heads, -1, width).transpose(0, 2, 1, 3) for x in (by_key, by_value))
    return by_query, by_key.astype(key.dtype), by_value.astype(value.dtype), None, None


chunked.defvjp(_forward, _backward)


def _product(left, right):
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _cap(logits, cap: float):
    return cap * jnp.tanh(logits / cap) if cap else logits


def _padded(mask, rows: int):
    """Returns the mask with four axes and whole chunks of queries; those beyond the last see nothing."""
    if mask is None:
        return None
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    return jnp.pad(mask, ((0, 0), (0, 0), (0, -mask.shape[2] % rows), (0, 0)))


def _allowed(number, place, valid, mask, heads: int, rows: int):
    """Returns what chunk `place` of head `number` may see: [1 K] or [rows K]."""
    sample = number // heads
    allowed = valid[sample][None]
    if mask is None:
        return allowed
    at = sample if mask.shape[0] > 1 else 0, number % heads if mask.shape[1] > 1 else 0, place * rows, 0
    return allowed & jax.lax.dynamic_slice(mask, at, (1, 1, rows, mask.shape[3]))[0, 0]


def _heads(x: Float[Array, "B N A d"]) -> Float[Array, "BA N d"]:
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])


def _chunks(x: Float[Array, "B Q A d"], rows: int) -> Float[Array, "BA parts rows d"]:
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % rows), (0, 0), (0, 0)))
    return _heads(x).reshape(x.shape[0] * x.shape[2], -1, rows, x.shape[3])


def _whole(x: Float[Array, "BA parts rows d"], batch: int, count: int) -> Float[Array, "B Q A d"]:
    return x.reshape(batch, x.shape[0] // batch, -1, x.shape[-1])[:, :, :count].transpose(0, 2, 1, 3)
