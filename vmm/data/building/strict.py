"""Decoding for a build: where training keeps whatever decodes, here every doubt is a reason to leave a clip out.

A DecodeError is raised for pictures or sound that the decoder marks as damaged, that stand behind
an error, that run backwards in time, or that end before the container says so.
"""

import math
import re
from collections.abc import Iterator
from io import BytesIO
from typing import NamedTuple

import av
import numpy as np

from vmm.data import media
from vmm.data.media import DecodeError

TICK = 1e-6  # seconds by which rounded times may differ
_LINEAR = ("avi", "mpegts", "mpeg")  # seeks miss, or times are only known by counting: decoded from the beginning
# Bare streams: they tell no length (what FFmpeg gives is a guess from the bit rate), and tags may trail.
BARE = ("mp3", "aac", "ac3", "eac3", "amr", "h264", "hevc", "mpegvideo", "obu", "dts", "truehd")
_PREROLL = 0.25  # seconds of sound decoded before the span: codecs overlap their blocks
_SHORT = 0.1  # seconds by which a header may promise too much
_HOLE = 0.1  # seconds without sound between two frames, above which they are no jitter of timestamps
_MARGIN = 1 << 20  # pixels
_HOLES = 0.1  # share of a sound that may be holes
_RATES = (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)  # that AAC and resampling keep as they are


class opened_bytes:
    """The container of bytes in memory; what breaks inside leaves as a DecodeError."""

    def __init__(self, data: bytes):
        self.opened = media.opened(BytesIO(data))

    def __enter__(self):
        try:
            return self.opened.__enter__()
        except media.BROKEN as error:
            raise decode_error(error) from None

    def __exit__(self, kind, error, _):
        self.opened.__exit__()
        if isinstance(error, media.BROKEN):
            raise decode_error(error) from None


def decode_error(error: Exception) -> DecodeError:
    """Returns the DecodeError of one of media.BROKEN."""
    return DecodeError(media.reason_of(error), _words(error))


def _words(error: Exception) -> str:
    return error.strerror if isinstance(error, av.FFmpegError) else str(error)


def strict_frames(container, stream, start: float, pixels: int = 0) -> Iterator[tuple]:
    """Yields (frame, seconds) in order, from at or before `start` on. pixels: of the largest frame, 0: no pictures.

    Raises:
      DecodeError: see above.
      what av raises, where nothing at all decodes.
    """
    if start > 0 and container.format.name not in _LINEAR:
        frames = _frames(container, stream, start, pixels)
        try:
            first = next(frames, None)
        except media.BROKEN:
            first = None
        if first is not None and first[1] <= start + TICK:
            yield first
            yield from frames
            return
        # The seek landed too late, or there is nothing so early: only the whole stream can tell.
    yield from _frames(container, stream, 0.0, pixels)


def _frames(container, stream, start: float, pixels: int) -> Iterator[tuple]:
    # The decoder counts memory, with margins; the picture itself is measured below.
    media.seek(container, stream, start, pixels and 2 * pixels + _MARGIN, {"err_detect": "explode"})
    last, failed = None, None
    for frames, error in media.decoded(container, stream):
        if error:
            if last is None:
                raise error
            failed = failed or f"after {last:.3f} s: {_words(error)}"
        for frame, time in frames:
            if time is None:
                raise DecodeError("damaged", "a frame without a time")
            if failed:
                raise DecodeError("damaged", failed)
            if last is not None and time < last - TICK and stream.type == "video":
                raise DecodeError("damaged", f"time runs backwards at {last:.3f} s")
            if pixels and frame.width * frame.height > pixels:
                raise DecodeError("too large", f"{frame.width}×{frame.height} pixels")
            last = time
            yield frame, time
    if failed and container.format.name not in BARE:
        raise DecodeError("truncated", failed)


def promised_end(container, stream) -> float | None:
    """Returns when a stream says that it ends, in seconds of the clip's clock; None: it does not say."""
    if container.format.name.startswith("matroska"):  # a tag, which most programs write; of the end, not the length
        return _tagged(stream.metadata.get("DURATION", ""), media.origin(container))
    if not stream.duration or not stream.time_base:
        return None
    length = float(stream.duration * stream.time_base)
    begin = float((stream.start_time or 0) * stream.time_base) - media.origin(container)
    return begin + length if 0 < length < media.LONGEST else None


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
    with opened_bytes(data) as container:
        wanted = [s for s in (media.video_stream(container), media.audio_stream(container)) if s is not None]
        if not wanted:
            raise DecodeError("no streams")
        promised = None if container.format.name in BARE else media.duration(container)
        there = 0.0
        try:
            for packet in container.demux(wanted):
                if packet.pts is not None:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base) - media.origin(container)
                    there = max(there, end)
        except media.BROKEN:
            pass  # what decoding will meet too
        return Length(there, promised)


class Sound(NamedTuple):
    """wave: float32 [channels S], one or two channels, from a clip's first moment on. rate: Hz."""

    wave: np.ndarray
    rate: int


def read_sound(data: bytes, first: float, until: float) -> Sound | None:
    """Returns the sound from `first` to `until` (seconds), silence where there is none; None: no sound there.

    Raises:
      DecodeError: it is there and cannot be read whole.
    """
    with opened_bytes(data) as container:
        stream = media.audio_stream(container)
        rate = stream.rate if stream.rate in _RATES else 48000
        layout = "mono" if stream.codec_context.channels == 1 else "stereo"
        tape = _Tape(rate, layout, container.format.name != "avi")
        for frame, time in strict_frames(container, stream, max(0.0, first - _PREROLL)):
            if time >= until:
                break
            if frame.is_corrupt:
                raise DecodeError("damaged", f"the sound at {time:.3f} s")
            tape.put(frame, time - first)
        tape.cut()
        if not tape.pieces:
            return None
        bare = container.format.name in BARE
        promised = promised_end(container, stream)
    end = tape.end + first
    # A guess from the bit rate is only believed where it is far off.
    check_end(end, promised / 2 if bare and promised else promised, until)
    if tape.holes > max(0.5, _HOLES * (end - first)):
        raise DecodeError("damaged", f"{tape.holes:.2f} s of {end - first:.2f} are holes in the sound")
    wave = tape.wave(until - first)
    if wave is None:
        return None
    if not np.isfinite(wave).all():
        raise DecodeError("damaged", "the sound is not finite")
    return Sound(np.clip(wave, -1, 1), rate)


class _Tape:
    """Sound on its way to one array: resampled, and placed by its timestamps where it is not contiguous."""

    def __init__(self, rate: int, layout: str, timed: bool):
        self.rate, self.layout, self.timed = rate, layout, timed
        self.pieces: list[tuple[int, np.ndarray]] = []  # (place, float32 [channels S])
        self.kind, self.place, self.end, self.holes, self.begun = None, 0, 0.0, 0.0, False

    def put(self, frame, time: float) -> None:
        """Adds a frame. time: seconds after the clip's start, negative before it."""
        kind = frame.format.name, frame.layout.name, frame.sample_rate
        hole = time - self.end if self.begun and self.timed else 0.0
        if hole < -_HOLE:
            raise DecodeError("damaged", f"the sound's time runs backwards by {-hole:.2f} s")
        if not self.begun or hole > _HOLE or kind != self.kind:
            self.cut()
            # Jitter is not followed, or every rounded timestamp would click.
            if not self.begun or hole > _HOLE:
                self.place, self.end = round(time * self.rate), time
            self.holes += hole if hole > _HOLE else 0.0
            self.resampler = av.AudioResampler(format="fltp", layout=self.layout, rate=self.rate)
            self.kind, self.begun = kind, True
        self.end += frame.samples / frame.sample_rate
        frame.pts = None
        self._keep(self.resampler.resample(frame))

    def cut(self) -> None:
        """What comes next is not contiguous."""
        if self.begun:
            self._keep(self.resampler.resample(None))

    def _keep(self, pieces) -> None:
        for piece in pieces:
            values = piece.to_ndarray()
            self.pieces.append((self.place, values))
            self.place += values.shape[1]

    def wave(self, seconds: float) -> np.ndarray | None:
        """Returns float32 [channels S] from the clip's start on, at most `seconds` of it; None: nothing is there."""
        end = max(place + piece.shape[1] for place, piece in self.pieces)
        end = min(end, round(seconds * self.rate)) if math.isfinite(seconds) else end
        if end <= 0:
            return None
        wave = np.zeros((len(self.pieces[0][1]), end), np.float32)
        for place, piece in self.pieces:
            low, high = max(0, place), min(end, place + piece.shape[1])
            if low < high:
                wave[:, low:high] = piece[:, low - place : high - place]
        return wave
