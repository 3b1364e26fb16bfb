"""vmm train: config → checkpoints. Read from top to bottom: the order is that of a run."""

import copy
import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from vmm.build import differences, digest, load_config, plain, save_config
from vmm.config import numbers
from vmm.convert import warm_start
from vmm.data.loader import Loader
from vmm.data.manifest import changes, identity
from vmm.errors import Preempted, UserError, one_of
from vmm.evaluate import run_evals
from vmm.experiment import Experiment
from vmm.objectives import OBJECTIVES
from vmm.paths import to_path
from vmm.plugins import admit
from vmm.run import weights
from vmm.sharding import check_batch, host_place, place_batch, platform, to_device
from vmm.teachers import open_teachers
from vmm.training import distributed
from vmm.training.allocator import keep_freed_memory
from vmm.training.checkpoint import Checkpoints
from vmm.training.early import Watch
from vmm.training.faults import Faults
from vmm.training.guard import Inspector, Rollbacks, Trouble, layers
from vmm.training.ledger import Ledger
from vmm.training.metrics import MetricLog, ProgressLine, count_flops, peak_flops
from vmm.training.replicas import compare_replicas
from vmm.training.runtime import RunLock, StopSignal, open_workdir, use_compilation_cache
from vmm.training.watchdog import Watchdog


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
    workdir, began = to_path(workdir), time.time() if began is None else began
    config = plain(config)

    # ---- the config, checked before anything is written ------------------------------------------
    use_compilation_cache()
    if platform() == "cpu":
        keep_freed_memory()
    admit(config)
    experiment = Experiment(config)
    c = experiment.config
    if not c.objectives:
        raise UserError(f"objectives: none given; {one_of('', OBJECTIVES)}")
    mesh = experiment.make_mesh()
    check_batch(c.batch, mesh, experiment.optim.accumulate)
    teachers = open_teachers(experiment, mesh)
    faults = Faults(workdir)
    program = experiment.program(mesh, teachers.trunks, faults.poison)
    distributed.check_same("config", digest(numbers(config)))
    open_workdir(workdir)
    first_process = jax.process_index() == 0
    ledger = Ledger(workdir, began, first_process)

    with RunLock(workdir), StopSignal() as stop, jax.set_mesh(mesh), ledger, Watchdog(c.step_timeout) as watchdog:
        watchdog.beat("the start", slow=True)
        _same_config(config, workdir)
        with ledger.during("compile"):
            flops = count_flops(
                program.step, program.shapes, place_batch(experiment.batch_shapes(), mesh), *teachers.params
            )
        device = mesh.devices.flat[0].device_kind
        ledger.facts = {"device": device, "devices": mesh.devices.size, "flops": flops}
        parts, compiled = layers(program.shapes.params), False
        rollbacks = Rollbacks(workdir, experiment.guard)
        early = Watch(workdir, experiment.early, first_process)

        while True:  # once, and again after each rollback
            # ---- the state: new, or the newest good checkpoint -----------------------------------
            checkpoints = Checkpoints(workdir, c.keep, lambda: early.best)
            if rollbacks.unfinished:
                checkpoints.quarantine(rollbacks.unfinished["first"])
                rollbacks.end(first_process)
            if checkpoints.latest is None:
                state, start, known = program.init(jax.random.key(c.seed)), 0, {}
                if c.init_from:
                    state = warm_start(state, experiment, c.init_from)
            else:
                with ledger.during("restore"):
                    saved = checkpoints.restore_newest_good(program.shapes)
                state, start, known = saved.state, saved.step, saved.data
                if saved.samples != start * c.batch:
                    raise UserError(
                        f"{workdir}: step {start} had seen {saved.samples} samples, not {start} × batch {c.batch}"
                    )
            early.back_to(start)
            if early.checks(start) or early.due(start, c.steps, c.save_every):
                # Before training, for the metric's name; after a step, because the run was killed before it did.
                watchdog.beat(f"the evaluation of step {start}", slow=True)
                with ledger.during("evaluation"):
                    early.add(start, _watched(experiment, state, mesh))
            if early.why:
                print(f"{workdir}: stopped at step {start}: {early.why}; raise early.patience to train on", flush=True)
                checkpoints.close()
                return {}
            if start and start < c.steps and first_process:
                print(f"{workdir}: goes on from step {start}", flush=True)
            if start >= c.steps:
                print(f"{workdir}: all {c.steps} steps are done; raise `steps` or choose another workdir to train on")
                checkpoints.close()
                return {}

            # ---- the data, from that step on -----------------------------------------------------
            host, hosts = host_place(mesh)
            source = loader(
                experiment.data, experiment.clip, experiment.augment, seed=c.seed, batch=c.batch, start=start, stop=c.steps,
                host=host, hosts=hosts, modalities=experiment.modalities,
            )  # fmt: skip
            data = identity(source.rows)
            if changed := changes(known, data):
                line = (
                    f"{experiment.data.train}: not the data that step {start} of {workdir} was trained on ({changed})"
                )
                if not c.other_data:
                    checkpoints.close()
                    raise UserError(f"{line}; put it back, or set other_data=True to go on with it")
                if first_process:
                    print(line, flush=True)
            log = MetricLog(workdir, start, first_process)
            line = ProgressLine(start, c.steps, first_process)
            clock = _Clock(c.batch, flops)
            inspect = Inspector(
                experiment.guard, workdir, parts, lambda step, source=source: source.planned(step - 1), first_process
            )

            # ---- the loop ------------------------------------------------------------------------
            metrics, last, step, stopped = None, {}, start, None
            try:
                experiment.check_rows(source.rows)
                batches = iter(source)
                for step in range(start + 1, c.steps + 1):
                    ledger.stepping(step)
                    watchdog.beat(f"step {step}", slow=not compiled)
                    faults.before(step, checkpoints)
                    with clock.waiting(), ledger.during("input"):
                        batch = next(batches)
                    before = metrics
                    if step in rollbacks.passed_over:
                        state, metrics = program.pass_over(state), None
                    else:
                        with ledger.during(ledger.account if compiled else "compile"):
                            state, metrics = program.step(state, to_device(batch, mesh), *teachers.params)
                        compiled = True
                    if before is not None:
                        jax.block_until_ready(before)  # one step in flight, one being fed
                        inspect(step - 1, before)
                    checkpoints.poll()
                    reason = distributed.agreed(step, stop.asked)
                    stopping = reason is not None
                    due = early.due(step, c.steps, c.save_every)
                    saving = step % c.save_every == 0 or step == c.steps or stopping or due
                    if metrics is None and step % c.log_every == 0:
                        log.write(step, {"passed_over": 1.0})
                    elif metrics is not None and (step % c.log_every == 0 or step == start + 1 or saving):
                        told = jax.device_get(metrics)
                        # What is saved amid trouble would only push an older checkpoint out.
                        amid = inspect(step, told) > 0
                        saving = saving and (not amid or step == c.steps or stopping)
                        last = {key: float(value) for key, value in told.items() if key != "layers"}
                        speed = clock.lap(step)
                        if step % c.log_every == 0 or step == c.steps:
                            seen = {key: value for key, value in last.items() if measured(key, value)}
                            log.write(step, seen | speed | {"goodput": ledger.share()})
                        line.show(step, last["loss"], speed["clips_per_second"], clock.left(c.steps - step))
                    if c.check_replicas and step % c.check_replicas == 0:
                        compare_replicas(state, step)
                    if saving:
                        with ledger.during("saving"):
                            checkpoints.save(state, step, step * c.batch, data)
                    asked = c.eval_every and step % c.eval_every == 0 and step < c.steps and not stopping
                    due = due and saving and not (stopping and step < c.steps)
                    if asked or due:
                        watchdog.beat(f"the evaluation after step {step}", slow=True)
                        with ledger.during("evaluation"):
                            values = (
                                run_evals(experiment, weights(state), mesh)
                                if asked
                                else _watched(experiment, state, mesh)
                            )
                        if due:
                            early.add(step, values)
                        log.write(step, {f"eval/{key}": value for key, value in values.items()})
                    if due and early.why:
                        stopped = f"{workdir}: stopped at step {step} of {c.steps}: {early.why}"
                        break
                    if stopping and step < c.steps:
                        checkpoints.wait()
                        raise Preempted(
                            f"{reason}: saved step {step} of {c.steps}; the same command goes on from there"
                        )
                with ledger.during("saving"):
                    checkpoints.wait()
            except Trouble as trouble:
                checkpoints.wait()
                restore = max((saved for saved in checkpoints.steps if saved < trouble.first), default=0)
                rollbacks.begin(trouble, restore, first_process)
                if first_process:
                    print(
                        f"{trouble.why}; back to step {restore}, steps {trouble.first} to {trouble.last} are passed over",
                        flush=True,
                    )
                continue
            except BaseException as error:
                distributed.tell(error)  # before what follows, which may wait for other processes
                raise
            finally:
                watchdog.beat("the end", slow=True)
                ledger.write(step)
                source.close()
                line.close()
                log.close()
                checkpoints.close()

            # ---- the end -------------------------------------------------------------------------
            if stopped and first_process:
                print(stopped, flush=True)
            for told in source.account.lines():
                print(told)
            return last


def _watched(experiment: Experiment, state, mesh) -> dict[str, float]:
    """Returns the numbers of the evaluator that early stopping watches."""
    name = experiment.early.metric.split("/")[0]
    mine = copy.copy(experiment)
    mine.evals = {name: experiment.evals[name]}
    return run_evals(mine, weights(state), mesh)


def measured(key: str, value: float) -> bool:
    """Whether a metric is of this step: the health panel's are not-a-number at the steps between."""
    return not (key.startswith("health/") and math.isnan(value))


class _Clock:
    """Clips per second, input-wait share and model FLOPs utilisation since the last lap."""

    def __init__(self, batch: int, flops: int):
        self.batch, self.flops, self.peak = batch, flops, peak_flops()
        self.since, self.at, self.waited = time.perf_counter(), None, 0.0
        self.lasted, self.steps = 0.0, 0

    class _Waiting:
        def __init__(self, clock):
            self.clock = clock

        def __enter__(self):
            self.start = time.perf_counter()

        def __exit__(self, *_):
            self.clock.waited += time.perf_counter() - self.start

    def waiting(self):
        """Counts the time inside as waiting for input."""
        return self._Waiting(self)

    def lap(self, step: int) -> dict:
        now = time.perf_counter()
        steps = 1 if self.at is None else step - self.at
        elapsed = max(now - self.since, 1e-9)
        rate = steps / elapsed
        speed = {"steps_per_second": rate, "clips_per_second": rate * self.batch, "input_wait": self.waited / elapsed}
        if self.peak:
            speed["mfu"] = rate * self.flops / self.peak
        if self.at is not None:  # the first lap is mostly compilation
            self.lasted, self.steps = self.lasted + elapsed, self.steps + steps
        self.since, self.at, self.waited = now, step, 0.0
        return speed

    def left(self, steps: int) -> float | None:
        """Returns the seconds that so many steps take, at the run's mean pace; None before it is known."""
        return steps * self.lasted / self.steps if self.steps else None


def _same_config(config: dict, workdir: Path) -> None:
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
