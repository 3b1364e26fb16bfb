"""What a clip is asked for besides its labels: numbers, curves and events in time, texts to write or to choose from.

Each kind turns a manifest row and a window of it into arrays of a fixed shape, so that they stand in a batch.
"""

import dataclasses
import math
import string
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from vmm.build import build
from vmm.data import subtitles, text
from vmm.data.manifest import Row
from vmm.errors import UserError, one_of


def fields_of(template: str, where: str) -> list[str]:
    """Returns the names in braces of a template.

    Raises:
      UserError: braces that do not pair, or none.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"{where}: {template!r} is no template ({error}); write names of texts in braces") from None
    if not names or not all(names):
        raise UserError(f'{where}: {template!r} names no text; write, for example, "{{caption}}"')
    return names


def fill(template: str, row: Row, caption: str) -> str:
    """Returns the template with the row's texts in the places of their names; "" where the row lacks one.

    A list of texts is joined by spaces: a dialogue's history, for example.
    """
    words = {}
    for name in fields_of(template, "data"):
        value = caption if name == "caption" else row.texts.get(name, "")
        words[name] = value if isinstance(value, str) else " ".join(value)
        if not words[name] and name not in row.texts:
            return ""
    return template.format(**words).strip()


@dataclasses.dataclass(frozen=True)
class Value:
    """A number: `values.NAME` of the row. float32 [B], nan where unknown. of: NAME."""

    of: str

    spells = False  # whether a tokenizer is needed

    def check(self, rows: Sequence[Row], where: str) -> None:
        """Raises UserError: no clip has it."""
        known = {name for row in rows for name in row.values}
        if self.of not in known:
            raise UserError(f"{where}: no clip has values.{self.of}; {one_of(self.of, known)}")

    def read(self, row: Row, start: float, seconds: float, tokenizer: Tokenizer | None) -> np.ndarray:
        """Returns the number."""
        return np.float32(row.values.get(self.of, math.nan))

    def blank(self) -> np.ndarray:
        """Returns what stands where there is no clip."""
        return np.float32(math.nan)


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to be written. of: a template of the row's texts. length: tokens. Ids int32 [B L], all padding where there is none."""

    of: str
    length: int = 32

    spells = True

    def check(self, rows: Sequence[Row], where: str) -> None:
        """Raises UserError: no clip has all of the template's texts."""
        check_texts(self.of, rows, where)

    def read(self, row: Row, start: float, seconds: float, tokenizer: Tokenizer | None) -> np.ndarray:
        """Returns the ids; of the caption's phrasings, the first is taken."""
        words = fill(self.of, row, row.captions[0] if row.captions else "")
        if not words:
            return np.full(self.length, text.padding_id(tokenizer), np.int32)
        return text.encode(tokenizer, words, self.length)

    def blank(self) -> np.ndarray:
        """Returns what stands where there is no clip."""
        return np.zeros(self.length, np.int32)


@dataclasses.dataclass(frozen=True)
class Subtitles:
    """Subtitles to be written: those of `texts.OF` of the row, "START END words" in seconds of the file, that the window shows.

    As a text in which times are whole `step`s of seconds since the window began, see data/subtitles.py. of: OF. length:
    tokens. least: share of a subtitle that must be in the window; it is cut to it. Ids int32 [B L]; all padding
    where the row does not tell its subtitles, start and end of a text alone where nothing is said.
    """

    of: str = "subtitles"
    length: int = 64
    step: float = subtitles.STEP
    least: float = 0.5

    spells = True

    def check(self, rows: Sequence[Row], where: str) -> None:
        """Raises UserError: no clip has subtitles, or a line of one is none; or a step that is not above 0."""
        if self.step <= 0:
            raise UserError(f"{where}.step: seconds above 0, got {self.step}")
        check_texts(f"{{{self.of}}}", rows, where)
        for row in rows:
            self._segments(row, where)

    def _segments(self, row: Row, where: str) -> list[subtitles.Segment]:
        value = row.texts.get(self.of, ())
        lines = [value] if isinstance(value, str) else value
        found = [subtitles.segment_of(line) for line in lines]
        if None in found:
            raise UserError(
                f'{where}: clip {row.id!r}: texts.{self.of} must be lines "START END words" in seconds, '
                f"got {lines[found.index(None)]!r}"
            )
        return found

    def read(self, row: Row, start: float, seconds: float, tokenizer: Tokenizer | None) -> np.ndarray:
        """Returns the ids of the window that begins at `start` seconds of the file."""
        if self.of not in row.texts:
            return np.full(self.length, text.padding_id(tokenizer), np.int32)
        shown = subtitles.of_window(self._segments(row, "data.targets"), start, seconds, self.least)
        return text.encode(tokenizer, subtitles.spell(shown, self.step), self.length)

    def blank(self) -> np.ndarray:
        """Returns what stands where there is no clip."""
        return np.zeros(self.length, np.int32)


@dataclasses.dataclass(frozen=True)
class Choices:
    """Texts of which one is right. of: name of a list in the row's texts. Ids int32 [B count L], padding where there are fewer.

    Which is right is a label of `count` classes, named in data.labels as any other.
    """

    of: str = "choices"
    count: int = 4
    length: int = 16

    spells = True

    def check(self, rows: Sequence[Row], where: str) -> None:
        """Raises UserError: no clip has such a list, or one has too many."""
        check_texts(f"{{{self.of}}}", rows, where)
        for row in rows:
            value = row.texts.get(self.of, ())
            if isinstance(value, str) or len(value) > self.count:
                raise UserError(f"{where}: clip {row.id!r}: texts.{self.of} must be a list of at most {self.count}")

    def read(self, row: Row, start: float, seconds: float, tokenizer: Tokenizer | None) -> np.ndarray:
        """Returns the ids."""
        ids = np.full((self.count, self.length), text.padding_id(tokenizer), np.int32)
        for place, words in enumerate(row.texts.get(self.of, ())):
            ids[place] = text.encode(tokenizer, words, self.length)
        return ids

    def blank(self) -> np.ndarray:
        """Returns what stands where there is no clip."""
        return np.zeros((self.count, self.length), np.int32)


@dataclasses.dataclass(frozen=True)
class Events:
    """What happens when, where and with whom: `events` of the row, as far as the window shows them.

    classes: kinds of events. most: K, events kept of a window, the first in time. participants: P, kinds of those who
    take part. least: share of an event that must be in the window; it is cut to it (ActionFormer, Zhang et al. 2022: half).

    Gives start, end: float32 [B K], seconds of the window; label: int32 [B K], -1 where there is none; box: float32 [B K 4],
    left, top, right, bottom in [0, 1] of the whole picture, nan where unknown; participants: float32 [B K P], 1 or 0, nan
    where unknown; known: bool [B], False where the row does not tell its events.
    """

    classes: int
    most: int = 8
    participants: int = 0
    least: float = 0.5

    spells = False

    def check(self, rows: Sequence[Row], where: str) -> None:
        """Raises UserError: no clip has events, or one has a class or participant out of range."""
        if all(row.events is None for row in rows):
            raise UserError(f"{where}: no clip tells its events; give rows a key `events`, [] where nothing happens")
        for row in rows:
            for event in row.events or ():
                if event.label >= self.classes:
                    raise UserError(
                        f"{where}: {self.classes} classes, but clip {row.id!r} has an event of {event.label}"
                    )
                if max(event.participants or (), default=-1) >= self.participants > 0:
                    raise UserError(
                        f"{where}: {self.participants} kinds of participants, but clip {row.id!r} has {max(event.participants)}"
                    )

    def read(self, row: Row, start: float, seconds: float, tokenizer: Tokenizer | None) -> dict[str, np.ndarray]:
        """Returns the events of the window that begins at `start` seconds of the file."""
        result, place = self.blank() | {"known": np.bool_(row.events is not None)}, 0
        for event in sorted(row.events or (), key=lambda event: (event.start, event.end)):
            first, last = max(event.start - start, 0.0), min(event.end - start, seconds)
            if place == self.most or last - first <= 0 or last - first < self.least * (event.end - event.start):
                continue
            result["start"][place], result["end"][place], result["label"][place] = first, last, event.label
            if event.box is not None:
                result["box"][place] = event.box
            if event.participants is not None and self.participants:
                result["participants"][place] = np.isin(np.arange(self.participants), event.participants)
            place += 1
        return result

    def blank(self) -> dict[str, np.ndarray]:
        """Returns what stands where there is no clip, and where nothing happens."""
        nan = np.float32(math.nan)
        return {
            "start": np.zeros(self.most, np.float32),
            "end": np.zeros(self.most, np.float32),
            "label": np.full(self.most, -1, np.int32),
            "box": np.full((self.most, 4), nan),
            "participants": np.full((self.most, self.participants), nan),
            "known": np.bool_(False),
        }


@dataclasses.dataclass(frozen=True)
class Curve:
    """A number at every moment: `curves.NAME` of the row, as far as the window shows it. of: NAME.

    points: n, evenly over the window; each is the row's number of that moment (of its middle). float32 [B n], nan where
    unknown and past the end. A curve's numbers stand evenly between the row's start and end, which the row must tell.
    """

    of: str
    points: int = 16

    spells = False

    def check(self, rows: Sequence[Row], where: str) -> None:
        """Raises UserError: no clip has it, or one does not tell how long it is."""
        known = {name for row in rows for name in row.curves}
        if self.of not in known:
            raise UserError(f"{where}: no clip has curves.{self.of}; {one_of(self.of, known)}")
        for row in rows:
            if self.of in row.curves and row.seconds is None:
                raise UserError(f"{where}: clip {row.id!r} has a curve, but does not tell its length; give it an `end`")

    def read(self, row: Row, start: float, seconds: float, tokenizer: Tokenizer | None) -> np.ndarray:
        """Returns the numbers of the window that begins at `start` seconds of the file."""
        values = row.curves.get(self.of)
        if values is None:
            return self.blank()
        moments = start - (row.start or 0.0) + (np.arange(self.points) + 0.5) / self.points * seconds
        place = np.floor(moments / row.seconds * len(values)).astype(int)
        inside = (place >= 0) & (place < len(values))
        found = np.asarray(values, np.float32)[np.clip(place, 0, len(values) - 1)]
        return np.where(inside, found, np.float32(math.nan))

    def blank(self) -> np.ndarray:
        """Returns what stands where there is no clip."""
        return np.full(self.points, np.float32(math.nan))


def check_texts(template: str, rows: Sequence[Row], where: str) -> None:
    """Raises UserError: a template that names a text which no clip has. where: config key, for the line."""
    known = {"caption"} | {name for row in rows for name in row.texts}
    for name in fields_of(template, where):
        if name not in known:
            raise UserError(f"{where}: no clip has texts.{name}; {one_of(name, known)}")


TARGETS = {"value": Value, "text": Text, "subtitles": Subtitles, "choices": Choices, "curve": Curve, "events": Events}


def make_targets(specs) -> dict:
    """Returns name → target of a config's data.targets; raises UserError for an unknown kind or field."""
    return {name: build(TARGETS, spec, f"data.targets.{name}") for name, spec in specs.items()}
