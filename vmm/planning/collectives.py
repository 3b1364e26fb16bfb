"""Every exchange between devices in a compiled program: kind, bytes, how often, over which mesh axis, of what."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vmm.errors import UserError
from vmm.planning.hlo import Array, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")  # fmt: skip

# What a value was made from: parameters (and their average) alone, or also the batch, or the rest of the state.
PARAMETER, BATCH, STATE = 1, 2, 4


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of a program.

    kind: one of KINDS. axes: of the mesh, that its groups span. members: of a group. shapes: of what a device puts in.
    bytes: of the whole, once: what is gathered, reduced or passed on, as one device sees it. count: how often a
    step runs it. role: "parameter" (gathered), "gradient" (reduced), "activation", or "scalar" (numbers, and one a clip).
    group: flat positions in the mesh of one group (of one chain of neighbours, for a permute). op, source: where it
    comes from.
    """

    kind: str
    axes: tuple[str, ...]
    members: int
    shapes: tuple[str, ...]
    bytes: float
    count: float
    role: str
    group: tuple[int, ...]
    name: str
    op: str
    source: str

    @property
    def wire(self) -> float:
        """Bytes that a device sends in one run of it, by the ring algorithms: (n − 1) / n of the whole; all-reduce twice."""
        share = (self.members - 1) / self.members if self.members else 0.0
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)

    @property
    def total(self) -> float:
        """Bytes that a device sends in a step."""
        return self.wire * self.count


def collectives(module: Module, mesh: Mapping[str, int], parameters: Sequence = ()) -> list[Collective]:
    """Returns every exchange of a program, once for each place in its text.

    Args:
      module: from XLA's text.
      mesh: axis → devices, in the order that the program's partitions count in.
      parameters: (shape, {dimension: devices}) of each parameter, to know gradients by.

    Between slices TPUs hand arrays to their hosts: a `send` that names an exchange among slices is one of a device of each.
    An asynchronous one is its start; a TPU's, which fusions carry on, is one for all that share its channel; a reduction
    within an `all-reduce-scatter` fusion is a reduce-scatter.
    """
    made = origins(module)
    shapes = set(itertools.chain.from_iterable(_keys(shape, split) for shape, split in parameters))
    found: dict[tuple, Collective] = {}
    for computation, times in module.times.items():
        if not times:
            continue
        for i in module.computations[computation]:
            kind = i.opcode.removesuffix("-start")
            if i.opcode == "send":
                between = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.rest)
                kind = between.group(1).lower().replace("_", "-") if between else ""
            if kind not in KINDS:
                continue
            one = _collective(module, mesh, computation, i, kind, times, made, shapes)
            channel = re.search(r"channel_id=(\d+)", i.rest)
            key = (computation, i.name)
            if "chain_id=" in i.rest and channel:
                key = ("channel", channel.group(1))
            other = found.get(key)
            if other:  # one step of the same exchange: what goes in is plain in its first
                role = "parameter" if "parameter" in (one.role, other.role) else other.role
                one = dataclasses.replace(other, role=role, count=max(one.count, other.count))
            found[key] = one
    return [one for one in found.values() if one.members > 1]


def _collective(module, mesh, computation, i: Instruction, kind, times, made, shapes) -> Collective:
    inputs = [module.find(computation, name) for name in i.operands[: 1 if i.opcode == "send" else None]]
    arrays = [array for operand in inputs if operand for array in operand.arrays] or list(i.arrays)
    group, axes = _between(i, mesh) if i.opcode == "send" else _group(i, mesh)
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"
    size = sum(array.bytes for array in arrays) * (len(group) if kind == "all-gather" else 1)
    origin = 0
    for name in i.operands:
        origin |= made.get((computation, name), BATCH)
    matrices = any(len(_key(array.dims)) > 1 for array in arrays)
    pieces = all(_piece(array.dims, shapes) for array in arrays)
    # What is summed over axes that split the batch alone is a gradient, whatever shape XLA has padded it to.
    summed = kind in ("all-reduce", "reduce-scatter") and not {"tensor", "sequence"} & set(axes)
    if origin in (0, PARAMETER):
        role = "parameter"
    elif _mostly(arrays, shapes) or (summed and matrices) or (kind == "collective-permute" and pieces):
        role = "gradient"
    elif not matrices:
        role = "scalar"
    else:
        role = "activation"
    described = tuple(f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in arrays)
    return Collective(kind, axes, len(group), described, size, times, role, group, i.name, i.op_name, module.source(i))


def _between(i: Instruction, mesh: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """One device of each slice, and the axis that goes over slices: the first (sharding.make_mesh)."""
    found = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', i.rest)
    slices = 0
    for part in found.group(1).split(",") if found else ():
        first, _, last = part.partition(":")
        slices += int(last or first) - int(first) + 1
    step = math.prod(mesh.values()) // max(slices, 1)
    return tuple(range(0, slices * step, step)), tuple(mesh)[:1]


def _mostly(arrays: Sequence[Array], shapes: set) -> bool:
    """Whether more than half of the bytes have the shape of a parameter (XLA puts many small reductions into one)."""
    whole = sum(array.bytes for array in arrays)
    return sum(array.bytes for array in arrays if _key(array.dims) in shapes) > whole / 2


def _piece(dims: Sequence[int], shapes: set) -> bool:
    """Whether it is rows of a parameter's shard: XLA reduces in whole tiles of 8 or 16 rows and moves what is beyond a shard after."""
    key = _key(dims)
    for at, size in enumerate(key):
        rest = list(key[:at] + key[at + 1 :])
        for shape in shapes if rest else ():
            if len(shape) == len(key):
                left = [n for n in shape if n not in rest] or [max(shape)]
                if sorted([*rest, left[0]]) == list(shape) and size < left[0] + 16:
                    return True
    return False


def _key(dims: Sequence[int]) -> tuple:
    return tuple(sorted(dim for dim in dims if dim > 1))


def _keys(shape: Sequence[int], split: Mapping[int, int]) -> Iterator[tuple]:
    """The shapes in which a parameter or its gradient may appear: a layer of it, parts of it, neighbouring axes merged."""
    choices = [{size, size // split.get(at, 1)} for at, size in enumerate(shape)]
    for dims in itertools.product(*choices):
        for start in range(min(2, len(dims))):  # whole, or one layer of a stack
            kept = dims[start:]
            for cuts in itertools.product((False, True), repeat=max(0, len(kept) - 1)):
                merged, last = [], kept[0]
                for dim, cut in zip(kept[1:], cuts):
                    merged, last = ([*merged, last], dim) if cut else (merged, last * dim)
                yield _key([*merged, last])


def groups(text: str, devices: int) -> list[tuple[int, ...]]:
    """Reads replica_groups or source_target_pairs of an instruction's text; the pairs as they are.

    Known forms: {{0,1},{2,3}}; {} for all; [4,8]<=[32] and [4,8]<=[8,4]T(1,0), the numbers counted up in one shape,
    transposed and cut anew; mesh['a'=4,'b'=8] {'a'}, those that differ along a.

    Raises:
      UserError: another form.
    """
    found = re.search(r"(?:replica_groups|source_target_pairs)=(\{(?:\{[\d,]*\},?)*\})", text)
    if found:
        parts = re.findall(r"\{([\d,]+)\}", found.group(1))
        return [tuple(int(n) for n in part.split(",")) for part in parts] or [tuple(range(devices))]
    found = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found:
        return [tuple(row) for row in _iota(*found.groups()).tolist()]
    # mesh[axes], device_ids=([counted]T(order)) {axes of a group}: numbers counted up, transposed, laid out as the mesh.
    numbers = r"(?:,? ?device_ids=\(?\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?\)?)?"
    found = re.search(r"replica_groups=mesh\[([^\]]*)\]" + numbers + r" ?\{([^}]*)\}", text)
    if found:
        axes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", found.group(1))]
        ids = np.arange(math.prod(size for _, size in axes))
        if found.group(2):
            ids = _iota(found.group(2), found.group(3) or found.group(2), found.group(4)).reshape(-1)
        # A part of an axis, 'a':(2)4, is an axis of its own: 2 before it, 4 in it.
        shape, along = [], []
        wanted = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found.group(5))
        for name, size in axes:
            part = next((w for w in wanted if w[0] == name), None)
            if part and part[1]:
                before, inside = int(part[1]), int(part[2])
                shape += [before, inside, size // before // inside]
                along.append(len(shape) - 2)
            else:
                shape.append(size)
                along += [len(shape) - 1] if part else []
        grid = ids.reshape(shape)
        rest = [at for at in range(len(shape)) if at not in along]
        count = math.prod(shape[at] for at in along)
        return [tuple(row) for row in grid.transpose(*rest, *along).reshape(-1, count).tolist()]
    if "replica_groups=" in text:
        form = re.search(r"replica_groups=.{0,80}", text).group(0)
        raise UserError(f"this version of XLA writes groups of devices in a form that is not known yet: {form}")
    return [tuple(range(devices))]


def _iota(shape: str, counted: str, order: str | None) -> np.ndarray:
    sizes = [int(n) for n in counted.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    if order:
        ids = ids.transpose([int(n) for n in order.split(",")])
    rows = [int(n) for n in shape.split(",")]
    return ids.reshape(rows[0], -1) if len(rows) > 1 else ids.reshape(1, -1)


def _group(i: Instruction, mesh: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """One group of an exchange, and the mesh axes along which its members differ."""
    sizes = tuple(mesh.values())
    all_ = groups(i.rest, math.prod(sizes))
    if "source_target_pairs=" in i.rest:
        places = np.array(np.unravel_index(np.array(all_), sizes))  # axis, pair, end
        differ = [bool((places[at, :, 0] != places[at, :, 1]).any()) for at in range(len(sizes))]
        first = all_[0][0]
        coordinates = np.unravel_index(first, sizes)
        line = np.ix_(*[range(n) if d else [c] for n, d, c in zip(sizes, differ, coordinates)])
        group = tuple(np.arange(math.prod(sizes)).reshape(sizes)[line].reshape(-1).tolist())
    else:
        group = all_[0]
        places = np.array(np.unravel_index(np.array(group), sizes))
        differ = [len(set(row)) > 1 for row in places.tolist()]
    return group, tuple(name for name, d in zip(mesh, differ) if d)


# ---- what a value was made from ----------------------------------------------------------------------


def origins(module: Module) -> dict[tuple[str, str], int]:
    """Returns (computation, instruction) → what its value was made from: any of PARAMETER, BATCH, STATE; 0: constants.

    Arguments are known by the names that JAX gives them: state.params, state.ema and others of a third argument are
    parameters, the rest of state is STATE, all else BATCH. Tuples are followed element by element, loops until
    nothing changes.
    """
    seen: dict[tuple[str, str], int] = {}
    memory: dict[tuple, object] = {}

    def flat(value) -> int:
        if isinstance(value, int):
            return value
        result = 0
        for part in value:
            result |= flat(part)
        return result

    def join(one, two):
        if one is None or two is None:
            return one if two is None else two
        if isinstance(one, tuple) and isinstance(two, tuple) and len(one) == len(two):
            return tuple(join(a, b) for a, b in zip(one, two))
        return flat(one) | flat(two)

    def run(computation: str, arguments: tuple):
        key = (computation, arguments)
        if key in memory:
            return memory[key]
        values, root = {}, 0
        for i in module.computations[computation]:
            values[i.name] = value = step(computation, i, values, arguments)
            at = (computation, i.name)
            seen[at] = seen.get(at, 0) | flat(value)
            if i.root:
                root = value
        memory[key] = root
        return root

    def step(computation: str, i: Instruction, values: dict, arguments: tuple):
        given = [values.get(name, 0) for name in i.operands]
        if i.opcode == "parameter":
            if computation == module.entry:
                return _argument(i.op_name)
            place = int(i.inside)
            return arguments[place] if place < len(arguments) else 0
        if i.opcode == "tuple":
            return tuple(given)
        if i.opcode == "get-tuple-element":
            place = int(re.search(r"index=(\d+)", i.rest).group(1))
            return given[0][place] if isinstance(given[0], tuple) else flat(given[0])
        if i.opcode in ("bitcast", "copy", "optimization-barrier", "opt-barrier") and given:
            return given[0]
        called = i.called()
        if i.opcode == "while":
            value = given[0]
            for _ in range(32):
                after = join(value, run(called["body"][0], (value,)))
                if after == value:
                    break
                value = after
            return value
        if i.opcode in ("fusion", "call", "async-start") and ("calls" in called or "to_apply" in called):
            return run((called.get("calls") or called["to_apply"])[0], tuple(given))
        if i.opcode == "conditional":
            value = None
            for name, argument in zip(called["branch_computations"], given[1:]):
                value = join(value, run(name, (argument,)))
            return value if value is not None else 0
        return flat(tuple(given))

    run(module.entry, ())
    return seen


def _argument(name: str) -> int:
    if name.startswith(("state.params", "state.ema", "others")):
        return PARAMETER
    return STATE if name.startswith("state") else BATCH
