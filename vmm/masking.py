"""Which tokens a view hides: each mask is rng, validity, grid → Mask, with static counts.

Per-sample keys make a mask a function of the sample alone: the same on any number of devices and
under any split of the batch. Padding is never chosen as hidden content in place of a real token.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from vmm.errors import UserError
from vmm.types import Mask

_ROUNDING = 1e-4


def _choose(score: Array, valid: Bool[Array, "N"], hide: Array, kept: int) -> Mask:
    """Hides the `hide` valid tokens of highest score; keeps the first `kept` of the others."""
    # Real tokens by score, then padding: ranks 0 … n_valid-1 are the real ones.
    order = jnp.argsort(jnp.where(valid, -score, jnp.inf))
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
    hidden = rank < hide
    # Shown real tokens first, then padding, then the hidden; ties in place order (stable sort).
    sequence = jnp.argsort(jnp.where(hidden, 2, jnp.where(valid, 0, 1)), stable=True)
    return Mask(jnp.sort(sequence[:kept]).astype(jnp.int32), jnp.sort(sequence[kept:]).astype(jnp.int32))


def _static(ratio: float, count: int) -> int:
    """Returns ⌊ratio · count⌋, with decimals taken as written: 0.29 of 100 is 29."""
    return math.floor(ratio * count + _ROUNDING)


def _drawn(ratio: float, valid: Bool[Array, "N"]) -> Array:
    """Returns ⌊ratio · valid tokens⌋, as _static counts."""
    return jnp.floor(ratio * valid.sum() + _ROUNDING).astype(jnp.int32)


def random(key: Array, valid: Bool[Array, "N"], grid: tuple, ratio: float) -> Mask:
    """Hides tokens independently at random (He et al. 2022): ⌊ratio · valid tokens⌋ of them."""
    count = math.prod(grid)
    kept = count - _static(ratio, count)
    hide = _drawn(ratio, valid)
    return _choose(jax.random.uniform(key, (count,)), valid, hide, kept)


def tube(key: Array, valid: Bool[Array, "N"], grid: tuple, ratio: float) -> Mask:
    """Hides the same places in every step of the first axis (VideoMAE, Tong et al. 2022)."""
    time, *rest = grid
    area = math.prod(rest)
    score = jnp.tile(jax.random.uniform(key, (area,)), (time,))
    hide = _static(ratio, area)
    return _choose(score, valid, jnp.where(valid.any(), hide * time, 0), (area - hide) * time)


def block(key: Array, valid: Bool[Array, "N"], grid: tuple, ratio: float) -> Mask:
    """Hides one box of the grid and, to keep the count, the places nearest around it (V-JEPA's blocks).

    The places are taken in order of their distance (in units of each axis) from a random centre.
    """
    count = math.prod(grid)
    centre = jax.random.uniform(key, (len(grid),))
    axes = jnp.meshgrid(*((jnp.arange(size) + 0.5) / size for size in grid), indexing="ij")
    distance = jnp.stack([jnp.abs(axis - c) for axis, c in zip(axes, centre)]).max(0).reshape(-1)
    hide = _drawn(ratio, valid)
    return _choose(-distance, valid, hide, count - _static(ratio, count))


def span(key: Array, valid: Bool[Array, "N"], grid: tuple, ratio: float) -> Mask:
    """Hides one run of consecutive valid tokens (SpanBERT's unit, Joshi et al. 2020), wrapping round."""
    count = math.prod(grid)
    number = valid.sum()
    hide = _drawn(ratio, valid)
    start = jnp.floor(jax.random.uniform(key) * jnp.maximum(number, 1))
    place = jnp.cumsum(valid) - 1
    score = -jnp.mod(place - start, jnp.maximum(number, 1)).astype(jnp.float32)
    return _choose(score, valid, hide, count - _static(ratio, count))


MASKS: dict[str, Callable] = {"tube": tube, "block": block, "span": span, "random": random}


def sample(kind: str, keys: Array, valid: Bool[Array, "B N"], grid: tuple, ratio: float) -> Mask:
    """Returns one Mask per sample.

    Args:
      kind: one of MASKS.
      keys: a key per sample, [B].
      valid: bool [B N]. grid: its product is N. ratio: share of the tokens hidden, in (0, 1).

    Raises:
      UserError: the ratio leaves nothing shown or nothing hidden.
    """
    mask = MASKS[kind]
    result = jax.vmap(lambda key, valid: mask(key, valid, grid, ratio))(keys, valid)
    if not result.keep.shape[1] or not result.hidden.shape[1]:
        raise UserError(f"views: mask {kind!r} of ratio {ratio} on {grid} tokens must hide some and show some")
    return result
