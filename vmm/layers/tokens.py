"""What is done to tokens as tokens: kept ones taken out, registers put before them, one vector made of many."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vmm.errors import UserError, one_of
from vmm.layers.attention import Attention
from vmm.layers.blocks import Mlp
from vmm.layers.dense import LayerNorm, vector
from vmm.types import Patches, Tokens


def gather(x: Array, at: Int[Array, "B K"]) -> Array:
    """Returns x[b, at[b]] for each sample b: [B N ...] → [B K ...]."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def select(patches: Patches, keep: Array | None) -> tuple[Array, Array, Array]:
    """Returns (values, valid, at) of the kept tokens; hidden ones are gone before any arithmetic."""
    if keep is None:
        batch, count = patches.valid.shape
        return patches.values, patches.valid, jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    return gather(patches.values, keep), gather(patches.valid, keep), keep


def prepend(registers: Float[Array, "R D"], x, valid, at) -> tuple:
    """Returns (x, valid, at) with registers before the tokens [B N D]: [B R+N D].

    A register is a learned token of no place, `at` −1, valid where the sample has any valid token; a class token
    is the first register (ViT, Dosovitskiy et al. 2021; registers: Darcet et al. 2024).
    """
    batch, count = x.shape[0], registers.shape[0]
    first = jnp.broadcast_to(registers.astype(x.dtype), (batch, *registers.shape))
    there = jnp.broadcast_to(valid.any(1, keepdims=True), (batch, count))
    places = jnp.full((batch, count), -1, at.dtype)
    return tuple(jnp.concatenate(pair, axis=1) for pair in ((first, x), (there, valid), (places, at)))


def pool(tokens: Tokens) -> Float[Array, "B D"]:
    """Returns the float32 mean of the valid tokens, registers left out; zeros where there is none."""
    weight = (tokens.valid & (tokens.at >= 0))[..., None].astype(jnp.float32)
    return (tokens.x.astype(jnp.float32) * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)


class Pool(nn.Module):
    """One float32 vector [B D] a stream; zeros where no token is valid.

    kind: "mean"; "first": the first token, a class token where the encoder has registers; "last": the last valid
    token (CLIP's end of text); "attention": a learned query attends over the valid tokens (Set Transformer, Lee et
    al. 2019); "attention_mlp": the same, and an MLP added to it (the head of SigLIP, Zhai et al. 2023).
    block: further fields of layers.Block, for the MLP's activation and the norm's epsilon.
    """

    kind: str = "mean"
    heads: int = 4
    block: Mapping = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, tokens: Tokens) -> Float[Array, "B D"]:
        kinds = ("attention", "attention_mlp", "first", "last", "mean")
        if self.kind not in kinds:
            raise UserError(f"pooling: unknown kind {self.kind!r}; {one_of(self.kind, kinds)}")
        if self.kind == "mean":
            return pool(tokens)
        x, there = tokens.x.astype(jnp.float32), tokens.valid.any(1, keepdims=True)
        if self.kind == "first":
            return x[:, 0] * there
        if self.kind == "last":
            place = (jnp.arange(x.shape[1]) * tokens.valid).argmax(1)
            return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0] * there
        query = jnp.broadcast_to(vector(self, "query", (1, x.shape[-1])), (x.shape[0], 1, x.shape[-1]))
        y = Attention(self.heads, name="attention")(query, x, tokens.valid)
        if self.kind == "attention_mlp":
            norm = LayerNorm(self.block.get("epsilon", 1e-6), name="norm")
            y = y + Mlp(self.block.get("ratio", 4.0), self.block.get("activation", "gelu_tanh"), name="mlp")(norm(y))
        return y[:, 0] * there


def as_float(values: Array) -> Float[Array, "..."]:
    """Returns patch values as float32: pixels 0 … 255 become −1 … 1, spectrograms stay."""
    return values.astype(jnp.float32) / 127.5 - 1.0 if values.dtype == jnp.uint8 else values.astype(jnp.float32)
