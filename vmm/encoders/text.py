"""Token ids [B L] → tokens: a Transformer, bidirectional (BERT, Devlin et al. 2019) or causal (CLIP, Radford et al. 2021)."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from vmm.layers import Embed, LayerNorm, Positions, Stack, prepend, rotary, select, vector
from vmm.types import Patches, Tokens


class TextEncoder(nn.Module):
    """Text encoder. vocabulary: V, at least the tokenizer's size.

    causal: a token sees itself and those before it. padding: the id that is no token, −1: all are tokens (SigLIP
    attends to its padding). end: nothing after the first token of this id is one (CLIP pads with it), −1: no such
    id. Others as VideoEncoder.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    causal: bool = False
    padding: int = 0
    end: int = -1
    positions: str = "sincos"
    registers: int = 0
    norm_embedding: bool = False
    final_norm: bool = True
    block: Mapping = dataclasses.field(default_factory=dict)
    scan: bool = False
    remat: bool | str = False
    dtype: str = "float32"

    def patches(self, text: Int[Array, "B L"]) -> Patches:
        """Returns the ids as they are, valid where they are tokens."""
        valid = text != self.padding
        if self.end >= 0:
            ended = jnp.cumsum(text == self.end, axis=1)
            valid &= ended - (text == self.end) == 0
        return Patches(text, valid, (text.shape[1],), self.vocabulary)

    @nn.compact
    def __call__(self, patches: Patches, keep: Int[Array, "B K"] | None) -> Tokens:
        """Encodes the kept tokens. FLOPs forward: depth · block(K, D)."""
        values, valid, at = select(patches, keep)
        x = Embed(self.vocabulary, self.width, name="embed")(values).astype(self.dtype)
        x = Positions(self.positions, name="positions")(x, at, patches.grid)
        if self.registers:
            x, valid, at = prepend(vector(self, "registers", (self.registers, self.width)), x, valid, at)
        if self.norm_embedding:
            x = LayerNorm(self.block.get("epsilon", 1e-6), name="norm_embedding")(x)
        mask = at[:, None, None, :] <= at[:, None, :, None] if self.causal else None
        turn = rotary(self.positions, at, patches.grid, self.width // self.heads)
        stack = Stack(
            self.depth, self.heads, self.ratio, self.scan, self.remat, self.block, self.final_norm, name="stack"
        )
        return Tokens(stack(x, valid, mask, turn), valid, at)
