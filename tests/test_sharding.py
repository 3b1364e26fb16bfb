"""One step is the same on 1, 4 and 8 devices and any mesh: loss, gradients, parameters."""

import jax
import numpy as np
import pytest
from conftest import small_config

from vmm.data.loader import Loader
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.sharding import MeshShape, check_batch, make_mesh, place_batch, to_device
from vmm.training.metrics import count_flops
from vmm.training.optim import path_of

MESHES = {"4": (4, 1, 1), "8": (8, 1, 1), "2x2x2": (2, 2, 2)}


def built(world, mesh: tuple, **changes):
    experiment = Experiment(small_config(world, **changes))
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
    config = small_config(world)
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


@pytest.mark.parametrize("name", MESHES)
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
    parts = [float(loss(jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch))) for i in range(8)]
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
        for batch in loader:
            before = state
            state, _ = program.step(state, to_device(batch, mesh))
    loader.close()
    assert program.step._cache_size() == len(traced) == 1
    assert int(state.step) == 4
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))


def test_mesh_and_batch_errors():
    with pytest.raises(UserError, match="8 devices"):
        make_mesh(MeshShape(3, 1, 1))
    mesh = make_mesh(MeshShape(4, 2, 1))
    with pytest.raises(UserError, match="nearest that does is 16"):
        check_batch(13, mesh, 2)
