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


# Part of a column's name → decimals of its numbers; any other column holds shares, told in per cent.
_PLAIN = {"median_rank": 1, "PSNR": 2, "SSIM": 4, "MAE": 3, "pearson": 3, "R2": 3, "cider": 2, "seconds": 2}


def _form(column: str) -> tuple[float, int]:
    """Returns (factor, decimals) of a column's numbers."""
    return next(((1.0, decimals) for part, decimals in _PLAIN.items() if part in column), (100.0, 1))


def show(column: str, value: float | None) -> str:
    """Returns a cell: shares as per cent, ranks, decibels and the like as numbers."""
    if value is None or math.isnan(value):
        return "–"
    factor, decimals = _form(column)
    return f"{factor * value:.{decimals}f}" + (" %" if factor == 100 else "")


def show_interval(column: str, ends: Sequence[float] | None) -> str:
    """Returns an interval as `show` returns its number: "68.0–74.1"; "" where there is none."""
    if ends is None or any(math.isnan(end) for end in ends):
        return ""
    factor, decimals = _form(column)
    return "–".join(f"{factor * end:.{decimals}f}" for end in ends)
