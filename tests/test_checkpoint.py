"""A checkpoint is whole, verified and of any mesh, or it is not used; a device that holds other bytes is named."""

import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vmm.errors import CorruptionError, StorageError, UserError
from vmm.sharding import MeshShape, make_mesh
from vmm.training.checkpoint import Checkpoints, Damaged, digests
from vmm.training.faults import flip_bit
from vmm.training.replicas import compare_replicas
from vmm.training.step import State


def on(mesh, split) -> State:
    """A state of known numbers. split: mesh axes of the rows of its matrices."""

    def place(x, *axes):
        return jax.device_put(jnp.asarray(x), NamedSharding(mesh, PartitionSpec(*axes)))

    rng = np.random.default_rng(0)
    matrix, moment = (rng.normal(size=(16, 512)).astype(np.float32) for _ in range(2))
    params = {"kernel": place(matrix, split), "bias": place(np.arange(4, dtype=np.float32))}
    return State(place(np.int32(7)), params, {"mu": place(moment.astype(jnp.bfloat16), split)}, (), {})


def shapes(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def mesh_of(data: int, fsdp: int):
    return make_mesh(MeshShape(data, fsdp), jax.devices()[: data * fsdp])


@pytest.fixture(scope="module")
def state() -> State:
    return on(mesh_of(2, 2), "fsdp")


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A workdir with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, 3)
    for step in (2, 4, 6):
        checkpoints.save(state, step, step * 8)
    checkpoints.close()
    return folder


def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return Checkpoints(tmp_path / "run", 3)


def equal(one: State, two: State):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(two))


@pytest.mark.parametrize("shape", [(4, 1), (1, 8)])
def test_saved_on_2x2_comes_back_on_another_mesh(shape, state, saved):
    other = on(mesh_of(*shape), "fsdp")
    assert digests(other) == digests(state), "the digest knows no layout"
    checkpoints = Checkpoints(saved)
    found = checkpoints.restore_newest_good(shapes(other))
    checkpoints.close()
    assert (found.step, found.samples) == (6, 48)
    assert found.state.params["kernel"].sharding == other.params["kernel"].sharding
    equal(found.state, state)


def test_damaged_ones_are_passed_by_and_kept(state, saved, tmp_path, capsys):
    checkpoints = copy(saved, tmp_path)
    for step in (4, 6):
        flip_bit(checkpoints.folder / str(step), random.Random(step))
    with pytest.raises(Damaged):
        checkpoints.restore(shapes(state))  # a reader moves nothing
    found = checkpoints.restore_newest_good(shapes(state))
    assert found.step == 2
    equal(found.state, state)
    away = tmp_path / "run" / "checkpoints-quarantined"
    assert sorted(path.name for path in away.iterdir()) == ["4", "6"]
    told = capsys.readouterr().out
    assert "moved to" in told and "the checkpoint of step 2 is next" in told
    # Below the old newest one can be saved again, and that is the newest then.
    checkpoints.save(state, 4, 32)
    checkpoints.wait()
    assert checkpoints.steps == [2, 4] and checkpoints.restore(shapes(state)).step == 4
    flip_bit(checkpoints.folder / "4", random.Random(0))
    assert checkpoints.restore_newest_good(shapes(state)).step == 2
    assert sorted(path.name for path in away.iterdir()) == ["4", "4-1", "6"]
    # The last one is not moved: nothing is trained over it.
    flip_bit(checkpoints.folder / "2", random.Random(0))
    with pytest.raises(UserError, match="none of the 1 checkpoints is good"):
        checkpoints.restore_newest_good(shapes(state))
    assert checkpoints.steps == [2]
    checkpoints.close()


def test_a_checkpoint_of_another_model_is_not_damage(state, saved, tmp_path):
    checkpoints = copy(saved, tmp_path)
    other = shapes(state)._replace(params={"kernel": shapes(state).params["kernel"]})
    with pytest.raises(UserError, match="params/bias: in the checkpoint, not in the model"):
        checkpoints.restore_newest_good(other)
    assert checkpoints.steps == [2, 4, 6]
    checkpoints.close()


def test_every_flipped_bit_is_noticed(state, saved, tmp_path):
    checkpoints = copy(saved, tmp_path)
    for trial in range(10):
        folder = checkpoints.folder / "6"
        path, bit = flip_bit(folder, random.Random(trial))
        with pytest.raises(Damaged):
            checkpoints.restore(shapes(state))
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
    assert checkpoints.restore(shapes(state)).step == 6
    checkpoints.close()


def test_a_save_that_fails_in_the_background_is_told_by_the_next_look(state, saved, tmp_path, monkeypatch):
    checkpoints = copy(saved, tmp_path)
    real = checkpoints.orbax.save_async

    class Failing:
        def __init__(self, response):
            self.response = response

        def result(self):
            self.response.result()
            raise OSError(28, "No space left on device")

    def failing(*args, **named):
        return Failing(real(*args, **named))

    monkeypatch.setattr(checkpoints.orbax, "save_async", failing)
    checkpoints.save(state, 8, 64)
    checkpoints.pending.join(60)
    with pytest.raises(StorageError, match="could not be saved .*No space left"):
        checkpoints.poll()
    checkpoints.fail_next = True
    with pytest.raises(StorageError, match="No space left.*is intact"):
        checkpoints.save(state, 10, 80)
    checkpoints.close()


def test_what_closing_tells_of_a_failed_save_is_one_line(saved, tmp_path, monkeypatch):
    """Orbax raises a background write's error once more when it is closed, as a ValueError of TensorStore."""
    checkpoints = copy(saved, tmp_path)

    def failing():
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand a long trace")

    monkeypatch.setattr(checkpoints.orbax, "close", failing)
    with pytest.raises(StorageError, match="No space left on device.*is intact"):
        checkpoints.close()


def corrupted(state: State, number: int) -> State:
    """The state with one bit of one device's copy of the bias changed."""
    bias = state.params["bias"]
    parts = [np.array(shard.data) for shard in bias.addressable_shards]
    parts[number].view(np.uint32)[2] ^= 1 << 9
    devices = [shard.device for shard in bias.addressable_shards]
    arrays = [jax.device_put(part, device) for part, device in zip(parts, devices)]
    return state._replace(
        params=state.params | {"bias": jax.make_array_from_single_device_arrays(bias.shape, bias.sharding, arrays)}
    )


def test_a_device_with_other_bytes_is_named(state):
    compare_replicas(state, 5)
    wrong = corrupted(state, 2)
    name = str(state.params["bias"].addressable_shards[2].device)
    with pytest.raises(CorruptionError, match=f"step 5: params/bias on {name} of process 0 differs"):
        compare_replicas(wrong, 5)
    # Two copies only: which is right nobody knows. A part of a split array has its copies too.
    two = on(mesh_of(2, 1), None)
    with pytest.raises(CorruptionError, match="params/bias.*none has a majority"):
        compare_replicas(corrupted(two, 1), 5)
    kernel = state.params["kernel"]
    arrays = [np.array(shard.data) for shard in kernel.addressable_shards]
    arrays[3][0, 0] += 1
    arrays = [jax.device_put(x, shard.device) for x, shard in zip(arrays, kernel.addressable_shards)]
    broken = jax.make_array_from_single_device_arrays(kernel.shape, kernel.sharding, arrays)
    with pytest.raises(CorruptionError, match="params/kernel"):
        compare_replicas(state._replace(params=state.params | {"kernel": broken}), 5)
    assert CorruptionError.code == 7


def test_the_folder_of_a_dead_save_is_none(state, saved, tmp_path):
    """What a killed save leaves is no checkpoint, and is cleared."""
    checkpoints = copy(saved, tmp_path)
    checkpoints.close()
    folder = tmp_path / "run" / "checkpoints"
    left = folder / "8.orbax-checkpoint-tmp"
    os.makedirs(left)
    again = Checkpoints(tmp_path / "run", 3)
    assert again.latest == 6
    again.close()
