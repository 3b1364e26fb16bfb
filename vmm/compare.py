"""vmm compare: two models' predictions → paired tests on the clips that both have."""

import json
import math
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from vmm.build import write_text
from vmm.errors import StorageError, UserError
from vmm.evals.predictions import Predictions, read_predictions
from vmm.evals.statistics import benjamini_hochberg, holm, mcnemar, paired
from vmm.evals.tables import show_interval
from vmm.paths import to_path


def compare(ours: str | Path, theirs: str | Path, json_file: Path | None = None) -> dict:
    """Compares two runs, or files of predictions, prints a table and returns the numbers; differences are theirs − ours.

    Every metric that both have clip by clip is compared on the ids that both have: paired bootstrap interval, sign-flip
    permutation test, for right-or-wrong metrics McNemar's test too. All permutation p-values are one family,
    corrected after Holm and after Benjamini and Hochberg.

    Raises:
      UserError: no predictions, nothing that both predicted, or labels or data that differ.
    """
    one, two = (read_predictions(_file(name)) for name in (ours, theirs))
    _check_data(one, two)
    names = [name for name in one.rows if name in two.rows]
    if not names:
        raise UserError(
            f"{two.path}: none of its predictions ({_few(two)}) are in {one.path} ({_few(one)}); "
            "compare models that were evaluated on one task, under evaluators of one name"
        )
    common, only, metrics = {}, {}, {}
    for name in names:
        mine, yours = one.rows[name], two.rows[name]
        ids = [id for id in mine if id in yours]
        common[name] = len(ids)
        only[name] = [len(mine) - len(ids), len(yours) - len(ids)]
        if ids:
            _check_labels(one, two, name, ids)
            for metric in mine[ids[0]]["scores"]:
                scores = [_scores(file, name, metric, ids) for file in (one, two)]
                if scores[1] is not None:
                    metrics[f"{name}/{metric}"] = _test(*scores)
    if not metrics:
        raise UserError(f"{one.path} and {two.path}: no clip and metric is in both; evaluate them on one dataset")
    p = np.array([value["p"] for value in metrics.values()])
    for value, strict, mild in zip(metrics.values(), holm(p), benjamini_hochberg(p)):
        value |= {"p_holm": float(strict), "q": float(mild)}
    result = {
        "ours": {"file": str(one.path), **one.about},
        "theirs": {"file": str(two.path), **two.about},
        "clips": common,
        "only": only,
        "in_one_alone": [sorted(set(a.rows) - set(b.rows)) for a, b in ((one, two), (two, one))],
        "metrics": metrics,
    }
    _print(result)
    if json_file is not None:
        try:
            write_text(json_file, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise StorageError(f"{json_file}: cannot be written ({error.strerror})") from None
    return result


def _file(name: str | Path) -> Path:
    path = to_path(name)
    if not path.is_dir():
        return path
    if not (path / "predictions.jsonl").is_file():
        raise UserError(f"run {path}: holds no predictions.jsonl; write it with `vmm eval {path} --predictions`")
    return path / "predictions.jsonl"


def _few(file: Predictions) -> str:
    names = list(file.rows)
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _check_data(one: Predictions, two: Predictions) -> None:
    """Says so where the datasets are not the same: ids decide what is compared, but they may mean other clips."""
    mine, yours = (set(file.about.get("data", {}).values()) for file in (one, two))
    if mine != yours:
        print("note: the two were evaluated on manifests of different content; clips are joined by their ids")


def _check_labels(one: Predictions, two: Predictions, name: str, ids: list[str]) -> None:
    for id in ids:
        mine, yours = (file.rows[name][id].get("label") for file in (one, two))
        if mine != yours:
            raise UserError(
                f"{two.path}: {name}: clip {id!r} has label {yours}, but {mine} in {one.path}; these are different tasks"
            )


def _scores(file: Predictions, name: str, metric: str, ids: list[str]) -> np.ndarray | None:
    """Returns the clips' scores; None where the file has no such metric."""
    values = [file.rows[name][id]["scores"].get(metric) for id in ids]
    if all(value is None for value in values):
        return None
    for id, value in zip(ids, values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{file.path}: {name}: clip {id!r}: scores.{metric} must be a number, got {value!r}")
    return np.array(values, np.float64)


def _test(ours: np.ndarray, theirs: np.ndarray) -> dict:
    result = paired(ours, theirs)._asdict()
    if np.isin(ours, (0.0, 1.0)).all() and np.isin(theirs, (0.0, 1.0)).all():
        result["mcnemar"] = mcnemar(ours, theirs)._asdict()
    return result


def _print(result: dict) -> None:
    clips, only = set(result["clips"].values()), result["only"].values()
    caption = (
        "p: permutation (sign flips), and after Holm's correction over all rows; bold: at most 0.05 then\n"
        "McNemar: clips that A alone, that B alone has right, p; intervals of 95 %, paired bootstrap over clips"
    )
    table = Table(title="B - A, %", caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("", "A", "B", "B - A", "p", "Holm", "McNemar"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, value in result["metrics"].items():
        ends, test = (value["low"], value["high"]), value.get("mcnemar")
        style = "bold" if value["p_holm"] <= 0.05 else None
        table.add_row(
            name, f"{100 * value['ours']:.1f}", f"{100 * value['theirs']:.1f}",
            f"{100 * value['difference']:+.1f} ({show_interval('', ends)})", f"{value['p']:.2g}", f"{value['p_holm']:.2g}",
            f"{test['only_ours']} {test['only_theirs']} {test['p']:.2g}" if test else "", style=style,
        )  # fmt: skip
    Console().print(table)
    span = f"{min(clips)}" if len(clips) == 1 else f"{min(clips)} to {max(clips)}"
    print(
        f"{span} clips in both; at most {max(a for a, _ in only)} only in {result['ours']['file']} (A), "
        f"at most {max(b for _, b in only)} only in {result['theirs']['file']} (B)"
    )
    for file, names in zip(("A", "B"), result["in_one_alone"]):
        if names:
            print(f"only in {file}: {', '.join(names)}")
