"""What training drops: of each sample by its own key, at the rates of its layer, and never of what is only looked at."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from contracts import HEADS, D
from test_fusion import FIELDS
from test_layers import assert_trees_close, draw, parameters, stacked
from test_optim import TRUNK, batch_of, recipe_parameters, whole_recipe

from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.fusion import FUSIONS
from vmm.layers import Block, SpaceTimeStack, Stack, lay_out, regularise
from vmm.model import Recipe, loss_function, sample_keys
from vmm.perturb import Adversary, ascend, unit
from vmm.sharding import MeshShape, batch_sharding, make_mesh
from vmm.types import Patches, Tokens

compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, N = 4, 6
X, THERE = draw((B, N, D)), jnp.ones((B, N), bool)
BOTH = dict(dropout=0.2, drop_path=0.4)
# Every parameter of a block that gives its sublayers' outputs.
OUT = ("out", "down")


def keys_of(seed: int, count: int = B):
    return sample_keys(jax.random.key(seed), jnp.arange(count))


def jaxpr(module, params, *args, keys=None):
    def function(params, *args):
        with regularise.dropping(keys, "clean"):
            return module.apply({"params": params}, *args)

    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(params, *args)))


# Layers


@pytest.mark.parametrize("scan", [False, True])
def test_without_rates_the_program_is_the_same(scan):
    stack = Stack(2, HEADS, scan=scan)
    params = parameters(stack, X, THERE)
    plain = jaxpr(stack, params, X, THERE)
    assert jaxpr(stack, params, X, THERE, keys=keys_of(0)) == plain
    # With rates it is the same too, where nobody hands keys: in predict, embed and publishing.
    dropping = Stack(2, HEADS, scan=scan, block=BOTH)
    assert jaxpr(dropping, params, X, THERE) == plain
    assert "random_bits" in jaxpr(dropping, params, X, THERE, keys=keys_of(0))
    assert "random_bits" not in plain


def test_rates_rise_linearly_from_zero():
    assert [regularise.path_rate(0.3, i, 4) for i in range(4)] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert regularise.path_rate(0.3, 0, 1) == 0.0
    assert regularise.path_rate(0.3, 0, 0) == 0.3  # a block that stands in no row


@pytest.mark.parametrize("scan", [False, True])
def test_layers_pass_samples_by_at_the_rates_of_their_layer(scan):
    """A layer whose sublayers add 1 and nothing else tells how many were kept: each adds 1 / (1 − rate) or 0."""
    depth, rate, count = 4, 0.6, 4000

    class Layer(nn.Module):
        block: dict = dataclasses.field(default_factory=lambda: dict(drop_path=rate))

        @nn.compact
        def __call__(self, carry, constants):
            x, i = carry
            y = regularise.dropped(self, "mlp", jnp.ones((count, 1, 1)), 0.0, rate)
            return x.at[i].set(y[:, 0, 0]), i + 1

    from vmm.layers import Repeat

    repeat = Repeat(Layer, {"block": dict(drop_path=rate)}, depth, scan)
    with regularise.dropping(keys_of(0, count), "clean"):
        got = np.asarray(repeat.apply({}, (jnp.zeros((depth, count)), jnp.int32(0)), ())[0])
    for i, values in enumerate(got):
        keep = 1 - rate * i / (depth - 1)
        np.testing.assert_allclose(values, np.where(values > 0, 1 / keep, 0), rtol=1e-6)
        assert (values > 0).mean() == pytest.approx(keep, abs=4 * (keep * (1 - keep) / count) ** 0.5 + 1e-9)
    assert abs(np.corrcoef(got[2] > 0, got[3] > 0)[0, 1]) < 0.06  # layers draw each for themselves


def test_scanned_or_not_the_same_is_dropped():
    loop, scanned = Stack(3, HEADS, block=BOTH), Stack(3, HEADS, scan=True, remat=True, block=BOTH)
    params = parameters(loop, X, THERE)

    def value(module):
        def function(params, keys):
            with regularise.dropping(keys, "clean"):
                return jnp.sin(module.apply({"params": params}, X, THERE)).sum()

        return compiled(jax.value_and_grad(function))

    one, gradient = value(loop)(params, keys_of(1))
    two, other = value(scanned)(stacked(params), keys_of(1))
    assert float(one) == pytest.approx(float(two), rel=1e-5)
    assert_trees_close(stacked(gradient), other, 1e-4)
    assert abs(float(value(loop)(params, keys_of(2))[0]) - float(one)) > 1e-3


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_against_numpy_on_what_it_kept(norm):
    """x + keep / (1 − rate) · branch, where the branches are the same block's, whole."""
    block, rate = Block(HEADS, norm=norm, drop_path=0.5), 0.5
    params = parameters(block, X, THERE)

    def apply(params, keys):
        with regularise.dropping(keys, "clean"):
            return block.apply({"params": params}, X, THERE)

    got = np.asarray(compiled(apply)(params, keys_of(7)))

    def only(*shut):
        """The block without a sublayer: its last map is zero."""
        mine = jax.tree.map(lambda x: x, params)
        for name, part in zip(("attention", "mlp"), OUT):
            if name in shut:
                mine[name][part] = jax.tree.map(jnp.zeros_like, mine[name][part])
            else:
                mine[name][part] = jax.tree.map(lambda x: x / (1 - rate), mine[name][part])
        return np.asarray(block.apply({"params": mine}, X, THERE))

    cases = {name: only(*name.split()) for name in ("", "attention", "mlp", "attention mlp")}
    found = [[name for name, case in cases.items() if np.allclose(got[i], case[i], atol=1e-5)] for i in range(B)]
    assert all(len(names) == 1 for names in found)
    assert len({names[0] for names in found}) > 1
    if norm == "pre":
        np.testing.assert_array_equal(cases["attention mlp"], X)  # who is passed by altogether is as it was


def test_what_is_dropped_has_no_gradient():
    """A sample that both sublayers of a layer pass by: an identity, in value and in gradient."""
    block = Block(HEADS, drop_path=1 - 1e-6)
    params = parameters(block, X, THERE)

    def function(params, x):
        with regularise.dropping(keys_of(0), "clean"):
            y = block.apply({"params": params}, x, THERE)
        return (y * draw(y.shape, 3)).sum(), y

    (gradient, by_x), y = compiled(jax.grad(function, (0, 1), has_aux=True))(params, X)
    np.testing.assert_array_equal(y, X)
    np.testing.assert_array_equal(by_x, draw(X.shape, 3))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("fields", [dict(dropout=0.3), dict(drop_path=0.3), BOTH])
def test_the_mean_is_kept(fields):
    """Over many samples, what a sublayer gives is on average what it gives without."""
    count, x = 20_000, draw((1, 2, 3))
    rates = dict(dropout=0.0, drop_path=0.0) | fields

    class Sublayer(nn.Module):
        def __call__(self, x):
            return regularise.dropped(self, "mlp", x, **rates)

    with regularise.dropping(keys_of(3, count), "clean"):
        y = Sublayer().apply({}, jnp.broadcast_to(x, (count, 2, 3)))
    scale = np.asarray(y / x)
    kept = np.prod([1 - rate for rate in fields.values()])
    np.testing.assert_allclose(np.unique(np.round(scale, 4)), [0, round(1 / kept, 4)], atol=1e-4)
    assert np.abs(scale.mean(0) - 1).max() < 5 * (1 / kept - 1) ** 0.5 / count**0.5
    values = scale.reshape(count, -1) > 0
    alike = np.mean(values == values[:, :1])
    assert (alike == 1) == (fields == dict(drop_path=0.3)), "a path is dropped whole, values each for itself"


def test_a_rate_of_one_is_an_error():
    block = Block(HEADS, dropout=1.0)
    with pytest.raises(UserError, match=r"block\.dropout: 1\.0; a share"):
        jax.eval_shape(lambda: block.init(jax.random.key(0), X, THERE))


# Fusions and encoders


@pytest.mark.parametrize("kind", FUSIONS)
def test_every_fusion_drops(kind):
    """In each, what is dropped is the sample's own: the same alone and in a batch; and nothing without keys."""
    rng = np.random.default_rng(0)
    streams = {
        name: Tokens(
            jnp.asarray(rng.normal(size=(B, count, D)), jnp.float32), jnp.ones((B, count), bool),
            jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (B, count)),
        )
        for name, count in (("video", 3), ("text", 2))
    }  # fmt: skip
    fields = FIELDS[kind] | dict(width=D, heads=HEADS, scan=True)
    plain, module = FUSIONS[kind](**fields), FUSIONS[kind](block=dict(dropout=0.1, drop_path=0.9), **fields)
    params = parameters(plain, streams)
    assert jaxpr(module, params, streams) == jaxpr(plain, params, streams)

    @compiled
    def apply(params, streams, keys):
        with regularise.dropping(keys, "clean"):
            return {name: tokens.x for name, tokens in module.apply({"params": params}, streams).items()}

    got = apply(params, streams, keys_of(0))
    turned = apply(params, jax.tree.map(lambda x: x[::-1], streams), keys_of(0)[::-1])
    for name in streams:
        np.testing.assert_allclose(turned[name][::-1], got[name], atol=2e-5)
        other = apply(params, streams, keys_of(1))[name]
        assert np.abs(other - got[name]).max() > 1e-3


@pytest.mark.parametrize("attention", ["divided", ("spatial", "temporal", "spatial"), "factorised"])
def test_space_time_layers_drop(attention):
    """Numbered through: the layers over time after those over space; scanned or not the same."""
    patches = Patches(jnp.zeros((B, 8, 1)), jnp.ones((B, 8), bool), (2, 2, 2), 0)
    layout, x = lay_out(patches, None), draw((B, 8, D))
    temporal = 1 if attention == "factorised" else 0
    fields = dict(attention=attention, temporal_depth=temporal, block=BOTH)
    outputs = []
    for scan in (False, True):
        module = SpaceTimeStack(3, HEADS, scan=scan, **fields)
        own = parameters(module, x, patches.valid, layout, seed=0)
        own = jax.tree.map(lambda p: jnp.full(p.shape, 0.03) + 0.01 * jnp.arange(p.shape[-1]) if p.ndim else p, own)

        def apply(params, module=module):
            with regularise.dropping(keys_of(5), "clean"):
                return module.apply({"params": params}, x, patches.valid, layout)

        outputs.append(np.asarray(compiled(apply)(own)))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    plain = np.asarray(module.apply({"params": own}, x, patches.valid, layout))
    assert np.abs(plain - outputs[0]).max() > 1e-3


# Recipes


def dropping_trunk(**rates) -> dict:
    two = dict(depth=2, scan=True, block=rates)
    return dict(
        encoders=dict(video=TRUNK["encoders"]["video"] | two), fusion=dict(kind="late", width=16, heads=2) | two
    )


def dropping_recipe(**changes) -> Recipe:
    pixels = dict(kind="masked", width=16, depth=2, heads=2, modalities=("video",), scan=True, block=BOTH)
    return whole_recipe(
        trunk=dropping_trunk(**BOTH),
        views=dict(masked=dict(video=dict(kind="random", ratio=0.5))),
        objectives=dict(pixels=pixels),
        **changes,
    )


@functools.cache
def recipe_parts():
    recipe, batch = dropping_recipe(), batch_of()
    return recipe, batch, recipe_parameters(recipe, batch)


@functools.cache
def gradient_function(accumulate: int):
    loss = loss_function(recipe_parts()[0], accumulate)
    return compiled(jax.value_and_grad(lambda p, batch, key: loss(p, p, batch, key)[0]))


def test_the_loss_knows_no_split_of_the_batch():
    """Accumulated, or on eight devices: the same is dropped, in the trunk and in the decoders."""
    _, batch, params = recipe_parts()
    value, gradient = gradient_function(1)(params, batch, jax.random.key(5))
    other, other_gradient = gradient_function(2)(params, batch, jax.random.key(5))
    assert float(other) == pytest.approx(float(value), rel=1e-5)
    assert_trees_close(other_gradient, gradient, 1e-4)
    mesh = make_mesh(MeshShape(8), jax.devices()[:8])
    with jax.set_mesh(mesh):
        split = jax.device_put(batch, batch_sharding(mesh))
        loss = loss_function(recipe_parts()[0])
        third = compiled(lambda p, batch, key: loss(p, p, batch, key)[0])(params, split, jax.random.key(5))
    assert float(third) == pytest.approx(float(value), rel=1e-5)
    # Another step drops others.
    assert abs(float(gradient_function(1)(params, batch, jax.random.key(6))[0]) - float(value)) > 1e-3


def test_what_is_dropped_is_of_the_sample_and_view():
    recipe, batch, params = recipe_parts()

    @compiled
    def seen(batch, key):
        keys = sample_keys(key, batch.index)
        outputs = recipe.apply({"params": params}, batch, keys, False, method="look")
        return {view: {name: tokens.x for name, tokens in outputs[view].fused.items()} for view in outputs}

    one = seen(batch, jax.random.key(0))
    order = np.array([5, 2, 7, 0, 1, 3, 4, 6])
    two = seen(jax.tree.map(lambda leaf: leaf[order], batch), jax.random.key(0))
    assert_trees_close(two, jax.tree.map(lambda x: x[order], one), 1e-4)


def test_nothing_is_dropped_where_nothing_is_trained():
    """predict, embed and a teacher's views are those of the recipe without rates, op by op."""
    recipe, batch, params = recipe_parts()
    plain = dataclasses.replace(
        recipe, trunk=dropping_trunk(),
        objectives={name: {k: v for k, v in spec.items() if k != "block"} for name, spec in recipe.objectives.items()},
    )  # fmt: skip
    keys = sample_keys(jax.random.key(0), batch.index)

    def program(recipe, method, *args):
        return re.sub(
            "0x[0-9a-f]+", "", str(jax.make_jaxpr(lambda p: recipe.apply({"params": p}, *args, method=method))(params))
        )

    teacher = dict(views=dict(recipe.views) | dict(target=dict(teacher=True)), objectives=dict(
        action=dict(kind="classify", labels=dict(action=3), view="target")))  # fmt: skip
    for one, two, method, args in (
        (recipe, plain, "predict", (batch,)),
        (recipe, plain, "predict", (batch, "masked", keys)),
        (recipe, plain, "embed", ({"video": batch.inputs["video"]},)),
        (dataclasses.replace(recipe, **teacher), dataclasses.replace(plain, **teacher), "look", (batch, keys, True)),
    ):
        assert program(one, method, *args) == program(two, method, *args), (method, len(args))
    assert program(recipe, "look", batch, keys, False) != program(plain, "look", batch, keys, False)


# Perturbed streams


def test_the_direction_of_ascent_is_the_gradient_of_each_sample_and_stream():
    """On a linear loss δ = ε a / ‖a‖ for any number of steps; on a parabola, step by step in numpy."""
    a = {"video": draw((B, 3, 2)), "text": draw((B, 2, 5), 1)}
    streams = {name: jnp.zeros_like(x) for name, x in a.items()}

    def norms(x):
        return np.sqrt(np.square(np.asarray(x, np.float64)).sum((1, 2), keepdims=True))

    for steps in (1, 3):
        adversary = Adversary(epsilon=0.7, steps=steps)
        got = ascend(lambda d: sum((a[name] * d[name]).sum() for name in a), streams, adversary)
        for name, x in a.items():
            np.testing.assert_allclose(got[name], 0.7 * np.asarray(x) / norms(x), rtol=1e-5)

    scale = np.array([1.0, 9.0])
    got = ascend(
        lambda d: (scale * jnp.square(d["video"] + a["video"])).sum(), {"video": streams["video"]}, Adversary(1.0, 2)
    )
    change, x = np.zeros((B, 3, 2)), np.asarray(a["video"], np.float64)
    for _ in range(2):
        gradient = 2 * scale * (change + x)
        change = change + 0.5 * gradient / norms(gradient)
    np.testing.assert_allclose(got["video"], change, rtol=1e-5)
    assert (norms(got["video"]) < 1).all() and (norms(got["video"]) > 0.9).all()  # within ε


def test_a_gradient_of_nothing_has_no_direction():
    gradient = jnp.stack([jnp.zeros((2, 3)), jnp.full((2, 3), 1e-30), jnp.full((2, 3), -2.0)])
    got = np.asarray(unit(gradient))
    assert not got[0].any()
    np.testing.assert_allclose(np.sqrt(np.square(got[1:]).sum((1, 2))), 1.0, rtol=1e-6)
    np.testing.assert_allclose(got[1], -got[2], rtol=1e-6)


@functools.cache
def perturbed(epsilon: float, weight: float = 0.5, modalities: tuple = ()):
    """((loss, metrics), gradient) of a linear classifier of the video encoder's mean token, and (recipe, batch, params)."""
    trunk = dict(encoders=dict(video=TRUNK["encoders"]["video"]), fusion=dict(kind="late", width=0, depth=0, heads=1))
    recipe = whole_recipe(
        trunk=trunk, views=dict(clean={}), objectives=dict(action=dict(kind="classify", labels=dict(action=3)))
    )
    batch = batch_of()
    params = recipe_parameters(recipe, batch)
    adversary = None if epsilon < 0 else Adversary(epsilon, 1, weight, modalities)
    loss = loss_function(recipe, adversary=adversary)
    found = compiled(jax.value_and_grad(lambda p: loss(p, p, batch, jax.random.key(1)), has_aux=True))(params)
    return found, (recipe, batch, params)


def test_without_epsilon_it_is_the_loss_again():
    ((clean, _), gradient), _ = perturbed(-1.0)
    ((value, metrics), other), _ = perturbed(0.0)
    assert float(metrics["adversary"]) == pytest.approx(float(clean), rel=1e-6)
    assert float(value) == pytest.approx(1.5 * float(clean), rel=1e-6)
    assert_trees_close(other, jax.tree.map(lambda x: 1.5 * x, gradient), 1e-5)


def test_the_perturbed_loss_of_a_linear_model_by_hand():
    """δ is ε / √N of the loss's gradient's direction at each of N tokens; no gradient flows through it."""
    epsilon = 2.0
    ((clean, _), gradient), (recipe, batch, params) = perturbed(-1.0)
    ((value, metrics), other), _ = perturbed(epsilon)
    keys = sample_keys(jax.random.key(1), batch.index)
    tokens = recipe.apply({"params": params}, batch, keys, False, method="look")["clean"].encoded["video"]
    x = np.asarray(tokens.x, np.float64).mean(1)
    head = {name: np.asarray(leaf, np.float64) for name, leaf in params["objective_action"]["video_action"].items()}
    label, there = np.asarray(batch.labels["action"]), np.asarray(tokens.valid.any(1))
    counts = (label >= 0) & np.asarray(batch.valid)

    def errors(x):
        logits = np.where(there[:, None], x @ head["kernel"] + head["bias"], 0.0)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return p - np.eye(3)[label], -np.log(p[np.arange(len(p)), label])

    residual, error = errors(x)
    assert float(clean) == pytest.approx(error[counts].mean(), rel=1e-5)
    towards = residual @ head["kernel"].T
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    # The mean of N tokens, each moved by ε / √N.
    moved = x + np.where(counts & there, epsilon / tokens.x.shape[1] ** 0.5, 0.0)[:, None] * towards
    residual, error = errors(moved)
    assert float(metrics["adversary"]) == pytest.approx(error[counts].mean(), rel=1e-4)
    assert float(metrics["adversary"]) > float(clean) * 1.01
    assert float(value) == pytest.approx(float(clean) + 0.5 * error[counts].mean(), rel=1e-4)
    # The head's gradient under the perturbation: of moved means, which themselves are constants but for the encoder.
    path = ("objective_action", "video_action", "kernel")
    mine, whole = (functools.reduce(lambda tree, key: tree[key], path, tree) for tree in (gradient, other))
    want = np.einsum("bd,by->dy", (moved * there[:, None])[counts], residual[counts]) / counts.sum()
    np.testing.assert_allclose((np.asarray(whole) - np.asarray(mine)) / 0.5, want, atol=1e-4)
    encoder = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), other["model"], gradient["model"]))
    assert min(encoder) > 0  # both gradients reach the encoder


def test_the_loss_rises_in_a_whole_recipe():
    """With fusion, decoder and what is dropped: a small step up raises the loss, streams not named stay."""
    recipe, batch, params = recipe_parts()
    loss = loss_function(recipe, adversary=Adversary(epsilon=0.05, steps=2, modalities=("video",)))
    value, metrics = compiled(lambda p: loss(p, p, batch, jax.random.key(5)))(params)
    clean = float(metrics["pixels"]) * 1.0
    assert float(metrics["adversary"]) > clean
    assert float(metrics["adversary"]) == pytest.approx(clean, rel=0.1)
    assert float(value) == pytest.approx(clean + float(metrics["adversary"]), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(adversary=dict(epsilon=-1.0)), "epsilon is at least 0"),
        (dict(adversary=dict(modalities=("smell",))), "no stream of the trunk; known: audio, text, video"),
        (
            dict(adversary=dict(epsilon=1.0), optim=dict(learning_rate=1e-3, accumulate=2)),
            "set optim.accumulate to 1, not 2",
        ),
        (dict(adversary=dict(size=1.0)), "size"),
    ],
)
def test_a_wrong_adversary_is_an_error(changes, words, world_folder):
    with pytest.raises(UserError, match=words):
        Experiment(small_config(world_folder, **changes))
