"""How long a step takes at least: arithmetic, main memory and interconnect, each at the speed of its data sheet."""

import dataclasses
import math
from collections.abc import Sequence

from vmm.planning.chips import Target
from vmm.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step that each part takes on its own.

    compute: FLOPs by peak. memory: bytes of main memory by its bandwidth. links: bytes sent within slices by their links.
    network: bytes sent between slices or nodes.
    """

    compute: float
    memory: float
    links: float
    network: float

    @property
    def step(self) -> float:
        """A step's seconds where all four overlap: the longest. A real step is between this and `apart`."""
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def apart(self) -> float:
        """A step's seconds where nothing overlaps."""
        return self.compute + self.memory + self.links + self.network

    @property
    def bound(self) -> str:
        """Which part holds the step: "compute", "memory", "links" or "network"."""
        parts = {"compute": self.compute, "memory": self.memory, "links": self.links, "network": self.network}
        return max(parts, key=parts.get)


def roofline(
    target: Target, flops: float, traffic: float, exchanges: Sequence[Collective], places: Sequence
) -> Roofline:
    """Returns the times of a step.

    Args:
      flops: of all devices together. traffic: bytes of main memory, one device. exchanges: of the program, one device.
      places: for each device, in the mesh's order, (slice or node, coordinates of its chip).

    An exchange over several sides of a torus uses the links of all; a side that closes to a ring gives two links, one
    that does not gives one, since its ring goes there and back over the same. What crosses slices goes over the
    network as far as each slice's parts meet there, and is spread over its devices first.
    """
    links = network = 0.0
    for one in exchanges:
        within, between = _split(one, places)
        links += one.count * within / link_speed(target, one, places)
        network += one.count * between / target.chip.network
    return Roofline(flops / target.devices / target.chip.peak, traffic / target.chip.bandwidth, links, network)


def link_speed(target: Target, one: Collective, places: Sequence) -> float:
    """Returns the bytes a second that one device can send in an exchange within its slice."""
    if not target.sides:
        return target.chip.link
    first = places[one.group[0]][0]
    coordinates = [places[at][1] for at in one.group if places[at][0] == first]
    rings, links = target.rings(), 0
    for side in range(len(target.sides)):
        if len({c[side] for c in coordinates}) > 1:
            links += 2 if rings[side] else 1
    if one.kind == "collective-permute":
        links = min(links, 1)
    return target.chip.link * max(links, 1)


def _split(one: Collective, places: Sequence) -> tuple[float, float]:
    """Bytes that a device sends within its slice, and between slices."""
    slices = len({places[at][0] for at in one.group})
    if slices == 1:
        return one.wire, 0.0
    mine = one.members // slices
    if one.kind == "collective-permute":
        return 0.0, one.wire
    twice = 2 if one.kind == "all-reduce" else 1
    within = twice * one.bytes * (mine - 1) / mine
    between = twice * one.bytes / mine * (slices - 1) / slices
    return within, between


def places(target: Target, devices: Sequence) -> list[tuple[int, tuple]]:
    """Returns for each device (slice or node, coordinates of its chip)."""
    if target.sides:
        return [(getattr(device, "slice_index", 0) or 0, tuple(device.coords)) for device in devices]
    return [(at // target.chips, ()) for at in range(len(devices))]


def clips_a_second(batch: int, seconds: float) -> float:
    """Returns clips/s, 0 where a step takes no time."""
    return batch / seconds if seconds and math.isfinite(seconds) else 0.0
