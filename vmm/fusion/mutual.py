"""Mutual fusion: each pair of streams shares one affinity matrix, used in both directions, at three fields of view.

One matrix for both directions: parallel co-attention (Lu et al. 2016, sec. 3.3) and BiDAF (Seo et al. 2017).
"""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmm.fusion.layered import Layer, Layered
from vmm.fusion.sublayers import around, options
from vmm.layers import Dense, make_block
from vmm.types import Streams, Tokens

FIELDS = ("token", "frame", "clip")


def segments(tokens: Tokens, count: int) -> Bool[Array, "B N S"]:
    """Returns which of `count` contiguous segments each token belongs to.

    Valid tokens are ranked by their place `at`; of n, the one of rank i is in segment ⌊i · count / n⌋, so that
    segments hold equal shares, some none where n < count. Invalid tokens and registers are in none.
    """
    there = tokens.valid & (tokens.at >= 0)
    order = jnp.argsort(jnp.where(there, tokens.at, jnp.iinfo(tokens.at.dtype).max), axis=1)
    rank = jnp.argsort(order, axis=1)  # the inverse of a permutation sorts it
    place = rank * count // jnp.maximum(there.sum(1, keepdims=True), 1)
    return jax.nn.one_hot(place, count, dtype=bool) & there[..., None]


def gather(x: Float[Array, "B N A d"], members: Bool[Array, "B N S"]) -> Float[Array, "B S A d"]:
    """Returns the mean of each segment's tokens; zeros where it has none."""
    weight = members.astype(jnp.float32)
    weight = weight / jnp.maximum(weight.sum(1, keepdims=True), 1)
    return jnp.einsum("bns,bnad->bsad", weight.astype(x.dtype), x)


def exchange(affinity, value, valid, cap: float = 0.0) -> tuple:
    """Returns what each of two streams gets of the other, ([B N A d], [B K A d]), through one matrix.

        S = f_1 f_2ᵀ / √d;  y_1 = softmax over columns of (S) v_2;  y_2 = (softmax over rows of (S))ᵀ v_1

    affinity: (f_1 [B N A d], f_2 [B K A d]); value, valid: (v_1, v_2), ([B N], [B K]). A stream gets zeros from one
    without valid tokens. Softmax in float32. FLOPs forward: 6 N K A d a sample.
    """
    logits = jnp.einsum("bnad,bkad->bank", *affinity, preferred_element_type=jnp.float32)
    logits = logits / math.sqrt(affinity[0].shape[-1])
    if cap:
        logits = cap * jnp.tanh(logits / cap)

    def softmax(allowed, axis):
        return jax.nn.softmax(jnp.where(allowed, logits, -1e30), axis=axis) * allowed.any(axis, keepdims=True)

    first = softmax(valid[1][:, None, None, :], -1).astype(value[1].dtype)
    second = softmax(valid[0][:, None, :, None], -2).astype(value[0].dtype)
    return jnp.einsum("bank,bkad->bnad", first, value[1]), jnp.einsum("bank,bnad->bkad", second, value[0])


class MutualLayer(Layer):
    """One layer; the constants are modality → (valid [B N], frames' members [B N F], the clip's [B N 1]).

    Each stream has affinity features f and values v. At each field of view (tokens; means of f and v over frames; over
    the clip) each pair exchanges values through its one matrix; a stream takes the mean over the others that the
    sample has, projects it by the field's U and hands it to the field's tokens:

        x ← x + Σ_field U_field y_field;  x ← block(x)

    A sample that has no other stream passes the block alone.
    """

    @nn.compact
    def __call__(self, carry, constants):
        streams, _ = carry
        own = options(self.block)
        valid = {name: constants[name][0] for name in streams}
        total = dict.fromkeys(streams, 0.0)
        norms = {name: around(own, f"norm_{name}") for name in streams} if len(streams) > 1 else {}
        for field, views in self._views(streams, norms, constants).items():
            heard = self._hear(views, own.cap)
            for name, y in heard.items():
                width = streams[name].shape[-1]
                axes = ("heads", "head_dim", "embed")
                y = Dense((width,), axes, inputs=2, name=f"out_{field}_{name}")(y)
                members = constants[name][FIELDS.index(field)]
                total[name] += y if field == "token" else jnp.einsum("bns,bsd->bnd", members.astype(y.dtype), y)
        mixed = {}
        for name, x in streams.items():
            if norms:
                company = jnp.stack([valid[other].any(1) for other in streams if other != name]).any(0)
                x = jnp.where(company[:, None, None], norms[name][1](x, total[name]), x)
            mixed[name] = make_block(self.heads, self.ratio, self.block, name)(x, valid[name])
        return mixed, ()

    def _views(self, streams, norms, constants) -> dict:
        """Returns field → modality → (features, values, valid), none for a stream alone."""
        views = {field: {} for field in FIELDS} if norms else {}
        for name in norms:
            x = norms[name][0](streams[name])
            split, axes = (self.heads, x.shape[-1] // self.heads), ("embed", "heads", "head_dim")
            affinity, value = (Dense(split, axes, name=f"{part}_{name}")(x) for part in ("affinity", "value"))
            valid, *members = constants[name]
            views["token"][name] = (affinity, value, valid)
            for field, mine in zip(FIELDS[1:], members):
                # The mean of projections is the projection of the mean.
                views[field][name] = (gather(affinity, mine), gather(value, mine), mine.any(1))
        return views

    def _hear(self, views, cap: float) -> dict:
        """Returns modality → the mean of what it gets from the others that are there."""
        heard, count = dict.fromkeys(views, 0.0), dict.fromkeys(views, 0)
        for one, two in itertools.combinations(views, 2):
            pair = exchange(*zip(views[one], views[two]), cap)
            for name, other, y in zip((one, two), (two, one), pair):
                heard[name] += y
                count[name] += views[other][2].any(1)
        return {name: y / jnp.maximum(count[name], 1)[:, None, None, None].astype(y.dtype) for name, y in heard.items()}


class Mutual(Layered):
    """Mutual attention of every pair at token, frame and clip, before each stream's own block.

    A fusion knows places, not grids: a stream's `frames` = F are that many equal shares of its valid tokens, in the
    order of their places (see segments). That is time for video and text; for a sound that is laid out with frequency
    within time too.
    FLOPs forward, a layer: Σ_m [ block(N_m, D) + 6 N_m D² + 2 (F + 1) D² + 6 N_m (F + 1) D ]
    + Σ_(m < n) 6 (N_m N_n + F² + 1) D; one stream alone: its block.
    """

    layer = MutualLayer
    frames: int = 8

    def constants(self, streams: Streams) -> dict:
        return {
            name: (tokens.valid, segments(tokens, self.frames), segments(tokens, 1)) for name, tokens in streams.items()
        }
