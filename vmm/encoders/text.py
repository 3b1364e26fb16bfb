"""Token ids [B L] → tokens: a Transformer, bidirectional (BERT, Devlin et al. 2019) or causal (CLIP, Radford et al. 2021)."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from vmm.data.spec import DataSpec
from vmm.encoders.base import Encoder
from vmm.errors import UserError
from vmm.layers import Embed, LayerNorm, Positions, Stack, prepend, rotary, select, vector
from vmm.types import Patches, Tokens


class TextEncoder(Encoder):
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

    def check(self, where: str, data: DataSpec) -> None:
        """Raises UserError where the encoder and the tokenizer's file, if there already, do not fit."""
        known = data.tokenizer
        if known is None:
            return
        if known.vocabulary > self.vocabulary:
            raise UserError(
                f"{where}.vocabulary: {self.vocabulary}, but ids of {known.path} go up to {known.vocabulary - 1}; raise it"
            )
        if self.padding not in (-1, known.padding):
            raise UserError(
                f"{where}.padding: {self.padding}, but {known.path} pads with id {known.padding}; give that, or -1 where "
                "padding is text like other"
            )
        if self.end >= 0 and self.end not in known.empty:
            raise UserError(f"{where}.end: {self.end}, but {known.path} ends no text with that id")

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
