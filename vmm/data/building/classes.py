"""Names of classes and their indices."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from vmm.errors import UserError
from vmm.foreign import parse_json


def read_classes(path: Path) -> dict[str, list[str]]:
    """Returns the classes of a classes.json.

    Raises:
      UserError: it is none.
    """
    try:
        classes = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    good = isinstance(classes, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
        for names in classes.values()
    )
    if not good:
        raise UserError(f"{path}: not a classes.json: label → a list of different names")
    return classes


def number_classes(labels: Iterable[Mapping]) -> dict[str, list[str]]:
    """Returns label → class names in order; labels that are class indices already have none."""
    values: dict[str, set] = {}
    for mine in labels:
        for name, value in mine.items():
            values.setdefault(name, set()).update(value if isinstance(value, list) else [value])
    return {
        name: sorted(map(str, found), key=_natural)
        for name, found in sorted(values.items())
        if not all(type(value) is int for value in found)
    }


def _natural(name: str) -> tuple:
    """Class 10 comes after class 9."""
    return (0, int(name), name) if name.isascii() and name.isdigit() and len(name) < 20 else (1, 0, name)


def class_index(value, places: Mapping | None):
    """Returns a label with indices for names. places: name → index, None: they are indices already."""
    if places is None:
        return value
    return [places[str(item)] for item in value] if isinstance(value, list) else places[str(value)]
