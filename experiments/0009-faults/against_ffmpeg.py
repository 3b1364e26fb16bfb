"""What vmm decodes of a window, against what the ffmpeg command decodes of the whole file: counts of disagreements by kind.

    python experiments/0009-faults/against_ffmpeg.py --count 200 --seed 0 --folder DIR   files written here, seeded
    python experiments/0009-faults/against_ffmpeg.py --files DIR                         files of one's own

Agreement: at every moment asked for, a picture within 35 dB of ffmpeg's, or of the one before or after it where the moment
is within a millisecond of a change; sound that correlates by 0.99 with ffmpeg's, best within 10 ms, its level within 0.5 dB;
pictures and sound present where ffmpeg has some. Needs the ffmpeg command (Debian's package).
"""

import argparse
import json
import re
import subprocess
import sys
from bisect import bisect_right
from collections import Counter
from pathlib import Path

import numpy as np

from vmm.data import media

SIZE, RATE, FRAMES = 32, 16000, 5
WORST, ALIKE, LAG, LEVEL = 35.0, 0.99, 0.010, 0.5

# container → codecs of pictures and of sound that it takes.
CONTAINERS = {
    "mp4": ("libx264 libx265 mpeg4 mjpeg libvpx-vp9", "aac libmp3lame ac3 alac flac libopus"),
    "mov": ("libx264 mpeg4 prores_ks qtrle mjpeg", "aac pcm_s16le adpcm_ima_qt pcm_s24be"),
    "mkv": ("libx264 libx265 libvpx-vp9 mpeg4 ffv1 libtheora", "aac libvorbis flac pcm_s16le libopus ac3 mp2 wavpack"),
    "webm": ("libvpx libvpx-vp9", "libvorbis libopus"),
    "avi": ("mpeg4 mjpeg msmpeg4 libx264 ffvhuff rawvideo", "libmp3lame pcm_s16le ac3 adpcm_ms adpcm_ima_wav"),
    "flv": ("flv libx264", "aac libmp3lame"),
    "ts": ("libx264 mpeg2video libx265", "aac mp2 ac3 libmp3lame"),
    "mpg": ("mpeg1video mpeg2video", "mp2 ac3"),
    "vob": ("mpeg2video", "ac3 mp2"),
    "wmv": ("wmv2 wmv1 msmpeg4", "wmav2 wmav1"),
    "ogv": ("libtheora", "libvorbis flac libopus"),
    "3gp": ("h263 mpeg4 libx264", "aac"),
    "mxf": ("mpeg2video", "pcm_s16le"),
    "nut": ("ffv1 libx264 mpeg4", "flac pcm_s16le libvorbis"),
    "gif": ("gif", ""),
    "h264": ("libx264", ""),
    "hevc": ("libx265", ""),
    "wav": ("", "pcm_s16le pcm_u8 pcm_f32le adpcm_ms adpcm_ima_wav adpcm_yamaha pcm_alaw libmp3lame"),
    "mp3": ("", "libmp3lame"),
    "aac": ("", "aac"),
    "m4a": ("", "aac alac"),
    "ac3": ("", "ac3"),
    "flac": ("", "flac"),
    "ogg": ("", "libvorbis libopus flac libspeex"),
    "mka": ("", "libvorbis aac pcm_s24le tta"),
    "caf": ("", "pcm_s16be aac adpcm_ima_qt alac"),
    "aiff": ("", "pcm_s16be pcm_s24be"),
    "w64": ("", "pcm_s16le adpcm_ms"),
    "wv": ("", "wavpack"),
    "wma": ("", "wmav2"),
}  # fmt: skip
_ONE_RATE = {"libopus": 48000, "libspeex": 16000}


def ffmpeg(*arguments, data: bytes | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["ffmpeg", "-hide_banner", "-y", *map(str, arguments)], input=data, capture_output=True, timeout=120
    )


def write(path: Path, rng: np.random.Generator, container: str) -> dict | None:
    """Writes a file; returns how it was made, None where ffmpeg refuses to."""
    pictures, sounds = (names.split() for names in CONTAINERS[container])
    made = {"container": container, "seconds": round(float(rng.uniform(1.5, 6)), 2)}
    picture = str(rng.choice(pictures)) if pictures else None
    sound = str(rng.choice(sounds)) if sounds and (not pictures or rng.uniform() < 0.8) else None
    inputs, options = [], []
    if picture:
        width, height = (int(side) for side in rng.integers(24, 60, 2) * 2)
        if rng.uniform() < 0.3 and picture not in ("h263", "ffvhuff"):
            width, height = width + int(rng.integers(2)), height + 1
        if picture == "h263":
            width, height = 176, 144
        rate = int(rng.choice([5, 10, 12, 25, 30]))
        if picture in ("mpeg1video", "mpeg2video"):
            rate = int(rng.choice([25, 30]))
        gop = int(rng.choice([1, 6, 30, 250]))
        shape = int(rng.choice([1, 1, 1, 2])) if picture in ("libx264", "mpeg4", "libvpx-vp9", "libx265") else 1
        made |= {"picture": picture, "size": f"{width}x{height}", "rate": rate, "gop": gop, "pixel": shape}
        x, y = f"X/{width}", f"Y/{height}"
        luma = f"118+80*sin(2*PI*({x}+0.618034*N))+20*{y}"  # no two pictures are alike
        inputs += ["-f", "lavfi", "-i", f"nullsrc=s={width}x{height}:r={rate}:d={made['seconds']},geq=lum='{luma}':cb='128+50*{x}-25':cr='128+50*{y}-25',setsar={shape}"]  # fmt: skip
        options += ["-c:v", picture, "-g", gop, "-q:v", 2]
        if picture in ("libx264", "libx265"):
            bframes = int(rng.choice([0, 3]))
            made["b"] = bframes
            options += ["-crf", 10, "-preset", "veryfast", "-bf", bframes, "-pix_fmt", "yuv420p"]
            options += ["-x265-params", "log-level=none"] if picture == "libx265" else []
        elif picture.startswith("libvpx"):
            options += ["-b:v", "1M", "-crf", 8, "-cpu-used", 8, "-pix_fmt", "yuv420p"]
        elif picture == "mpeg4":
            options += ["-bf", int(rng.choice([0, 2]))]
        elif picture == "rawvideo":
            options += ["-pix_fmt", str(rng.choice(["pal8", "bgr24", "yuv420p"]))]
    if sound:
        rate = _ONE_RATE.get(sound) or int(rng.choice([16000, 22050, 44100, 48000]))
        if sound in ("ac3", "mp2", "adpcm_swf") or container in ("flv", "vob", "mxf", "mpg"):
            rate = 44100 if container == "flv" else 48000
        channels = int(rng.choice([1, 2, 2, 6]))
        if channels == 6 and sound not in ("aac", "ac3", "flac", "pcm_s16le", "libvorbis", "wavpack", "alac", "pcm_s16be", "libopus") or container == "flv":  # fmt: skip
            channels = 2
        made |= {"sound": sound, "sample_rate": rate, "channels": channels}
        waves = "|".join(
            f"{0.5 - 0.06 * place:.2f}*sin(2*PI*(150*t+{25 + 5 * place}*t*t))" for place in range(channels)
        )
        layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
        inputs += ["-f", "lavfi", "-i", f"aevalsrc='{waves}':c={layout}:s={rate}:d={made['seconds']}"]
        options += ["-c:a", sound, *([] if sound.startswith(("pcm", "adpcm", "flac", "alac")) else ["-b:a", f"{96 * channels}k"])]  # fmt: skip
    if rng.uniform() < 0.25 and container not in ("gif", "h264", "hevc", "avi", "wav", "flac", "mp3"):
        made["offset"] = 7.3
        options += ["-output_ts_offset", 7.3]
    if container == "3gp" and sound:
        options += ["-ar", 16000, "-ac", 1]
    piped = rng.uniform() < 0.15 and container in ("mkv", "webm", "flac", "ts", "ogv")
    target = (
        ["-f", {"mkv": "matroska", "ts": "mpegts", "ogv": "ogg"}.get(container, container), "pipe:1"]
        if piped
        else [path]
    )
    done = ffmpeg("-v", "error", *inputs, *options, "-strict", "-2", *target)
    if done.returncode:
        return None
    if piped:
        made["piped"] = True
        path.write_bytes(done.stdout)
    return made


def pictures_of(path: Path, number: int | None) -> tuple[list[float], np.ndarray] | None:
    """Returns times and pictures [n SIZE SIZE 3] as ffmpeg decodes them."""
    if number is None:
        return None
    shape = (
        "scale=w='trunc(iw*if(gt(sar,0),sar,1))':h=ih:flags=bilinear,setsar=1,crop='min(iw,ih)':'min(iw,ih)':exact=1"
    )
    done = ffmpeg("-v", "info", "-i", path, "-map", f"0:{number}", "-vf", f"showinfo,{shape},scale={SIZE}:{SIZE}:flags=bilinear,format=rgb24", "-vsync", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")  # fmt: skip
    # What the filter says of times is rounded to the frame rate.
    probe = subprocess.run(["ffprobe", "-v", "error", "-show_entries", "frame=best_effort_timestamp_time:format=start_time", "-select_streams", str(number), "-of", "json", path], capture_output=True, timeout=120)  # fmt: skip
    about = json.loads(probe.stdout or b"{}")
    origin = float(about.get("format", {}).get("start_time", 0.0))
    times = [float(frame.get("best_effort_timestamp_time", "nan")) - origin for frame in about.get("frames", ())]
    if len(times) != done.stderr.count(b"pts_time:") or not np.isfinite(times).all():
        times = [float(time) for time in re.findall(r"pts_time:(-?[\d.]+)", done.stderr.decode(errors="replace"))]
    found = np.frombuffer(done.stdout, np.uint8)
    found = found[: len(found) // (SIZE * SIZE * 3) * SIZE * SIZE * 3].reshape(-1, SIZE, SIZE, 3)
    count = min(len(times), len(found))
    return (times[:count], found[:count]) if count else None


def sound_of(path: Path, number: int | None, channels: int) -> np.ndarray | None:
    """Returns the mean of all channels as ffmpeg decodes them, placed by time."""
    if number is None:
        return None
    mean = "pan=mono|c0=" + "+".join(f"{1 / channels:.6f}*c{place}" for place in range(channels))
    done = ffmpeg("-v", "error", "-i", path, "-map", f"0:{number}", "-af", f"{mean},aresample={RATE}:async=1:first_pts=0:min_hard_comp=0.03", "-f", "f32le", "-")  # fmt: skip
    wave = np.frombuffer(done.stdout[: len(done.stdout) // 4 * 4], np.float32)
    return wave if len(wave) else None


def compare(path: Path, starts: list[float], seconds: float) -> tuple[list[str], dict]:
    """Returns the disagreements of the windows of a file, and details."""
    with media.Medium(path) as medium:
        streams = {kind: medium.stream(kind) for kind in ("video", "audio")}
        indices = {kind: None if stream is None else stream.index for kind, stream in streams.items()}
        channels = streams["audio"].codec_context.channels if streams["audio"] is not None else 1
        turned = False
    true_pictures, true_sound = pictures_of(path, indices["video"]), sound_of(path, indices["audio"], channels)
    faults, details = [], {}

    def fault(kind: str, **more):
        faults.append(kind)
        details.setdefault(kind, more)

    for start in starts:
        try:
            got = media.decode(path, pick=lambda _, start=start: start, seconds=seconds, frames=FRAMES, size=SIZE, sample_rate=RATE)  # fmt: skip
        except media.DecodeError as error:
            reach = (true_pictures is not None and start < true_pictures[0][-1]) or (true_sound is not None and start * RATE < len(true_sound))  # fmt: skip
            if reach:
                fault("refused", start=start, error=str(error))
            continue
        if true_pictures is not None:
            times, pictures = true_pictures
            targets = [start + (i + 0.5) * seconds / FRAMES for i in range(FRAMES)]
            if got.video is None:
                if start < times[-1]:
                    fault("no pictures", start=start)
            elif not turned:
                for target, picture in zip(targets, got.video):
                    near = {max(0, bisect_right(times, target + moved) - 1) for moved in (-0.0015, 0.0, 0.0015)}
                    best = max(psnr(picture, pictures[place]) for place in near)
                    if best < WORST:
                        where = max(range(len(times)), key=lambda place: psnr(picture, pictures[place]))
                        other = psnr(picture, pictures[where])
                        kind = "another picture" if other >= WORST or other > best + 6 else "picture differs"
                        fault(kind, start=start, target=round(target, 3), db=round(best, 1), shown=times[where], db_there=round(other, 1))  # fmt: skip
                        break
        elif got.video is not None and indices["video"] is not None:
            fault("pictures that ffmpeg lacks", start=start)
        if true_sound is not None:
            truth = np.zeros(round(seconds * RATE), np.float32)
            begin = round(start * RATE)
            piece = true_sound[begin : begin + len(truth)]
            truth[: len(piece)] = piece
            loud = np.abs(truth).max() > 0.02
            if got.audio is None:
                if loud:
                    fault("no sound", start=start)
            elif loud:
                lag, alike = best_lag(got.audio, truth)
                level = 20 * np.log10(np.sqrt(np.mean(got.audio**2) / np.mean(truth**2)) + 1e-9)
                if abs(lag) > LAG or alike < ALIKE:
                    fault("sound elsewhere in time" if alike >= ALIKE else "sound differs", start=start, lag_ms=round(1000 * lag, 1), alike=round(alike, 3))  # fmt: skip
                if abs(level) > LEVEL:
                    fault("level differs", start=start, db=round(float(level), 2))
        elif got.audio is not None and np.abs(got.audio).max() > 0.02:
            fault("sound that ffmpeg lacks", start=start)
    return faults, details


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(20 * np.log10(255 / (np.sqrt(np.mean((one.astype(float) - other) ** 2)) + 1e-6)))


def best_lag(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Returns the lag in seconds at which two sounds are most alike, within 60 ms, and their correlation there."""
    reach = round(0.06 * RATE)
    best = (0, -1.0)
    size = 1 << (2 * len(one) - 1).bit_length()
    cross = np.fft.irfft(np.fft.rfft(one, size) * np.conj(np.fft.rfft(other, size)), size)
    for lag in range(-reach, reach + 1):
        a, b = (one[lag:], other[: len(other) - lag]) if lag >= 0 else (one[:lag], other[-lag:])
        norm = np.sqrt(np.sum(a.astype(float) ** 2) * np.sum(b.astype(float) ** 2))
        alike = float(cross[lag] / norm) if norm > 0 else 0.0
        if alike > best[1] + 1e-6:
            best = (lag, alike)
    return best[0] / RATE, best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="container")
    parser.add_argument("--folder", type=Path, help="where files are written")
    parser.add_argument("--files", type=Path, help="folder of one's own files, in place of written ones")
    parser.add_argument("--limit", type=int, default=20, help="of one's own files")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    counts, rows = Counter(), []
    if arguments.files:
        names = sorted(
            path for path in arguments.files.iterdir() if path.is_file() and path.suffix not in (".md", ".csv")
        )
        for place, path in enumerate(names[: arguments.limit]):
            rng = np.random.default_rng([arguments.seed, place])
            try:
                length = media.probe_duration(path) or 0.0
            except media.BROKEN as error:
                rows.append({"file": path.name, "faults": ["does not open"], "details": str(error)})
                continue
            starts = [round(float(rng.uniform(0, max(0.0, length - 1.0))), 3) for _ in range(3)]
            faults, details = compare(path, starts, 1.0)
            rows.append({"file": path.name, "length": length, "faults": faults, "details": details})
    else:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for number in range(arguments.count):
            rng = np.random.default_rng([arguments.seed, number])
            container = arguments.only or list(CONTAINERS)[number % len(CONTAINERS)]
            path = arguments.folder / f"{number:04d}.{container}"
            made = write(path, rng, container)
            if made is None:
                counts["ffmpeg does not write it"] += 1
                continue
            room = max(0.0, made["seconds"] - 1.0)
            starts = [0.0, *(round(float(rng.uniform(0, room)), 3) for _ in range(2))]
            faults, details = compare(path, starts, 1.0)
            rows.append({"file": path.name, "made": made, "faults": faults, "details": details})
    for row in rows:
        counts["files"] += 1
        counts["files that agree"] += not row["faults"]
        counts.update(set(row["faults"]))
        if row["faults"]:
            print(json.dumps(row), flush=True)
    print(json.dumps(dict(counts), indent=1))
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"counts": counts, "rows": [row for row in rows if row["faults"]]}, indent=1)
        )


if __name__ == "__main__":
    sys.exit(main())
