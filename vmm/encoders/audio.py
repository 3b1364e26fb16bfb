"""Waveform [B S] → spectrogram on the device → patches or convolutions → tokens (AST, Gong et al. 2021; Whisper)."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from vmm.encoders.base import Encoder
from vmm.encoders.frontends import FRONTENDS
from vmm.errors import UserError, one_of
from vmm.layers import Dense, LayerNorm, Positions, Stack, prepend, rotary, select, vector
from vmm.types import Patches, Tokens


class AudioEncoder(Encoder):
    """Transformer over a log-mel spectrogram.

    frontend: one of FRONTENDS, "log_mel", "kaldi" (AST's) or "whisper". bins: M. window, hop: samples of a frame and
    between frames. frames: F, to which the sound is cut or padded, 0: as the clip. mean, deviation: of the log-mel
    values, subtracted and divided out; None: the front end's own.
    stem: "patch", the values of `patch` (frames, bins) are mapped to a token, one each `stride` (frames, bins; None:
    the patch; less: they overlap); or "conv", Whisper's two convolutions over time, a token each two frames. An odd
    frame at the end is then left out. Others as VideoEncoder.
    """

    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    frontend: str = "log_mel"
    bins: int = 128
    window: int = 400
    hop: int = 160
    sample_rate: int = 16000
    frames: int = 0
    mean: float | None = None
    deviation: float | None = None
    stem: str = "patch"
    patch: tuple[int, int] = (16, 16)
    stride: tuple[int, int] | None = None
    positions: str = "sincos"
    registers: int = 0
    norm_embedding: bool = False
    final_norm: bool = True
    block: Mapping = dataclasses.field(default_factory=dict)
    scan: bool = False
    remat: bool | str = False
    dtype: str = "float32"

    @property
    def windows(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What of the spectrogram a token's values are: ((frames, bins), (frames, bins) to the next token's)."""
        if self.stem == "conv":
            return (5, self.bins), (2, self.bins)
        return tuple(self.patch), tuple(self.stride or self.patch)

    def spectrogram(self, audio: Float[Array, "B S"]) -> Float[Array, "B F M"]:
        """Returns the standardised log-mel values."""
        if self.frontend not in FRONTENDS:
            raise UserError(f"audio encoder: unknown frontend {self.frontend!r}; {one_of(self.frontend, FRONTENDS)}")
        function, mean, deviation = FRONTENDS[self.frontend]
        mean = mean if self.mean is None else self.mean
        deviation = deviation if self.deviation is None else self.deviation
        mel = function(audio.astype(jnp.float32), self.bins, self.window, self.hop, self.sample_rate, self.frames)
        return (mel - mean) / deviation

    def patches(self, audio: Float[Array, "B S"]) -> Patches:
        """Cuts the spectrogram into tokens: float32 [B (f m) P]. Frames beyond the last whole patch are left out.

        Of the convolutions, P is the five frames that reach a token: [B f (5 M)], zeros beyond both ends.

        Raises:
          UserError: the clip is shorter than one patch, or the patch does not divide the bins.
        """
        if self.stem not in ("conv", "patch"):
            raise UserError(f"audio encoder: unknown stem {self.stem!r}; known: conv, patch")
        mel = self.spectrogram(audio)
        count = mel.shape[1]
        if self.stem == "conv":
            mel = jnp.pad(mel[:, : count // 2 * 2], ((0, 0), (2, 1), (0, 0)))
        (frames, bins), (down, across) = self.windows
        rows, columns = (mel.shape[1] - frames) // down + 1, (self.bins - bins) // across + 1
        if rows < 1 or columns < 1 or (self.stride is None and self.bins % bins):
            raise UserError(
                f"audio encoder: patch {(frames, bins)} (frames, bins) does not fit {count} frames of {self.bins} bins"
            )
        if (frames, bins) == (down, across):
            mel = mel[:, : rows * frames, : columns * bins]
            values = rearrange(mel, "b (f p) (m q) -> b (f m) (p q)", p=frames, q=bins)
        else:
            mel = mel[:, np.arange(rows)[:, None] * down + np.arange(frames)]
            mel = mel[..., np.arange(columns)[:, None] * across + np.arange(bins)]
            values = rearrange(mel, "b f p m q -> b (f m) (p q)")
        grid = (rows,) if self.stem == "conv" else (rows, columns)
        return Patches(values, jnp.ones(values.shape[:2], bool), grid, 0)

    def unpatch(self, values: np.ndarray, grid: tuple) -> np.ndarray:
        """Returns the spectrogram [F M] that patches [N P] were cut of; where they overlap, the middle of each."""
        (frames, bins), (down, across) = self.windows
        rows, columns = (frames - down + 1) // 2, (bins - across + 1) // 2
        patches = values.reshape(*grid, frames, bins)[:, :, rows : rows + down, columns : columns + across]
        return rearrange(patches, "f m p q -> (f p) (m q)")

    @nn.compact
    def __call__(self, patches: Patches, keep: Int[Array, "B K"] | None) -> Tokens:
        """Encodes the kept patches.

        FLOPs forward: 2 K P D + depth · block(K, D); with convolutions 18 K M D + 6 K D² for the stem, half as
        much again as the convolution of a whole clip in its first layer: neighbours share no work.
        """
        values, valid, at = select(patches, keep)
        values = values.astype(self.dtype)
        x = (
            self._convolve(values, at)
            if self.stem == "conv"
            else Dense((self.width,), (None, "embed"), name="embed")(values)
        )
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

    def _convolve(self, values: Float[Array, "B K P"], at: Int[Array, "B K"]) -> Float[Array, "B K D"]:
        """GELU of two convolutions of kernel 3, the second of stride 2 (Whisper), at the kept tokens alone.

        Token i takes outputs 2i−1, 2i, 2i+1 of the first, and those the frames 2i−2 … 2i+2. Output −1, before the
        clip, is the second's padding: zero, whatever the first would make of it. Kernels: [(tap M) D], [(tap D) D].
        """
        frames = rearrange(values, "b k (p m) -> b k p m", m=self.bins)
        taps = jnp.concatenate([frames[:, :, i : i + 3] for i in range(3)], axis=-1)
        x = nn.gelu(Dense((self.width,), (None, "embed"), name="embed")(taps), approximate=False)
        outside = (at[..., None] == 0) & (jnp.arange(3) == 0)
        x = rearrange(jnp.where(outside[..., None], 0, x), "b k t d -> b k (t d)")
        return nn.gelu(Dense((self.width,), (None, "embed"), name="embed_2")(x), approximate=False)
