"""Entry: one clip as a source names it, before anything is opened; and the checks that every source shares."""

import math
import os
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

VIDEO = {
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".f4v", ".3gp", ".3g2", ".mpg",
    ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".wmv", ".asf", ".ogv",
    ".ogm", ".divx", ".mxf", ".dv", ".nut", ".ivf", ".h264", ".264", ".hevc", ".265", ".gif",
}  # fmt: skip
AUDIO = {
    ".wav", ".w64", ".flac", ".mp3", ".mp2", ".ogg", ".oga", ".opus", ".m4a", ".m4b", ".mka",
    ".aac", ".ac3", ".eac3", ".amr", ".wma", ".aif", ".aiff", ".aifc", ".caf", ".wv", ".tta",
    ".ape",
}  # fmt: skip
MEDIA = VIDEO | AUDIO

_LONGEST_CAPTION = 20_000  # characters; above, a caption is a page that was scraped


class Entry(NamedTuple):
    """One clip of a source.

    id: unique in the dataset. path: the file it lies in, on this machine; member: where in it, for archives
    (vmm/data/members.py). start, end: seconds, None: from the beginning, to the end. captions: phrasings. labels: name
    → class name, or a list of class names. asked: what tasks need (vmm/data/asked.py). sha256: of the media's bytes, where the source tells it.
    reason, detail: why the source itself already says that it is no clip.
    """

    id: str
    path: str
    member: tuple = ()
    start: float | None = None
    end: float | None = None
    captions: tuple[str, ...] = ()
    labels: dict = {}
    sha256: str | None = None
    reason: str | None = None
    detail: str = ""
    asked: dict = {}


REASONS = ("bad caption", "bad span", "bad path", "bad line", "bad label", "duplicate id", "missing", "not taken")
"""Why a source line gives no clip. What is not taken was not meant to be one: it is listed, and counts for no budget."""


class Bad(Exception):
    """A line of a source that gives no clip. `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def captions_of(value) -> tuple[str, ...]:
    """Returns the phrasings of a caption field: text, list of texts, or nothing (None, NaN, blank).

    Raises:
      Bad: not text, or so long that it is no caption.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = []
    for text in values:
        if text is None or (isinstance(text, float) and math.isnan(text)):
            continue
        if not isinstance(text, str):
            raise Bad("bad caption", f"{type(text).__name__}, not text")
        if "\ufffd" in text or any("\ud800" <= c <= "\udfff" for c in text):
            raise Bad("bad caption", "not UTF-8")
        if len(text) > _LONGEST_CAPTION:
            raise Bad("bad caption", f"{len(text)} characters, more than {_LONGEST_CAPTION}")
        text = " ".join("".join(c if unicodedata.category(c) != "Cc" else " " for c in text).split())
        if text and text.lower() != "nan":
            texts.append(text)
    return tuple(texts)


def seconds_of(value, name: str) -> float | None:
    """Returns seconds from a number, its text, or [HH:]MM:SS[.s]; None for nothing.

    Raises:
      Bad: anything else, negative or infinite.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan", "none", "null")):
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        parts = str(value).strip().split(":") if isinstance(value, str) else [value]
        if len(parts) > 3:
            raise ValueError
        seconds = 0.0
        for part in parts:
            seconds = seconds * 60 + float(part)
    except (ValueError, TypeError, OverflowError):
        raise Bad("bad span", f"{name} is {_short(value)}, not seconds") from None
    if math.isnan(seconds) and not isinstance(value, str):
        return None
    if not 0 <= seconds < math.inf:
        raise Bad("bad span", f"{name} is {_short(value)}")
    return seconds


def span_of(start, end) -> tuple[float | None, float | None]:
    """Returns (start, end) in seconds. Raises Bad where the end is not after the start."""
    start, end = seconds_of(start, "start"), seconds_of(end, "end")
    if end is not None and end <= (start or 0.0):
        raise Bad("bad span", f"end {end:g} is not after start {start or 0.0:g}")
    return start, end


def path_in(folder: Path, name) -> str:
    """Returns a file's path below `folder`, which a table may also write whole.

    Links are followed: what is in the folder was put there by who owns it, and a table by anyone.

    Raises:
      Bad: no text, an address instead of a file (nothing is ever fetched), or a file outside of the folder, which the
        table's author has no business with.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name or "\ufffd" in name:
        raise Bad("bad path", _short(name))
    # A file may well be called "12:30.mp4"; what is no file but looks like http: or concat: is named as what it is.
    if ":" in name.split("/")[0] and not _is_file(folder / name):
        raise Bad("bad path", f"{_short(name)} is an address, not a file; download it first")
    root = os.path.abspath(folder)
    if os.path.commonpath([root, os.path.abspath(folder / name)]) != root:
        raise Bad(
            "bad path", f"{_short(name)} is outside of {folder}; where it is to be read, name its folder with --media"
        )
    return str(folder / name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or no name in this file system's encoding
        return False


def labels_of(values: Mapping) -> dict[str, str | int | list]:
    """Returns the labels of a clip: name → class name, class index, or a list of them; without those that say nothing.

    Raises:
      Bad: neither text nor an index.
    """
    labels = {}
    for name, value in values.items():
        items = [_class(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
        items = [item for item in items if item is not None]
        if items or value == []:  # [] is known: none of them
            labels[str(name)] = items if isinstance(value, (list, tuple)) else items[0]
    return labels


def _class(value) -> str | int | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables turn indices into 3.0 where one is missing
    if isinstance(value, int):
        if not -1 <= value < 1 << 31:
            raise Bad("bad label", f"{value} is no class index")
        return value
    if not isinstance(value, str) or "\ufffd" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise Bad("bad label", f"{_short(value)} is neither a name nor an index")
    return value.strip() or None


def _short(value) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
    return text if len(text) < 200 else text[:200] + "…"


def tell_unused(path: Path, names: Sequence[str], advice: str) -> None:
    """Prints, on stderr, which columns or keys of a dataset nothing was made of. advice: how one is made use of."""
    if names:
        told = ", ".join(_plain(name) for name in names[:20])
        told += f" and {len(names) - 20} more" if len(names) > 20 else ""
        print(f"{path}: columns that are not used: {told}; {advice}", file=sys.stderr)


def _plain(name: str) -> str:
    return name if len(name) <= 60 and name.isprintable() else _short(name)


def unique(entries: Iterator[Entry]) -> list[Entry]:
    """Returns entries in their order, each clip once.

    A table with a line for every caption names a clip several times: its captions come together. Any other entry whose id
    an earlier clip has is marked as a duplicate.
    """
    found: list[Entry] = []
    places: dict[str, int] = {}
    for entry in entries:
        # A file name need not be UTF-8, an id has to be.
        entry = entry._replace(id=entry.id.encode("utf-8", "backslashreplace").decode())
        if not entry.reason:
            place = places.setdefault(entry.id, len(found))
            if place < len(found):
                first = found[place]
                if entry.captions and entry == first._replace(captions=entry.captions):
                    found[place] = first._replace(captions=tuple(dict.fromkeys((*first.captions, *entry.captions))))
                    continue
                entry = entry._replace(reason="duplicate id", detail="an earlier clip has it")
        found.append(entry)
    return found
