"""The mesh, the rules from logical to mesh axes, and the shardings of states, batches and activations.

Parameters name their axes in layers.py; which mesh axis each becomes is said here, once.
"""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vmm.errors import UserError

# Logical axis → mesh axis. The batch is split over data and fsdp; a parameter's width over fsdp;
# what tensor parallelism splits over tensor. None: whole on every device.
RULES = {
    "batch": ("data", "fsdp"),
    "tokens": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "layers": None,
    "shared": None,
}


class Named(nn.Partitioned):
    """A parameter with the logical names of its axes. Unboxing adds no constraint: shardings are the program's."""

    def unbox(self, apply_constraint: bool = True):
        return self.value


def named(init, names: tuple):
    """Returns an initialiser whose result carries the logical names of its axes."""

    def wrapped(*args):
        return Named(init(*args), names)

    return wrapped


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; -1 once takes what is left.

    data: copies of the parameters. fsdp: shards of the parameters, also splitting the batch.
    tensor: shards of heads and hidden units.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(shape: MeshShape, devices: list | None = None) -> Mesh:
    """Returns the (data, fsdp, tensor) mesh over the devices, all of the job's by default.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.astuple(shape)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"mesh: sizes must be positive, and -1 at most once; got {shape}")
    fixed = int(np.prod([size for size in sizes if size != -1]))
    sizes = tuple(len(devices) // fixed if size == -1 else size for size in sizes)
    if np.prod(sizes) != len(devices):
        raise UserError(
            f"mesh: {shape} does not fit {len(devices)} devices; data * fsdp * tensor must be {len(devices)} (-1 fills one axis)"
        )
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_batch(batch: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError unless the batch divides over the devices that split it, times accumulation."""
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % (split * accumulate):
        parts = f"{split} devices (mesh data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']})"
        unit = split * accumulate
        near = max(unit, round(batch / unit) * unit)
        raise UserError(
            f"batch: {batch} clips do not divide over {parts} × {accumulate} accumulated parts; the nearest that does is {near}"
        )


def _spec(names: tuple, shape: tuple | None, mesh) -> PartitionSpec:
    """Logical names → PartitionSpec; an axis that does not divide stays whole."""
    axes = []
    for i, name in enumerate(names):
        axis = RULES[name] if name is not None else None
        if axis is not None and shape is not None:
            size = int(np.prod([mesh.shape[part] for part in (axis if isinstance(axis, tuple) else (axis,))]))
            axis = axis if shape[i] % size == 0 else None
        axes.append(axis)
    return PartitionSpec(*axes)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Holds an activation to its logical axes on the mesh that is set; no mesh, no effect."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(names, x.shape, mesh))


def batch_parts(size: int) -> int:
    """Returns in how many parts the mesh that is set holds a batch axis of this size; no mesh: 1."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))
    return parts if size % parts == 0 else 1


def place_state(boxed, mesh: Mesh):
    """Returns an abstract state, unboxed, every leaf with its sharding.

    Args:
      boxed: tree of ShapeDtypeStructs, those of parameters inside Linen's Partitioned boxes
        (optimizer moments keep the boxes of what they mirror).
      mesh: from make_mesh.
    """

    def leaf(value):
        if isinstance(value, nn.Partitioned):
            return value.value.update(sharding=NamedSharding(mesh, _spec(value.names, value.value.shape, mesh)))
        return value.update(sharding=NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(leaf, boxed, is_leaf=lambda value: isinstance(value, nn.Partitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every batch array: its first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def place_batch(shapes, mesh: Mesh):
    """Returns an abstract batch, every leaf with its sharding."""
    return jax.tree.map(lambda shape: shape.update(sharding=batch_sharding(mesh)), shapes)


def to_device(batch, mesh: Mesh):
    """Turns this host's part of a batch into global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, np.asarray(array)), batch)
