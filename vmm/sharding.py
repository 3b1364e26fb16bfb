"""The mesh, the rules from logical to mesh axes, and the shardings of states, batches and activations.

Parameters name their axes in layers.py; which mesh axis each becomes is said here, once.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vmm.errors import UserError
from vmm.settings import setting

AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axis → mesh axis. The batch is split over data and fsdp; a parameter's width over fsdp, and over sequence, whose
# devices hold the same clips; what tensor parallelism splits over tensor; tokens over sequence. None: whole everywhere.
RULES = {
    "batch": ("data", "fsdp"),
    "tokens": "sequence",
    "embed": ("fsdp", "sequence"),
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
    """Devices along each mesh axis; -1 once takes what is left."""

    data: int = setting(-1, "Copies of the parameters.")
    fsdp: int = setting(1, "Shards of the parameters, which also split the batch (Zhao et al. 2023).")
    tensor: int = setting(1, "Shards of heads and hidden units (Shoeybi et al. 2019).")
    sequence: int = setting(
        1,
        "Shards of the tokens of a clip, whose keys and values are gathered for attention (context "
        "parallelism, Dubey et al. 2024, sec. 3.3.2).",
    )


def slices_of(devices: list) -> int:
    """Returns how many slices the devices are of: within one the interconnect is fast, between two it is a data-centre network."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def auto_shape(devices: list, batch: int, state: int, memory: int | None) -> MeshShape:
    """Returns the mesh that `mesh="auto"` stands for.

    Copies of the whole state where it takes at most a quarter of a device's memory, else as few shards as bring it there;
    slices hold copies, so that only gradients cross between them. What the batch cannot be split over splits tokens.

    Args:
      batch: clips a part of the batch is computed in (global, one of accumulate).
      state: bytes of parameters, moments and average. memory: bytes of one device, None: not known, as much as wanted.
    """
    count, slices = len(devices), slices_of(devices)
    rows = math.gcd(batch, count)
    if rows % slices:
        raise UserError(
            f"mesh: a batch of {batch} does not divide over {slices} slices; make it a multiple of {slices}"
        )
    sequence = count // rows
    within = [size for size in range(1, rows // slices + 1) if rows // slices % size == 0]
    fits = [size for size in within if memory is None or state / (size * sequence) <= memory / 4]
    fsdp = fits[0] if fits else within[-1]
    return MeshShape(rows // fsdp, fsdp, 1, sequence)


def make_mesh(shape: MeshShape, devices: list | None = None) -> Mesh:
    """Returns the (data, fsdp, tensor, sequence) mesh over the devices, all of the job's by default.

    Of several slices, data goes over slices first: neighbours on every other axis share a slice.

    Raises:
      UserError: the axes do not multiply to the number of devices, or an axis other than data crosses slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.astuple(shape)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"mesh: sizes must be positive, and -1 at most once; got {shape}")
    fixed = int(np.prod([size for size in sizes if size != -1]))
    sizes = tuple(len(devices) // fixed if size == -1 else size for size in sizes)
    if np.prod(sizes) != len(devices):
        raise UserError(
            f"mesh: {shape} does not fit {len(devices)} devices; {' * '.join(AXES)} must be {len(devices)} (-1 fills one axis)"
        )
    slices = slices_of(devices)
    if slices > 1:
        if sizes[0] % slices:
            raise UserError(f"mesh.data: {sizes[0]} is no multiple of the {slices} slices; only data goes over slices")
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Returns what a train step is compiled with beyond XLA's defaults on the mesh's devices.

    XLA's compiler for TPUs multiplies by a gathered parameter piece by piece ("windowed einsum"), each pass sending the pieces
    again: 6.5 GB a step against 4.5 GB (ViT-L of video and sound, 16 chips; experiments/LOG.md). Off.
    """
    if mesh.devices.flat[0].platform == "tpu":
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    return None


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": of the mesh that is set, which may be compiled for from elsewhere; else the default's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


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


def partition(names: tuple, shape: tuple, mesh) -> PartitionSpec:
    """Logical names → PartitionSpec; an axis is split over as many of its mesh axes, first to last, as divide it.

    A mesh axis splits one axis of an array: what an earlier one has taken is left out.
    """
    if len(names) != len(shape):  # what an optimizer keeps of a matrix may be a row of it
        return PartitionSpec()
    axes, taken = [], set()
    for name, size in zip(names, shape):
        rule = RULES[name] if name is not None else None
        parts = rule if isinstance(rule, tuple) else (rule,) if rule else ()
        parts = tuple(part for part in parts if part not in taken)
        while parts and size % math.prod(mesh.shape[part] for part in parts):
            parts = parts[:-1]
        taken.update(parts)
        axes.append(parts if len(parts) > 1 else parts[0] if parts else None)
    return PartitionSpec(*axes)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Holds an activation to its logical axes on the mesh that is set; no mesh or one device, no effect."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(names, x.shape, mesh))


def by_clip(function, x: jax.Array) -> jax.Array:
    """Returns function(x), each device its own clips: for what the partitioner would gather a batch for, as an FFT.

    function: array [B ...] → array [B ...], every clip by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec() if mesh.empty or mesh.size == 1 else partition(("batch",), x.shape[:1], mesh)
    if not any(spec):
        return function(x)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(x)


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
            return value.value.update(sharding=NamedSharding(mesh, partition(value.names, value.value.shape, mesh)))
        return value.update(sharding=NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(leaf, boxed, is_leaf=lambda value: isinstance(value, nn.Partitioned))


def in_host_memory(placed):
    """Returns the placed shapes with every array of at least one axis in the memory of its device's host."""
    return jax.tree.map(
        lambda leaf: leaf.update(sharding=leaf.sharding.with_memory_kind("pinned_host")) if leaf.shape else leaf, placed
    )


def in_device_memory(values, mesh: Mesh | None, boxed):
    """Moves arrays of a program to where `place_state` would have them; no mesh, no effect. boxed: as there."""
    if mesh is None:
        return values
    return jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), values, place_state(boxed, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every batch array: its first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def place_batch(shapes, mesh: Mesh):
    """Returns an abstract batch, every leaf with its sharding."""
    return jax.tree.map(lambda shape: shape.update(sharding=batch_sharding(mesh)), shapes)


def host_place(mesh: Mesh) -> tuple[int, int]:
    """Returns which part of every batch this process loads, and how many parts there are.

    Processes whose devices hold the same clips (tensor and sequence axes that go over hosts) load the same part.

    Raises:
      UserError: some processes share a part of their clips only.
    """
    count = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    rows: dict[int, set] = {}
    for device, (index,) in batch_sharding(mesh).devices_indices_map((count,)).items():
        rows.setdefault(device.process_index, set()).update(range(*index.indices(count)))
    parts = sorted({tuple(sorted(own)) for own in rows.values()})
    if sum(map(len, parts)) != count or len({len(part) for part in parts}) != 1:
        raise UserError(
            f"mesh: {dict(mesh.shape)} has hosts that share some of their clips; let a host hold whole rows of it"
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def to_device(batch, mesh: Mesh):
    """Turns this host's part of a batch into global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, np.asarray(array)), batch)
