"""One clip → what a page shows of it: pictures over time, a spectrogram, a file a browser can play, facts.

Runs inside a sandbox (vmm/data/sandbox.py): a manifest may name files that no build has checked.
"""

import io
import math
import os
from typing import BinaryIO

import av
import matplotlib
import numpy as np
from matplotlib.image import imsave

from vmm.data import media
from vmm.data.manifest import Row
from vmm.data.reading.decode import frames
from vmm.data.reading.geometry import pixel_ratio, shown_aspect
from vmm.data.reading.open import open_regular
from vmm.data.reading.timeline import length_of
from vmm.data.sandbox import Answer
from vmm.mel import mel_filters

FRAMES = 6  # of a contact sheet
LONGEST = 60.0  # seconds of a clip that are drawn
PLAYED = 1_000_000  # bytes below which a clip is put into the page
SILENT = 1e-4  # loudest sample, of 1, below which nothing is heard
RATE = 16000  # Hz
_WIDTH, _HEIGHT, _GAP = 176, 200, 4  # pixels of a frame at most, and between frames
_BINS, _WINDOW, _HOP, _COLUMNS = 64, 400, 160, 640
_FLOOR, _CEILING = -12.0, 8.0  # log power drawn darkest and brightest: one scale for all clips

# Format → MIME type, and the codecs that browsers decode in it.
_BROWSERS = {"mov": "mp4", "matroska": "webm", "ogg": "ogg", "wav": "wav", "mp3": "mpeg", "flac": "flac"}
_CODECS = {"h264", "vp8", "vp9", "av1", "aac", "mp3", "opus", "vorbis", "flac", "pcm_s16le"}


def draw(row: dict) -> Answer:
    """Returns what can be shown of a clip.

    Args:
      row: the fields of a Row.

    Returns an Answer. note: {"reason", "detail"} of a clip that gives nothing, or its facts: container, bytes, codecs,
    width and height in pixels, fps, seconds of the clip, shown: of them drawn, peak: loudest sample of 1, None without
    sound, pictures: names of the parts in order ("sheet": JPEG, "mel": PNG, "play": the clip itself), mime of the last.
    """
    row = Row(**row | {"captions": tuple(row["captions"])})
    try:
        source = row.read()
        facts = _facts(source)
        start = row.start or 0.0
        seconds = row.seconds
        if seconds is None and facts["duration"] is not None and facts["duration"] > start:
            seconds = facts["duration"] - start
        shown = min(seconds or LONGEST, LONGEST)
        aspect = facts.pop("aspect")
        height, width = _frame_size(aspect)
        whole = media.Crop(area=1.0, aspect=aspect)  # squeezed into a square here, and drawn in its own shape below
        found = media.decode(
            _begin(source), pick=lambda _: start, seconds=shown, frames=FRAMES, size=max(height, width),
            sample_rate=RATE, crop=whole,
        )  # fmt: skip
    except media.DecodeError as error:
        return Answer({"reason": error.reason, "detail": error.detail}, [])
    except media.BROKEN as error:
        return Answer({"reason": media.reason_of(error), "detail": str(error)}, [])
    parts = {}
    if found.video is not None:
        parts["sheet"] = contact_sheet(found.video, height, width)
    peak = None if found.audio is None else float(np.abs(found.audio).max(initial=0.0))
    if peak is not None:
        parts["mel"] = spectrogram(found.audio)
    facts |= {
        "seconds": seconds,
        "shown": shown,
        "peak": peak,
        "mime": _mime(facts),
        "cut": start > 0 or (facts["duration"] or 0) > start + (seconds or math.inf) + 0.1,
    }
    if facts["bytes"] < PLAYED and facts["mime"]:
        parts["play"] = _bytes(source)
    return Answer(facts | {"pictures": list(parts)}, list(parts.values()))


def _begin(source: str | BinaryIO) -> str | BinaryIO:
    if not isinstance(source, str):
        source.seek(0)
    return source


def _bytes(source: str | BinaryIO) -> bytes:
    if not isinstance(source, str):
        return _begin(source).read()
    with open_regular(source) as file:
        return file.read()


def _facts(source: str | BinaryIO) -> dict:
    """Returns what the container says, and the shape of the first picture as it is shown (aspect: width to height)."""
    facts = {"bytes": os.path.getsize(source) if isinstance(source, str) else source.seek(0, 2), "aspect": 1.0}
    with media.Medium(_begin(source)) as medium:
        duration = length_of(medium)
        seen, heard = medium.stream("video"), medium.stream("audio")
        facts |= {"container": medium.format, "duration": duration}
        facts |= {"video_codec": _codec(seen), "audio_codec": _codec(heard)}
        facts |= {"width": None, "height": None, "fps": None}
        if seen is not None and seen.codec_context is not None:
            facts |= {"width": seen.width, "height": seen.height}
            facts["fps"] = round(float(seen.average_rate), 3) if seen.average_rate else None
            try:
                frame = next((frame for frame, _ in frames(medium, "video", 0.0)), None)
            except media.BROKEN:  # decode() says so, or draws the sound
                frame = None
            if frame is not None:
                facts["aspect"] = shown_aspect(frame, pixel_ratio(medium.stream("video")))
    return facts


def _codec(stream) -> str | None:
    if stream is None:
        return None
    return stream.codec_context.codec.canonical_name if stream.codec_context is not None else "unknown"


def _frame_size(aspect: float) -> tuple[int, int]:
    """Returns height and width in pixels; what is very wide or very high is drawn less so."""
    aspect = min(4.0, max(0.25, aspect))
    width = min(_WIDTH, _HEIGHT * aspect)
    return round(width / aspect), round(width)


def contact_sheet(video: np.ndarray, height: int, width: int) -> bytes:
    """Returns a JPEG of the frames side by side. video: uint8 [T H H 3], squares that are drawn `height` × `width`."""
    shaped = [
        av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(width=width, height=height).to_ndarray()
        for frame in np.ascontiguousarray(video)
    ]
    sheet = np.full((height, len(shaped) * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for place, frame in enumerate(shaped):
        left = place * (width + _GAP)
        sheet[:, left : left + width] = frame
    return _image(sheet, "jpeg", pil_kwargs={"quality": 82})


def spectrogram(wave: np.ndarray) -> bytes:
    """Returns a PNG of the log-mel spectrogram, low pitches at the bottom. wave: float32 [S] at RATE."""
    mel = log_mel(wave)
    # A long clip has more frames than the picture columns: each column is the mean of its frames.
    edges = np.linspace(0, len(mel), min(len(mel), _COLUMNS) + 1).astype(int)
    mel = np.stack([mel[low:high].mean(0) for low, high in zip(edges, edges[1:])])
    return _image(mel.T, "png", cmap="magma", vmin=_FLOOR, vmax=_CEILING, origin="lower")


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Returns float32 [F M]: frames of 25 ms every 10 ms, Hann window, power, mel filters, natural logarithm ≥ 1e-6.

    mel(f) = 1127 ln(1 + f / 700), from 20 Hz to Nyquist (the HTK scale). The frames and the scale of the audio encoder; fewer bins, so that
    every filter is wider than the step between frequencies and no line of the picture stays dark.
    """
    frames = max(1, len(wave) // _HOP)
    wave = np.pad(wave, (0, max(0, (frames - 1) * _HOP + _WINDOW - len(wave))))
    transform = 1 << (_WINDOW - 1).bit_length()
    filters = mel_filters(_BINS, transform, RATE)
    hann = np.hanning(_WINDOW + 1)[:-1].astype(np.float32)
    pieces = np.lib.stride_tricks.sliding_window_view(wave, _WINDOW)[::_HOP][:frames]
    power = np.abs(np.fft.rfft(pieces * hann, n=transform)) ** 2
    return np.log(np.maximum(power @ filters, 1e-6)).astype(np.float32)


def _image(pixels: np.ndarray, kind: str, cmap: str | None = None, vmin=None, vmax=None, origin="upper", pil_kwargs=None) -> bytes:  # fmt: skip
    data = io.BytesIO()
    colours = None if cmap is None else matplotlib.colormaps[cmap]
    imsave(data, pixels, format=kind, cmap=colours, vmin=vmin, vmax=vmax, origin=origin, pil_kwargs=pil_kwargs)
    return data.getvalue()


def _mime(facts: dict) -> str | None:
    """Returns the type under which browsers play a clip, None where they do not."""
    codecs = {facts["video_codec"], facts["audio_codec"]} - {None}
    if facts["container"] not in _BROWSERS or not codecs <= _CODECS:
        return None
    return f"{'video' if facts['video_codec'] else 'audio'}/{_BROWSERS[facts['container']]}"
