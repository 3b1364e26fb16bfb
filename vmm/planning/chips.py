"""Chips, from public data sheets, and the names of slices and nodes made of them. No JAX here."""

import dataclasses
import os
import re
from itertools import combinations_with_replacement

from vmm.errors import UserError, one_of
from vmm.training.peaks import peak_of

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it; `peak`: its dense bfloat16 FLOP/s.

    memory: bytes a program may use. bandwidth: of that memory, bytes/s. link: bytes/s of one
    interconnect link in one direction. axes: of the torus; 0: a switch, `link` is all that a device can send. network:
    bytes/s a device has of the network between slices or nodes. wraps: torus sides of a multiple of this close to a
    ring. cores: devices a chip. named: TensorCores that a slice's name counts for each chip. host: devices of a host.
    """

    kind: str
    memory: float
    bandwidth: float
    link: float
    axes: int
    network: float
    wraps: int = 0
    cores: int = 1
    named: int = 1
    host: int = 4
    nominal: float = 0.0  # FLOP/s of a device that no table knows

    @property
    def peak(self) -> float:
        return peak_of(self.kind) or self.nominal


# TPUs: the tables of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, memory bandwidth, "bidirectional ICI
# bandwidth per chip" / 2 / links, "DCN bandwidth per chip" (of v4 no figure is published: v5p's is taken; of v5e that of a
# pod, 6.4 Tbit/s, by 256). Memory is what libtpu 0.0.42 says that a program has when one does not fit: less than
# the sheet's. v5e and v6e close a ring only where a side is the pod's 16; v4, v5p and tpu7x where it is made of
# cubes of 4 × 4 × 4. A tpu7x chip is two devices, each with half of everything.
# GPUs: NVIDIA's H100 and H200 SXM data sheets (dense bfloat16; NVLink 900 GB/s both ways) and DGX's one 400 Gbit/s
# adapter a GPU; about 6 % of the memory is the driver's and the libraries'.
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 1200 * GB, 50 * GB, 3, 6.25 * GB, wraps=4, named=2),
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 819 * GB, 50 * GB, 2, 3.125 * GB, wraps=16),
    "v5p": Chip("TPU v5", 95.74 * GIB, 2765 * GB, 100 * GB, 3, 6.25 * GB, wraps=4, named=2),
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 1638 * GB, 100 * GB, 2, 12.5 * GB, wraps=16),
    "tpu7x": Chip("TPU7x", 94.75 * GIB, 3690 * GB, 50 * GB, 3, 6.25 * GB, wraps=4, cores=2, named=2, host=8),
    "h100": Chip("NVIDIA H100", 80 * GB * 0.94, 3350 * GB, 450 * GB, 0, 50 * GB, host=8),
    "h200": Chip("NVIDIA H200", 141 * GB * 0.94, 4800 * GB, 450 * GB, 0, 50 * GB, host=8),
}
ALIASES = {"v5litepod": "v5e", "v6litepod": "v6e", "v7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine that a step is planned for.

    name: as given. platform: "tpu", "cuda" or "cpu". chips: of one slice or node. sides: of a slice, in chips, () where a
    switch joins them. slices: slices, or nodes of GPUs.
    """

    name: str
    platform: str
    chip: Chip
    chips: int
    sides: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        """Devices in all, as JAX counts them."""
        return self.chips * self.chip.cores * self.slices

    @property
    def topology(self) -> str:
        """The slice's sides, as "4x8x8"."""
        return "x".join(map(str, self.sides))

    def rings(self) -> tuple[bool, ...]:
        """For each side, whether it closes to a ring."""
        return tuple(bool(self.chip.wraps) and side % self.chip.wraps == 0 for side in self.sides)

    def describe(self) -> str:
        """One line: what the name stands for."""
        each = f" of {self.chip.cores} devices" if self.chip.cores > 1 else ""
        if self.platform == "cpu":
            return f"{self.name}: {self.devices} virtual devices on this machine's CPU, by nominal speeds"
        if self.platform == "cuda":
            return f"{self.name}: {self.slices} node(s) of {self.chips} {self.chip.kind}"
        counted = ", a name that counts TensorCores" if self.chip.named > 1 and ":" not in self.name else ""
        times = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{self.name}{counted}: {times}{self.chips} {self.chip.kind} chips{each} in {self.topology}"


def parse_device(name: str, slices: int = 1) -> Target:
    """Returns the machine that a name stands for.

    v5e-256, v6e-16: chips. v4-512, v5p-512, tpu7x-512: TensorCores, two a chip, as Cloud TPU names slices. v5p:4x8x8: the
    sides themselves, in chips. h100-8, h200-8x4: GPUs a node, nodes. cpu-8: virtual devices on this machine.

    Raises:
      UserError: no such chip, or no slice of that size.
    """
    known = (
        "known: cpu-8, h100-8, h200-8x4, v4-512, v5e-256, v5p-512, v6e-256, tpu7x-128, or sides in chips, as v5p:4x8x8"
    )
    found = re.fullmatch(r"([a-z]\w*?)(?:-(\d+)(?:x(\d+))?|:(\d+(?:x\d+)+))", name.lower())
    if not found:
        raise UserError(f"device {name!r}: no such name; {known}")
    family, count, nodes, sides = found.groups()
    family = ALIASES.get(family, family)
    if slices < 1:
        raise UserError(f"slices: must be at least 1, got {slices}")
    if family == "cpu":
        if sides or nodes or not 1 <= int(count) <= 4096:
            raise UserError(f"device {name!r}: 1 to 4096 virtual devices, as cpu-8")
        return Target(name, "cpu", _cpu(int(count)), int(count), ())
    if family not in CHIPS:
        raise UserError(f"device {name!r}: no chip {family!r}; {one_of(family, [*CHIPS, 'cpu'])}; {known}")
    chip = CHIPS[family]
    if not chip.axes:
        if sides or not 1 <= int(count) <= chip.host:
            raise UserError(f"device {name!r}: 1 to {chip.host} GPUs a node, then nodes, as {family}-8x4")
        return Target(name, "cuda", chip, int(count), (), int(nodes or 1) * slices)
    if nodes:
        raise UserError(f"device {name!r}: sides are given after a colon, as {family}:4x4; several slices by --slices")
    if sides:
        shape = tuple(int(side) for side in sides.split("x"))
        if len(shape) > chip.axes or 0 in shape:
            raise UserError(f"device {name!r}: a slice of {family} has {chip.axes} sides")
        shape += (1,) * (chip.axes - len(shape))
    else:
        if int(count) % chip.named or not int(count):
            raise UserError(
                f"device {name!r}: {family} counts TensorCores, {chip.named} a chip; say {family}-{2 * int(count)}"
            )
        shape = _sides(int(count) // chip.named, chip)
        if shape is None:
            near = [n for n in range(1, 9217) if _sides(n, chip)]
            nearest = min(near, key=lambda n: abs(n - int(count) // chip.named))
            raise UserError(
                f"device {name!r}: no slice of {int(count) // chip.named} chips; the nearest is {family}-{nearest * chip.named}"
            )
    chips = 1
    for side in shape:
        chips *= side
    return Target(name, "tpu", chip, chips, shape, slices)


# Slices of fewer chips than one cube, or than a pod of v5e and v6e, are these alone.
_SMALL = {
    2: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)},
}  # fmt: skip


def _sides(chips: int, chip: Chip) -> tuple[int, ...] | None:
    """The most cubic slice of so many chips, None: there is none."""
    if chips in _SMALL[chip.axes] or chip.axes == 2:
        return _SMALL[chip.axes].get(chips)
    cubes, rest = divmod(chips, 64)
    if rest:
        return None
    most = 24 if chip.named > 1 else 16
    fits = [
        tuple(4 * n for n in sides)
        for sides in combinations_with_replacement(range(1, most // 4 + 1), 3)
        if sides[0] * sides[1] * sides[2] == cubes
    ]
    return min(fits, key=sum) if fits else None


def _cpu(devices: int) -> Chip:
    """A share of this machine: its memory is real, its speeds are only nominal."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    return Chip("CPU", memory, 10 * GB, 5 * GB, 0, 5 * GB, host=devices, nominal=1e11)
