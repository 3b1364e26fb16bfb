"""vmm train: config → checkpoints. Read from top to bottom: the order is that of a run."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from vmm.build import differences, load_config, plain, save_config
from vmm.convert import warm_start
from vmm.data.loader import Loader, bad_list, bad_summary
from vmm.errors import NumericError, Preempted, UserError, one_of
from vmm.evaluate import run_evals
from vmm.experiment import Experiment, numbers
from vmm.objectives import OBJECTIVES
from vmm.run import weights
from vmm.sharding import check_batch, make_mesh, place_batch, to_device
from vmm.teachers import open_teachers
from vmm.training.checkpoint import Checkpoints
from vmm.training.metrics import MetricLog, ProgressLine, count_flops, peak_flops
from vmm.training.runtime import RunLock, StopSignal, open_workdir, use_compilation_cache


def train(config: Mapping, workdir: str | Path) -> dict[str, float]:
    """Trains, or goes on with, the run in `workdir`; returns the metrics of its last step.

    The same call again resumes from the newest checkpoint: the same samples, the same losses.

    Raises:
      UserError (and its kinds): anything that the user can mend; checkpoints stay whole.
      Preempted: SIGTERM or Ctrl-C arrived; the state was saved.
    """
    workdir = Path(workdir)
    config = plain(config)

    # ---- the config, checked before anything is written ------------------------------------------
    use_compilation_cache()
    experiment = Experiment(config)
    c = experiment.config
    if not c.objectives:
        raise UserError(f"objectives: none given; {one_of('', OBJECTIVES)}")
    mesh = make_mesh(experiment.mesh)
    check_batch(c.batch, mesh, experiment.optim.accumulate)
    teachers = open_teachers(experiment, mesh)
    program = experiment.program(mesh, teachers.trunks)
    open_workdir(workdir)

    with RunLock(workdir), StopSignal() as stop, jax.set_mesh(mesh):
        _same_config(config, workdir)

        # ---- the state: new, or the newest checkpoint --------------------------------------------
        checkpoints = Checkpoints(workdir, c.keep)
        if checkpoints.latest is None:
            state, start = program.init(jax.random.key(c.seed)), 0
            if c.init_from:
                state = warm_start(state, experiment, c.init_from)
        else:
            saved = checkpoints.restore(program.shapes)
            state, start = saved.state, saved.step
            if saved.samples != start * c.batch:
                raise UserError(
                    f"{workdir}: step {start} had seen {saved.samples} samples, not {start} × batch {c.batch}"
                )
        if start >= c.steps:
            print(f"{workdir}: all {c.steps} steps are done; raise `steps` or choose another workdir to train on")
            checkpoints.close()
            return {}

        # ---- the data, from that step on ---------------------------------------------------------
        loader = Loader(
            experiment.data, experiment.clip, experiment.augment, seed=c.seed, batch=c.batch, start=start, stop=c.steps,
            host=jax.process_index(), hosts=jax.process_count(), modalities=experiment.modalities,
        )  # fmt: skip
        first_process = jax.process_index() == 0
        log = MetricLog(workdir, start, first_process)
        line = ProgressLine(start, c.steps, first_process)
        flops = count_flops(
            program.step, program.shapes, place_batch(experiment.batch_shapes(), mesh), *teachers.params
        )
        clock = _Clock(c.batch, flops)

        # ---- the loop ----------------------------------------------------------------------------
        metrics, last, step = None, {}, start
        try:
            batches = iter(loader)
            for step in range(start + 1, c.steps + 1):
                with clock.waiting():
                    batch = next(batches)
                before = metrics
                state, metrics = program.step(state, to_device(batch, mesh), *teachers.params)
                if before is not None:
                    jax.block_until_ready(before)  # one step in flight, one being fed
                stopping = _agree(stop.asked)
                saving = step % c.save_every == 0 or step == c.steps or stopping
                if step % c.log_every == 0 or step == start + 1 or saving:
                    last = {key: float(value) for key, value in jax.device_get(metrics).items()}
                    if not math.isfinite(last["loss"]):
                        raise NumericError(
                            f"step {step}: the loss is {last['loss']}; the checkpoint of step {checkpoints.latest} is intact: "
                            "lower optim.learning_rate, or raise optim.warmup or clip, and start in another workdir"
                        )
                    speed = clock.lap(step)
                    if step % c.log_every == 0 or step == c.steps:
                        seen = {key: value for key, value in last.items() if measured(key, value)}
                        log.write(step, seen | speed)
                    line.show(step, last["loss"], speed["clips_per_second"], clock.left(c.steps - step))
                if saving:
                    checkpoints.save(state, step, step * c.batch)
                if c.eval_every and step % c.eval_every == 0 and step < c.steps and not stopping:
                    values = run_evals(experiment, weights(state), mesh)
                    log.write(step, {f"eval/{key}": value for key, value in values.items()})
                if stopping and step < c.steps:
                    checkpoints.wait()
                    raise Preempted(
                        f"{stop.asked}: saved step {step} of {c.steps}; the same command goes on from there"
                    )
            checkpoints.wait()
        finally:
            loader.close()
            line.close()
            log.close()
            checkpoints.close()

        # ---- the end -----------------------------------------------------------------------------
        if loader.bad:
            print(f"{len(loader.bad)} files could not be decoded ({bad_summary(loader.bad)}):\n{bad_list(loader.bad)}")
        return last


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


def _agree(asked: str | None) -> bool:
    """Whether any host was asked to stop: every host must leave after the same step."""
    if jax.process_count() == 1:
        return asked is not None
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(asked is not None)).any())


def _same_config(config: dict, workdir: Path) -> None:
    """Writes the config of a new run; raises UserError where the workdir holds a run of another."""
    path = workdir / "config.json"
    if not path.exists():
        if jax.process_index() == 0:
            save_config(config, path)
        return
    changed = differences(numbers(config), numbers(load_config(str(path))))
    if changed:
        raise UserError(
            f"workdir {workdir}: was made by another config; go on with that one, or choose another workdir. "
            "It differs in (there → here):\n  " + "\n  ".join(changed)
        )
    if jax.process_index() == 0:
        save_config(config, path)
