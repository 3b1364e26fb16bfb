"""What is stopped early: (a trial, the others) → why, or None. Read from what each has shown at its steps."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

# Trials that must have come as far before the median says anything.
_OTHERS = 4
# ASHA: of the trials at a rung one in η goes on; rungs are at steps / η³, / η², / η.
_ETA, _RUNGS = 3, 3


def never(seen: Mapping[int, float], others: Sequence[Mapping[int, float]], steps: int, goal: str) -> str | None:
    """Nothing is stopped."""
    return None


def median(seen: Mapping[int, float], others: Sequence[Mapping[int, float]], steps: int, goal: str) -> str | None:
    """Stopped if the best so far is worse than the median of the others' best so far (after Golovin et al. 2017).

    Not in the first tenth of the steps, nor before four others have come as far.

    Args:
      seen: step → value of this trial. others: those of the other trials. steps: of a whole trial. goal: "min", "max".
    """
    at = max(seen, default=0)
    theirs = [_best(other, at, goal) for other in others if other and min(other) <= at <= max(other)]
    if not seen or at < steps / 10 or len(theirs) < _OTHERS:
        return None
    mine, middle = _best(seen, at, goal), float(np.median(theirs))
    if not _worse(mine, middle, goal):
        return None
    return f"{mine:.4g} by step {at}: the median of {len(theirs)} others is {middle:.4g}"


def asha(seen: Mapping[int, float], others: Sequence[Mapping[int, float]], steps: int, goal: str) -> str | None:
    """Asynchronous successive halving (Li et al. 2020), in its stopping form: at each rung the best third goes on.

    Arguments as of `median`. The first value at or after a rung's step is the trial's there; with fewer than three
    trials at a rung, all go on.
    """
    rungs = [steps / _ETA**power for power in range(_RUNGS, 0, -1)]
    *before, at = [0, *sorted(seen)]
    reached = [rung for rung in rungs if max(before, default=0) < rung <= at]
    if not reached:  # a trial is judged once at a rung: when it gets there
        return None
    mine = _at(seen, reached[-1])
    theirs = [value for value in (_at(other, reached[-1]) for other in others) if value is not None]
    count = len(theirs) + 1
    rank = sum(_worse(mine, value, goal) for value in theirs)
    if count < _ETA or rank < count // _ETA:
        return None
    return f"{mine:.4g} at rung {reached[-1]:.0f}: {rank + 1} of {count}"


def _best(seen: Mapping[int, float], until: int, goal: str) -> float:
    return (min if goal == "min" else max)(value for step, value in seen.items() if step <= until)


def _at(seen: Mapping[int, float], rung: float) -> float | None:
    step = min((step for step in seen if step >= rung), default=None)
    return None if step is None else seen[step]


def _worse(value: float, than: float, goal: str) -> bool:
    return value > than if goal == "min" else value < than


PRUNERS: dict[str, Callable] = {"none": never, "median": median, "asha": asha}
