"""vmm sweep: trials of a search, each a `vmm train` child with its own workdir; killed anywhere, the same call goes on."""

import dataclasses
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from vmm.build import digest, load_config, save_config, write_text
from vmm.config import numbers
from vmm.data.loader import train_digests
from vmm.errors import Preempted, UserError, one_of
from vmm.experiment import Experiment
from vmm.run import commit
from vmm.search.prune import PRUNERS
from vmm.search.space import Space, corners, overrides, words
from vmm.search.suggest import METHODS, check_method
from vmm.search.trials import Trial, best_of, read_trials, write_trial
from vmm.supervise import end_with_parent
from vmm.training.metrics import read_rows
from vmm.training.runtime import RunLock, StopSignal

_POLL = 0.3  # seconds between looks at the children
_PATIENCE = 120.0  # seconds for a child of a sweep that was killed, to save and end


class Metric(NamedTuple):
    """A number of a run and whether the lowest or the highest is wanted."""

    name: str
    goal: str


def parse_metric(text: str) -> Metric:
    """Returns the metric of "NAME:min" or "NAME:max"; raises UserError."""
    name, _, goal = text.rpartition(":")
    if not name or goal not in ("min", "max"):
        raise UserError(f"metric {text}: say which way, as loss:min or labels/VA/both:max")
    return Metric(name, goal)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A search over a config's keys.

    config: reference of a config. changes: "key=value" of every trial. metric: what is searched for, the last of
    metrics.jsonl or, where that has none of the name, of `vmm eval`. method: of METHODS. trials: how many; a grid has at
    most its own. prune: of PRUNERS; watch: the metric of metrics.jsonl that it looks at, None: `metric`. parallel: trials
    at a time.
    """

    config: str
    space: Space
    out: Path
    changes: tuple[str, ...]
    metric: Metric
    method: str = "bayes"
    trials: int = 30
    parallel: int = 1
    prune: str = "none"
    watch: Metric | None = None
    seed: int = 0

    def load(self, parameters: Mapping) -> dict:
        """Returns the config of a trial."""
        return load_config(self.config, [*self.changes, *overrides(parameters)])

    def workdir(self, number: int) -> Path:
        """Returns where a trial is trained."""
        return self.out / f"{number:04d}"

    def words(self, trial: Trial) -> list[str]:
        """Returns the words of a trial's `vmm train`, without the first two."""
        changes = [*self.changes, *overrides(trial.parameters)]
        return [self.config, "--workdir", str(self.workdir(trial.number)), *changes]

    def propose(self, trials: Sequence[Trial], number: int) -> dict:
        """Returns the parameters of a trial, given those before it."""
        return METHODS[self.method](self.space, trials, number, seed=self.seed, goal=self.metric.goal)


def check(sweep: Sweep) -> int:
    """Returns how many trials there are; builds a config with each value of the space, and trains none.

    Raises:
      UserError: a key or value that the config does not take, an unknown method or pruner, nothing to run.
    """
    count = check_method(sweep.method, sweep.space, sweep.trials)
    if sweep.prune not in PRUNERS:
        raise UserError(f"prune {sweep.prune}: unknown; {one_of(sweep.prune, PRUNERS)}")
    if sweep.parallel < 1:
        raise UserError(f"parallel: at least 1, got {sweep.parallel}")
    for parameters in corners(sweep.space):
        Experiment(sweep.load(parameters))
    return count


def lines(sweep: Sweep) -> list[str]:
    """Returns one `vmm train …` a trial, for a launcher; raises UserError for a search that needs results first."""
    if sweep.method == "bayes":
        raise UserError("--print: what a Bayesian search tries depends on results; choose --method grid or random")
    trials = [Trial(number, sweep.propose([], number)) for number in range(check(sweep))]
    return [shlex.join(["vmm", "train", *sweep.words(trial)]) for trial in trials]


def run(sweep: Sweep) -> list[Trial]:
    """Runs what is missing of a sweep; returns its trials. The ledger is OUT/trials.jsonl.

    Finished trials are not repeated, broken-off ones resume from their checkpoints.

    Raises:
      UserError: as check; the folder is another sweep's; no trial has the metric; all trials failed.
      Preempted: SIGTERM or Ctrl-C arrived: the children have saved.
    """
    count = check(sweep)
    sweep.out.mkdir(parents=True, exist_ok=True)
    ledger = sweep.out / "trials.jsonl"
    with RunLock(sweep.out), StopSignal() as stop:
        trials = {trial.number: trial for trial in read_trials(ledger)}
        _same_sweep(sweep, list(trials.values()))
        again = [trial for trial in trials.values() if trial.state == "running"]
        free, children, console = _slots(sweep.parallel), [], Console(stderr=True)
        try:
            while not stop.asked:
                while free and (again or len(trials) < count):
                    trial = again.pop(0) if again else None
                    if trial is None:
                        known = [trials[number] for number in sorted(trials)]
                        trial = Trial(len(trials), sweep.propose(known, len(trials)))
                        trial.facts = _facts(sweep, trial)
                        trials[trial.number] = trial
                        write_trial(ledger, trial)
                        if _copied(trial, known):
                            write_trial(ledger, trial)
                            continue
                    console.print(f"trial {trial.number + 1} of {count}: {words(trial.parameters)}")
                    children.append(_Child(sweep, trial, free.pop()))
                if not children:
                    break
                time.sleep(_POLL)
                for child in list(children):
                    others = [trial.seen for trial in trials.values() if trial is not child.trial and trial.seen]
                    if child.poll(others):
                        children.remove(child)
                        free.append(child.slot)
                        write_trial(ledger, child.trial)
                        console.print(_told(child.trial))
        finally:
            for child in children:
                child.stop()
            for child in children:
                child.process.wait()
        if stop.asked:
            raise Preempted(f"{stop.asked}: the running trials have saved; the same command goes on from there")
    result = [trials[number] for number in sorted(trials)]
    if best_of(result, sweep.metric.goal) is None:
        raise UserError(f"{ledger}: no trial came to an end; the last: {result[-1].why}")
    return result


def write_best(sweep: Sweep, trials: Sequence[Trial]) -> Path:
    """Writes the config of the best trial as OUT/best.json, which `vmm train` takes; returns the file."""
    path = sweep.out / "best.json"
    save_config(sweep.load(best_of(list(trials), sweep.metric.goal).parameters), path)
    return path


def _copied(trial: Trial, known: Sequence[Trial]) -> bool:
    """Gives a trial the result of one with the same parameters: the same seed would train the same."""
    for other in known:
        if other.parameters == trial.parameters and other.state in ("done", "failed"):
            trial.state, trial.value, trial.seen = other.state, other.value, other.seen
            trial.why, trial.facts = other.why or f"as trial {other.number + 1}", dict(other.facts)
            return True
    return False


def _told(trial: Trial) -> str:
    if trial.state == "done":
        return f"trial {trial.number + 1}: {trial.value:.4g}"
    return f"trial {trial.number + 1}: {trial.state}, {trial.why}"


def _facts(sweep: Sweep, trial: Trial) -> dict:
    config = sweep.load(trial.parameters)
    return {
        "config": digest(numbers(config)),
        "data": train_digests(config["data"]["train"]),
        "seed": config.get("seed", 0),
        "commit": commit(),
        "host": socket.gethostname(),
        "workdir": str(sweep.workdir(trial.number)),
    }


def _same_sweep(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Writes sweep.json; raises UserError where the folder is of another sweep. A metric may be mended before it was used."""
    path = sweep.out / "sweep.json"
    base = load_config(sweep.config, sweep.changes)
    mine = {
        "config": digest(numbers(base)),
        "space": {key: [type(domain).__name__, dataclasses.astuple(domain)] for key, domain in sweep.space.items()},
        "metric": ":".join(sweep.metric),
        "method": sweep.method,
        "seed": sweep.seed,
        "data": train_digests(base["data"]["train"]),
    }
    mine = json.loads(json.dumps(mine))
    theirs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else mine
    wrong = [key for key in mine if theirs.get(key) != mine[key]]
    used = any(trial.state != "running" for trial in trials)
    if trials and wrong and (used or wrong != ["metric"]):
        raise UserError(f"{sweep.out}: holds another sweep; it differs in {', '.join(wrong)}: choose another --out")
    write_text(path, json.dumps(mine, indent=1) + "\n")


class _Child:
    """A trial that runs: `vmm train`, then `vmm eval` where its metric needs it."""

    def __init__(self, sweep: Sweep, trial: Trial, slot: Mapping[str, str]):
        self.sweep, self.trial, self.slot = sweep, trial, slot
        self.workdir, self.began, self.size = sweep.workdir(trial.number), time.monotonic(), -1
        self.workdir.mkdir(exist_ok=True)
        _wait_for(self.workdir)
        self.steps = sweep.load(trial.parameters)["steps"]
        self.why, self.starts = "", 0
        self._start("train", *sweep.words(trial))

    def _start(self, *arguments: str) -> None:
        self.stage, self.starts = arguments[0], self.starts + 1
        with open(self.workdir / f"{self.stage}.log", "ab") as log:
            # A group of its own: a terminal's Ctrl-C comes once, from here.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vmm", *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**os.environ, **self.slot}, preexec_fn=end_with_parent, process_group=0,
            )  # fmt: skip

    def stop(self) -> None:
        """Asks the child to save and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def poll(self, others: Sequence[Mapping[int, float]]) -> bool:
        """Looks at the child and prunes it; returns whether its trial has ended."""
        trial, code = self.trial, self.process.poll()
        if self.stage == "train" and self._look() and code is None and not self.why:
            goal = (self.sweep.watch or self.sweep.metric).goal
            why = PRUNERS[self.sweep.prune](trial.seen, others, self.steps, goal)
            if why and max(trial.seen) < self.steps:
                self.why = why
                self.stop()
        if code is None:
            return False
        trial.facts["seconds"] = round(trial.facts.get("seconds", 0.0) + time.monotonic() - self.began, 1)
        self.began = time.monotonic()
        if code == 42 and self.why:
            trial.state, trial.why = "pruned", self.why
        elif code == 42 and self.starts < 10:  # a signal from elsewhere
            self._start("train", *self.sweep.words(trial))
            return False
        elif code:
            last = (self.workdir / f"{self.stage}.log").read_text(errors="replace").strip().rpartition("\n")[2]
            trial.state, trial.why = "failed", f"vmm {self.stage} ended with code {code}: {last}"
        else:
            return self._value()
        return True

    def _look(self) -> bool:
        """Reads metrics.jsonl if it grew; returns whether it shows something new of the watched metric."""
        path = self.workdir / "metrics.jsonl"
        size = path.stat().st_size if path.is_file() else -1
        if size == self.size:
            return False
        self.size = size
        name = (self.sweep.watch or self.sweep.metric).name
        before, seen = len(self.trial.seen), {}
        for row in read_rows(path):
            value = row.get(name, row.get(f"eval/{name}"))
            if value is not None:
                seen[row["step"]] = value
        self.trial.seen = seen
        return len(seen) > before

    def _value(self) -> bool:
        """The end of a stage: takes the trial's value, or begins the evaluation that has it (False)."""
        trial, name = self.trial, self.sweep.metric.name
        self._look()
        rows = read_rows(self.workdir / "metrics.jsonl")
        if any(name in row for row in rows):
            value = next(row[name] for row in reversed(rows) if name in row)
        elif self.stage == "train" and self.sweep.load(trial.parameters).get("evals"):
            self._start("eval", str(self.workdir))
            return False
        else:
            evals = read_rows(self.workdir / "evals.jsonl")
            values = evals[-1]["values"] if evals else {}
            if name not in values:
                known = sorted({*values, *(key for row in rows for key in row if key != "step")})
                raise UserError(f"metric {name}: trial {trial.number + 1} has none of the name; {one_of(name, known)}")
            value = values[name]
        if value is None or not math.isfinite(value):
            trial.state, trial.why = "failed", f"{name} is not finite"
        else:
            trial.state, trial.value = "done", float(value)
        return True


def _wait_for(workdir: Path) -> None:
    """Waits for a child of a sweep that was killed: it is saving. Raises UserError if it holds its workdir for long."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            with RunLock(workdir):
                return
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL)


def _slots(parallel: int, count: Callable[[], list[str]] | None = None) -> list[dict[str, str]]:
    """Returns what each place for a trial has in its environment: its share of the GPUs, all of them for one place.

    count: which GPUs there are, for tests.
    """
    devices = (count or _gpus)()
    if parallel == 1 or not devices:
        return [{} for _ in range(parallel)]
    if len(devices) < parallel:  # several trials on one GPU: none may take all its memory
        share = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        return [share | {"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]} for place in range(parallel)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[place::parallel])} for place in range(parallel)]


def _gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(place) for place, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]
