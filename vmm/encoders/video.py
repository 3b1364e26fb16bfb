"""Video uint8 [B T H W 3] → tubelets → tokens, a ViT over space-time (ViViT model 1, Arnab et al. 2021)."""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Int, UInt8

from vmm.errors import UserError
from vmm.layers import Dense, Positions, Stack, as_float, select
from vmm.types import Patches, Tokens


class VideoEncoder(nn.Module):
    """Joint space-time encoder.

    width, depth, heads, ratio: of the Transformer. tubelet: frames, rows, columns of one token.
    positions: "sincos", "learned" or "none". scan, remat: see layers.Repeat.
    """

    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    tubelet: tuple[int, int, int] = (2, 16, 16)
    positions: str = "sincos"
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
        x = Dense((self.width,), (None, "embed"), name="embed")(as_float(values).astype(self.dtype))
        x = Positions(self.positions, name="positions")(x, at, patches.grid)
        x = Stack(self.depth, self.heads, self.ratio, self.scan, self.remat, name="stack")(x, valid)
        return Tokens(x, valid, at)
