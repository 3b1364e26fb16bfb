"""Video uint8 [B T H W 3] → tubelets → tokens, a ViT over space-time (ViViT, Arnab et al. 2021)."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Int, UInt8

from vmm.encoders.base import Encoder
from vmm.errors import UserError
from vmm.layers import (
    Dense,
    LayerNorm,
    MergingStack,
    Positions,
    SpaceTimeStack,
    Stack,
    lay_out,
    prepend_each,
    ravel,
    rotary_at,
    select,
    vector,
)  # fmt: skip
from vmm.types import Patches, Tokens


class VideoEncoder(Encoder):
    """Transformer over the tubelets of a clip, or of several clips packed into a row (layers.pack).

    width, depth, heads, ratio: of the Transformer. tubelet: frames, rows, columns of one token.
    attention: "joint", or who sees whom otherwise, one for all layers or one a layer: see layers.SpaceTimeStack, also
    for window (frames, rows, columns of tokens) and temporal_depth. merge: tokens that become one with others in each
    layer, for inference (layers.MergingStack).
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
    attention: str | Mapping | tuple = "joint"
    window: tuple[int, int, int] = (8, 7, 7)
    temporal_depth: int = 0
    merge: int = 0
    positions: str = "sincos"
    registers: int = 0
    norm_embedding: bool = False
    final_norm: bool = True
    block: Mapping = dataclasses.field(default_factory=dict)
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    deviation: tuple[float, float, float] = (127.5, 127.5, 127.5)
    scan: bool = False
    remat: bool | str = False
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

    def unpatch(self, values: np.ndarray, grid: tuple) -> np.ndarray:
        """Returns the clip [T H W 3] that tubelets [N P] were cut of."""
        (t, h, w), (p, q, r) = grid, self.tubelet
        return rearrange(values, "(t h w) (p q r c) -> (t p) (h q) (w r) c", t=t, h=h, w=w, p=p, q=q, r=r)

    @nn.compact
    def __call__(self, patches: Patches, keep: Int[Array, "B K"] | None) -> Tokens:
        """Encodes the kept tubelets; of packed clips, each by itself.

        Registers come first; packed clips each have their own, those of the row's first clip before the next one's.
        FLOPs forward: 2 K P D + depth · block(K, D), of attention by parts where all are kept.
        """
        values, valid, at = select(patches, keep)
        layout = lay_out(patches, keep)
        packed = layout.segment is not None
        colours = values.shape[-1] // 3  # neighbours in a tubelet's values are one pixel's colours
        mean, deviation = np.tile(np.float32(self.mean), colours), np.tile(np.float32(self.deviation), colours)
        values = (values.astype(jnp.float32) - mean) / deviation
        x = Dense((self.width,), (None, "embed"), name="embed")(values.astype(self.dtype))
        own = (layout.places, layout.extents) if packed else None
        x = Positions(self.positions, name="positions")(x, ravel(layout.places, layout.grid), layout.grid, own)
        if self.registers:
            registers = vector(self, "registers", (self.registers, self.width))
            x, valid, at, layout = prepend_each(registers, x, valid, at, layout)
        if self.norm_embedding:
            x = LayerNorm(self.block.get("epsilon", 1e-6), name="norm_embedding")(x)
        return Tokens(self._stack(x, valid, layout), valid, at)

    def _stack(self, x, valid, layout):
        common = (self.depth, self.heads, self.ratio, self.scan, self.remat, self.block, self.final_norm)
        kinds = self.attention if isinstance(self.attention, tuple) else (self.attention,)
        joint = set(kinds) == {"joint"} and len(kinds) in (1, self.depth) and not self.temporal_depth
        packed = layout.segment is not None
        if self.merge and (not joint or packed):
            raise UserError('video encoder: merge asks for attention="joint" and no packed clips; set merge=0')
        if not joint:
            fields = (self.attention, self.window, self.temporal_depth, self.positions)
            return SpaceTimeStack(*common, *fields, name="stack")(x, valid, layout)
        turn = rotary_at(self.positions, layout.places, self.width // self.heads)
        if self.merge:
            return MergingStack(*common, layout.registers, self.merge, name="stack")(x, valid, rotary=turn)
        mask = layout.same_clip()[:, None] if packed else None
        return Stack(*common, name="stack")(x, valid, mask, turn)
