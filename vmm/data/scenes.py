"""Scenes: longer clips of a world with known truth, in which things happen one after the other.

On a grey ground, one to three times in 8 seconds, a coloured shape comes into one of four places, does one of four
things, mostly to a sound, and is gone again. What is known of it is what tasks ask for:

| of a row          | truth                                                                                          |
|-------------------|------------------------------------------------------------------------------------------------|
| events            | when (start, end), what (ACTIONS), where (box), who takes part (PARTICIPANTS: shape, and sound) |
| caption           | all events in their order, in two phrasings                                                    |
| texts.subtitles   | "start end words" for each event                                                               |
| labels            | count (events − 1); shapes, colours, sounds: lists of classes (tags)                           |
| values.mood       | from −1, all shapes cold, to 1, all warm: share of the seconds that things are seen            |
| curves.importance | 16 numbers: 0 where nothing is, 0.3 in a silent event, 1 in one that is heard                  |

A second manifest a split, SPLIT_questions.jsonl, has a row for each question about a clip: texts.question, answer, choices
(4, of which labels.answer is right) and, where the question goes on from another, history.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vmm.data import text, world
from vmm.data.world import COLOURS, FPS, PITCHES, RATE, SHAPES, SIZE, TIMBRES
from vmm.errors import UserError

SECONDS = 8.0
POINTS = 16  # of the curve of importance
ACTIONS = ("crosses", "circles", "grows", "blinks")
PLACES = ("top left", "top right", "bottom left", "bottom right")
PARTICIPANTS = (*SHAPES, *TIMBRES)
SILENCE = "nothing"
LABELS = dict(count=3)
TAGS = dict(shapes=len(SHAPES), colours=len(COLOURS), sounds=len(TIMBRES))

_RADIUS = 9.0  # pixels
_ORDER = ("first", "second", "third")


class Happening(NamedTuple):
    """One thing that happens. Integers are classes; timbre −1: in silence."""

    start: float
    end: float
    action: int
    shape: int
    colour: int
    place: int
    timbre: int
    pitch: int

    @property
    def who(self) -> str:
        """Colour and shape, in words."""
        return f"{list(COLOURS)[self.colour]} {SHAPES[self.shape]}"

    @property
    def sound(self) -> str:
        """What is heard, in a word."""
        return TIMBRES[self.timbre] if self.timbre >= 0 else SILENCE


def script(seed: int, number: int) -> list[Happening]:
    """Returns what happens in a clip, in order; a function of (seed, number) alone. No two have the same colour and shape."""
    rng = np.random.default_rng([seed, number, 0])
    count = int(rng.integers(1, 4))
    lengths = rng.uniform(1.0, 2.0, count)
    # What is left of the clip lies before, between and after, never less than 0.25 s.
    gaps = 0.25 + (SECONDS - lengths.sum() - 0.25 * (count + 1)) * rng.dirichlet(np.ones(count + 1))
    who = rng.permutation(len(SHAPES) * len(COLOURS))[:count]
    result, time = [], 0.0
    for i in range(count):
        time += gaps[i]
        # Ends and beginnings stand between pictures.
        start, end = (round(moment * FPS) / FPS for moment in (time, time + lengths[i]))
        shape, colour = divmod(int(who[i]), len(COLOURS))
        timbre = int(rng.integers(len(TIMBRES))) if rng.uniform() < 0.7 else -1
        action, place, pitch = (int(rng.integers(n)) for n in (len(ACTIONS), len(PLACES), len(PITCHES)))
        result.append(Happening(start, end, action, shape, colour, place, timbre, pitch))
        time += lengths[i]
    return result


def _path(one: Happening, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns y, x, radius (pixels) and whether it is seen, at times [n] in seconds since it began."""
    share = time / (one.end - one.start)
    y = np.full_like(time, SIZE / 4 + SIZE / 2 * (one.place // 2))
    x = np.full_like(time, SIZE / 4 + SIZE / 2 * (one.place % 2))
    radius, seen = np.full_like(time, _RADIUS), np.ones(len(time), bool)
    action = ACTIONS[one.action]
    if action == "crosses":
        x += 7 * (2 * share - 1)
    elif action == "circles":
        y, x = y + 6 * np.sin(2 * np.pi * time), x + 6 * np.cos(2 * np.pi * time)
    elif action == "grows":
        radius = 4 + 10 * share
    else:
        seen = np.floor(time * FPS / 3 + 1e-6) % 2 == 0
    return y, x, radius, seen


def box(one: Happening) -> list[float]:
    """Returns left, top, right, bottom of all that the shape passes over, in [0, 1] of the picture."""
    time = np.arange(0, one.end - one.start, 1 / FPS)
    y, x, radius, _ = _path(one, time)
    edges = (x - radius).min(), (y - radius).min(), (x + radius).max(), (y + radius).max()
    return [round(float(np.clip(edge / SIZE, 0, 1)), 4) for edge in edges]


def render(events: list[Happening], rng: np.random.Generator) -> np.ndarray:
    """Draws the clip: uint8 [T H W 3]."""
    count = round(SECONDS * FPS)
    video = np.full((count, SIZE, SIZE, 3), 60.0) + rng.uniform(-6, 6, 3)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    for one in events:
        first, last = round(one.start * FPS), round(one.end * FPS)
        ys, xs, radii, seen = _path(one, np.arange(last - first) / FPS)
        colour = np.float32(list(COLOURS.values())[one.colour]) * rng.uniform(0.9, 1.0)
        for frame in np.flatnonzero(seen):
            depth = world.inside(SHAPES[one.shape], y - ys[frame], x - xs[frame], radii[frame])
            cover = np.clip(depth + 0.5, 0, 1)[..., None]
            video[first + frame] = video[first + frame] * (1 - cover) + colour * cover
    return np.clip(video + rng.normal(0, 2, (count, SIZE, SIZE, 1)), 0, 255).astype(np.uint8)


def sound(events: list[Happening], rng: np.random.Generator) -> np.ndarray:
    """Plays the clip: float32 [S] at RATE."""
    wave = rng.normal(0, 0.003, round(SECONDS * RATE))
    for one in events:
        if one.timbre >= 0:
            time = np.arange(round((one.end - one.start) * RATE)) / RATE
            envelope = np.minimum(1, time / 0.02) * np.minimum(1, (time[-1] - time) / 0.03)
            place = round(one.start * RATE)
            # Struck anew twice a second: a bell does not last.
            played = world.note(TIMBRES[one.timbre], list(PITCHES.values())[one.pitch], time % 0.5, rng)
            wave[place : place + len(time)] += 0.3 * envelope * played
    return wave.astype(np.float32)


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def row(seed: int, number: int) -> dict:
    """Returns what a manifest tells of a clip, without its path."""
    events = script(seed, number)
    phrases = [f"{_article(one.who)} {ACTIONS[one.action]} at the {PLACES[one.place]}" for one in events]
    heard = [
        f"{phrase} to {_article(one.sound)}" if one.timbre >= 0 else phrase for phrase, one in zip(phrases, events)
    ]
    seen = sum(one.end - one.start for one in events)
    warm = sum((one.end - one.start) * (1 if one.colour < len(COLOURS) // 2 else -1) for one in events)
    importance = [0.0] * POINTS
    for place in range(POINTS):
        moment = (place + 0.5) * SECONDS / POINTS
        for one in events:
            if one.start <= moment < one.end:
                importance[place] = 1.0 if one.timbre >= 0 else 0.3
    return {
        "start": 0.0,
        "end": SECONDS,
        "caption": [" , then ".join(heard), " , then ".join(phrases)],
        "labels": {
            "count": len(events) - 1,
            "shapes": sorted({one.shape for one in events}),
            "colours": sorted({one.colour for one in events}),
            "sounds": sorted({one.timbre for one in events} - {-1}),
        },
        "values": {"mood": round(warm / seen, 4)},
        "texts": {"subtitles": [f"{one.start:.2f} {one.end:.2f} {words}" for one, words in zip(events, heard)]},
        "curves": {"importance": importance},
        "events": [
            {
                "start": round(one.start, 4),
                "end": round(one.end, 4),
                "label": one.action,
                "box": box(one),
                "participants": [one.shape, *([len(SHAPES) + one.timbre] if one.timbre >= 0 else [])],
            }
            for one in events
        ],
    }


def questions(seed: int, number: int) -> Iterator[dict]:
    """Yields {"question", "answer", "choices", "history"} and the right choice's place; one question has a history."""
    rng = np.random.default_rng([seed, number, 2])
    events = script(seed, number)
    one = events[int(rng.integers(len(events)))]
    sounds = [*TIMBRES, SILENCE]
    asked = [
        (f"what does the {one.who} do ?", ACTIONS[one.action], ACTIONS, []),
        (f"where is the {one.who} ?", PLACES[one.place], PLACES, []),
        (f"what is heard with the {one.who} ?", one.sound, sounds, []),
    ]
    nth = int(rng.integers(len(events)))
    asked.append((f"which shape comes {_ORDER[nth]} ?", SHAPES[events[nth].shape], SHAPES, []))
    # The second question of a talk is about what the first was about.
    first = [f"which shape comes {_ORDER[nth]} ?", SHAPES[events[nth].shape]]
    asked.append(("and what does it do ?", ACTIONS[events[nth].action], ACTIONS, first))
    for question, answer, known, history in asked:
        others = [word for word in known if word != answer]
        choices = [answer, *(others[i] for i in rng.permutation(len(others))[:3])]
        choices = [choices[i] for i in rng.permutation(4)]
        texts = {"question": question, "answer": answer, "choices": choices, "history": history}
        yield {"texts": texts, "labels": {"answer": choices.index(answer)}}


def write_clip(path: Path, seed: int, number: int) -> None:
    """Writes one clip as H.264 + AAC in mp4."""
    events, rng = script(seed, number), np.random.default_rng([seed, number, 1])
    world.write_media(path, render(events, rng), sound(events, rng))


def _write(job: tuple) -> None:
    path, *rest = job
    if not path.exists():
        write_clip(path, *rest)


def generate(folder: str | Path, sizes: dict[str, int], seed: int = 0, vocabulary: int = 512, progress=None) -> None:
    """Writes the scenes: <split>.jsonl, <split>_questions.jsonl, <split>/*.mp4, tokenizer.json, labels.json, scenes.json.

    Half-written ones are completed; complete ones with the same settings are left alone.

    Args:
      folder: where to write. sizes: split → number of clips. seed: of everything. vocabulary: largest size of the
        tokenizer, trained on the captions, subtitles and questions of the first split. progress: optional function
        (done, total).

    Raises:
      UserError: a split without clips, or the folder holds scenes with other settings.
    """
    folder = Path(folder)
    settings = {"format": 1, "sizes": sizes, "seed": seed, "vocabulary": vocabulary}
    if min(sizes.values(), default=0) < 1:
        raise UserError(f"scenes have at least 1 clip a split, got {sizes}")
    if not world.begin(folder / "scenes.json", settings):
        return
    jobs, number, phrases = [], 0, []
    for split, size in sizes.items():
        (folder / split).mkdir(exist_ok=True)
        lines, asked = [], []
        for i in range(size):
            name, path = f"{split}-{i:05d}", f"{split}/{i:05d}.mp4"
            jobs.append((folder / path, seed, number))
            lines.append({"id": name, "path": path, **row(seed, number)})
            for k, question in enumerate(questions(seed, number)):
                asked.append({"id": f"{name}-{k}", "path": path, "start": 0.0, "end": SECONDS, **question})
            number += 1
        if not phrases:
            phrases = [words for line in lines for words in (*line["caption"], *line["texts"]["subtitles"])]
            phrases += [words for line in asked for words in (line["texts"]["question"], line["texts"]["answer"])]
        world.write_lines(folder / f"{split}.jsonl", lines)
        world.write_lines(folder / f"{split}_questions.jsonl", asked)
    world.parallel(_write, jobs, progress)
    text.train_tokenizer(phrases, vocabulary).save(str(folder / "tokenizer.json"))
    names = dict(
        events=ACTIONS, participants=PARTICIPANTS, shapes=SHAPES, colours=list(COLOURS), sounds=TIMBRES,
        count=["one", "two", "three"],
    )  # fmt: skip
    world.write_text(folder / "labels.json", json.dumps(names, indent=1))
    world.write_text(folder / "scenes.json", json.dumps({"settings": settings, "complete": True}, indent=1))
