"""Equal compute: the width or depth at which a variant costs what the reference does."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from vmm.build import make
from vmm.errors import UserError, one_of
from vmm.experiment import Experiment
from vmm.sharding import place_batch
from vmm.training.metrics import count_flops

_MOST = 1 << 14  # the largest number of units that is tried


@dataclasses.dataclass(frozen=True)
class Match:
    """What is to be equal, and what is changed for it.

    what: "flops" (of a forward pass, a clip) or "parameters". by: "width", of every encoder and of the fusion alike,
    in multiples of their heads; or "depth", of the fusion. reference: the variant that stays; "": the first. tolerance:
    how far off a variant may be, as a share. step: width is a multiple of heads × step.
    """

    what: str
    by: str = "width"
    reference: str = ""
    tolerance: float = 0.05
    step: int = 1


class Matched(NamedTuple):
    """overrides: what makes the variant cost the same. cost, target: its cost and the reference's."""

    overrides: tuple[str, ...]
    cost: float
    target: float


def make_match(spec: str | Mapping, variants: Mapping) -> Match:
    """Returns the Match of a study's `match`: "flops", "parameters", or a group of fields; raises UserError."""
    match = make(Match, {"what": spec} if isinstance(spec, str) else spec, "match")
    for field, value, known in (
        ("what", match.what, ("flops", "parameters")),
        ("by", match.by, ("width", "depth")),
        ("reference", match.reference or next(iter(variants)), tuple(variants)),
    ):
        if value not in known:
            raise UserError(f"match.{field}: {value!r} is none; {one_of(value, known)}")
    if match.step < 1 or match.tolerance <= 0:
        raise UserError("match: step is at least 1 and tolerance above 0")
    return dataclasses.replace(match, reference=match.reference or next(iter(variants)))


def forward_flops(experiment: Experiment) -> float:
    """Returns the FLOPs of matrix products in a forward pass that predicts, a clip; traced, nothing runs."""
    mesh = experiment.make_mesh()
    batch = place_batch(experiment.batch_shapes(), mesh)
    params = experiment.program(mesh).shapes.params

    def forward(params, batch):
        return experiment.recipe.apply({"params": params}, batch, method="predict")

    with jax.set_mesh(mesh):
        return count_flops(jax.jit(forward), params, batch) / experiment.config.batch


def cost(config: Mapping, what: str) -> float:
    """Returns the parameters, or the forward FLOPs a clip, of a config."""
    experiment = Experiment(config)
    return float(experiment.parameters()) if what == "parameters" else forward_flops(experiment)


def match_variant(load: Callable[[tuple[str, ...]], dict], match: Match, target: float, name: str) -> Matched:
    """Returns the overrides that bring a variant's cost nearest to the target.

    Args:
      load: overrides → the variant's config with them. target: the reference's cost. name: for the error line.

    Raises:
      UserError: no width or depth is within the tolerance; tells the two nearest.
    """
    config = load(())
    start, scale = _units(config, match)
    found: dict[int, float] = {}

    def measured(units: int) -> float:
        if units not in found:
            found[units] = cost(load(scale(units)), match.what)
        return found[units]

    low, high = bracket(measured, target, start)
    for units in (low, high):
        measured(units)
    best = min((low, high), key=lambda units: (abs(found[units] - target), units != start))
    if abs(found[best] / target - 1) > match.tolerance:
        near = " or ".join(
            f"{found[units]:,.0f} ({found[units] / target - 1:+.1%}) with {', '.join(scale(units))}"
            for units in sorted({low, high})
        )
        raise UserError(
            f"variant {name}: no {match.by} gives {target:,.0f} {match.what} within {match.tolerance:.0%}: {near}; "
            f"raise match.tolerance, or match by {'depth' if match.by == 'width' else 'width'}"
        )
    return Matched(() if best == start else scale(best), found[best], target)


def bracket(measured: Callable[[int], float], target: float, start: int) -> tuple[int, int]:
    """Returns neighbours (n, n + 1) whose values of a rising function enclose the target; (1, 1) where all are above it.

    Raises:
      UserError: it stays below the target.
    """
    low, high = (start, start)
    while measured(high) < target:
        low, high = high, high * 2
        if high > _MOST:
            raise UserError(
                f"match: {measured(low):,.0f} is still below {target:,.0f} at {low} units of width or depth"
            )
    while measured(low) > target and low > 1:
        low, high = low // 2, low
    if low == high or measured(low) > target:
        return low, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measured(middle) <= target else (low, middle)
    return low, high


def _units(config: Mapping, match: Match) -> tuple[int, Callable[[int], tuple[str, ...]]]:
    """Returns how many units a config has, and units → overrides."""
    trunk = config["trunk"]
    if match.by == "depth":
        if "depth" not in trunk["fusion"]:
            raise UserError("match.by: the fusion has no depth (its layers are listed); match by width")
        return max(1, trunk["fusion"]["depth"]), lambda units: (f"trunk.fusion.depth={units}",)
    groups = {f"trunk.encoders.{name}": spec for name, spec in trunk["encoders"].items()}
    groups["trunk.fusion"] = trunk["fusion"]
    for where, spec in groups.items():
        if "width" not in spec or "heads" not in spec:
            raise UserError(f"match.by: {where} names no width and heads; give them, or match by depth")
    fusion = trunk["fusion"]
    start = max(1, round(fusion["width"] / (fusion["heads"] * match.step)))

    def scale(units: int) -> tuple[str, ...]:
        result = []
        for where, spec in groups.items():
            quantum = spec["heads"] * match.step
            result.append(f"{where}.width={max(1, round(spec['width'] / quantum * units / start)) * quantum}")
        return tuple(result)

    return start, scale
