"""Streams of one sample put in the place of another's: mismatched clips, from which matching learns.

Everything is by groups of neighbours in the batch, so that no device looks at all pairs; the same on any number of
devices. A group within a device's rows moves nothing; the streams of one over several devices are gathered on each of
them: for large tokens let `among` be no more than a device's rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vmm.types import Patches


def group_size(rows: int, among: int) -> int:
    """Returns the largest divisor of `rows` that is at most `among`; among 0: all rows."""
    among = min(rows, among or rows)
    return max(size for size in range(1, among + 1) if rows % size == 0)


def fingerprint(patches: Patches) -> Int[Array, "B"]:
    """Returns a number per sample, the same for the same token ids; others differ but for one chance in 2³²."""
    weights = np.random.default_rng(0).integers(1, 2**32, patches.values.shape[1], np.uint32)
    ids = jnp.where(patches.valid, patches.values + 1, 0).astype(jnp.uint32)
    return (ids * weights).sum(1, dtype=jnp.uint32).astype(jnp.int32)


def draw(
    keys: Array,
    anchor: Float[Array, "B E"],
    candidate: Float[Array, "B E"],
    able: Bool[Array, "B"],
    marks: list[tuple[Int[Array, "B"], Bool[Array, "B"]]],
    among: int,
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """Returns for each sample i another one j of its group, drawn ∝ exp(anchor_i · candidate_j), and whether there is one.

    keys: one per sample, [B]. able: who may be drawn. marks: (number, known) of each sample; two of the same number are
    alike and never drawn for each other. among: rows in a group, see group_size. Where there is none, j = i.
    """
    rows = len(able)
    size = group_size(rows, among)

    def grouped(x):
        return x.reshape(rows // size, size, *x.shape[1:])

    logits = jnp.einsum("gie,gje->gij", grouped(anchor), grouped(candidate), preferred_element_type=jnp.float32)
    allowed = grouped(able)[:, None, :] & ~jnp.eye(size, dtype=bool)
    for number, known in marks:
        number, known = grouped(number), grouped(known)
        alike = number[:, :, None] == number[:, None, :]
        allowed &= ~(alike & known[:, :, None] & known[:, None, :])
    # The largest of logit + Gumbel noise is a draw from their softmax.
    noise = grouped(jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(keys))
    found = allowed.any(-1)
    place = jnp.where(found, jnp.where(allowed, logits + noise, -jnp.inf).argmax(-1), jnp.arange(size))
    index = place + size * jnp.arange(rows // size)[:, None]
    return index.reshape(rows).astype(jnp.int32), found.reshape(rows)


def take(tree, index: Int[Array, "B"], among: int):
    """Returns the tree's rows [B ...] at an index that `draw` gave."""
    rows = len(index)
    size = group_size(rows, among)
    place = (index % size).reshape(-1, size)

    def leaf(x):
        grouped = x.reshape(rows // size, size, *x.shape[1:])
        return jax.vmap(lambda group, place: group[place])(grouped, place).reshape(x.shape)

    return jax.tree.map(leaf, tree)
