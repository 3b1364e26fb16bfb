"""CSV and JSON-lines tables of clips; a line that gives no clip is quarantined, a table that is none is an error."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vmm.data.asked import KEYS, asked_of
from vmm.data.sources.entry import Bad, Entry, captions_of, labels_of, path_in, span_of, tell_unused
from vmm.errors import UserError, one_of

# Field → names under which tables in the wild have it.
_NAMES = {
    "path": ("path", "video", "video_path", "file", "filename", "file_name", "clip", "media"),
    "id": ("id", "video_id", "clip_id", "videoid", "key"),
    "caption": ("caption", "captions", "text", "sentence", "description", "name", "title"),
    "start": ("start", "start_time", "start_sec", "time_start"),
    "end": ("end", "end_time", "end_sec", "time_end"),
    "sha256": ("sha256",),
}
_OURS = (
    *KEYS,
    "media",
    "source",
    "record",
)  # of a manifest: what tasks ask for; what a build found out and finds out again
_ADVICE = f"--label NAME takes one for classes, --column FIELD=NAME for a field ({', '.join(_NAMES)})"
_REST = "\0rest"  # under this name csv keeps fields beyond the heading


def read_csv(path: Path, media: Path | None = None, columns: Mapping = {}, label: str = "") -> Iterator[Entry]:
    """Yields the rows of a CSV or TSV table with a heading.

    Args:
      media: folder that paths are relative to; default: the table's.
      columns: field → column, where the names are not the usual ones (path, id, caption, start, end, sha256).
      label: column with class names.
    """
    csv.field_size_limit(1 << 28)
    with _text(path) as file:
        head = file.readline()
        separator = max(",\t;|", key=head.count)
        file.seek(0)
        reader = csv.DictReader(file, delimiter=separator, restkey=_REST)
        names = [name for name in reader.fieldnames or () if name]
        chosen = _chosen(path, names, columns)
        for field, name in (*columns.items(), *([("the label", label)] if label else ())):
            if name not in names:
                raise UserError(f"{path}: has no column {name!r} for {field}; {one_of(name, names)}")
        tell_unused(path, [name for name in names if name not in (*chosen.values(), label)], _ADVICE)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield _bad_line(reader.line_num, str(error))
                continue
            if row is None:
                return
            fields = len(names) + len(row.get(_REST, ())) - sum(value is None for value in row.values())
            if fields != len(names):
                yield _bad_line(reader.line_num, f"{fields} fields, the heading has {len(names)}")
            else:
                yield _entry(row, reader.line_num, media or path.parent, chosen, label)


def read_jsonl(path: Path, media: Path | None = None, columns: Mapping = {}, label: str = "") -> Iterator[Entry]:
    """Yields the lines of a JSON-lines table, or of one JSON list. Arguments: as read_csv.

    A manifest of vmm is read too: its labels, class indices, stay what they are.
    """
    wanted = dict(columns) | ({"the label": label} if label else {})
    names: dict[str, None] = {}
    chosen: dict[tuple, dict] = {}
    with _text(path) as file:
        for number, row in _objects(path, file):
            if isinstance(row, Bad):
                yield _bad_line(number, row.detail)
                continue
            keys = tuple(row)  # lines may have different ones
            if keys not in chosen:
                try:
                    chosen[keys] = _chosen(path, keys, columns)
                except UserError:
                    if not chosen:
                        raise
                    yield _bad_line(number, "names no file")
                    continue
                names |= dict.fromkeys(keys)
            yield _entry(row, number, media or path.parent, chosen[keys], label)
    for field, name in wanted.items():
        if name not in names:
            raise UserError(f"{path}: no line has {name!r} for {field}; {one_of(name, names)}")
    used = {label, "labels", *_OURS, *(name for fields in chosen.values() for name in fields.values())}
    tell_unused(path, [name for name in names if name not in used], _ADVICE)


def _objects(path: Path, file) -> Iterator[tuple[int, dict | Bad]]:
    """Yields (number of the line or item, what stands there)."""
    start = file.read(1)
    file.seek(0)
    if start == "[":
        try:
            values = json.load(file)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None
        for number, value in enumerate(values, 1):
            yield number, value if isinstance(value, dict) else Bad("bad line", "not an object")
        return
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                value = json.loads(line)
                yield number, value if isinstance(value, dict) else Bad("bad line", "not an object")
            except (ValueError, RecursionError) as error:
                yield number, Bad("bad line", f"not JSON: {error}")


def _text(path: Path):
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    # What is not UTF-8 becomes U+FFFD, for which the row, not the table, is refused.
    return open(path, encoding="utf-8-sig", errors="replace", newline="")


def _chosen(path: Path, names: Sequence[str], given: Mapping) -> dict[str, str]:
    """Returns field → the column that holds it, of those that there are.

    Raises:
      UserError: none tells the file.
    """
    by_lower = {name.lower().strip(): name for name in names}
    found = {
        field: given.get(field) or next((by_lower[name] for name in known if name in by_lower), None)
        for field, known in _NAMES.items()
    }
    if unknown := set(given) - set(_NAMES):
        raise UserError(f"--column {min(unknown)}=…: no such field; {one_of(min(unknown), _NAMES)}")
    if found["path"] not in names:
        raise UserError(
            f"{path}: no column tells the file of a clip; name one: --column path=NAME; {one_of(found['path'], names)}"
        )
    return {field: name for field, name in found.items() if name in names}


def _bad_line(number: int, detail: str) -> Entry:
    return Entry(f"line {number}", "", reason="bad line", detail=f"line {number}: {detail}")


def _entry(row: dict, number: int, folder: Path, chosen: dict, label: str) -> Entry:
    def get(field):
        return row.get(chosen[field]) if field in chosen else None

    name, start, end, identity = get("path"), get("start"), get("end"), get("id")
    if identity is None or identity == "":
        identity = f"{name}" if start in (None, "") and end in (None, "") else f"{name}@{start}-{end}"
    entry = Entry(id=str(identity)[:500] if name else f"line {number}", path=str(name)[:5000])
    try:
        start, end = span_of(start, end)
        labels = row.get("labels") if isinstance(row.get("labels"), dict) else {}
        if label:
            labels = labels | {label: row.get(label)}
        sha256 = get("sha256") or None
        if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256 := str(sha256).strip().lower()):
            raise Bad("bad line", "sha256 is not 64 hex digits")
        return entry._replace(
            path=path_in(folder, name), start=start, end=end, captions=captions_of(get("caption")),
            labels=labels_of(labels), asked=asked_of(row), sha256=sha256,
        )  # fmt: skip
    except UserError as error:
        return entry._replace(reason="bad line", detail=f"line {number}: {error}")
    except Bad as error:
        return entry._replace(reason=error.reason, detail=f"line {number}: {error.detail}")
