"""Real digits as video with sound: MNIST's handwriting, drawn and moved, with the Free Spoken Digit Dataset's recordings.

    python experiments/0007-real/make.py SHARED_DATA OUT

The AV-MNIST recipe: a picture and a recording of the same digit become one mp4 of a second, its word is the caption.
Pictures and recordings are split before they are paired, so that no test clip shares either with any other. Recordings
0 to 9 of each speaker and digit are for testing (0 to 4 are the dataset's own test set), 10 to 14 for choosing settings,
15 to 49 for training; the pictures are split at random. Labelled subsets hold so many training clips a class, no two of
which share a picture or a recording.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vmm.data import text
from vmm.errors import UserError

SECONDS, FPS, SIZE, RATE, DRAWN = 1.0, 8, 32, 8000, 24
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
MOTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
LABELS = {"digit": WORDS, "speaker": SPEAKERS, "motion": tuple(MOTIONS)}
SPLITS = {"test": range(0, 10), "validation": range(10, 15), "train": range(15, 50)}
REPEATS = {"test": 1, "validation": 1, "train": 3}  # clips a recording
SUBSETS, SEEDS = (5, 20, 40, 100, 200), 5  # labelled clips a class; draws of them


def read_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads MNIST's test files: uint8 [n 28 28], classes int [n]."""
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"t10k-{name}-ubyte.gz").read_bytes()), np.uint8)
        for name in ("images-idx3", "labels-idx1")
    )
    return images[16:].reshape(-1, 28, 28), labels[8:].astype(int)


def read_sound(path: Path) -> np.ndarray:
    """Reads a recording: float32 [s] at RATE, in [-1, 1]."""
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def render(image: np.ndarray, motion: str, rng: np.random.Generator) -> np.ndarray:
    """Draws a digit that moves over a grey, slightly noisy ground: uint8 [T SIZE SIZE 3]."""
    count, room = round(SECONDS * FPS), SIZE - DRAWN
    grid = np.linspace(0, 27, DRAWN)
    low, part = np.minimum(grid.astype(int), 26), grid - np.minimum(grid.astype(int), 26)
    across = image[:, low] * (1 - part) + image[:, low + 1] * part
    small = across[low] * (1 - part)[:, None] + across[low + 1] * part[:, None]
    place = room / 2 + rng.uniform(-1, 1, 2)  # rows, columns of its corner in the middle of the clip
    video = np.full((count, SIZE, SIZE), rng.uniform(20, 60))
    ink = small * rng.uniform(0.6, 0.78)
    for i in range(count):
        travel = 5.0 * ((i + 0.5) / count - 0.5)
        y, x = np.clip(np.round(place + travel * np.array(MOTIONS[motion])), 0, room).astype(int)
        video[i, y : y + DRAWN, x : x + DRAWN] += ink
    video += rng.normal(0, 4, video.shape)
    return np.repeat(np.clip(video, 0, 255).astype(np.uint8)[..., None], 3, axis=3)


def play(sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lays a recording within 0.1 s of the middle of a second of near silence: float32 [S]."""
    total = round(SECONDS * RATE)
    sound = sound[:total]
    room = total - len(sound)
    place = round(np.clip(room / 2 + rng.uniform(-0.1, 0.1) * RATE, 0, room))
    whole = rng.normal(0, 1e-3, total)
    whole[place : place + len(sound)] += sound
    return np.clip(whole, -1, 1).astype(np.float32)


def write(job: tuple[Path, np.ndarray, Path, str, list[int]]) -> None:
    """Writes one clip as H.264 + AAC in mp4, where it is not there yet."""
    path, image, sound, motion, seed = job
    if path.exists():
        return
    rng = np.random.default_rng(seed)
    video, heard = render(image, motion, rng), play(read_sound(sound), rng)
    temporary = path.with_suffix(".part")
    with av.open(str(temporary), "w", format="mp4") as container:
        pictures = container.add_stream("libx264", rate=FPS)
        pictures.width, pictures.height, pictures.pix_fmt = SIZE, SIZE, "yuv420p"
        pictures.time_base, pictures.thread_type = Fraction(1, FPS), "NONE"
        pictures.options = {"preset": "veryfast", "crf": "18", "tune": "fastdecode", "threads": "1"}
        sounds = container.add_stream("aac", rate=RATE, layout="mono", bit_rate=32000)
        for i, picture in enumerate(video):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        frame = av.AudioFrame.from_ndarray(heard[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        container.mux(sounds.encode(frame))
        container.mux(sounds.encode(None))
    temporary.replace(path)


def pair(recordings: Path, labels: np.ndarray, seed: int) -> dict[str, list[tuple[int, Path]]]:
    """Returns split → (picture, recording) of one digit each; no picture is used twice.

    Raises:
      UserError: a recording is missing, or there are too few pictures.
    """
    rng = np.random.default_rng([seed, 0])
    pools = {digit: list(rng.permutation(np.flatnonzero(labels == digit))) for digit in range(10)}
    pairs: dict = {split: [] for split in SPLITS}
    for split, indices in SPLITS.items():
        for _ in range(REPEATS[split]):
            for digit in range(10):
                for speaker in SPEAKERS:
                    for index in indices:
                        path = recordings / f"{digit}_{speaker}_{index}.wav"
                        if not path.is_file():
                            raise UserError(f"{path}: no such recording; the folder holds all of spoken_digits")
                        if not pools[digit]:
                            raise UserError(f"{recordings}: more recordings than pictures of a {digit}")
                        pairs[split].append((pools[digit].pop(), path))
    return pairs


def make(source: Path, out: Path, share: float = 1.0, seed: int = 0) -> None:
    """Writes train, validation and test.jsonl, labelled subsets, clips, tokenizer.json and labels.json.

    share: of each split's pairs that are written, evenly over digits and speakers: less for a quick look.
    The same call again writes what is missing.

    Raises:
      UserError: as pair, or the folder was made with other arguments.
    """
    settings = {"format": 1, "share": share, "seed": seed}
    record = out / "made.json"
    if record.exists():
        there = json.loads(record.read_text())
        if there["settings"] != settings:
            raise UserError(f"{out}: made with {there['settings']}, not {settings}; choose another folder")
        if there["complete"]:
            return
    for name in ("mnist", "spoken_digits"):
        if not (source / name).is_dir():
            raise UserError(f"{source}: holds no folder {name}")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"settings": settings, "complete": False}))
    images, labels = read_images(source / "mnist")
    jobs, lines = [], {}
    for number, (split, pairs) in enumerate(pair(source / "spoken_digits", labels, seed).items()):
        (out / split).mkdir(exist_ok=True)
        rng = np.random.default_rng([seed, 1, number])
        order = rng.permutation(len(pairs))[: max(10, round(share * len(pairs)))]
        lines[split] = []
        for i in sorted(order):
            image, sound = pairs[i]
            motion = list(MOTIONS)[int(np.random.default_rng([seed, 2, number, i]).integers(len(MOTIONS)))]
            digit, speaker, _ = sound.stem.split("_")
            name = f"{split}/{i:05d}.mp4"
            jobs.append((out / name, images[image], sound, motion, [seed, 3, number, int(i)]))
            classes = {"digit": int(digit), "speaker": SPEAKERS.index(speaker), "motion": list(MOTIONS).index(motion)}
            origin = {"picture": int(image), "recording": sound.stem}
            lines[split].append(
                {"id": name, "path": name, "caption": WORDS[int(digit)], "labels": classes, "source": origin}
            )
    if len(jobs) < 512:  # starting processes costs more than the work
        for job in jobs:
            write(job)
    else:
        with multiprocessing.get_context("spawn").Pool(os.cpu_count() or 1) as pool:
            for _ in pool.imap_unordered(write, jobs, chunksize=32):
                pass
    for split, rows in lines.items():
        _write_lines(out / f"{split}.jsonl", rows)
    for count in SUBSETS:
        for subset in range(SEEDS):
            _write_lines(out / f"train-{count}-{subset}.jsonl", labelled(lines["train"], count, [seed, 4, subset]))
    text.train_tokenizer(list(WORDS), 64).save(str(out / "tokenizer.json"))
    (out / "labels.json").write_text(json.dumps(LABELS, indent=1))
    record.write_text(json.dumps({"settings": settings, "complete": True}))


def labelled(rows: list[dict], count: int, seed: list[int]) -> list[dict]:
    """Draws `count` clips of each digit, each of another recording; a larger count holds the smaller one's clips."""
    rng = np.random.default_rng(seed)
    chosen, used = [0] * 10, set()
    result = []
    for i in rng.permutation(len(rows)):
        digit = rows[i]["labels"]["digit"]
        if chosen[digit] < count and rows[i]["source"]["recording"] not in used:
            chosen[digit] += 1
            used.add(rows[i]["source"]["recording"])
            result.append(rows[i])
    return result


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder that holds mnist/ and spoken_digits/")
    parser.add_argument("out", type=Path, help="where to write")
    parser.add_argument("--share", type=float, default=1.0, help="of the clips (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.source, args.out, args.share, args.seed)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
