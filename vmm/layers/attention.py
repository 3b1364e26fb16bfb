"""Scaled dot-product attention, and multi-head attention made of it."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmm.errors import UserError
from vmm.layers.chunks import chunked, rows_of
from vmm.layers.dense import Dense, parameter
from vmm.layers.kernels import choose, fused
from vmm.sharding import constrain, named


@functools.partial(jax.jit, static_argnums=5)
def _attend(query, key, value, valid, mask, cap: float):
    logits = jnp.einsum("bqad,bkad->baqk", query, key, preferred_element_type=jnp.float32)
    logits = logits / math.sqrt(query.shape[-1])
    if cap:
        logits = cap * jnp.tanh(logits / cap)
    allowed = valid[:, None, None, :] if mask is None else valid[:, None, None, :] & mask
    weights = jax.nn.softmax(jnp.where(allowed, logits, -1e30), axis=-1) * allowed.any(-1, keepdims=True)
    return jnp.einsum("baqk,bkad->bqad", weights.astype(value.dtype), value)


def attention(
    query: Float[Array, "B Q A d"],
    key: Float[Array, "B K A d"],
    value: Float[Array, "B K A d"],
    valid: Bool[Array, "B K"],
    mask: Bool[Array, "... Q K"] | None = None,
    cap: float = 0.0,
) -> Float[Array, "B Q A d"]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) over the valid keys that the mask allows.

    mask: broadcast to [B A Q K], True where a query may see a key; None: everywhere. cap: logits l become
    cap · tanh(l / cap) (Gemma 2, 2024), 0: as they are. A query that may see no valid key gets zeros. Softmax in
    float32. FLOPs forward: 4 Q K A d a sample.

    Tokens of a clip that are split over devices meet the keys and values of all. kernels.choose says how it is computed.
    """
    query = constrain(query, "batch", "tokens", "heads", None)
    key, value = (constrain(x, "batch", None, "heads", None) for x in (key, value))
    kind = choose(query, key, mask, cap)
    if kind in ("cudnn", "splash"):
        return fused(kind, query, key, value, valid)
    if kind == "chunked":
        return chunked(query, key, value, valid, mask, cap, rows_of(query.shape[1], key.shape[1]))
    return _attend(query, key, value, valid, mask, cap)


def rotate(x: Float[Array, "B N A d"], table: tuple) -> Float[Array, "B N A d"]:
    """Turns each pair of neighbouring values by its token's angle (RoFormer, Su et al. 2021, eq. 34).

    table: (cos, sin), each float32 [B N d], from positions.rotary.
    """
    cos, sin = (part[:, :, None, :] for part in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return (x * cos + turned * sin).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of x [B Q D] over a context [B K D] (x itself when None).

    cap: see attention. The call's mask is broadcast to [B A Q K]; rotary turns queries and keys of x, and asks for
    no context. prefix: learned keys and values that come before those of the tokens, seen by every query.
    """

    heads: int
    cap: float = 0.0
    prefix: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        context: Float[Array, "B K C"] | None,
        valid: Bool[Array, "B K"],
        mask: Bool[Array, "... Q K"] | tuple | None = None,
        rotary: tuple | None = None,
    ) -> Float[Array, "B Q D"]:
        width = x.shape[-1]
        if width % self.heads:
            raise UserError(f"width {width} does not divide over {self.heads} heads; choose a multiple")
        split = (self.heads, width // self.heads)
        axes = ("embed", "heads", "head_dim")
        source = x if context is None else context
        query = Dense(split, axes, name="query")(x)
        key = Dense(split, axes, name="key")(source)
        value = Dense(split, axes, name="value")(source)
        if rotary is not None:
            assert context is None or context is x, "rotary positions are of x alone"
            query, key = rotate(query, rotary), rotate(key, rotary)
        if self.prefix:
            key, value, valid, mask = self._with_prefix(key, value, valid, mask)
        mixed = self.mix(query, key, value, valid, mask)
        return Dense((width,), ("heads", "head_dim", "embed"), inputs=2, name="out")(mixed)

    def _with_prefix(self, key, value, valid, mask):
        if isinstance(mask, tuple):
            raise UserError("block.prefix: only where a token sees every other; set the encoder's attention to joint")
        batch, count = key.shape[0], self.prefix
        init = named(nn.initializers.normal(0.02), (None, "heads", "head_dim"))
        own = [parameter(self, f"prefix_{name}", init, (count, *key.shape[2:])) for name in ("key", "value")]
        own = [jnp.broadcast_to(x.astype(key.dtype), (batch, *x.shape)) for x in own]
        key, value = (jnp.concatenate(pair, axis=1) for pair in zip(own, (key, value)))
        valid = jnp.concatenate([jnp.ones((batch, count), bool), valid], axis=1)
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0),) * (mask.ndim - 1) + ((count, 0),), constant_values=True)
        return key, value, valid, mask

    def mix(self, query, key, value, valid, mask) -> Float[Array, "B Q A d"]:
        """The attention itself; another kind replaces this and shares the projections."""
        return attention(query, key, value, valid, mask, self.cap)
