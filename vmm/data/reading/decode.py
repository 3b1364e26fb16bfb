"""The frames of a stream from a moment on: the one loop behind training, embedding and building.

Strict, every doubt is an error: damage, time that runs backwards, what stands behind an error. Lenient, errors are passed
over and counted. Either way a seek is checked by what comes out of it, and where it fails or lands too late the file is
read from its beginning.
"""

from collections import Counter
from collections.abc import Iterator

import av

from vmm.data.reading.open import BARE, Medium
from vmm.data.reading.problems import BROKEN, DecodeError, reason_of
from vmm.data.reading.timeline import COUNTED, Clock, reorder_depth

TICK = 1e-6  # seconds by which rounded times may differ
MAX_PIXELS = 8192 * 8192
_MARGIN = 1 << 20  # pixels
_LANDS_LATE = 10.0  # seconds by which a seek may miss in a container without an index
_BY_RATE = ("wav", "w64", "aiff")  # exact for PCM alone
_UNINDEXED = ("mpegts", "mpeg")
_DELTAS = ("gif", "apng")  # every picture is drawn over the one before, whatever is called a key frame
# Decoders that carry state from the beginning, or whose packets do not tell where a block begins.
_STATEFUL = ("adpcm_yamaha", "adpcm_g722", "adpcm_g726", "adpcm_g726le", "adpcm_ct", "adpcm_sbpro_2", "adpcm_sbpro_3",
             "adpcm_sbpro_4", "g722", "g726", "g726le", "dfpwm", "truehd", "mlp", "sol_dpcm", "roq_dpcm")  # fmt: skip
# In Ogg, whose pages tell where they end: what packets behind a seek last is not known to the demuxer.
_UNTIMED_IN_OGG = ("flac", "speex", "libspeex")
_TRIES = 16  # errors of reading in a row after which a file has ended


def decode_error(error: Exception) -> DecodeError:
    """Returns the DecodeError of one of BROKEN."""
    return DecodeError(reason_of(error), words(error))


def words(error: Exception) -> str:
    """Returns what an error says, in one line."""
    return (error.strerror or "") if isinstance(error, av.FFmpegError) else str(error)


def frames(
    medium: Medium, kind: str, start: float, *, strict: bool = False, pixels: int = MAX_PIXELS,
    latest: float | None = None, remarks: Counter | None = None,
) -> Iterator[tuple]:  # fmt: skip
    """Yields (frame, seconds), from at or before `start` on.

    Args:
      kind: "video" or "audio". pixels: of the largest picture, 0: no limit.
      latest: seconds at which the first frame may be when the stream has earlier ones; default: start. Sound is
        decoded from before it is wanted.
      remarks: counts what had to be done, see REMARKS.

    Raises:
      DecodeError: strict, and something is wrong.
      one of BROKEN: nothing at all decodes.
    """
    remarks = Counter() if remarks is None else remarks
    latest = start if latest is None else latest
    # A seek to the beginning of a sound skips what its first packet is there for: to lead into the next one.
    whole = start <= 0 and (medium.fresh or kind == "audio")
    if not whole and not _from_the_beginning(medium, kind, strict):
        before = Counter(remarks)
        found = _run(medium, kind, start, strict, pixels, remarks, sought=True)
        try:
            first = next(found, None)
        except (DecodeError, *BROKEN):
            first = None
        if first is not None and first[1] <= max(latest, medium.begins(kind)) + TICK:
            yield first
            yield from found
            return
        # The seek failed or landed too late, or there is nothing so early: only the whole stream can tell.
        found.close()
        remarks.clear()
        remarks.update(before)
    medium.rewind()
    yield from _run(medium, kind, start, strict, pixels, remarks, sought=False)


def _from_the_beginning(medium: Medium, kind: str, strict: bool) -> bool:
    """Whether only decoding from the first packet on gives what is in the stream."""
    context = medium.stream(kind).codec_context
    if context is None:
        return True
    if kind == "audio":
        return context.name in _STATEFUL or (medium.format == "ogg" and context.name in _UNTIMED_IN_OGG)
    # A palette comes once, before the first picture.
    paletted = context.format is not None and context.format.name == "pal8"
    unindexed = strict and medium.format in (*_UNINDEXED, "avi")
    unordered = medium.format == "avi" and context.has_b_frames and reorder_depth(medium.stream(kind)) is None
    return paletted or unindexed or unordered or medium.format in (*_DELTAS, *COUNTED)


def open_decoder(medium: Medium, kind: str, strict: bool = False, pixels: int = MAX_PIXELS):
    """Returns the stream, its decoder ready to be opened; raises ValueError where none knows it."""
    stream = medium.stream(kind)
    context = stream.codec_context
    if context is None:
        raise ValueError("no decoder knows this stream")
    if not context.is_open:
        stream.thread_type = "NONE"  # the pipeline runs in parallel over clips
        context.thread_count = 1
        # Strictly, the decoder counts memory, with margins; the picture itself is measured below.
        limit = 2 * pixels + _MARGIN if strict else pixels
        context.options = ({"max_pixels": str(limit)} if pixels else {}) | ({"err_detect": "explode"} if strict else {})
    return stream


def seek(medium: Medium, stream, start: float) -> None:
    """Goes to a key frame at or before `start`; raises av.FFmpegError where the container cannot."""
    # MPEG-TS and program streams have no index: a seek lands after the key frame that is needed.
    early = _LANDS_LATE if medium.format in _UNINDEXED else 0.0
    medium.fresh = False
    medium.container.seek(int((start + medium.origin - early) / float(stream.time_base)), stream=stream, backward=True)


def _is_guess(medium: Medium, stream, strict: bool) -> bool:
    """Whether a seek in sound goes where a bit rate says, whatever the times of packets are then claimed to be."""
    compressed = medium.format in _BY_RATE and not stream.codec_context.name.startswith("pcm_")
    return compressed or medium.format in BARE or (strict and medium.format in _UNINDEXED)


def _run(
    medium: Medium, kind: str, start: float, strict: bool, pixels: int, remarks: Counter, sought: bool
) -> Iterator[tuple]:
    """Yields (frame, seconds). sought: go to `start` first, and do not decode sound before it."""
    stream = open_decoder(medium, kind, strict, pixels)
    if sought and not (kind == "audio" and _is_guess(medium, stream, strict)):
        seek(medium, stream, start)
    elif sought:  # packets are counted
        medium.rewind()
        stream = open_decoder(medium, kind, strict, pixels)
    medium.fresh = False
    skip = start if sought and kind == "audio" else None
    last, failed, first_error = None, None, None
    for found, error, keyed in _decoded(medium, stream, Clock(medium, kind, remarks), strict, skip):
        if error is not None:
            if strict and last is None and keyed:
                raise error
            first_error = first_error or error
            remarks["errors skipped"] += 1
            if last is not None:
                failed = failed or f"after {last:.3f} s: {words(error)}"
        for frame, time in found:
            if strict:
                if failed:
                    raise DecodeError("damaged", failed)
                if last is not None and time < last - TICK and kind == "video":
                    raise DecodeError("damaged", f"time runs backwards at {last:.3f} s")
                if kind == "video" and pixels and frame.width * frame.height > pixels:
                    raise DecodeError("too large", f"{frame.width}×{frame.height} pixels")
            last = time
            yield frame, time
    if last is None and first_error is not None:
        raise first_error
    if strict and failed and medium.format not in BARE:
        raise DecodeError("truncated", failed)


def _decoded(medium: Medium, stream, clock: Clock, strict: bool, skip: float | None) -> Iterator[tuple]:
    """Yields ([(frame, seconds), …], None or what went wrong, whether a key frame went in) for each packet."""
    packets, tries, keyed, last = medium.container.demux(stream), 0, False, None
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            if packet.size:
                tries = 0
        except (av.FFmpegError, ValueError, EOFError, IndexError) as error:
            tries += 1
            new = isinstance(error, IndexError)  # a packet of a stream that shows up only here
            if not new:
                yield [], error, keyed
            if tries > _TRIES or (strict and not new):
                return
            packets = medium.container.demux(stream)  # behind the error there may be more
            continue
        time = clock.of_packet(packet)
        if not packet.size and time is not None:
            # The same picture again. To the decoder, no bytes would mean the end.
            if clock.kind == "video" and last is not None and time > last[1] and not clock.waiting:
                last = last[0], time
                yield [last], None, keyed
            continue
        if skip is not None and time is not None and packet.size:
            if time + (packet.duration or 0) * clock.base <= skip:
                continue
            skip = None
        keyed = keyed or packet.is_keyframe
        clock.feed(packet)
        try:
            found = packet.decode()
        except (av.FFmpegError, ValueError, EOFError, IndexError) as error:
            if packet.size or not isinstance(error, EOFError):  # emptied already, before a stream that came late
                yield [], error, keyed
            continue
        timed = [(frame, clock.time(frame)) for frame in found]
        if timed:
            last = timed[-1]
        yield timed, None, keyed
