"""A media file → the pixels and the sound of one window of time, by presentation time.

What is decoded is what vmm/data/reading gives, leniently: training and embedding keep whatever decodes, and count what
they had to replace, drop, guess or stretch. A build reads with the same core, strictly (vmm/data/building/strict.py).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vmm.data.reading.decode import frames as frames_from
from vmm.data.reading.decode import open_decoder, seek
from vmm.data.reading.geometry import Crop, picture, pixel_ratio
from vmm.data.reading.open import Medium
from vmm.data.reading.problems import BROKEN, REASONS, REMARKS, DecodeError, present, reason_of
from vmm.data.reading.sound import PREROLL, window_sound
from vmm.data.reading.timeline import COUNTED, length_of, measured
from vmm.data.skipping import shown_at
from vmm.errors import UserError

__all__ = (
    "BROKEN", "REASONS", "REMARKS", "Crop", "DecodeError", "Media", "Medium", "check_size", "decode", "probe_duration", "reason_of",
)  # fmt: skip

_MAX_PIXELS = 8192 * 8192
_PIXELS, _SECONDS = 2**28, 86400  # of one window: 768 MiB of bytes, a day
_HELD = 0.5  # seconds for which the last picture stands after it ended; beyond, there is no video any more
_SHORT = 0.1  # seconds that a window may be longer than the file, or begin before the pictures, without a word


class Media(NamedTuple):
    """The decoded window. video: uint8 [T H W 3] or None; audio: float32 [S] or None.

    remarks: what decoding had to do that is not in the file, name (see REMARKS) → how often.
    """

    video: np.ndarray | None
    audio: np.ndarray | None
    remarks: Mapping[str, int] = {}


def probe_duration(source: str | Path | BinaryIO) -> float | None:
    """Returns a file's length in seconds: the container's own, that of its packets where it tells none that can be true;
    None where there are none. Raises one of BROKEN."""
    with Medium(source) as medium:
        return length_of(medium)


def decode(
    source: str | Path | BinaryIO,
    *,
    pick: Callable[[float | None], float],
    seconds: float,
    frames: int,
    size: int,
    sample_rate: int,
    crop: Crop = Crop(),
    want: tuple[str, ...] = ("video", "audio"),
    known: float | None = None,
    tracks: Mapping[str, int] = {},
) -> Media:
    """Decodes one window of a file.

    Frame i of the result is what a viewer sees at the middle of the window's i-th part; sample j
    of the sound is what is heard at start + j / sample_rate. Time runs from the container's
    first timestamp. Sound that begins late or ends early is silence there.

    Args:
      source: a path, or an open binary file.
      pick: function of the file's length (seconds, None if unknown) that returns the window's start. Called a second
        time, with the length of what is there, where the container promised more.
      seconds: length of the window.
      frames: T, the frames wanted in it.
      size: height and width of the result; the short side of what `crop` keeps is scaled to it.
      sample_rate: of the returned sound, in Hz; it is the mean of all channels.
      crop: the part of each frame that is kept.
      want: modalities to decode.
      known: the file's length, used where its container tells none that can be believed.
      tracks: "video" or "audio" → which stream of its kind, from 0; default: what players take.

    Raises:
      DecodeError: nothing of what is wanted could be decoded, or the window lies outside the file.
    """
    remarks = Counter()
    window = _Window(seconds, frames, size, sample_rate, crop, want)
    try:
        with Medium(source, tracks) as medium:
            if medium.stream("video") is None and medium.stream("audio") is None:
                raise DecodeError("no streams")
            medium.note_tracks(remarks)
            length = length_of(medium, known, remarks)
            start = max(0.0, float(pick(length)))
            before = Counter(remarks)
            found = None
            if length is None or start < length:
                found = window.read(medium, start, remarks)
            if found is None:  # headers lie: is there anything at all?
                length = measured(medium, tuple(want))
                start = max(0.0, float(pick(length)))
                if start >= length > 0:
                    raise DecodeError("span outside", f"begins at {start:g} s of {length:g}")
                remarks = before + Counter({"length corrected": 1})
                found = window.read(medium, start, remarks)
    except BROKEN as error:
        raise DecodeError(reason_of(error), str(error)) from None
    if found is None:
        raise DecodeError("no frames")
    if length is not None and start + seconds > length + _SHORT:
        remarks["ends early"] += 1
    return Media(*found, present(remarks))


class _Window(NamedTuple):
    """What is wanted of a file; see decode."""

    seconds: float
    frames: int
    size: int
    sample_rate: int
    crop: Crop
    want: tuple[str, ...]

    def read(self, medium: Medium, start: float, remarks: Counter) -> tuple | None:
        """Returns (video, audio), either may be None, and None for both; raises one of BROKEN."""
        found, failed = {"video": None, "audio": None}, None
        # Where both begin at the beginning, the sound comes first: it cannot be sought without loss, pictures can.
        kinds = ("audio", "video") if start <= PREROLL else ("video", "audio")
        for kind in kinds:
            if kind not in self.want or medium.stream(kind) is None:
                continue
            try:
                found[kind] = (self._video if kind == "video" else self._audio)(medium, start, remarks)
            except BROKEN as error:  # the other may still be good
                failed = failed or error
                remarks["pictures lost" if kind == "video" else "sound lost"] += 1
        video, audio = found["video"], found["audio"]
        if video is None and audio is None and failed is not None:
            raise failed
        return None if video is None and audio is None else (video, audio)

    def _audio(self, medium: Medium, start: float, remarks: Counter) -> np.ndarray | None:
        wave = window_sound(medium, start, self.seconds, self.sample_rate, remarks)
        remarks["sound elsewhere"] += wave is None
        return wave

    def _video(self, medium: Medium, start: float, remarks: Counter) -> np.ndarray | None:
        targets = [start + (i + 0.5) * self.seconds / self.frames for i in range(self.frames)]
        shown = _shown_quickly(medium, start, targets) or _shown(medium, start, targets, remarks)
        if shown is None:
            return None
        ratio = pixel_ratio(medium.stream("video"))
        pictures, last = [], (None, None)
        for frame in shown:
            if frame is not last[0]:
                last = (frame, picture(frame, self.size, self.crop, ratio))
            pictures.append(last[1])
        return np.stack(pictures)


def _shown_quickly(medium: Medium, start: float, targets: list[float]) -> list | None:
    """Returns the frames shown at some moments, None where only decoding every picture can tell."""
    try:
        if medium.format in ("avi", *COUNTED):  # no times to plan by, see Clock
            return None
        stream = open_decoder(medium, "video", pixels=_MAX_PIXELS)
        if start > 0 or not medium.fresh:
            seek(medium, stream, start)
        medium.fresh = False
        found = shown_at(medium.container, stream, targets, medium.origin)
        if not found:
            return None
        # The last picture of a file that ends before the window: whoever decodes all of them can tell.
        frame, base = found[0], float(stream.time_base)
        end = (frame.pts + (frame.duration or 0)) * base - medium.origin
        return None if found[-1] is frame and end <= start - _HELD else found
    except BROKEN:
        return None


def _shown(medium: Medium, start: float, targets: list[float], remarks: Counter) -> list | None:
    """Returns the frames shown at some moments, the first one before it begins; None: there are none, or no more."""
    shown, times = [None] * len(targets), [-math.inf] * len(targets)
    first, last, step = None, -math.inf, 0.0
    for frame, time in frames_from(medium, "video", start, pixels=_MAX_PIXELS, remarks=remarks):
        if first is None or time < first[1]:
            first = (frame, time)
        for i, target in enumerate(targets):
            if times[i] < time <= target:
                shown[i], times[i] = frame, time
        step, last = (time - last if last < time and last > -math.inf else step), max(last, time)
        if time > targets[-1]:
            break
    else:
        if first is None:
            return None
        own = (frame.duration or 0) * float(medium.stream("video").time_base)
        if last + max(own, step) <= start - _HELD:
            remarks["pictures end early"] += 1
            return None
    if first[1] > targets[0] + _SHORT:
        remarks["starts late"] += 1
    return [frame or first[0] for frame in shown]


def check_size(size: int, frames: int, seconds: float) -> None:
    """Raises UserError for a window that holds nothing, or more than any memory."""
    if size < 1 or frames < 1 or not 0 < seconds < math.inf:
        raise UserError(f"data.clip: size {size}, frames {frames} and seconds {seconds} must be positive")
    if frames * size**2 > _PIXELS or seconds > _SECONDS:
        raise UserError(
            f"data.clip: {frames} frames of {size} × {size} in {seconds:g} s are more than {_PIXELS:,} pixels or "
            f"{_SECONDS:,} s; take shorter or smaller windows"
        )
