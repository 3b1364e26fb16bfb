"""Pictures and sound → the file that is stored: small, upright, quick to decode from any place."""

import io
import math
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

from vmm.data.building.duplicates import picture_hash
from vmm.data.building.strict import Sound
from vmm.data.reading.geometry import pose, upright
from vmm.data.reading.problems import DecodeError

TIME_BASE = Fraction(1, 90000)  # of stored pictures: any frame rate, variable ones too
_FRAME_DURATION = 1 << 8  # AV_CODEC_FLAG_FRAME_DURATION: how long each picture is shown reaches the file
_LONGEST_PICTURE = 3600.0  # seconds; a picture that claims to last longer lasts as the one before it


class Storage(NamedTuple):
    """How clips are stored.

    keep: the original bytes, not transcoded. short_side: pixels, never scaled up. gop: frames between key frames.
    quality: x264's constant rate factor. cut: "whole", "windows" or "shots", for clips without a given span.
    seconds: length of a window; of a shot, at most. shortest: seconds below which a piece is no clip of its own.
    pixels: of a frame, frames: of a clip, bytes: of a source file; above, a file is "too large".
    """

    keep: bool = False
    short_side: int = 256
    gop: int = 30
    quality: int = 21
    cut: str = "whole"
    seconds: float = 10.0
    shortest: float = 0.5
    pixels: int = 8192 * 8192
    frames: int = 50000
    bytes: int = 4 << 30


class Store:
    """Writes one clip as H.264 + AAC in mp4, in memory; with storage.keep it only counts and hashes.

    count: pictures. seconds: how long they last. width, height: of the stored pictures. hashes: one a second.
    """

    def __init__(self, storage: Storage, sound: Sound | None, ratio: float):
        """sound: known before the first picture, as a container's streams are declared at once. ratio: width of a
        pixel to its height."""
        self.storage, self.sound, self.ratio, self.file, self.fed = storage, sound, ratio, io.BytesIO(), 0
        self.count, self.seconds, self.width, self.height = 0, 0.0, None, None
        self.hashes, self.hashed = [], -math.inf
        self.waiting = None  # (frame, tick) of the newest picture: how long it lasts is told by the next one
        self.gap = 0.0  # seconds between the last two pictures of the file
        self.container = self.video = self.audio = None

    def __enter__(self):
        if not self.storage.keep:
            self.container = av.open(self.file, "w", format="mp4")
        return self

    def __exit__(self, kind, error, _):
        container, self.container = self.container, None
        if container is not None and kind is None:
            container.close()

    def picture(self, frame, time: float, gap: float) -> None:
        """Adds a picture.

        Args:
          time: seconds after the clip's start; one at the same time replaces the last.
          gap: seconds since the picture before it, stored or not; 0: there is none.
        """
        self.gap = gap
        tick = round(time / TIME_BASE)
        if self.waiting is not None and tick > self.waiting[1]:
            self._write(tick)
        self.waiting = frame, tick

    def end_pictures(self, seconds: float, more: bool) -> None:
        """All pictures came. seconds: the clip's length, at most. more: the file goes on after it."""
        if self.waiting is None:
            return
        frame, tick = self.waiting
        if not more:
            own = float(frame.duration * frame.time_base) if frame.duration else 0.0
            own = own if 0 < own < _LONGEST_PICTURE else self.gap
            seconds = min(seconds, float(tick * TIME_BASE) + (own or 1 / 25))
        end = max(tick + 1, round(seconds / TIME_BASE))
        self._write(end)
        self.seconds, self.waiting = float(end * TIME_BASE), None
        if self.video is not None:
            self.container.mux(self.video.encode(None))

    def end_sound(self) -> None:
        """Writes what is left of the sound."""
        if self.sound is not None and self.container is not None:
            self._begin_sound()
            self._feed(math.inf)
            self.container.mux(self.audio.encode(None))

    def bytes(self) -> bytes:
        """Returns the file, once the store is closed."""
        return self.file.getvalue()

    def _write(self, end: int) -> None:
        """Encodes the picture that waits; it is shown until tick `end`."""
        frame, tick = self.waiting
        if frame.is_corrupt:
            raise DecodeError("damaged", f"the picture {float(tick * TIME_BASE):.3f} s after the clip's start")
        self.count += 1
        if self.count > self.storage.frames:
            raise DecodeError("too large", f"over {self.storage.frames} pictures")
        if tick * TIME_BASE - self.hashed >= 1:
            self.hashes.append(picture_hash(frame))
            self.hashed = tick * TIME_BASE
        if self.container is None:
            return
        shown = self._scaled(frame)
        if self.video is None:
            self._begin_pictures(shown)
        elif (shown.width, shown.height) != (self.width, self.height):  # the size changes within the file
            shown = shown.reformat(self.width, self.height, threads=1)
        shown.pts, shown.duration, shown.time_base, shown.pict_type = tick, end - tick, TIME_BASE, 0
        self.container.mux(self.video.encode(shown))
        self._feed(float(tick * TIME_BASE) + 1.0)

    def _scaled(self, frame):
        """Returns the picture upright, with square pixels and even sides, in 4:2:0."""
        height, width = frame.height, frame.width * self.ratio
        scale = min(1.0, self.storage.short_side / min(height, width))
        width, height = (max(2, round(side * scale / 2) * 2) for side in (width, height))
        if width * height > self.storage.pixels:
            raise DecodeError("too large", f"{width}×{height} pixels, once they are square")
        if pose(frame) == (0, False):  # stored as it is shown
            return frame.reformat(width, height, "yuv420p", threads=1)
        pixels = upright(frame, frame.reformat(width, height, "rgb24", threads=1).to_ndarray())
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24").reformat(format="yuv420p", threads=1)

    def _begin_pictures(self, shown) -> None:
        self.width, self.height = shown.width, shown.height
        self.video = self.container.add_stream("libx264", rate=30)
        self.video.width, self.video.height, self.video.pix_fmt = shown.width, shown.height, "yuv420p"
        self.video.time_base = self.video.codec_context.time_base = TIME_BASE
        self.video.thread_type = "NONE"
        self.video.codec_context.flags |= _FRAME_DURATION
        # Numbers are stored as they are: how they mean colours must be told again.
        for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
            setattr(self.video.codec_context, name, getattr(shown, name))
        self.video.options = {
            "preset": "veryfast", "tune": "fastdecode", "crf": str(self.storage.quality),
            "g": str(self.storage.gop), "threads": "1", "x264-params": "mbtree=0",
        }  # fmt: skip
        self._begin_sound()

    def _begin_sound(self) -> None:
        if self.sound is not None and self.audio is None:
            wave, rate = self.sound
            layout = "mono" if len(wave) == 1 else "stereo"
            self.audio = self.container.add_stream("aac", rate=rate, layout=layout, bit_rate=64000 * len(wave))
            self.audio.options = {"aac_coder": "fast"}  # the default overshoots where a sound sets in

    def _feed(self, seconds: float) -> None:
        """Encodes the sound up to a time, so that it lies beside its pictures in the file."""
        if self.sound is None:
            return
        wave, rate = self.sound
        while self.fed < min(wave.shape[1], seconds * rate):
            piece = np.ascontiguousarray(wave[:, self.fed : self.fed + rate])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=self.audio.layout.name)
            frame.sample_rate, frame.pts, frame.time_base = rate, self.fed, Fraction(1, rate)
            self.container.mux(self.audio.encode(frame))
            self.fed += piece.shape[1]
