"""Numbers and their names → rows, columns and cells of a table."""

import math
from collections.abc import Mapping, Sequence


def grid(values: Mapping[str, float]) -> tuple[list, list, dict, dict]:
    """Parts "row/column" names: returns (rows, columns, {(row, column): value}, the rest)."""
    cells = {
        tuple(key.split("/", 1)): value for key, value in values.items() if "/" in key and not key.startswith("chance")
    }
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    return rows, columns, cells, {key: value for key, value in values.items() if tuple(key.split("/", 1)) not in cells}


def show(column: str, value: float | None) -> str:
    """Returns a cell: shares as per cent, ranks as numbers."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.1f}" if "rank" in column else f"{100 * value:.1f} %"


def show_interval(column: str, ends: Sequence[float] | None) -> str:
    """Returns an interval as `show` returns its number: "68.0–74.1"; "" where there is none."""
    if ends is None or any(math.isnan(end) for end in ends):
        return ""
    scale = 1 if "rank" in column else 100
    return "–".join(f"{scale * end:.1f}" for end in ends)
