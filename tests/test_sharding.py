"""One step is the same on 1, 4 and 8 devices and any mesh: loss, gradients, parameters."""

import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from jax.sharding import PartitionSpec
from support.selection import first

from vmm import layers, sharding
from vmm.data.loader import Loader
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.sharding import (
    AXES,
    MeshShape,
    auto_shape,
    check_batch,
    host_place,
    make_mesh,
    partition,
    place_batch,
    to_device,
)  # fmt: skip
from vmm.training.metrics import count_flops
from vmm.training.optim import path_of

MESHES = {"8": (8, 1, 1, 1), "2x2x2": (2, 2, 2, 1), "2x1x2x2": (2, 1, 2, 2), "4": (4, 1, 1, 1)}


def built(world, mesh: tuple, **changes):
    experiment = Experiment(tiny_config(world, **changes))
    devices = jax.devices()[: int(np.prod(mesh))]
    return experiment, make_mesh(MeshShape(*mesh), devices)


def one_batch(experiment):
    loader = Loader(experiment.data, experiment.clip, experiment.augment, seed=0, batch=16, start=0, stop=1)
    batch = next(iter(loader))
    loader.close()
    return batch


@pytest.fixture(scope="module")
def reference(world_folder):
    return run(world_folder, (1, 1, 1))


def run(world, mesh: tuple):
    """Returns loss, gradients and initial parameters on a mesh, of every kind of objective at once."""
    config = tiny_config(world)
    objectives = config["objectives"]
    # A bias near 0 lets every negative count: at -10 a loss that misses them would look right.
    objectives["sigmoid"] = objectives["contrast"] | {"variant": "sigmoid", "bias": -1.0}
    objectives["labels"] = dict(kind="classify", labels={"shape": 6})
    data = config["data"] | {"labels": {"shape": 6}}
    experiment, mesh = built(world, mesh, objectives=objectives, data=data)
    program, loss = experiment.program(mesh), experiment.loss()
    with jax.set_mesh(mesh):
        params = program.init(jax.random.key(0)).params
        batch = to_device(one_batch(experiment), mesh)
        value, gradient = jax.jit(
            lambda params, batch: jax.value_and_grad(lambda p: loss(p, p, batch, jax.random.key(1)), has_aux=True)(
                params
            )
        )(params, batch)
        value, metrics = jax.tree.map(float, value)
        return (value, metrics), jax.device_get(gradient), jax.device_get(params)


@pytest.mark.parametrize("name", first(MESHES, 3))
def test_loss_and_gradients_agree(name: str, world_folder, reference):
    (value, metrics), gradient, params = run(world_folder, MESHES[name])
    (expected, expected_metrics), expected_gradient, expected_params = reference
    assert value == pytest.approx(expected, rel=1e-5)
    assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)  # initialisation knows no mesh
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected_gradient))
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected_gradient)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * scale, err_msg=path_of(path))


def test_negatives_are_global(world_folder):
    """The loss of a batch of 16 on 8 devices is not the mean of losses of 2."""
    experiment, mesh = built(world_folder, (8, 1, 1))
    batch = one_batch(experiment)
    params = jax.jit(experiment.initialise)(jax.random.key(0))
    params = __import__("flax").linen.unbox(params)
    loss = jax.jit(lambda batch: experiment.loss()(params, params, batch, jax.random.key(1))[1]["contrast"])
    whole = float(loss(batch))
    parts = [float(loss(jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch))) for i in (0, 3, 7)]
    assert whole > np.mean(parts) + 0.5


def test_large_parameters_are_sharded(world_folder):
    """Under fsdp no matrix stays whole, nor do its moments."""
    experiment, mesh = built(world_folder, (1, 8, 1))
    program = experiment.program(mesh)
    for path, shape in jax.tree_util.tree_leaves_with_path(program.shapes):
        if np.prod(shape.shape) >= 32 * 32:
            assert not shape.sharding.is_fully_replicated, path_of(path)


def test_a_step_is_traced_and_compiled_once_and_donates(world_folder):
    experiment, mesh = built(world_folder, (2, 2, 2))
    loss, traced = experiment.loss(), []
    experiment.loss = lambda teachers=None: lambda *arguments: traced.append(1) or loss(*arguments)
    program = experiment.program(mesh)
    loader = Loader(experiment.data, experiment.clip, experiment.augment, seed=0, batch=16, start=0, stop=4)
    with jax.set_mesh(mesh):
        count_flops(program.step, program.shapes, place_batch(experiment.batch_shapes(), mesh))
        state = program.init(jax.random.key(0))
        batches, seen = list(loader), []
        for batch in (batches[0], *batches[:3]):
            before = state
            state, metrics = program.step(state, to_device(batch, mesh))
            seen.append(metrics)
    loader.close()
    # The rate of the first step is 0: the second sees the same clips with the same parameters, under masks of its own.
    assert float(seen[0]["contrast"]) == pytest.approx(float(seen[1]["contrast"]), rel=1e-6)
    assert float(seen[0]["masked"]) != pytest.approx(float(seen[1]["masked"]), rel=1e-4)
    assert program.step._cache_size() == len(traced) == 1
    assert int(state.step) == 4
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))


def test_mesh_and_batch_errors():
    with pytest.raises(UserError, match="8 devices"):
        make_mesh(MeshShape(3, 1, 1))
    mesh = make_mesh(MeshShape(4, 2, 1))
    with pytest.raises(UserError, match="nearest that does is 16"):
        check_batch(13, mesh, 2)


def devices_of(slices: int, each: int) -> list:
    return [SimpleNamespace(id=i, slice_index=i // each, process_index=i // 4) for i in range(slices * each)]


@pytest.mark.parametrize(
    ("devices", "batch", "state", "expected"),
    [
        (devices_of(1, 8), 64, 1e9, (8, 1, 1, 1)),  # 1 GB is no quarter of 16 GB
        (devices_of(1, 8), 64, 10e9, (2, 4, 1, 1)),  # 10 / 4 GB is
        (devices_of(1, 8), 64, 1e12, (1, 8, 1, 1)),  # as many shards as there are
        (devices_of(1, 8), 2, 1e9, (2, 1, 1, 4)),  # two clips: their tokens are split
        (devices_of(2, 4), 64, 1e12, (2, 4, 1, 1)),  # slices hold copies
    ],
)
def test_auto_mesh(devices, batch, state, expected):
    assert auto_shape(devices, batch, int(state), 16_000_000_000) == MeshShape(*expected)
    with pytest.raises(UserError, match="2 slices"):
        auto_shape(devices_of(2, 4), 3, 1, None)


def test_auto_mesh_of_a_config(world_folder):
    experiment = Experiment(tiny_config(world_folder, mesh="auto"))
    assert dict(experiment.make_mesh().shape) == dict(data=8, fsdp=1, tensor=1, sequence=1)
    tight = 4 * 4 * experiment.parameters()  # what the state takes: a quarter of it asks for four shards
    assert dict(experiment.make_mesh(memory=tight).shape) == dict(data=2, fsdp=4, tensor=1, sequence=1)
    with pytest.raises(UserError, match='"auto" or a group of sizes'):
        Experiment(tiny_config(world_folder, mesh="fsdp"))


class Device(NamedTuple):
    id: int
    process_index: int


def test_hosts_that_hold_the_same_clips_load_the_same(monkeypatch):
    """Four processes of two devices: those that share rows of the mesh share their part of a batch."""

    def places(shape: MeshShape) -> list:
        sizes = dataclasses.astuple(shape)
        rows = {}
        for number, place in enumerate(np.ndindex(sizes)):
            row = place[0] * shape.fsdp + place[1]
            rows[Device(number, number // 2)] = (slice(row, row + 1),)
        told = SimpleNamespace(devices_indices_map=lambda count: rows)
        monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: told)
        mesh = SimpleNamespace(shape=dict(zip(AXES, sizes)))
        found = []
        for process in range(4):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            found.append(host_place(mesh))
        return found

    assert places(MeshShape(8, 1, 1, 1)) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert places(MeshShape(2, 2, 1, 2)) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert places(MeshShape(2, 1, 1, 4)) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert places(MeshShape(1, 1, 8, 1)) == [(0, 1)] * 4


def test_tokens_are_split_over_sequence(world_folder):
    """Between blocks a device holds its clips' share of tokens, not all of them."""
    mesh = make_mesh(MeshShape(2, 1, 1, 4), jax.devices()[:8])
    stack = layers.Stack(depth=1, heads=2)
    x = jnp.zeros((4, 16, 8))
    with jax.set_mesh(mesh):
        params = jax.jit(stack.init)(jax.random.key(0), x, jnp.ones((4, 16), bool))
        y = jax.jit(lambda x: stack.apply(params, x, jnp.ones((4, 16), bool)))(x)
    assert y.sharding.shard_shape(y.shape) == (2, 4, 8)


def test_a_mesh_axis_splits_one_axis_of_an_array():
    mesh = make_mesh(MeshShape(data=1, fsdp=2, tensor=2, sequence=2))
    assert partition(("tokens", "embed"), (8, 16), mesh) == PartitionSpec("sequence", "fsdp")
    assert partition(("embed", "tokens"), (16, 8), mesh) == PartitionSpec(("fsdp", "sequence"), None)
    assert partition(("tokens", "embed"), (7, 16), mesh) == PartitionSpec(None, ("fsdp", "sequence"))
    assert partition(("heads", "mlp"), (4, 4), mesh) == PartitionSpec("tensor", None)
