"""Which tokens a view hides: each mask is (key, validity, grid) → Mask, with static counts; its fields are its config.

Per-sample keys make a mask a function of the sample alone: the same on any number of devices and
under any split of the batch. Padding is never chosen as hidden content in place of a real token.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from vmm.build import build
from vmm.errors import UserError
from vmm.plugins import Kinds
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


@dataclasses.dataclass(frozen=True)
class Random:
    """Hides tokens independently at random (He et al. 2022): ⌊ratio · valid tokens⌋ of them."""

    ratio: float

    def __call__(self, key: Array, valid: Bool[Array, "N"], grid: tuple) -> Mask:
        count = math.prod(grid)
        kept = count - _static(self.ratio, count)
        return _choose(jax.random.uniform(key, (count,)), valid, _drawn(self.ratio, valid), kept)


@dataclasses.dataclass(frozen=True)
class Tube:
    """Hides the same places in every step of the first axis (VideoMAE, Tong et al. 2022)."""

    ratio: float

    def __call__(self, key: Array, valid: Bool[Array, "N"], grid: tuple) -> Mask:
        score = jax.random.uniform(key, (math.prod(grid[1:]),))
        return _tubes(score, valid, grid, self.ratio)


def _tubes(score: Array, valid: Bool[Array, "N"], grid: tuple, ratio: float) -> Mask:
    """Hides the places of highest score in every step of the first axis."""
    time, *rest = grid
    area = math.prod(rest)
    hide = _static(ratio, area)
    score = jnp.argsort(jnp.argsort(score))  # no two alike: a place is hidden at every time or at none
    return _choose(jnp.tile(score, (time,)), valid, jnp.where(valid.any(), hide * time, 0), (area - hide) * time)


def _places(grid: tuple) -> list[Array]:
    """Returns each token's place along each axis, in (0, 1): arrays of the grid's shape."""
    return list(
        jnp.meshgrid(*((jnp.arange(size) + 0.5) / size for size in grid), indexing="ij")
    )  # since JAX 0.12 a tuple


@dataclasses.dataclass(frozen=True)
class Block:
    """Hides one box of the grid and, to keep the count, the places nearest around it.

    The places are taken in order of their distance (in units of each axis) from a random centre.
    """

    ratio: float

    def __call__(self, key: Array, valid: Bool[Array, "N"], grid: tuple) -> Mask:
        count = math.prod(grid)
        centre = jax.random.uniform(key, (len(grid),))
        distance = jnp.stack([jnp.abs(axis - c) for axis, c in zip(_places(grid), centre)]).max(0).reshape(-1)
        return _choose(-distance, valid, _drawn(self.ratio, valid), count - _static(self.ratio, count))


@dataclasses.dataclass(frozen=True)
class MultiBlock:
    """Hides a union of boxes (V-JEPA, Bardes et al. 2024, sec. 3.2): of a video at every time, of others on all axes.

    V-JEPA draws 8 boxes of `scale` 0.15 (short-range) or 2 of 0.7 (long-range) and hides what they cover, about 90 %;
    its count differs from clip to clip. Here the boxes are drawn so, and then all grow or shrink by one common
    factor until their union is `ratio` of the places: the count is static.

    blocks: boxes. scale: share of the places in one of them. aspect: least and largest height / width of a box.
    """

    ratio: float
    blocks: int = 8
    scale: float = 0.15
    aspect: tuple[float, float] = (0.75, 1.5)

    def __call__(self, key: Array, valid: Bool[Array, "N"], grid: tuple) -> Mask:
        if self.blocks < 1 or not 0 < self.scale < 1 or not 0 < self.aspect[0] <= self.aspect[1]:
            raise UserError(
                "views: a multiblock mask has blocks of at least 1, a scale in (0, 1), and an aspect (least, largest) above 0"
            )
        area = grid[1:] if len(grid) == 3 else grid
        shape_key, place_key = jax.random.split(key)
        aspect = jax.random.uniform(shape_key, (self.blocks,), minval=self.aspect[0], maxval=self.aspect[1])
        if len(area) == 1:
            sides = jnp.full((self.blocks, 1), self.scale)
        else:
            sides = jnp.sqrt(self.scale * jnp.stack([aspect, 1 / aspect], axis=1))
        sides = jnp.minimum(sides, 1.0)
        # Anywhere that it fits whole: the centre is half a side from either edge.
        centre = sides / 2 + jax.random.uniform(place_key, sides.shape) * (1 - sides)
        places = jnp.stack([axis.reshape(-1) for axis in _places(area)], axis=-1)
        # By which factor each box must grow for each place to be in it: 1 at its edge.
        factor = (jnp.abs(places - centre[:, None]) / (sides[:, None] / 2)).max(-1).min(0)
        if len(grid) == 3:
            return _tubes(-factor, valid, grid, self.ratio)
        count = math.prod(grid)
        return _choose(-factor, valid, _drawn(self.ratio, valid), count - _static(self.ratio, count))


@dataclasses.dataclass(frozen=True)
class Span:
    """Hides one run of consecutive valid tokens (SpanBERT's unit, Joshi et al. 2020), wrapping round."""

    ratio: float

    def __call__(self, key: Array, valid: Bool[Array, "N"], grid: tuple) -> Mask:
        count = math.prod(grid)
        number = valid.sum()
        start = jnp.floor(jax.random.uniform(key) * jnp.maximum(number, 1))
        place = jnp.cumsum(valid) - 1
        score = -jnp.mod(place - start, jnp.maximum(number, 1)).astype(jnp.float32)
        return _choose(score, valid, _drawn(self.ratio, valid), count - _static(self.ratio, count))


@dataclasses.dataclass(frozen=True)
class Frames:
    """Hides whole steps of the first axis, of a video all places of some frames: ⌊ratio · steps⌋ of them.

    hide: which steps, the same in every sample, as many as the ratio says; below 0 they count from the end: (-2, -1) is
    the future. (): drawn for each sample.
    """

    ratio: float
    hide: tuple[int, ...] = ()

    def __call__(self, key: Array, valid: Bool[Array, "N"], grid: tuple) -> Mask:
        steps, *rest = grid
        area, count = math.prod(rest), _static(self.ratio, steps)
        if self.hide:
            places = {place % steps for place in self.hide}
            if not all(-steps <= place < steps for place in self.hide) or not len(places) == len(self.hide) == count:
                raise UserError(
                    f"views: a frames mask hides {self.hide} of {steps} steps, which must be different ones in 0 … "
                    f"{steps - 1} and, of ratio {self.ratio}, {count}; give ratio={len(self.hide)}/{steps} or other steps"
                )
            score = jnp.asarray([float(place in places) for place in range(steps)])
        else:
            score = jax.random.uniform(key, (steps,))
            score = jnp.argsort(jnp.argsort(score))  # no two alike: a step is hidden whole or not at all
        hide = jnp.where(valid.any(), count * area, 0)
        return _choose(jnp.repeat(score, area), valid, hide, (steps - count) * area)


MASKS = Kinds(
    "masks",
    {
        "tube": Tube,
        "block": Block,
        "multiblock": MultiBlock,
        "span": Span,
        "frames": Frames,
        "random": Random,
    },
)


def sample(
    kind: str,
    keys: Array,
    valid: Bool[Array, "B N"],
    grid: tuple,
    ratio: float,
    fields: Mapping = {},
    where: str = "mask",
) -> Mask:
    """Returns one Mask per sample.

    Args:
      kind: one of MASKS.
      keys: a key per sample, [B].
      valid: bool [B N]. grid: its product is N. ratio: share of the tokens hidden, in (0, 1]; of 1: all.
      fields: further fields of the mask. where: its key in the config, for the error line.

    Raises:
      UserError: the ratio is above 1 or leaves nothing hidden, or the mask has no such field.
    """
    mask = build(MASKS, {"kind": kind, "ratio": ratio, **fields}, where)
    result = jax.vmap(lambda key, valid: mask(key, valid, grid))(keys, valid)
    if not 0 < ratio <= 1 or not result.hidden.shape[1]:
        raise UserError(f"views: mask {kind!r} of ratio {ratio} on {grid} tokens must hide some, and at most all")
    return result
