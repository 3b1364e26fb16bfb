"""A record of vmm eval → evaluation results in the Hub's metadata (`model-index` of a card).

The Hub's newer files, `.eval_results/*.yaml`, are for benchmarks that are registered there; our datasets are manifests.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult

from vmm.build import class_of
from vmm.evals import EVALS
from vmm.evals.classification import METRICS
from vmm.evals.scored import Measuring
from vmm.evals.tables import grid


def results(record: Mapping, evals: Mapping[str, Mapping]) -> list[EvalResult]:
    """Returns one result for every finite number of a record, but for what is told of the data, as how many clips there are.

    metric_config is the evaluator's name; metric_name the number's, as in the record; metric_args holds its 95 % interval.
    The dataset's revision is the SHA-256 of its manifest.

    Args:
      record: of vmm eval. evals: evaluator → its config.
    """
    found = []
    for evaluator, spec in evals.items():
        kind = class_of(EVALS, spec, f"evals.{evaluator}")
        task, task_name = getattr(kind, "hub_task", Measuring.hub_task)
        notes, manifest = grid(of_evaluator(record["values"], evaluator))[3], spec.get("data", "")
        for key, value in of_evaluator(record["values"], evaluator).items():
            name = f"{evaluator}/{key}"
            if not math.isfinite(value) or (key in notes and name not in record.get("intervals", {})):
                continue
            ends = record.get("intervals", {}).get(name)
            around = {"interval": [float(end) for end in ends], "level": 0.95} if _finite(ends) else None
            found.append(
                EvalResult(
                    task_type=task,
                    task_name=task_name,
                    dataset_type=dataset_name(manifest),
                    dataset_name=dataset_name(manifest),
                    dataset_revision=record["data"].get(manifest),
                    metric_type=metric_type(kind, key),
                    metric_value=float(value),
                    metric_name=name,
                    metric_config=evaluator,
                    metric_args=around,
                )
            )
    return found


def of_evaluator(values: Mapping, evaluator: str) -> dict:
    """Returns the numbers of an evaluator, its name cut off."""
    return {key.removeprefix(f"{evaluator}/"): v for key, v in values.items() if key.startswith(f"{evaluator}/")}


def metric_type(evaluator: type, key: str) -> str:
    """Returns the metric of a number's name, as "R@5" or "macro_f1" of "shape/macro_f1"; of a classifier's bare label: accuracy."""
    last, bare = key.rpartition("/")[2], getattr(evaluator, "bare_metric", "")
    return bare if bare and last not in METRICS else last


def dataset_name(manifest: str) -> str:
    """Returns "world/test" of data/world/test.jsonl; never more of a machine's path."""
    path = Path(manifest)
    return f"{path.parent.name}/{path.stem}".strip("/") or "unknown"


def _finite(ends) -> bool:
    return ends is not None and all(math.isfinite(end) for end in ends)
