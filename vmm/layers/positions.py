"""Where a token is: vectors that are added to tokens, or angles that attention turns its queries and keys by.

A register has no place: its `at` is below 0, its vector zero, its angle zero.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vmm.errors import UserError, one_of
from vmm.sharding import named
from vmm.sizes import check_table

_HALVES = {"factorised": ("first", "rest"), "frames": ("first",), "places": ("rest",)}
ADDED = ("sincos", "sincos_flat", "learned", *_HALVES)
ROTARY = ("rotary", "rotary_vjepa2")
KINDS = ("none", *ADDED, *ROTARY)


def sincos(grid: Sequence[int], width: int) -> np.ndarray:
    """Returns fixed positions float32 [N D] over an n-dimensional grid.

    Each axis has an even share of the width, half sines and half cosines of wavelengths from 2π to
    10,000 · 2π (Vaswani et al. 2017, sec. 3.5, one axis after the other); what is left is zero.
    """
    check_table("positions", *grid, width)
    share = width // len(grid) // 2 * 2
    table = np.zeros((*grid, width), np.float64)
    for axis, size in enumerate(grid):
        rates = 10000.0 ** (-np.arange(share // 2) / max(1, share // 2))
        angles = np.arange(size)[:, None] * rates
        values = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
        shape = [1] * len(grid) + [share]
        shape[axis] = size
        table[..., axis * share : (axis + 1) * share] = values.reshape(shape)
    return table.reshape(-1, width).astype(np.float32)


def sincos_flat(grid: Sequence[int], width: int) -> np.ndarray:
    """Returns fixed positions float32 [N D] over the tokens in a row, sines and cosines in turn.

    Vaswani et al. 2017, sec. 3.5; VideoMAE (Tong et al. 2022) counts the tubelets of a clip so.
    """
    check_table("positions", *grid, width)
    pair = np.arange(width) // 2 * 2
    angles = np.arange(math.prod(grid))[:, None] / 10000.0 ** (pair / width)
    return np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


def places(at: Int[Array, "B N"], grid: Sequence[int]) -> Int[Array, "B N n"]:
    """Returns a token's place along each of the grid's n axes; −1 along all for a register."""
    axes = jnp.stack(jnp.unravel_index(at, tuple(grid)), axis=-1)
    return jnp.where(at[..., None] >= 0, axes, -1).astype(at.dtype)


def ravel(places: Int[Array, "B N n"], grid: Sequence[int] | Int[Array, "B N n"]) -> Int[Array, "B N"]:
    """Returns places as one number, the last axis fastest; −1 for a register. grid: one, or each token's own."""
    at = jnp.zeros_like(places[..., 0])
    for axis in range(places.shape[-1]):
        at = at * (grid[axis] if isinstance(grid, Sequence) else grid[..., axis]) + places[..., axis]
    return jnp.where(places[..., 0] >= 0, at, -1)


def resize(table: Float[Array, "*G D"], grid: Sequence[int], cut: bool) -> Float[Array, "*H D"]:
    """Returns a learned table over another grid: cut where it is text, else by cubic interpolation.

    Raises:
      UserError: a text is longer than the table.
    """
    had = table.shape[:-1]
    if tuple(had) == tuple(grid):
        return table
    if cut:
        if grid[0] > had[0]:
            raise UserError(f"positions: {grid[0]} tokens, but the learned table has {had[0]}; shorten the text")
        return table[: grid[0]]
    return jax.image.resize(table, (*grid, table.shape[-1]), "cubic", antialias=False)


def interpolate(table: Float[Array, "*G D"], places: Int[Array, "B N n"], extents: Int[Array, "B N n"]) -> Array:
    """Returns float32 [B N D]: at each place, the table resized to the token's own grid; zeros for a register.

    What `resize` does, where the grids are data: Keys' cubic kernel (1981, a = −1/2) over the table's entries,
    weights at the edges scaled to sum to one. FLOPs: 2 N |G| D a sample.
    """
    weights = jnp.ones((*places.shape[:2], 1), jnp.float32)
    for axis, size in enumerate(table.shape[:-1]):
        centre = (places[..., axis] + 0.5) * size / jnp.maximum(extents[..., axis], 1) - 0.5
        x = jnp.abs(centre[..., None] - jnp.arange(size))
        near, far = ((1.5 * x - 2.5) * x) * x + 1.0, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        tap = jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))
        tap = tap / jnp.where(places[..., axis, None] >= 0, tap.sum(-1, keepdims=True), 1.0)
        weights = (weights[..., :, None] * tap[..., None, :]).reshape(*places.shape[:2], -1)
    weights = jnp.where(places[..., :1] >= 0, weights, 0.0)
    return weights @ table.reshape(-1, table.shape[-1]).astype(jnp.float32)


class Positions(nn.Module):
    """Adds each token's place in the full grid.

    kind: "sincos" (an axis after the other) and "sincos_flat" are fixed; "learned" is a table over the grid, resized
    where another grid comes than it was made for; "factorised" is the sum of two learned tables, of the first axis
    and of the others (ViViT; TimeSformer, Bertasius et al. 2021), "frames" and "places" are one of the two alone;
    "none" and the rotary kinds add nothing.
    The call's `own` is for clips of several grids in one sequence, all within `grid`: each token's (place in its own
    grid, that grid), int32 [B N n] both; learned tables are then resized to each clip's own grid.
    """

    kind: str = "sincos"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], at: Int[Array, "B N"], grid: tuple, own: tuple | None = None
    ) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        if self.kind not in KINDS:
            raise UserError(f"positions: unknown kind {self.kind!r}; {one_of(self.kind, KINDS)}")
        if self.kind not in ADDED:
            return x
        if self.kind == "sincos":
            table = jnp.asarray(sincos(grid, width))
        elif self.kind == "sincos_flat":
            table = jnp.asarray(sincos_flat(grid, width))
            at = at if own is None else ravel(*own)
        elif self.kind == "learned":
            table = self._table("table", grid, width)
            if own is not None:
                return x + interpolate(table, *own).astype(x.dtype)
            table = resize(table, grid, cut=len(grid) == 1)
        else:
            axes = {"first": slice(0, 1), "rest": slice(1, None)}
            tables = {half: self._table(half, grid[axes[half]], width) for half in _HALVES[self.kind]}
            if own is not None:
                added = (interpolate(t, *(array[..., axes[half]] for array in own)) for half, t in tables.items())
                return x + sum(added).astype(x.dtype)
            table = jnp.zeros((*grid, width))
            if "first" in tables:
                first = resize(tables["first"], grid[:1], cut=len(grid) == 1)
                table += first.reshape(-1, *(1,) * (len(grid) - 1), width)
            if "rest" in tables:
                table += resize(tables["rest"], grid[1:], cut=False)
        table = table.reshape(-1, width)
        return x + jnp.where(at[..., None] >= 0, table[at], 0).astype(x.dtype)

    def _table(self, name: str, grid: tuple, width: int):
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        init = named(nn.initializers.normal(0.02), ("tokens", *(None,) * (len(grid) - 1), "embed"))
        return self.param(name, init, (*grid, width), jnp.float32)


def rotary(kind: str, at: Int[Array, "B N"], grid: Sequence[int], width: int) -> tuple | None:
    """Returns (cos, sin), each float32 [B N d], that turn a head's values by a token's place; None for other kinds.

    Each axis of the grid has an even share of the head's width, at rates 10,000^(−2i/share) (RoFormer, Su et al.
    2021, one axis after the other as in V-JEPA 2, Assran et al. 2025); what is left is not turned. Places count
    from 0 whatever the size of the grid: other lengths and sizes need no new parameters.

    kind: "rotary", or "rotary_vjepa2": as V-JEPA 2's public code has it, where a pair's two values take the angles
    of neighbouring rates instead of one.
    width: d, of one head. at: places in the grid; below 0: not turned.
    """
    return rotary_at(kind, places(at, grid), width) if kind in ROTARY else None


def rotary_at(kind: str, places: Int[Array, "B N n"], width: int) -> tuple | None:
    """As rotary, of tokens whose places along each axis are given; below 0: not turned."""
    if kind not in ROTARY:
        return None
    axes = places.shape[-1]
    share = width // axes // 2 * 2
    rates = 10000.0 ** (-np.arange(share // 2) / max(1, share // 2)).astype(np.float32)
    angles = []
    for axis in range(axes):
        angle = places[..., axis, None].astype(jnp.float32) * rates
        angles.append(jnp.repeat(angle, 2, axis=-1) if kind == "rotary" else jnp.concatenate([angle, angle], axis=-1))
    angles.append(jnp.zeros((*places.shape[:2], width - share * axes), jnp.float32))
    table = jnp.where(places[..., :1] >= 0, jnp.concatenate(angles, axis=-1), 0.0)
    return jnp.cos(table), jnp.sin(table)
