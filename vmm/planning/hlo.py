"""Reads XLA's text of a compiled program: computations, instructions, how often each runs. No JAX here."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

# Bytes of an element; what is not here (token, opaque) takes none.
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1, "f8e4m3b11fnuz": 1, "f8e4m3fnuz": 1, "f8e5m2fnuz": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result. space: of memory, 0 is the device's main memory (HBM)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        """Its size without padding."""
        return math.prod(self.dims) * _BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. arrays: of its result, the leaves of tuples in order. rest: the text after the operands."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    rest: str
    root: bool
    tuple: bool

    @property
    def bytes(self) -> float:
        """Size of its result."""
        return sum(array.bytes for array in self.arrays)

    def called(self) -> dict[str, list[str]]:
        """Computations that it runs: role → names ("calls", "body", "condition", "to_apply", "branch_computations")."""
        result = {}
        for role, several, one in _CALLED.findall(self.rest):
            result[role] = [name.strip().lstrip("%") for name in (several or one).split(",")]
        for role in ("true_computation", "false_computation"):
            for _, one in re.findall(rf"\b({role})=%?([\w.\-]+)", self.rest):
                result.setdefault("branch_computations", []).append(one)
        return result

    @property
    def op_name(self) -> str:
        """The path in the program that it comes from."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found.group(1).replace("\\'", "'") if found else ""


_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_INDEX = re.compile(r"/\*.*?\*/")


def _close(text: str, start: int) -> int:
    """Returns the place of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
            if not depth:
                return i
    raise ValueError(f"unbalanced: {text[start : start + 80]}")


def arrays(text: str) -> tuple[Array, ...]:
    """Reads a type: "f32[8,16]{1,0:T(8,128)S(1)}" or a tuple of such."""
    result = []
    for dtype, dims, layout in _ARRAY.findall(_INDEX.sub("", text)):
        if dtype in _BYTES or dtype in ("token", "opaque"):
            space = re.search(r"S\((\d+)\)", layout or "")
            sizes = tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
            result.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(result)


def _instruction(line: str) -> Instruction | None:
    head = _LINE.match(line)
    if not head:
        return None
    start = head.end()
    if line[start] == "(":
        end = _close(line, start) + 1
    else:
        end = line.find(" ", start)
    kind = line[start:end]
    opening = line.find("(", end)
    if opening < 0:
        return None
    opcode = line[end:opening].strip()
    closing = _close(line, opening)
    inside = line[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", _INDEX.sub("", inside)))
    if not operands and opcode not in ("parameter", "constant"):
        operands = tuple(part.strip().split(" ")[-1] for part in inside.split(",") if part.strip())
    return Instruction(
        head.group(2), opcode, arrays(kind), operands, inside, line[closing + 1 :], bool(head.group(1)), kind[0] == "("
    )


class Module:
    """A compiled program. computations: name → instructions in order. entry: the first one's name."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self.head = text[: text.find("\n")]
        self._frames = _frames(text)
        here, lines = None, []
        for line in text.split("\n"):
            if here is None:
                found = _HEAD.match(line)
                if found:
                    here, lines = found.group(2), []
                    self.entry = here if found.group(1) else self.entry
            elif line == "}":
                self.computations[here] = [i for i in map(_instruction, lines) if i]
                here = None
            elif _LINE.match(line):
                lines.append(line)
            elif lines:  # what a kernel says of itself may run over several lines
                lines[-1] += line
        self._by_name = {name: {i.name: i for i in body} for name, body in self.computations.items()}

    def find(self, computation: str, name: str) -> Instruction | None:
        """Returns the instruction of this name, None: there is none."""
        return self._by_name[computation].get(name)

    def root(self, computation: str) -> Instruction:
        """Returns what a computation gives back."""
        body = self.computations[computation]
        return next((i for i in body if i.root), body[-1])

    def source(self, instruction: Instruction) -> str:
        """Returns "file:line" of an instruction, "" where it is not said."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        if found:
            return self._frames.get(int(found.group(1)), "")
        file, line = (
            re.search(r'source_file="([^"]*)"', instruction.rest),
            re.search(r"source_line=(\d+)", instruction.rest),
        )
        return f"{file.group(1)}:{line.group(1) if line else ''}" if file else ""

    def trips(self, loop: Instruction) -> int:
        """Returns how often a while loop runs: as XLA knows it, else the bound in its condition; 1: not to be seen."""
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known.group(1))
        return self._bound(loop.called()["condition"][0]) or 1

    def _bound(self, condition: str) -> int | None:
        """The number that a loop's condition compares its counter with, through fusions; loops count from 0 by 1."""
        body = self.computations[condition]
        root = self.root(condition)
        if root.opcode not in ("compare", "fusion", "call"):
            return None
        direction = None
        names = [condition, *(name for i in body for called in i.called().values() for name in called)]
        constants = []
        for name in names:
            for i in self.computations.get(name, ()):
                if i.opcode == "compare":
                    found = re.search(r"direction=(\w+)", i.rest)
                    direction = found.group(1) if found else None
                if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.inside):
                    constants.append(int(i.inside))
        if not constants or direction not in ("LT", "LE", "GT", "GE", "NE"):
            return None
        return max(constants) + (direction in ("LE", "GE"))

    @functools.cached_property
    def times(self) -> dict[str, float]:
        """How often each computation runs in one run of the program; every branch of a conditional counts."""
        result = dict.fromkeys(self.computations, 0.0)
        result[self.entry] = 1.0
        for name in self._in_order():
            for i in self.computations[name]:
                for role, called in i.called().items():
                    if role == "to_apply" and i.opcode != "call":
                        continue  # of reductions: a number at a time
                    if i.opcode.endswith(("-update", "-done")):
                        continue  # named again by what ends an asynchronous start
                    for other in called:
                        if other in result:
                            trips = self.trips(i) if i.opcode == "while" else 1
                            result[other] += result[name] * (trips + (role == "condition"))
        return result

    def _in_order(self) -> Iterator[str]:
        """Computations, callers before what they call."""
        done, order = set(), []
        stack = [(self.entry, False)]
        while stack:
            name, left = stack.pop()
            if left:
                order.append(name)
            elif name not in done:
                done.add(name)
                stack.append((name, True))
                for i in self.computations[name]:
                    stack += [(o, False) for called in i.called().values() for o in called if o in self.computations]
        return reversed(order)

    def fused(self) -> set[str]:
        """Computations inside fusions: their values never reach memory."""
        result = {
            name for body in self.computations.values() for i in body if i.opcode == "fusion"
            for called in i.called().values() for name in called
        }  # fmt: skip
        return result


def _frames(text: str) -> Mapping[int, str]:
    """The tables of source lines at the head of newer texts: stack frame → "file:line"."""

    def table(name: str, pattern: str) -> dict[int, re.Match]:
        start = text.find(f"\n{name}\n")
        if start < 0:
            return {}
        end = text.find("\n\n", start)
        return {int(found.group(1)): found for found in re.finditer(pattern, text[start:end], re.M)}

    files = table("FileNames", r'^(\d+) "(.*)"')
    places = table("FileLocations", r"^(\d+) \{file_name_id=(\d+).*?\bline=(\d+)")
    frames = table("StackFrames", r"^(\d+) \{file_location_id=(\d+)")
    result = {}
    for number, frame in frames.items():
        place = places.get(int(frame.group(2)))
        file = files.get(int(place.group(2))) if place else None
        if file:
            result[number] = f"{file.group(2)}:{place.group(3)}"
    return result


# What moves no bytes of its own.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "optimization-barrier", "async-start", "async-update", "async-done",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}


def memory_traffic(module: Module) -> float:
    """Returns the bytes that a run reads from and writes to a device's main memory, loops multiplied out.

    Each instruction outside fusions reads its operands and writes its result; of an operand of which a fusion takes only
    slices, the slices are read, and what is updated in place is not written whole. Arrays in on-chip memory (TPU) and
    padding are left out.
    """
    fused, total = module.fused(), 0.0
    for name, times in module.times.items():
        if times and name not in fused:
            body = module.computations[name]
            total += times * sum(_traffic(module, name, i) for i in body)
    return total


def _traffic(module: Module, computation: str, i: Instruction) -> float:
    if i.opcode in _FREE or i.opcode.endswith("-done"):
        return 0.0
    if i.opcode == "custom-call" and re.search(r'custom_call_target="(AllocateBuffer|ConcatBitcast|Sharding)', i.rest):
        return 0.0
    read = [module.find(computation, operand) for operand in i.operands]
    sizes = [sum(a.bytes for a in operand.arrays if not a.space) if operand else 0.0 for operand in read]
    written = sum(a.bytes for a in i.arrays if not a.space)
    if i.opcode.endswith("-start"):  # results are (operand, result, state): each side once
        written = sum(a.bytes for a in i.arrays[len(i.arrays) // 2 :] if not a.space) if i.tuple else written
        if i.opcode == "copy-start":
            written = i.arrays[0].bytes if not i.arrays[0].space else 0.0
        return sum(sizes) + written
    if i.opcode in _SLICES:
        return written * (1 if all(not o or o.arrays and o.arrays[0].space for o in read[:1]) else 2)
    if i.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * sum(sizes[1:]) if len(sizes) > 1 else written
    if i.opcode == "fusion":
        inner = i.called()["calls"][0]
        sizes = [size and min(size, _sliced(module, inner, place) or size) for place, size in enumerate(sizes)]
        root = module.root(inner)
        roots = [module.find(inner, o) for o in root.operands] if root.opcode == "tuple" else [root]
        for result in roots:
            updated = _behind(module, inner, result)
            if updated and updated.opcode == "dynamic-update-slice":
                update = module.find(inner, updated.operands[1])
                whole = sum(a.bytes for a in updated.arrays)
                written -= whole - (update.bytes if update else 0)
                base = _behind(module, inner, module.find(inner, updated.operands[0]))
                if base and base.opcode == "parameter" and int(base.inside) < len(sizes):
                    sizes[int(base.inside)] = 0.0
    return sum(sizes) + max(written, 0.0)


def _behind(module: Module, computation: str, i: Instruction | None) -> Instruction | None:
    while i and i.opcode in ("bitcast", "reshape", "convert", "copy") and i.operands:
        i = module.find(computation, i.operands[0])
    return i


def _sliced(module: Module, computation: str, place: int) -> float | None:
    """Bytes of the slices that a fusion takes of its operand; None: it reads the whole."""
    body = module.computations[computation]
    parameter = next((i for i in body if i.opcode == "parameter" and i.inside == str(place)), None)
    if parameter is None:
        return None
    names, total = {parameter.name}, 0.0
    for i in body:  # in order: uses come after what they use
        if not names & set(i.operands):
            continue
        if i.opcode == "bitcast":
            names.add(i.name)
        elif i.opcode in _SLICES and i.operands[0] in names:
            total += i.bytes
        else:
            return None
    return total
