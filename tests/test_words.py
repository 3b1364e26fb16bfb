"""The words of a caption as labels of fused streams, and streams that stay out of the fusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from test_layers import parameters
from test_objectives import LAST_IS_FILLING, PATCHES, ROWS, SOME, view_of

from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.objectives.words import Words


def apart(present=SOME):
    """Outputs of a trunk that fuses no text, and their batch."""
    outputs, batch = view_of(present, LAST_IS_FILLING)
    return outputs._replace(fused={name: outputs.fused[name] for name in ("video", "audio")}), batch


def test_the_loss_is_that_of_the_words_by_hand():
    outputs, batch = apart()
    module = Words()
    params = parameters(module, outputs, batch)
    value, metrics = module.apply({"params": params}, outputs, batch)
    patches, errors, found = outputs.patches["text"], [], []
    for i in range(ROWS):
        logits = np.full(PATCHES["text"][2], -np.log(PATCHES["text"][2]))
        for name in ("video", "audio"):
            tokens = outputs.fused[name]
            if SOME[name][i]:
                head = params[f"{name}_words"]
                logits += np.asarray(tokens.x[i])[np.asarray(tokens.valid[i])].mean(0) @ head["kernel"] + head["bias"]
        words = {int(v) for v, there in zip(patches.values[i], patches.valid[i]) if there}
        if words and LAST_IS_FILLING[i] and (SOME["video"][i] or SOME["audio"][i]):
            errors.append(sum(np.log1p(np.exp(-z if v in words else z)) for v, z in enumerate(logits)))
            found.append(np.mean([logits[v] > 0 for v in words]))
    np.testing.assert_allclose(float(value), np.mean(errors), rtol=1e-5)
    np.testing.assert_allclose(float(metrics["found"]), np.mean(found), rtol=1e-5)


def test_padding_is_no_word_and_repeats_count_once():
    outputs, batch = apart({name: np.ones(ROWS, bool) for name in SOME})
    text = outputs.patches["text"]
    ids = jnp.tile(jnp.array([3, 3, 4, 0, 0, 0]), (ROWS, 1))
    valid = jnp.tile(jnp.array([True, True, True, False, False, False]), (ROWS, 1))
    module = Words()
    params = jax.tree.map(jnp.zeros_like, parameters(module, outputs, batch))
    params["video_words"]["bias"] = params["video_words"]["bias"].at[jnp.array([3, 4])].set(50.0).at[0].set(-50.0)
    outputs = outputs._replace(patches=outputs.patches | {"text": text._replace(values=ids, valid=valid)})
    value, metrics = module.apply({"params": params}, outputs, batch)
    count = PATCHES["text"][2]  # of all but three it knows only that most words are in no caption
    np.testing.assert_allclose(float(value), (count - 3) * np.log1p(1 / count), rtol=1e-5)
    assert float(metrics["found"]) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(), "have seen the text"),
        (dict(stage="late"), "words.stage: unknown 'late'"),
        (dict(text="audio"), "'audio' is no stream of token ids"),
        (dict(streams=("video", "text"), stage="encoded"), "words.streams: some of"),
        (dict(streams=()), "words.streams: some of"),
    ],
)
def test_what_cannot_be_is_one_line(fields, message):
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    with pytest.raises(UserError, match=message):
        Words(**fields).init(jax.random.key(0), outputs, batch)


def of_demo(world_folder, **trunk):
    config = small_config(world_folder)
    config["trunk"] |= trunk
    config["objectives"]["masked"]["modalities"] = ("video", "audio")
    return config


def test_streams_apart_are_encoded_and_change_nothing_that_is_fused(world_folder):
    experiment = Experiment(of_demo(world_folder, apart=("text",)))
    params = jax.eval_shape(experiment.initialise, jax.random.key(0))
    assert not [path for path in _paths(params) if "fuse" in path and "text" in path]
    params = jax.jit(experiment.initialise)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = jax.tree.map(
        lambda leaf: np.asarray(rng.integers(0, 2 if leaf.dtype == bool else 100, leaf.shape), leaf.dtype),
        experiment.batch_shapes(2),
    )
    batch = batch._replace(present={name: np.ones(2, bool) for name in batch.present}, valid=np.ones(2, bool))
    predict = jax.jit(lambda batch: experiment.recipe.apply({"params": params}, batch, method="predict"))
    one = predict(batch)
    other = predict(batch._replace(inputs=batch.inputs | {"text": batch.inputs["text"][::-1]}))
    assert {key for key in one if key.startswith("fused/")} == {"fused/video", "fused/audio"}
    for name in ("video", "audio"):
        np.testing.assert_array_equal(one[f"fused/{name}"], other[f"fused/{name}"])
    assert np.abs(one["encoded/text"] - other["encoded/text"]).max() > 0.01


def _paths(tree) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def test_what_is_not_fused_is_not_decoded(world_folder):
    config = of_demo(world_folder, apart=("text",))
    config["objectives"]["masked"]["modalities"] = ("video", "text")
    with pytest.raises(UserError, match="stay out of the fusion"):
        Experiment(config)


@pytest.mark.parametrize("names", [("words",), ("video", "audio", "text")])
def test_streams_that_cannot_stay_apart_are_told(world_folder, names):
    with pytest.raises(UserError, match="trunk.apart: some of"):
        Experiment(of_demo(world_folder, apart=names))
