"""What the recipes of published datasets share: tables read line by line, splits, the check of a file's format.

A line that gives no clip becomes an entry with a reason; a file in which no line is right is an error.
"""

import csv
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from vmm.data.sources.entry import Bad, Entry
from vmm.data.sources.library import Library
from vmm.errors import UserError, one_of
from vmm.foreign import parse_json

_OPEN = 30  # lines over which a quoted field of a table may run
_PROBE = 100  # bad lines in a row, from the first on, after which a file is not of the format

Row = tuple[str, dict | Bad]
"""Where a row stands, in words; its fields by name, or why it has none."""


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (number, line) of a text file, without blank lines. What is not UTF-8 becomes U+FFFD."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.rstrip("\n")


def table(
    path: Path, needs: Sequence[str], heading: Sequence[str] = (), separator: str = ",", comment: str = "",
) -> Iterator[Row]:  # fmt: skip
    """Yields the rows of a table; a row with another number of fields than the heading is a Bad.

    Args:
      needs: columns that it must have. heading: names of the columns of a table that does not tell them; a first line
      that repeats them is left out. comment: how lines begin that are none of the table.

    Raises:
      UserError: no such file, or no such column.
    """
    lines = ((number, line) for number, line in lines_of(path) if not comment or not line.startswith(comment))
    names = list(heading)
    for number, fields in _records(lines, separator, len(names)):
        where = f"line {number}"
        if not names:
            names = [name.strip() for name in fields or ()]
            lacking = [name for name in needs if name not in names]
            if lacking:
                raise UserError(f"{path}: has no column {lacking[0]!r}; its first line must name {', '.join(needs)}")
        elif fields is None:
            yield where, Bad("bad line", "a quote that does not end")
        elif any("\ufffd" in field for field in fields):
            yield where, Bad("bad line", "not UTF-8")
        elif len(fields) != len(names):
            yield where, Bad("bad line", f"{len(fields)} fields, not {len(names)} ({separator.join(names)})")
        elif fields != list(heading):
            yield where, dict(zip(names, (field.strip() for field in fields)))


def _records(lines: Iterator[tuple[int, str]], separator: str, count: int) -> Iterator[tuple[int, list[str] | None]]:
    """Yields (number of its first line, fields) of each record; None for a line whose quotes do not end.

    Line by line: a stray quote costs its own line, not the rest of the file. count: fields of a record, 0: as many as
    the first has.
    """
    ahead: deque[tuple[int, str]] = deque()
    while ahead or (ahead := deque(itertools.islice(lines, 1))):
        fields, used = _fields([ahead[0][1]], separator), 1
        while fields is None and used < _OPEN:
            if len(ahead) == used:
                ahead.extend(itertools.islice(lines, 1))
            if len(ahead) == used:
                break
            used += 1
            fields = _fields([line for _, line in itertools.islice(ahead, used)], separator)
            if fields is not None and len(fields) != count:
                fields = None
        number = ahead[0][0]
        for _ in range(used if fields is not None else 1):
            ahead.popleft()
        count = count or len(fields or ())
        yield number, fields


def _fields(lines: list[str], separator: str) -> list[str] | None:
    try:
        rows = list(
            csv.reader([line + "\n" for line in lines], delimiter=separator, strict=True, skipinitialspace=True)
        )
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


def read_json(path: Path):
    """Returns what a JSON file holds. Raises UserError where it is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # UnicodeDecodeError too
        raise UserError(f"{path}: not JSON ({error})") from None


def beside(path: Path, names: Sequence[str], where: str) -> Path:
    """Returns a file that belongs to an annotation file: in its folder, or the one above.

    Raises:
      UserError: it is in neither. where: the part of the distribution that holds it, in words.
    """
    for folder in (path.parent, path.parent.parent):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"{path.parent / names[0]}: no such file; it is needed beside {path.name}, and comes {where}")


def of_split(rows: Iterable[Row], split: str | None, path: Path, name: str = "split") -> Iterator[Row]:
    """Yields the rows whose field `name` is the split, all where None is asked for; Bad rows belong to any.

    Raises:
      UserError: at the end, where no row has it.
    """
    others: set[str] = set()
    met = split is None
    for where, row in rows:
        if split is not None and isinstance(row, dict):
            if row.get(name) != split:
                others.add(str(row.get(name)))
                continue
            met = True
        yield where, row
    if not met and others:
        raise UserError(f"{path}: has no split {split!r}; {one_of(split, others)}")


def numbered_split(split: str | None, count: int) -> tuple[str, int]:
    """Returns ("train" or "test", number) of train1 … testN. Raises UserError that lists them."""
    known = [f"{kind}{number}" for number in range(1, count + 1) for kind in ("train", "test")]
    if split not in known:
        told = f"--split {split}" if split else "--split is needed"
        raise UserError(f"{told}: {one_of(split or '', known)}")
    return split[:-1], int(split[-1])


def entries_of(rows: Iterable[Row], path: Path, make: Callable[[dict], Entry]) -> Iterator[Entry]:
    """Yields what `make` gives for each row; where it raises Bad, an entry with that reason, named by its place."""
    for where, row in rows:
        try:
            if isinstance(row, Bad):
                raise row
            yield make(row)
        except Bad as error:
            text = "" if isinstance(row, Bad) else ": " + ", ".join(map(str, row.values()))[:200]
            yield Entry(where, str(path), reason=error.reason, detail=f"{error.detail}{text}")


def checked(entries: Iterable[Entry], path: Path, format: str, library: Library) -> Iterator[Entry]:
    """Yields the entries of an annotation file that is of the format.

    Raises:
      UserError: every line of it is bad; or none of its media is in the library.
    """
    held: list[Entry] | None = []
    for entry in entries:
        if held is None:
            yield entry
            continue
        held.append(entry)
        if entry.reason != "bad line":
            yield from held
            held = None
        elif len(held) >= _PROBE:
            break
    if held:
        raise UserError(f"{path}: not {format} ({held[0].id}: {held[0].detail})")
    if held is not None:
        raise UserError(f"{path}: holds no clips; expected {format}")
    if library.asked and not library.found:
        some = sorted(library.files)[0]
        raise UserError(
            f"{library.folder}: has none of the {library.asked} media that {path.name} names; its files are "
            f"called like {Path(library.files[some][0]).name!r}; name the folder of the media with --media"
        )
