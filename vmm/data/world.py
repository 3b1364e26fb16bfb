"""A world with known truth: seeded mp4 clips whose every label is known by construction.

Each clip shows one coloured shape in one motion and plays one note in one timbre and rhythm.
Around them stand planted facts, each with a label that needs just one kind of understanding:

| label  | what must be used         | truth                                                            |
|--------|---------------------------|------------------------------------------------------------------|
| shape, colour, motion | video      | what is seen                                                     |
| pitch, timbre, rhythm | audio      | what is heard                                                    |
| video  | video only                | the colour is warm                                               |
| audio  | audio only                | the note is in the upper half                                    |
| either | video or audio            | a bright background and a low hum, always together               |
| both   | video AND audio           | exclusive-or of `video` and `audio`                              |
| order  | the order of frames       | the top-left marker lights up before the bottom-right one        |
| sync   | video and audio, in time  | the border flashes when a click is heard (1), or 0.4 s off or more (0) |

The six seen and heard facts make a clip's *combination*; no combination occurs twice, so none is
shared between splits. A clip without sound has no label that needs sound.

Captions tell the seen and heard facts, and of `both` in their own words: a warm colour "matches" a high note and a cold
one a low note, else the two "clash". That word is of the pair alone: neither what is seen nor what is heard tells it. Of
`either`, `order` and `sync` they say nothing.

Two more manifests are of the same files: identity_train.jsonl and identity_test.jsonl, where label `identity` is the pair of
shape and colour; a quarter of these are in the second alone, numbered on, and its clips are none of the first split's.
"""

import functools
import json
import multiprocessing
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vmm.build import differences
from vmm.data import text
from vmm.errors import UserError

SECONDS, FPS, SIZE, RATE = 2.0, 12, 64, 16000

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS = {
    "red": (225, 40, 40),
    "orange": (250, 135, 20),
    "yellow": (245, 225, 40),
    "pink": (250, 120, 190),
    "green": (40, 180, 60),
    "cyan": (40, 210, 220),
    "blue": (45, 70, 230),
    "purple": (130, 50, 180),
}  # the first half is warm
MOTIONS = ("left", "right", "up", "down", "clockwise", "anticlockwise", "growing", "shrinking")
PITCHES = {"A3": 220.0, "D4": 293.66, "G4": 392.0, "C5": 523.25, "F5": 698.46, "B5": 987.77, "E6": 1318.5, "A6": 1760.0}
TIMBRES = ("whistle", "clarinet", "buzzer", "bell", "flute", "engine")
RHYTHMS = {
    "held": (0.0,),
    "slow": (0.0, 1.0),
    "steady": (0.0, 0.5, 1.0, 1.5),
    "quick": tuple(k * 0.25 for k in range(8)),
    "paired": (0.0, 0.2, 1.0, 1.2),
    "galloping": (0.0, 0.5, 0.67, 1.0, 1.5, 1.67),
}

FACTS = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "motion": MOTIONS,
    "pitch": tuple(PITCHES),
    "timbre": TIMBRES,
    "rhythm": tuple(RHYTHMS),
}
SEEN, HEARD = ("shape", "colour", "motion"), ("pitch", "timbre", "rhythm")
BITS = ("video", "audio", "either", "both", "order", "sync")
NEED_SOUND = ("pitch", "timbre", "rhythm", "audio", "both", "sync")
CLASSES = {**{name: len(values) for name, values in FACTS.items()}, **dict.fromkeys(BITS, 2)}

_MOVES = {
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "clockwise": "circles clockwise",
    "anticlockwise": "circles anticlockwise",
    "growing": "grows",
    "shrinking": "shrinks",
}
_BEATS = {
    "held": "one held note",
    "slow": "slow beats",
    "steady": "steady beats",
    "quick": "quick beats",
    "paired": "paired beats",
    "galloping": "galloping beats",
}
_PHRASINGS = (
    "a {colour} {shape} {moves} while a {timbre} plays {pitch} in {beats}, they {pair}",
    "a {timbre} plays {pitch} in {beats} as a {colour} {shape} {moves}, they {pair}",
    "the {shape} is {colour} and {moves}, the sound is a {timbre} on {pitch} with {beats}, they {pair}",
    "{beats} of a {timbre} at {pitch}, and a {colour} {shape} that {moves}, they {pair}",
)
_PAIRS = ("match", "clash")  # by `both`
_SEEN_ONLY = ("a {colour} {shape} {moves} in silence", "without a sound a {colour} {shape} {moves}")


def truth(seed: int, combination: int, sound: bool) -> dict[str, int]:
    """Returns the labels of one clip: label → class, without those that need a sound it lacks."""
    labels, rest = {}, combination
    for name, values in FACTS.items():
        rest, labels[name] = divmod(rest, len(values))
    rng = np.random.default_rng([seed, combination, 0])
    labels["video"] = int(labels["colour"] < len(COLOURS) // 2)
    labels["audio"] = int(labels["pitch"] >= len(PITCHES) // 2)
    labels["both"] = labels["video"] ^ labels["audio"]
    for name in ("either", "order", "sync"):
        labels[name] = int(rng.integers(2))
    return {name: labels[name] for name in CLASSES if sound or name not in NEED_SOUND}


def captions(labels: dict[str, int]) -> list[str]:
    """Returns every phrasing of a clip's seen (and, where it has sound, heard) facts."""
    words = {name: FACTS[name][labels[name]] for name in FACTS if name in labels}
    words["moves"] = _MOVES[words["motion"]]
    if "rhythm" in words:
        words |= {"beats": _BEATS[words["rhythm"]], "pair": _PAIRS[labels["both"]]}
        return [phrasing.format(**words) for phrasing in _PHRASINGS]
    return [phrasing.format(**words) for phrasing in _SEEN_ONLY]


def inside(shape: str, y: np.ndarray, x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Returns how far each point lies inside the shape, in pixels (negative outside)."""
    distance = np.hypot(y, x)
    if shape == "circle":
        return radius - distance
    if shape == "ring":
        return 0.28 * radius - np.abs(distance - 0.8 * radius)
    if shape == "square":
        return 0.88 * radius - np.maximum(np.abs(y), np.abs(x))
    if shape == "cross":
        return np.minimum(0.3 * radius - np.minimum(np.abs(y), np.abs(x)), radius - np.maximum(np.abs(y), np.abs(x)))
    if shape == "triangle":
        return np.minimum(0.6 * radius - y, 0.5 * y + 0.55 * radius - 0.9 * np.abs(x))
    angle = np.arctan2(y, x) + np.pi / 2  # star, five points, one upward
    return radius * (0.7 + 0.3 * np.cos(5 * angle)) - distance


def render(labels: dict[str, int], flash: float, rng: np.random.Generator) -> np.ndarray:
    """Draws the clip, its border lit for 0.25 s from `flash` on: uint8 [T H W 3]."""
    count = round(SECONDS * FPS)
    time = (np.arange(count, dtype=np.float32) / FPS / SECONDS)[:, None, None]  # float32 all through: half the time
    centre, reach = SIZE / 2, SIZE * 0.17
    wobble = rng.uniform(-2, 2, 2)
    radius = np.full_like(time, SIZE * rng.uniform(0.24, 0.28))
    dy, dx = np.full_like(time, wobble[0]), np.full_like(time, wobble[1])
    motion = MOTIONS[labels["motion"]]
    travel = (2 * time - 1) * reach
    if motion in ("left", "right"):
        dx = travel if motion == "right" else -travel
    elif motion in ("up", "down"):
        dy = travel if motion == "down" else -travel
    elif motion in ("clockwise", "anticlockwise"):
        turn = -np.pi / 2 + (1 if motion == "clockwise" else -1) * 2 * np.pi * time
        dy, dx = reach * np.sin(turn), reach * np.cos(turn)
    else:
        radius = SIZE * (0.12 + 0.24 * (time if motion == "growing" else 1 - time))
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    depth = inside(SHAPES[labels["shape"]], y - centre - dy, x - centre - dx, radius)
    cover = np.clip(depth + 0.5, 0, 1)[..., None]
    ground = np.float32(185 if labels["either"] else 45) + rng.uniform(-6, 6, 3).astype(np.float32)
    colour = np.float32(list(COLOURS.values())[labels["colour"]]) * np.float32(rng.uniform(0.9, 1.0))
    video = cover * (colour - ground)
    video += ground
    # Two markers light up for 0.5 s each, half a second or more apart.
    early, late = rng.uniform(0.1, 0.4), rng.uniform(1.1, 1.4)
    corners = [(slice(6, 14), slice(6, 14)), (slice(-14, -6), slice(-14, -6))]
    for moment, corner in zip((early, late), corners if labels["order"] else corners[::-1]):
        on = slice(round(moment * FPS), round((moment + 0.5) * FPS))
        video[(on, *corner)] = 255
    edge = np.pad(np.zeros((SIZE - 6, SIZE - 6), bool), 3, constant_values=True)
    video[round(flash * FPS) : round((flash + 0.25) * FPS), edge] = 0 if labels["either"] else 255
    video += 2 * rng.standard_normal((count, SIZE, SIZE, 1), np.float32)
    return np.clip(video, 0, 255, out=video).astype(np.uint8)


def note(timbre: str, pitch: float, time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    phase = 2 * np.pi * pitch * time
    if timbre == "whistle":
        return np.sin(phase)
    if timbre == "clarinet":
        return sum(np.sin(k * phase) / k for k in (1, 3, 5))
    if timbre == "buzzer":
        return sum(np.sin(k * phase) / k for k in (1, 2, 3, 4, 5, 6) if k * pitch < 7800) * 0.6
    if timbre == "bell":
        return sum(np.sin(r * phase) * np.exp(-5 * r * time) for r in (1.0, 2.76) if r * pitch < 7800)
    if timbre == "flute":
        return np.sin(phase + 4.0 * np.sin(2 * np.pi * 6 * time))
    tremble = 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * 28 * time))
    return tremble * (0.7 * np.sin(phase) + 0.3 * rng.normal(size=time.shape))  # engine


def sound(labels: dict[str, int], click: float, rng: np.random.Generator) -> np.ndarray:
    """Plays the clip, with a click of 30 ms at `click`: float32 [S] at RATE."""
    samples = round(SECONDS * RATE)
    wave = np.zeros(samples)
    beats = RHYTHMS[tuple(RHYTHMS)[labels["rhythm"]]]
    pitch = list(PITCHES.values())[labels["pitch"]]
    for beat, after in zip(beats, (*beats[1:], SECONDS)):
        length = after - beat if len(beats) == 1 else min(0.85 * (after - beat), 0.4)
        time = np.arange(round(length * RATE)) / RATE
        envelope = np.minimum(1, time / 0.01) * np.minimum(1, (length - time) / 0.03)
        place = round(beat * RATE)
        wave[place : place + len(time)] += envelope * note(TIMBRES[labels["timbre"]], pitch, time, rng)
    wave *= 0.35 * rng.uniform(0.8, 1.0)
    if labels["either"]:
        wave += 0.12 * np.sin(2 * np.pi * 82.4 * np.arange(samples) / RATE)
    place = round(click * RATE)
    wave[place : place + 480] += 0.3 * rng.normal(size=480)
    return (wave + rng.normal(0, 0.003, samples)).astype(np.float32)


def write_clip(path: Path, seed: int, combination: int, with_sound: bool) -> None:
    """Writes one clip as H.264 + AAC in mp4."""
    labels = truth(seed, combination, True)
    rng = np.random.default_rng([seed, combination, 1])
    click = flash = rng.uniform(0.1, 1.7)
    while not labels["sync"] and abs(flash - click) < 0.4:
        flash = rng.uniform(0.1, 1.7)
    video, wave = render(labels, flash, rng), sound(labels, click, rng)
    write_media(path, video, wave if with_sound else None)


def write_media(path: Path, video: np.ndarray, wave: np.ndarray | None) -> None:
    """Writes pictures uint8 [T SIZE SIZE 3] at FPS, and sound float32 [S] at RATE where there is any, as H.264 + AAC."""
    temporary = path.with_suffix(".part")
    with av.open(str(temporary), "w", format="mp4") as container:
        seen = container.add_stream("libx264", rate=FPS)
        seen.width, seen.height, seen.pix_fmt = SIZE, SIZE, "yuv420p"
        seen.time_base = Fraction(1, FPS)
        seen.thread_type = "NONE"
        seen.options = {
            "preset": "ultrafast",  # two thirds of the time of veryfast, and files of the same size
            "crf": "21",
            "tune": "fastdecode",
            "g": str(FPS),
            "threads": "1",
            "x264-params": "mbtree=0",
        }
        heard = container.add_stream("aac", rate=RATE, layout="mono", bit_rate=64000) if wave is not None else None
        if heard:
            heard.options = {"aac_coder": "fast"}  # half the time
        for i, picture in enumerate(video):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(seen.encode(frame))
        container.mux(seen.encode(None))
        if heard:
            frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
            container.mux(heard.encode(frame))
            container.mux(heard.encode(None))
    temporary.replace(path)


def _write(job: tuple) -> None:
    path, *rest = job
    if not path.exists():
        write_clip(path, *rest)


def generate(
    folder: str | Path,
    sizes: dict[str, int],
    seed: int = 0,
    missing: float = 1 / 9,
    vocabulary: int = 512,
    progress=None,
) -> None:
    """Writes the world: <split>.jsonl, <split>/*.mp4, tokenizer.json, labels.json, world.json.

    A half-written world is completed; a complete one with the same settings is left alone.

    Args:
      folder: where to write.
      sizes: split → number of clips.
      seed: of everything; the same seed gives the same labels and captions, and on one version of
        the codecs the same bytes.
      missing: fraction of each split's clips that lack one stream; half of them the sound, half
        the caption. Exact, not drawn: round(missing * size) clips.
      vocabulary: largest size of the tokenizer, trained on the training captions.
      progress: optional function (done, total).

    Raises:
      UserError: more clips than combinations, or the folder holds a world with other settings.
    """
    folder = Path(folder)
    settings = {"format": 4, "sizes": sizes, "seed": seed, "missing": missing, "vocabulary": vocabulary}
    total = int(np.prod([len(values) for values in FACTS.values()]))
    if sum(sizes.values()) > total or min(sizes.values(), default=0) < 1 or not 0 <= missing <= 1:
        raise UserError(
            f"a world has between 1 clip a split and {total} in all, and missing is in [0, 1]; got {settings}"
        )
    record = folder / "world.json"
    if not begin(record, settings):
        return
    rng = np.random.default_rng([seed, 2])
    combinations = iter(rng.permutation(total)[: sum(sizes.values())].tolist())
    jobs, manifests = [], {}
    for split, size in sizes.items():
        (folder / split).mkdir(exist_ok=True)
        lacking = rng.permutation(size)[: round(missing * size)]
        mute, untold = set(lacking[::2].tolist()), set(lacking[1::2].tolist())
        lines = []
        for i in range(size):
            combination = next(combinations)
            labels = truth(seed, combination, i not in mute)
            name = f"{split}/{i:05d}.mp4"
            lines.append(
                {
                    "id": f"{split}-{i:05d}",
                    "path": name,
                    "start": 0.0,
                    "end": SECONDS,
                    "caption": None if i in untold else captions(labels),
                    "labels": labels,
                }
            )
            jobs.append((folder / name, seed, combination, i not in mute))
        manifests[split] = lines
    parallel(_write, jobs, progress)
    for split, lines in manifests.items():
        write_lines(folder / f"{split}.jsonl", lines)
    for name, lines in _identities(list(manifests.values()), seed).items():
        write_lines(folder / f"identity_{name}.jsonl", lines)
    first = next(iter(manifests.values()))
    phrases = [phrase for line in first for phrase in line["caption"] or ()]
    text.train_tokenizer(phrases, vocabulary).save(str(folder / "tokenizer.json"))
    names = {**{name: list(values) for name, values in FACTS.items()}, **{name: ["no", "yes"] for name in BITS}}
    write_text(folder / "labels.json", json.dumps(names, indent=1))
    write_text(record, json.dumps({"settings": settings, "complete": True}, indent=1))


def _identities(splits: list[list[dict]], seed: int) -> dict[str, list[dict]]:
    """Returns the lists of clips by their pair of shape and colour, those of training first in number."""
    pairs = len(SHAPES) * len(COLOURS)
    order = np.random.default_rng([seed, 3]).permutation(pairs)
    place, known = np.argsort(order), 3 * pairs // 4

    def told(line: dict) -> dict:
        number = int(place[line["labels"]["shape"] * len(COLOURS) + line["labels"]["colour"]])
        return line | {"labels": line["labels"] | {"identity": number}}

    train = [told(line) for line in splits[0]]
    rest = [told(line) for lines in splits[1:] for line in lines]
    return {
        "train": [line for line in train if line["labels"]["identity"] < known],
        "test": [line for line in rest if line["labels"]["identity"] >= known],
    }


def begin(record: Path, settings: dict) -> bool:
    """Returns whether a world still has to be written, and then writes its record. record: file in the world's folder.

    Of another format but the same settings, the lists are written anew and the clips kept.

    Raises:
      UserError: the folder holds a world with other settings.
    """
    folder = record.parent
    if record.exists():
        try:
            there = json.loads(record.read_text())
            there["settings"], there["complete"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{record}: not the record of a world; remove the folder {folder} and generate it again"
            ) from None
        same = {key: value for key, value in settings.items() if key != "format"}
        if other := differences(same, {key: there["settings"].get(key) for key in same}):
            raise UserError(
                f"{folder} holds a world with other settings (there → now: {'; '.join(other)}); choose another folder or "
                "remove it"
            )
        if there["complete"] and there["settings"] == settings:
            return False
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"settings": settings, "complete": False}, indent=1))
    return True


def write_text(path: Path, content: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(content)
    temporary.replace(path)


def write_lines(path: Path, lines: list[dict]) -> None:
    """Writes a manifest."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def parallel(write, jobs: list, progress) -> None:
    """Calls write(job) for all jobs, many of them over processes. progress: see `generate`."""
    step = functools.partial(progress, total=len(jobs)) if progress else lambda done: None
    if len(jobs) < 64:  # starting processes costs more than the work
        for done, job in enumerate(jobs, 1):
            write(job)
            step(done)
        return
    with multiprocessing.get_context("spawn").Pool(os.cpu_count() or 1) as pool:
        for done, _ in enumerate(pool.imap_unordered(write, jobs, chunksize=16), 1):
            step(done)
