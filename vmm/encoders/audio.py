"""Waveform [B S] → log-mel on the device → patches → tokens (AST, Gong et al. 2021)."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from vmm.errors import UserError
from vmm.layers import Dense, LayerNorm, Positions, Stack, prepend, rotary, select, vector
from vmm.mel import mel_filters
from vmm.types import Patches, Tokens


def log_mel(wave: Float[Array, "B S"], bins: int, window: int, hop: int, sample_rate: int) -> Float[Array, "B F M"]:
    """Returns the log-mel spectrogram, F = S // hop frames; frame f begins at sample f · hop.

    Power of the Hann-windowed Fourier transform, summed by mel filter, natural logarithm floored
    at 1e-6. The end is padded with zeros so that every hop has a frame.
    """
    transform = 1 << (window - 1).bit_length()
    frames = wave.shape[1] // hop
    wave = jnp.pad(wave, ((0, 0), (0, max(0, (frames - 1) * hop + window - wave.shape[1]))))
    at = np.arange(frames)[:, None] * hop + np.arange(window)
    hann = np.hanning(window + 1)[:-1].astype(np.float32)
    spectrum = jnp.fft.rfft(wave[:, at] * hann, n=transform)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.log(jnp.maximum(power @ mel_filters(bins, transform, sample_rate), 1e-6))


class AudioEncoder(nn.Module):
    """ViT over the patches of a log-mel spectrogram.

    bins: M. window, hop: samples of a frame and between frames. patch: frames, bins of one token.
    mean, deviation: of the log-mel values, subtracted and divided out. Others as VideoEncoder.
    """

    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    bins: int = 128
    window: int = 400
    hop: int = 160
    sample_rate: int = 16000
    patch: tuple[int, int] = (16, 16)
    mean: float = -5.0
    deviation: float = 4.5
    positions: str = "sincos"
    registers: int = 0
    norm_embedding: bool = False
    final_norm: bool = True
    block: Mapping = dataclasses.field(default_factory=dict)
    scan: bool = False
    remat: bool = False
    dtype: str = "float32"

    def patches(self, audio: Float[Array, "B S"]) -> Patches:
        """Cuts the spectrogram into patches: float32 [B (f m) P]. Frames beyond the last whole patch are left out.

        Raises:
          UserError: the clip is shorter than one patch, or the patch does not divide the bins.
        """
        frames, bins = self.patch
        count = audio.shape[1] // self.hop // frames * frames
        if not count or self.bins % bins:
            raise UserError(
                f"audio encoder: patch {self.patch} (frames, bins) does not fit {audio.shape[1] // self.hop} frames of {self.bins} bins"
            )
        mel = log_mel(audio.astype(jnp.float32), self.bins, self.window, self.hop, self.sample_rate)
        mel = (mel[:, :count] - self.mean) / self.deviation
        values = rearrange(mel, "b (f p) (m q) -> b (f m) (p q)", p=frames, q=bins)
        return Patches(values, jnp.ones(values.shape[:2], bool), (count // frames, self.bins // bins), 0)

    @nn.compact
    def __call__(self, patches: Patches, keep: Int[Array, "B K"] | None) -> Tokens:
        """Encodes the kept patches. FLOPs forward: 2 K P D + depth · block(K, D)."""
        values, valid, at = select(patches, keep)
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
