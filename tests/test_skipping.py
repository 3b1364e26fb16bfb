"""Passing over pictures that nobody sees changes no picture: against decoding every one, on files written here."""

import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vmm.data import media, skipping
from vmm.data.reading.decode import open_decoder

TICKS = 90000
BASE_TIME = Fraction(1, TICKS)
BASE = "bframes=3:b-adapt=0:scenecut=0:keyint=40:min-keyint=40"


def write(path: Path, codec: str = "libx264", options: str = BASE, times=None, count: int = 120) -> Path:
    """Pictures of moving texture whose grey tells their number, at presentation times in seconds."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 30, (400, 96), np.uint8)
    times = [i / 25 for i in range(count)] if times is None else times
    key = "x265-params" if codec == "libx265" else "x264-params"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={key: options + ":log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.time_base = stream.codec_context.time_base = BASE_TIME
        for i, time in enumerate(times):
            picture = np.full((96, 96), 128, np.uint8)
            picture[:64] = texture[2 * i : 2 * i + 64] + i
            frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
            frame.pts, frame.time_base = round(time * TICKS), BASE_TIME
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def both(path: Path, start: float, targets: list[float]) -> tuple[list | None, list | None]:
    """Returns the pictures by passing over, and by decoding each: lists of arrays."""
    with media.Medium(path) as medium:
        quick = media._shown_quickly(medium, start, targets)
        quick = quick and [frame.to_ndarray() for frame in quick]
        full = media._shown(medium, start, targets, Counter())
        return quick, [frame.to_ndarray() for frame in full]


def moments(start: float, seconds: float, count: int) -> list[float]:
    return [start + (i + 0.5) * seconds / count for i in range(count)]


VARIABLE = list(itertools.accumulate(np.random.default_rng(1).uniform(0.005, 0.2, 120).tolist()))
FILES = {
    "no B": ("libx264", "bframes=0:keyint=40", None),
    "B": ("libx264", BASE + ":b-pyramid=none", None),
    "pyramid": ("libx264", BASE + ":b-pyramid=normal", None),
    "sixteen B, open GOP": ("libx264", "bframes=16:b-adapt=0:keyint=40:open-gop=1:b-pyramid=normal:ref=4", None),
    "variable times": ("libx264", BASE, VARIABLE),
    "HEVC": ("libx265", "bframes=4:keyint=40:open-gop=0:pools=1", None),
    "HEVC, open GOP": ("libx265", "bframes=4:keyint=40:open-gop=1:pools=1", None),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_every_window_shows_the_same_pictures(name, container, tmp_path):
    codec, options, times = FILES[name]
    path = write(tmp_path / f"a.{container}", codec, options, times)
    length = times[-1] if times else 4.8
    rng = np.random.default_rng(2)
    quick_ones = 0
    for _ in range(12):
        start = float(rng.uniform(0, length - 1))
        quick, full = both(path, start, moments(start, float(rng.uniform(0.1, 2.5)), int(rng.integers(1, 17))))
        if quick is not None:
            quick_ones += 1
            assert all(np.array_equal(one, other) for one, other in zip(quick, full, strict=True))
    assert quick_ones >= 8  # the first picture may lie after the first moment: then every one is decoded


def test_moments_that_fall_on_pictures_show_them(tmp_path):
    path = write(tmp_path / "a.mp4")
    quick, full = both(path, 1.0, [(25 + i) / 25 for i in range(20)])
    assert [np.array_equal(one, other) for one, other in zip(quick, full, strict=True)] == [True] * 20
    assert len({picture.tobytes() for picture in quick}) == 20


def test_a_picture_that_nobody_sees_is_not_decoded(tmp_path):
    path = write(tmp_path / "a.mp4", options=BASE + ":b-pyramid=none")
    targets = moments(2.0, 2.0, 4)  # 2.25, 2.75, 3.25, 3.75
    whole, _ = both(path, 2.0, targets)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.pts is not None]
        # Bits 5 and 6 of a unit's first byte are 0: no other picture refers to it.
        free = [packet for packet in packets if not bytes(packet)[4] & 0x60]
        unseen = next(packet for packet in free if packet.pts * stream.time_base > 2.3)
        place, data = unseen.pos, bytearray(bytes(unseen))
    at = 0  # units: their length and type stand, the rest of each is garbage
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        data[at + 5 : at + 4 + size] = bytes(size - 1)
        at += 4 + size
    content = path.read_bytes()
    path.write_bytes(content[:place] + data + content[place + len(data) :])
    quick, _ = both(path, 2.0, targets)
    assert all(np.array_equal(one, other) for one, other in zip(quick, whole, strict=True))
    with media.Medium(path) as medium:  # decoding every picture meets the broken one
        media._shown(medium, 2.0, targets, remarks := Counter())
    assert remarks["errors skipped"] == 1


def test_a_moment_before_the_first_picture_is_left_to_the_caller(tmp_path):
    path = write(tmp_path / "a.mp4", times=[1.0 + i / 25 for i in range(60)])
    with media.Medium(path) as medium:
        stream = open_decoder(medium, "video")
        assert skipping.shown_at(medium.container, stream, [-0.5, 0.5], medium.origin) is None


def test_a_file_that_ends_early_is_left_to_the_caller(tmp_path):
    path = write(tmp_path / "a.mkv")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    quick, full = both(path, 1.0, moments(1.0, 3.5, 16))
    assert quick is None or all(np.array_equal(one, other) for one, other in zip(quick, full, strict=True))
    assert len(full) == 16


def test_a_codec_without_references_to_tell_is_left_to_the_caller(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for _ in range(25):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuvj420p")))
        container.mux(stream.encode(None))
    quick, full = both(path, 0.2, moments(0.2, 0.5, 4))
    assert quick is None and len(full) == 4
