"""A run that is open for training: its parts, its lock, its records, and the state that it goes on from."""

import contextlib
import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from vmm.build import differences, digest, load_config, plain, save_config
from vmm.config import numbers
from vmm.convert import warm_start
from vmm.data.loader import Loader
from vmm.data.manifest import changes, identity
from vmm.errors import UserError, one_of
from vmm.evaluate import run_evals
from vmm.experiment import Experiment
from vmm.objectives import OBJECTIVES
from vmm.paths import to_path
from vmm.plugins import admit
from vmm.run import weights
from vmm.sharding import check_batch, host_place, place_batch, platform
from vmm.teachers import open_teachers
from vmm.training import distributed
from vmm.training.allocator import keep_freed_memory
from vmm.training.cadence import Cadence
from vmm.training.checkpoint import Checkpoints
from vmm.training.early import Watch
from vmm.training.faults import Faults
from vmm.training.guard import Rollbacks, Trouble, layers
from vmm.training.ledger import Ledger
from vmm.training.metrics import count_flops, read_rows
from vmm.training.runtime import RunLock, StopSignal, open_workdir, use_compilation_cache
from vmm.training.step import State
from vmm.training.watchdog import Watchdog


class Start(NamedTuple):
    """Where an attempt begins. step: that is done. data: what it was trained on, {} for a new run."""

    state: State
    step: int
    data: Mapping


class Session:
    """All that a run has from its start to its end, over rollbacks: made by `open`, a context manager.

    Attributes:
      config: checked. experiment, mesh, teachers, program: built of it. flops: of a step.
      checkpoints: of this attempt. compiled: whether a step has run.
      stop, ledger, watchdog, faults, rollbacks, early, cadence: see vmm/training.
    """

    def __init__(self, config: Mapping, workdir: Path):
        """Checks the config; writes nothing."""
        self.workdir, self.experiment = workdir, Experiment(config)
        self.config = c = self.experiment.config
        if not c.objectives:
            raise UserError(f"objectives: none given; {one_of('', OBJECTIVES)}")
        self.mesh = self.experiment.make_mesh()
        check_batch(c.batch, self.mesh, self.experiment.optim.accumulate)
        self.teachers = open_teachers(self.experiment, self.mesh)
        self.faults = Faults(workdir)
        self.program = self.experiment.program(self.mesh, self.teachers.trunks, self.faults.poison)
        self.first_process = jax.process_index() == 0
        early = self.experiment.early
        self.cadence = Cadence(
            c.steps, c.log_every, c.save_every, c.eval_every, c.check_replicas,
            (early.every or c.save_every) if early.metric else 0,
        )  # fmt: skip
        self.compiled = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, config: Mapping, workdir: str | Path, began: float | None = None):
        """Yields the session of a run; arguments and errors as those of vmm.train.train."""
        workdir, began = to_path(workdir), time.time() if began is None else began
        config = plain(config)
        use_compilation_cache()
        if platform() == "cpu":
            keep_freed_memory()
        admit(config)
        self = cls(config, workdir)
        distributed.check_same("config", digest(numbers(config)))
        open_workdir(workdir)
        with contextlib.ExitStack() as stack:
            stack.enter_context(RunLock(workdir))
            self.stop = stack.enter_context(StopSignal())
            stack.enter_context(jax.set_mesh(self.mesh))
            self.ledger = stack.enter_context(Ledger(workdir, began, self.first_process))
            self.watchdog = stack.enter_context(Watchdog(self.config.step_timeout))
            self.watchdog.beat("the start", slow=True)
            claim(config, workdir)
            with self.ledger.during("compile"):
                batch = place_batch(self.experiment.batch_shapes(), self.mesh)
                self.flops = count_flops(self.program.step, self.program.shapes, batch, *self.teachers.params)
            device = self.mesh.devices.flat[0].device_kind
            self.ledger.facts = {"device": device, "devices": self.mesh.devices.size, "flops": self.flops}
            self.parts = layers(self.program.shapes.params)
            self.rollbacks = Rollbacks(workdir, self.experiment.guard)
            self.early = Watch(workdir, self.experiment.early, self.first_process)
            yield self

    def say(self, line: str) -> None:
        """Prints a line, once for all processes."""
        if self.first_process:
            print(line, flush=True)

    def restore_or_init(self) -> Start:
        """Returns the newest good checkpoint; else a new state, with the weights of init_from where they are given."""
        c = self.config
        self.checkpoints = Checkpoints(self.workdir, c.keep, lambda: self.early.best)
        if self.rollbacks.unfinished:
            self.checkpoints.quarantine(self.rollbacks.unfinished["first"])
            self.rollbacks.end(self.first_process)
        if self.checkpoints.latest is None:
            state = self.program.init(jax.random.key(c.seed))
            return Start(warm_start(state, self.experiment, c.init_from) if c.init_from else state, 0, {})
        with self.ledger.during("restore"):
            saved = self.checkpoints.restore_newest_good(self.program.shapes)
        if saved.samples != saved.step * c.batch:
            raise UserError(
                f"{self.workdir}: step {saved.step} had seen {saved.samples} samples, not {saved.step} × batch {c.batch}"
            )
        return Start(saved.state, saved.step, saved.data)

    def open_data(self, loader: type[Loader], start: Start) -> tuple[Loader, dict]:
        """Returns the batches from a step on, and what identifies their data.

        Raises:
          UserError: it is not what the run was trained on before.
        """
        c, e = self.config, self.experiment
        host, hosts = host_place(self.mesh)
        source = loader(
            e.data, e.clip, e.augment, seed=c.seed, batch=c.batch, start=start.step, stop=c.steps, host=host, hosts=hosts,
            modalities=e.modalities,
        )  # fmt: skip
        data = identity(source.rows)
        if changed := changes(start.data, data):
            line = f"{e.data.train}: not the data that step {start.step} of {self.workdir} was trained on ({changed})"
            if not c.other_data:
                raise UserError(f"{line}; put it back, or set other_data=True to go on with it")
            self.say(line)
        return source, data

    def evaluate(self, state: State, step: int, watched: bool = False) -> dict[str, float]:
        """Returns what evaluators find, by name. watched: that of early stopping alone."""
        self.watchdog.beat(f"the evaluation of step {step}", slow=True)
        experiment = self.experiment
        if watched:
            name = experiment.early.metric.split("/")[0]
            experiment = copy.copy(experiment)
            experiment.evals = {name: experiment.evals[name]}
        with self.ledger.during("evaluation"):
            return run_evals(experiment, weights(state), self.mesh)

    def evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl holds an evaluation of a step."""
        rows = read_rows(self.workdir / "metrics.jsonl")
        return any(row["step"] == step and any(key.startswith("eval/") for key in row) for row in rows)

    def roll_back(self, trouble: Trouble) -> None:
        """Writes down that the run goes back to before the trouble, whose steps are then left out.

        Raises:
          NumericError: it went back too often.
        """
        restore = max((saved for saved in self.checkpoints.steps if saved < trouble.first), default=0)
        self.rollbacks.begin(trouble, restore, self.first_process)
        self.say(f"{trouble.why}; back to step {restore}, steps {trouble.first} to {trouble.last} are passed over")


def claim(config: dict, workdir: Path) -> None:
    """Writes the config of a new run; raises UserError where the workdir holds a run of another.

    A run that has saved nothing yet may be started anew with another config: what was wrong is mended.
    """
    path = workdir / "config.json"
    changed = differences(numbers(config), numbers(load_config(str(path)))) if path.exists() else []
    if changed and _has_saved(workdir):
        raise UserError(
            f"workdir {workdir}: was made by another config; go on with that one, or choose another workdir. "
            "It differs in (there → here):\n  " + "\n  ".join(changed)
        )
    if jax.process_index() == 0:
        if changed:
            (workdir / "rollbacks.json").unlink(missing_ok=True)
        save_config(config, path)


def _has_saved(workdir: Path) -> bool:
    folders = (workdir / "checkpoints", workdir / "checkpoints-quarantined")
    return any(path.name.split("-")[0].isdigit() for folder in folders if folder.is_dir() for path in folder.iterdir())
