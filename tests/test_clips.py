"""Real files of many codecs and containers: good ones decode, odd ones decode or give a reason."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vmm.data import media

ROOT = Path(__file__).resolve().parent.parent
CLIPS = ROOT.parent / "shared" / "clips"

pytestmark = pytest.mark.skipif(not (CLIPS / "catalogue.csv").is_file(), reason="the folder of real clips is not here")


def catalogue(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


GOOD = catalogue(CLIPS / "catalogue.csv")


# What these clips hold, as their own pictures and sound: one flat colour; digital silence.
FLAT = {
    "media__long_180p_av1.mp4",
    "media__edit_list_positive_shift.mp4",
    "media__sample_av1.mkv",
    "media__silent-black-10s.mp4",
}
SILENT = {
    "media__long_180p_av1.mp4", "media__edit_list_positive_shift.mp4", "media__sample_12_5fps_720p_1s.mp4",
    "media__midroll-5s.mp4", "media__silent-black-10s.mp4", "moviepy__no_duration.webm", "moviepy__transparent.webm",
    "ffmpeg-python__in.mp4",
}  # fmt: skip


def read(path, **more) -> media.Media:
    """The middle second of a file."""
    settings = dict(seconds=1.0, frames=4, size=40, sample_rate=16000) | more
    return media.decode(str(path), pick=lambda length: max(0.0, ((length or 1.0) - 1.0) / 2), **settings)


def test_the_catalogues_are_whole():
    assert len(GOOD) >= 50
    assert len(catalogue(CLIPS / "odd" / "catalogue.csv")) >= 55


@pytest.mark.parametrize("entry", GOOD, ids=lambda entry: entry["name"])
def test_every_clip_decodes(entry):
    got = read(CLIPS / entry["name"])
    assert (got.video is not None) == bool(entry["vcodec"])
    assert (got.audio is not None) == bool(entry["acodec"])
    if got.video is not None:
        assert got.video.shape == (4, 40, 40, 3)
        assert got.video.dtype == np.uint8
        assert (got.video.std(axis=(1, 2)).max() < 1) == (entry["name"] in FLAT)
    if got.audio is not None:
        assert got.audio.shape == (16000,)
        assert got.audio.dtype == np.float32
        assert np.isfinite(got.audio).all()
        assert np.abs(got.audio).max() <= 1.0
        assert (np.abs(got.audio).max() == 0) == (entry["name"] in SILENT)


TURNED = [entry for entry in GOOD if entry["rot"] not in ("", "0")]


def uncropped(path: Path) -> tuple[np.ndarray, int]:
    """The first frame as the container holds it, and the turn that its metadata asks for (counter-clockwise)."""
    import av

    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        return frame.to_ndarray(format="rgb24"), frame.rotation


@pytest.mark.parametrize("entry", TURNED, ids=lambda entry: entry["name"])
def test_turned_clips_are_upright(entry):
    stored, rotation = uncropped(CLIPS / entry["name"])
    assert rotation == int(entry["rot"])
    # The matrix of one file mirrors too: x' = y, y' = x.
    mirrored = entry["name"] == "media__sample_rotate_and_reflect.mp4"
    upright = stored.transpose(1, 0, 2) if mirrored else np.rot90(stored, rotation // 90 % 4)
    if rotation % 180:
        assert upright.shape[:2] == stored.shape[1::-1]
    size = 48
    h, w = upright.shape[:2]
    tall = h > w
    # A square from either end of the long side, from the upright picture by plain averaging.
    for end in (0.0, 1.0):
        crop = media.Crop(y=end, x=0.5) if tall else media.Crop(y=0.5, x=end)
        got = media.decode(
            str(CLIPS / entry["name"]), pick=lambda _: 0.0, seconds=0.02, frames=1, size=size, sample_rate=16000,
            crop=crop, want=("video",),
        ).video[0]  # fmt: skip
        side = min(h, w)
        top, left = (round(end * (h - side)), 0) if tall else (0, round(end * (w - side)))
        square = upright[top : top + side, left : left + side]
        at = (np.arange(size) + 0.5) * side / size
        wanted = square[at.astype(int)][:, at.astype(int)]
        poses = [np.rot90(picture, k) for picture in (wanted, wanted[::-1]) for k in range(4)]
        error = [np.abs(pose.astype(int) - got).mean() for pose in poses]
        assert error[0] == min(error)
        assert error[0] < 0.7 * sorted(error)[1]


_ODD = """
import json, sys, warnings
import numpy as np
from vmm.data import media

warnings.simplefilter("ignore")
for path in sys.stdin.read().splitlines():
    for start in (0.0, None):
        try:
            got = media.decode(
                path, pick=lambda length: start if start is not None else (length or 0.0) / 2,
                seconds=1.0, frames=4, size=24, sample_rate=16000,
            )
            video = got.video is None or (got.video.shape == (4, 24, 24, 3) and got.video.dtype == np.uint8)
            audio = got.audio is None or (got.audio.shape == (16000,) and bool(np.isfinite(got.audio).all()))
            outcome = "decoded" if video and audio else "wrong shape"
            streams = [name for name, value in zip(("video", "audio"), got) if value is not None]
        except media.DecodeError as error:
            outcome, streams = error.reason, []
        except BaseException as error:
            outcome, streams = f"escaped: {type(error).__name__}: {error}", []
        print(json.dumps([path, start, outcome, streams]), flush=True)
"""


@pytest.fixture(scope="module")
def odd() -> dict:
    """(name, start) → (outcome, streams) for every odd file, decoded in a process of its own."""
    names = [Path(entry["file"]).name for entry in catalogue(CLIPS / "odd" / "catalogue.csv")]
    paths = "\n".join(str(CLIPS / "odd" / name) for name in names)
    done = subprocess.run(
        [sys.executable, "-c", _ODD], input=paths, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    last = lines[-1][0] if lines else "none"
    assert done.returncode == 0, f"the process ended with {done.returncode} after {last}: {done.stderr[-2000:]}"
    assert len(lines) == 2 * len(names)
    return {(Path(path).name, start): (outcome, streams) for path, start, outcome, streams in lines}


def test_odd_files_decode_or_say_why(odd):
    strange = {key: outcome for key, (outcome, _) in odd.items() if outcome not in ("decoded", *media.REASONS)}
    assert not strange


def test_no_odd_file_is_missing(odd):
    assert not [key for key, (outcome, _) in odd.items() if outcome in ("missing", "unreadable")]


def test_odd_files_that_a_plain_loop_decodes_decode(odd):
    for entry in catalogue(CLIPS / "odd" / "catalogue.csv"):
        if entry["outcome"] == "decodes":
            outcome, streams = odd[Path(entry["file"]).name, 0.0]
            assert outcome == "decoded", entry["file"]
            assert ("video" in streams) == bool(entry["vcodec"]), entry["file"]
            if entry["acodec"]:
                assert "audio" in streams, entry["file"]


def test_sound_of_eight_channels_decodes(odd):
    crashers = [entry for entry in catalogue(CLIPS / "odd" / "catalogue.csv") if "SIGSEGV" in entry["outcome"]]
    assert len(crashers) == 4
    for entry in crashers:
        outcome, streams = odd[Path(entry["file"]).name, 0.0]
        assert outcome == "decoded", entry["file"]
        assert "audio" in streams, entry["file"]


def test_files_that_open_and_hold_nothing_say_so(odd):
    for entry in catalogue(CLIPS / "odd" / "catalogue.csv"):
        if entry["outcome"] == "opens, 0 frames, no exception":
            assert odd[Path(entry["file"]).name, 0.0][0] in ("no frames", "no streams"), entry["file"]
