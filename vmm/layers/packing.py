"""Clips of different lengths and sizes in one sequence (NaViT, Dehghani et al. 2023): packed, and taken out again."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from vmm.errors import UserError
from vmm.types import Patches, Tokens


class Slot(NamedTuple):
    """Where a clip lies in packed patches: its row, which of the row's clips it is, its first token and how many."""

    row: int
    segment: int
    start: int
    count: int


def pack(clips: Sequence[Patches], length: int | None = None) -> tuple[Patches, list[Slot]]:
    """Lays clips into rows of `length` tokens, longest first, each in the first row that has room for it.

    clips: Patches of one sample each, of one kind of tubelet. length: None: of the longest clip.

    Returns:
      Patches of all rows, padded with what is not valid, with `segment`, `places` and `extents`; a Slot a clip.

    Raises:
      UserError: no clip, or one of more tokens than a row.
    """
    counts = [math.prod(clip.grid) for clip in clips]
    if not clips or any(clip.valid.shape[0] != 1 for clip in clips):
        raise UserError("packing: give one clip or more, each the Patches of one sample")
    length = max(counts) if length is None else length
    if max(counts) > length:
        raise UserError(f"packing: a clip of {max(counts)} tokens does not fit rows of {length}; give longer rows")
    used, members, slots = [], [], {}
    for i in sorted(range(len(clips)), key=lambda i: -counts[i]):
        row = next((row for row, tokens in enumerate(used) if tokens + counts[i] <= length), len(used))
        if row == len(used):
            used.append(0)
            members.append([])
        slots[i] = Slot(row, len(members[row]), used[row], counts[i])
        members[row].append(i)
        used[row] += counts[i]
    axes, most = len(clips[0].grid), max(map(len, members))
    segment = np.full((len(used), length), -1, np.int32)
    places = np.full((len(used), length, axes), -1, np.int32)
    extents = np.zeros((len(used), most, axes), np.int32)
    for i, (row, number, start, count) in slots.items():
        segment[row, start : start + count] = number
        places[row, start : start + count] = np.indices(clips[i].grid).reshape(axes, -1).T
        extents[row, number] = clips[i].grid

    def rows(field: str):
        """Returns the clips' arrays of this name, laid out as the slots say."""
        parts = []
        for row, inside in enumerate(members):
            array = jnp.concatenate([getattr(clips[i], field)[0] for i in inside])
            parts.append(jnp.pad(array, [(0, length - used[row])] + [(0, 0)] * (array.ndim - 1)))
        return jnp.stack(parts)

    grid = tuple(max(clip.grid[axis] for clip in clips) for axis in range(axes))
    arrays = (jnp.asarray(array) for array in (segment, places, extents))
    packed = Patches(rows("values"), rows("valid"), grid, clips[0].classes, *arrays)
    return packed, [slots[i] for i in range(len(clips))]


def unpack(tokens: Tokens, packed: Patches, slots: Sequence[Slot]) -> list[Tokens]:
    """Returns each clip's Tokens, its registers first, as if it had been encoded alone: what `pack` was given."""
    segments = packed.extents.shape[1]
    registers = (tokens.x.shape[1] - packed.valid.shape[1]) // segments
    clips = []
    for row, segment, start, count in slots:
        own = np.arange(registers) + segment * registers
        index = np.concatenate([own, np.arange(count) + segments * registers + start])
        at = jnp.concatenate([jnp.full(registers, -1, jnp.int32), jnp.arange(count, dtype=jnp.int32)])
        clips.append(Tokens(tokens.x[row, index][None], tokens.valid[row, index][None], at[None]))
    return clips
