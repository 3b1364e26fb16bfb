"""The suites of vmm eval beyond the config's evaluators: robustness to noise, calibration, scores of each class."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from vmm.corrupt import CORRUPTIONS
from vmm.evals import calibration, statistics
from vmm.evals.classification import confusion, hits, per_class, votes
from vmm.evals.scored import Classes, Measured, Measuring, Scored
from vmm.evals.tables import show, show_interval
from vmm.evals.tagging import average_precision, one_hot, roc_area
from vmm.experiment import Experiment
from vmm.types import SUBSETS

_CLASSES_ACROSS = 12  # of a confusion matrix that is printed


class Predictor(Protocol):
    """What a suite needs of evaluate.Predict."""

    def knows(self, subset: str) -> bool: ...
    def corrupted(self, manifest: str, subsets: Collection[str], name: str) -> dict[int, dict[str, dict]]: ...


class Clean(Protocol):
    """What a suite needs of evaluate.Found: the evaluators' findings on clean clips."""

    measured: Mapping[str, Measured]
    prepared: Mapping


def robustness(experiment: Experiment, predict: Predictor, found: Clean) -> dict:
    """Returns "corruption/severity" → {"values", "intervals"}: the evaluators' numbers on corrupted clips.

    Of all streams that an evaluator and the model know, together; what an evaluator fits, it fits on clean clips. The
    corruptions are those of the model's streams, vmm/corrupt.py; one pass over the data each.
    """
    result: dict = {}
    evaluators = {
        name: _of_all_streams(evaluator, experiment, predict)
        for name, evaluator in experiment.evals.items()
        if isinstance(evaluator, Measuring) and not evaluator.asks
    }
    for corruption, (stream, *_) in CORRUPTIONS.items():
        if stream not in experiment.modalities:
            continue
        for manifest in sorted({evaluator.data for evaluator in evaluators.values()}):
            mine = {name: evaluator for name, evaluator in evaluators.items() if evaluator.data == manifest}
            subsets = {subset for evaluator in mine.values() for subset in getattr(evaluator, "subsets", ("VAT",))}
            for severity, seen in predict.corrupted(manifest, subsets, corruption).items():
                into = result.setdefault(f"{corruption}/{severity}", {"values": {}, "intervals": {}})
                for name, evaluator in mine.items():
                    measured = evaluator.measure(lambda _, subset, seen=seen: seen.get(subset), found.prepared[name])
                    for scored in measured.scored:
                        into["values"] |= {f"{name}/{key}": value for key, value in scored.numbers().items()}
                        ends = scored.intervals(rest=False)
                        into["intervals"] |= {f"{name}/{key}": list(value) for key, value in ends.items()}
    return result


def _of_all_streams(evaluator: Measuring, experiment: Experiment, predict: Predictor) -> Measuring:
    """Returns the evaluator with, of its subsets, the one of most streams that the model has."""
    if "subsets" not in {field.name for field in dataclasses.fields(evaluator)}:
        return evaluator
    known = [subset for subset in evaluator.subsets if predict.knows(subset)]
    most = max(known, key=lambda subset: len(set(SUBSETS[subset]) & set(experiment.modalities)), default=None)
    return dataclasses.replace(evaluator, subsets=(most,) if most else ())


def _classifiers(found: Clean) -> dict[str, Scored]:
    """Returns evaluator/name → what classified some clips."""
    return {
        f"{evaluator}/{scored.name}": scored
        for evaluator, measured in found.measured.items()
        for scored in measured.scored
        if scored.classes is not None and len(scored.row)
    }


def _with_intervals(function: Callable[[np.ndarray], np.ndarray], row: np.ndarray) -> tuple[list, list]:
    """Returns the numbers of all rows, and [low, high] of each."""
    low, high = statistics.intervals_of(function, len(row), row)
    return function(np.arange(len(row))).tolist(), np.stack([low, high], 1).tolist()


def calibrate(experiment: Experiment, predict: Predictor, found: Clean) -> dict:
    """Returns evaluator/name → accuracy, confidence, error (ECE), brier, log_loss, their intervals and the bins.

    The intervals of ECE are of its bootstrap; it errs upward on few clips, the more the more bins hold few of them.
    """
    return {name: _calibrate(scored.classes, scored.row) for name, scored in _classifiers(found).items()}


def _calibrate(said: Classes, row: np.ndarray) -> dict:
    chance = calibration.softmax(said.logits)
    sure, right = chance.max(1), hits(said.logits, said.labels)
    brier, loss = calibration.brier(chance, said.labels), calibration.log_loss(chance, said.labels)

    def numbers(places: np.ndarray) -> np.ndarray:
        error = calibration.expected_error(sure[places], right[places])
        return np.array([right[places].mean(), sure[places].mean(), error, brier[places].mean(), loss[places].mean()])

    names = ("accuracy", "confidence", "error", "brier", "log_loss")
    values, ends = _with_intervals(numbers, row)
    bins = calibration.reliability(sure, right)
    return {
        "values": dict(zip(names, values)),
        "intervals": dict(zip(names, ends)),
        "bins": {key: [None if np.isnan(v) else float(v) for v in value] for key, value in bins._asdict().items()},
    }


def of_classes(experiment: Experiment, predict: Predictor, found: Clean) -> dict:
    """Returns evaluator/name → each class's precision, recall, F1, average precision, ROC area, and the confusion.

    Nan where a class has no clip. Intervals of the first three.
    """
    return {name: _of_classes(scored.classes, scored.row) for name, scored in _classifiers(found).items()}


def _of_classes(said: Classes, row: np.ndarray) -> dict:
    cast, classes = votes(said.logits), said.logits.shape[1]
    truth = one_hot(said.labels, classes)

    def numbers(places: np.ndarray) -> np.ndarray:
        return np.concatenate(per_class(cast[places], said.labels[places])[:3])

    names = ("precision", "recall", "f1")
    values, ends = _with_intervals(numbers, row)
    parts = [slice(i * classes, (i + 1) * classes) for i in range(3)]
    return {
        "values": {name: values[part] for name, part in zip(names, parts)}
        | {
            "average_precision": average_precision(said.logits, truth).tolist(),
            "roc_area": roc_area(said.logits, truth).tolist(),
        },
        "intervals": {name: ends[part] for name, part in zip(names, parts)},
        "count": np.bincount(said.labels, minlength=classes).tolist(),
        "confusion": confusion(said.logits, said.labels).tolist(),
    }


SUITES = {"robustness": robustness, "calibration": calibrate, "classes": of_classes}


# ---- tables ---------------------------------------------------------------------------------------


def print_suite(suite: str, result: Mapping, record: Mapping) -> None:
    """Prints a suite's result. record: of vmm eval, with the clean clips' values."""
    if not result:
        print(f"{suite}: no evaluator of the config has anything to say of it")
    elif suite == "robustness":
        _print_robustness(result, record)
    elif suite == "calibration":
        _print_calibration(result)
    else:
        _print_classes(result)


def _cell(text: str, below: str) -> str:
    return f"{text}\n[dim]{below}[/dim]" if below else text


def _table(title: str, columns: Collection[str], caption: str | None = None) -> Table:
    table = Table(title=title or None, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print_robustness(result: Mapping, record: Mapping) -> None:
    """One table an evaluator: metric, corruption × severity; rows that a corruption leaves alone are left out."""
    console, corruptions = Console(), list(dict.fromkeys(key.partition("/")[0] for key in result))
    severities = sorted({key.partition("/")[2] for key in result})
    first = next(iter(result.values()))["intervals"]
    headline = [key for key in first if not key.endswith(("/R@5", "/R@10", "/top5"))]
    for evaluator in dict.fromkeys(key.partition("/")[0] for key in headline):
        table = _table(
            f"robustness by severity: {evaluator}",
            severities,
            "first, with its interval: on clean clips; below each number: its 95 % interval",
        )
        for key in (key for key in headline if key.startswith(f"{evaluator}/")):
            clean = record["values"].get(key)
            around = show_interval(key, record["intervals"].get(key))
            table.add_row(f"[bold]{key.partition('/')[2]}[/bold]\n{show(key, clean)} [dim]{around}[/dim]")
            for corruption in corruptions:
                seen = [result[f"{corruption}/{severity}"] for severity in severities]
                values = [one["values"].get(key) for one in seen]
                if any(value != clean for value in values):
                    ends = [show_interval(key, one["intervals"].get(key)) for one in seen]
                    table.add_row(f"  {corruption}", *(_cell(show(key, v), e) for v, e in zip(values, ends)))
        console.print(table)


def _print_calibration(result: Mapping) -> None:
    names = ("accuracy", "confidence", "error", "brier", "log_loss")
    table = _table("calibration", names, f"error: ECE of {calibration.BINS} bins; 95 % interval below")
    for key, one in result.items():
        cells = []
        for name in names:
            value, ends = one["values"][name], one["intervals"][name]
            share = name in ("accuracy", "confidence", "error")
            text = show(name, value) if share else f"{value:.3f}"
            cells.append(_cell(text, show_interval(name, ends) if share else f"{ends[0]:.3f}–{ends[1]:.3f}"))
        table.add_row(key, *cells)
    Console().print(table)


def _print_classes(result: Mapping) -> None:
    console = Console()
    for key, one in result.items():
        names = ("precision", "recall", "f1", "average_precision", "roc_area")
        caption = "95 % interval below; –: no clip of the class\nAP, ROC: average precision, area under the ROC curve"
        table = _table(f"classes: {key}", ("clips", "precision", "recall", "F1", "AP", "ROC"), caption)
        for y, count in enumerate(one["count"]):
            cells = [
                _cell(
                    show(name, one["values"][name][y]),
                    show_interval(name, one["intervals"][name][y]) if name in one["intervals"] else "",
                )
                for name in names
            ]
            table.add_row(str(y), str(count), *cells)
        console.print(table)
        if len(one["count"]) <= _CLASSES_ACROSS:
            console.print(f"confusion: {key}; down: the truth, across: taken for (ties are shared)")
            columns = [str(y) for y in range(len(one["count"]))]
            table = _table("", columns)
            for y, line in enumerate(one["confusion"]):
                table.add_row(str(y), *(f"{value:g}" for value in line))
            console.print(table)
