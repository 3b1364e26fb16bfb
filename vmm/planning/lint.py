"""What of a compiled step is not as a well sharded one: each finding is one line that names the op or the parameter."""

import math
import re
from collections.abc import Mapping, Sequence

from vmm.build import class_of
from vmm.objectives import OBJECTIVES
from vmm.planning.collectives import Collective
from vmm.planning.expected import Expected

LARGE = 1_000_000  # bytes of a parameter that should not be whole on every device under FSDP
SMALL = 64 * 1024  # bytes of an activation that may be gathered


def embeddings(one: Collective, objectives: Mapping) -> bool:
    """Whether an exchange is of embeddings that an objective compares across the whole batch: its negatives."""
    found = re.search(r"objective_(\w+)", one.op)
    name = found.group(1) if found else ""
    return any(
        name.startswith(key) and class_of(OBJECTIVES, spec, f"objectives.{key}").across_batch
        for key, spec in objectives.items()
    )


def gathered_activations(exchanges: Sequence[Collective], objectives: Mapping) -> list[str]:
    """Every exchange that gathers, or passes round piece by piece, what is neither parameter nor gradient.

    Let be: embeddings of objectives that compare the whole batch, keys and values over `sequence`, at most 64 KiB.
    """
    lines = []
    for one in exchanges:
        if one.role != "activation" or one.kind not in ("all-gather", "collective-permute", "all-to-all"):
            continue
        if one.bytes <= SMALL or embeddings(one, objectives) or one.axes == ("sequence",):
            continue
        what = "is all-gathered" if one.kind == "all-gather" else f"is moved ({one.kind})"
        lines.append(
            f"activation {', '.join(one.shapes[:3])} {what} over {'+'.join(one.axes)}, {one.count:g} × "
            f"{one.bytes / 1e6:.2f} MB: {one.op or one.name} ({one.source or 'no source'})"
        )
    return lines


def thin_shards(exchanges: Sequence[Collective], mesh: Mapping[str, int]) -> list[str]:
    """A line where parameters are summed instead of gathered: shards thinner than a tile of 8 rows, which XLA pads with zeros."""
    whole = sum(one.total for one in exchanges)
    summed = sum(one.total for one in exchanges if one.kind == "all-reduce" and one.role == "parameter")
    if summed < whole / 10:
        return []
    return [
        f"parameters are gathered by sums of padded arrays, {summed / 1e9:.2f} GB at twice the bytes: shards of "
        f"fsdp={mesh.get('fsdp', 1)} are thinner than XLA's tiles; give some of it to mesh.data"
    ]


def replicated_parameters(parameters: Mapping[str, object], mesh: Mapping[str, int]) -> list[str]:
    """Every parameter above 1 MB that the fsdp axis does not split. parameters: path → shape with its sharding."""
    lines = []
    if mesh.get("fsdp", 1) == 1:
        return lines
    for path, leaf in parameters.items():
        axes = {axis for part in leaf.sharding.spec if part for axis in (part if isinstance(part, tuple) else (part,))}
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if size > LARGE and "fsdp" not in axes:
            lines.append(
                f"parameter {path} {list(leaf.shape)} ({size / 1e6:.1f} MB) is whole on every device of fsdp={mesh['fsdp']}"
            )
    return lines


def sent(exchanges: Sequence[Collective]) -> dict[str, float]:
    """Returns the bytes that a device sends in a step, by mesh axis ("data+fsdp" where a group spans both)."""
    result: dict[str, float] = {}
    for one in exchanges:
        name = "+".join(one.axes)
        result[name] = result.get(name, 0.0) + one.total
    return result


def ratios(exchanges: Sequence[Collective], expected: Expected) -> dict[str, dict[str, float]]:
    """Returns, by mesh axis and in all, bytes sent, bytes of the closed form, and the first by the second."""
    mine = sent(exchanges)
    axes = sorted({*mine, *expected.gathered, *expected.reduced, *expected.activations})
    result = {axis: {"sent": mine.get(axis, 0.0), "expected": expected.total(axis)} for axis in axes}
    if axes:
        result["all"] = {key: sum(row[key] for row in result.values()) for key in ("sent", "expected")}
    for row in result.values():
        row["ratio"] = row["sent"] / row["expected"] if row["expected"] else math.inf if row["sent"] else 1.0
    return result
