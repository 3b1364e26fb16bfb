"""What the tests of published families share: a model of `transformers` with random weights, there and back."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from vmm.model import Recipe
from vmm.types import MODALITIES, Batch
from vmm.weights.published import Imported, read_published, write_published

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def randomise(model, seed: int = 0, scale: float = 0.2):
    """Gives every parameter of a PyTorch model a value that is not special (no zero biases, no unit scales)."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, scale)
    return model.eval()


def save_and_read(model, folder: Path) -> Imported:
    """Writes a model with `save_pretrained` and reads it as ours; no tensor may be left over."""
    model.save_pretrained(folder)
    imported = read_published(folder)
    assert imported.left == []
    return imported


def recipe_of(imported: Imported) -> tuple[Recipe, dict]:
    """Returns the Recipe and its parameters, whose names and shapes must be just those that it initialises."""
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


def encode(imported: Imported, **inputs) -> dict:
    """Returns modality → Tokens that our encoders make of the inputs with the imported parameters."""
    recipe, params = recipe_of(imported)
    batch = batch_of(**inputs)
    shapes = jax.eval_shape(
        lambda key: recipe.init(key, batch, jax.random.split(key, len(batch.index))), jax.random.key(0)
    )
    ours = {
        "/".join(str(k.key) for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    made = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x: x, _unbox(shapes["params"])))
    assert ours == {"/".join(str(k.key) for k in path): leaf.shape for path, leaf in made}

    def trunk(recipe, batch):
        return {
            name: recipe.model.encode(name, recipe.model.encoder[name].patches(batch.inputs[name])) for name in inputs
        }

    return jax.jit(lambda params: recipe.apply({"params": params}, batch, method=trunk))(params)


def _unbox(tree):
    import flax.linen as nn

    return nn.unbox(tree)


def relative(ours, theirs) -> float:
    """Returns max |ours − theirs| / max |theirs|; theirs may be of PyTorch."""
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def export_and_load(imported: Imported, cls, folder: Path):
    """Writes our model in its family's layout and loads it with `cls.from_pretrained`: nothing missing, nothing more."""
    write_published(folder, imported.family, imported.model, imported.tensors)
    loaded, told = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return loaded.eval()


def assert_same_state(ours, theirs):
    """Every tensor of two PyTorch models is the same, up to what a rescaling rounds."""
    one, two = ours.state_dict(), theirs.state_dict()
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), two[name].numpy(), rtol=1e-6, atol=1e-7, err_msg=name)
