"""The manifest: one JSON line per clip, the only thing the loader knows of a dataset.

    {"id": "0001", "path": "0001.mp4", "start": 0.0, "end": 2.0, "caption": "…", "labels": {"shape": 3}}

`path` is relative to the manifest's folder; `start` and `end` are seconds, null for the whole
file; `caption` is a string, a list of alternative phrasings, or null; `labels` are class indices, or
lists of them (tags). Four more keys tell what tasks ask for: `values`, name → number; `texts`, name → string or list
of strings (a question, its answer, choices, a dialogue's history); `curves`, name → numbers evenly over the clip (how
important each part is); `events`, each {"start", "end", "label"} with seconds of
the file and a class, and where known a "box" (left, top, right, bottom in [0, 1] of the picture) and "participants"
(class indices); [] where nothing happens. Only `path` is required. What `vmm data build` writes has more: `record`, the place in
an ArrayRecord shard that `path` then names; `sha256` of the clip's bytes, checked whenever they are
read; `media` and `source`, what is known of the clip and of the file that it was cut from.
"""

import errno
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vmm.data.media import DecodeError, reason_of
from vmm.data.members import read_member
from vmm.data.remote import fetch, is_address, open_address
from vmm.data.text import clean
from vmm.errors import UserError, one_of
from vmm.foreign import parse_json

_KEYS = (
    "id",
    "path",
    "record",
    "start",
    "end",
    "caption",
    "labels",
    "sha256",
    "media",
    "source",
    "values",
    "texts",
    "events",
    "curves",
)
_CLASSES, _NUMBER = 1 << 31, 3e38  # batches hold them as int32 and float32
_LONGEST = 1e9  # seconds; above, a time is in another unit


class Event(NamedTuple):
    """Something that happens. start, end: seconds of the file. box: left, top, right, bottom in [0, 1] of the picture, or None.

    participants: classes of those who take part, None where it is not known.
    """

    start: float
    end: float
    label: int
    box: tuple[float, float, float, float] | None = None
    participants: tuple[int, ...] | None = None


class Row(NamedTuple):
    """One clip. start, end: seconds or None; captions: alternative phrasings, may be empty.

    record: its place in the shard that path names, None: path is the clip. sha256: of its bytes, where known.
    duration: of the stored clip in seconds, where a build told it. events: None where the row does not tell them.
    """

    id: str
    path: str
    start: float | None
    end: float | None
    captions: tuple[str, ...]
    labels: dict[str, int | list[int]]
    record: int | None = None
    sha256: str | None = None
    duration: float | None = None
    values: dict[str, float] = {}
    texts: dict[str, str | list[str]] = {}
    events: tuple[Event, ...] | None = None
    curves: dict[str, list[float]] = {}

    @property
    def seconds(self) -> float | None:
        """The clip's length, None where neither the span nor the build tells it."""
        return self.duration if self.end is None else self.end - (self.start or 0.0)

    def read(self, remote: str = "") -> str | BytesIO | BinaryIO:
        """Returns what the decoder opens: the path, or the bytes where they lie in a shard or must be checked.

        Args:
          remote: folder that keeps shards fetched from addresses; needed where the path is one.

        Raises:
          DecodeError: "missing", "unreadable", or "changed": the bytes are not those that the manifest tells of.
        """
        try:
            path = self.path
            if is_address(path):
                if self.record is None and self.sha256 is None:
                    return open_address(path)
                path = fetch(path, remote)
            elif self.record is None and self.sha256 is None:
                return path
            data = read_member(path, () if self.record is None else ("record", self.record))
        except (OSError, EOFError) as error:
            # A record that cannot be read back is not what the build wrote.
            broken = getattr(error, "errno", None) == errno.EIO
            raise DecodeError("changed" if broken else reason_of(error), str(error)) from None
        if self.sha256 is not None and hashlib.sha256(data).hexdigest() != self.sha256:
            raise DecodeError("changed", f"sha256 is not the manifest's {self.sha256}")
        return BytesIO(data)


def read_manifest(path: str | Path, remote: bool = False) -> list[Row]:
    """Reads and checks a manifest.

    Args:
      path: the file; with `remote`, also an address (gs://…), whose clips lie beside it.
      remote: clips may be named by addresses.

    Raises:
      UserError: the file is missing, empty, or has a line that is no clip; names file and line.
    """
    content = _content(path, remote)
    folder = str(path).rpartition("/")[0] if is_address(path) else str(Path(path).parent)
    rows, seen = [], {}
    try:
        content = content.decode("utf-8-sig")  # Windows writes a mark before the text
    except UnicodeDecodeError as error:
        raise UserError(f"dataset {path}: not UTF-8 text ({error})") from None
    # Not splitlines(): a caption may hold U+2028 or U+0085.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            row = _row(line, f"dataset {path}, line {number}", folder, remote)
            if row.id in seen:
                raise UserError(
                    f"dataset {path}, line {number}: id {row.id!r} stands already in line {seen[row.id]}; ids must differ"
                )
            seen[row.id] = number
            rows.append(row)
    if not rows:
        raise UserError(f"dataset {path}: holds no clips; add one JSON line per clip")
    return rows


def _content(path: str | Path, remote: bool) -> bytes:
    if is_address(path):
        if not remote:
            raise UserError(
                f"dataset {path}: an address; set data.remote to a folder for what is fetched, or download it"
            )
        try:
            with open_address(str(path)) as file:
                return file.read()
        except OSError as error:
            raise UserError(f"dataset {path}: {error}") from None
    if not Path(path).is_file():
        raise UserError(
            f"dataset {path}: no such file; write a manifest (one JSON line per clip with a `path`), "
            "or make the synthetic world with `vmm data world`"
        )
    return Path(path).read_bytes()


def _row(line: str, where: str, folder: str, remote: bool) -> Row:
    try:
        value = parse_json(line, halves=True)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get("path"), str):
        raise UserError(f"{where}: a clip needs a `path`")
    for key in value:
        if key not in _KEYS:
            raise UserError(f"{where}: no such key {key!r}; {one_of(key, _KEYS)}")
    for key in ("start", "end"):
        bound = value.get(key)
        if bound is not None and (
            isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 <= bound < _LONGEST
        ):
            raise UserError(f"{where}: {key} must be seconds, got {bound!r}")
    start, end = value.get("start"), value.get("end")
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{where}: end {end} is not after start {start or 0.0}")
    caption = value.get("caption")
    captions = caption if isinstance(caption, list) else [caption] if caption else []
    if not all(isinstance(text, str) for text in captions):
        raise UserError(f"{where}: caption must be a string, a list of strings or null")
    labels = value.get("labels") or {}
    if not isinstance(labels, dict) or not all(
        type(item) is int and -1 <= item < _CLASSES
        for entry in labels.values()
        for item in (entry if isinstance(entry, list) else [entry])
    ):
        raise UserError(f"{where}: labels must be name → class index (-1: unknown) or a list of them, got {labels!r}")
    name = value["path"]
    if is_address(name) and not remote:
        raise UserError(
            f"{where}: {name} is an address; set data.remote to a folder for what is fetched, or download it"
        )
    about = value.get("media") if isinstance(value.get("media"), dict) else {}
    duration = about.get("duration")
    if duration is not None and (not isinstance(duration, (int, float)) or not 0 <= duration < _LONGEST):
        raise UserError(f"{where}: media.duration must be seconds, got {duration!r}")
    record, sha256 = value.get("record"), value.get("sha256")
    if record is not None and (type(record) is not int or record < 0):
        raise UserError(f"{where}: record must be a place in a shard, got {record!r}")
    if sha256 is not None and not (isinstance(sha256, str) and len(sha256) == 64):
        raise UserError(f"{where}: sha256 must be 64 hex digits, got {sha256!r}")
    return Row(
        id=clean(str(value["path"] if value.get("id") is None else value["id"])),
        path=name if is_address(name) else f"{folder}/{name}" if is_address(folder) else str(Path(folder) / name),
        start=start,
        end=end,
        captions=tuple(clean(text) for text in captions if text.strip()),
        labels=labels,
        record=record,
        sha256=sha256,
        duration=duration,
        **check_asked(value, where),
    )


def check_asked(line: dict, where: str) -> dict:
    """Returns values, texts, events and curves of a line, as in a Row; raises UserError: one has another form."""
    return {
        "values": _values(line.get("values") or {}, where),
        "texts": _texts(line.get("texts") or {}, where),
        "events": _events(line.get("events"), where),
        "curves": _curves(line.get("curves") or {}, where),
    }


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_NUMBER < value < _NUMBER


def _values(values, where: str) -> dict[str, float]:
    if not isinstance(values, dict) or not all(_number(value) for value in values.values()):
        raise UserError(f"{where}: values must be name → number, got {values!r}")
    return values


def _texts(texts, where: str) -> dict[str, str | list[str]]:
    if not isinstance(texts, dict) or not all(
        isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
        for value in texts.values()
    ):
        raise UserError(f"{where}: texts must be name → string or list of strings, got {texts!r}")
    for line in texts.get("subtitles", ()):
        parts = line.split(" ", 2) if isinstance(texts["subtitles"], list) else ()
        try:
            good = len(parts) == 3 and 0 <= float(parts[0]) < float(parts[1]) < math.inf
        except ValueError:
            good = False
        if not good:
            raise UserError(
                f'{where}: texts.subtitles: a list of "START END words" in seconds of the file, got {line!r}'
            )
    if "caption" in texts:
        raise UserError(f"{where}: texts.caption: a clip's caption stands under the key `caption`")
    return {
        name: clean(value) if isinstance(value, str) else [clean(item) for item in value]
        for name, value in texts.items()
    }


def _curves(curves, where: str) -> dict[str, list[float]]:
    if not isinstance(curves, dict) or not all(
        isinstance(value, list) and value and all(_number(item) for item in value) for value in curves.values()
    ):
        raise UserError(f"{where}: curves must be name → list of numbers, got {curves!r}")
    return curves


def _events(events, where: str) -> tuple[Event, ...] | None:
    if events is None:
        return None
    if not isinstance(events, list):
        raise UserError(f"{where}: events must be a list, got {events!r}")
    result = []
    for place, event in enumerate(events):
        here = f"{where}: events[{place}]"
        if not isinstance(event, dict) or not {"start", "end", "label"} <= set(event) <= set(Event._fields):
            raise UserError(
                f"{here}: an event has {', '.join(Event._fields)} (the last two may be left out), got {event!r}"
            )
        start, end, label = event["start"], event["end"], event["label"]
        if not _number(start) or not _number(end) or not 0 <= start < end < _LONGEST:
            raise UserError(
                f"{here}: start and end are seconds of the file, start before end, got {start!r} and {end!r}"
            )
        if type(label) is not int or not 0 <= label < _CLASSES:
            raise UserError(f"{here}: label must be a class index, got {label!r}")
        box, participants = event.get("box"), event.get("participants")
        if box is not None:
            if not isinstance(box, list) or len(box) != 4 or not all(_number(edge) for edge in box):
                raise UserError(f"{here}: box is [left, top, right, bottom], got {box!r}")
            if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                raise UserError(f"{here}: box lies in [0, 1], left before right and top before bottom, got {box!r}")
        if participants is not None and not (
            isinstance(participants, list) and all(type(item) is int and 0 <= item < _CLASSES for item in participants)
        ):
            raise UserError(f"{here}: participants are class indices, got {participants!r}")
        result.append(
            Event(start, end, label, tuple(box) if box else None, None if participants is None else tuple(participants))
        )
    return tuple(result)


def identity(rows: Sequence[Row]) -> dict:
    """Returns what tells a run's clips from others, whatever folder they lie in: {"clips", "ordered", "sorted"}.

    A row counts by its id, its span and, where told, the SHA-256 of its bytes; ordered, sorted: SHA-256 over the rows.
    """
    told = [
        json.dumps([row.id, float(row.start or 0), row.end and float(row.end), row.sha256]).encode() for row in rows
    ]
    ordered, unordered = (hashlib.sha256(b"\n".join(lines)).hexdigest() for lines in (told, sorted(told)))
    return {"clips": len(rows), "ordered": ordered, "sorted": unordered}


def changes(then: Mapping, now: Mapping) -> str:
    """Returns in words how one identity differs from an earlier one; "" where it does not, or nothing is known."""
    if not then or then == now:
        return ""
    if then.get("clips") != now["clips"]:
        return f"{now['clips']} clips, {then.get('clips')} then"
    return "the same clips in another order" if then.get("sorted") == now["sorted"] else "as many, but other clips"


def manifest_digest(path: str | Path) -> str:
    """Returns the SHA-256 of the manifest, the name under which results quote a dataset."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
