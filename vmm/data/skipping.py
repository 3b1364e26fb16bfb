"""Decoding only what a window shows: pictures that no other is predicted from, and that nobody sees, are passed over.

A window of 16 pictures lies behind a hundred others that only lead to it. Where a codec marks pictures as
references or not, the ones that are neither references nor shown need no decoding: the rest is the same to the bit.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from fractions import Fraction

# Decoders that can pass over a picture that is no reference without changing another.
_CODECS = ("h264", "hevc")
# A picture is stored at most 16 places away from where it is shown (both standards): twice that is looked ahead.
_AHEAD = 32


def shown_at(container, stream, targets: Sequence[float], origin: float) -> list | None:
    """Returns the frames that are shown at some moments, decoded from the container's present place on.

    The frame shown at a moment is the one with the last time at or before it. What the packets tell is
    checked against what comes out; at any doubt the answer is None and the caller must decode every picture.

    Args:
      container, stream: the stream's decoder runs in one thread, and the container was sought to a key frame.
      targets: moments in seconds, ascending; time runs from `origin`.

    Raises:
      what av raises of a broken file.
    """
    context = stream.codec_context
    if context.name not in _CODECS:
        return None
    tick = Fraction(float(stream.time_base)).limit_denominator(10**7)
    latest = [None] * len(targets)  # timestamp of the last picture at or before each moment, after the one before
    ahead, beyond, frames = deque(), 0, {}

    def wanted(place: int, pts: int) -> bool:
        return place < len(targets) and latest[place] == pts

    def decode(packet, place: int, pts: int) -> None:
        context.skip_frame = "DEFAULT" if wanted(place, pts) else "NONREF"
        keep(packet.decode())

    def keep(decoded) -> None:
        for frame in decoded:
            if frame.pts in latest:
                frames[frame.pts] = frame

    try:
        for packet in container.demux(stream):
            if packet.pts is None:
                if packet.size:
                    return None
                break  # the end
            if not packet.size:  # the same picture again; to the decoder it would mean the end
                continue
            pts = packet.pts
            place = bisect_left(targets, float(pts) * tick.numerator / tick.denominator - origin)
            if place < len(targets) and not packet.is_discard:
                latest[place] = pts if latest[place] is None else max(latest[place], pts)
            ahead.append((packet, place, pts))
            beyond = beyond + 1 if place == len(targets) else 0
            if beyond > _AHEAD:
                break
            if len(ahead) > _AHEAD:
                decode(*ahead.popleft())
        while ahead and not wanted(*ahead[-1][1:]):
            ahead.pop()
        for item in ahead:
            decode(*item)
        keep(context.decode(None))
    finally:
        context.skip_frame = "DEFAULT"
        if context.is_open:
            context.flush_buffers()  # drained; whoever decodes next may fail to seek, which would do it
    shown, last = [], None
    for pts in latest:
        last = last if pts is None else pts
        shown.append(frames.get(last))
    return None if any(frame is None for frame in shown) else shown
