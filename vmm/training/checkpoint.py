"""Checkpoints: the whole State and the data position, written by Orbax in the background."""

import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from vmm.errors import StorageError, UserError
from vmm.training.optim import path_of
from vmm.training.step import State


def _context() -> ocp.Context:
    context = ocp.Context()
    # Replicas share the writing of large arrays only: cutting a small one costs more than writing it whole.
    context.array.saving.min_slice_bytes_for_replica_parallel = 1 << 20
    return context


class Saved(NamedTuple):
    """A checkpoint as it was found. samples: training samples consumed before it, over all hosts."""

    state: State
    step: int
    samples: int


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them. Never read or written by pickling."""

    def __init__(self, workdir: Path, keep: int = 2):
        self.folder = Path(workdir).resolve() / "checkpoints"
        try:
            self.orbax = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
                context=_context(),
            )
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be used ({error})") from None
        self.pending = None

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.orbax.latest.step if self.orbax.latest else None

    def save(self, state: State, step: int, samples: int) -> None:
        """Starts to save; returns when the state may be overwritten. An earlier failure is raised here.

        Raises:
          StorageError: the disk is full or gone; checkpoints saved before stay.
        """
        self.wait()
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < need * 1.05:
            raise StorageError(self._full(f"{need / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free"))
        try:
            # On CPU the host's copy is the device's own buffer, which the next step overwrites.
            if jax.default_backend() == "cpu":
                state = _copy(state)
            note = {"samples": samples, "digest": digests(state)}
            self.pending = self.orbax.save_async(step, state._asdict(), force=True, custom_metadata=note)
            if not self.pending:
                raise StorageError(
                    f"{self.folder}: a checkpoint of step {step} or later is there already; move it away"
                )
        except OSError as error:
            raise StorageError(self._full(error)) from None

    def wait(self) -> None:
        """Waits until the last save is whole on disk."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            try:
                pending.result()
            except Exception as error:  # Orbax and TensorStore raise several kinds
                raise StorageError(self._full(error)) from None

    def _full(self, why) -> str:
        kept = (
            f"the checkpoint of step {self.latest} is intact" if self.latest is not None else "there is none before it"
        )
        reason = str(why).strip().splitlines()[0] if str(why).strip() else type(why).__name__
        return f"{self.folder}: the checkpoint could not be saved ({reason}); {kept}; free space and run the same command again"

    def restore(self, shapes: State, step: int | None = None) -> Saved:
        """Reads a checkpoint, the newest by default, onto any mesh.

        Args:
          shapes: abstract State that the program expects, with where its leaves go; without: one device.

        Raises:
          UserError: there is none, it does not fit (a readable difference), or its bytes have changed.
        """
        step = self.latest if step is None else step
        if step is None:
            raise UserError(f"{self.folder}: no checkpoint here; train first with `vmm train`")
        try:
            meta = self.orbax.metadata(step)
            if not getattr(meta, "metadata", None):
                raise ValueError("what it tells of its arrays is damaged")
            _compare(meta.metadata, shapes._asdict(), f"{self.folder}/{step}")
            one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            target = jax.tree.map(lambda leaf: leaf.update(sharding=leaf.sharding or one), shapes)
            state = State(**self.orbax.load(step, target._asdict()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{self.folder}/{step}: cannot be read ({line}); remove that folder to go on from the one before"
            ) from None
        note = meta.custom_metadata or {}
        wrong = [path for path, value in digests(state).items() if note.get("digest", {}).get(path) != value]
        if wrong:
            raise UserError(
                f"{self.folder}/{step}: bytes of {wrong[0]} (and {len(wrong) - 1} more) changed since they were saved; "
                "remove that folder to go on from the one before"
            )
        return Saved(state, step, int(note.get("samples", 0)))

    def close(self) -> None:
        """Waits for the last save, then closes."""
        self.wait()
        self.orbax.close()


@jax.jit
def _copy(state: State) -> State:
    return jax.tree.map(jnp.copy, state)


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
    x = x.reshape(-1)
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize])
    # Odd multipliers by place: every single flipped bit, and most swaps, change the sum.
    place = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) | jnp.uint32(1)
    return (bits.astype(jnp.uint32) * place).sum(dtype=jnp.uint32)


def digests(state: State) -> dict[str, int]:
    """Returns path → a 32-bit sum of each array's bits, computed where it lies; the same on any mesh."""
    # One small program a shape: all leaves in one program took minutes to compile. One program at a time:
    # XLA on CPU runs many devices on one pool of threads, and beyond 32 queued programs with collectives
    # that pool is full of programs that wait for each other, for ever.
    leaves = jax.tree_util.tree_leaves_with_path(jax.block_until_ready(state))
    return {path_of(keys): int(_digest(leaf)) for keys, leaf in leaves}


def _compare(saved, expected: dict, where: str) -> None:
    """Raises UserError with the paths in which two trees of shapes and dtypes differ."""

    def leaves(tree):
        found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        return {path_of(keys): (tuple(x.shape), np.dtype(x.dtype).name) for keys, x in found if hasattr(x, "shape")}

    there, wanted = leaves(saved), leaves(expected)
    lines = [f"  {path}: in the checkpoint, not in the model" for path in sorted(set(there) - set(wanted))]
    lines += [f"  {path}: in the model, not in the checkpoint" for path in sorted(set(wanted) - set(there))]
    lines += [
        f"  {path}: {there[path]} in the checkpoint, {wanted[path]} in the model"
        for path in sorted(set(there) & set(wanted))
        if there[path] != wanted[path]
    ]
    if lines:
        more = [f"  … and {len(lines) - 8} more"] if len(lines) > 8 else []
        raise UserError(f"{where}: does not fit this model:\n" + "\n".join(lines[:8] + more))
