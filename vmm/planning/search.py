"""The fastest that fits: batch, mesh, remat and accumulation, estimated for all, compiled for the best few."""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace

import flax.linen as nn
import jax

from vmm.build import plain
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.planning.advice import remat_of
from vmm.planning.chips import Target
from vmm.planning.expected import Expected, Use, closed_form, traced
from vmm.planning.plan import Plan, plan
from vmm.progress import progress
from vmm.sharding import AXES, partition


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run. rows: clips a device computes at once. remat: as in a config."""

    data: int
    fsdp: int
    tensor: int
    rows: int
    accumulate: int
    remat: bool | str

    @property
    def batch(self) -> int:
        """Clips of a step."""
        return self.rows * self.accumulate * self.data * self.fsdp

    def describe(self) -> str:
        """One line."""
        return (
            f"batch={self.batch} mesh.data={self.data} mesh.fsdp={self.fsdp} mesh.tensor={self.tensor} "
            f"optim.accumulate={self.accumulate} remat={self.remat}"
        )


# Activations kept, and FLOPs, by remat: of FACTS of ViT-L and ViT-B, for an estimate alone; what is compiled corrects it.
_KEPT = {True: 1.0, "full": 1.0, "products": 2.5, "offload": 1.0, False: 5.0}
_AGAIN = {True: 4 / 3, "full": 4 / 3, "products": 1.05, "offload": 1.05, False: 1.0}


def candidates(target: Target, batch: int, remats: Sequence[bool | str]) -> Iterator[Candidate]:
    """Yields every way to run: of the config's batch, and of powers of two of clips a device."""
    devices = target.devices
    for tensor in (n for n in (1, 2, 4, 8) if devices % n == 0):
        for fsdp in (n for n in range(1, devices // tensor + 1) if devices // tensor % n == 0):
            data = devices // tensor // fsdp
            if data % target.slices:
                continue
            split = data * fsdp
            whole = [batch // split] if batch % split == 0 else []
            for rows in sorted({*whole, *(2**n for n in range(9))}):
                for accumulate, remat in itertools.product((1, 2, 4, 8), remats):
                    if rows % accumulate == 0:
                        yield Candidate(data, fsdp, tensor, rows // accumulate, accumulate, remat)


class Estimator:
    """How much memory and time a candidate takes, from one plan that was compiled and closed forms.

    Bytes of temporaries and of traffic grow with a device's clips; exchanges are those that must be. `kept` corrects
    temporaries by what was measured since.
    """

    def __init__(self, base: Plan, experiment: Experiment):
        boxed = jax.tree.leaves(experiment.shapes, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
        self.base, self.kept = base, 1.0
        self.names = [leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim for leaf in boxed]
        shapes = nn.unbox(experiment.shapes)
        self.shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(shapes)]
        teacher = shapes if experiment.optim.ema else ()
        self.found: list[Use] = traced(experiment.loss(), shapes, teacher, experiment.batch_shapes())
        self.copies = 3 + bool(experiment.optim.ema)
        remats = [value for _, value in remat_of(base.config)]
        self.remat = remats[0] if remats and all(value == remats[0] for value in remats) else False

    def memory(self, one: Candidate) -> float:
        """Bytes of a device."""
        state = 4 * self.copies * self.base.parameters / (one.fsdp * one.tensor)
        gathered = 2 * 4 * max(map(math.prod, self.shapes)) / one.tensor
        return state + gathered + self.temporaries(one) + self.base.memory.program

    def temporaries(self, one: Candidate) -> float:
        """Of these, what grows with the clips."""
        base = self.base
        rows = base.batch / (base.mesh["data"] * base.mesh["fsdp"]) / base.accumulate
        a_clip = base.memory.temporaries / rows * base.mesh["tensor"]
        return self.kept * a_clip * one.rows / one.tensor * _KEPT[one.remat] / _KEPT[self.remat]

    def seconds(self, one: Candidate) -> float:
        """Of a step at least."""
        base, chip = self.base, self.base.target.chip
        again = _AGAIN[one.remat] + (1 / 3 if one.accumulate > 1 else 0)
        compute = base.model_flops * one.batch / base.batch * again / base.target.devices / chip.peak
        rows = one.batch / (one.data * one.fsdp)
        base_rows = base.batch / (base.mesh["data"] * base.mesh["fsdp"])
        traffic = base.traffic * rows / base_rows / one.tensor * base.mesh["tensor"]
        state = 4 * 2 * self.copies * base.parameters / (one.fsdp * one.tensor)
        links = self._links(one)
        return max(compute, (traffic + state) / chip.bandwidth, links)

    def _links(self, one: Candidate) -> float:
        target = self.base.target
        sizes = dict.fromkeys(AXES, 1) | {"data": one.data, "fsdp": one.fsdp, "tensor": one.tensor}
        mesh, split = SimpleNamespace(shape=sizes), []
        for names, shape in zip(self.names, self.shapes):
            spec = partition(names, shape, mesh)
            parts = {at: part if isinstance(part, tuple) else (part,) for at, part in enumerate(spec) if part}
            split.append(parts)
        needed: Expected = closed_form(self.found, self.shapes, split, sizes, one.batch / self.base.batch)
        axes = {*needed.gathered, *needed.reduced, *needed.activations}
        seconds = 0.0
        for axis in axes:
            n = math.prod(sizes[part] for part in axis.split("+"))
            seconds += needed.total(axis) / (target.chip.link * self._ports(n))
            if target.slices > 1 and "data" in axis:
                seconds += needed.total(axis) / n / target.chip.network
        return seconds * max(1, one.accumulate)

    def _ports(self, n: int) -> int:
        """Links that an axis of n devices can use: those of as many sides of the torus as it takes."""
        target, ports, covered = self.base.target, 0, 1
        for side, ring in sorted(zip(target.sides, target.rings()), reverse=True):
            if covered < n:
                ports += 2 if ring else 1
                covered *= side
        return max(ports, 1)


def apply(config: Mapping, one: Candidate) -> dict:
    """Returns the config run as a candidate."""
    result = _with_remat(plain(config), one.remat)
    result["batch"] = one.batch
    result["mesh"] = dict(data=one.data, fsdp=one.fsdp, tensor=one.tensor)
    result["optim"] = {**result.get("optim", {}), "accumulate": one.accumulate}
    return result


def _with_remat(value, remat):
    if not isinstance(value, Mapping):
        return value
    result = {key: _with_remat(item, remat) for key, item in value.items()}
    if "remat" in result or "scan" in result:
        result["remat"] = remat
    return result


def search(
    config: Mapping, target: Target, *, minutes: float = 20.0, tries: int = 4, quick: bool = False
) -> tuple[Plan, list[Plan]]:
    """Returns the fastest plan that fits (by clips/s), or the config's own where none does, and all that were compiled.

    Compiles the config as it is, estimates all others from it, and compiles at most `tries` of those with most clips/s that
    should fit, while `minutes` last; each corrects the estimate of memory. A line on stderr says where it is.
    """
    with progress("compiling plans") as tell:
        return _search(config, target, minutes, tries, quick, tell)


def _search(
    config: Mapping, target: Target, minutes: float, tries: int, quick: bool, tell: Callable[..., None]
) -> tuple[Plan, list[Plan]]:
    end = time.monotonic() + 60 * minutes
    say = _teller()
    tell(0, 1 + tries)
    say("compiling the config as it is")
    experiment = Experiment(plain(config))
    base = plan(_calibrating(config, experiment, target), target, quick)
    estimator = Estimator(base, experiment)
    able = {True, "products", False} if list(remat_of(config)) else {estimator.remat}
    every = list(candidates(target, experiment.config.batch, sorted(able, key=str)))
    compiled: list[Plan] = [base]
    done: set[Candidate] = set()
    for turn in range(1, tries + 1):
        fits = [one for one in every if one not in done and estimator.memory(one) <= 0.9 * target.chip.memory]
        if not fits:
            break
        if time.monotonic() + base.seconds > end:
            say(f"{minutes:g} minutes are over")
            break
        rates = {one: one.batch / estimator.seconds(one) for one in fits}
        near = [one for one in fits if rates[one] >= 0.98 * max(rates.values())]
        best = min(near, key=lambda one: (one.batch, one.accumulate, -rates[one]))  # no larger a batch than it takes
        known = max((p.clips for p in compiled if p.fits), default=0.0)
        if rates[best] <= 1.02 * known:
            say("nothing left that should be faster")
            break
        done.add(best)
        say(f"{len(every)} ways, {len(fits)} should fit; compiling {turn}/{tries}: {best.describe()}")
        tell(turn, 1 + tries)
        try:
            found = plan(apply(config, best), target, quick)
        except UserError as error:  # heads that do not divide over tensor, and the like
            say(str(error))
            continue
        compiled.append(found)
        guessed = estimator.temporaries(best)
        estimator.kept *= min(4.0, max(0.25, found.memory.temporaries / guessed)) if guessed else 1.0
    good = [p for p in compiled if p.fits]
    return max(good, key=lambda p: p.clips) if good else base, compiled


def _calibrating(config: Mapping, experiment: Experiment, target: Target) -> dict:
    """The config itself, with a mesh and a batch that fit the devices where its own do not."""
    result = plain(config)
    if isinstance(result.get("mesh"), Mapping):
        fixed = math.prod(size for size in dataclasses.astuple(experiment.mesh) if size != -1)
        if target.devices % fixed or (-1 not in dataclasses.astuple(experiment.mesh) and fixed != target.devices):
            result["mesh"] = dict(data=target.slices, fsdp=-1)
    parts = result.get("optim", {}).get("accumulate", 1) * target.devices
    if result["batch"] % parts:
        result["batch"] = max(1, round(result["batch"] / parts)) * parts
    return result


def _teller():
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"search [{time.monotonic() - began:.0f} s] {text}", file=sys.stderr, flush=True)

    return say
