"""Decoding for a build: where training keeps whatever decodes, here every doubt is a reason to leave a clip out.

The frames are those of vmm/data/reading, read strictly: a DecodeError is raised for pictures or sound that the decoder
marks as damaged, that stand behind an error, that run backwards in time, or that end before the container says so.
"""

import math
import re
from collections import Counter
from io import BytesIO
from typing import NamedTuple

import numpy as np

from vmm.data.reading.decode import TICK, decode_error, frames
from vmm.data.reading.open import Medium
from vmm.data.reading.problems import BROKEN, DecodeError
from vmm.data.reading.sound import PREROLL, Tape
from vmm.data.reading.timeline import BARE, LONGEST, duration, measured

__all__ = ("BARE", "TICK", "Length", "Sound", "check_end", "decode_error", "measure", "opened_bytes", "promised_end", "read_sound", "strict_frames")  # fmt: skip

_SHORT = 0.1  # seconds by which a header may promise too much
_HOLES = 0.1  # share of a sound that may be holes
_RATES = (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)  # that AAC and resampling keep as they are


class opened_bytes:
    """The Medium of bytes in memory; what breaks inside leaves as a DecodeError."""

    def __init__(self, data: bytes):
        self.medium = Medium(BytesIO(data))

    def __enter__(self) -> Medium:
        try:
            return self.medium.__enter__()
        except BROKEN as error:
            raise decode_error(error) from None

    def __exit__(self, kind, error, _):
        self.medium.__exit__()
        if isinstance(error, BROKEN):
            raise decode_error(error) from None


def strict_frames(medium: Medium, start: float, pixels: int, remarks: Counter | None = None):
    """Yields (picture, seconds) in order, from at or before `start` on; raises as reading.decode.frames, strictly."""
    return frames(medium, "video", start, strict=True, pixels=pixels, remarks=remarks)


def promised_end(medium: Medium, kind: str) -> float | None:
    """Returns when a stream says that it ends, in seconds of the clip's clock; None: it does not say."""
    stream = medium.stream(kind)
    if medium.format == "matroska":  # a tag, which most programs write; of the end, not the length
        return _tagged(stream.metadata.get("DURATION", ""), medium.origin)
    if not stream.duration or not stream.time_base or medium.format in BARE:  # those guess
        return None
    length = float(stream.duration * stream.time_base)
    begin = float((stream.start_time or 0) * stream.time_base) - medium.origin
    return begin + length if 0 < length < LONGEST else None


def _tagged(text: str, origin: float) -> float | None:
    """Returns the seconds of "00:01:02.500000000" after the first timestamp, None of anything else."""
    match = re.fullmatch(r"(\d{2}):(\d{2}):(\d{2}\.\d+)\0?", text)
    if match is None:
        return None
    hours, minutes, seconds = (float(part) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds - max(0.0, origin) or None


def check_end(end: float, promised: float | None, until: float, slack: float = 0.0) -> None:
    """Raises DecodeError where what decoded ends before it should. slack: seconds that one frame lasts."""
    due = math.inf if promised is None else min(promised, until)
    if math.isfinite(due) and end < due - max(_SHORT, slack):
        raise DecodeError("truncated", f"{end:.2f} s of {due:.2f}")


class Length(NamedTuple):
    """Seconds from the first timestamp. there: where the last packet ends. promised: what the container says."""

    there: float
    promised: float | None


def measure(data: bytes) -> Length:
    """Returns how long a file is, by its packets: headers lie."""
    with opened_bytes(data) as medium:
        if medium.stream("video") is None and medium.stream("audio") is None:
            raise DecodeError("no streams")
        promised = None if medium.format in BARE else duration(medium.container, medium.origin)
        return Length(measured(medium), promised)


class Sound(NamedTuple):
    """wave: float32 [channels S], one or two channels, from a clip's first moment on. rate: Hz."""

    wave: np.ndarray
    rate: int


def read_sound(data: bytes, first: float, until: float, remarks: Counter | None = None) -> Sound | None:
    """Returns the sound from `first` to `until` (seconds), silence where there is none; None: no sound there.

    Of more than two channels, each of two is the mean of its side (see reading.sound.mix_weights).

    Raises:
      DecodeError: it is there and cannot be read whole.
    """
    with opened_bytes(data) as medium:
        if remarks is not None:
            medium.note_tracks(remarks)
        stream = medium.stream("audio")
        rate = stream.rate if stream.rate in _RATES else 48000
        tape = Tape(min(2, stream.codec_context.channels), rate, medium.timed, strict=True)
        before = max(0.0, first - PREROLL)
        for frame, time in frames(medium, "audio", before, strict=True, pixels=0, latest=before, remarks=remarks):
            if time >= until:
                break
            if frame.is_corrupt:
                raise DecodeError("damaged", f"the sound at {time:.3f} s")
            tape.put(frame, time - first)
        if not tape.runs:
            return None
        promised = promised_end(medium, "audio")
    end = tape.end + first
    check_end(end, promised, until)
    if tape.holes > max(0.5, _HOLES * (end - first)):
        raise DecodeError("damaged", f"{tape.holes:.2f} s of {end - first:.2f} are holes in the sound")
    if tape.holes and remarks is not None:
        remarks["holes in the sound"] += 1
    wave = tape.wave(until - first)
    if wave is None:
        return None
    if not np.isfinite(wave).all():
        raise DecodeError("damaged", "the sound is not finite")
    return Sound(np.clip(wave, -1, 1), rate)
