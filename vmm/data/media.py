"""A media file → the pixels and the sound of one window of time, by presentation time.

Files are untrusted: they are opened as file objects, so that no name is taken for a URL or a
playlist; a limit bounds the pixels of a frame; every way in which a broken file fails is turned
into one `DecodeError` with a reason.
"""

import contextlib
import math
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np

from vmm.errors import UserError

# Containers of media proper: no playlists (hls, concat, dash), no devices, no image lists.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,mpegvideo,asf,ogg,wav,w64,mp3,flac,"
    "aac,ac3,eac3,aiff,caf,amr,h264,hevc,av1,obu,ivf,gif,rm,nut,mxf,dv,vc1,aa,tta,ape,wv"
)
_MAX_PIXELS = 8192 * 8192
_MAX_SECONDS = 1e7  # a duration above this (116 days) is a broken header
_LANDS_LATE = 10.0  # seconds by which a seek may miss in a container without an index
_PREROLL = 0.25  # seconds of sound decoded before the window, for codecs with overlap


class DecodeError(Exception):
    """A file gave nothing that can be used. `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


REASONS = ("missing", "unreadable", "undecodable", "no streams", "no frames", "too large")


# Every way in which a broken file fails.
_BROKEN = (av.FFmpegError, OSError, UnicodeDecodeError, MemoryError, ValueError, EOFError, OverflowError)


class Crop(NamedTuple):
    """Which part of a frame is kept. Fractions of the free range in y and x, and of the short side."""

    y: float = 0.5
    x: float = 0.5
    scale: float = 1.0
    flip: bool = False


class Media(NamedTuple):
    """The decoded window. video: uint8 [T H W 3] or None; audio: float32 [S] or None."""

    video: np.ndarray | None
    audio: np.ndarray | None


def probe_duration(source: str | Path | BinaryIO) -> float | None:
    """Returns the container's own length in seconds, None where it tells none that can be true."""
    with _opened(source) as container:
        return _duration(container)


def decode(
    source: str | Path | BinaryIO,
    *,
    pick,
    seconds: float,
    frames: int,
    size: int,
    sample_rate: int,
    crop: Crop = Crop(),
    want: tuple[str, ...] = ("video", "audio"),
) -> Media:
    """Decodes one window of a file.

    Frame i of the result is what a viewer sees at the middle of the window's i-th part; sample j
    of the sound is what is heard at start + j / sample_rate. Time runs from the container's
    first timestamp. Sound that begins late or ends early is silence there.

    Args:
      source: a path, or an open binary file.
      pick: function of the file's length (seconds, None if unknown) that returns the window's start.
      seconds: length of the window.
      frames: T, the frames wanted in it.
      size: height and width of the result; the short side of what `crop` keeps is scaled to it.
      sample_rate: of the returned sound, in Hz; channels are mixed down.
      crop: the part of each frame that is kept.
      want: modalities to decode.

    Raises:
      DecodeError: nothing of what is wanted could be decoded.
    """
    try:
        with _opened(source) as container:
            if not container.streams.video and not container.streams.audio:
                raise DecodeError("no streams")
            start = max(0.0, float(pick(_duration(container))))
            video = audio = failed = None
            if "video" in want and container.streams.video:
                try:
                    video = _video(container, start, seconds, frames, size, crop)
                    if video is None and start > 0:
                        # The header promised more than there is: the beginning stands in.
                        start = 0.0
                        video = _video(container, start, seconds, frames, size, crop)
                except _BROKEN as error:  # the sound may still be good
                    failed = error
            if "audio" in want and container.streams.audio:
                try:
                    audio = _audio(container, start, seconds, sample_rate)
                except _BROKEN as error:
                    failed = failed or error
            if video is None and audio is None and failed:
                raise failed
    except _BROKEN as error:
        raise DecodeError(_reason(error), str(error)) from None
    if video is None and audio is None:
        raise DecodeError("no frames")
    return Media(video, audio)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "too large"
    if isinstance(error, av.FFmpegError):  # its classes share names with the errors of files
        return "undecodable"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "missing"
    if isinstance(error, (PermissionError, IsADirectoryError)):
        return "unreadable"
    return "undecodable"


class _opened:
    """Opens a container through a file object of our own, and closes both."""

    def __init__(self, source: str | Path | BinaryIO):
        self.source = source

    def __enter__(self):
        self.file = open(self.source, "rb") if isinstance(self.source, (str, Path)) else self.source
        try:
            self.container = av.open(self.file, options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"})
        except BaseException:
            self._close_file()
            raise
        return self.container

    def __exit__(self, *_):
        self.container.close()
        self._close_file()

    def _close_file(self):
        if self.file is not self.source:
            self.file.close()


def _origin(container) -> float:
    return container.start_time / av.time_base if container.start_time is not None else 0.0


def _duration(container) -> float | None:
    lengths = [container.duration / av.time_base] if container.duration else []
    for stream in container.streams:
        if stream.duration and stream.time_base:
            lengths.append(float(stream.duration * stream.time_base))
    lengths = [length for length in lengths if 0 < length < _MAX_SECONDS]
    return max(lengths) if lengths else None


def _frames(container, stream, start: float):
    """Yields the stream's frames from at or before `start` on; an error after the first frame ends them."""
    context = stream.codec_context
    if context is None:
        raise ValueError("no decoder knows this stream")
    if not context.is_open:
        stream.thread_type = "NONE"  # the pipeline runs in parallel over clips
        context.thread_count = 1
        context.options = {"max_pixels": str(_MAX_PIXELS)}
    # MPEG-TS and program streams have no index: a seek lands after the key frame that is needed.
    early = _LANDS_LATE if container.format.name in ("mpegts", "mpeg") else 0.0
    target = start + _origin(container) - early
    try:
        container.seek(int(target / float(stream.time_base)), stream=stream, backward=True)
    except av.FFmpegError:
        with contextlib.suppress(av.FFmpegError):
            container.seek(0)
    some = False
    try:
        for packet in container.demux(stream):
            for frame in packet.decode():
                if frame.time is not None:
                    some = True
                    yield frame, float(frame.time) - _origin(container)
    except (av.FFmpegError, ValueError, EOFError):
        # Many broken files fail only at their end: what decoded before is good.
        if not some:
            raise


def _video(container, start: float, seconds: float, frames: int, size: int, crop: Crop):
    stream = container.streams.video[0]
    targets = [start + (i + 0.5) * seconds / frames for i in range(frames)]
    shown, times = [None] * frames, [-math.inf] * frames
    first = None
    for frame, time in _frames(container, stream, start):
        if first is None or time < first[1]:
            first = (frame, time)
        for i, target in enumerate(targets):
            if times[i] < time <= target:
                shown[i], times[i] = frame, time
        if time > targets[-1]:
            break
    if first is None:
        return None
    pictures, last = [], (None, None)
    for frame in (frame or first[0] for frame in shown):
        if frame is not last[0]:
            last = (frame, _picture(frame, size, crop))
        pictures.append(last[1])
    return np.stack(pictures)


def _picture(frame, size: int, crop: Crop) -> np.ndarray:
    """Returns the frame upright, scaled and cropped: uint8 [size size 3]."""
    turns = round(frame.rotation / 90) % 4
    # The crop's short side becomes `size`: one scaling, then a slice.
    scale = size / (crop.scale * min(frame.width, frame.height))
    width, height = (max(size, round(side * scale)) for side in (frame.width, frame.height))
    pixels = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    pixels = np.rot90(pixels, turns) if turns else pixels
    top = round(crop.y * (pixels.shape[0] - size))
    left = round(crop.x * (pixels.shape[1] - size))
    pixels = pixels[top : top + size, left : left + size]
    return np.ascontiguousarray(pixels[:, ::-1] if crop.flip else pixels)


def _audio(container, start: float, seconds: float, sample_rate: int):
    stream = container.streams.audio[0]
    samples = round(seconds * sample_rate)
    wave = np.zeros(samples, np.float32)
    resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
    heard, place, kind = False, None, None

    def put(pieces):
        nonlocal heard, place
        for piece in pieces:
            values = piece.to_ndarray().reshape(-1)
            low, high = max(0, place), min(samples, place + len(values))
            if low < high:
                wave[low:high] = values[low - place : high - place]
                heard = True
            place += len(values)

    try:
        for frame, time in _frames(container, stream, max(0.0, start - _PREROLL)):
            if place is None:
                place = round((time - start) * sample_rate)
            frame.pts = None  # the sound is contiguous from its first frame on
            if kind not in (None, (frame.format.name, frame.layout.name, frame.sample_rate)):
                put(resampler.resample(None))  # another format from here on
                resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
            kind = frame.format.name, frame.layout.name, frame.sample_rate
            put(resampler.resample(frame))
            if place >= samples:
                break
        else:
            if place is not None:
                put(resampler.resample(None))
    except av.FFmpegError:
        if not heard:
            return None
    return np.clip(wave, -1.0, 1.0) if heard else None


def check_size(size: int, frames: int, seconds: float) -> None:
    """Raises UserError for a window that holds nothing."""
    if size < 1 or frames < 1 or seconds <= 0:
        raise UserError(f"data.clip: size {size}, frames {frames} and seconds {seconds} must be positive")
