"""A sweep's trials as a table on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from vmm.search.space import Space, text
from vmm.search.trials import Trial

_SHOWN = 20


def show(trials: Sequence[Trial], space: Space, metric: str, goal: str) -> None:
    """Prints the trials, best first, then those without a value."""
    sign = 1 if goal == "min" else -1
    order = sorted(trials, key=lambda trial: (trial.value is None, sign * (trial.value or 0.0), trial.number))
    states = {state: sum(trial.state == state for trial in trials) for state in ("done", "pruned", "failed")}
    table = Table(title=f"{metric}, best first; " + ", ".join(f"{count} {state}" for state, count in states.items()))
    for name in ("trial", metric, *space):
        table.add_column(name.rpartition(".")[2] if "." in name else name, justify="right")
    for trial in order[:_SHOWN]:
        value = trial.state if trial.value is None else f"{trial.value:.4g}"
        table.add_row(str(trial.number + 1), value, *(text(trial.parameters[key]) for key in space))
    if len(order) > _SHOWN:
        table.caption = f"{len(order) - _SHOWN} more in trials.jsonl"
    Console().print(table)
