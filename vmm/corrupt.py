"""Noise for evaluations: what a clip's streams suffer, in five severities, drawn anew from (seed, clip) alone.

A severity contains the weaker ones: the frames, clips and moments that are hit at 2 are hit at 3 too. What the
evaluators are told of a clip (which streams it has, its labels) stays what it is; only what the model sees changes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vmm.errors import UserError, one_of
from vmm.types import Batch

SEVERITIES = (1, 2, 3, 4, 5)
_SEGMENT = 0.1  # seconds of one audio drop-out


def drop_frames(video: np.ndarray, level: float, rng: np.random.Generator, rate: int) -> np.ndarray:
    """Freezes each frame but the first with probability `level`: the one before it is seen once more. uint8 [T H W C]."""
    frozen = rng.uniform(size=len(video)) < level
    return video[np.maximum.accumulate(np.where(frozen, 0, np.arange(len(video))))]


def blur(video: np.ndarray, level: float, rng: np.random.Generator, rate: int) -> np.ndarray:
    """Gaussian blur of each frame. level: standard deviation in pixels of a picture 224 high."""
    from scipy.ndimage import gaussian_filter  # slow to import, and most runs blur nothing

    sigma = level * video.shape[1] / 224
    return np.rint(gaussian_filter(video.astype(np.float32), (0, sigma, sigma, 0))).astype(np.uint8)


def add_noise(video: np.ndarray, level: float, rng: np.random.Generator, rate: int) -> np.ndarray:
    """Gaussian noise on every value. level: standard deviation as a share of the range."""
    noise = rng.standard_normal(video.shape, np.float32)
    return np.clip(np.rint(video + 255 * level * noise), 0, 255).astype(np.uint8)


def add_hiss(audio: np.ndarray, level: float, rng: np.random.Generator, rate: int) -> np.ndarray:
    """White noise at a signal-to-noise ratio of `level` dB over the window; silence stays. float32 [S]."""
    noise = rng.standard_normal(audio.shape, np.float32)
    power, own = np.mean(np.square(audio, dtype=np.float64)), np.mean(np.square(noise, dtype=np.float64))
    scale = np.sqrt(power / own) * 10 ** (-level / 20)
    return (audio + np.float32(scale) * noise).astype(np.float32)


def drop_audio(audio: np.ndarray, level: float, rng: np.random.Generator, rate: int) -> np.ndarray:
    """Silences each tenth of a second with probability `level`. rate: samples a second."""
    length = max(1, round(_SEGMENT * rate))
    gone = rng.uniform(size=-(-len(audio) // length)) < level
    return np.where(np.repeat(gone, length)[: len(audio)], np.float32(0), audio)


class Corruption(NamedTuple):
    """stream: what it hits. levels: by severity. change: (stream of one clip, level, rng, samples a second) → the same.

    Without `change`, level is the share of clips that are hit: "missing" ones lose the stream, "wrong" ones get the
    caption of another clip.
    """

    stream: str
    levels: tuple[float, ...]
    change: Callable | None = None


_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
# Levels of blur and noise: Hendrycks & Dietterich 2019 (ImageNet-C).
CORRUPTIONS = {
    "frame_drop": Corruption("video", (0.1, 0.2, 0.3, 0.5, 0.7), drop_frames),
    "blur": Corruption("video", (1.0, 2.0, 3.0, 4.0, 6.0), blur),
    "pixel_noise": Corruption("video", (0.08, 0.12, 0.18, 0.26, 0.38), add_noise),
    "audio_noise": Corruption("audio", (20.0, 15.0, 10.0, 5.0, 0.0), add_hiss),
    "audio_dropout": Corruption("audio", (0.1, 0.2, 0.3, 0.5, 0.7), drop_audio),
    "missing_video": Corruption("video", _SHARES),
    "missing_audio": Corruption("audio", _SHARES),
    "missing_text": Corruption("text", _SHARES),
    "wrong_caption": Corruption("text", _SHARES),
}


class Captions:
    """The captions of a whole dataset, for giving a clip another one's.

    texts: caption of each clip, "" where it has none. ids: int32 [n L].
    """

    def __init__(self, texts: Sequence[str], ids: np.ndarray):
        self.ids = ids
        _, self.same = np.unique(np.asarray(texts, dtype=str), return_inverse=True)
        self.there = np.flatnonzero([bool(text) for text in texts])
        self.differ = len({text for text in texts if text}) > 1

    def other(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """Returns the ids of the caption of a random clip whose caption is another.

        Raises:
          UserError: all clips have the same caption.
        """
        choice = self.there[self.same[self.there] != self.same[row]]
        if not len(choice):
            raise UserError("wrong_caption: all clips have one and the same caption; leave this corruption out")
        return self.ids[choice[int(rng.integers(len(choice)))]]


def corrupt(
    batch: Batch, rows: np.ndarray, name: str, severity: int, rate: int, captions: Captions | None = None, seed: int = 0
) -> Batch:
    """Returns the batch with one stream corrupted.

    Args:
      batch: on the host. rows: int [B], the clips' places in the manifest.
      name: of CORRUPTIONS. severity: of SEVERITIES. rate: audio samples a second.
      captions: for "wrong_caption".

    Raises:
      UserError: an unknown name or severity.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"corruption: unknown name {name!r}; {one_of(name, CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise UserError(f"corruption {name}: severity is 1 to {len(SEVERITIES)}, got {severity}")
    stream, levels, change = CORRUPTIONS[name]
    level, place = levels[severity - 1], list(CORRUPTIONS).index(name)
    values, present = np.array(batch.inputs[stream]), np.array(batch.present[stream])
    for i in np.flatnonzero(present & batch.valid):
        rng = np.random.default_rng([seed, place, int(rows[i])])
        if change is not None:
            values[i] = change(values[i], level, rng, rate)
        elif rng.uniform() < level:
            if name == "wrong_caption":
                values[i] = captions.other(int(rows[i]), rng)
            else:
                present[i] = False
                values[i] = 0
    return batch._replace(inputs=batch.inputs | {stream: values}, present=batch.present | {stream: present})
