"""One source file → the clips that are stored: cut, upright, small, quick to decode, and strictly checked.

Runs inside a sandbox (vmm/data/sandbox.py).
"""

import hashlib
import math
from collections import Counter

import numpy as np

from vmm.data.building.store import Storage, Store
from vmm.data.building.strict import (
    BARE,
    TICK,
    check_end,
    decode_error,
    measure,
    opened_bytes,
    promised_end,
    read_sound,
    strict_frames,
)
from vmm.data.members import read_member
from vmm.data.reading.geometry import pixel_ratio
from vmm.data.reading.problems import BROKEN, DecodeError, present, reason_of
from vmm.data.reading.problems import REASONS as DECODING
from vmm.data.reading.timeline import duration, measured, mp3_seconds
from vmm.data.reading.transport import missing_packets
from vmm.data.sandbox import Answer

_SHOT_SIZE = (48, 27)  # width, height at which shots are looked for
_LATE = 0.1  # seconds of a clip before its first picture, above which a word is due
_SHOT_CHANGE = 27.0  # mean change of brightness and colour, of 255, that a cut shows

REASONS = (*DECODING, "empty file", "not media", "truncated", "damaged", "no sound", "too short")
"""Why a clip is left out, besides how a sandboxed call can die."""


def transcode(
    path: str, member: tuple = (), sha256: str | None = None, spans: list | None = None, storage: list | None = None
) -> Answer:
    """Returns one stored clip a span, in order.

    Args:
      path, member: where the media lie, as read_member takes it.
      sha256: what the bytes must hash to, where known.
      spans: [start, end] in seconds, either may be None; None: as storage.cut says.
      storage: fields of a Storage.

    Returns an Answer. note: {"source": {...}, "reason", "detail", "clips": [{...}, ...]}; a clip has either
    "reason" and "detail", or what the manifest tells of it and "part", the place of its bytes in parts.
    """
    storage = Storage(*(storage or ()))
    try:
        data = _read(path, member, storage.bytes)
        source = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        if sha256 and source["sha256"] != sha256:
            raise DecodeError("changed", f"sha256 is {source['sha256']}, the source says {sha256}")
        source |= _about(data, storage)
        if spans is None:
            spans = _cut(data, source, storage)
    except DecodeError as error:
        return Answer({"reason": error.reason, "detail": error.detail, "clips": []}, [])
    clips, parts = [], [data] if storage.keep else []
    for span in spans:
        try:
            about, stored = _clip(data, source, *span, storage)
            clips.append(about | {"part": 0 if storage.keep else len(parts)})
            if not storage.keep:
                parts.append(stored)
        except (DecodeError, *BROKEN) as error:
            error = error if isinstance(error, DecodeError) else decode_error(error)
            clips.append({"start": span[0], "end": span[1], "reason": error.reason, "detail": error.detail})
    return Answer({"source": source, "clips": clips}, parts if any("part" in clip for clip in clips) else [])


def _read(path: str, member: tuple, limit: int) -> bytes:
    try:
        data = read_member(path, member, limit + 1)
    except EOFError as error:
        raise DecodeError("truncated", str(error)) from None
    except OSError as error:
        raise DecodeError(reason_of(error), error.strerror or "") from None
    except (ValueError, MemoryError) as error:  # a path with a zero byte; a part larger than memory
        raise decode_error(error) from None
    if len(data) > limit:
        raise DecodeError("too large", f"over {limit} bytes")
    if not data.strip(b"\0"):
        raise DecodeError("empty file", f"{len(data)} bytes, all zero" if data else "no bytes")
    head = data[:512].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        raise DecodeError("not media", "an HTML page: the download failed")
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in data[:512]):
        raise DecodeError("not media", "text")  # not which: it may be anybody's
    return data


def _about(data: bytes, storage: Storage) -> dict:
    """Returns what the container says of itself."""
    with opened_bytes(data) as medium:
        video, audio = medium.stream("video"), medium.stream("audio")
        if video is None and audio is None:
            raise DecodeError("no streams")
        about = {"container": medium.format, "duration": duration(medium.container, medium.origin)}
        if medium.format in BARE:  # a guess
            about["duration"] = measured(medium) or None
            video, audio = medium.stream("video"), medium.stream("audio")
            promised = mp3_seconds(data, audio.rate) if medium.format == "mp3" and audio is not None else None
            check_end(about["duration"] or 0.0, promised, math.inf)
        if medium.format == "mpegts":
            jumps = missing_packets(data, {stream.id for stream in (video, audio) if stream is not None})
            about |= {"holes": jumps} if jumps else {}
        if video is not None:
            if video.codec_context is None:
                raise DecodeError("undecodable", "no decoder knows its pictures")
            if video.width * video.height > storage.pixels:
                raise DecodeError("too large", f"{video.width}×{video.height} pixels")
            about |= {"video_codec": video.codec_context.name, "width": video.width, "height": video.height}
            about["fps"] = round(float(video.average_rate), 4) if video.average_rate else None
        if audio is not None:
            if audio.codec_context is None:
                raise DecodeError("no sound", "no decoder knows its sound")
            about |= {"audio_codec": audio.codec_context.name, "sample_rate": audio.rate}
    return about


def _cut(data: bytes, source: dict, storage: Storage) -> list[tuple[float | None, float | None]]:
    """Returns the spans of a file that came without: no moment of it is in none of them."""
    if storage.cut == "whole":
        return [(None, None)]
    length = measure(data)
    last = length.there
    if last < storage.shortest:
        raise DecodeError("too short", f"{last:.2f} s, less than {storage.shortest:g}")
    bounds = [0.0]
    if storage.cut == "shots" and "video_codec" in source:
        bounds += [time for time in _changes(data, storage) if time <= last - storage.shortest]
    spans = []
    for start, end in zip(bounds, [*bounds[1:], last]):
        # What would be too short for a clip belongs to the one before it.
        count = max(1, math.ceil((end - start - storage.shortest) / storage.seconds + TICK))
        edges = [start + i * storage.seconds for i in range(count)] + [end]
        spans += [(round(low, 6), round(high, 6)) for low, high in zip(edges, edges[1:])]
    if length.promised is not None and length.promised > last + storage.shortest:
        spans.append((round(last, 6), round(length.promised, 6)))  # decoding it will tell that it is not there
    return spans


def _changes(data: bytes, storage: Storage) -> list[float]:
    """Returns when shots begin after the first, at least storage.shortest apart."""
    changes, before, last = [], None, 0.0
    with opened_bytes(data) as medium:
        for frame, time in strict_frames(medium, 0.0, storage.pixels):
            small = frame.reformat(*_SHOT_SIZE, "yuv444p", threads=1).to_ndarray().astype(np.int16)
            change = 0.0 if before is None else np.abs(small - before).mean() * 3
            if change > _SHOT_CHANGE and time - last >= storage.shortest:
                changes.append(time)
                last = time
            before = small
    return changes


def _clip(data: bytes, source: dict, start: float | None, end: float | None, storage: Storage) -> tuple[dict, bytes]:
    """Returns (what the manifest tells, the stored bytes) of one span."""
    length, first = source["duration"], start or 0.0
    if start is not None and length is not None and first >= length:
        raise DecodeError("span outside", f"starts at {first:g} s of {length:g}")
    until = math.inf if end is None else end
    remarks = Counter()
    if source.get("holes"):
        # Where in time they lie nobody tells: a clip that is the whole file has them.
        if start is None and end is None:
            raise DecodeError("damaged", f"{source['holes']} holes in the transport stream")
        remarks["holes in the stream"] += source["holes"]
    sound = read_sound(data, first, until, remarks) if "audio_codec" in source else None
    heard = 0.0 if sound is None else sound.wave.shape[1] / sound.rate
    if "video_codec" in source:
        store = _pictures(data, first, until, storage, sound, remarks)
        if store.count == 0:
            raise DecodeError("no frames")
    elif sound is None:
        raise DecodeError("no frames")
    else:
        with Store(storage, sound, 1.0) as store:
            store.end_sound()
    # Containers without lengths of streams have one of the whole.
    check_end(first + max(store.seconds, heard), length, until, 2 * store.gap)
    about = {
        "start": start, "end": end, "duration": round(max(store.seconds, heard), 4),
        "frames": store.count, "fps": round(store.count / store.seconds, 3) if store.count else None,
        "audio": sound is not None, "silent": sound is not None and bool(np.abs(sound.wave).max() < 1e-4),
        "hashes": store.hashes,
    }  # fmt: skip
    if remarks:
        about["remarks"] = present(remarks)
    if storage.keep:
        keys = ("container", "video_codec", "audio_codec", "width", "height")
        return about | {key: source.get(key) for key in keys}, b""
    codecs = {"video_codec": "h264" if store.count else None, "audio_codec": "aac" if sound else None}
    return about | {"container": "mp4"} | codecs | {"width": store.width, "height": store.height}, store.bytes()


def _pictures(data: bytes, first: float, until: float, storage: Storage, sound, remarks: Counter) -> Store:
    """Returns the closed store of what is seen from `first` to `until`, the picture seen at `first` at time 0."""
    with opened_bytes(data) as medium:
        medium.note_tracks(remarks)
        with Store(storage, sound, pixel_ratio(medium.stream("video"))) as store:
            ended, last, late = False, None, 0.0
            for frame, time in strict_frames(medium, first, storage.pixels, remarks):
                if time >= until - TICK:
                    ended = True
                    break
                late = max(0.0, time - first) if last is None else late
                # Of the pictures up to `first`, the last one is what is seen there: each replaces the one before.
                store.picture(frame, time - first if time > first + TICK else 0.0, 0.0 if last is None else time - last)
                last = time
            store.end_pictures(until - first, ended)
            if late > _LATE:
                remarks["starts late"] += 1
            if store.count:
                check_end(first + store.seconds, promised_end(medium, "video"), until, store.gap)
            store.end_sound()
    return store
