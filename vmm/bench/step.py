"""vmm bench step: what the train step of a config does on the devices here: steps/s, MFU, memory, compile time, a trace.

The program is the one that `vmm train` runs. Its batch is drawn once and lies on the devices, so that input costs nothing;
`--input` feeds it from the config's own data instead and says how long it waited.
"""

import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from vmm.build import load_config, write_text
from vmm.data.loader import Loader
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.sharding import check_batch, host_place, place_batch, to_device
from vmm.teachers import open_teachers
from vmm.training.metrics import count_flops, peak_flops
from vmm.training.runtime import use_compilation_cache

_WARM = 3  # steps before measuring: the first loads the program, the next fill the queue


def bench_step(
    configs: Sequence[str],
    overrides: Sequence[str],
    steps: int,
    trace: Path | None = None,
    given: bool = False,
    path: Path | None = None,
) -> list[dict]:
    """Measures the train step of every config in turn, prints a table, and returns its rows.

    Args:
      configs: as of `vmm train`. overrides: dotted key=value, for all of them. steps: that are timed.
      trace: folder for a profile of the last few steps, to be opened with a trace viewer (TensorBoard, Perfetto).
      given: feed the config's data through the loader instead of one drawn batch.
      path: JSON of the rows.

    Raises:
      UserError: a config is wrong, or fewer than 1 step.
    """
    if steps < 1:
        raise UserError(f"bench step: --steps is at least 1, got {steps}")
    use_compilation_cache()
    rows = []
    for reference in configs:
        print(f"{reference}: compiling", flush=True)
        folder = None if trace is None else trace / reference.rpartition("/")[2].replace(":", "-")
        rows.append({"config": reference} | _measure(load_config(reference, overrides), steps, folder, given))
    _show(rows)
    if path is not None:
        write_text(path, json.dumps(rows, indent=2) + "\n")
    return rows


def drawn_batch(experiment: Experiment, seed: int = 0):
    """Returns a whole random batch that the experiment could have been given: every stream there, every row valid."""
    rng = np.random.default_rng(seed)
    text = experiment.config.trunk["encoders"].get("text", {})

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if shape.dtype == jnp.uint8:
            return rng.integers(0, 256, shape.shape, np.uint8)
        if shape.dtype == jnp.int32:
            return rng.integers(0, text.get("vocabulary", 2), shape.shape, np.int32)
        if shape.dtype == jnp.bool_:
            return np.ones(shape.shape, bool)
        return rng.normal(0, 0.1, shape.shape).astype(np.float32)

    shapes = experiment.batch_shapes()
    batch = jax.tree.map(draw, shapes)
    labels = {name: np.zeros(shape.shape, np.int32) for name, shape in shapes.labels.items()}
    return batch._replace(labels=labels, index=np.arange(experiment.config.batch, dtype=np.int32))


def _measure(config: dict, steps: int, trace: Path | None, given: bool) -> dict:
    experiment = Experiment(config)
    mesh = experiment.make_mesh()
    check_batch(experiment.config.batch, mesh, experiment.optim.accumulate)
    teachers = open_teachers(experiment, mesh)
    program = experiment.program(mesh, teachers.trunks)
    with jax.set_mesh(mesh):
        batch_shapes = place_batch(experiment.batch_shapes(), mesh)
        flops = count_flops(program.step, program.shapes, batch_shapes, *teachers.params)
        compiled, cold, cached = _compile(program.step, (program.shapes, batch_shapes, *teachers.params))
        state = program.init(jax.random.key(experiment.config.seed))
        host, hosts = host_place(mesh)
        if given:
            loader = Loader(
                experiment.data, experiment.clip, experiment.augment, seed=experiment.config.seed,
                batch=experiment.config.batch, start=0, stop=_WARM + steps, host=host, hosts=hosts,
                modalities=experiment.modalities,
            )  # fmt: skip
            batches = iter(loader)
        else:
            loader, whole = None, drawn_batch(experiment)
            share = experiment.config.batch // hosts
            one = to_device(jax.tree.map(lambda x: x[host * share : (host + 1) * share], whole), mesh)
        times, waited, before = [], 0.0, None
        try:
            for number in range(_WARM + steps):
                if trace is not None and number == _WARM + max(0, steps - 3):
                    jax.profiler.start_trace(str(trace))
                begin = time.perf_counter()
                batch = to_device(next(batches), mesh) if given else one
                ready = time.perf_counter()
                state, metrics = compiled(state, batch, *teachers.params)
                # As while training: one step runs while the next is being fed.
                jax.block_until_ready(before if before is not None else metrics)
                before = metrics["loss"]
                if number >= _WARM:
                    times.append(time.perf_counter() - begin)
                    waited += ready - begin
            loss = float(before)
        finally:
            if trace is not None:
                jax.profiler.stop_trace()
            if loader is not None:
                loader.close()
    seconds = statistics.median(times) if not given else sum(times) / len(times)
    memory = compiled.memory_analysis()
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    peak = peak_flops()
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "batch": experiment.config.batch,
        "parameters": experiment.parameters(),
        "loss": loss,
        "seconds_a_step": seconds,
        "steps_per_second": 1 / seconds,
        "clips_per_second": experiment.config.batch / seconds,
        "gflops_a_clip": flops / experiment.config.batch / 1e9,
        "tflops_per_second": flops / seconds / 1e12,
        "mfu": flops / seconds / peak if peak else None,
        "memory_planned": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "memory_used": max(used) or None,
        "compile_seconds": cold,
        "cached_compile_seconds": cached,
        "input_wait": waited / sum(times) if given else None,
        "trace": None if trace is None else str(trace),
    }


def _compile(step, arguments: tuple):
    """Returns the compiled step, the seconds that took, and those of compiling it again, when the cache holds it."""
    lowered = step.lower(*arguments)
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        compiled = lowered.compile()
        times.append(time.perf_counter() - begin)
        jax.clear_caches()
    return compiled, *times


def _show(rows: list[dict]) -> None:
    # Configs run across: they are few, and a terminal is narrow.
    table = Table(title=f"train step, {rows[0]['devices']} × {rows[0]['device']}, {os.cpu_count()} host cores")
    table.add_column("")
    for row in rows:
        table.add_column(row["config"].rpartition("/")[2], justify="right")

    def line(name: str, text) -> None:
        table.add_row(name, *(text(row) for row in rows))

    line("mesh", lambda row: ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "one device")
    line("clips a step", lambda row: f"{row['batch']:,}")
    line("parameters, millions", lambda row: f"{row['parameters'] / 1e6:,.1f}")
    line("steps/s", lambda row: f"{row['steps_per_second']:.2f}")
    line("clips/s", lambda row: f"{row['clips_per_second']:,.1f}")
    line("GFLOPs a clip", lambda row: f"{row['gflops_a_clip']:,.2f}")
    line("TFLOP/s", lambda row: f"{row['tflops_per_second']:,.3g}")
    line("MFU of bfloat16's peak", lambda row: "peak unknown" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %")
    line("memory a device, planned, GB", lambda row: f"{row['memory_planned'] / 1e9:.2f}")
    line(
        "memory a device, most so far, GB",
        lambda row: f"{row['memory_used'] / 1e9:.2f}" if row["memory_used"] else "not told",
    )
    line("compiling, s", lambda row: f"{row['compile_seconds']:.1f}")
    line("compiling from the cache, s", lambda row: f"{row['cached_compile_seconds']:.1f}")
    line("waiting for input", lambda row: "drawn" if row["input_wait"] is None else f"{100 * row['input_wait']:.1f} %")
    Console().print(table)
    for row in rows:
        if row["trace"]:
            print(f"{row['config']}: profile in {row['trace']}; open it with xprof or https://ui.perfetto.dev")
