"""The goodput ledger: where a run's wall clock went, from its first start over every restart.

At any moment one account is open; what an attempt had so far is its line of goodput.jsonl, written now and then. The time
from when an attempt wrote last to the start of the next is `down`. So the accounts add up.
"""

import contextlib
import json
import time
from pathlib import Path

from vmm.build import write_text
from vmm.training.metrics import read_rows

# steps: first time; again: steps that an earlier attempt had done, and lost.
ACCOUNTS = ("start", "restore", "compile", "input", "steps", "again", "saving", "evaluation", "down")


class Ledger:
    """Accounts of one attempt.

    began: of the attempt, in seconds of time.time(); active: whether this process writes. facts: what else its line tells:
    the kind and number of its devices, FLOPs of a step.
    """

    def __init__(self, workdir: Path, began: float, active: bool):
        self.path, self.active, self.began = workdir / "goodput.jsonl", active, began
        self.rows = rows = read_rows(self.path)
        self.facts: dict = {}
        self.before = totals(rows)
        if rows:
            self.before["down"] += max(0.0, began - rows[-1]["at"])
        self.first = rows[0]["began"] if rows else began
        self.attempt = rows[-1]["attempt"] + 1 if rows else 1
        # The furthest that any attempt came, also one that was killed before it wrote here.
        told = rows + read_rows(workdir / "metrics.jsonl")
        self.reached = max((row["step"] for row in told), default=0)
        self.seconds = dict.fromkeys(ACCOUNTS, 0.0)
        # The clock of the wall gives the start; from then on only the one that never jumps counts.
        self.offset = began - time.time() + time.perf_counter()
        self.account, self.since = "start", self.offset
        self.step, self.written = None, self.since

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.step is not None:  # an attempt that came to no step leaves no line
            self.write()
            if self.active:
                print(line(self.total(), self.attempt), flush=True)

    def open(self, account: str) -> str:
        """Closes the open account and opens this one; returns the closed one's name."""
        now = time.perf_counter()
        closed, self.account = self.account, account
        self.seconds[closed] += now - self.since
        self.since = now
        return closed

    @contextlib.contextmanager
    def during(self, account: str):
        """The account for the time inside; then the one before."""
        before = self.open(account)
        try:
            yield
        finally:
            self.open(before)

    def stepping(self, step: int) -> None:
        """Begins a step; writes a line if the last is old (5 s, or a hundredth of the attempt)."""
        self.open("again" if step <= self.reached else "steps")
        self.step = step - 1
        if self.since - self.written > max(5.0, 0.01 * (self.since - self.offset)):
            self.write()

    def write(self, step: int | None = None) -> None:
        """Writes the accounts as they stand. step: that is done."""
        self.open(self.account)
        self.step = (self.step or 0) if step is None else step
        self.reached, self.written = max(self.reached, self.step), self.since
        if self.active:
            row = {
                "attempt": self.attempt,
                "began": self.began,
                "at": self.began + self.since - self.offset,
                "step": self.step,
                "seconds": self.seconds,
                **self.facts,
            }
            with contextlib.suppress(OSError):  # bookkeeping: a full disk is for the checkpoint to tell
                write_text(self.path, "".join(json.dumps(row) + "\n" for row in [*self.rows, row]))

    def total(self) -> dict[str, float]:
        """Returns account → seconds of all attempts; together the wall clock since the first start."""
        self.open(self.account)
        return {name: self.before[name] + self.seconds[name] for name in ACCOUNTS}

    def share(self) -> float:
        """Returns the goodput: the part of the wall clock in which steps were done for the first time."""
        total = self.total()
        return total["steps"] / max(sum(total.values()), 1e-9)


def totals(rows: list[dict]) -> dict[str, float]:
    """Returns account → seconds, of the lines of a goodput.jsonl."""
    seconds = dict.fromkeys(ACCOUNTS, 0.0)
    for row, following in zip(rows, [*rows[1:], None]):
        for name, value in row["seconds"].items():
            seconds[name] += value
        if following:
            seconds["down"] += max(0.0, following["began"] - row["at"])
    return seconds


def line(seconds: dict[str, float], attempts: int) -> str:
    """Returns the accounts as one line for people."""
    wall = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if value >= 0.05)
    starts = "1 start" if attempts == 1 else f"{attempts} starts"
    return f"goodput {seconds['steps'] / max(wall, 1e-9):.1%} of {wall:.1f} s in {starts}: {parts}"
