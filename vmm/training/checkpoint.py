"""Checkpoints: the whole State and the data position, written by Orbax in the background, verified when read."""

import errno
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from vmm.errors import StorageError, UserError
from vmm.paths import absolute, is_remote
from vmm.training.optim import path_of
from vmm.training.step import State


def _context() -> ocp.Context:
    context = ocp.Context()
    # Replicas share the writing of large arrays only: cutting a small one costs more than writing it whole.
    context.array.saving.min_slice_bytes_for_replica_parallel = 1 << 20
    return context


class Saved(NamedTuple):
    """A checkpoint as it was found. samples: training samples consumed before it, over all hosts. data: manifest.identity
    of the clips that they were drawn from; {} in checkpoints that tell nothing of it."""

    state: State
    step: int
    samples: int
    data: Mapping = {}


class Damaged(UserError):
    """A checkpoint that cannot be read, or whose bytes have changed."""


class _NewestAndBest:
    """Which checkpoints stay, for Orbax."""

    def __init__(self, keep: int, best: Callable[[], int | None]):
        self.keep, self.best = keep, best

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps, best = [checkpoint.step for checkpoint in checkpoints], self.best()
        return [step in steps[-self.keep :] or step == best for step in steps]


class _Save(threading.Thread):
    """Waits for a save in the background, so that the loop can ask whether it failed."""

    def __init__(self, response):
        super().__init__(daemon=True)
        self.response, self.error = response, None
        self.start()

    def run(self):
        try:
            self.response.result()
        except Exception as error:  # Orbax and TensorStore raise several kinds
            self.error = error


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them. Never read or written by pickling.

    best: asked at each save for the step of another that stays, None: there is none (training/early.py).
    fail_next: the next save meets a full disk (training/faults.py).
    """

    def __init__(self, workdir: Path, keep: int = 2, best: Callable[[], int | None] = lambda: None):
        self.folder = absolute(workdir) / "checkpoints"
        try:
            self.orbax = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=_NewestAndBest(keep, best),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
                context=_context(),
            )
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be used ({error})") from None
        self.pending: _Save | None = None
        self.fail_next = False

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.orbax.latest.step if self.orbax.latest else None

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return [found.step for found in self.orbax.checkpoints]

    def save(self, state: State, step: int, samples: int, data: Mapping | None = None) -> None:
        """Starts to save; returns when the state may be overwritten. An earlier failure is raised here.

        samples, data: as of Saved.

        Raises:
          StorageError: the disk is full or gone; checkpoints saved before stay.
        """
        self.wait()
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = math.inf if is_remote(self.folder) else shutil.disk_usage(self.folder).free
        if free < need * 1.05:
            raise StorageError(self._full(f"{need / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free"))
        try:
            # On CPU the host's copy is the device's own buffer, which the next step overwrites.
            if jax.default_backend() == "cpu":
                state = _copy(state)
            note = {"samples": samples, "digest": digests(state), "data": dict(data or {})}
            if self.fail_next:
                self.fail_next = False
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            response = self.orbax.save_async(step, state._asdict(), force=True, custom_metadata=note)
            if not response:
                raise StorageError(
                    f"{self.folder}: a checkpoint of step {step} or later is there already; move it away"
                )
            self.pending = _Save(response)
        except (OSError, ValueError) as error:  # ValueError: TensorStore's word for a full disk
            raise StorageError(self._full(error)) from None

    def poll(self) -> None:
        """Looks after the save under way without waiting for it.

        Raises:
          StorageError: it failed.
        """
        if self.pending is not None and not self.pending.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is whole on disk."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.join()
            if pending.error is not None:
                raise StorageError(self._full(pending.error)) from None

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
          UserError: there is none, or it does not fit (a readable difference).
          Damaged: it cannot be read, or its bytes have changed.
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
            raise Damaged(
                f"{self.folder}/{step}: cannot be read ({line}); remove that folder to go on from the one before"
            ) from None
        note = meta.custom_metadata or {}
        wrong = [path for path, value in digests(state).items() if note.get("digest", {}).get(path) != value]
        if wrong:
            raise Damaged(
                f"{self.folder}/{step}: bytes of {wrong[0]} (and {len(wrong) - 1} more) changed since they were saved; "
                "remove that folder to go on from the one before"
            )
        return Saved(state, step, int(note.get("samples", 0)), note.get("data") or {})

    def restore_newest_good(self, shapes: State) -> Saved:
        """As `restore` of the newest; one that is damaged is moved to checkpoints-quarantined, and the one before is read.

        Raises:
          UserError: there is none, none is good, or one does not fit.
        """
        tried = 0
        while True:
            problem = saved = None
            try:
                saved = self.restore(shapes)
            except Damaged as error:
                problem = error
            if not _any_host(problem is not None):
                return saved
            tried += 1
            problem = problem or "another process could not read it"
            if len(self.steps) == 1:
                # The last one stays where it is: nothing is trained over it.
                raise UserError(f"{problem}; none of the {tried} checkpoints is good")
            step = self.latest
            [where] = self.quarantine(step)
            if jax.process_index() == 0:
                print(f"{problem}: moved to {where}; the checkpoint of step {self.latest} is next", flush=True)

    def quarantine(self, first: int) -> list[Path]:
        """Moves the checkpoints of step `first` and later out of the way, newest first; returns where they are now."""
        self.wait()
        moved = []
        for step in sorted((step for step in self.steps if step >= first), reverse=True):
            where = self._quarantine_place(step)
            if jax.process_index() == 0:
                where.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(where)
            moved.append(where)
        _together(f"quarantine of {first}")
        self.orbax.reload()
        return moved

    def _quarantine_place(self, step: int) -> Path:
        folder = self.folder.with_name("checkpoints-quarantined")
        number = 0
        while (where := folder / (f"{step}-{number}" if number else str(step))).exists():
            number += 1
        return where

    def close(self) -> None:
        """Waits for the last save, then closes.

        Raises:
          StorageError: a save failed; Orbax tells of it here again.
        """
        try:
            self.wait()
        finally:
            try:
                self.orbax.close()
            except Exception as error:  # Orbax and TensorStore raise several kinds
                raise StorageError(self._full(error)) from None


def _any_host(mine: bool) -> bool:
    """Whether it is so on any host: all take the same way."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(mine)).any())


def _together(what: str) -> None:
    """Waits for all hosts."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


@jax.jit
def _copy(state: State) -> State:
    return jax.tree.map(jnp.copy, state)


def bit_sum(x: jax.Array) -> jax.Array:
    """Returns a sum, uint32 [], of an array's bits by place: a single flipped bit always changes it."""
    x = x.reshape(-1)
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize])
    # Odd multipliers by place: every single flipped bit, and most swaps, change the sum.
    place = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) | jnp.uint32(1)
    return (bits.astype(jnp.uint32) * place).sum(dtype=jnp.uint32)


_digest = jax.jit(bit_sum)


def digests(state: State) -> dict[str, int]:
    """Returns path → a 32-bit sum of each array's bits, computed where it lies; the same on any mesh."""
    # One small program a shape: all leaves in one program took minutes to compile. One program at a time:
    # XLA on CPU runs many devices on one pool of threads, and beyond 32 queued programs with collectives
    # that pool is full of programs that wait for each other, for ever.
    leaves = jax.tree_util.tree_leaves_with_path(jax.block_until_ready(state))
    return {path_of(keys): int(_digest(_on_device(leaf))) for keys, leaf in leaves}


def _on_device(x: jax.Array) -> jax.Array:
    there = x.sharding.memory_kind == "pinned_host" if isinstance(x, jax.Array) else False
    return jax.device_put(x, x.sharding.with_memory_kind("device")) if there else x


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
