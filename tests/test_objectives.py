"""What every entry of OBJECTIVES promises; a new entry is tested as soon as it is listed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import HEADS, D, assert_trees_equal, finite
from flax.core import FrozenDict
from support.selection import first
from test_layers import assert_trees_close, parameters

from vmm.objectives import OBJECTIVES
from vmm.objectives.contrastive import Contrastive
from vmm.types import Batch, Mask, Outputs, Patches, Tokens

LABELS = {"action": 3, "sound": 2}
OBJECTIVE_FIELDS = {
    "contrastive": dict(width=8),
    "masked": dict(width=D, depth=1, heads=HEADS),
    "classify": dict(labels=LABELS),
    "latent": dict(modalities=("video", "audio", "text"), width=D, depth=1, heads=HEADS),
    "distill": dict(modalities=("video", "text"), width=D),
    "captioning": dict(width=D, depth=1, heads=HEADS),
    "moments": dict(curves=("worth",), seconds=4.0, steps=8, width=D, depth=1, heads=HEADS, points=2),
    "regress": dict(values=("mood",)),
    "identify": dict(label="action", classes=3, width=8),
    "pixels": dict(tubelet=(1, 2, 2), width=D, depth=1, heads=HEADS),
    "align": dict(labels=LABELS),
    "words": dict(stage="encoded"),  # a trunk that keeps the text apart: tests/test_words.py
    "localise": dict(classes=3, seconds=4.0, participants=2, steps=8, width=D, depth=1, heads=HEADS, points=2),
}
ROWS = 5
PATCHES = {"video": ((2, 2, 2), 12, 0), "audio": ((3, 2), 6, 0), "text": ((6,), None, 11)}
SHOWN = {"video": 3, "audio": 3, "text": 3}
objectives = pytest.mark.parametrize("kind", OBJECTIVES)


def objective_of(kind: str, **fields):
    return OBJECTIVES[kind](**OBJECTIVE_FIELDS.get(kind, {}) | fields)


def events_of(rng) -> dict:
    """Targets of kind "events": up to two of 3 classes in 4 s, with box and participants where known; one row unknown."""
    start = rng.uniform(0, 2, (ROWS, 2))
    return {
        "start": np.float32(start),
        "end": np.float32(start + rng.uniform(0.5, 2, (ROWS, 2))),
        "label": np.where([True, False], 1, rng.integers(-1, 3, (ROWS, 2))).astype(np.int32),
        "box": np.where(rng.random((ROWS, 2, 1)) < 0.3, np.nan, np.sort(rng.random((ROWS, 2, 4)))).astype(np.float32),
        "participants": np.where(rng.random((ROWS, 2, 1)) < 0.3, np.nan, rng.integers(0, 2, (ROWS, 2, 2))).astype(
            np.float32
        ),
        "known": np.arange(ROWS) != 1,
    }


def view_of(present: dict, valid, seed: int = 0) -> tuple[Outputs, Batch]:
    """One view's outputs and its batch. present: modality → bool [ROWS]; text has some padding."""
    rng = np.random.default_rng(seed)
    encoded, fused, patches, masks, inputs, taught = {}, {}, {}, {}, {}, ({}, {}, {})
    for name, (grid, size, classes) in PATCHES.items():
        count = math.prod(grid)
        there = np.repeat(np.asarray(present[name])[:, None], count, axis=1)
        if classes:
            values = rng.integers(1, classes, (ROWS, count)).astype(np.int32)
            there = there & (np.arange(count) < rng.integers(4, count + 1, (ROWS, 1)))
        elif name == "video":
            values = rng.integers(0, 256, (ROWS, count, size)).astype(np.uint8)
        else:
            values = rng.normal(size=(ROWS, count, size)).astype(np.float32)
        order = np.array([rng.permutation(count) for _ in range(ROWS)], np.int32)
        mask = Mask(*(jnp.asarray(np.sort(part)) for part in (order[:, : SHOWN[name]], order[:, SHOWN[name] :])))
        shown = np.take_along_axis(there, np.asarray(mask.keep), 1)
        for streams in (encoded, fused):
            x = rng.normal(size=(ROWS, SHOWN[name], D)).astype(np.float32) * shown[..., None]
            streams[name] = Tokens(jnp.asarray(x), jnp.asarray(shown), mask.keep)
        for streams in taught[:2]:  # a teacher sees everything
            x = rng.normal(size=(ROWS, count, D)).astype(np.float32) * there[..., None]
            at = np.tile(np.arange(count, dtype=np.int32), (ROWS, 1))
            streams[name] = Tokens(*map(jnp.asarray, (x, there, at)))
        taught[2][name] = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for _ in range(3)]
        patches[name] = Patches(jnp.asarray(values), jnp.asarray(there), grid, classes)
        masks[name] = mask
        inputs[name] = jnp.asarray(values)
    labels = {name: jnp.asarray(rng.integers(-1, classes, ROWS), jnp.int32) for name, classes in LABELS.items()}
    batch = Batch(
        inputs,
        {name: jnp.asarray(value) for name, value in present.items()},
        labels,
        jnp.arange(ROWS, dtype=jnp.int32),
        jnp.asarray(valid),
        targets={
            "events": jax.tree.map(jnp.asarray, events_of(rng)),
            "worth": jnp.asarray(
                np.where(rng.uniform(size=(ROWS, 8)) < 0.2, np.nan, rng.uniform(size=(ROWS, 8))), "float32"
            ),
            "mood": jnp.asarray(np.where(np.arange(ROWS) == 1, np.nan, rng.normal(size=ROWS)), jnp.float32),
        },
    )
    target = Outputs(*taught[:2], patches, {}, taught[2])
    return Outputs(encoded, fused, patches, masks, target=target, swapped=fused["text"].valid.any(1)), batch


SOME = {
    "video": np.array([True, True, True, False, True]),
    "audio": np.array([True, False, True, True, True]),
    "text": np.array([True, True, True, True, False]),
}
NONE = {name: np.zeros(ROWS, bool) for name in SOME}
LAST_IS_FILLING = np.arange(ROWS) < ROWS - 1


def arrays_of(outputs: Outputs) -> tuple:
    """The arrays of the outputs; grids and classes are static and stand aside."""
    patches = {k: (p.values, p.valid) for k, p in outputs.patches.items()}
    target = outputs.target.encoded, outputs.target.fused, outputs.target.layers
    return outputs.encoded, outputs.fused, patches, outputs.masks, target


def outputs_from(arrays: tuple) -> Outputs:
    encoded, fused, patches, masks, (*taught, layers) = arrays
    patches = {k: Patches(*patches[k], PATCHES[k][0], PATCHES[k][2]) for k in patches}
    target = Outputs(*taught, patches, {}, layers)
    return Outputs(encoded, fused, patches, masks, target=target, swapped=fused["text"].valid.any(1))


@functools.cache
def objective_functions(kind: str, fields: tuple = ()):
    """(parameters, (params, arrays, batch) → (loss, metrics, gradients in parameters and in tokens))."""
    module = objective_of(kind, **dict(fields))
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    # Parameters may be made by `predict` or by `loss`: the whole call makes all.
    params = parameters(module, outputs, batch)

    def function(params, arrays, batch):
        encoded, fused, *rest = arrays

        def loss(params, *contents):
            streams = [
                {name: tokens._replace(x=x[name]) for name, tokens in streams.items()}
                for streams, x in zip((encoded, fused), contents)
            ]
            return module.apply({"params": params}, outputs_from((*streams, *rest)), batch)

        contents = [{name: tokens.x for name, tokens in streams.items()} for streams in (encoded, fused)]
        (value, metrics), gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, *contents)
        return value, metrics, gradient

    return params, jax.jit(function)


VARIANTS = [(kind, ()) for kind in OBJECTIVES] + [
    ("contrastive", (("variant", "sigmoid"), ("bias", -1.0), ("pooling", "attention"), ("heads", 2))),
    ("contrastive", (("chunk", 2),)),
    ("captioning", (("context", ("audio",)), ("positions", "learned"), ("depth", 2))),
    ("align", (("labels", FrozenDict()), ("prototypes", 5), ("stage", "fused"), ("stop_gradient", True))),
    (
        "masked",
        (("modalities", ("video", "text")), ("standardise", "colour"), ("context", ("audio", "text")), ("decode", 0.5)),
    ),
    ("masked", (("standardise", False), ("modalities", ("audio", "text")))),
    ("classify", (("pooling", "attention"), ("heads", 2))),
    ("latent", (("stage", "fused"), ("context", "all"), ("error", "l2"), ("positions", "rotary"))),
    ("latent", (("layers", 2), ("error", "smooth_l1"), ("modalities", ("audio",)))),
    ("distill", (("of", "pooled"), ("error", "l2"), ("stage", "fused"))),
    ("localise", (("streams", ("video",)), ("boxes", False), ("participants", 0), ("radius", 1.0), ("depth", 0))),
    (
        "pixels",
        (("context", ("audio",)), ("similarity", 0.5), ("edges", 0.5), ("adversary", FrozenDict(depth=1, width=4))),
    ),
]
# Each kind once, and where nothing more is compiled for it, or in `make test-all`, every variant.
variants = pytest.mark.parametrize(("kind", "fields"), VARIANTS, ids=lambda v: v if isinstance(v, str) else str(len(v)))
kinds_first = pytest.mark.parametrize(
    ("kind", "fields"), first(VARIANTS, len(OBJECTIVES), ids=lambda v: f"{v[0]}-{len(v[1])}")
)


@variants
def test_call_is_loss_of_features(kind: str, fields: tuple):
    params, function = objective_functions(kind, fields)
    module = objective_of(kind, **dict(fields))
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    value, metrics, gradient = function(params, arrays_of(outputs), batch)
    assert value.shape == ()
    assert value.dtype == jnp.float32
    assert all(metric.shape == () for metric in metrics.values())
    assert finite((value, metrics, gradient))
    # Every parameter learns.
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient[0]):
        assert np.abs(leaf).max() > 0, path

    @jax.jit
    def parts(params):
        features = module.apply({"params": params}, outputs, batch, method="features")
        return features, module.apply({"params": params}, features, method="loss")

    features, (again, again_metrics) = parts(params)
    assert jax.tree.leaves(features)
    for leaf in jax.tree.leaves(features):
        assert leaf.shape[0] == ROWS
    np.testing.assert_allclose(again, value, rtol=1e-6)
    assert_trees_close(dict(again_metrics), dict(metrics), 1e-6)


@kinds_first
def test_rows_that_only_fill_a_batch_change_nothing(kind: str, fields: tuple):
    """Garbage in them, and the loss is that of the batch without them."""
    params, function = objective_functions(kind, fields)
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    arrays = arrays_of(outputs)
    clean = function(params, arrays, batch)
    strange, strange_batch = view_of({name: np.ones(ROWS, bool) for name in SOME}, LAST_IS_FILLING, seed=9)

    def mix(ours, theirs):
        return jax.tree.map(lambda a, b: a.at[-1].set(b[-1]), ours, theirs)

    dirty_batch = mix(batch, strange_batch)
    dirty = function(params, mix(arrays, arrays_of(strange)), dirty_batch)
    assert_trees_close(dirty, clean, 1e-6)
    short = jax.tree.map(lambda leaf: leaf[:-1], (arrays, batch))
    value, metrics, gradient = function(params, *short)
    assert_trees_close((value, metrics, gradient[0]), (clean[0], clean[1], clean[2][0]), 1e-5)


@variants
def test_absent_streams_and_padding_change_no_loss(kind: str, fields: tuple):
    params, function = objective_functions(kind, fields)
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    encoded, fused, patches, masks, (taught, taught_fused, layers) = arrays_of(outputs)
    clean = function(params, arrays_of(outputs), batch)

    def wild(streams):
        return {k: t._replace(x=jnp.where(t.valid[..., None], t.x, 1e3)) for k, t in streams.items()}

    moved = {}
    for name, (values, valid) in patches.items():
        mask = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2))
        moved[name] = (jnp.where(mask, values, 7).astype(values.dtype), valid)
    target = (wild(taught), wild(taught_fused), layers)
    dirty = function(params, (wild(encoded), wild(fused), moved, masks, target), batch)
    assert_trees_equal(dirty, clean)
    for gradients, streams in zip(clean[2][1:], (encoded, fused)):
        for name, tokens in streams.items():
            assert not np.asarray(gradients[name])[~np.asarray(tokens.valid)].any()


@pytest.mark.parametrize("filling", [False, True], ids=["rows", "no rows"])
@variants
def test_a_batch_of_nothing_has_a_finite_loss(kind: str, fields: tuple, filling: bool):
    params, function = objective_functions(kind, fields)
    outputs, batch = view_of(NONE, np.full(ROWS, not filling))
    value, metrics, gradient = function(params, arrays_of(outputs), batch)
    assert finite((value, metrics, gradient))
    if filling:
        assert float(value) == 0.0


@kinds_first
def test_predictions_are_per_sample(kind: str, fields: tuple):
    params, _ = objective_functions(kind, fields)
    module = objective_of(kind, **dict(fields))
    outputs, batch = view_of(SOME, LAST_IS_FILLING)

    @jax.jit
    def predict(params, arrays, batch):
        return module.apply({"params": params}, outputs_from(arrays), batch, method="predict")

    predictions = predict(params, arrays_of(outputs), batch)
    assert predictions
    assert isinstance(module.needs_hidden, bool)
    for value in predictions.values():
        assert value.shape[0] == ROWS
        assert value.dtype == jnp.float32
        assert np.isfinite(value).all()
    # A prediction is of its own sample, whatever the batch and its labels.
    order = np.array([3, 0, 4, 1, 2])
    turned = jax.tree.map(lambda leaf: leaf[order], (arrays_of(outputs), batch))
    again = predict(params, *turned)
    for name, value in predictions.items():
        np.testing.assert_allclose(again[name], value[order], atol=1e-5)


@objectives
def test_every_objective_has_a_view_and_a_weight(kind: str):
    module = objective_of(kind, view="other", weight=0.25)
    assert (module.view, module.weight) == ("other", 0.25)


def test_classify_is_the_mean_of_votes():
    """By hand: a sample's logits are the mean of its own streams' heads, none where it has no stream."""
    params, _ = objective_functions("classify")
    outputs, batch = view_of(SOME, np.ones(ROWS, bool))
    logits = objective_of("classify").apply({"params": params}, outputs, batch, method="predict")["action"]
    for row in range(ROWS):
        votes = []
        for name, tokens in outputs.fused.items():
            there = np.asarray(tokens.valid)[row]
            if there.any():
                head = params[f"{name}_action"]
                votes.append(np.asarray(tokens.x)[row][there].mean(0) @ head["kernel"] + head["bias"])
        np.testing.assert_allclose(logits[row], np.mean(votes, axis=0) if votes else 0, atol=1e-5)


def test_masked_is_the_mean_error_of_a_hidden_token():
    """Predictions of zero: the error of a standardised patch is 1, of a text token ln V."""
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    params, function = objective_functions("masked")
    blank = jax.tree_util.tree_map_with_path(lambda path, p: 0 * p if path[1].key == "head" else p, params)
    _, metrics, _ = function(blank, arrays_of(outputs), batch)
    assert float(metrics["video"]) == pytest.approx(1.0, abs=1e-3)
    assert float(metrics["audio"]) == pytest.approx(1.0, abs=1e-3)
    assert float(metrics["text"]) == pytest.approx(math.log(11), rel=1e-5)


def test_the_contrastive_scale_is_clamped():
    module = Contrastive(width=8, max_scale=100.0)
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    params = parameters(module, outputs, batch)
    losses = []
    for scale in (100.0, 1e6):
        value, metrics = module.apply({"params": params | {"log_scale": jnp.float32(math.log(scale))}}, outputs, batch)
        assert float(metrics["scale"]) == pytest.approx(100.0, rel=1e-4)
        losses.append(float(value))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
