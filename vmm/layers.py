"""Layers from which encoders, fusions and heads are made; the only place that names parameter axes.

A layer computes in the dtype of what it is given: parameters stay float32 and are cast at use, so
that mixed precision is one cast at a model's entrance. Norms and softmax run in float32.
"""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vmm.errors import UserError
from vmm.sharding import constrain, named
from vmm.types import Patches, Tokens


class Dense(nn.Module):
    """Linear map over the last `inputs` axes: [... in] → [... out].

    features: sizes of the new axes. axes: logical names of kernel axes, old then new.
    inputs: how many trailing axes are contracted. Initialised Xavier-uniform (Glorot & Bengio 2010),
    biases zero.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: int = 1
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        shape = x.shape[x.ndim - self.inputs :]

        def init(key, shape_, dtype):
            flat = (math.prod(shape), math.prod(self.features))
            return nn.initializers.xavier_uniform()(key, flat, dtype).reshape(shape_)

        kernel = self.param("kernel", named(init, self.axes), (*shape, *self.features), jnp.float32)
        y = jnp.tensordot(x, kernel.astype(x.dtype), axes=self.inputs)
        if self.bias:
            zeros = named(nn.initializers.zeros, self.axes[self.inputs :])
            y = y + self.param("bias", zeros, self.features, jnp.float32).astype(x.dtype)
        return y


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the last axis, in float32. [... D] → [... D]."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", named(nn.initializers.ones, ("embed",)), x.shape[-1:], jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros, ("embed",)), x.shape[-1:], jnp.float32)
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * scale + bias).astype(x.dtype)


class Embed(nn.Module):
    """Table lookup times √D: ids [...] → [... D] of unit variance at init (Vaswani et al. 2017, sec. 3.4).

    Smaller entries would drown in sin-cos positions, whose variance is near one half.
    """

    entries: int
    width: int
    axes: tuple[str | None, str | None] = ("vocab", "embed")

    @nn.compact
    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        init = named(nn.initializers.normal(self.width**-0.5), self.axes)
        return self.param("table", init, (self.entries, self.width), jnp.float32)[ids] * self.width**0.5


def attention(
    query: Float[Array, "B Q A d"],
    key: Float[Array, "B K A d"],
    value: Float[Array, "B K A d"],
    valid: Bool[Array, "B K"],
) -> Float[Array, "B Q A d"]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) over the valid keys.

    A sample with no valid key gets zeros. FLOPs forward: 4 Q K A d a sample.
    """
    logits = jnp.einsum("bqad,bkad->baqk", query, key, preferred_element_type=jnp.float32)
    mask = valid[:, None, None, :]
    logits = jnp.where(mask, logits / math.sqrt(query.shape[-1]), -1e30)
    weights = jax.nn.softmax(logits, axis=-1) * mask.any(-1, keepdims=True)
    return jnp.einsum("baqk,bkad->bqad", weights.astype(value.dtype), value)


class Attention(nn.Module):
    """Multi-head attention of x [B Q D] over a context [B K D] (x itself when None)."""

    heads: int

    @nn.compact
    def __call__(self, x, context, valid: Bool[Array, "B K"]):
        width = x.shape[-1]
        if width % self.heads:
            raise UserError(f"width {width} does not divide over {self.heads} heads; choose a multiple")
        split = (self.heads, width // self.heads)
        axes = ("embed", "heads", "head_dim")
        context = x if context is None else context
        query = Dense(split, axes, name="query")(x)
        key = Dense(split, axes, name="key")(context)
        value = Dense(split, axes, name="value")(context)
        mixed = attention(query, key, value, valid)
        return Dense((width,), ("heads", "head_dim", "embed"), inputs=2, name="out")(mixed)


class Mlp(nn.Module):
    """Two-layer perceptron with GELU; hidden = ratio * D."""

    ratio: float = 4.0

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        hidden = nn.gelu(Dense((round(width * self.ratio),), ("embed", "mlp"), name="up")(x))
        return Dense((width,), ("mlp", "embed"), name="down")(hidden)


class Block(nn.Module):
    """Pre-norm Transformer block. Queries and MLP are for x; keys are x and, if given, a context.

    FLOPs forward a sample: Q (8 D² + 4 r D²) + K 4 D² − Q 4 D² + 4 Q K D for Q tokens of x and
    K keys in all (r the MLP ratio): 24 N D² + 4 N² D where they are the same N and r = 4.
    """

    heads: int
    ratio: float = 4.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        valid: Bool[Array, "B Q"],
        context: Float[Array, "B C D"] | None = None,
        context_valid: Bool[Array, "B C"] | None = None,
    ) -> Float[Array, "B Q D"]:
        norm = LayerNorm(name="norm_attention")
        query = norm(x)
        keys, keys_valid = query, valid
        if context is not None:
            keys = jnp.concatenate([query, norm(context)], axis=1)
            keys_valid = jnp.concatenate([valid, context_valid], axis=1)
        x = x + Attention(self.heads, name="attention")(query, keys, keys_valid)
        x = x + Mlp(self.ratio, name="mlp")(LayerNorm(name="norm_mlp")(x))
        return constrain(x, "batch", "tokens", None)


class Repeat(nn.Module):
    """A layer, depth times: carry → carry, with constants that every layer reads.

    layer: a Module class with __call__(carry, constants) → carry. fields: its fields.
    scan: one compiled layer over stacked parameters (axis "layers"): compile time does not grow
    with depth. remat: activations inside a layer are computed again for the gradient.
    """

    layer: type[nn.Module]
    fields: Mapping
    depth: int
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, carry, constants):
        layer = nn.remat(self.layer, prevent_cse=not self.scan) if self.remat else self.layer
        if not self.scan or self.depth == 0:
            for i in range(self.depth):
                carry = layer(**self.fields, name=f"layer_{i}")(carry, constants)
            return carry
        scanned = nn.scan(
            lambda module, carry, constants: (module(carry, constants), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(layer(**self.fields, name="layers"), carry, constants)[0]


class BlockLayer(nn.Module):
    """A Block as a layer of Repeat: the carry is x [B N D], the constant its validity [B N]."""

    heads: int
    ratio: float = 4.0

    @nn.compact
    def __call__(self, carry, constants):
        return Block(self.heads, self.ratio, name="block")(carry, constants)


class Stack(nn.Module):
    """Blocks of self-attention and a final norm: x [B N D], valid [B N] → [B N D]."""

    depth: int
    heads: int
    ratio: float = 4.0
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B N D"]:
        fields = dict(heads=self.heads, ratio=self.ratio)
        x = Repeat(BlockLayer, fields, self.depth, self.scan, self.remat, name="blocks")(x, valid)
        return LayerNorm(name="norm")(x)


def sincos(grid: Sequence[int], width: int) -> np.ndarray:
    """Returns fixed positions float32 [N D] over an n-dimensional grid.

    Each axis has an even share of the width, half sines and half cosines of wavelengths from 2π to
    10,000 · 2π (Vaswani et al. 2017, sec. 3.5, one axis after the other); what is left is zero.
    """
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


class Positions(nn.Module):
    """Adds each token's place in the full grid. kind: "sincos" (fixed), "learned" or "none"."""

    kind: str = "sincos"

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], at: Int[Array, "B N"], grid: tuple) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        if self.kind == "none":
            return x
        if self.kind == "sincos":
            table = jnp.asarray(sincos(grid, width))
        elif self.kind == "learned":
            init = named(nn.initializers.normal(0.02), ("tokens", "embed"))
            table = self.param("table", init, (math.prod(grid), width), jnp.float32)
        else:
            raise UserError(f"positions: unknown kind {self.kind!r}; known: learned, none, sincos")
        return x + table[at].astype(x.dtype)


def vector(module: nn.Module, name: str, shape: tuple[int, ...]) -> Array:
    """Returns a learned parameter of the module whose last axis is the width; normal, 0.02."""
    names = (*(None,) * (len(shape) - 1), "embed")
    return module.param(name, named(nn.initializers.normal(0.02), names), shape, jnp.float32)


def scalar(module: nn.Module, name: str, value: float) -> Array:
    """Returns a learned scalar parameter of the module."""
    return module.param(name, nn.initializers.constant(value), (), jnp.float32)


def gather(x: Array, at: Int[Array, "B K"]) -> Array:
    """Returns x[b, at[b]] for each sample b: [B N ...] → [B K ...]."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def select(patches: Patches, keep: Array | None) -> tuple[Array, Array, Array]:
    """Returns (values, valid, at) of the kept tokens; hidden ones are gone before any arithmetic."""
    if keep is None:
        batch, count = patches.valid.shape
        return patches.values, patches.valid, jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    return gather(patches.values, keep), gather(patches.valid, keep), keep


def pool(tokens: Tokens) -> Float[Array, "B D"]:
    """Returns the float32 mean of the valid tokens, zeros where there is none."""
    weight = tokens.valid[..., None].astype(jnp.float32)
    return (tokens.x.astype(jnp.float32) * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)


class Pool(nn.Module):
    """One float32 vector [B D] a stream. kind: "mean", or "attention": a learned query attends over
    the valid tokens (Set Transformer, Lee et al. 2019; the head of SigLIP). Zeros where none is valid."""

    kind: str = "mean"
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: Tokens) -> Float[Array, "B D"]:
        if self.kind == "mean":
            return pool(tokens)
        if self.kind != "attention":
            raise UserError(f"pooling: unknown kind {self.kind!r}; known: attention, mean")
        x = tokens.x.astype(jnp.float32)
        query = jnp.broadcast_to(vector(self, "query", (1, x.shape[-1])), (x.shape[0], 1, x.shape[-1]))
        y = Attention(self.heads, name="attention")(query, x, tokens.valid)[:, 0]
        return y * tokens.valid.any(1, keepdims=True)


def as_float(values: Array) -> Float[Array, "..."]:
    """Returns patch values as float32: pixels 0 … 255 become −1 … 1, spectrograms stay."""
    return values.astype(jnp.float32) / 127.5 - 1.0 if values.dtype == jnp.uint8 else values.astype(jnp.float32)
