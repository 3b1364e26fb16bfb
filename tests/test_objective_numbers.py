"""Objectives against numbers worked by hand: what leaks, what is decoded, what agrees, what is mismatched."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import HEADS, D
from test_layers import assert_trees_close, parameters
from test_objectives import LAST_IS_FILLING, ROWS, SOME, objective_of, view_of

from vmm import pairing
from vmm.errors import UserError
from vmm.model import Recipe
from vmm.objectives.masked import running_cells
from vmm.sharding import MeshShape, make_mesh, to_device
from vmm.types import Batch

LENGTH, VOCABULARY = 7, 13
ENCODERS = dict(
    video=dict(kind="video", width=D, depth=1, heads=HEADS, tubelet=(2, 4, 4)),
    text=dict(kind="text", vocabulary=VOCABULARY, width=D, depth=1, heads=HEADS, registers=1),
)
JOINT = dict(kind="joint", width=D, depth=1, heads=HEADS)
LATE = dict(kind="late", width=D, depth=0, heads=HEADS)


@functools.cache
def batch_of(rows: int = 3) -> Batch:
    """Clips of 4 frames of 8 × 8, and captions of 5, 6 and 7 tokens."""
    rng = np.random.default_rng(0)
    text = rng.integers(1, VOCABULARY, (rows, LENGTH)).astype(np.int32)
    text[np.arange(LENGTH) >= 5 + np.arange(rows)[:, None] % 3] = 0
    video = rng.integers(0, 256, (rows, 4, 8, 8, 3)).astype(np.uint8)
    there = jnp.ones(rows, bool)
    inputs = dict(video=jnp.asarray(video), text=jnp.asarray(text))
    return Batch(inputs, dict(video=there, text=there), {}, jnp.arange(rows, dtype=jnp.int32), there)


def keys_of(batch: Batch):
    return jax.random.split(jax.random.key(0), len(batch.index))


def recipe_of(views: dict, fusion: dict = JOINT, **objectives):
    """(recipe, random parameters)."""
    recipe = Recipe(dict(encoders=ENCODERS, fusion=fusion), views, objectives)
    return recipe, parameters(recipe, batch_of(), keys_of(batch_of()))


def with_text(batch: Batch, text) -> Batch:
    return batch._replace(inputs=batch.inputs | {"text": jnp.asarray(text)})


CAPTION = dict(kind="captioning", context=("video",), width=D, depth=2, heads=HEADS)


@pytest.mark.parametrize("stage", ["encoded", "fused"])
def test_a_caption_knows_nothing_of_what_follows(stage: str):
    """Any other ids from place j on, and the logits up to j are the same bits; those after j are not."""
    hidden = dict(kind="random", ratio=1.0)
    views = dict(clean={} if stage == "encoded" else dict(text=hidden))
    recipe, params = recipe_of(views, words=CAPTION | dict(stage=stage))
    view = None if stage == "encoded" else "clean"

    @jax.jit
    def logits(batch):
        return recipe.apply({"params": params}, batch, view, keys_of(batch), method="predict")["words/text"]

    batch = batch_of()
    clean = logits(batch)
    assert clean.shape == (3, LENGTH, VOCABULARY)
    text = np.asarray(batch.inputs["text"])
    for place in range(LENGTH):
        # The number of tokens too: all that follows becomes padding, or none of it is.
        for others in (0, (text[:, place:] + 3) % (VOCABULARY - 1) + 1):
            changed = text.copy()
            changed[:, place:] = others
            moved = logits(with_text(batch, changed))
            np.testing.assert_array_equal(moved[:, : place + 1], clean[:, : place + 1])
        if place + 1 < LENGTH:
            assert np.abs(moved[:, place + 1] - clean[:, place + 1]).max() > 1e-3
    # And they do know the picture.
    negative = batch._replace(inputs=batch.inputs | {"video": 255 - batch.inputs["video"]})
    assert np.abs(logits(negative) - clean).max() > 1e-3


def test_fused_streams_that_saw_the_caption_are_refused():
    with pytest.raises(UserError, match="ratio 1"):
        recipe_of(dict(clean={}), words=CAPTION | dict(stage="fused"))
    with pytest.raises(UserError, match="itself not among them"):
        recipe_of(dict(clean={}), words=CAPTION | dict(context=("text",)))


def test_captioning_is_the_mean_error_of_a_token():
    """By hand from the logits: padding, absent captions, clips of neither sight nor sound and filling rows apart."""
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    module = objective_of("captioning")
    params = {"params": parameters(module, outputs, batch)}
    logits, value, metrics = jax.jit(
        lambda: (module.apply(params, outputs, batch, method="predict")["text"], *module.apply(params, outputs, batch))
    )()
    logits, ids, valid = np.float64(logits), *(np.asarray(x) for x in outputs.patches["text"][:2])
    told = np.asarray(outputs.encoded["video"].valid.any(1) | outputs.encoded["audio"].valid.any(1))
    errors, right = [], []
    for row in range(ROWS):
        for place in range(ids.shape[1]):
            if valid[row, place] and told[row] and LAST_IS_FILLING[row]:
                scores = logits[row, place]
                errors.append(np.log(np.exp(scores).sum()) - scores[ids[row, place]])
                right.append(scores.argmax() == ids[row, place])
    assert len(errors) > 10
    assert float(value) == pytest.approx(np.mean(errors), rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(right), abs=1e-6)


def test_generate_takes_the_likeliest_token_until_the_end():
    outputs, batch = view_of({name: np.ones(ROWS, bool) for name in SOME}, np.ones(ROWS, bool))
    module = objective_of("captioning")
    params = {"params": parameters(module, outputs, batch)}
    length = outputs.patches["text"].values.shape[1]

    @jax.jit
    def logits(ids):
        patches = outputs.patches["text"]._replace(values=ids, valid=jnp.ones(ids.shape, bool))
        given = outputs._replace(patches=outputs.patches | {"text": patches})
        return module.apply(params, given, batch, method="predict")["text"]

    ids = np.zeros((ROWS, length), np.int32)
    for place in range(length):  # never padding, id 0
        ids[:, place] = 1 + np.asarray(logits(jnp.asarray(ids)))[:, place, 1:].argmax(-1)

    def generate(end):
        return jax.jit(lambda: module.apply(params, outputs, batch, end, method="generate"))()["ids"]

    np.testing.assert_array_equal(generate(-1), ids)
    end = int(ids[0, 2])  # as if that token were the end of the text
    ended = np.cumsum(ids == end, axis=1) - (ids == end) > 0
    np.testing.assert_array_equal(generate(end), np.where(ended, 0, ids))


def numpy_align(posteriors: dict, there: dict) -> dict:
    """pair → ½ [KL(p ‖ q) + KL(q ‖ p)], the mean over samples with both."""
    result = {}
    for one, two in (("video", "audio"), ("video", "text"), ("audio", "text")):
        values = [
            0.5 * sum((p - q) * math.log(p / q) for p, q in zip(posteriors[one][row], posteriors[two][row]))
            for row in np.flatnonzero(there[one] & there[two])
        ]
        result[f"{one}-{two}"] = np.mean(values)
    return result


@functools.cache
def aligned(stop: bool, stage: str):
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    module = objective_of(
        "align", labels={}, prototypes=4, stop_gradient=stop, spread=0.5, temperature=0.7, stage=stage
    )
    params = parameters(module, outputs, batch)

    def function(params):
        value, metrics = module.apply({"params": params}, outputs, batch)
        return value, (metrics, module.apply({"params": params}, outputs, batch, method="predict"))

    (value, (metrics, said)), gradient = jax.jit(jax.value_and_grad(function, has_aux=True))(params)
    there = {n: np.asarray(t.valid.any(1)) & LAST_IS_FILLING for n, t in getattr(outputs, stage).items()}
    return float(value), metrics, said, gradient, params, there, getattr(outputs, stage)


@pytest.mark.parametrize("stage", ["encoded", "fused"])
def test_align_is_the_symmetric_divergence_and_the_spread(stage: str):
    value, metrics, said, _, params, there, streams = aligned(False, stage)
    posteriors = {}
    for name, tokens in streams.items():
        x, valid = np.float64(tokens.x), np.asarray(tokens.valid)
        mean = np.stack([row[v].mean(0) if v.any() else 0 * row[0] for row, v in zip(x, valid)])
        head = params[f"{name}_prototypes"]
        logits = (mean @ np.float64(head["kernel"]) + np.float64(head["bias"])) / 0.7
        posteriors[name] = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(said[f"prototypes/{name}"], posteriors[name], rtol=1e-4)
    pairs = numpy_align(posteriors, there)
    for name, expected in pairs.items():
        assert float(metrics[name]) == pytest.approx(expected, rel=1e-4)
    means = {name: p[there[name]].mean(0) for name, p in posteriors.items()}
    entropy = np.mean([-(p * np.log(p)).sum() for p in means.values()])
    assert float(metrics["entropy"]) == pytest.approx(entropy, rel=1e-4)
    assert value == pytest.approx(np.mean(list(pairs.values())) + 0.5 * (math.log(4) - entropy), rel=1e-4)


def test_align_with_stopped_gradients_has_the_same_value_and_learns_from_one_side():
    value, *_, gradient, _, _, _ = aligned(False, "encoded")
    stopped, *_, stopped_gradient, _, _, _ = aligned(True, "encoded")
    assert stopped == pytest.approx(value, rel=1e-6)
    differ = [float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (gradient, stopped_gradient)))]
    assert max(differ) > 1e-3
    # Two coins: d/dq of ½ [KL(p ‖ q) + KL(q ‖ p)] with each target fixed is ½ (q − p) in the logits, for either coin.
    module = objective_of(
        "align", labels={}, prototypes=2, modalities=("video", "audio"), stop_gradient=True, spread=0.0
    )
    logits = {"video": jnp.array([[0.0, 1.0]]), "audio": jnp.array([[0.5, -0.5]])}
    there = {name: jnp.ones(1, bool) for name in logits}

    def loss(logits):
        said = {name: jax.nn.log_softmax(value) for name, value in logits.items()}
        features = {"posteriors": {"prototypes": said}, "there": there, "truth": {}}
        return module.apply({"params": {}}, features, method="loss")[0]

    slope = jax.jit(jax.grad(loss))(logits)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (np.float64(logits["video"]), np.float64(logits["audio"])))
    np.testing.assert_allclose(slope["video"], 0.5 * (p - q), atol=1e-6)
    np.testing.assert_allclose(slope["audio"], 0.5 * (q - p), atol=1e-6)


def test_align_by_labels_adds_their_error():
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    module = objective_of("align", labels={"action": 3}, supervise=2.0)
    params = {"params": parameters(module, outputs, batch)}
    value, metrics, said = jax.jit(
        lambda: (*module.apply(params, outputs, batch), module.apply(params, outputs, batch, method="predict"))
    )()
    errors, truth = [], np.asarray(batch.labels["action"])
    for name, tokens in outputs.encoded.items():
        rows = np.asarray(tokens.valid.any(1)) & LAST_IS_FILLING & (truth >= 0)
        assert rows.any()
        errors.append(-np.log(np.float64(said[f"action/{name}"])[rows, truth[rows]]).mean())
    assert float(metrics["action/error"]) == pytest.approx(np.mean(errors), rel=1e-5)
    pairs = np.mean([float(metrics[name]) for name in ("video-audio", "video-text", "audio-text")])
    assert float(value) == pytest.approx(pairs + 2 * np.mean(errors), rel=1e-5)
    with pytest.raises(UserError, match="either labels"):
        parameters(objective_of("align", labels={}), outputs, batch)


GRID = (4, 4, 6)


def test_running_cells_take_their_share_of_every_cell():
    """All hidden, half decoded: at every time two places of each 2 × 2 cell, each place at half of the times."""
    count = math.prod(GRID)
    keys = jax.random.split(jax.random.key(0), 8)
    hidden = jnp.tile(jnp.arange(count, dtype=jnp.int32), (8, 1))
    places = np.asarray(jax.jit(lambda: running_cells(keys, hidden, hidden >= 0, GRID, count // 2))())
    chosen = np.zeros((8, count), bool)
    np.put_along_axis(chosen, places, True, 1)
    assert (chosen.sum(1) == count // 2).all()
    cells = chosen.reshape(8, 4, 2, 2, 3, 2).transpose(0, 1, 2, 4, 3, 5)
    assert (cells.sum((-1, -2)) == 2).all()
    assert (chosen.reshape(8, *GRID).sum(1) == 2).all()
    assert len({row.tobytes() for row in chosen}) > 1  # cells begin at random


def test_running_cells_decode_padding_last():
    keys = jax.random.split(jax.random.key(1), 64)
    hidden = jnp.tile(jnp.arange(12, dtype=jnp.int32), (64, 1))
    valid = jnp.tile(jnp.arange(12) % 3 > 0, (64, 1))  # 8 of 12
    places = np.asarray(jax.jit(lambda: running_cells(keys, hidden, valid, (20,), 6))())
    assert np.asarray(valid)[0][places].all()
    times = np.bincount(places.ravel(), minlength=12)
    assert (times[np.asarray(valid)[0]] > 30).all()  # 48 on average: a text has no cells, all are alike


def test_decoding_some_counts_some():
    """The error is of the chosen places alone; other samples of the run choose others."""
    outputs, batch = view_of({name: np.ones(ROWS, bool) for name in SOME}, np.ones(ROWS, bool))
    module = objective_of("masked", decode=0.5, modalities=("video",))
    params = {"params": parameters(module, outputs, batch)}
    features = jax.jit(lambda batch: module.apply(params, outputs, batch, method="features"))
    first, later = features(batch), features(batch._replace(index=batch.index + 100))
    hidden = outputs.masks["video"].hidden.shape[1]
    assert (np.asarray(first["video"]["count"]) == hidden // 2).all()
    assert np.abs(first["video"]["error"] - later["video"]["error"]).max() > 1e-3
    assert module.apply(params, outputs, batch, method="predict")["video"].shape[1] == hidden
    for decode in (0.0, 1.5):
        with pytest.raises(UserError, match="share of the hidden tokens"):
            parameters(objective_of("masked", decode=decode), outputs, batch)
    with pytest.raises(UserError, match="standardise must be one of"):
        parameters(objective_of("masked", standardise="frame"), outputs, batch)


@pytest.mark.parametrize("fusion", [JOINT, LATE], ids=["fused", "context"])
def test_a_hidden_modality_is_painted_in_from_another(fusion: dict):
    """All of the text hidden: what is predicted of it depends on the video, and on nothing of the text."""
    inpaint = dict(kind="masked", modalities=("text",), width=D, depth=1, heads=HEADS, context=("video",))
    recipe, params = recipe_of(dict(masked=dict(text=dict(kind="span", ratio=1.0))), fusion, inpaint=inpaint)

    @jax.jit
    def predict(batch):
        said = recipe.apply({"params": params}, batch, "masked", keys_of(batch), method="predict")
        slope = jax.grad(lambda p: recipe.apply({"params": p}, batch, keys_of(batch))[0])(params)
        return said["inpaint/text"], slope

    batch = batch_of()
    clean, slope = predict(batch)
    assert clean.shape == (3, LENGTH, VOCABULARY)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    assert np.abs(slope["model"]["encoder_video"]["embed"]["kernel"]).max() > 1e-6
    text = np.asarray(batch.inputs["text"])
    other, _ = predict(with_text(batch, np.where(text > 0, text % (VOCABULARY - 1) + 1, 0)))
    np.testing.assert_array_equal(other, clean)
    negative, _ = predict(batch._replace(inputs=batch.inputs | {"video": 255 - batch.inputs["video"]}))
    assert np.abs(negative - clean).max() > 1e-3


def draws(rounds: int, anchor, candidate, able, marks, among: int) -> np.ndarray:
    """How often each sample j was drawn for each i, and −1 where none was: counts [B B]; every round anew."""
    rows = len(able)
    keys = jax.random.split(jax.random.key(3), (rounds, rows))

    def one(keys):
        return pairing.draw(keys, anchor, candidate, able, marks, among)

    index, found = jax.jit(lambda keys: jax.lax.map(one, keys))(keys)
    counts = np.zeros((rows, rows), int)
    for i in range(rows):
        assert (found[:, i] == found[0, i]).all()
        assert found[0, i] or (index[:, i] == i).all()
        np.add.at(counts[i], np.asarray(index[:, i])[np.asarray(found[:, i])], 1)
    return counts


def test_partners_are_drawn_by_likeness_and_never_from_those_that_cannot():
    rng = np.random.default_rng(5)
    rows, rounds = 8, 4000
    anchor, candidate = (jnp.asarray(rng.normal(size=(rows, 3)), jnp.float32) for _ in range(2))
    able = np.array([1, 1, 1, 1, 1, 1, 0, 0], bool)
    number, known = np.array([4, 4, 5, 4, 7, 7, 4, 4], np.int32), np.array([1, 1, 1, 0, 1, 1, 1, 1], bool)
    counts = draws(rounds, anchor, candidate, jnp.asarray(able), [(jnp.asarray(number), jnp.asarray(known))], 4)
    logits = np.float64(anchor) @ np.float64(candidate).T
    for i in range(rows):
        share = np.zeros(rows)
        for j in range(rows):
            alike = number[i] == number[j] and known[i] and known[j]
            if i != j and i // 4 == j // 4 and able[j] and not alike:
                share[j] = np.exp(logits[i, j])
        if not share.any():  # 4 and 5 have only each other, and are alike
            assert i in (4, 5)
            assert not counts[i].any()
            continue
        assert not counts[i][share == 0].any()
        # Five deviations of a draw's frequency.
        share /= share.sum()
        np.testing.assert_allclose(counts[i] / rounds, share, atol=5 * 0.5 / rounds**0.5)


def test_rows_are_taken_where_the_draw_said():
    x = np.arange(24).reshape(12, 2)
    index = np.array([2, 0, 1, 5, 4, 3, 7, 8, 6, 9, 9, 11], np.int32)
    for among in (3, 5, 0):  # 5: the largest divisor of 12 below it is 4
        mine = index if among == 3 else np.arange(12, dtype=np.int32)[::-1].reshape(-1, 12 if among == 0 else 4)
        mine = mine if among == 3 else (mine if among == 0 else mine[::-1]).reshape(-1)
        ours = pairing.take({"x": jnp.asarray(x)}, jnp.asarray(mine), among)["x"]
        np.testing.assert_array_equal(ours, x[mine])
    assert [pairing.group_size(12, among) for among in (0, 1, 3, 5, 7, 100)] == [12, 1, 3, 4, 6, 12]


CONTRAST = dict(kind="contrastive", width=8, pairs=(("video", "text"),))
MIXED = {"of": "clean", "swap": "text", "hard": "contrast"}


def test_matching_fuses_each_clip_with_another_text():
    """By hand: the swapped view is the trunk's own fusion of a batch whose text was moved, and the loss is of both."""
    objectives = dict(contrast=CONTRAST, match=dict(kind="matching"))
    recipe, params = recipe_of(dict(clean={}, mixed=MIXED), **objectives)
    # The first two say the same; the last has no text, the fourth no picture.
    batch = batch_of(6)
    text = np.asarray(batch.inputs["text"]).copy()
    text[1] = text[0]
    there = {"video": np.arange(6) != 3, "text": np.arange(6) != 5}
    batch = with_text(batch, text)._replace(present={k: jnp.asarray(v) for k, v in there.items()})

    @jax.jit
    def both(params, batch):
        seen = recipe.apply({"params": params}, batch, keys_of(batch), False, method="look")

        def loss(p):
            return recipe.apply({"params": p}, batch, keys_of(batch))

        (_, metrics), slope = jax.value_and_grad(loss, has_aux=True)(params)
        return seen["mixed"]._replace(patches={}), seen["mixed"].patches["text"].values, metrics, slope

    mixed, ids, metrics, slope = jax.tree.map(np.asarray, both(params, batch))
    index = [next(j for j in range(6) if (text[j] == row).all()) for row in ids]
    assert all(index[i] not in (i, 5) for i in range(5))
    assert index[0] != 1
    assert index[1] != 0
    np.testing.assert_array_equal(mixed.swapped, [True, True, True, False, True, False])

    moved = with_text(batch, ids)._replace(present=batch.present | {"text": jnp.asarray(there["text"][index])})
    said = jax.jit(lambda b: recipe.apply({"params": params}, b, method="predict"))
    right, wrong = said(batch), said(moved)
    for name in ("video", "text"):
        x, valid = mixed.fused[name].x, mixed.fused[name].valid
        mean = (x * valid[..., None])[mixed.swapped][:, 1 if name == "text" else 0 :]
        count = valid[mixed.swapped][:, 1 if name == "text" else 0 :].sum(1, keepdims=True)
        np.testing.assert_allclose(mean.sum(1) / count, wrong[f"fused/{name}"][mixed.swapped], atol=1e-5)
    z, other = (np.float64(p["match/match"])[mixed.swapped] for p in (right, wrong))
    error = 0.5 * np.mean(np.log1p(np.exp(-z)) + np.log1p(np.exp(other)))
    assert float(metrics["match"]) == pytest.approx(error, rel=1e-5)
    assert float(metrics["match/swapped"]) == pytest.approx(4 / 6)
    assert float(metrics["match/accuracy"]) == pytest.approx(0.5 * np.mean((z > 0) * 1.0 + (other < 0)))
    # The fusion learns from it; the contrastive heads by their own loss only.
    assert np.abs(slope["model"]["fuse"]["stack"]["blocks"]["layer_0"]["block"]["mlp"]["up"]["kernel"]).max() > 1e-6


def test_matching_without_a_view_that_swaps_is_an_error():
    with pytest.raises(UserError, match="swaps no stream"):
        recipe_of(dict(clean={}), match=dict(kind="matching", view="clean"))
    for change, words in (
        ({"of": "other"}, "views.mixed.of: no view 'other'"),
        ({"swap": "audio"}, "views.mixed: a view of another has"),
        ({"by": 1}, "views.mixed: a view of another has"),
        ({"hard": "match"}, "views.mixed.hard: no objective 'match' that embeds 'text'"),
    ):
        with pytest.raises(UserError, match=words):
            recipe_of(dict(clean={}, mixed=MIXED | change), contrast=CONTRAST, match=dict(kind="matching"))


def test_on_a_mesh_all_is_as_on_one_device():
    """Partners, chunks and what is decoded are functions of the batch, not of who holds which part of it."""
    views = dict(
        clean={},
        mixed=MIXED | dict(among=4),
        masked=dict(video=dict(kind="tube", ratio=0.5)),
    )
    pixels = dict(kind="masked", modalities=("video",), context=("text",), decode=0.5, standardise="colour")
    recipe = Recipe(
        dict(encoders=ENCODERS, fusion=JOINT),
        views,
        dict(
            contrast=CONTRAST | dict(chunk=8),
            match=dict(kind="matching"),
            pixels=pixels | dict(width=D, depth=1, heads=HEADS),
        ),
    )
    batch = batch_of(16)
    params = parameters(recipe, batch, keys_of(batch))
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(MeshShape(*shape), jax.devices()[: math.prod(shape)])
        with jax.set_mesh(mesh):
            keys = jax.random.split(jax.random.key(1), 16)
            both = jax.jit(
                lambda params, batch, keys: jax.value_and_grad(
                    lambda p: recipe.apply({"params": p}, batch, keys), has_aux=True
                )(params)
            )
            found.append(jax.device_get(both(params, to_device(batch, mesh), keys)))
    assert_trees_close(found[1], found[0], 1e-6)
    assert found[0][0][1]["match/swapped"] == 1
