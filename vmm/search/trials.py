"""What was tried: a ledger of JSON lines, appended to and never rewritten."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from vmm.training.metrics import read_rows

# running: begun, not ended. done: has a value. pruned: stopped, others were better. failed: has no value.
STATES = ("running", "done", "pruned", "failed")


@dataclasses.dataclass
class Trial:
    """One point of a space and what came of it.

    value: what is searched for, None unless done. seen: step → value of the watched metric while it ran. why: of
    pruned and failed. facts: config and data hashes, commit, host, workdir, seconds, where it was trained.
    """

    number: int
    parameters: dict
    state: str = "running"
    value: float | None = None
    seen: dict[int, float] = dataclasses.field(default_factory=dict)
    why: str = ""
    facts: dict = dataclasses.field(default_factory=dict)


def write_trial(path: Path, trial: Trial) -> None:
    """Appends a trial as it stands: its last line counts. On the disk before it returns."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n")  # half a line, of a kill
    if torn:
        whole = path.read_bytes()
        with open(path, "r+b") as file:
            file.truncate(whole.rfind(b"\n") + 1)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(trial)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_trials(path: Path) -> list[Trial]:
    """Returns the trials of a ledger by number, each as its last line tells."""
    trials: dict[int, Trial] = {}
    for row in read_rows(path):
        trial = Trial(**_tuples(row))
        trial.seen = {int(step): value for step, value in trial.seen.items()}
        trials[trial.number] = trial
    return [trials[number] for number in sorted(trials)]


def _tuples(row: Mapping) -> dict:
    # JSON has no tuples, and a config has no lists.
    return {**row, "parameters": {key: _tuple(value) for key, value in row["parameters"].items()}}


def _tuple(value):
    if isinstance(value, list):
        return tuple(_tuple(item) for item in value)
    return {key: _tuple(item) for key, item in value.items()} if isinstance(value, dict) else value


def best_of(trials: list[Trial], goal: str) -> Trial | None:
    """Returns the best trial that is done, the first of equals; None without one. goal: "min" or "max"."""
    done = [trial for trial in trials if trial.state == "done"]
    return (min if goal == "min" else max)(done, key=lambda trial: trial.value, default=None)
