"""TPU slices by name: chips, shape, hosts, and what Cloud TPU and GKE call them.

v4, v5p and tpu7x slices are named by cores (two a chip), v5e and v6e by chips, as in Google's documents.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import NamedTuple

from shell import LaunchError

_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16"


class Generation(NamedTuple):
    """cores: in a chip. runtime: of Cloud TPU VMs ("" where only GKE has it). node: GKE's node label.
    machine: GKE's machine type, for so many chips a host. alone: chips of the largest one-host Cloud TPU VM.
    shapes: those that a size stands for."""

    cores: int
    runtime: str
    node: str
    machine: str
    alone: int
    shapes: str


GENERATIONS = {
    "v4": Generation(2, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu-{}t", 4, _CUBES),
    "v5litepod": Generation(1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-{}t", 8, _FLAT),
    "v5p": Generation(2, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-{}t", 4, f"{_CUBES} 16x16x16 16x16x24"),
    "v6e": Generation(1, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-{}t", 8, _FLAT),
    "tpu7x": Generation(2, "", "tpu7x", "tpu7x-standard-{}t", 4, f"{_CUBES} 16x16x16"),
}
ALIASES = {"v5e": "v5litepod", "v5lite": "v5litepod", "v7x": "tpu7x"}


class Slice(NamedTuple):
    """One slice. machines: hosts where Cloud TPU makes it; hosts, chips_per_host, machine: where GKE does."""

    name: str
    chips: int
    topology: str
    runtime: str
    machines: int
    hosts: int
    chips_per_host: int
    node: str
    machine: str


def find_slice(name: str, topology: str = "") -> Slice:
    """Returns the slice of a name such as v5e-16 (or v5litepod-16), v4-32, v5p-128, v6e-256.

    topology: another shape of as many chips, as 4x4x20.

    Raises:
      LaunchError: there is no such slice.
    """
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", name.lower())
    family = ALIASES.get(match[1], match[1]) if match else ""
    if family not in GENERATIONS:
        near = difflib.get_close_matches(match[1] if match else name, [*GENERATIONS, *ALIASES], n=1)
        hint = f"did you mean {near[0]}-…? " if near else ""
        raise LaunchError(f"accelerator {name!r}: unknown; {hint}known: {', '.join(GENERATIONS)}, each with -SIZE")
    kind, size = GENERATIONS[family], int(match[2])
    chips = size // kind.cores
    shapes = {math.prod(map(int, shape.split("x"))): shape for shape in kind.shapes.split()}
    if topology:
        axes = topology.split("x")
        if not all(axis.isdigit() for axis in axes) or len(axes) != len(kind.shapes.split()[0].split("x")):
            raise LaunchError(f"topology {topology!r}: write it as {shapes[max(shapes)]}")
        if math.prod(map(int, axes)) * kind.cores != size:
            raise LaunchError(f"topology {topology}: has not the {chips} chips of {name}")
    elif chips not in shapes or size % kind.cores:
        sizes = ", ".join(str(count * kind.cores) for count in sorted(shapes))
        raise LaunchError(f"accelerator {name!r}: {family} has no such size; known: {sizes}")
    chips_per_host = 1 if chips == 1 else 4
    return Slice(
        name=f"{family}-{size}",
        chips=chips,
        topology=topology or shapes[chips],
        runtime=kind.runtime,
        machines=1 if chips <= kind.alone else chips // 4,
        hosts=max(1, chips // 4),
        chips_per_host=chips_per_host,
        node=kind.node,
        machine=kind.machine.format(chips_per_host),
    )
