"""Clips a second on one core: what the loader calls for each clip, against a straight seek-and-decode loop."""

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from vmm.bench.clips import Sample
from vmm.data import media


class Window(NamedTuple):
    """What is decoded of a clip: the recipe of VideoMAE, 16 frames at stride 4 of 30 a second, with the sound."""

    seconds: float = 64 / 30
    frames: int = 16
    size: int = 224
    sample_rate: int = 16000


def measure(
    samples: list[Sample], window: Window, seconds: float, told: Callable[[str], None] = lambda name: None
) -> list[dict]:
    """Returns one row a sample.

    Both ways decode the same random windows in turn, in one thread, the second first every other time.
    Processor time is counted, not the clock: another job on the machine takes a core, not clips from it.
    The files are in the page cache, so no disk is measured.

    Args: seconds: of processor time, a sample. told: called with the name of each sample.

    Returns: name, GOP (pictures), kilobits (a second), clips a second of processor time of either way, and
      ratio, the median over pairs of the loop's time to ours, with the bounds of its middle half.
    """
    rows = []
    for sample in samples:
        told(sample.name)
        length = media.probe_duration(sample.path) or 0.0
        rng = np.random.default_rng(0)
        ways = {"vmm": _ours, "loop": straight_loop}
        times = {name: [] for name in ways}
        begin = time.process_time()
        for turn in itertools.count(-1):
            start = rng.uniform(0, max(0.0, length - window.seconds))
            for name in list(ways)[:: 1 if turn % 2 else -1]:
                before = time.process_time()
                ways[name](sample.path, start, window)
                if turn >= 0:  # the first time is warm-up
                    times[name].append(time.process_time() - before)
            if turn >= 2 and time.process_time() - begin > seconds:
                break
        ratios = [loop / ours for loop, ours in zip(times["loop"], times["vmm"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "clip": sample.name, "gop": sample.gop, "kilobits": sample.kilobits,
                "vmm": 1 / statistics.mean(times["vmm"]), "loop": 1 / statistics.mean(times["loop"]),
                "ratio": middle, "ratio_low": low, "ratio_high": high, "pairs": len(ratios),
            }
        )  # fmt: skip
    return rows


def _ours(path: Path, start: float, window: Window) -> media.Media:
    return media.decode(path, pick=lambda _: start, **window._asdict())


def straight_loop(path: Path, start: float, window: Window) -> media.Media:
    """What a person would write with PyAV for a file that is known to be good: no check, no limit, no rescue.

    Returns what media.decode returns, of the same window: the picture shown at the middle of each part, the
    short side scaled to the wanted size, the middle square of it; the sound in mono.
    """
    wanted = [start + (i + 0.5) * window.seconds / window.frames for i in range(window.frames)]
    pictures, before = [], None
    wave = np.zeros(round(window.seconds * window.sample_rate), np.float32)
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        for stream in (video, audio):
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        container.seek(int(start / video.time_base), stream=video)
        for frame in container.decode(video):
            while len(pictures) < window.frames and frame.time > wanted[len(pictures)]:
                pictures.append(_square(before or frame, window.size))
            before = frame
            if len(pictures) == window.frames:
                break
        while len(pictures) < window.frames:
            pictures.append(_square(before, window.size))
        resampler = av.AudioResampler(format="flt", layout="mono", rate=window.sample_rate)
        container.seek(int(start / audio.time_base), stream=audio)
        place = None
        for frame in container.decode(audio):
            place = round((frame.time - start) * window.sample_rate) if place is None else place
            for piece in resampler.resample(frame):
                values = piece.to_ndarray()[0]
                low, high = max(0, place), min(len(wave), place + len(values))
                if low < high:
                    wave[low:high] = values[low - place : high - place]
                place += len(values)
            if place >= len(wave):
                break
    return media.Media(np.stack(pictures), wave)


def _square(frame, size: int) -> np.ndarray:
    scale = size / min(frame.width, frame.height)
    width, height = round(frame.width * scale), round(frame.height * scale)
    pixels = frame.reformat(width, height, "rgb24").to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]
