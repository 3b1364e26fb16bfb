"""What the tests of published families share: a reference read as a model of ours, run, and written back."""

import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import references
from flax.traverse_util import unflatten_dict

from vmm.model import Recipe, Trunk
from vmm.types import MODALITIES, Batch, Outputs
from vmm.weights.families import FAMILIES, reason
from vmm.weights.published import Imported, read_published, read_tensors, write_published


def read(name: str, folder: Path) -> tuple[references.Reference, Imported]:
    """Publishes a reference in a folder and reads it as ours; what is left over has a reason."""
    reference = references.read(name)
    imported = read_published(reference.publish(folder))
    assert all(reason(imported.family, left) for left in imported.left), imported.left
    return reference, imported


def recipe_of(imported: Imported) -> tuple[Recipe, dict]:
    """Returns the Recipe and its parameters."""
    model = imported.model
    return Recipe(model["trunk"], model["views"], model["objectives"]), unflatten_dict(imported.tensors, sep=".")


def batch_of(**inputs) -> Batch:
    """Returns a batch of the inputs given, all present; modality → array [B ...]."""
    rows = len(next(iter(inputs.values())))
    return Batch(
        inputs={name: jnp.asarray(value) for name, value in inputs.items()},
        present={name: jnp.ones(rows, bool) for name in MODALITIES},
        labels={"label": jnp.full(rows, -1)},
        index=jnp.arange(rows),
        valid=jnp.ones(rows, bool),
    )


def assert_initialised(imported: Imported, batch: Batch) -> None:
    """The names and shapes of the parameters are just those that the model initialises."""
    recipe, params = recipe_of(imported)
    made = jax.eval_shape(
        lambda key: nn.unbox(recipe.init(key, batch, jax.random.split(key, len(batch.index)))), jax.random.key(0)
    )
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, made["params"])


# Of one model, whoever imported it, a function is compiled once: (model, function) → compiled.
_compiled = {}


def run(imported: Imported, function, *args):
    """Returns function(recipe, *args) with the imported parameters."""
    recipe, params = recipe_of(imported)
    key = (json.dumps(imported.model, sort_keys=True), function)
    if key not in _compiled:
        _compiled[key] = jax.jit(lambda params, *args: recipe.apply({"params": params}, *args, method=function))
    return _compiled[key](params, *args)


def encode(imported: Imported, **inputs) -> dict:
    """Returns modality → Tokens that our encoders make of the inputs with the imported parameters."""
    fields = imported.model["trunk"]
    key = (json.dumps(fields, sort_keys=True), "encode")
    if key not in _compiled:
        trunk = Trunk(**fields)

        def encoded(trunk, inputs):
            return {name: trunk.encode(name, trunk.encoder[name].patches(x)) for name, x in inputs.items()}

        _compiled[key] = jax.jit(lambda params, inputs: trunk.apply({"params": params}, inputs, method=encoded))
    return _compiled[key](recipe_of(imported)[1]["model"], inputs)


def predictions(recipe: Recipe, encoded: dict, batch: Batch) -> dict:
    """What the objectives say of encoded streams; for `run`."""
    outputs = Outputs(encoded, recipe.model.fuse(encoded), {}, {})
    return {name: objective.predict(outputs, batch) for name, objective in recipe.objective.items()}


def relative(ours, theirs) -> float:
    """Returns max |ours − theirs| / max |theirs|."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def close(what: str, ours, theirs, tolerance: float = 1e-5) -> None:
    error = relative(ours, theirs)
    print(f"{what}: relative error {error:.1e}")
    assert error < tolerance


def assert_exported(
    imported: Imported, reference: references.Reference, folder: Path, merged: tuple = (), changed: dict | None = None
) -> None:
    """Writes our model in its family's layout: it holds the tensors that were read, and the same config.

    merged: ends of the names of tensors that are written back otherwise, as the sum of two or without those that are
    not used; what ours is made of is the same again. changed: settings of config.json that are written otherwise, see
    `differences`. A bias that the original lacks is zero.
    """
    write_published(folder, imported.family, imported.model, imported.tensors)
    config = json.loads((folder / "config.json").read_text())
    ours, theirs = read_tensors(folder), reference.tensors
    prefix = FAMILIES[imported.family].PREFIX
    if not any(name.startswith(prefix) for name in theirs):
        theirs = {prefix + name: value for name, value in theirs.items()}
    theirs = {name: value for name, value in theirs.items() if name not in imported.left}
    for name in set(ours) - set(theirs):
        assert reference.config["qkv_bias"] is False and name.endswith(".bias")
        theirs[name] = np.zeros_like(ours[name])
    assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}
    differ = {name for name in ours if not np.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7)}
    assert differ == {name for name in ours if merged and name.endswith(merged)}

    again = read_published(folder)
    assert again.left == []
    assert alike(again.model, imported.model)
    assert set(again.tensors) == set(imported.tensors)
    for name, value in imported.tensors.items():
        np.testing.assert_allclose(again.tensors[name], value, rtol=1e-6, atol=1e-7, err_msg=name)

    usual = references.read("defaults").config.get(imported.family, {})
    assert differences(config, filled(usual, reference.config)) == (changed or {})


def filled(usual: dict, told: dict) -> dict:
    """Returns what is told, and what is usual where nothing is."""
    both = usual.keys() & told.keys()
    inner = {
        key: filled(usual[key], told[key])
        for key in both
        if isinstance(usual[key], dict) and isinstance(told[key], dict)
    }
    return usual | told | inner


def alike(one, other) -> bool:
    """Two descriptions are one, up to rounding: the statistics of pixels are written as parts of 255."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return math.isclose(one, other, rel_tol=1e-9) if isinstance(one, float) else one == other


def differences(ours: dict, theirs: dict, at: str = "") -> dict:
    """Returns the settings of ours that are not theirs: name → (theirs, None if there is none; ours)."""
    found = {}
    for key, value in ours.items():
        other = theirs.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            found |= differences(value, other, f"{at}{key}.")
        elif value != other:
            found[at + key] = (other, value)
    return found
