"""Predictions of every clip as a file: JSON lines, ids of the manifest, so that two models can be joined.

The first line tells of the run (format, step, config, data: manifest → SHA-256); every other is one clip under one name:

    {"evaluator": "probe", "name": "V/shape", "id": "a1", "subset": "V", "label": 3, "prediction": 2,
     "probability": 0.61, "scores": {"accuracy": 0.0}}
    {"evaluator": "retrieval", "name": "V→T", "id": "a1", "subset": "V", "rank": 1.0, "scores": {"R@1": 1.0, …}}
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vmm.build import write_text
from vmm.errors import StorageError, UserError
from vmm.evals.scored import Scored
from vmm.foreign import parse_json

FORMAT = "vmm-predictions/1"
UNNAMED = "accuracy"  # the metric that needs no name in a table


def lines(evaluator: str, scored: Scored, ids: list[str]) -> Iterator[dict]:
    """Yields one line a row. ids: of the manifest's rows, in order. What is not finite becomes null.

    Of several of one clip (its captions, each a query), the second is "ID#2", and so on.
    """
    seen: Counter = Counter()
    for i, row in enumerate(scored.row.tolist()):
        seen[row] += 1
        identity = ids[row] if seen[row] == 1 else f"{ids[row]}#{seen[row]}"
        told = {key: _plain(values[i]) for key, values in scored.told.items()}
        scores = {key or UNNAMED: _plain(values[i]) for key, values in scored.means.items()}
        yield (
            {"evaluator": evaluator, "name": scored.name, "id": identity, "subset": scored.subset}
            | told
            | {"scores": scores}
        )


def _plain(value: np.generic) -> int | float | None:
    item = value.item()
    return item if not isinstance(item, float) or math.isfinite(item) else None


def write_predictions(path: Path, about: Mapping, rows: list[dict]) -> None:
    """Writes the file, whole or not at all.

    Raises:
      StorageError: it cannot be written.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [{"format": FORMAT, **about}, *rows])
    try:
        write_text(path, text)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


class Predictions(NamedTuple):
    """about: the first line. rows: (evaluator/name) → id → the clip's line."""

    path: Path
    about: dict
    rows: dict[str, dict[str, dict]]


def read_predictions(path: Path) -> Predictions:
    """Reads what `write_predictions` wrote.

    Raises:
      UserError: no such file, or a line that is no prediction; names file and line.
    """
    if not path.is_file():
        raise UserError(f"predictions {path}: no such file; write it with `vmm eval RUN --predictions`")
    found, about = {}, None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"predictions {path}: not UTF-8 text; write it with `vmm eval RUN --predictions`") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"predictions {path}, line {number}: not valid JSON ({error})") from None
        if about is None:
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                raise UserError(f"predictions {path}, line 1: format is not {FORMAT!r}; write the file anew")
            about = value
            continue
        if not isinstance(value, dict):
            raise UserError(f"predictions {path}, line {number}: not an object")
        for key, kind in (("evaluator", str), ("name", str), ("id", str), ("scores", dict)):
            if not isinstance(value.get(key), kind):
                raise UserError(f"predictions {path}, line {number}: lacks {key!r}")
        mine = found.setdefault(f"{value['evaluator']}/{value['name']}", {})
        if value["id"] in mine:
            raise UserError(
                f"predictions {path}, line {number}: id {value['id']!r} stands twice under {value['name']!r}"
            )
        mine[value["id"]] = value
    if about is None or not found:
        raise UserError(f"predictions {path}: holds no predictions; evaluate a split that has clips")
    return Predictions(path, about, found)
