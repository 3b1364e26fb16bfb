"""Token ids [B L] → tokens: a bidirectional Transformer (BERT, Devlin et al. 2019, pre-norm)."""

import flax.linen as nn
from jaxtyping import Array, Int

from vmm.layers import Embed, Positions, Stack, select
from vmm.types import Patches, Tokens


class TextEncoder(nn.Module):
    """Bidirectional text encoder; id 0 is padding. vocabulary: V, at least the tokenizer's size.

    Others as VideoEncoder.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    positions: str = "sincos"
    scan: bool = False
    remat: bool = False
    dtype: str = "float32"

    def patches(self, text: Int[Array, "B L"]) -> Patches:
        """Returns the ids as they are, valid where they are not padding."""
        return Patches(text, text != 0, (text.shape[1],), self.vocabulary)

    @nn.compact
    def __call__(self, patches: Patches, keep: Int[Array, "B K"] | None) -> Tokens:
        """Encodes the kept tokens. FLOPs forward: depth · block(K, D)."""
        values, valid, at = select(patches, keep)
        x = Embed(self.vocabulary, self.width, name="embed")(values).astype(self.dtype)
        x = Positions(self.positions, name="positions")(x, at, patches.grid)
        x = Stack(self.depth, self.heads, self.ratio, self.scan, self.remat, name="stack")(x, valid)
        return Tokens(x, valid, at)
