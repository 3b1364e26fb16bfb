"""Latent prediction and distillation: their arithmetic, who sees what, who learns, and how losses are balanced."""

import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from contracts import HEADS, D
from test_layers import assert_trees_close, parameters, stacked
from test_objectives import LAST_IS_FILLING, ROWS, SOME, objective_of, view_of
from test_optim import TRUNK, batch_of, recipe_parameters, whole_recipe

from vmm.encoders import ENCODERS
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.layers import layers_of
from vmm.model import Recipe, loss_function, sample_keys
from vmm.objectives.latent import Latent
from vmm.teachers import open_teachers
from vmm.training.optim import Optim, ema_decay
from vmm.training.step import make_program
from vmm.weights import save_params

# The arithmetic


def numpy_standardise(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


ARITHMETIC = [
    dict(error="l1"),
    dict(error="l2", normalise=False, stage="fused"),
    dict(error="smooth_l1", beta=0.7, layers=2),
]


@pytest.mark.parametrize("fields", ARITHMETIC, ids=lambda f: f["error"])
def test_latent_is_the_mean_error_of_a_hidden_token(fields: dict):
    """In float64, token by token, from the module's own predictions."""
    module = objective_of("latent", **fields)
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    params = parameters(module, outputs, batch)

    @jax.jit
    def both(params):
        predictions = module.apply({"params": params}, outputs, batch, method="predict")
        return predictions, module.apply({"params": params}, outputs, batch)

    predictions, (value, metrics) = both(params)
    expected = {}
    for name, prediction in predictions.items():
        taught = outputs.target.encoded if module.stage == "encoded" else outputs.target.fused
        layers = outputs.target.layers[name][-2:] if module.layers == 2 else [taught[name].x]
        errors = []
        for row in range(ROWS):
            for k, at in enumerate(np.asarray(outputs.masks[name].hidden)[row]):
                if not (outputs.patches[name].valid[row, at] and LAST_IS_FILLING[row]):
                    continue
                targets = [np.asarray(x, np.float64)[row, at] for x in layers]
                if module.normalise or module.layers > 1:
                    targets = [numpy_standardise(x) for x in targets]
                error = np.abs(np.asarray(prediction, np.float64)[row, k] - np.mean(targets, axis=0))
                if module.error == "l2":
                    error = error**2
                elif module.error == "smooth_l1":
                    error = np.where(error < 0.7, error**2 / 1.4, error - 0.35)
                errors.append(error.mean())
        expected[name] = np.mean(errors)
        assert float(metrics[name]) == pytest.approx(expected[name], rel=1e-4)
    assert float(value) == pytest.approx(np.mean(list(expected.values())), rel=1e-4)


def test_a_prediction_is_of_its_place():
    """Hidden places in another order: the same predictions in that order; shown tokens move them, their order does not."""
    module = objective_of("latent", modalities=("audio",))
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    params = parameters(module, outputs, batch)
    predict = jax.jit(
        lambda masks, encoded: module.apply(
            {"params": params}, outputs._replace(masks=masks, encoded=encoded), batch, method="predict"
        )["audio"]
    )
    mask, tokens = outputs.masks["audio"], outputs.encoded["audio"]
    plain = predict(outputs.masks, outputs.encoded)
    assert np.abs(np.diff(plain, axis=1)).max() > 1e-3
    turned = predict({**outputs.masks, "audio": mask._replace(hidden=mask.hidden[:, ::-1])}, outputs.encoded)
    np.testing.assert_allclose(turned[:, ::-1], plain, atol=1e-5)
    swapped = jax.tree.map(lambda leaf: leaf[:, ::-1], tokens)
    np.testing.assert_allclose(predict(outputs.masks, {**outputs.encoded, "audio": swapped}), plain, atol=1e-5)
    other = predict(outputs.masks, {**outputs.encoded, "audio": tokens._replace(x=-tokens.x)})
    there = np.asarray(tokens.valid).any(1)
    assert (np.abs(other - plain).max((1, 2)) > 1e-3)[there].all()


@pytest.mark.parametrize("fields", [dict(), dict(of="pooled", error="l2", stage="fused")], ids=["tokens", "pooled"])
def test_distill_is_the_mean_error_of_a_feature(fields: dict):
    module = objective_of("distill", modalities=("video",), **fields)
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    params = parameters(module, outputs, batch)
    value, _ = module.apply({"params": params}, outputs, batch)
    head = jax.tree.map(lambda p: np.asarray(p, np.float64), params["project_video"])
    mine = (outputs.fused if module.stage == "fused" else outputs.encoded)["video"]
    theirs = (outputs.target.fused if module.stage == "fused" else outputs.target.encoded)["video"]
    errors = []
    for row in range(ROWS):
        shown = np.flatnonzero(mine.valid[row])
        if not len(shown) or not LAST_IS_FILLING[row]:
            continue
        x, y = np.asarray(mine.x, np.float64)[row, shown], np.asarray(theirs.x, np.float64)[row]
        if module.of == "pooled":
            error = (x.mean(0) @ head["kernel"] + head["bias"]) - numpy_standardise(y.mean(0))
            errors.append((error**2).mean())
        else:
            for token, at in zip(x @ head["kernel"] + head["bias"], np.asarray(mine.at)[row, shown]):
                errors.append(1 - token @ y[at] / np.linalg.norm(token) / np.linalg.norm(y[at]))
    assert float(value) == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("kind", ["video", "text"])
def test_layers_of_an_encoder(kind: str):
    """Sown for who asks: as many as blocks, the last one before the final norm; a scan's are the loop's."""
    fields = {key: value for key, value in TRUNK["encoders"][kind].items() if key != "kind"} | dict(depth=3)
    encoder = ENCODERS[kind](**fields)
    patches = encoder.patches(batch_of().inputs[kind])
    params = parameters(encoder, patches, None)

    def layers(params, scan=False):
        tokens, sown = ENCODERS[kind](**fields, scan=scan).apply({"params": params}, patches, None, mutable=["layers"])
        return tokens.x, layers_of(sown["layers"])

    x, found = jax.jit(layers)(params)
    assert [layer.shape for layer in found] == [x.shape] * 3
    norm = params["stack"]["norm"]
    last = numpy_standardise(np.asarray(found[-1], np.float64)) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(last, x, atol=1e-4)
    assert np.abs(found[1] - found[0]).max() > 1e-2
    assert_trees_close(jax.jit(functools.partial(layers, scan=True))(stacked(params)), (x, found), 1e-5)
    many = {f"layer_{i}": {"x": jnp.full((1, 1, 1), i)} for i in (10, 2, 0)}
    assert [int(layer[0, 0, 0]) for layer in layers_of({"stack": {"blocks": many}})] == [0, 2, 10]  # not by letter


# Who sees what

MASKED = dict(video=dict(kind="multiblock", ratio=0.5, blocks=2), text=dict(kind="span", ratio=0.4))
LATENT = dict(kind="latent", width=16, depth=1, heads=2, modalities=("video", "text"), view="masked", target="target")


def latent_recipe(**changes) -> Recipe:
    return whole_recipe(
        **dict(
            views=dict(masked=MASKED, target=dict(teacher=True)),
            objectives=dict(
                own=LATENT | dict(layers=1),
                joint=LATENT | dict(stage="fused", context="all", error="l2"),
            ),
        )
        | changes
    )


def taught(params):
    """A teacher that is not the student."""
    return jax.tree.map(lambda p: p * 0.7 + 0.01, params)


def test_the_student_sees_nothing_of_what_is_hidden():
    """Other pixels and words in hidden places: the same predictions to the bit, and another loss."""
    recipe, batch = latent_recipe(), batch_of()
    params = recipe_parameters(recipe, batch)

    @jax.jit
    def look(batch):
        keys = sample_keys(jax.random.key(5), batch.index)
        predictions = recipe.apply({"params": params}, batch, "masked", keys, method="predict")
        return predictions, loss_function(recipe)(params, taught(params), batch, jax.random.key(5))[0]

    predictions, value = look(batch)
    video, words = np.array(batch.inputs["video"]), np.array(batch.inputs["text"])
    for row in range(len(video)):
        for at in np.asarray(predictions["hidden/video"])[row]:
            t, y, x = np.unravel_index(at, (2, 2, 2))
            place = np.s_[row, 2 * t : 2 * t + 2, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            video[place] = 255 - video[place]
        for at in np.asarray(predictions["hidden/text"])[row]:
            words[row, at] = words[row, at] % 12 + 1 if words[row, at] else 0
    assert (video != batch.inputs["video"]).mean() > 0.3
    other, changed = look(batch._replace(inputs=dict(video=jnp.asarray(video), text=jnp.asarray(words))))
    jax.tree.map(np.testing.assert_array_equal, other, predictions)
    assert abs(float(changed) - float(value)) > 1e-3


def test_accumulation_is_the_full_batch():
    """Targets of a teacher's middle layers, and of its own tokens, part by part."""
    objectives = dict(own=LATENT | dict(layers=1), follow=dict(kind="distill", width=16, view="masked", of="pooled"))
    recipe, batch = latent_recipe(objectives=objectives), batch_of()
    params = recipe_parameters(recipe, batch)
    values = [
        jax.jit(loss_function(recipe, accumulate))(params, taught(params), batch, jax.random.key(5))
        for accumulate in (1, 4)
    ]
    assert_trees_close(values[1], values[0], 1e-5)


FROZEN = (("model/encoder_video/.*", 0.0), (".*", 1.0))


def test_the_student_learns_and_the_teacher_does_not():
    recipe, batch = latent_recipe(), batch_of()
    params = recipe_parameters(recipe, batch)
    loss = loss_function(recipe)
    gradients = jax.jit(lambda p, t: jax.grad(lambda p, t: loss(p, t, batch, jax.random.key(5))[0], (0, 1))(p, t))
    mine, theirs = gradients(params, taught(params))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(theirs))
    for path, leaf in jax.tree_util.tree_leaves_with_path(mine):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_a_frozen_encoder_stays_in_the_student_and_in_the_average():
    """Two steps, the second measured: what is frozen stays, the rest moves, in both."""
    recipe, batch = latent_recipe(objectives=dict(joint=LATENT | dict(stage="fused"))), batch_of()
    params = recipe_parameters(recipe, batch)
    optim = Optim(ema=0.5, ema_end=1.0, rate_rules=FROZEN)
    program = make_program(
        lambda key: jax.tree.map(jnp.asarray, params), loss_function(recipe), optim,
        steps=10, seed=0, mesh=None, health=2,
    )  # fmt: skip
    state = program.init(jax.random.key(0))
    first = jax.device_get(state.params)
    for step in range(2):
        state, metrics = program.step(state, batch)
        assert math.isnan(metrics["health/video/encoded_rank"]) == (step == 0)
    for tree in (state.params, state.ema):
        for name in first["model"]:
            same = jax.tree.map(lambda a, b: bool((a == b).all()), tree["model"][name], first["model"][name])
            assert all(jax.tree.leaves(same)) == (name == "encoder_video"), name
    assert all(math.isfinite(value) for value in metrics.values())
    assert float(metrics["health/video/gradient_share"]) == 0.0
    assert float(metrics["health/text/gradient_share"]) == 1.0
    assert float(metrics["health/joint/gradient_share"]) == 1.0


def test_the_averages_decay_changes_evenly():
    decays = [float(ema_decay(Optim(ema=0.99, ema_end=1.0), jnp.int32(step), 100)) for step in (0, 50, 100)]
    assert decays == pytest.approx([0.99, 0.995, 1.0])
    assert ema_decay(Optim(ema=0.99), jnp.int32(50), 100) == 0.99


# Balance


def action(loss: float) -> dict:
    """Features of classify whose loss is known."""
    ones = jnp.ones(4)
    return {"action": {"error": loss * ones, "right": ones, "weight": ones}}


def two(balance: str) -> Recipe:
    labels = dict(kind="classify", labels=dict(action=3))
    return whole_recipe(
        views=dict(clean={}), objectives=dict(one=labels | dict(weight=2.0), two=labels), balance=balance
    )


def test_uncertainty_rests_at_one_over_the_loss():
    """Σ w (exp(−s) L + s): by hand at any s; its gradient is zero at s = ln L, where the sum is Σ w (1 + ln L)."""
    recipe, features = two("uncertainty"), {"one": action(0.2), "two": action(3.0)}

    @jax.jit
    def function(s):
        params = {"balance_one": s[0], "balance_two": s[1]}
        value, metrics = recipe.apply({"params": params}, features, method="loss")
        return value, metrics

    value, metrics = function(jnp.array([0.3, -0.4]))
    expected = 2 * (math.exp(-0.3) * 0.2 + 0.3) + math.exp(0.4) * 3.0 - 0.4
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["one/balance"]) == pytest.approx(2 * math.exp(-0.3), rel=1e-5)
    best = jnp.log(jnp.array([0.2, 3.0]))
    assert float(function(best)[0]) == pytest.approx(2 * (1 + math.log(0.2)) + 1 + math.log(3.0), rel=1e-5)
    np.testing.assert_allclose(jax.grad(lambda s: function(s)[0])(best), 0, atol=1e-5)
    assert float(jax.grad(lambda s: function(s)[0])(best + 0.5)[1]) > 0.1


def test_gradient_balance_by_hand():
    """Norms 1 and 3, weights 2 and 1: the mean is 5/3, and each loss is brought to it; a loss of no gradient stays finite."""
    recipe, features = two("gradient"), {"one": action(0.2), "two": action(3.0)}
    norms = {"one": jnp.float32(1.0), "two": jnp.float32(3.0)}
    value, metrics = recipe.apply({"params": {}}, features, norms, method="loss")
    assert float(metrics["one/balance"]) == pytest.approx(2 * 5 / 3, rel=1e-5)
    assert float(metrics["two/balance"]) == pytest.approx(5 / 9, rel=1e-5)
    assert float(value) == pytest.approx(2 * 5 / 3 * 0.2 + 5 / 9 * 3.0, rel=1e-5)
    norms["one"] = jnp.float32(0.0)
    value, metrics = recipe.apply({"params": {}}, features, norms, method="loss")
    assert float(metrics["one/balance"]) == 200.0
    assert math.isfinite(value)


def test_gradient_balance_equalises_the_shares():
    """Two heads on the same tokens, one's logits ten times as large: their weighted norms, measured apart, become alike.

    The whole batch in one and in four parts gives the same numbers.
    """
    batch = batch_of()
    recipe = two("gradient")
    params = recipe_parameters(recipe, batch)
    params["objective_two"] = jax.tree.map(lambda p: p * 10, params["objective_two"])

    def whole(recipe, accumulate):
        loss = loss_function(recipe, accumulate)
        function = jax.value_and_grad(
            lambda p: loss(p, p, batch, jax.random.key(5), measure=jnp.bool_(True)), has_aux=True
        )
        (value, metrics), gradient = jax.jit(function)(params)
        return value, dict(metrics), gradient

    value, metrics, gradient = whole(recipe, 1)
    assert_trees_close(whole(recipe, 4), (value, metrics, gradient), 1e-5)

    # Apart: the gradient of each loss in a shift of every token after the fusion.
    def apart(name):
        def loss(shift):
            outputs = recipe.apply({"params": params}, batch, keys, False, method="look")["clean"]
            fused = {k: t._replace(x=t.x + shift[k]) for k, t in outputs.fused.items()}
            seen = {"clean": outputs._replace(fused=fused)}
            features = recipe.apply({"params": params}, name, seen, batch, method="head")
            return recipe.apply({"params": params}, name, features, method="value")

        keys = sample_keys(jax.random.key(5), batch.index)
        zeros = {"video": jnp.zeros((8, 8, 16)), "text": jnp.zeros((8, 6, 16))}
        gradient = jax.jit(jax.grad(loss))(zeros)
        return math.sqrt(sum(float(jnp.square(g).sum()) for g in gradient.values()))

    one, other = apart("one"), apart("two")
    assert other > 3 * one
    shares = float(metrics["one/balance"]) * one, float(metrics["two/balance"]) * other
    assert shares[0] == pytest.approx(2 * shares[1], rel=1e-3), "as their weights"
    assert float(metrics["health/one/gradient_share"]) == pytest.approx(2 / 3, rel=1e-3)
    # The gradient of the parameters is that of the losses so weighed, nothing flows through the weights.
    fixed = whole_recipe(
        views=dict(clean={}),
        objectives={
            name: dict(kind="classify", labels=dict(action=3), weight=float(metrics[f"{name}/balance"]))
            for name in ("one", "two")
        },
    )
    assert_trees_close(whole(fixed, 1)[2], gradient, 1e-5)


# A published teacher


def test_a_published_model_teaches(tmp_path):
    """Its file's features, by its own trunk, are what the student follows; it is no part of state or gradient."""
    teacher_trunk = dict(
        encoders=dict(
            video=dict(kind="video", width=24, depth=1, heads=2, tubelet=(2, 12, 12)),
            text=dict(kind="text", width=24, depth=1, heads=2, vocabulary=512),
        ),
        fusion=dict(kind="late", width=24, depth=0, heads=2),
    )
    config = small_config(tmp_path, batch=8, steps=3)
    config["trunk"] = dict(
        encoders=dict(video=config["trunk"]["encoders"]["video"]), fusion=dict(kind="late", width=32, depth=0, heads=2)
    )
    config |= dict(
        views=dict(masked=dict(video=dict(kind="tube", ratio=0.5)), other=dict(teacher=str(tmp_path / "teacher"))),
        objectives=dict(follow=dict(kind="distill", view="masked", target="other", width=24)),
        evals={},
        optim=dict(learning_rate=1e-3),
        health=1,
        log_every=1,
    )
    experiment = Experiment(config)
    with pytest.raises(UserError, match="teacher"):
        open_teachers(experiment, None)

    teacher = Recipe(teacher_trunk, {"clean": {}}, {"labels": dict(kind="classify", labels={"video": 2})})
    rng = np.random.default_rng(0)
    shapes = experiment.batch_shapes()
    batch = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    batch = batch._replace(index=np.arange(8, dtype=np.int32))
    batch.inputs["video"] = rng.integers(0, 256, shapes.inputs["video"].shape).astype(np.uint8)
    batch.present["video"][2] = False
    batch = jax.tree.map(jnp.asarray, batch)
    params = parameters(teacher, batch, jax.random.split(jax.random.key(0), 8))
    (tmp_path / "teacher").mkdir()
    save_params(params, tmp_path / "teacher" / "model.safetensors")
    published = dict(
        library_name="vmm", format=1, version="0", step=0, clip={}, labels={},
        model=dict(trunk=teacher_trunk, views={"clean": {}}, objectives={}),
    )  # fmt: skip
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(published))

    teachers = open_teachers(experiment, None)
    assert set(teachers.trunks) == {"other"}
    assert "encoder_text" not in teachers.params[0]["other"], "of what this model takes"
    program = experiment.program(None, teachers.trunks)
    state = program.init(jax.random.key(0))
    assert not any("other" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
    start = jax.device_get(state.params)
    state, metrics = program.step(state, batch, *teachers.params)

    # By hand, from the published tree.
    keys = sample_keys(jax.random.fold_in(jax.random.key(config.get("seed", 0)), 0), batch.index)

    @jax.jit
    def features(params, start):
        taught = teacher.apply({"params": params}, batch, keys, False, method="look")["clean"]
        seen = experiment.recipe.apply({"params": start}, batch, keys, False, method="look")["masked"]
        return taught.encoded["video"].x, seen.encoded["video"]

    theirs, mine = jax.device_get(features(params, start))
    head = start["objective_follow"]["project_video"]
    errors = []
    for row in range(8):
        for k, at in enumerate(mine.at[row]):
            if mine.valid[row, k]:
                a, b = mine.x[row, k] @ head["kernel"] + head["bias"], theirs[row, at]
                errors.append(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert float(metrics["follow"]) == pytest.approx(np.mean(errors), rel=1e-4)
    assert float(metrics["health/follow/gradient_share"]) == pytest.approx(1.0)


# Wrong configs


def test_wrong_teachers_and_balances_are_errors():
    batch = batch_of()
    target = dict(teacher=True)
    for changes, message in (
        (dict(views=dict(masked=MASKED, target={})), "objectives.own.target: no teacher's view 'target'"),
        (dict(views=dict(masked=MASKED, target=dict(teacher="a", video=MASKED["video"]))), "sees everything"),
        (dict(views=dict(masked=MASKED, target=dict(teacher=3))), "views.target.teacher: True, or the folder"),
        (dict(views=dict(masked=MASKED, target=target | dict(video=MASKED["video"]))), "must show all of it"),
        (dict(views=dict(masked=dict(video=MASKED["video"]), target=target)), "hides nothing of 'text'"),
        (dict(balance="gradnorm"), "balance: unknown 'gradnorm'"),
        (
            dict(objectives=dict(own=LATENT | dict(layers=2))),
            "latent.layers: 2, but the encoder of 'video' has 1 blocks",
        ),
        (dict(objectives=dict(own=LATENT | dict(layers=2, stage="fused"))), "stage must be 'encoded'"),
        (dict(objectives=dict(own=LATENT | dict(error="l3"))), "latent.error: unknown 'l3'"),
        (
            dict(objectives=dict(far=dict(kind="distill", width=8, view="masked"))),
            "distill.width: 8, but the teacher's tokens of 'video' have 16",
        ),
    ):
        recipe = latent_recipe(**changes)
        keys = jax.random.split(jax.random.key(0), len(batch.index))
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda key, r=recipe, k=keys: nn.unbox(r.init(key, batch, k)), jax.random.key(0))


def test_latent_is_small_beside_what_it_predicts():
    """Predictors' parameters by their closed form: enter, mask, blocks, norm, head."""
    module = Latent(modalities=("video",), width=8, depth=2, heads=HEADS)
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    sizes = jax.tree.map(np.size, parameters(module, outputs, batch))
    block = 4 * (8 * 8 + 8) + 8 * 32 + 32 + 32 * 8 + 8 + 4 * 8
    assert sum(jax.tree.leaves(sizes)) == (D * 8 + 8) + 8 + 2 * block + 16 + (8 * D + D)
