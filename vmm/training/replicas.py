"""Do the devices that hold copies of one array hold the same bits? A chip that computes wrongly says nothing by itself.

State → a 32-bit sum of each device's part, computed where it lies → compared among those that hold the same part.
"""

import functools
from collections import Counter

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vmm.errors import CorruptionError
from vmm.training.checkpoint import bit_sum
from vmm.training.optim import path_of


@functools.cache
def _sums(sharding: NamedSharding):
    """array → uint32 over the mesh, each device's sum of its own part; nothing is sent between devices."""
    axes = sharding.mesh.axis_names
    return jax.jit(
        jax.shard_map(
            lambda x: bit_sum(x).reshape((1,) * len(axes)),
            mesh=sharding.mesh,
            in_specs=sharding.spec,
            out_specs=PartitionSpec(*axes),
            check_vma=False,  # that copies are equal is what is asked
        )
    )


def compare_replicas(state, step: int) -> None:
    """Raises CorruptionError where devices differ in an array, or a part of one, that they hold copies of.

    Args: state: tree of arrays; what has no copies, or lies in the memory of the host, is passed by.
    """
    pending = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not isinstance(leaf.sharding, NamedSharding) or leaf.sharding.memory_kind == "pinned_host":
            continue
        holders: dict[str, list] = {}
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            holders.setdefault(str(index), []).append(device)
        if max(map(len, holders.values())) > 1:
            pending.append((path_of(keys), leaf.sharding.mesh, holders, _sums(leaf.sharding)(leaf)))
    for path, mesh, holders, sums in pending:
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            sums = multihost_utils.process_allgather(sums, tiled=True)
        of = dict(zip(mesh.devices.flat, np.asarray(sums).reshape(-1).tolist()))
        for devices in holders.values():
            counts = Counter(of[device] for device in devices).most_common()
            if len(counts) == 1:
                continue
            sure = counts[0][1] > counts[1][1]
            wrong = [device for device in devices if not sure or of[device] != counts[0][0]]
            names = ", ".join(f"{device} of process {device.process_index}" for device in wrong)
            raise CorruptionError(
                f"step {step}: {path} on {names} differs from its other copies: silent corruption; "
                "take that device out of the job, and the same command goes on from the newest checkpoint"
                if sure
                else f"step {step}: the copies of {path} on {names} differ, and none has a majority: silent corruption; "
                "test these devices, and the same command goes on from the newest checkpoint"
            )
