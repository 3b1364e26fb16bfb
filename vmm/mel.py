"""Mel filters, in NumPy: of the audio encoder on the device, and of pictures of sound on the host."""

import numpy as np


def mel_filters(bins: int, transform: int, sample_rate: int) -> np.ndarray:
    """Returns triangular mel filters float32 [transform // 2 + 1, M], HTK scale, 20 Hz to Nyquist.

    mel(f) = 1127 ln(1 + f / 700); filter m rises from edge m to m+1 and falls to m+2. Kaldi's are the same.
    """

    def mel(hertz):
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(20.0), mel(sample_rate / 2), bins + 2)
    return _triangles(mel(_frequencies(transform, sample_rate)), edges).astype(np.float32)


def slaney_filters(bins: int, transform: int, sample_rate: int) -> np.ndarray:
    """Returns triangular mel filters float32 [transform // 2 + 1, M] of equal area, Slaney's scale, 0 Hz to Nyquist.

    The scale of the Auditory Toolbox (Slaney 1998), librosa and Whisper: 3 f / 200 below 1 kHz, from there on
    27 mel a factor of 6.4. Triangles are straight in Hz, and of area 1: 2 / (upper edge − lower edge) high.
    """
    top = 15.0 + np.log(sample_rate / 2000.0) * 27.0 / np.log(6.4)
    mels = np.linspace(0.0, top, bins + 2)
    edges = np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * np.exp((mels - 15.0) * np.log(6.4) / 27.0))
    triangles = _triangles(_frequencies(transform, sample_rate), edges)
    return (triangles * 2.0 / (edges[2:] - edges[:-2])).astype(np.float32)


def _frequencies(transform: int, sample_rate: int) -> np.ndarray:
    return np.arange(transform // 2 + 1) * sample_rate / transform


def _triangles(places: np.ndarray, edges: np.ndarray) -> np.ndarray:
    places = places[:, None]
    rise = (places - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - places) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rise, fall))
