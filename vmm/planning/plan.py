"""A config and a machine → what its train step takes there: compiled ahead of time, counted, held against data sheets."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from vmm.build import plain
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.planning import lint
from vmm.planning.advice import advise
from vmm.planning.chips import Target
from vmm.planning.collectives import Collective, collectives
from vmm.planning.expected import expect
from vmm.planning.hlo import Module, memory_traffic
from vmm.planning.roofline import Roofline, clips_a_second, places, roofline
from vmm.planning.topology import devices
from vmm.sharding import check_batch, place_batch
from vmm.training.metrics import count_flops
from vmm.training.optim import path_of


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. parameters … batch: what the step is given, without padding; padding: what XLA adds to it.

    temporaries: activations, gathered parameters, gradients: all that lives within the step. program: its code. host: what
    is kept in the host's memory instead. available: what a program may use.
    """

    parameters: float
    optimizer: float
    average: float
    rest: float
    batch: float
    padding: float
    temporaries: float
    program: float
    host: float
    available: float

    @property
    def peak(self) -> float:
        """All that lies in the device's memory at once, at most."""
        return self.state + self.temporaries + self.program

    @property
    def state(self) -> float:
        """What lies there before the step begins."""
        return self.parameters + self.optimizer + self.average + self.rest + self.batch + self.padding


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found. flops: of a step as computed; model_flops: without what remat computes again. traffic: bytes of main
    memory, one device. exchanges: () where the step does not fit. seconds, processor: of tracing and compiling, as a clock and
    as all threads count them. whole: False: the program did
    not compile for want of memory, and only what needs no program is known.
    """

    target: Target
    config: Mapping
    mesh: dict[str, int]
    batch: int
    accumulate: int
    steps: int
    parameters: int
    memory: Memory
    flops: float
    model_flops: float
    traffic: float
    exchanges: tuple[Collective, ...]
    times: Roofline
    ratios: dict
    findings: tuple[str, ...]
    advice: tuple[str, ...]
    seconds: float
    processor: float
    whole: bool

    @property
    def fits(self) -> bool:
        """Whether the step fits the device's memory."""
        return self.whole and self.memory.peak <= self.memory.available

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation that the roofline allows at most (MFU bound)."""
        return self.model_flops / self.target.devices / self.target.chip.peak / self.times.step

    @property
    def clips(self) -> float:
        """Clips a second at most."""
        return clips_a_second(self.batch, self.times.step)

    @property
    def days(self) -> float:
        """Days that all steps of the config take at least."""
        return self.times.step * self.steps / 86400


def plan(config: Mapping, target: Target, quick: bool = False, keep: Path | None = None) -> Plan:
    """Compiles the config's train step for the target and returns what it takes there.

    Args:
      config: as vmm.build.load_config gives it. target: see chips.parse_device; topology.prepare was called for it.
      quick: let XLA try less: a third of the time, more memory and traffic than those of the program that will run.
      keep: file that gets the compiled program as XLA's text.

    Raises:
      UserError: the config is wrong, its batch or mesh does not fit the devices, or the compiler knows no such machine.
    """
    config = plain(config)
    experiment = Experiment(config)
    c = experiment.config
    for name, view in c.views.items():
        if isinstance(view.get("teacher"), str):
            raise UserError(f"views.{name}.teacher: a step with another model's folder cannot be planned; leave it out")
    there = devices(target)
    mesh = experiment.make_mesh(there, int(target.chip.memory))
    check_batch(c.batch, mesh, experiment.optim.accumulate)
    program = experiment.program(mesh)
    batch = place_batch(experiment.batch_shapes(), mesh)
    more = {"memory": program.shapes.memory} if program.shapes.memory else {}
    expected = expect(
        experiment.loss(), program.shapes.params, program.shapes.ema, experiment.batch_shapes(), mesh, more
    )
    with jax.set_mesh(mesh):
        flops = count_flops(program.step, program.shapes, batch)
    model_flops = _model_flops(config, mesh, flops)
    began, spent = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        compiled, needed = _compile(program.step.lower(program.shapes, batch), quick)
    seconds, processor = time.perf_counter() - began, time.process_time() - spent
    sizes = {axis: int(size) for axis, size in mesh.shape.items()}
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(program.shapes.params)[0]}
    findings = lint.replicated_parameters(leaves, sizes)
    exchanges, traffic, ratios = (), 0.0, {}
    if compiled is not None:
        text = compiled.as_text()
        if keep:
            keep.write_text(text, encoding="utf-8")
        module = Module(text)
        exchanges = tuple(collectives(module, sizes, [_split(leaf, sizes) for leaf in leaves.values()]))
        traffic = memory_traffic(module)
        ratios = lint.ratios(exchanges, expected)
        findings += lint.gathered_activations(exchanges, c.objectives) + lint.thin_shards(exchanges, sizes)
        if ratios and not 0.5 <= ratios["all"]["ratio"] <= 2:
            findings.append(
                f"devices send {ratios['all']['sent'] / 1e9:.3g} GB a step, {ratios['all']['ratio']:.2f} × the closed form"
            )
    memory = _memory(program.shapes, batch, compiled, needed, target)
    times = roofline(target, flops, traffic, exchanges, places(target, mesh.devices.flat))
    result = Plan(
        target, config, sizes, c.batch, experiment.optim.accumulate, c.steps, experiment.parameters(), memory, flops,
        model_flops, traffic, exchanges, times, ratios, tuple(findings), (), seconds, processor, compiled is not None,
    )  # fmt: skip
    return dataclasses.replace(result, advice=tuple(advise(result)))


def _compile(lowered, quick: bool):
    """Returns (the program, None), or where it does not fit (None, bytes that it needs)."""
    cached, level = jax.config.jax_enable_compilation_cache, jax.config.jax_optimization_level
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from a cache says nothing of its memory
    if quick:
        jax.config.update("jax_optimization_level", "O1")
    try:
        return lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise UserError(f"XLA cannot compile this step: {text.splitlines()[0][:300]}") from None
        return None, needed_bytes(text)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        jax.config.update("jax_optimization_level", level)


def needed_bytes(text: str) -> float:
    """Reads how much memory XLA says that a program needs, 0 where it does not say."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for pattern in (r"\(([\d.]+)([KMGT])\) exceeds available", r"Used ([\d.]+)([KMGT]) of"):
        found = re.search(pattern, text)
        if found:
            return float(found.group(1)) * unit[found.group(2)]
    return 0.0


def _memory(state, batch, compiled, needed: float | None, target: Target) -> Memory:
    """Splits what a device holds; of a program that did not compile, what XLA says that it needs."""
    parts, host = {}, 0.0
    for name, tree in zip(("parameters", "optimizer", "average"), (state.params, state.optimizer, state.ema)):
        parts[name], away = _held(tree)
        host += away
    rest = [value for name, value in state._asdict().items() if name not in ("params", "optimizer", "ema")]
    parts["rest"], parts["batch"] = _held(rest)[0], _held(batch)[0]
    if compiled is None:
        temporaries = max(needed or 0.0, target.chip.memory)
        return Memory(
            **parts, padding=0.0, temporaries=temporaries, program=0.0, host=host, available=target.chip.memory
        )
    stats = compiled.memory_analysis()
    given = stats.argument_size_in_bytes
    # Outputs lie where the old state lay (donated); what does not is new.
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(
        **parts, padding=max(given - sum(parts.values()), 0.0), temporaries=stats.temp_size_in_bytes + max(new, 0),
        program=stats.generated_code_size_in_bytes, host=host, available=target.chip.memory,
    )  # fmt: skip


def _held(tree) -> tuple[float, float]:
    """Bytes of a tree of placed shapes on one device, and in its host's memory."""
    here = host = 0.0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            continue
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if leaf.sharding.memory_kind == "pinned_host":
            host += size
        else:
            here += size
    return here, host


def _split(leaf, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], dict[int, int]]:
    """A parameter's shape, and dimension → devices that split it."""
    parts = {
        at: int(np.prod([sizes[axis] for axis in (part if isinstance(part, tuple) else (part,))]))
        for at, part in enumerate(leaf.sharding.spec) if part
    }  # fmt: skip
    return tuple(leaf.shape), parts


def without_remat(value):
    """Returns a config that computes nothing twice."""
    if isinstance(value, Mapping):
        return {key: False if key == "remat" else without_remat(item) for key, item in value.items()}
    return value


def _model_flops(config: Mapping, mesh, flops: float) -> float:
    """FLOPs of the step without what is computed again for the gradient."""
    accumulate = config.get("optim", {}).get("accumulate", 1)
    stripped = without_remat(config) | {"optim": {**config.get("optim", {}), "accumulate": 1}}
    if stripped == config or (stripped == config | {"optim": stripped["optim"]} and accumulate == 1):
        return flops
    experiment = Experiment(stripped)
    program = experiment.program(mesh)
    batch = place_batch(experiment.batch_shapes(), mesh)
    with jax.set_mesh(mesh):
        return count_flops(program.step, program.shapes, batch)


def grouped(plan: Plan) -> list[dict]:
    """Returns the exchanges of a plan by kind, axes and what they are of, most bytes first."""
    rows: dict[tuple, dict] = {}
    for one in plan.exchanges:
        role = one.role
        if role == "activation" and lint.embeddings(one, plan.config["objectives"]):
            role = "embedding"
        row = rows.setdefault(
            (one.kind, one.axes, role),
            {"kind": one.kind, "axes": list(one.axes), "of": role, "count": 0.0, "bytes": 0.0, "members": one.members},
        )
        row["count"] += one.count
        row["bytes"] += one.total
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def as_json(plan: Plan, every: Sequence[Plan] = ()) -> dict:
    """Returns a plan as numbers, strings and lists: bytes, seconds, FLOPs. every: others that a search compared."""
    memory = dataclasses.asdict(plan.memory)
    return {
        "device": plan.target.name,
        "machine": plan.target.describe(),
        "chips": plan.target.chips * plan.target.slices,
        "devices": plan.target.devices,
        "slices": plan.target.slices,
        "topology": plan.target.topology,
        "mesh": plan.mesh,
        "batch": plan.batch,
        "accumulate": plan.accumulate,
        "steps": plan.steps,
        "parameters": plan.parameters,
        "fits": plan.fits,
        "memory": {**memory, "state": plan.memory.state, "peak": plan.memory.peak},
        "flops": {"step": plan.flops, "model": plan.model_flops, "a_clip": plan.model_flops / plan.batch},
        "memory_traffic": plan.traffic,
        "collectives": [
            {**dataclasses.asdict(one), "wire": one.wire, "total": one.total, "group": len(one.group)}
            for one in sorted(plan.exchanges, key=lambda one: -one.total)
        ],
        "collectives_by_kind": grouped(plan),
        "closed_form": {
            axis: {k: None if math.isinf(v) else v for k, v in row.items()} for axis, row in plan.ratios.items()
        },
        "roofline": {**dataclasses.asdict(plan.times), "bound": plan.times.bound},
        "step_seconds": plan.times.step,
        "step_seconds_without_overlap": plan.times.apart,
        "mfu_bound": plan.utilisation,
        "clips_per_second": plan.clips,
        "days": plan.days,
        "compile_seconds": plan.seconds,
        "compile_processor_seconds": plan.processor,
        "lint": list(plan.findings),
        "advice": list(plan.advice),
        "searched": [as_json(other) for other in every],
    }
