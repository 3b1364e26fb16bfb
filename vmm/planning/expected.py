"""The exchanges that a sharded step cannot do without, in closed form, from its jaxpr and its shardings alone."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax.extend.core import Literal
from jax.sharding import Mesh

BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Use:
    """A product with a parameter in the forward pass.

    leaf: which of the flattened arguments. times: how often, scans over parts of the batch multiplied out; a scan over
    a stack of layers is one use of the stack. contracted: dimensions of the parameter that are summed over. inputs,
    output: bytes of the other operand and of the result, layers of a stack summed. shared: what tells one other operand from
    another. itemsize: bytes of an element as it is multiplied. again: whether the gradient computes it again.
    """

    leaf: int
    times: int
    contracted: tuple[int, ...]
    inputs: float
    output: float
    shared: int
    itemsize: int
    again: bool


def uses(jaxpr, leaves: int) -> list[Use]:
    """Returns every product with one of the first `leaves` arguments of a jaxpr, in the order of the program."""
    found: list[Use] = []
    # A value: (argument, its dimension for each of the value's, trips of the scans that took a layer of it).
    given = [(at, tuple(range(len(v.aval.shape)))) if at < leaves else None for at, v in enumerate(jaxpr.invars)]
    _walk(jaxpr, given, 1, 1, False, found)
    return found


_SAME = {"convert_element_type", "copy", "sharding_constraint", "optimization_barrier", "stop_gradient", "reduce_precision", "name", "copy_p"}  # fmt: skip


def _walk(jaxpr, given: Sequence, times: int, layers: int, again: bool, found: list) -> list:
    """Follows parameters through a jaxpr; returns what its results are. layers: trips of scans over stacks."""
    known = {}

    def of(v):
        return None if isinstance(v, Literal) else known.get(v)

    for v, value in zip(jaxpr.invars, given):
        known[v] = value
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        values = [of(v) for v in equation.invars]
        if not any(values):  # nothing of a parameter goes in here
            continue
        results = [None] * len(equation.outvars)
        if name in _SAME:
            results = values[: len(results)]
        elif name == "transpose" and values[0]:
            leaf, dims = values[0]
            results = [(leaf, tuple(dims[at] for at in params["permutation"]) if dims else None)]
        elif name in ("reshape", "broadcast_in_dim", "squeeze", "slice", "dynamic_slice", "mul", "add", "concatenate"):
            first = next((value for value in values if value), None)
            kept = first and all(size for size in equation.outvars[0].aval.shape)
            results = [(first[0], None)] if kept and name in ("reshape", "squeeze") else [None]
        elif name == "dot_general":
            for side in (0, 1):
                if values[side]:
                    _record(equation, side, values[side], times, layers, again, found)
        else:
            results = _inside(equation, values, times, layers, again, found)
        for v, value in zip(equation.outvars, results):
            if value:
                known[v] = value
    return [of(v) for v in jaxpr.outvars]


def _inside(equation, values: list, times: int, layers: int, again: bool, found: list) -> list:
    """An equation with a jaxpr of its own."""
    name, params = equation.primitive.name, equation.params
    none = [None] * len(equation.outvars)
    if name == "scan":
        inner, length = params["jaxpr"], params["length"]
        inner = getattr(inner, "jaxpr", inner)
        carried = _not_scanned(params)
        stacked = any(value for value in values[carried:])
        passed = [
            value if at < carried else (value[0], value[1][1:] if value[1] else None) if value else None
            for at, value in enumerate(values)
        ]
        # Over a stack of layers each trip has parameters of its own; else the same ones are used again.
        more = (times, layers * length) if stacked else (times * length, layers)
        _walk(inner, passed, *more, again, found)
        return none
    if name == "cond":
        for branch in params["branches"]:
            _walk(branch.jaxpr, values[1:], times, layers, again, found)
        return none
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = params.get(key)
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns") and len(inner.invars) == len(values):
            return _walk(inner, values, times, layers, again or name in ("checkpoint", "remat2", "remat"), found)
    return none


def _not_scanned(params) -> int:
    """Returns how many operands of a scan every trip sees whole: constants and what is carried."""
    if "num_consts" in params:
        return params["num_consts"] + params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()  # since JAX 0.12
    return len(constants) + len(carried)


def _record(equation, side: int, value: tuple, times: int, layers: int, again: bool, found: list) -> None:
    (left, right), _ = equation.params["dimension_numbers"]
    leaf, dims = value
    contracted = tuple(dims[at] for at in (left, right)[side]) if dims else ()
    other, mine = equation.invars[1 - side], equation.invars[side].aval
    size = other.aval.dtype.itemsize
    found.append(
        Use(
            leaf, times, contracted, math.prod(other.aval.shape) * size * layers,
            math.prod(equation.outvars[0].aval.shape) * size * layers, id(other), mine.dtype.itemsize, again,
        )
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Expected:
    """Bytes that a device must send in a step, by mesh axis and by what for.

    gathered: of parameters, forward and backward. reduced: of gradients. activations: sums of tensor parallelism.
    """

    gathered: Mapping[str, float]
    reduced: Mapping[str, float]
    activations: Mapping[str, float]

    def total(self, axis: str) -> float:
        """All of one axis."""
        return sum(part.get(axis, 0.0) for part in (self.gathered, self.reduced, self.activations))


def expect(loss, params, teacher, batch, mesh: Mesh, more: Mapping | None = None) -> Expected:
    """Returns what a step must exchange, see closed_form.

    Args:
      loss: (params, teacher, batch, key) → (loss, metrics). params, teacher: shapes with their shardings; teacher () for none.
      batch: shapes. more: further keyword arguments of the loss.
    """
    leaves = jax.tree.leaves(params)
    shapes = [tuple(leaf.shape) for leaf in leaves]
    return closed_form(
        traced(loss, params, teacher, batch, more), shapes, [axes_of(leaf) for leaf in leaves], mesh.shape
    )


def traced(loss, params, teacher, batch, more: Mapping | None = None) -> list[Use]:
    """Returns the uses of parameters in a loss, those of its teacher as arguments behind them."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    taught = params if isinstance(teacher, tuple) and not teacher else teacher
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, taught, batch))
    jaxpr = jax.make_jaxpr(lambda p, t, b, k: loss(p, t, b, k, **(more or {})))(*plain, key).jaxpr
    return uses(jaxpr, 2 * len(jax.tree.leaves(params)))


def closed_form(
    found: Sequence[Use],
    shapes: Sequence[tuple[int, ...]],
    split: Sequence[Mapping[int, tuple[str, ...]]],
    sizes: Mapping[str, int],
    scale: float = 1.0,
) -> Expected:
    """Returns what a step must exchange.

    For a parameter of P elements of b bytes, whose n shards lie along an axis that also splits the batch (FSDP), each use
    gathers it forward and backward and scatters its gradient: 3 P b (n − 1) / n. Along a batch axis that does not split
    it, its gradient is summed: 2 P b (n − 1) / n of what a device holds. Of a teacher's, which has no gradient, one
    gather. A product that sums over a dimension split by `tensor` adds up its result, one that makes such a dimension adds up
    its operand's gradient: 2 (n − 1) / n of them each, once more where the gradient computes it again (Shoeybi et al. 2019).

    Args:
      found: from traced. shapes, split: of each parameter, and its dimension → mesh axes. sizes: of the mesh.
      scale: clips by those that were traced.
    """
    count = len(shapes)
    gathered, reduced, activations = {}, {}, {}

    def add(table: dict, axis: str, size: float) -> None:
        if size:
            table[axis] = table.get(axis, 0.0) + size

    clips = math.prod(sizes.get(axis, 1) for axis in (*BATCH_AXES, "sequence"))
    summed = set()
    for use in found:
        at, student = use.leaf % count, use.leaf < count
        axes = [axis for parts in split[at].values() for axis in parts if sizes[axis] > 1]
        over = [axis for axis in axes if axis != "tensor"]
        n = math.prod(sizes[axis] for axis in over)
        held = math.prod(shapes[at]) * use.itemsize / math.prod(sizes[axis] for axis in axes if axis == "tensor")
        if n > 1:
            name = "+".join(over)
            once = held * (n - 1) / n * use.times
            add(gathered, name, once * (2 if student else 1))
            add(reduced, name, once if student else 0)
        tensor = sizes.get("tensor", 1)
        if tensor > 1:
            share = 2 * (tensor - 1) / tensor / clips * use.times * scale
            for dim in (dim for dim, parts in split[at].items() if "tensor" in parts):
                if dim in use.contracted:
                    add(activations, "tensor", use.output * share * (1 + (use.again and student)))
                elif student and use.shared not in summed:
                    summed.add(use.shared)
                    add(activations, "tensor", use.inputs * share)
    for at, shape in enumerate(shapes):
        axes = [axis for parts in split[at].values() for axis in parts]
        size = math.prod(shape) * _itemsize(found, at) / math.prod(sizes[axis] for axis in axes)
        rest = [axis for axis in (*BATCH_AXES, "sequence") if axis not in axes and sizes.get(axis, 1) > 1]
        n = math.prod(sizes[axis] for axis in rest)
        if n > 1:
            add(reduced, "+".join(rest), 2 * size * (n - 1) / n)
    return Expected(gathered, reduced, activations)


def _itemsize(found: Sequence[Use], at: int) -> int:
    return next((use.itemsize for use in found if use.leaf == at), 4)


def axes_of(leaf) -> dict[int, tuple[str, ...]]:
    """Returns dimension → mesh axes that split it, of a shape with its sharding."""
    spec = leaf.sharding.spec
    return {
        at: part if isinstance(part, tuple) else (part,)
        for at, part in enumerate(spec)
        if part is not None and part != ()
    }
