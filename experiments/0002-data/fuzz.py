"""Broken files against `vmm data build`: how many crash it, hang, escape its reasons, or come out wrong in silence.

    python experiments/0002-data/fuzz.py --count 2000 --workers 2 [--clips DIR] [--out results.json]

Clips of the synthetic world are encoded in five codecs; each broken file is one of them after a seeded mutation.
Every file goes through the build's sandboxed transcode twice, without a hash to check and with the original's, and
through a plain decoding loop. Transcoding is deterministic: a stored clip is right when it is, byte for byte,
what the unbroken file gives.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import av
import numpy as np

from vmm.data import world
from vmm.data.building.transcode import REASONS
from vmm.data.sandbox import DEATHS, Answer, Died, Limits, run_all

# name: (container, pictures, their options, sound)
CODECS = {
    "H.264": ("mp4", "libx264", {"preset": "veryfast", "crf": "23"}, "aac"),
    "HEVC": ("mp4", "libx265", {"preset": "ultrafast", "x265-params": "log-level=none"}, "aac"),
    "VP9": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, "libopus"),
    "AV1": ("mkv", "libsvtav1", {"preset": "12", "svtav1-params": "lp=1"}, "libopus"),
    "MPEG-4": ("avi", "mpeg4", {"qscale": "4", "bf": "2"}, "libmp3lame"),
}
CLIPS = 8  # of the world, for each codec
HUGE = (0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0x7FFF, 60000, 1 << 24)


# ---- files -------------------------------------------------------------------------------------------


def encode(source: Path, target: Path, codec: str) -> None:
    """Writes the clip again in another codec, with its sound."""
    container, video, options, audio = CODECS[codec]
    with av.open(str(source)) as file:
        pictures = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    with av.open(str(source)) as file:
        frames = list(file.decode(audio=0)) if file.streams.audio else []
    with av.open(str(target), "w", format={"mkv": "matroska"}.get(container, container)) as sink:
        seen = sink.add_stream(video, rate=world.FPS, options=options)
        seen.height, seen.width, seen.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        heard = sink.add_stream(audio, rate=48000, layout="mono") if frames else None
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, world.FPS)
            sink.mux(seen.encode(frame))
        sink.mux(seen.encode(None))
        if heard:
            resampler = av.AudioResampler(format=heard.format.name, layout="mono", rate=48000)
            place = 0
            for frame in (*frames, None):
                for piece in resampler.resample(frame):
                    piece.pts, place = place, place + piece.samples
                    sink.mux(heard.encode(piece))
            sink.mux(heard.encode(None))


def flip(data: bytearray, rng) -> None:
    for place in rng.integers(len(data), size=rng.integers(1, 33)):
        data[place] ^= int(rng.integers(1, 256))


def truncate(data: bytearray, rng) -> None:
    del data[int(rng.integers(len(data))) :]


def _block(data: bytearray, rng) -> slice:
    size = int(min(len(data) // 2, 2 ** rng.uniform(4, 13)))
    begin = int(rng.integers(len(data) - size))
    return slice(begin, begin + size)


def zero(data: bytearray, rng) -> None:
    where = _block(data, rng)
    data[where] = bytes(where.stop - where.start)


def swap(data: bytearray, rng) -> None:
    one = _block(data, rng)
    size = one.stop - one.start
    begin = int(rng.integers(len(data) - size))
    data[one], data[begin : begin + size] = data[begin : begin + size], data[one]


def duplicate(data: bytearray, rng) -> None:
    where = _block(data, rng)
    data[where.stop : where.stop] = data[where]


def huge(data: bytearray, rng) -> None:
    """Integers of the headers, at either end of the file, become very large."""
    for _ in range(int(rng.integers(1, 5))):
        near = int(rng.integers(min(len(data) - 4, 2048)))
        place = near if rng.integers(2) else len(data) - 4 - near
        data[place : place + 4] = int(rng.choice(HUGE)).to_bytes(4, "big" if rng.integers(2) else "little")


def insert(data: bytearray, rng) -> None:
    place = int(rng.integers(len(data)))
    data[place:place] = rng.integers(0, 256, int(2 ** rng.uniform(0, 12)), np.uint8).tobytes()


MUTATIONS = (flip, truncate, zero, swap, duplicate, huge, insert)


def mutate(data: bytes, seed: int, number: int) -> bytes:
    """Returns the broken file of this number: the same for ever."""
    rng = np.random.default_rng([seed, number])
    broken = bytearray(data)
    MUTATIONS[int(rng.integers(len(MUTATIONS)))](broken, rng)
    return bytes(broken)


# ---- decoding ----------------------------------------------------------------------------------------


def plain(path: str) -> Answer:
    """What most training code does: decodes until the end or an error, and keeps what came. Runs in a sandbox."""
    digest, some = hashlib.sha256(), False
    for kind in ("video", "audio"):
        try:
            with av.open(path) as container:
                resampler = av.AudioResampler(format="flt", layout="mono", rate=16000)
                for frame in container.decode(**{kind: 0}):
                    pieces = [frame.reformat(format="rgb24")] if kind == "video" else resampler.resample(frame)
                    for piece in pieces:
                        digest.update(piece.to_ndarray().tobytes())
                        some = True
        except (av.FFmpegError, OSError, ValueError, IndexError, MemoryError, EOFError):
            pass
    return Answer({"digest": digest.hexdigest() if some else None}, [])


def outcome(answer: Answer | Died, right: list[bytes] | None) -> str:
    """Returns what came of a transcode in one word; right: what the unbroken file gives, None: not known."""
    if isinstance(answer, Died):
        if answer.reason == "crashed" and not answer.detail.startswith("SIG"):
            return "unclassified"
        return "contained crash" if answer.reason == "crashed" else answer.reason
    clips = answer.note["clips"]
    reasons = [answer.note["reason"]] if "reason" in answer.note else [c["reason"] for c in clips if "reason" in c]
    if reasons:
        return "left out" if set(reasons) <= {*REASONS, *DEATHS} else "unclassified"
    if right is None:
        return "stored"
    return "right" if answer.parts == right else "silently wrong"


def transcoded(jobs: list[tuple], workers: int, limits: Limits) -> Iterator[tuple]:
    """Yields (key, outcome of the call) and counts seconds; an exception here would be a crash of the build."""
    yield from run_all("vmm.data.building.transcode:transcode", jobs, workers, limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="broken files (default %(default)s)")
    parser.add_argument("--clips", type=Path, help="a folder of real files, decoded as they are")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file with the counts")
    args = parser.parse_args()
    limits = Limits(seconds=10.0, memory=1 << 30)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        counts, examples = fuzz(folder, args, limits)
        result = {"seed": args.seed, "codecs": counts, "examples": examples}
        if args.clips:
            result["clips"] = real(args.clips, args.workers, limits)
    result["minutes"] = round((time.monotonic() - begin) / 60, 1)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def fuzz(folder: Path, args, limits: Limits) -> tuple[dict, dict]:
    """Returns (codec → way → outcome → count, way → up to five files with an outcome that must not be)."""
    world.generate(folder / "world", {"train": 24, "validation": 8, "test": 8}, seed=args.seed)
    sources = [path for path in sorted((folder / "world" / "train").glob("*.mp4")) if _whole(path)][:CLIPS]
    codecs = [name for name in CODECS if CODECS[name][1] in av.codecs_available]
    bases = []
    for name in codecs:
        for number, source in enumerate(sources):
            path = folder / f"{name}-{number}.{CODECS[name][0]}"
            encode(source, path, name)
            bases.append((name, path, path.read_bytes()))
    keys = range(len(bases))
    right = {}
    for key, answer in run_all(
        "vmm.data.building.transcode:transcode",
        [(key, {"path": str(bases[key][1])}) for key in keys],
        args.workers,
        limits,
    ):
        if outcome(answer, None) != "stored":
            raise SystemExit(f"{bases[key][1].name} is not broken, but: {answer}")
        right[key] = answer.parts
    plainly = {key: answer.note["digest"] for key, answer in run_all(
        "fuzz:plain", [(key, {"path": str(bases[key][1])}) for key in keys], args.workers, limits
    )}  # fmt: skip

    counts = {name: defaultdict(Counter) for name in codecs}
    examples = defaultdict(list)
    files = folder / "broken"
    files.mkdir()

    def jobs(way: str) -> Iterator[tuple]:
        for number in range(args.count):
            name, path, data = bases[number % len(bases)]
            target = files / f"{number}{path.suffix}"
            if not target.exists():
                target.write_bytes(mutate(data, args.seed, number))
            arguments = {"path": str(target)}
            if way == "hash checked":
                arguments["sha256"] = hashlib.sha256(data).hexdigest()
            yield number, arguments

    for way in ("hash checked", "unchecked", "plain loop"):
        function = "fuzz:plain" if way == "plain loop" else "vmm.data.building.transcode:transcode"
        for done, (number, answer) in enumerate(run_all(function, jobs(way), args.workers, limits), 1):
            name, path, data = bases[number % len(bases)]
            word = _plain_outcome(answer, plainly[number % len(bases)]) if way == "plain loop" else outcome(
                answer, right[number % len(bases)]
            )  # fmt: skip
            if word == "right" and mutate(data, args.seed, number) == data:
                word = "unchanged"  # a mutation may put what was there
            counts[name][way][word] += 1
            if word not in ("right", "left out", "unchanged") and len(examples[f"{way}: {word}"]) < 5:
                detail = f" {answer.detail}" if isinstance(answer, Died) else ""
                examples[f"{way}: {word}"].append(f"{number} {name}{detail}")
            if done % 200 == 0:
                print(f"{way}: {done} of {args.count}", file=sys.stderr, flush=True)
    return {name: dict(ways) for name, ways in counts.items()}, dict(examples)


def _whole(path: Path) -> bool:
    with av.open(str(path)) as container:
        return bool(container.streams.video and container.streams.audio)


def _plain_outcome(answer: Answer | Died, right: str) -> str:
    if isinstance(answer, Died):
        return answer.reason
    digest = answer.note["digest"]
    return "left out" if digest is None else "right" if digest == right else "silently wrong"


def real(folder: Path, workers: int, limits: Limits) -> dict:
    """Returns the counts of every file below a folder, and each that is left out with its reason."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in (".csv", ".md")]
    limits = limits._replace(seconds=120.0, memory=2 << 30)
    counts, left_out = Counter(), {}
    for path, answer in run_all(
        "vmm.data.building.transcode:transcode", [(path, {"path": str(path)}) for path in paths], workers, limits
    ):
        counts[word := outcome(answer, None)] += 1
        if word != "stored":
            note = {} if isinstance(answer, Died) else answer.note
            first = note if "reason" in note else next(iter(note.get("clips", ())), {"reason": str(answer)})
            left_out[str(path.relative_to(folder))] = first["reason"]
    return {"counts": dict(counts), "left out": dict(sorted(left_out.items()))}


def show(result: dict) -> None:
    words = ("right", "unchanged", "left out", "silently wrong", "contained crash", "crashed", "timeout", "out of memory",
             "killed", "answer too large", "unclassified")  # fmt: skip
    for way in ("hash checked", "unchecked", "plain loop"):
        total = sum((Counter(ways[way]) for ways in result["codecs"].values()), Counter())
        used = [word for word in words if total[word]]
        print(f"\n{way}\n\n| codec | files | {' | '.join(used)} |\n|---|{'---|' * (len(used) + 1)}")
        for name, counts in (*((name, ways[way]) for name, ways in result["codecs"].items()), ("all", total)):
            print(f"| {name} | {sum(counts.values())} | {' | '.join(str(counts.get(word, 0)) for word in used)} |")
    for name, files in result["examples"].items():
        print(f"{name}: {'; '.join(files)}")
    if "clips" in result:
        print(f"\nreal files: {result['clips']['counts']}")
        for name, reason in result["clips"]["left out"].items():
            print(f"  {name}: {reason}")
    print(f"\n{result['minutes']} minutes")


if __name__ == "__main__":
    main()
