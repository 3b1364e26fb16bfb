"""The files that are measured: made once, kept in a scratch folder.

Layers of texture move over one another and every picture has its own grain, so that no codec finds
them trivial: about what a filmed clip of that size takes, in bits and in time to decode.
"""

import io
import json
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from vmm.data import text
from vmm.data.building.transcode import Storage, transcode
from vmm.errors import UserError

RATE, FPS = 48000, 30
_VERSION = 1  # of what is drawn: files of another are made anew


class Kind(NamedTuple):
    """What one row measures. encoder None: what `vmm data build` stores of the kind named `source`."""

    name: str
    encoder: str | None
    width: int
    height: int
    gop: int
    sound: str
    options: dict
    container: str = "mp4"
    source: str = ""


KINDS = (
    Kind("H.264", "libx264", 320, 240, 250, "aac", {"preset": "veryfast", "crf": "23", "sc_threshold": "0"}),
    Kind("H.264", "libx264", 1280, 720, 250, "aac", {"preset": "veryfast", "crf": "23", "sc_threshold": "0"}),
    Kind("H.264 as stored", None, 456, 256, 30, "aac", {}, source="H.264 1280×720"),
    Kind("HEVC", "libx265", 320, 240, 250, "aac", {"preset": "superfast", "x265-params": "log-level=none"}),
    Kind("VP9", "libvpx-vp9", 320, 240, 250, "libopus", {"deadline": "realtime", "cpu-used": "8"}, "webm"),
    Kind("AV1", "libsvtav1", 320, 240, 250, "libopus", {"preset": "11"}, "webm"),
)


class Sample(NamedTuple):
    """A file to measure. kilobits: its size, a second."""

    name: str
    path: Path
    gop: int
    kilobits: float


def label(kind: Kind) -> str:
    """Returns codec and size, as "VP9 320×240"."""
    return f"{kind.name} {kind.width}×{kind.height}"


def make(folder: Path, seconds: float, told: Callable[[str], None] = lambda name: None) -> list[Sample]:
    """Writes what is not there yet; kinds without an encoder in this build of FFmpeg are left out.

    Args: seconds: length of a clip. told: called with the name of a file before it is written.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = {}
        for kind in KINDS:
            name = label(kind)
            if kind.encoder and not (_encodes(kind.encoder) and _encodes(kind.sound)):
                continue
            stem = f"v{_VERSION}-{name.lower().replace(' ', '-').replace('×', 'x')}-{seconds:g}s"
            path = folder / f"{stem}.{kind.container}"
            if not path.exists():
                told(name)
                part = path.with_suffix(".part")
                part.write_bytes(_encode(kind, seconds) if kind.encoder else _store(made[kind.source].path))
                os.replace(part, path)
            made[name] = Sample(name, path, kind.gop, path.stat().st_size * 8e-3 / seconds)
    except OSError as error:
        raise UserError(f"--scratch {folder}: cannot be written ({error.strerror})") from None
    return list(made.values())


def dataset(folder: Path, clip: Path, length: float, seconds: float) -> tuple[Path, Path]:
    """Writes (manifest, tokenizer) of the windows of one file, a new one each half second, with captions."""
    count = max(1, int((length - seconds) / 0.5) + 1)
    lines = [
        {"id": f"{i:03d}", "path": str(clip.resolve()), "start": i / 2, "end": i / 2 + seconds, "caption": _caption(i)}
        for i in range(count)
    ]
    manifest, tokenizer = folder / "windows.jsonl", folder / "tokenizer.json"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text.train_tokenizer(map(_caption, range(count))).save(str(tokenizer))
    return manifest, tokenizer


def _caption(number: int) -> str:
    return f"layers of texture drift {('left', 'right', 'up', 'down')[number % 4]} for the {number}th time"


def _encodes(codec: str) -> bool:
    try:
        return bool(av.codec.Codec(codec, "w"))
    except av.FFmpegError:
        return False


def _store(path: Path) -> bytes:
    answer = transcode(str(path), spans=[[None, None]], storage=list(Storage()))
    return answer.parts[0]


def _encode(kind: Kind, seconds: float) -> bytes:
    """Returns a clip of this kind."""
    os.environ.setdefault("SVT_LOG", "1")  # errors only
    rng = np.random.default_rng(kind.width)
    pictures, wave = _pictures(kind.width, kind.height, round(seconds * FPS), rng), _wave(seconds, rng)
    file = io.BytesIO()
    with av.open(file, "w", format=kind.container) as container:
        video = container.add_stream(kind.encoder, rate=FPS, options=kind.options | {"g": str(kind.gop)})
        video.width, video.height, video.pix_fmt = kind.width, kind.height, "yuv420p"
        audio = container.add_stream(kind.sound, rate=RATE, layout="stereo", bit_rate=128000)
        for i, picture in enumerate(pictures):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
            if i % FPS == 0:  # sound lies beside its pictures in the file
                piece = np.ascontiguousarray(wave[:, i * RATE // FPS : (i // FPS + 1) * RATE])
                frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
                frame.sample_rate, frame.pts, frame.time_base = RATE, i * RATE // FPS, Fraction(1, RATE)
                container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return file.getvalue()


def _pictures(width: int, height: int, count: int, rng: np.random.Generator):
    """Yields yuv420p planes [H * 3 / 2, W]: two textures that drift apart, a brighter place that wanders, grain."""
    room = 160
    layers = [_texture(height + room, width + room, scale, rng) for scale in (6, 24)]
    colour = [_texture(height // 2 + room, width // 2 + room, 32, rng) for _ in range(2)]
    grain = rng.normal(0, 1.5, (height + room, width + room)).round().astype(np.int16)
    for i in range(count):
        at = [_drift(i, speed, room) for speed in (1.7, 0.9)]
        luma = sum(layer[y : y + height, x : x + width] for layer, (y, x) in zip(layers, at, strict=True)) >> 1
        bright = 40 * np.sin(np.linspace(0, 3, width) + i / 20) * np.sin(np.linspace(0, 2, height) + i / 33)[:, None]
        y, x = rng.integers(room, size=2)
        luma = luma + bright.astype(np.int16) + grain[y : y + height, x : x + width]
        planes = [plane[at[0][0] :, at[1][1] :][: height // 2, : width // 2] for plane in colour]
        yield np.concatenate(
            [np.clip(luma, 16, 235).astype(np.uint8), *(plane.astype(np.uint8).reshape(-1, width) for plane in planes)]
        )


def _drift(i: int, speed: float, room: int) -> tuple[int, int]:
    """Returns the place (y, x) of a window that wanders in `room` pixels."""
    return tuple(round(room / 2 * (1 + np.sin(i * speed / room * 2 + phase))) for phase in (0, 1.3 * speed))


def _texture(height: int, width: int, scale: int, rng: np.random.Generator) -> np.ndarray:
    """Returns smooth noise, int16 in 16..240: a coarse grid scaled up."""
    coarse = rng.integers(16, 240, (height // scale + 2, width // scale + 2), np.uint8)
    frame = av.VideoFrame.from_ndarray(coarse, format="gray")
    return frame.reformat(width, height, interpolation="BICUBIC").to_ndarray().astype(np.int16)


def _wave(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Returns float32 [2 S]: gliding tones over noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    tones = [np.sin(2 * np.pi * (220 * k * time + 3 * np.sin(time * k))) for k in (1, 2, 3)]
    wave = [sum(tones) * (0.1 + side * 0.02) + rng.normal(0, 0.02, len(time)) for side in (0, 1)]
    return np.stack(wave).astype(np.float32)
