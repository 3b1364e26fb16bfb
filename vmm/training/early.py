"""Early stopping: a run ends once a number of its evaluations no longer gets better, and keeps the best checkpoint."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from vmm.build import write_text
from vmm.errors import UserError, one_of
from vmm.settings import setting


@dataclasses.dataclass(frozen=True)
class Early:
    """When a run ends before its last step (Prechelt 1998).

    The evaluator that is watched should read a manifest that nothing else is reported on.
    """

    metric: str = setting(
        "",
        'A number of the config\'s evals, as "evaluator/row/column" in evals.jsonl; "": a run ends at its last step.',
    )
    mode: str = setting("max", "max or min, which is better.")
    patience: int = setting(3, "Evaluations in a row without improvement after which the run ends.")
    min_delta: float = setting(0.0, "An improvement is by more than this.")
    every: int = setting(0, "Steps between evaluations, each with a checkpoint; 0: save_every.")

    def __post_init__(self):
        if self.mode not in ("max", "min"):
            raise UserError(f"early.mode: max or min, got {self.mode!r}")
        if self.patience < 1 or self.min_delta < 0 or self.every < 0:
            raise UserError(
                f"early: patience is at least 1, min_delta and every at least 0; got {self.patience}, {self.min_delta} "
                f"and {self.every}"
            )

    def best(self, rows: list) -> list | None:
        """Returns the [step, value] that no later one improves on; None: no value was a number."""
        best = None
        for row in rows:
            sign = 1 if self.mode == "max" else -1
            if math.isfinite(row[1]) and (best is None or sign * (row[1] - best[1]) > self.min_delta):
                best = row
        return best

    def worse(self, rows: list) -> int:
        """Returns how many evaluations there were since the best; since the first, where there is none."""
        best = self.best(rows)
        return sum(row[0] > best[0] for row in rows) if best else max(0, len(rows) - 1)


class Watch:
    """The evaluations of a run that decide when it ends, in workdir/early.json: a resumed run decides the same.

    active: whether this process writes. Evaluations of another metric, as the config may name later, are forgotten.
    """

    def __init__(self, workdir: Path, early: Early, active: bool = True):
        self.path, self.early, self.active = workdir / "early.json", early, active
        self.rows: list = []
        if early.metric and self.path.is_file():
            record = json.loads(self.path.read_text(encoding="utf-8"))
            self.rows = record["rows"] if record["metric"] == early.metric else []

    def back_to(self, step: int) -> None:
        """Forgets what came after a step: the run goes on from there."""
        self.rows = [row for row in self.rows if row[0] <= step]

    def checks(self, step: int) -> bool:
        """Whether there is an evaluation before training, for the metric's name."""
        return bool(self.early.metric) and step == 0

    def lacks(self, step: int) -> bool:
        """Whether a step has no evaluation yet."""
        return step > 0 and all(row[0] != step for row in self.rows)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes down what an evaluation found; step 0, before training, only checks the metric's name.

        Raises:
          UserError: the metric is not among the values.
        """
        metric = self.early.metric
        if metric not in values:
            raise UserError(f"early.metric: no number {metric!r} in the evaluation; {one_of(metric, values)}")
        if step:
            self.rows.append([step, float(values[metric])])
            if self.active:
                write_text(self.path, json.dumps({"metric": metric, "rows": self.rows}))

    @property
    def best(self) -> int | None:
        """Step of the best evaluation, None before there is one."""
        best = self.early.best(self.rows)
        return best[0] if best else None

    @property
    def why(self) -> str | None:
        """Why the run ends now, None: it goes on."""
        early, worse = self.early, self.early.worse(self.rows)
        if not early.metric or worse < early.patience:
            return None
        best = early.best(self.rows)
        if best is None:
            return f"early.metric {early.metric} was not a number in {len(self.rows)} evaluations"
        return f"{early.metric} was best at step {best[0]} ({best[1]:.4g}), not in the {worse} evaluations since"
