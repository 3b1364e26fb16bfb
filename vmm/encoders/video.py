"""Video uint8 [B T H W 3] → tubelets → tokens, a ViT over space-time (ViViT model 1, Arnab et al. 2021)."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Int, UInt8

from vmm.errors import UserError
from vmm.layers import Dense, LayerNorm, Positions, Stack, prepend, rotary, select, vector
from vmm.types import Patches, Tokens


class VideoEncoder(nn.Module):
    """Joint space-time encoder.

    width, depth, heads, ratio: of the Transformer. tubelet: frames, rows, columns of one token.
    positions: a kind of layers.Positions, or a rotary one. registers: learned tokens before the others, of no place
    in the grid; the first may serve as class token. norm_embedding: a norm before the first block (CLIP).
    final_norm, block: see layers.Stack. mean, deviation: of each colour, in pixel values 0 … 255, subtracted and
    divided out. scan, remat: see layers.Repeat.
    """

    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    tubelet: tuple[int, int, int] = (2, 16, 16)
    positions: str = "sincos"
    registers: int = 0
    norm_embedding: bool = False
    final_norm: bool = True
    block: Mapping = dataclasses.field(default_factory=dict)
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    deviation: tuple[float, float, float] = (127.5, 127.5, 127.5)
    scan: bool = False
    remat: bool = False
    dtype: str = "float32"

    def patches(self, video: UInt8[Array, "B T H W 3"]) -> Patches:
        """Cuts video into tubelets: uint8 [B (t h w) (tubelet · 3)], still bytes.

        Raises:
          UserError: the tubelet does not divide the clip.
        """
        sizes = video.shape[1:4]
        if any(size % part for size, part in zip(sizes, self.tubelet)):
            raise UserError(f"video encoder: tubelet {self.tubelet} does not divide a clip of (T, H, W) = {sizes}")
        p, q, r = self.tubelet
        values = rearrange(video, "b (t p) (h q) (w r) c -> b (t h w) (p q r c)", p=p, q=q, r=r)
        grid = tuple(size // part for size, part in zip(sizes, self.tubelet))
        return Patches(values, jnp.ones(values.shape[:2], bool), grid, 0)

    @nn.compact
    def __call__(self, patches: Patches, keep: Int[Array, "B K"] | None) -> Tokens:
        """Encodes the kept tubelets. FLOPs forward: 2 K P D + depth · block(K, D)."""
        values, valid, at = select(patches, keep)
        colours = values.shape[-1] // 3  # neighbours in a tubelet's values are one pixel's colours
        mean, deviation = np.tile(np.float32(self.mean), colours), np.tile(np.float32(self.deviation), colours)
        values = (values.astype(jnp.float32) - mean) / deviation
        x = Dense((self.width,), (None, "embed"), name="embed")(values.astype(self.dtype))
        x = Positions(self.positions, name="positions")(x, at, patches.grid)
        if self.registers:
            x, valid, at = prepend(vector(self, "registers", (self.registers, self.width)), x, valid, at)
        if self.norm_embedding:
            x = LayerNorm(self.block.get("epsilon", 1e-6), name="norm_embedding")(x)
        turn = rotary(self.positions, at, patches.grid, self.width // self.heads)
        stack = Stack(
            self.depth, self.heads, self.ratio, self.scan, self.remat, self.block, self.final_norm, name="stack"
        )
        return Tokens(stack(x, valid, rotary=turn), valid, at)
