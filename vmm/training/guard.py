"""The guard: a step whose loss or gradient is not finite, or spikes, changes nothing but the step counter.

Inside the step: (loss, gradient norm, those of recent steps) → good; values are global, so every host decides the same.
On the host: skip → evidence; too many in a row → Trouble → a rollback, written down before it is done.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from vmm.build import write_text
from vmm.errors import NumericError, StorageError, UserError
from vmm.settings import setting
from vmm.training.optim import path_of


@dataclasses.dataclass(frozen=True)
class Guard:
    """When a step is skipped, and what follows."""

    spike: float = setting(
        0.0,
        "How far above the median of the last `window` steps a loss or a gradient norm may be, in robust "
        "deviations (see `above`); 0: any finite one.",
    )
    window: int = setting(128, "Steps that the median is of.")
    history: int = setting(32, "Steps that the median is of before it counts.")
    patience: int = setting(3, "Steps skipped in a row that end in a rollback.")
    rollbacks: int = setting(3, "Rollbacks that a run may have before it stops.")


def check_guard(guard: Guard) -> None:
    """Raises UserError for sizes that mean nothing."""
    for name, least in (("spike", 0), ("window", 2), ("history", 2), ("patience", 1), ("rollbacks", 0)):
        if getattr(guard, name) < least:
            raise UserError(f"guard.{name}: must be at least {least}, got {getattr(guard, name)}")
    if guard.history > guard.window:
        raise UserError(f"guard.history: {guard.history} steps do not fit guard.window {guard.window}")


# ---- inside the step -----------------------------------------------------------------------------


class Watch(NamedTuple):
    """What the guard carries from step to step.

    skipped: int32 [], steps of the run that changed nothing. row: int32 [], how many of them are the last in a row.
    losses, norms: float32 [window] of the last steps, not-a-number where there was none; () without spikes.
    """

    skipped: Int
    row: Int
    losses: Any
    norms: Any


def blank_watch(guard: Guard) -> Watch:
    """Returns the watch of a new run."""
    none = jnp.full((guard.window,), jnp.nan, jnp.float32) if guard.spike else ()
    return Watch(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), none, none)


def above(x: Float[Array, ""], values: Float[Array, "W"], spike: float, history: int) -> Bool[Array, ""]:
    """Returns whether x > median + spike · max(1.4826 · MAD, 0.1 · |median|) of the finite values, if there are enough.

    MAD, the median distance from the median, is no larger for one outlier; 1.4826 makes it a standard deviation where
    values are normal. A tenth of the median is the least deviation: a loss that hardly moves has no spikes of 1 %.
    """
    middle = jnp.nanmedian(values)
    deviation = jnp.maximum(1.4826 * jnp.nanmedian(jnp.abs(values - middle)), 0.1 * jnp.abs(middle))
    return (jnp.isfinite(values).sum() >= history) & (x > middle + spike * deviation)


def judge(guard: Guard, watch: Watch, step: Int[Array, ""], loss: Array, norm: Array) -> tuple[Array, Watch]:
    """Returns whether the step counts (bool []), and the watch after it.

    A finite value enters the history also where it was a spike: a level that stays becomes the new one.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    losses, norms = watch.losses, watch.norms
    if guard.spike:
        good &= ~above(loss, losses, guard.spike, guard.history) & ~above(norm, norms, guard.spike, guard.history)
        place = step % guard.window
        losses = losses.at[place].set(jnp.where(jnp.isfinite(loss), loss, jnp.nan))
        norms = norms.at[place].set(jnp.where(jnp.isfinite(norm), norm, jnp.nan))
    bad = (~good).astype(jnp.int32)
    return good, Watch(watch.skipped + bad, (watch.row + 1) * bad, losses, norms)


def _is_schedule(node) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def kept(good: Bool[Array, ""], new, old):
    """Returns `new` where good, else `old`; the counters of learning-rate schedules move on as the step does."""

    def choose(new, old):
        return new if _is_schedule(new) else jax.tree.map(lambda x, y: jnp.where(good, x, y), new, old)

    return jax.tree.map(choose, new, old, is_leaf=_is_schedule)


def counted(optimizer):
    """Returns the optimizer's state with its schedules one step on and all else as it is."""

    def move(node):
        return node._replace(count=optax.safe_increment(node.count)) if _is_schedule(node) else node

    return jax.tree.map(move, optimizer, is_leaf=_is_schedule)


def layer_of(path: str) -> str:
    """Returns the part of the model that a parameter path is of: up to its layer, else its first two names."""
    numbered = re.match(r".*?/layer_\d+(?=/)", path)
    return numbered.group() if numbered else "/".join(path.split("/")[:2])


def layers(tree) -> list[str]:
    """Returns the parts of a tree of parameters, in the order of `layer_norms`."""
    return list(dict.fromkeys(layer_of(path_of(keys)) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)))


def layer_norms(gradient) -> Float[Array, "P"]:
    """Returns the norm of the gradient of each part of the model. Its sums are those of the global norm."""
    squares: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        part = layer_of(path_of(keys))
        squares[part] = squares.get(part, 0.0) + jnp.sum(jnp.square(leaf))
    return jnp.sqrt(jnp.stack(list(squares.values())).astype(jnp.float32))


# ---- on the host ---------------------------------------------------------------------------------


class Trouble(Exception):
    """Steps first … last were skipped, as many in a row as the guard's patience. why: of the last, in words."""

    def __init__(self, first: int, last: int, why: str):
        super().__init__(why)
        self.first, self.last, self.why = first, last, why


class Inspector:
    """Reads what the device said of each step, once, in order; a skipped step leaves its evidence.

    Only numbers that are there already are read: the device is not waited for.
    """

    def __init__(self, guard: Guard, workdir: Path, parts: list[str], clips: Callable[[int], list], active: bool):
        """Args: parts: as `layers`. clips: step → its samples, for the evidence. active: whether this process writes."""
        self.guard, self.folder, self.parts, self.clips, self.active = guard, workdir / "evidence", parts, clips, active
        self.step, self.row = 0, 0

    def __call__(self, step: int, metrics: Mapping) -> int:
        """Returns how many steps up to this one were skipped in a row.

        Raises:
          Trouble: they are as many as the guard's patience.
        """
        if step <= self.step:
            return self.row
        self.step, self.row = step, int(metrics["skipped/row"])
        if self.row:
            seen = jax.device_get(metrics)
            loss, norm = float(seen["loss"]), float(seen["gradient_norm"])
            why = f"step {step}: the loss is {loss:g}, the gradient's norm {norm:g}"
            if self.active:
                self._write(step, seen)
                print(f"{why}: skipped ({self.folder}/step_{step}.json)", flush=True)
            if self.row >= self.guard.patience:
                raise Trouble(step - self.row + 1, step, why)
        return self.row

    def _write(self, step: int, seen: Mapping) -> None:
        record = {
            "step": step,
            "loss": _plain(seen["loss"]),
            "gradient_norm": _plain(seen["gradient_norm"]),
            "in_a_row": self.row,
            "layers": {part: _plain(norm) for part, norm in zip(self.parts, seen["layers"])},
            "metrics": {key: _plain(value) for key, value in seen.items() if np.ndim(value) == 0},
            "samples": self.clips(step),
        }
        _write(self.folder / f"step_{step}.json", record)


def _write(path: Path, record) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error}); free space and run the same command again") from None


def _plain(value) -> float | str:
    """A number as JSON knows it; others as "nan", "inf", "-inf"."""
    return float(value) if np.isfinite(value) else str(float(value))


class Rollbacks:
    """The rollbacks of a run, in workdir/rollbacks.json: a restart passes over the same steps."""

    def __init__(self, workdir: Path, guard: Guard):
        self.path, self.guard = workdir / "rollbacks.json", guard
        self.records = json.loads(self.path.read_text()) if self.path.is_file() else []

    @property
    def passed_over(self) -> set[int]:
        """Steps that are not trained on."""
        return {step for record in self.records for step in range(record["first"], record["last"] + 1)}

    @property
    def unfinished(self) -> dict | None:
        """A rollback that was written down, but whose checkpoints may not be out of the way yet."""
        return self.records[-1] if self.records and not self.records[-1]["done"] else None

    def begin(self, trouble: Trouble, restore: int, active: bool) -> None:
        """Writes down that the run goes back to step `restore`, 0: its start, before anything is moved.

        Raises:
          NumericError: the run has had as many rollbacks as it may.
        """
        if len(self.records) >= self.guard.rollbacks:
            kept = f"the checkpoint of step {restore} is intact" if restore else "no checkpoint is from before them"
            raise NumericError(
                f"{trouble.why}; {self.guard.patience} steps in a row were skipped, after {len(self.records)} rollbacks; "
                f"{kept}; {self.path.parent}/evidence holds what was seen: lower optim.learning_rate, or raise "
                "optim.warmup or clip, and start in another workdir"
            )
        record = {"first": trouble.first, "last": trouble.last, "restored": restore, "why": trouble.why, "done": False}
        self.records.append(record)
        self._write(active)

    def end(self, active: bool) -> None:
        """Writes down that later checkpoints are out of the way."""
        self.records[-1]["done"] = True
        self._write(active)

    def _write(self, active: bool) -> None:
        if active:
            _write(self.path, self.records)
