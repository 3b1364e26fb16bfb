"""Mel filters, in NumPy: of the audio encoder on the device, and of pictures of sound on the host."""

import numpy as np


def mel_filters(bins: int, transform: int, sample_rate: int) -> np.ndarray:
    """Returns triangular mel filters float32 [transform // 2 + 1, M], HTK scale, 20 Hz to Nyquist.

    mel(f) = 1127 ln(1 + f / 700); filter m rises from edge m to m+1 and falls to m+2.
    """

    def mel(hertz):
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(20.0), mel(sample_rate / 2), bins + 2)
    place = mel(np.arange(transform // 2 + 1) * sample_rate / transform)[:, None]
    rise = (place - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - place) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rise, fall)).astype(np.float32)
