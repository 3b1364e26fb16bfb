"""A dataset as a person asks about it: its manifest with all that stands there, and what a build wrote beside it."""

from pathlib import Path
from typing import NamedTuple

from vmm.data.manifest import Row, read_manifest
from vmm.errors import UserError
from vmm.foreign import parse_json


class Dataset(NamedTuple):
    """A build's folder, or a manifest alone.

    path: as it was given. manifest: its file. rows: the clips; lines: the same, with the keys that rows leave out
    (`media`, `source`), unchecked. built: what build.json holds, None for a manifest alone. quarantine, duplicates:
    lines of the files of these names, None where there is no such file. classes: label → names of its classes.
    """

    path: Path
    manifest: Path
    rows: list[Row]
    lines: list[dict]
    built: dict | None
    quarantine: list[dict] | None
    duplicates: list[dict] | None
    classes: dict[str, list[str]]

    def class_name(self, label: str, index: int) -> str:
        """Returns the name of a class, its index where no name is known."""
        names = self.classes.get(label, ())
        return names[index] if 0 <= index < len(names) else str(index)


def open_dataset(path: Path) -> Dataset:
    """Reads a build's folder, its manifest.jsonl, or any manifest.

    Raises:
      UserError: it is not there, a build that is not finished, or a file of it cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    built = None
    if path.is_dir() or path.name == "manifest.jsonl":
        built = _built(folder / "build.json")
    if path.is_dir() and built is None:
        if (folder / ".build").is_dir():
            raise UserError(f"{path}: the build is not finished; run the same `vmm data build` again")
        if not (folder / "manifest.jsonl").is_file():
            raise UserError(f"{path}: holds no manifest.jsonl; give the folder of a `vmm data build`, or a manifest")
    manifest = folder / "manifest.jsonl" if path.is_dir() else path
    # A build that left everything out has an empty manifest, and a quarantine to show.
    empty = built is not None and manifest.is_file() and not manifest.read_bytes().strip()
    rows = [] if empty else read_manifest(manifest)
    beside = built is not None
    return Dataset(
        path, manifest, rows, [] if empty else read_lines(manifest), built,
        read_lines(folder / "quarantine.jsonl") if beside else None,
        read_lines(folder / "duplicates.jsonl") if beside else None,
        _classes(folder),
    )  # fmt: skip


def read_lines(path: Path) -> list[dict] | None:
    """Returns the objects of a JSON Lines file, None where it is missing. Raises UserError for a line that is none."""
    if not path.is_file():
        return None
    try:
        # Not splitlines(): a caption may hold U+2028 or U+0085.
        values = [
            parse_json(line, halves=True) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()
        ]
    except ValueError as error:
        raise UserError(f"{path}: not JSON Lines ({error}); build again") from None
    if not all(isinstance(value, dict) for value in values):
        raise UserError(f"{path}: a line is no JSON object; build again")
    return values


def about(line: dict, key: str) -> dict:
    """Returns the object under a key of a manifest's line, empty where there is none."""
    value = line.get(key)
    return value if isinstance(value, dict) else {}


def printable(text: object) -> str:
    """Returns text fit for one line of a terminal: what cannot be printed is written as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))


def _built(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); build again") from None
    kinds = {"clips": int, "left_out": dict, "duplicates": int, "files": dict}
    if not isinstance(value, dict) or not all(type(value.get(key)) is kind for key, kind in kinds.items()):
        raise UserError(f"{path}: must hold {', '.join(kinds)}; build again")
    return value


def _classes(folder: Path) -> dict[str, list[str]]:
    """Returns the names of classes from classes.json of a build, or from labels.json, as the world has it."""
    for name in ("classes.json", "labels.json"):
        path = folder / name
        if path.is_file():
            try:
                value = parse_json(path.read_text(encoding="utf-8-sig"))
            except ValueError as error:
                raise UserError(f"{path}: not valid JSON ({error})") from None
            # Other things are called labels.json too: what is no label → list of names is not for us.
            if isinstance(value, dict) and all(
                isinstance(names, list) and all(isinstance(item, str) for item in names) for names in value.values()
            ):
                return value
    return {}
