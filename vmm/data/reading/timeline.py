"""When things are: lengths that can be believed, and times of frames that bring none."""

import functools
import os
from collections import Counter, deque
from pathlib import Path

import av

from vmm.data.reading.open import BARE, Medium
from vmm.data.reading.problems import BROKEN

LONGEST = 1e7  # seconds; a duration above this (116 days) is a broken header
# Bare pictures: no times at all, a picture is where it is counted.
COUNTED = ("h264", "hevc", "m4v", "mpegvideo", "vc1", "obu")
_RATE = 25.0  # pictures a second where a raw stream tells none


def duration(container, origin: float) -> float | None:
    """Returns the container's own length in seconds, None where it tells none that can be true."""
    lengths = [container.duration / av.time_base] if container.duration else []
    # Of its streams only where the container does not say: subtitles may go on for longer.
    streams = [stream for stream in container.streams if stream.duration and stream.time_base]
    lengths += sorted((float(stream.duration * stream.time_base) for stream in streams), reverse=True)
    if container.format.name.startswith("matroska"):  # counts from 0, not from the first timestamp
        lengths = [length - max(0.0, origin) for length in lengths]
    return next((length for length in lengths if 0 < length < LONGEST), None)


def length_of(medium: Medium, known: float | None = None, remarks: Counter | None = None) -> float | None:
    """Returns a medium's length in seconds: the container's own where it can be believed, else that of its packets.

    known: what the caller knows it to be, used in place of measuring. None: there are no packets.
    """
    length = duration(medium.container, medium.origin)
    if length is not None and medium.format not in BARE:
        return length
    if remarks is not None:
        remarks["length measured"] = 1
    return known if known is not None else measured(medium) or None


def measured(medium: Medium, kinds: tuple[str, ...] = ("video", "audio")) -> float:
    """Returns where the last packet of some streams ends, in seconds. Reads the whole file, once for a path."""
    source = medium.source
    if isinstance(source, (str, Path)):
        state = os.fstat(medium.file.fileno())
        key = (str(source), state.st_size, state.st_mtime_ns, kinds, tuple(sorted(medium.tracks.items())))
        found = _lengths().get(key)
        if found is None:
            found = _lengths()[key] = _walk(medium, kinds)
            if len(_lengths()) > _KEPT:
                _lengths().pop(next(iter(_lengths())), None)
        return found
    return _walk(medium, kinds)


_KEPT = 1 << 16  # lengths kept in memory


@functools.cache
def _lengths() -> dict:
    return {}


def _walk(medium: Medium, kinds: tuple[str, ...]) -> float:
    medium.rewind()
    streams = [stream for stream in map(medium.stream, kinds) if stream is not None]
    end, counts = 0.0, Counter()
    medium.fresh = False
    try:
        for packet in medium.container.demux(streams) if streams else ():
            stamp = packet.dts if packet.pts is None else packet.pts
            counts[packet.stream.index] += bool(packet.size)
            if stamp is not None and packet.time_base:
                end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base) - medium.origin)
    except BROKEN:
        pass  # what decoding will meet too
    if medium.format in COUNTED and streams:
        end = max(counts.values(), default=0) / raw_rate(streams[0])[0]
    medium.rewind()
    return end


def mp3_seconds(data: bytes, rate: int) -> float | None:
    """Returns how long an MP3 says that it is, in the header that encoders write (Xing, Info); None: it does not say."""
    begin = 0
    if data[:3] == b"ID3":
        begin = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0)))
    head = data[begin : begin + 4096]
    place = max(head.find(b"Xing"), head.find(b"Info"))
    if place < 0 or len(head) < place + 12 or not head[place + 7] & 1 or rate <= 0:
        return None
    count = int.from_bytes(head[place + 8 : place + 12], "big")
    return count * (1152 if rate >= 32000 else 576) / rate or None


def raw_rate(stream) -> tuple[float, bool]:
    """Returns (pictures a second of a raw stream, whether it tells them itself)."""
    context = stream.codec_context
    rate = context.framerate if context is not None else None
    rate = float(rate) if rate else 0.0
    return (rate, True) if 0 < rate < 1000 else (_RATE, False)


def reorder_depth(stream) -> int | None:
    """Returns for how many packets a decoder keeps a picture back; None where that varies."""
    context = stream.codec_context
    if context.name in ("h264", "hevc", "vvc", "av1", "libdav1d"):
        return None
    return int(bool(context.has_b_frames))


class Clock:
    """When decoded frames are shown, in seconds from the container's first timestamp.

    AVI has no presentation times, and those that FFmpeg makes up are out of order where pictures are stored out of
    order: there the n-th picture that comes out takes the n-th time that went in, and a picture that did not come out
    (behind a seek, or damaged) takes one with it. Raw streams are counted. Elsewhere a frame without a time of its own
    follows the one before.
    """

    def __init__(self, medium: Medium, kind: str, remarks: Counter):
        stream = medium.stream(kind)
        self.kind, self.remarks = kind, remarks
        self.origin, self.base, self.begin = medium.origin, float(stream.time_base), medium.begins(kind)
        self.waiting = deque() if medium.format == "avi" and kind == "video" else None
        self.fed, self.depth = 0, reorder_depth(stream) if self.waiting is not None else None
        self.rate = None
        if kind == "video" and medium.format in COUNTED:
            self.rate, known = raw_rate(stream)
            if not known:
                remarks["rate assumed"] = 1
        self.count, self.last, self.next = 0, None, None
        self.gap = 1 / float(stream.average_rate) if kind == "video" and stream.average_rate else 1 / _RATE

    def of_packet(self, packet) -> float | None:
        """Returns when a packet begins, None where it does not say."""
        stamp = packet.dts if packet.pts is None else packet.pts
        return None if stamp is None else stamp * self.base - self.origin

    def feed(self, packet) -> None:
        """Tells the clock of a packet that goes into the decoder."""
        if self.waiting is not None and packet.size and packet.dts is not None:
            self.waiting.append(packet.dts)
            self.fed += 1
        if self.next is None and packet.size:
            self.next = self.of_packet(packet)

    def time(self, frame) -> float:
        """Returns the time of the next frame to come out."""
        if self.rate is not None:
            time = self.count / self.rate
        elif self.waiting is not None:
            if self.depth is not None:
                for _ in range(min(self.fed - self.depth - self.count - 1, len(self.waiting) - 1)):
                    self.waiting.popleft()
                    self.count += 1
            time = float(self.waiting.popleft()) * self.base - self.origin if self.waiting else self._guess()
        elif frame.pts is not None:  # a frame that is flushed out has no time base of its own
            time = (frame.pts * self.base if frame.time is None else float(frame.time)) - self.origin
        else:
            time = self._guess()
        self.count += 1
        if self.kind == "audio":
            self.next = time + frame.samples / (frame.sample_rate or 1)
        else:
            if self.last is not None and time > self.last:
                self.gap = time - self.last
            own = (frame.duration or 0) * self.base
            self.next = time + (own if 0 < own < 1 else self.gap)
        self.last = time
        return time

    def _guess(self) -> float:
        if self.kind == "video":
            self.remarks["times guessed"] += 1
        return self.begin if self.next is None else self.next
