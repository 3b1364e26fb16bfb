"""CSV and JSON-lines tables of clips; a line that gives no clip is quarantined, a table that is none is an error."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from vmm.data.sources.entry import Bad, Entry, captions_of, path_in, span_of
from vmm.errors import UserError, one_of

# Column → names under which tables in the wild have it.
_NAMES = {
    "path": ("path", "video", "video_path", "file", "filename", "file_name", "clip", "media"),
    "id": ("id", "video_id", "clip_id", "videoid", "key"),
    "caption": ("caption", "captions", "text", "sentence", "description", "name", "title"),
    "start": ("start", "start_time", "start_sec", "time_start"),
    "end": ("end", "end_time", "end_sec", "time_end"),
    "sha256": ("sha256",),
}


def read_csv(path: Path, media: Path | None = None, columns: Mapping = {}, label: str = "") -> Iterator[Entry]:
    """Yields the rows of a CSV or TSV table with a heading.

    Args:
      media: folder that paths are relative to; default: the table's.
      columns: field → column, where the names are not the usual ones (path, id, caption, start, end, sha256).
      label: column with class names.
    """
    with _text(path) as file:
        head = file.readline()
        separator = max(",\t;|", key=head.count)
        file.seek(0)
        reader = csv.DictReader(file, delimiter=separator, strict=False)
        names = [name for name in reader.fieldnames or () if name]
        chosen = _columns(path, names, columns, label)
        csv.field_size_limit(1 << 28)
        for row in reader:
            yield _entry(row, f"line {reader.line_num}", media or path.parent, chosen, label)


def read_jsonl(path: Path, media: Path | None = None, columns: Mapping = {}, label: str = "") -> Iterator[Entry]:
    """Yields the lines of a JSON-lines table, or of one JSON list. Arguments: as read_csv.

    A manifest of vmm is read too: its labels, class indices, stay what they are.
    """
    with _text(path) as file:
        start = file.read(1)
        file.seek(0)
        if start == "[":
            try:
                lines = enumerate((json.dumps(item) for item in json.load(file)), 1)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: not JSON ({error})") from None
        else:
            lines = enumerate(file, 1)
        chosen = None
        for number, line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                yield Entry(f"line {number}", "", reason="bad line", detail=str(error))
                continue
            if chosen is None:
                chosen = _columns(path, list(row), columns, label)
            yield _entry(row, f"line {number}", media or path.parent, chosen, label)


def _text(path: Path):
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    # What is not UTF-8 becomes U+FFFD, for which the row, not the table, is refused.
    return open(path, encoding="utf-8-sig", errors="replace", newline="")


def _columns(path: Path, names: list[str], given: Mapping, label: str) -> dict[str, str]:
    """Returns field → column of this table."""
    by_lower = {name.lower().strip(): name for name in names}
    chosen = {}
    for field, known in _NAMES.items():
        found = next((by_lower[name] for name in known if name in by_lower), None)
        if field in given:
            if given[field] not in names:
                raise UserError(f"{path}: has no column {given[field]!r} for {field}; {one_of(given[field], names)}")
            found = given[field]
        if found:
            chosen[field] = found
    if "path" not in chosen:
        raise UserError(
            f"{path}: no column tells the file of a clip; name one: --column path=NAME; {one_of('path', names)}"
        )
    if label and label not in names:
        raise UserError(f"{path}: has no column {label!r} for the label; {one_of(label, names)}")
    return chosen


def _entry(row: dict, where: str, folder: Path, chosen: dict, label: str) -> Entry:
    def get(field):
        return row.get(chosen[field]) if field in chosen else None

    name = get("path")
    start, end = get("start"), get("end")
    identity = get("id")
    if identity is None or identity == "":
        identity = f"{name}" if start in (None, "") and end in (None, "") else f"{name}@{start}-{end}"
    entry = Entry(id=str(identity) if name else where, path=str(name))
    try:
        start, end = span_of(start, end)
        labels = row.get("labels") if isinstance(row.get("labels"), dict) else {}
        if label and row.get(label) not in (None, ""):
            labels = labels | {label: row[label]}
        return entry._replace(
            path=path_in(folder, name), start=start, end=end, captions=captions_of(get("caption")), labels=labels,
            sha256=get("sha256") or None,
        )  # fmt: skip
    except Bad as error:
        return entry._replace(reason=error.reason, detail=f"{where}: {error.detail}")
