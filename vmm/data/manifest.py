"""The manifest: one JSON line per clip, the only thing the loader knows of a dataset.

    {"id": "0001", "path": "0001.mp4", "start": 0.0, "end": 2.0, "caption": "…", "labels": {"shape": 3}}

`path` is relative to the manifest's folder; `start` and `end` are seconds, null for the whole
file; `caption` is a string, a list of alternative phrasings, or null; `labels` are class indices.
Only `path` is required.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

from vmm.errors import UserError, one_of

_KEYS = ("id", "path", "start", "end", "caption", "labels")


class Row(NamedTuple):
    """One clip. start, end: seconds or None; captions: alternative phrasings, may be empty."""

    id: str
    path: str
    start: float | None
    end: float | None
    captions: tuple[str, ...]
    labels: dict[str, int]


def read_manifest(path: str | Path) -> list[Row]:
    """Reads and checks a manifest.

    Raises:
      UserError: the file is missing, empty, or has a line that is no clip; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"dataset {path}: no such file; write a manifest (one JSON line per clip with a `path`), "
            "or make the synthetic world with `vmm data world`"
        )
    rows, seen = [], {}
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"dataset {path}: not UTF-8 text ({error})") from None
    # Not splitlines(): a caption may hold U+2028 or U+0085.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            row = _row(line, f"dataset {path}, line {number}", path.parent)
            if row.id in seen:
                raise UserError(
                    f"dataset {path}, line {number}: id {row.id!r} stands already in line {seen[row.id]}; ids must differ"
                )
            seen[row.id] = number
            rows.append(row)
    if not rows:
        raise UserError(f"dataset {path}: holds no clips; add one JSON line per clip")
    return rows


def _row(line: str, where: str, folder: Path) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get("path"), str):
        raise UserError(f"{where}: a clip needs a `path`")
    for key in value:
        if key not in _KEYS:
            raise UserError(f"{where}: no such key {key!r}; {one_of(key, _KEYS)}")
    for key in ("start", "end"):
        bound = value.get(key)
        if bound is not None and (
            isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 <= bound < math.inf
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
    if not isinstance(labels, dict) or not all(type(item) is int and item >= -1 for item in labels.values()):
        raise UserError(f"{where}: labels must be name → class index (-1: unknown), got {labels!r}")
    return Row(
        id=str(value["path"] if value.get("id") is None else value["id"]),
        path=str(folder / value["path"]),
        start=start,
        end=end,
        captions=tuple(text for text in captions if text.strip()),
        labels=labels,
    )


def manifest_digest(path: str | Path) -> str:
    """Returns the SHA-256 of the manifest, the name under which results quote a dataset."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
