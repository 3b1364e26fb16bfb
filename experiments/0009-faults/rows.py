"""Inputs that once went wrong in silence, written here: what is decoded and stored of each now, as a table.

    python experiments/0009-faults/rows.py FOLDER

FOLDER is where the media are written. Needs the ffmpeg command (Debian's package). Exit code 1 where a row is not right.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vmm.data import media
from vmm.data.building.store import Storage
from vmm.data.building.transcode import transcode
from vmm.data.inspection.check import check

RATE = 16000
STEPS = "aevalsrc='0.5*sin(2*PI*(300+100*floor(t))*t)'"  # 300 Hz in the first second, 100 Hz more in each one
ROWS: dict[str, tuple[str, Callable[[Path], tuple[str, bool]]]] = {}


def row(name: str, before: str):
    def add(function):
        ROWS[name] = before, function
        return function

    return add


def ffmpeg(*arguments, data: bytes | None = None) -> bytes:
    return subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, arguments)], input=data, capture_output=True, check=True).stdout  # fmt: skip


def read(path: Path, start: float = 0.0, seconds: float = 1.0, frames: int = 5, size: int = 64) -> media.Media:
    return media.decode(path, pick=lambda _: start, seconds=seconds, frames=frames, size=size, sample_rate=RATE)


def built(path: Path) -> dict:
    note = transcode(str(path), storage=list(Storage())).note
    return (note["clips"] or [note])[0]


def pitches(wave: np.ndarray) -> list[int]:
    """Hz of each second."""
    seconds = [wave[i : i + RATE] for i in range(0, len(wave), RATE)]
    return [10 * round(float((np.diff(np.signbit(part)) != 0).sum() / 2 / (len(part) / RATE)) / 10) for part in seconds]


def box(picture: np.ndarray) -> tuple[int, int]:
    ys, xs = np.where(picture.mean(-1) > 125)
    return int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1


def gray(rate: int, seconds: int, step: int) -> str:
    return f"nullsrc=s=64x64:r={rate}:d={seconds},geq=lum='16+N*{step}':cb=128:cr=128"


@row("adpcm.wav", "half to three quarters of the sound lost, the rest too fast; build: damaged")
def adpcm(folder: Path):
    path = folder / "adpcm.wav"
    ffmpeg("-f", "lavfi", "-i", f"{STEPS}:s=44100:d=12", "-ac", 2, "-c:a", "adpcm_ima_wav", path)
    whole, late = pitches(read(path, 0, 12).audio), pitches(read(path, 5, 2).audio)
    clip = built(path)
    right = whole == [300 + 100 * i for i in range(12)] and late == [800, 900] and clip.get("audio")
    return f"{whole[0]}, {whole[1]} … {whole[-1]} Hz; stored whole", right


@row("stereo.wav, surround.wav", "32 % and 60 % of samples at ±1")
def channels(folder: Path):
    found = {}
    wave = 0.8 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)
    for name, layout in (("mono", "mono"), ("stereo", "stereo"), ("surround", "5.1")):
        count = av.AudioLayout(layout).nb_channels
        path = folder / f"{name}.wav"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=RATE, layout=layout)
            values = np.repeat((wave * 32767).astype(np.int16)[:, None], count, 1).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(values, "s16", layout)
            frame.sample_rate, frame.pts = RATE, 0
            container.mux(stream.encode(frame))
        found[name] = float(np.abs(read(path, 0, 2).audio).max())
    return "peaks " + ", ".join(f"{name} {peak:.2f}" for name, peak in found.items()), all(abs(p - 0.8) < 0.01 for p in found.values())  # fmt: skip


@row("odd_side.webm", "no crop: a disc is 25 × 45")
def odd_side(folder: Path):
    y, x = np.mgrid[:347, :640]
    disc = np.where((x - 319.5) ** 2 + (y - 173) ** 2 < 121**2, 235, 16).astype("u1")
    data = np.repeat(disc[None, :, :, None], 3, -1).repeat(5, 0).tobytes()
    path = folder / "odd_side.webm"
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "640x347", "-r", 10, "-i", "-", "-c:v", "libvpx-vp9", "-cpu-used", 8, "-b:v", "1M", "-pix_fmt", "yuv420p", path, data=data)  # fmt: skip
    wide, high = box(read(path, 0, 0.5).video[0])
    return f"{wide} × {high}", abs(wide - high) <= 1 and abs(wide - 45) <= 1


@row("program_stream.mpg", "no sound behind 10 s")
def program_stream(folder: Path):
    path = folder / "program_stream.mpg"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64:r=25:d=40", "-f", "lavfi", "-i", f"{STEPS}:d=40", "-c:v", "mpeg2video", "-c:a", "mp2", path)  # fmt: skip
    got = read(path, 15)
    heard = None if got.audio is None else pitches(got.audio)[0]
    return f"{heard} Hz at 15 s", heard == 1800


@row("late_video.flv", "the first 40 pictures lost; build stores 39 of 80")
def late_video(folder: Path):
    path = folder / "late_video.flv"
    ffmpeg("-f", "lavfi", "-i", gray(10, 8, 2), "-f", "lavfi", "-i", "sine=d=8", "-c:v", "flv1", "-q:v", 2, "-c:a", "libmp3lame", "-ar", 44100, path)  # fmt: skip
    means, count = [float(p.mean()) for p in read(path).video], built(path).get("frames")
    return f"means {', '.join(f'{mean:.0f}' for mean in means)}; {count} stored", means[-1] < 24 and count == 80


@row("repeated.ogv", "frozen on the first picture; build: damaged")
def repeated(folder: Path):
    path = folder / "repeated.ogv"
    ffmpeg("-f", "lavfi", "-i", gray(5, 4, 8), "-r", 10, "-c:v", "libtheora", path)
    means, clip = [float(p.mean()) for p in read(path, 0, 4, 8).video], built(path)
    return f"rises {means[0]:.0f} → {means[-1]:.0f}; {clip.get('frames')} stored", means == sorted(means) and means[-1] > 150 and clip.get("frames", 0) >= 39  # fmt: skip


@row("sound.wmv", "left out: a frame without a time")
def wmv(folder: Path):
    path = folder / "sound.wmv"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64:r=10:d=3", "-f", "lavfi", "-i", "sine=d=3", "-c:v", "wmv2", "-c:a", "wmav2", path)  # fmt: skip
    clip = built(path)
    return f"{clip.get('frames')} pictures, {clip.get('duration')} s", clip.get("frames") == 30 and clip.get("audio")


def packets(path: Path, tones: list[tuple[int, float]], jitter: float = 0.0) -> Path:
    """Writes 2 s of each tone (Hz, start), in packets of 0.1 s or, with jitter, of 0.02."""
    step = RATE // 50 if jitter else RATE // 10
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for hz, start in tones:
            wave = (0.5 * np.sin(2 * np.pi * hz * np.arange(2 * RATE) / RATE) * 32767).astype("i2")[None]
            for i in range(0, 2 * RATE, step):
                frame = av.AudioFrame.from_ndarray(wave[:, i : i + step], "s16", "mono")
                frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
                frame.pts = round(start * RATE) + i + round((i // step % 2) * jitter * RATE)
                container.mux(stream.encode(frame))
    return path


@row("hole.mkv", "sound behind a hole comes 3 s early")
def hole(folder: Path):
    heard = pitches(read(packets(folder / "hole.mkv", [(300, 0), (1000, 5)]), 0, 7).audio)
    return f"{heard} Hz", heard == [300, 300, 0, 0, 0, 1000, 1000]


@row("sound with jittering timestamps", "the same moment differs by 20 ms between windows")
def jitter(folder: Path):
    path = packets(folder / "jitter.mkv", [(50, 0)], 0.019)
    crossings = []
    for start in (0.30, 0.31, 0.32, 0.33):
        wave = read(path, start, 1.0).audio[1600:]
        first = np.flatnonzero((wave[:-1] < 0) & (wave[1:] >= 0))[0]
        crossings.append((start + 0.1 + first / RATE) % 0.02)
    apart = 1000 * (max(crossings) - min(crossings))
    apart = min(apart, 20 - apart)
    return f"differs by {apart:.1f} ms", apart < 2


@row("bare.aac", "length guessed as 306 s of 12")
def bare(folder: Path):
    path = folder / "bare.aac"
    ffmpeg("-f", "lavfi", "-i", "aevalsrc='if(lt(t,3),0,0.5*(random(0)*2-1))':s=44100:d=12", "-c:a", "aac", "-b:a", "128k", path)  # fmt: skip
    length, clip = media.probe_duration(path), built(path)
    return f"{length:.1f} s, stored {clip.get('duration')}", abs(length - 12) < 0.1 and abs(clip.get("duration", 0) - 12) < 0.1  # fmt: skip


@row("no_length.webm", "only the first seconds are ever seen")
def no_length(folder: Path):
    path = folder / "no_length.webm"
    path.write_bytes(
        ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64:d=30", "-c:v", "libvpx", "-b:v", "200k", "-f", "webm", "-")
    )
    length = media.probe_duration(path)
    return f"{length} s", length is not None and abs(length - 30) < 0.1


@row("wide_pixels.mp4", "square pixels assumed")
def wide_pixels(folder: Path):
    y, x = np.mgrid[:360, :320]
    disc = np.where(4 * (x - 159.5) ** 2 + (y - 179.5) ** 2 < 120**2, 235, 16).astype("u1")
    data = np.repeat(disc[None, :, :, None], 3, -1).repeat(5, 0).tobytes()
    path = folder / "wide_pixels.mp4"
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "320x360", "-r", 10, "-i", "-", "-vf", "setsar=2/1", "-c:v", "libx264", "-pix_fmt", "yuv420p", path, data=data)  # fmt: skip
    wide, high = box(read(path, 0, 0.5).video[0])
    clip = built(path)
    return f"a disc is {wide} × {high}; stored {clip['width']} × {clip['height']}", abs(wide - high) <= 1


@row("two_tracks.mkv", "the first track, not the default one")
def two_tracks(folder: Path):
    path = folder / "two_tracks.mkv"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64:d=2", "-f", "lavfi", "-i", "sine=300:d=2", "-f", "lavfi", "-i", "sine=1000:d=2", "-map", 0, "-map", 1, "-map", 2, "-disposition:a:0", 0, "-disposition:a:1", "default", "-pix_fmt", "yuv420p", path)  # fmt: skip
    got = read(path)
    return f"{pitches(got.audio)[0]} Hz, {', '.join(got.remarks)}", pitches(got.audio) == [1000]


@row("cut_in_gop.ts", "no video in early windows; build: undecodable")
def cut_in_gop(folder: Path):
    whole = folder / "whole.ts"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64:r=25:d=40", "-c:v", "libx264", "-g", 250, "-pix_fmt", "yuv420p", "-f", "mpegts", whole)  # fmt: skip
    content = whole.read_bytes()
    path = folder / "cut_in_gop.ts"
    path.write_bytes(content[int(len(content) * 0.03) // 188 * 188 :])
    got, clip = read(path), built(path)
    return f"{', '.join(got.remarks)}; {clip.get('frames')} stored", got.video is not None and clip.get("frames") == 750


@row("a paletted raw AVI", "black behind a seek, stored black")
def palette(folder: Path):
    path = folder / "palette.avi"
    ffmpeg("-f", "lavfi", "-i", gray(10, 3, 6), "-c:v", "rawvideo", "-pix_fmt", "pal8", path)
    means, clip = [float(p.mean()) for p in read(path, 1.5).video], built(path)
    return f"means {means[0]:.0f} … {means[-1]:.0f}; {clip.get('frames')} stored", means[0] > 80 and clip.get(
        "frames"
    ) == 30


@row("a raw .h264", "never gives a picture")
def raw(folder: Path):
    path = folder / "raw.h264"
    ffmpeg("-f", "lavfi", "-i", gray(10, 3, 6), "-c:v", "libx264", "-pix_fmt", "yuv420p", "-f", "h264", path)
    got, clip = read(path, 1.0), built(path)
    return f"{clip.get('frames')} pictures, {clip.get('duration')} s", got.video is not None and clip.get(
        "frames"
    ) == 30


@row("rows behind the end of their file", "frozen, and `data check` finds nothing")
def behind(folder: Path):
    path = packets(folder / "behind.mkv", [(300, 0), (400, 2)])
    manifest = folder / "behind.jsonl"
    rows = [
        {"id": "a", "path": path.name, "start": 1, "end": 20},
        {"id": "b", "path": path.name, "start": 10, "end": 12},
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in rows))
    problems = check(manifest).problems
    try:
        reason = f"decoded {read(path, 10) is not None}"
    except media.DecodeError as error:
        reason = error.reason
    return f"{reason}; check finds {len(problems)}", reason == "span outside" and len(problems) == 2


@row("a FIFO in a manifest", "blocks for ever")
def fifo(folder: Path):
    path, found = folder / "fifo.mp4", []
    if not path.exists():
        os.mkfifo(path)

    def attempt():
        try:
            read(path)
        except media.DecodeError as error:
            found.append(error.reason)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20)
    return "".join(found) or "blocks", found == ["unreadable"]


@row("H.263 and AMR of phones (.3gp)", "left out: a frame without a time")
def phone(folder: Path):
    path = folder / "phone.3gp"
    try:
        ffmpeg("-f", "lavfi", "-i", "testsrc=s=176x144:r=15:d=2", "-f", "lavfi", "-i", "sine=d=2", "-c:v", "h263", "-c:a", "libopencore_amrnb", "-ar", 8000, "-ac", 1, path)  # fmt: skip
    except subprocess.CalledProcessError:  # Debian's ffmpeg has no encoder of AMR
        ffmpeg("-f", "lavfi", "-i", "testsrc=s=176x144:r=15:d=2", "-f", "lavfi", "-i", "sine=d=2", "-c:v", "h263", "-c:a", "aac", "-ar", 8000, "-ac", 1, path)  # fmt: skip
    clip = built(path)
    return f"{clip.get('frames')} pictures, sound {clip.get('audio')}", clip.get("frames") == 30 and bool(
        clip.get("audio")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    wrong = 0
    print("| input | before | now | right |\n|---|---|---|---|")
    for name, (before, function) in ROWS.items():
        try:
            now, right = function(folder)
        except (media.DecodeError, *media.BROKEN, subprocess.CalledProcessError) as error:
            now, right = f"{type(error).__name__}: {error}", False
        wrong += not right
        print(f"| {name} | {before} | {now} | {'yes' if right else 'no'} |", flush=True)
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
