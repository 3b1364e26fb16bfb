"""Where a run's numbers go: metrics.jsonl, TensorBoard, a progress line; and what speed they mean."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vmm.errors import StorageError
from vmm.layers.kernels import attention_flops
from vmm.paths import is_remote
from vmm.training.peaks import peak_of


def peak_flops() -> float | None:
    """Returns the known bfloat16 peak of all the job's devices, None where it is not known."""
    peak = peak_of(jax.devices()[0].device_kind)
    return peak * jax.device_count() if peak else None


def count_flops(function: jax.stages.Wrapped, *args) -> int:
    """Returns the FLOPs of the matrix products in a call, kernels of attention too, scans multiplied out (XLA counts their
    body once).

    function is jitted; it is traced, not run, and its first call finds that trace. args are arrays or shapes.
    2 · M · N · K a product, all devices together.
    """
    return _count(function.trace(*args).jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        by_kernel = attention_flops(equation)
        if by_kernel is not None:
            total += by_kernel
            continue
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * int(np.prod(equation.outvars[0].aval.shape)) * int(np.prod([left[i] for i in contract]))
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "shard_map":  # inside, shapes are of one device
            split = {name for axis in equation.params["out_specs"][0] if axis for name in np.atleast_1d(axis)}
            times = int(np.prod([equation.params["mesh"].shape[name] for name in split]))
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * _count(inner)
    return total


class MetricLog:
    """Appends rows to metrics.jsonl and TensorBoard. On resume, rows from `step` on are cut off."""

    def __init__(self, workdir: Path, step: int, active: bool = True):
        """active: only the job's first process writes."""
        self.active = active
        if not active:
            return
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        rows = read_rows(path)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) != len(rows) or (path.exists() and not path.read_text().endswith("\n")):
            path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        if is_remote(path):  # TensorBoard's writer knows no buckets: metrics.jsonl holds the same numbers
            self.file, self.board = _InBucket(path, kept), None
        else:
            self.file = open(path, "a", encoding="utf-8")
            self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping) -> None:
        """Writes one row; not-a-number is written as null.

        Raises:
          StorageError: the disk is full or gone.
        """
        if not self.active:
            return
        row = {key: value if np.isfinite(value) else None for key, value in values.items()}
        try:
            self.file.write(json.dumps({"step": step, **row}) + "\n")
            self.file.flush()
            for key, value in row.items():
                if value is not None and self.board is not None:
                    self.board.add_scalar(key, value, step)
        except OSError as error:
            raise StorageError(
                f"{self.file.name}: cannot be written ({error}); free space and run the same command again"
            ) from None

    def close(self) -> None:
        """Closes the files."""
        if self.active:
            self.file.close()
            if self.board is not None:
                self.board.close()


class _InBucket:
    """Lines of a file in a bucket, where nothing can be appended: written whole, at most every 30 s and at the end."""

    def __init__(self, path, rows: list[dict]):
        self.path, self.name, self.at = path, str(path), 0.0
        self.text = "".join(json.dumps(row) + "\n" for row in rows)

    def write(self, line: str) -> None:
        self.text += line

    def flush(self) -> None:
        if time.monotonic() - self.at > 30:
            self.close()

    def close(self) -> None:
        self.at = time.monotonic()
        self.path.write_text(self.text)


def read_rows(path: Path) -> list[dict]:
    """Reads a JSONL file that may end in half a line, as a killed run leaves it."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


class ProgressLine:
    """A bar with loss, clips/s and time left on a terminal; a plain line now and then elsewhere."""

    def __init__(self, start: int, steps: int, active: bool = True):
        self.steps, self.active, self.last = steps, active, 0.0
        self.console = Console(stderr=True)
        self.bar = None
        if active and self.console.is_terminal:
            columns = (
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn(),
            )  # fmt: skip
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("train", total=steps, completed=start, text="compiling")
            self.bar.start()

    def show(self, step: int, loss: float, clips: float, remaining: float | None) -> None:
        """Shows where the run is. clips: per second; remaining: seconds, None: not known yet."""
        if not self.active:
            return
        text = f"loss {loss:.4f}  {clips:.1f} clips/s"
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.last > 10 or step == self.steps:
            self.last = time.monotonic()
            left = "" if remaining is None else f"  {remaining:.0f} s left"
            print(f"step {step}/{self.steps}  {text}{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self.bar:
            self.bar.stop()
