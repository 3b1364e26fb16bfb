"""Log-mel front ends, on the device: ours, and those that published models were trained with.

Each takes a waveform in [-1, 1] and gives float32 [B F M], before mean and deviation. frames: F, to which the sound
is cut or padded the way the models' own extractors do it; 0: as long as the clip. Products are in full float32 on
every device: the logarithm of a quiet bin shows what half precision rounds away.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vmm.mel import mel_filters, slaney_filters
from vmm.sharding import by_clip
from vmm.sizes import check_table

_HIGHEST = jax.lax.Precision.HIGHEST


def log_mel(
    wave: Float[Array, "B S"], bins: int, window: int, hop: int, sample_rate: int, frames: int = 0
) -> Float[Array, "B F M"]:
    """Returns the log-mel spectrogram, F = S // hop frames; frame f begins at sample f · hop.

    Power of the Hann-windowed Fourier transform, summed by mel filter, natural logarithm floored
    at 1e-6. The end is padded with zeros so that every hop has a frame; so is a clip below `frames`.
    """
    transform = 1 << (window - 1).bit_length()
    frames = frames or wave.shape[1] // hop
    wave = jnp.pad(wave, ((0, 0), (0, max(0, (frames - 1) * hop + window - wave.shape[1]))))
    power = _power(_frames(wave, frames, window, hop) * _hann(window), transform)
    mel = jnp.matmul(power, mel_filters(bins, transform, sample_rate), precision=_HIGHEST)
    return jnp.log(jnp.maximum(mel, 1e-6))


def kaldi(
    wave: Float[Array, "B S"], bins: int, window: int, hop: int, sample_rate: int, frames: int = 0
) -> Float[Array, "B F M"]:
    """Returns Kaldi's filterbank as AST takes it (Gong et al. 2021): F = 1 + (S − window) // hop whole frames.

    Of each frame: the mean is removed, x[n] − 0.97 x[n−1] taken (x[−1] = x[0]), a Hann window whose ends are 0 laid
    over it, and the power of the Fourier transform summed by mel filter; natural logarithm, floored at float32's
    epsilon. No dither, no energy. Frames beyond the clip, and those that reach beyond the end of its sound (where samples
    are −0.0, see data/reading/sound.py), are 0, in the logarithm and before the mean is subtracted.
    """
    transform = 1 << (window - 1).bit_length()
    count = max(0, 1 + (wave.shape[1] - window) // hop)
    count = min(count, frames) if frames else count
    x = _frames(wave, count, window, hop)
    # y[n] − 0.97 y[n−1] for y = x − mean, without the cancellation: neighbours differ little, and exactly.
    change = jnp.diff(x, axis=-1, prepend=x[..., :1])
    x = 0.97 * change + 0.03 * (x - x.mean(-1, keepdims=True))
    power = _power(x * np.hanning(window).astype(np.float32), transform)
    mel = jnp.matmul(power, mel_filters(bins, transform, sample_rate), precision=_HIGHEST)
    mel = jnp.log(jnp.maximum(mel, np.finfo(np.float32).eps))
    heard = (wave != 0) | ~jnp.signbit(wave)
    length = jnp.where(heard, np.arange(1, wave.shape[1] + 1), 0).max(1)
    mel = jnp.where((np.arange(count) * hop + window <= length[:, None])[..., None], mel, 0.0)
    return jnp.pad(mel, ((0, 0), (0, max(0, frames - count)), (0, 0)))


def whisper(
    wave: Float[Array, "B S"], bins: int, window: int, hop: int, sample_rate: int, frames: int = 0
) -> Float[Array, "B F M"]:
    """Returns Whisper's spectrogram (Radford et al. 2022): F = S // hop frames, frame f around sample f · hop.

    Power of the Hann-windowed Fourier transform of `window` points, the ends mirrored; Slaney's mel filters; log10
    floored at 1e-10 and at 8 below the sample's largest value; (x + 4) / 4. A clip below `frames` is followed by
    silence: Whisper hears 3000 frames, 30 s.
    """
    if frames:
        length = frames * hop
        wave = jnp.pad(wave[:, :length], ((0, 0), (0, max(0, length - wave.shape[1]))))
    frames = wave.shape[1] // hop
    wave = jnp.pad(wave, ((0, 0), (window // 2, window // 2)), mode="reflect")
    power = _power(_frames(wave, frames, window, hop) * _hann(window), window)
    mel = jnp.log10(
        jnp.maximum(jnp.matmul(power, slaney_filters(bins, window, sample_rate), precision=_HIGHEST), 1e-10)
    )
    return (jnp.maximum(mel, mel.max((1, 2), keepdims=True) - 8.0) + 4.0) / 4.0


# name → (function, mean and deviation of its values: ours; AST's of AudioSet, where one is two; Whisper scales itself)
FRONTENDS = {
    "log_mel": (log_mel, -5.0, 4.5),
    "kaldi": (kaldi, -4.2677393, 2 * 4.5689974),
    "whisper": (whisper, 0.0, 1.0),
}


def _frames(wave: Float[Array, "B S"], frames: int, window: int, hop: int) -> Float[Array, "B F W"]:
    check_table("audio encoder: spectrogram", frames, window)
    return wave[:, np.arange(frames)[:, None] * hop + np.arange(window)]


def _hann(window: int) -> np.ndarray:
    return np.hanning(window + 1)[:-1].astype(np.float32)


def _power(frames: Float[Array, "B F W"], transform: int) -> Float[Array, "B F R"]:
    def power(frames):
        spectrum = jnp.fft.rfft(frames, n=transform)
        return jnp.square(spectrum.real) + jnp.square(spectrum.imag)

    return by_clip(power, frames)
