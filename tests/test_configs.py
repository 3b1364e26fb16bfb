"""Every file in configs/ builds and traces one train step, full size and small; nothing is computed."""

import importlib
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from golden import record
from ml_collections import ConfigDict

from vmm.build import differences, load_config, plain
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.sharding import MeshShape, make_mesh, place_state, to_device

FOLDER, NAMES = record.CONFIGS, record.RECIPES
PARAMETERS = record.read("parameters")


def cases():
    """Every recipe once, as small as it comes; its other variants, full size among them, in `make test-all`."""
    for name in NAMES:
        *others, smallest = record.variants(name)
        yield pytest.param(name, smallest)
        for variant in others:
            yield pytest.param(name, variant, marks=pytest.mark.exhaustive("a larger trace of the same parts"))


@pytest.mark.parametrize(("name", "variant"), cases())
def test_config_traces_a_train_step(name: str, variant: str, world_folder):
    config = load_config(f"{FOLDER / name}:{variant}")
    experiment = Experiment(config)
    found, recorded = record.shapes(experiment), PARAMETERS[f"{name}:{variant}"]
    changed = differences(found if variant == record.variants(name)[-1] else record.summary(found), recorded)
    assert not changed, "\n".join([*changed, "if that is meant: python tests/golden/record.py parameters"])
    for shape in (MeshShape(data=1, fsdp=8), MeshShape(data=1, fsdp=2, tensor=2, sequence=2)):
        place_state(experiment.shapes, make_mesh(shape))  # raises where an array would be split twice over one axis
    program = experiment.program(None)
    state, metrics = jax.eval_shape(program.step, program.shapes, experiment.batch_shapes())
    assert jax.tree.structure(state) == jax.tree.structure(program.shapes)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == "float32"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    for objective in config["objectives"]:
        assert objective in metrics


@pytest.mark.exhaustive("compiles every recipe; the small suite builds and traces each")
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_takes_a_step(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(f"{FOLDER / name}:{record.variants(name)[-1]}")
    experiment = Experiment(config)
    shape = MeshShape(data=2, fsdp=2, sequence=2)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        program = experiment.program(mesh)
        state = program.init(jax.random.key(0))
        batch = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), experiment.batch_shapes())
        state, metrics = program.step(state, to_device(batch, mesh))
    assert int(state.step) == 1 and np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_that_is_not_there_is_one_line(name: str):
    with pytest.raises(UserError, match="no variant 'smal'"):
        load_config(f"{FOLDER / name}:smal")


def test_full_size_is_full_size():
    experiment = Experiment(load_config(str(FOLDER / "pretrain_base.py")))
    assert 2.0e8 < experiment.parameters() < 6e8
    videomae = Experiment(load_config(str(FOLDER / "pretrain_videomae.py")))
    assert 85e6 < videomae.parameters() < 100e6


def test_videomae_flops_are_those_of_the_paper():
    """VideoMAE-B, 90 % masked: 202 GFLOPs a clip to train, forward and twice that backward."""
    from vmm.training.metrics import count_flops

    experiment = Experiment(load_config(str(FOLDER / "pretrain_videomae.py")))
    batch = experiment.batch_shapes(1)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    forward = count_flops(
        jax.jit(lambda params, batch, keys: experiment.recipe.apply({"params": params}, batch, keys)),
        nn.unbox(experiment.shapes),
        batch,
        keys,
    )
    assert 3 * forward == pytest.approx(202.3e9, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_a_config_dict_in_the_order_of_its_keys(name: str):
    """To be changed by attribute; streams are laid out in the order in which the file names them."""
    sys.path.insert(0, str(FOLDER))
    try:
        config = importlib.import_module(name.removesuffix(".py")).get_config(record.variants(name)[-1])
    finally:
        sys.path.remove(str(FOLDER))
        for module in (name.removesuffix(".py"), "common"):
            sys.modules.pop(module, None)
    assert isinstance(config, ConfigDict)
    config.optim.learning_rate = 0.5
    assert plain(config)["optim"]["learning_rate"] == 0.5
    assert (
        plain(config)["trunk"]["encoders"]
        == load_config(f"{FOLDER / name}:{record.variants(name)[-1]}")["trunk"]["encoders"]
    )
    assert list(config.trunk.encoders) == list(plain(config)["trunk"]["encoders"])
