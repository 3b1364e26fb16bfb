"""References made again with PyTorch and transformers are those that are committed; exports load in transformers."""

import json

import numpy as np
import pytest
import references
from families import relative

from vmm.weights.published import read_published, write_published

NAMES = sorted(path.stem for path in references.HERE.glob("*.json"))
PUBLISHED = [name for name in NAMES if json.loads((references.HERE / f"{name}.json").read_text())["class"]]
# transformers says of AST's own filters that the lowest fall between two frequencies of the transform.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter:UserWarning")


@pytest.fixture(scope="module")
def make():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from references import make

    return make


def assert_told(config, again, at: str = "") -> None:
    """Every setting committed is there, and the same; releases of transformers add others."""
    if isinstance(config, dict) and isinstance(again, dict):
        for key, value in config.items():
            if key not in ("transformers_version", "_name_or_path"):
                assert_told(value, again.get(key), f"{at}.{key}")
    else:
        assert config == again, at


@pytest.mark.exhaustive("PyTorch and transformers at run time")
@pytest.mark.parametrize("name", NAMES)
def test_a_reference_made_again_is_the_one_committed(make, name: str):
    reference, again = references.read(name), make.MAKERS[name]()
    assert_told(reference.config, again.config)
    drawn = references.draw(again.shapes, again.prefix)
    groups = (
        (reference.tensors, drawn | again.stored),
        (reference.inputs, again.inputs),
        (reference.outputs, again.outputs),
        (reference.gradients, again.gradients),
    )
    for committed, made in groups:
        assert committed.keys() == made.keys()
        for key, value in committed.items():
            assert value.shape == np.shape(made[key]) and value.dtype == np.asarray(made[key]).dtype, key
            if not key.endswith("/rounding") and np.abs(value).max(initial=0):
                assert relative(value, made[key]) < 1e-5, key


@pytest.mark.exhaustive("PyTorch and transformers at run time")
def test_every_reference_is_made_by_the_script(make):
    assert sorted(make.MAKERS) == NAMES
    assert sorted(make.PUBLISHED) == PUBLISHED


@pytest.mark.exhaustive("PyTorch and transformers at run time")
@pytest.mark.parametrize("name", PUBLISHED)
def test_an_export_loads_in_transformers_and_says_the_same(make, name: str, tmp_path):
    """`from_pretrained` misses nothing, finds nothing more, and the model is the one that was read."""
    reference, spec = references.read(name), make.PUBLISHED[name]
    imported = read_published(reference.publish(tmp_path / "theirs"))
    write_published(tmp_path / "ours", imported.family, imported.model, imported.tensors)
    model, told = spec.load_again(tmp_path / "ours")
    assert all(key.startswith(spec.absent) for key in told["missing_keys"]), told
    assert not told["unexpected_keys"] and not told["mismatched_keys"], told
    with make.torch.no_grad():
        said = spec.run(model, reference.inputs)
        wanted = spec.run(spec.load(tmp_path / "theirs"), reference.inputs)
    for key in said:
        assert relative(said[key], wanted[key]) < 1e-6, key
