"""A media file → the pixels and the sound of one window of time, by presentation time.

Files are untrusted: they are opened as file objects, so that no name is taken for a URL or a
playlist; a limit bounds the pixels of a frame; every way in which a broken file fails is turned
into one `DecodeError` with a reason.
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np

from vmm.data.skipping import shown_at
from vmm.errors import UserError

# Containers of media proper: no playlists (hls, concat, dash), no devices, no image lists.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,mpegvideo,asf,ogg,wav,w64,mp3,flac,"
    "aac,ac3,eac3,aiff,caf,amr,h264,hevc,av1,obu,ivf,gif,rm,nut,mxf,dv,vc1,aa,tta,ape,wv"
)
_MAX_PIXELS = 8192 * 8192
LONGEST = 1e7  # seconds; a duration above this (116 days) is a broken header
_LANDS_LATE = 10.0  # seconds by which a seek may miss in a container without an index
_PLANES = ("yuv420p", "yuvj420p")  # formats of which a part is cut without arithmetic
# A title in another encoding is no reason to lose the clip; PyAV 19 takes it as it is.
_TITLES = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
_PREROLL = 0.25  # seconds of sound decoded before the window, for codecs with overlap


class DecodeError(Exception):
    """A file gave nothing that can be used. `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


REASONS = ("missing", "unreadable", "undecodable", "no streams", "no frames", "too large", "changed")


# Every way in which a broken file fails; an IndexError of packets whose stream shows up as late as they do.
BROKEN = (av.FFmpegError, OSError, UnicodeDecodeError, MemoryError, ValueError, EOFError, OverflowError, IndexError)


class Crop(NamedTuple):
    """Which part of a frame is kept.

    y, x: its place, fractions of the free range. area: share of the picture, None: the largest square.
    aspect: width to height of a part with an area; it is squeezed into a square. flip: mirrored.
    """

    y: float = 0.5
    x: float = 0.5
    area: float | None = None
    aspect: float = 1.0
    flip: bool = False

    def sides(self, height: int, width: int) -> tuple[float, float]:
        """Returns the height and width of the part, in pixels of the frame; what does not fit is cut."""
        if self.area is None:
            return min(height, width), min(height, width)
        root = math.sqrt(self.area * height * width)
        return min(height, root / math.sqrt(self.aspect)), min(width, root * math.sqrt(self.aspect))


class Media(NamedTuple):
    """The decoded window. video: uint8 [T H W 3] or None; audio: float32 [S] or None."""

    video: np.ndarray | None
    audio: np.ndarray | None


def probe_duration(source: str | Path | BinaryIO) -> float | None:
    """Returns the container's own length in seconds, None where it tells none that can be true."""
    with opened(source) as container:
        return duration(container)


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
        with opened(source) as container:
            seen, heard = video_stream(container), audio_stream(container)
            if seen is None and heard is None:
                raise DecodeError("no streams")
            start = max(0.0, float(pick(duration(container))))
            video = audio = failed = None
            if "video" in want and seen is not None:
                try:
                    video = _video(container, seen, start, seconds, frames, size, crop)
                    if video is None and start > 0:
                        # The header promised more than there is: the beginning stands in.
                        start = 0.0
                        video = _video(container, seen, start, seconds, frames, size, crop)
                except BROKEN as error:  # the sound may still be good
                    failed = error
            if "audio" in want and heard is not None:
                try:
                    audio = _audio(container, heard, start, seconds, sample_rate)
                except BROKEN as error:
                    failed = failed or error
            if video is None and audio is None and failed:
                raise failed
    except BROKEN as error:
        raise DecodeError(reason_of(error), str(error)) from None
    if video is None and audio is None:
        raise DecodeError("no frames")
    return Media(video, audio)


def reason_of(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "too large"
    if isinstance(error, av.FFmpegError):  # its classes share names with the errors of files
        return "undecodable"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "missing"
    if isinstance(error, (PermissionError, IsADirectoryError)):
        return "unreadable"
    return "undecodable"


class opened:
    """Opens a container through a file object of our own, and closes both. Entering raises one of BROKEN."""

    def __init__(self, source: str | Path | BinaryIO):
        self.source = source

    def __enter__(self):
        self.file = open(self.source, "rb") if isinstance(self.source, (str, Path)) else self.source
        try:
            self.container = av.open(
                self.file,
                options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"},
                **_TITLES,
            )
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


def video_stream(container):
    """Returns the stream of moving pictures, None where there is none: a cover picture is no video."""
    attached = av.stream.Disposition.attached_pic
    return next((stream for stream in container.streams.video if not stream.disposition & attached), None)


def audio_stream(container):
    """Returns the first stream of sound, or None."""
    return next(iter(container.streams.audio), None)


def origin(container) -> float:
    """Returns the container's first timestamp in seconds, from which time runs."""
    return container.start_time / av.time_base if container.start_time is not None else 0.0


def duration(container) -> float | None:
    """Returns the container's own length in seconds, None where it tells none that can be true."""
    lengths = [container.duration / av.time_base] if container.duration else []
    # Of its streams only where the container does not say: subtitles may go on for longer.
    streams = [stream for stream in container.streams if stream.duration and stream.time_base]
    lengths += sorted((float(stream.duration * stream.time_base) for stream in streams), reverse=True)
    if container.format.name.startswith("matroska"):  # counts from 0, not from the first timestamp
        lengths = [length - max(0.0, origin(container)) for length in lengths]
    return next((length for length in lengths if 0 < length < LONGEST), None)


def frames_from(container, stream, start: float, pixels: int = _MAX_PIXELS):
    """Yields (frame, seconds) of the stream from at or before `start` on; an error after the first frame ends them.

    pixels: largest frame.
    """
    seek(container, stream, start, pixels)
    some = False
    for frames, error in decoded(container, stream):
        if error:
            # Many broken files fail only at their end: what decoded before is good.
            if not some:
                raise error
            break
        for frame, time in frames:
            if time is not None:
                some = True
                yield frame, time


def decoded(container, stream) -> Iterator[tuple[list, Exception | None]]:
    """Yields what each packet gives, from the container's present place on: ([(frame, seconds or None), …], None), or
    ([], what went wrong)."""
    clock, packets = Clock(container, stream), container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            clock.feed(packet)
            frames = packet.decode()
        except (av.FFmpegError, ValueError, EOFError, IndexError) as error:
            yield [], error
        else:
            yield [(frame, clock.time(frame)) for frame in frames], None


class Clock:
    """When decoded frames are shown, in seconds from the container's first timestamp.

    AVI has no presentation times, and those that FFmpeg makes up are out of order where pictures are stored out of
    order: there the n-th picture that comes out takes the n-th time that went in.
    """

    def __init__(self, container, stream):
        self.origin, self.base = origin(container), float(stream.time_base)
        self.times = deque() if container.format.name == "avi" and stream.type == "video" else None

    def feed(self, packet) -> None:
        if self.times is not None and packet.size and packet.dts is not None:
            self.times.append(packet.dts)

    def time(self, frame) -> float | None:
        """Returns the time of the next frame to come out, None where it has none."""
        if self.times is not None:
            return float(self.times.popleft()) * self.base - self.origin if self.times else None
        return None if frame.time is None else float(frame.time) - self.origin


def seek(container, stream, start: float, pixels: int, options: Mapping = {}) -> None:
    """Opens the stream's decoder and goes to a key frame at or before `start`.

    pixels: of the largest frame, 0: no limit. options: more of the decoder's.
    """
    context = stream.codec_context
    if context is None:
        raise ValueError("no decoder knows this stream")
    if not context.is_open:
        stream.thread_type = "NONE"  # the pipeline runs in parallel over clips
        context.thread_count = 1
        context.options = ({"max_pixels": str(pixels)} if pixels else {}) | dict(options)
    # MPEG-TS and program streams have no index: a seek lands after the key frame that is needed.
    early = _LANDS_LATE if container.format.name in ("mpegts", "mpeg") else 0.0
    target = start + origin(container) - early
    try:
        container.seek(int(target / float(stream.time_base)), stream=stream, backward=True)
    except av.FFmpegError:
        with contextlib.suppress(av.FFmpegError):
            container.seek(0)


def _video(container, stream, start: float, seconds: float, frames: int, size: int, crop: Crop):
    targets = [start + (i + 0.5) * seconds / frames for i in range(frames)]
    shown = _shown_quickly(container, stream, start, targets) or _shown(container, stream, start, targets)
    if shown is None:
        return None
    pictures, last = [], (None, None)
    for frame in shown:
        if frame is not last[0]:
            last = (frame, _picture(frame, size, crop))
        pictures.append(last[1])
    return np.stack(pictures)


def _shown_quickly(container, stream, start: float, targets: list[float]) -> list | None:
    """Returns the frames shown at some moments, None where only decoding every picture can tell."""
    try:
        if container.format.name == "avi":  # no times to plan by, see Clock
            return None
        seek(container, stream, start, _MAX_PIXELS)
        return shown_at(container, stream, targets, origin(container))
    except BROKEN:
        return None


def _shown(container, stream, start: float, targets: list[float]) -> list | None:
    """Returns the frames shown at some moments, the first one before it begins; None: there are no frames."""
    shown, times = [None] * len(targets), [-math.inf] * len(targets)
    first = None
    for frame, time in frames_from(container, stream, start, _MAX_PIXELS):
        if first is None or time < first[1]:
            first = (frame, time)
        for i, target in enumerate(targets):
            if times[i] < time <= target:
                shown[i], times[i] = frame, time
        if time > targets[-1]:
            break
    return None if first is None else [frame or first[0] for frame in shown]


def _picture(frame, size: int, crop: Crop) -> np.ndarray:
    """Returns the frame upright, scaled and cropped: uint8 [size size 3]."""
    turns, mirrored = _pose(frame)
    if not (turns or mirrored) and frame.format.name in _PLANES:
        pixels = _part(frame, crop).reformat(size, size, "rgb24", threads=1).to_ndarray()
        return np.ascontiguousarray(pixels[:, ::-1] if crop.flip else pixels)
    # The part that is kept becomes `size` × `size`: one scaling, then a slice.
    height, width = (frame.height, frame.width) if turns % 2 == 0 else (frame.width, frame.height)
    height, width = (
        max(size, round(whole * size / side)) for whole, side in zip((height, width), crop.sides(height, width))
    )
    if turns % 2:
        height, width = width, height
    pixels = frame.reformat(width, height, "rgb24", threads=1).to_ndarray()
    pixels = upright(frame, pixels)
    top = round(crop.y * (pixels.shape[0] - size))
    left = round(crop.x * (pixels.shape[1] - size))
    pixels = pixels[top : top + size, left : left + size]
    return np.ascontiguousarray(pixels[:, ::-1] if crop.flip else pixels)


def _part(frame, crop: Crop):
    """Returns the part of a 4:2:0 frame that is kept, to the nearest two pixels: what is cut off need not be scaled."""
    height, width = (max(2, 2 * round(side / 2)) for side in crop.sides(frame.height, frame.width))
    height, width = min(height, frame.height), min(width, frame.width)
    if (height, width) == (frame.height, frame.width) or width % 2 or height % 2:
        return frame
    top = 2 * round(crop.y * (frame.height - height) / 2)
    left = 2 * round(crop.x * (frame.width - width) / 2)
    planes = []
    for plane, half in zip(frame.planes, (1, 2, 2)):
        values = np.frombuffer(plane, np.uint8)
        values = values[: len(values) // plane.line_size * plane.line_size].reshape(-1, plane.line_size)
        planes.append(values[top // half : (top + height) // half, left // half : (left + width) // half].reshape(-1))
    part = av.VideoFrame.from_ndarray(np.concatenate(planes).reshape(height * 3 // 2, width), frame.format.name)
    part.colorspace, part.color_range = frame.colorspace, frame.color_range
    return part


def _pose(frame) -> tuple[int, bool]:
    """Returns (quarter turns to the left, whether it is mirrored top to bottom before them) of a stored frame."""
    turns = round(frame.rotation / 90) % 4
    mirrored = False
    if (matrix := frame.side_data.get("DISPLAYMATRIX")) is not None:
        a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
        mirrored = a * d - b * c < 0
    return turns, mirrored


def stands(frame) -> bool:
    """Whether a frame is stored as it is shown, neither turned nor mirrored."""
    return _pose(frame) == (0, False)


def upright(frame, pixels: np.ndarray) -> np.ndarray:
    """Returns pixels [H W C] of a frame as they are shown."""
    turns, mirrored = _pose(frame)
    return np.rot90(pixels[::-1] if mirrored else pixels, turns)


def _audio(container, stream, start: float, seconds: float, sample_rate: int):
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
        for frame, time in frames_from(container, stream, max(0.0, start - _PREROLL)):
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
