"""vmm train: config → checkpoints."""

import math
from collections.abc import Mapping
from pathlib import Path

import jax

from vmm.data.loader import Loader
from vmm.errors import Preempted
from vmm.session import Session, Start
from vmm.sharding import to_device
from vmm.training import distributed
from vmm.training.clock import Clock
from vmm.training.guard import Inspector, Trouble
from vmm.training.metrics import MetricLog, ProgressLine
from vmm.training.replicas import compare_replicas


def train(
    config: Mapping, workdir: str | Path, *, began: float | None = None, loader: type[Loader] = Loader
) -> dict[str, float]:
    """Trains, or goes on with, the run in `workdir`; returns the metrics of its last step.

    The same call again resumes from the newest good checkpoint: the same samples, the same losses.

    Args:
      began: when this attempt began, in seconds of time.time(), for the ledger; None: now.
      loader: where batches come from.

    Raises:
      UserError (and its kinds): anything that the user can mend; checkpoints stay whole.
      Preempted: SIGTERM or Ctrl-C arrived; the state was saved.
    """
    with Session.open(config, workdir, began) as session:
        while True:
            try:
                return attempt(session, loader)
            except Trouble as trouble:
                session.roll_back(trouble)


def attempt(session: Session, loader: type[Loader] = Loader) -> dict[str, float]:
    """Trains from the newest state to the run's end; returns the metrics of the last step, {} where all was done.

    Raises:
      Trouble: steps went wrong beyond what the guard skips; the run may go back.
    """
    start = session.restore_or_init()
    try:
        if _ended(session, start):
            return {}
        source, data = session.open_data(loader, start)
    except BaseException:
        session.checkpoints.close()
        raise
    loop = Loop(session, start, source, data)
    try:
        session.experiment.check_rows(source.rows)
        loop.run()
        with session.ledger.during("saving"):
            session.checkpoints.wait()
    except Trouble:
        session.checkpoints.wait()
        raise
    except BaseException as error:
        distributed.tell(error)  # before what follows, which may wait for other processes
        raise
    finally:
        loop.close()
    if loop.stopped:
        session.say(loop.stopped)
    for line in source.account.lines():
        print(line)
    return loop.last


def _ended(session: Session, start: Start) -> bool:
    """Whether there is nothing to train: all steps are done, or early stopping says so."""
    early, steps, step = session.early, session.config.steps, start.step
    early.back_to(step)
    if early.checks(step) or (session.cadence.watches(step) and early.lacks(step)):
        # Before training, for the metric's name; after a step, because the run was killed before it did.
        early.add(step, session.evaluate(start.state, step, watched=True))
    if early.why:
        print(f"{session.workdir}: stopped at step {step}: {early.why}; raise early.patience to train on", flush=True)
    elif step >= steps:
        print(f"{session.workdir}: all {steps} steps are done; raise `steps` or choose another workdir to train on")
    elif step:
        session.say(f"{session.workdir}: goes on from step {step}")
    if early.why or step >= steps:
        session.checkpoints.close()
        return True
    return False


class Loop:
    """The steps of one attempt: run → read metrics when due → report → save → evaluate → stop?

    Attributes:
      last: metrics of the last step that was read. stopped: why early stopping ended the run, "" where it did not.
    """

    def __init__(self, session: Session, start: Start, source: Loader, data: dict):
        c, first = session.config, session.first_process
        self.session, self.start, self.state, self.data = session, start.step, start.state, data
        self.source, self.step = source, start.step
        self.log = MetricLog(session.workdir, start.step, first)
        self.line = ProgressLine(start.step, c.steps, first)
        self.clock = Clock(c.batch, session.flops)
        self.inspect = Inspector(
            session.experiment.guard, session.workdir, session.parts, lambda step: source.planned(step - 1), first
        )
        self.metrics, self.last, self.stopped = None, {}, ""

    def run(self) -> None:
        """Trains to the last step, or to where early stopping ends the run.

        Raises:
          Preempted: the run was asked to stop, and has saved its state. Trouble: as Inspector.
        """
        session = self.session
        if session.cadence.missed(self.start, session.evaluated(self.start)):
            self._evaluate(self.start)
        batches = iter(self.source)
        for step in range(self.start + 1, session.config.steps + 1):
            self.step = step
            self._train(step, batches)
            session.checkpoints.poll()
            reason = distributed.agreed(step, session.stop.asked)
            given = dict(first=step == self.start + 1, stopping=reason is not None, skipped=self.metrics is None)
            due = session.cadence.due(step, **given)
            if due.read and self._read(step, due.log):
                due = session.cadence.due(step, **given, troubled=True)
            elif due.log and not due.read:
                self.log.write(step, {"passed_over": 1.0})
            if due.compare:
                compare_replicas(self.state, step)
            if due.save:
                with session.ledger.during("saving"):
                    session.checkpoints.save(self.state, step, step * session.config.batch, self.data)
            if due.evaluate or due.watch:
                self._evaluate(step, due.evaluate, due.watch)
            if due.watch and session.early.why:
                self.stopped = (
                    f"{session.workdir}: stopped at step {step} of {session.config.steps}: {session.early.why}"
                )
                return
            if reason is not None and step < session.config.steps:
                session.checkpoints.wait()
                steps = session.config.steps
                raise Preempted(f"{reason}: saved step {step} of {steps}; the same command goes on from there")

    def _train(self, step: int, batches) -> None:
        """Runs a step; waits for the one before it, so that one is in flight while the next one is fed."""
        session, before = self.session, self.metrics
        session.ledger.stepping(step)
        session.watchdog.beat(f"step {step}", slow=not session.compiled)
        session.faults.before(step, session.checkpoints)
        with self.clock.waiting(), session.ledger.during("input"):
            batch = next(batches)
        if step in session.rollbacks.passed_over:
            self.state, self.metrics = session.program.pass_over(self.state), None
        else:
            with session.ledger.during(session.ledger.account if session.compiled else "compile"):
                placed = to_device(batch, session.mesh)
                self.state, self.metrics = session.program.step(self.state, placed, *session.teachers.params)
            session.compiled = True
        if before is not None:
            jax.block_until_ready(before)
            self.inspect(step - 1, before)

    def _read(self, step: int, log: bool) -> bool:
        """Reads the metrics of a step and reports them; returns whether steps are being skipped."""
        metrics = jax.device_get(self.metrics)
        troubled = self.inspect(step, metrics) > 0
        self.last = {key: float(value) for key, value in metrics.items() if key != "layers"}
        speed = self.clock.lap(step)
        if log:
            measured = {key: value for key, value in self.last.items() if is_measured(key, value)}
            self.log.write(step, measured | speed | {"goodput": self.session.ledger.share()})
        left = self.clock.left(self.session.config.steps - step)
        self.line.show(step, self.last["loss"], speed["clips_per_second"], left)
        return troubled

    def _evaluate(self, step: int, whole: bool = True, watch: bool = False) -> None:
        values = self.session.evaluate(self.state, step, watched=not whole)
        if watch:
            self.session.early.add(step, values)
        self.log.write(step, {f"eval/{key}": value for key, value in values.items()})

    def close(self) -> None:
        """Ends what the attempt opened."""
        self.session.watchdog.beat("the end", slow=True)
        self.session.ledger.write(self.step)
        for part in (self.source, self.line, self.log, self.session.checkpoints):
            part.close()


def is_measured(key: str, value: float) -> bool:
    """Whether a metric is of this step: the health panel's are not-a-number at the steps between."""
    return not (key.startswith("health/") and math.isnan(value))
