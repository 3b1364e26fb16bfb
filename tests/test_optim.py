"""The optimizer against numpy, and the loss of a whole recipe: accumulated, taught, frozen."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import assert_trees_close, parameters

from vmm.errors import UserError
from vmm.model import Recipe, loss_function
from vmm.rules import first_matches
from vmm.sharding import MeshShape, Named, make_mesh, to_device
from vmm.training.optim import Optim, ema_update, make_optimizer, match, path_of, schedule, trainable
from vmm.training.step import make_program
from vmm.types import Batch

# A frozen kernel of a shape of its own, so that its moments would be seen.
FREEZE = (("frozen/.*", 0.0), ("slow/.*", 0.1), (".*", 1.0))


def tree(seed: int = 0, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: (scale * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    return {
        "fast": {"kernel": draw(3, 2), "bias": draw(2)},
        "slow": {"kernel": draw(2, 2)},
        "frozen": {"kernel": draw(7, 5), "bias": draw(5)},
        "log_scale": draw(),
    }


# Rules


def test_the_first_match_counts():
    rules = (("fast/bias", 3.0), ("fast/.*", 2.0), (".*", 1.0))
    values = match(rules, tree(), "rules")
    assert values["fast"] == {"kernel": 2.0, "bias": 3.0}
    assert values["log_scale"] == 1.0
    values = match(((".*/kernel", 1.0), (".*", 0.0)), tree(), "rules")
    assert values["frozen"] == {"kernel": 1.0, "bias": 0.0}


def test_rules_match_whole_paths():
    with pytest.raises(UserError, match="no rule matches the parameter fast/bias"):
        match((("fast", 1.0), ("slow/.*", 1.0)), tree(), "rules")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("fast/.*", 1.0),), "no rule matches the parameter"),
        ((), "no rule matches the parameter"),
        ((("encoder/.*", 0.0), (".*", 1.0)), "'encoder/.*' matches no parameter"),
        ((("(", 0.0), (".*", 1.0)), "no regular expression"),
        ((("(?=a).*", 0.0), (".*", 1.0)), "no look-around"),
        (((3, 0.0), (".*", 1.0)), "3 is no regular expression"),
        ((("((a{1000}){1000}){1000}", 0.0), (".*", 1.0)), "no repetition above 1000"),
    ],
)
def test_bad_rules_are_errors(rules: tuple, message: str):
    for field in ("rate_rules", "decay_rules"):
        with pytest.raises(UserError, match=message) as error:
            make_optimizer(Optim(**{field: rules}), tree(), 10)
        assert f"optim.{field}" in str(error.value)


def test_no_pattern_of_a_published_config_takes_for_ever():
    """A backtracking matcher needs 2 to the power of the path's length for this one."""
    path = "/".join(["encoder_video"] * 20)
    assert first_matches((("([a-z_0-9/]+)+!", 0), (".*", 1)), [path, "a!"], "adapt", [path]) == {path: 1, "a!": 0}


def test_a_rule_behind_one_that_takes_all_still_matches():
    """Order is meaning, not an error: what stands behind `.*` is known and has no effect."""
    values = match(((".*", 1.0), ("fast/.*", 0.5)), tree(), "rules")
    assert set(jax.tree.leaves(values)) == {1.0}


def test_freezing_everything_is_an_error():
    with pytest.raises(UserError, match="every parameter is frozen"):
        make_optimizer(Optim(rate_rules=((".*", 0.0),)), tree(), 10)


def test_default_decay_is_on_kernels_alone():
    """Biases, norms, embeddings' scales and temperatures are never decayed."""
    decays = match(Optim().decay_rules, tree(), "rules")
    decayed = {path_of(path) for path, value in jax.tree_util.tree_leaves_with_path(decays) if value}
    assert decayed == {"fast/kernel", "slow/kernel", "frozen/kernel"}


# Schedule


def test_schedule_by_hand():
    optim = Optim(learning_rate=2.0, warmup=4, final=0.1)
    rate = schedule(optim, 12)
    half = 2.0 * (0.1 + 0.9 * 0.5)
    quarter = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    hand = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 6: quarter, 8: half, 12: 0.2, 20: 0.2}
    for step, value in hand.items():
        assert float(rate(jnp.int32(step))) == pytest.approx(value, rel=1e-5), step


def test_schedule_without_warmup_begins_at_its_peak():
    rate = schedule(Optim(learning_rate=1.0), 10)
    assert [round(float(rate(step)), 6) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    with pytest.raises(UserError, match=r"optim\.warmup"):
        schedule(Optim(warmup=10), 10)


# Updates


def reference(optim: Optim, params: dict, gradients: list, steps: int) -> dict:
    """AdamW in numpy, float64, by path."""
    flat = lambda tree: {path_of(p): np.asarray(v, np.float64) for p, v in jax.tree_util.tree_leaves_with_path(tree)}  # noqa: E731
    params = flat(params)
    rates = {"frozen": 0.0, "slow": 0.1}
    rates = {path: rates.get(path.split("/")[0], 1.0) for path in params}
    moments = {path: [0.0, 0.0] for path in params}
    for t, gradient in enumerate(gradients, 1):
        gradient = {path: g for path, g in flat(gradient).items() if rates[path]}
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        shrink = min(1.0, optim.clip / norm) if optim.clip else 1.0
        rate = optim.learning_rate * min((t - 1) / optim.warmup, 1.0) if optim.warmup else optim.learning_rate
        if t - 1 >= optim.warmup:
            progress = (t - 1 - optim.warmup) / (steps - optim.warmup)
            rate = optim.learning_rate * (optim.final + (1 - optim.final) * 0.5 * (1 + math.cos(math.pi * progress)))
        for path, g in gradient.items():
            first, second = moments[path]
            first = optim.b1 * first + (1 - optim.b1) * g * shrink
            second = optim.b2 * second + (1 - optim.b2) * (g * shrink) ** 2
            moments[path] = [first, second]
            update = (first / (1 - optim.b1**t)) / (np.sqrt(second / (1 - optim.b2**t)) + optim.epsilon)
            update += optim.weight_decay * params[path] * path.endswith("kernel")
            params[path] = params[path] - rate * rates[path] * update
    return params


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(clip=0.0), dict(clip=0.05), dict(warmup=3, final=0.2), dict(weight_decay=0.0)],
    ids=lambda changes: "+".join(changes) or "plain",
)
def test_updates_are_adamw_by_hand(changes: dict):
    optim = Optim(**dict(learning_rate=0.1, weight_decay=0.3, rate_rules=FREEZE) | changes)
    params, steps = tree(), 8
    gradients = [tree(seed) for seed in range(1, 6)]
    optimizer = make_optimizer(optim, params, steps)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), state

    ours = params
    for gradient in gradients:
        ours, state = step(ours, state, gradient)
    theirs = reference(optim, params, gradients, steps)
    for path, value in jax.tree_util.tree_leaves_with_path(ours):
        np.testing.assert_allclose(value, theirs[path_of(path)], rtol=2e-5, atol=2e-6, err_msg=path_of(path))
    jax.tree.map(np.testing.assert_array_equal, ours["frozen"], params["frozen"])


def test_updates_are_adafactor_by_hand():
    """Large matrices keep a row and a column of the second moment (Shazeer & Stern 2018, algorithm 4), vectors all of it."""
    optim = Optim(kind="adafactor", learning_rate=0.1, weight_decay=0.0, clip=0.0, b1=0.9)
    rng = np.random.default_rng(0)
    params = {"matrix": {"kernel": rng.normal(size=(128, 130)).astype(np.float32)}, "bias": np.ones(3, np.float32)}
    gradients = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in range(3)]
    optimizer = make_optimizer(optim, params, 100)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    held = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert held.count((128, 130)) == 1  # the first moment alone
    row, column, second, first = np.zeros(128), np.zeros(130), np.zeros(3), {"kernel": 0.0, "bias": 0.0}
    for t, gradient in enumerate(gradients, 1):
        updates, state = update(gradient, state, params)
        decay = 1 - t**-0.8
        g, small = gradient["matrix"]["kernel"].astype(np.float64), gradient["bias"].astype(np.float64)
        row = decay * row + (1 - decay) * (g**2 + 1e-30).mean(1)
        column = decay * column + (1 - decay) * (g**2 + 1e-30).mean(0)
        second = decay * second + (1 - decay) * (small**2 + 1e-30)
        scaled = {"kernel": g / np.sqrt(np.outer(row, column) / row.mean()), "bias": small / np.sqrt(second)}
        for name, value in scaled.items():
            value = value / max(1.0, np.sqrt((value**2).mean()))
            first[name] = 0.9 * first[name] + 0.1 * value
            rate = 0.1 * 0.5 * (1 + math.cos(math.pi * (t - 1) / 100))
            ours = updates["matrix"]["kernel"] if name == "kernel" else updates["bias"]
            np.testing.assert_allclose(ours, -rate * first[name] / (1 - 0.9**t), rtol=2e-4, atol=1e-6)


def test_first_moments_in_half_precision_are_near():
    params, gradients = tree(), [tree(seed) for seed in range(1, 6)]
    results = {}
    for moments in ("float32", "bfloat16"):
        optimizer = make_optimizer(Optim(moments=moments, learning_rate=0.1), params, 8)
        state, ours = optimizer.init(params), params
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, ours)
            ours = jax.tree.map(lambda p, u: p + u, ours, updates)
        kinds = sorted(leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.shape == (3, 2))
        assert kinds == (["float32"] * 2 if moments == "float32" else ["bfloat16", "float32"])
        results[moments] = ours
    moved = jax.tree.map(lambda after, before: np.abs(after - before).max(), results["float32"], params)
    error = jax.tree.map(lambda a, b: np.abs(a - b).max(), results["bfloat16"], results["float32"])
    assert all(e < 0.02 * m for e, m in zip(jax.tree.leaves(error), jax.tree.leaves(moved)))
    assert any(e > 0 for e in jax.tree.leaves(error))


@pytest.mark.parametrize("changes", [dict(kind="sgd"), dict(moments="float16")])
def test_unknown_optimizers_are_errors(changes: dict):
    with pytest.raises(UserError, match="optim"):
        make_optimizer(Optim(**changes), tree(), 8)


def test_moments_in_the_hosts_memory_change_nothing():
    """Between steps they lie there, sharded as before; two steps give the same numbers."""
    mesh = make_mesh(MeshShape(1, 8))

    def initialise(key):
        return {"up": {"kernel": Named(jax.random.normal(key, (64, 16)), ("embed", "mlp"))}, "gain": jnp.ones(())}

    states = []
    for offload in (False, True):
        optim = Optim(offload=offload, ema=0.9)
        program = make_program(initialise, quadratic, optim, steps=6, seed=0, mesh=mesh)
        with jax.set_mesh(mesh):
            state = program.init(jax.random.key(0))
            for _ in range(2):
                state, _ = program.step(state, to_device(np.zeros(8), mesh))
        moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == (64, 16)]
        assert {leaf.sharding.memory_kind for leaf in moments} == {"pinned_host" if offload else "device"}
        assert {leaf.addressable_shards[0].data.shape for leaf in moments} == {(8, 16)}
        assert state.params["up"]["kernel"].sharding.memory_kind == "device"
        states.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_frozen_parameters_have_no_moments():
    params = tree()
    optim = Optim(rate_rules=FREEZE)
    assert jax.tree.leaves(trainable(optim, params)["frozen"]) == [False, False]
    sizes = [leaf.shape for leaf in jax.tree.leaves(make_optimizer(optim, params, 10).init(params))]
    assert not {(7, 5), (5,)} & set(sizes)
    assert sizes.count((3, 2)) == 2  # one moment of each kind


def test_clipping_is_over_what_is_trained():
    """A huge gradient of a frozen parameter does not shrink the others'; the clipped norm is `clip`."""
    params = jax.tree.map(np.zeros_like, tree())
    gradient = tree(1) | {"frozen": jax.tree.map(lambda g: g * 1e6, tree(1)["frozen"])}
    # No momentum, and an epsilon so large that Adam is the identity over it: the update shows the gradient.
    optim = Optim(
        learning_rate=1.0, b1=0.0, b2=0.0, epsilon=1e6, clip=0.5, rate_rules=(("frozen/.*", 0.0), (".*", 1.0))
    )
    optimizer = make_optimizer(optim, params, 10)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates["frozen"]))
    norm = math.sqrt(sum(float((np.asarray(leaf) ** 2).sum()) for leaf in jax.tree.leaves(updates)))
    assert norm * 1e6 == pytest.approx(0.5, rel=1e-4)


def test_ema_is_float64s():
    """A thousand small steps: sums kept in half precision would not move."""
    steps, decay = 1000, 0.999
    walk = np.cumsum(np.random.default_rng(0).normal(scale=1e-3, size=(steps, 16)), 0).astype(np.float32) + 1.0
    start = {"w": jnp.ones(16)}

    def body(ema, inputs):
        step, params = inputs
        return ema_update(ema, {"w": params}, decay, step), None

    ours, _ = jax.jit(lambda e: jax.lax.scan(body, e, (jnp.arange(steps), jnp.asarray(walk))))(start)
    theirs = np.ones(16)
    for step, params in enumerate(walk.astype(np.float64)):
        d = min(decay, (1 + step) / (10 + step))
        theirs = d * theirs + (1 - d) * params
    assert ours["w"].dtype == jnp.float32
    assert np.abs(theirs - 1).max() > 5e-3
    np.testing.assert_allclose(ours["w"], theirs, atol=2e-6)


# The step


def quadratic(params, teacher, batch, key):
    """A loss whose gradient is the parameters themselves."""
    return 0.5 * sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params)), {}


def test_a_step_holds_frozen_parameters_and_counts():
    optim = Optim(learning_rate=0.1, warmup=2, weight_decay=0.3, ema=0.9, rate_rules=FREEZE)
    program = make_program(lambda key: jax.tree.map(jnp.asarray, tree()), quadratic, optim, steps=6, seed=0, mesh=None)
    state = program.init(jax.random.key(0))
    start = jax.device_get(state.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.ema), start)
    trace, norms, average = [], [], jax.tree.map(lambda x: x.astype(np.float64), start)
    for step in range(4):
        state, metrics = program.step(state, jnp.zeros(1))
        trace.append(float(metrics["learning_rate"]))
        norms.append(float(metrics["gradient_norm"]))
        d = min(0.9, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * np.asarray(p), average, state.params)
    assert int(state.step) == 4
    np.testing.assert_allclose(trace, [0.0, 0.05, 0.1, 0.05 * (1 + math.cos(math.pi / 4))], rtol=1e-5)
    free = {name: value for name, value in start.items() if name != "frozen"}
    norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(free)))
    assert norms[0] == pytest.approx(norm, rel=1e-5)  # what is frozen has no part in it
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params["frozen"]), start["frozen"])
    for name in free:
        for ours, before in zip(jax.tree.leaves(state.params[name]), jax.tree.leaves(start[name])):
            assert (np.asarray(ours) != before).all(), name
    assert_trees_close(jax.device_get(state.ema), average, 1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype("float32")}


def test_without_ema_nothing_is_kept():
    program = make_program(
        lambda key: jax.tree.map(jnp.asarray, tree()), quadratic, Optim(), steps=2, seed=0, mesh=None
    )
    assert program.shapes.ema == ()


def test_randomness_of_a_step_is_its_seeds_and_number():
    """The same (seed, step) gives the same key on a resumed run; another step or seed gives another."""

    def loss(params, teacher, batch, key):
        return 0.0 * params["a"]["kernel"].sum(), {"draw": jax.random.uniform(key)}

    def start_from(key):
        return {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}

    def draws(seed: int, start: int, count: int) -> list:
        program = make_program(start_from, loss, Optim(), steps=9, seed=seed, mesh=None)
        state = program.init(jax.random.key(0))._replace(step=jnp.int32(start))
        found = []
        for _ in range(count):
            state, metrics = program.step(state, jnp.zeros(1))
            found.append(float(metrics["draw"]))
        return found

    straight = draws(3, 0, 4)
    assert len(set(straight)) == 4
    assert draws(3, 2, 2) == straight[2:]
    assert draws(4, 0, 1) != straight[:1]


# Recipes

TRUNK = dict(
    encoders=dict(
        video=dict(kind="video", width=16, depth=1, heads=2, tubelet=(2, 8, 8)),
        text=dict(kind="text", width=16, depth=1, heads=2, vocabulary=13),
    ),
    fusion=dict(kind="joint", width=16, depth=1, heads=2),
)


def whole_recipe(**changes) -> Recipe:
    return Recipe(
        **dict(
            trunk=TRUNK,
            views=dict(
                clean={},
                masked=dict(video=dict(kind="random", ratio=0.5), text=dict(kind="span", ratio=0.4)),
            ),
            objectives=dict(
                contrast=dict(kind="contrastive", width=8, weight=0.7, pairs=(("video", "text"),)),
                pixels=dict(kind="masked", width=16, depth=1, heads=2, weight=1.3, modalities=("video", "text")),
                action=dict(kind="classify", labels=dict(action=3)),
            ),
        )
        | changes
    )


def batch_of(size: int = 8) -> Batch:
    """Presence differs from sample to sample, and so does the number of labels and of valid rows."""
    rng = np.random.default_rng(0)
    text = rng.integers(1, 13, (size, 6))
    text[1, 3:] = 0
    present = {name: np.arange(size) % step != step - 1 for name, step in dict(video=4, text=3).items()}
    return jax.tree.map(
        jnp.asarray,
        Batch(
            inputs=dict(
                video=rng.integers(0, 256, (size, 4, 16, 16, 3)).astype(np.uint8),
                text=text.astype(np.int32),
            ),
            present=present,
            labels=dict(action=rng.integers(-1, 3, size).astype(np.int32)),
            index=np.arange(100, 100 + size, dtype=np.int32),
            valid=np.arange(size) != size - 2,
        ),
    )


def gradients_of(recipe: Recipe, batch: Batch, params, accumulate: int = 1):
    loss = loss_function(recipe, accumulate)
    key = jax.random.key(5)
    return jax.jit(lambda p, teacher, batch: jax.value_and_grad(loss, (0, 1), has_aux=True)(p, teacher, batch, key))(
        params, params, batch
    )


def recipe_parameters(recipe: Recipe, batch: Batch):
    return parameters(recipe, batch, jax.random.split(jax.random.key(0), len(batch.index)))


def test_accumulation_is_the_full_batch():
    """Contrastive negatives and the means over labels and hidden tokens are the whole batch's."""
    recipe, batch = whole_recipe(), batch_of()
    params = recipe_parameters(recipe, batch)
    (value, metrics), (gradient, _) = gradients_of(recipe, batch, params)
    (other, other_metrics), (other_gradient, _) = gradients_of(recipe, batch, params, 4)
    assert float(other) == pytest.approx(float(value), rel=1e-5)
    assert_trees_close(dict(other_metrics), dict(metrics), 1e-5)
    assert_trees_close(other_gradient, gradient, 1e-5)
    # Every parameter learns.
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, path_of(path)
    # The loss is the weighted sum of its objectives.
    total = 0.7 * metrics["contrast"] + 1.3 * metrics["pixels"] + metrics["action"]
    assert float(value) == pytest.approx(float(total), rel=1e-5)


TEACHER = dict(
    trunk=dict(encoders=dict(video=TRUNK["encoders"]["video"]), fusion=TRUNK["fusion"]),
    views=dict(clean={}, target=dict(teacher=True, video=dict(kind="tube", ratio=0.5))),
    objectives=dict(
        action=dict(kind="classify", labels=dict(action=3), view="target"),
        pixels=dict(kind="masked", width=16, depth=1, heads=2, modalities=("video",), view="target"),
    ),
)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_teacher_gets_no_gradient(accumulate: int):
    """Objectives that read a teacher's view train their own heads, never the trunk it was seen with."""
    recipe, batch = whole_recipe(**TEACHER), batch_of()
    params = recipe_parameters(recipe, batch)
    _, (gradient, taught) = gradients_of(recipe, batch, params, accumulate)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(taught))
    assert "model" in gradient
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["model"]))
    heads = [leaf for name in gradient if name != "model" for leaf in jax.tree.leaves(gradient[name])]
    assert all(np.abs(leaf).max() > 0 for leaf in heads)


def test_a_teacher_is_who_sees_its_view():
    """The teacher's parameters set the loss of its view; the student's trunk does not, nor may both be one array."""
    recipe, batch = whole_recipe(**TEACHER), batch_of()
    params = recipe_parameters(recipe, batch)
    # Another trunk: every sign turned about.
    other = params | {"model": jax.tree.map(lambda p: -p, params["model"])}
    loss = jax.jit(lambda p, t: loss_function(recipe)(p, t, batch, jax.random.key(5))[0])
    both = float(loss(params, params))
    assert float(loss(other, params)) == both
    assert abs(float(loss(params, other)) - both) > 1e-3
    # Who is taught by itself (no average is kept) gets no gradient either.
    alone = jax.jit(jax.grad(lambda p: loss_function(recipe)(p, p, batch, jax.random.key(5))[0]))(params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(alone["model"]))


def test_masks_of_a_step_are_of_the_sample():
    """A sample is masked alike wherever it stands in the batch, and otherwise under another key or view."""
    recipe, batch = whole_recipe(), batch_of()
    params = recipe_parameters(recipe, batch)

    @jax.jit
    def hidden(batch, key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.index)
        outputs = recipe.apply({"params": params}, batch, keys, False, method="look")
        return {name: mask.hidden for name, mask in outputs["masked"].masks.items()}

    one = hidden(batch, jax.random.key(0))
    order = np.array([5, 2, 7, 0, 1, 3, 4, 6])
    two = hidden(jax.tree.map(lambda leaf: leaf[order], batch), jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), two, one)
    three = hidden(batch, jax.random.key(1))
    for name in one:
        assert (np.asarray(one[name]) != np.asarray(three[name])).any(), name


def test_wrong_views_are_errors():
    batch = batch_of()
    for changes, message in (
        (dict(views=dict(clean={})), "no view 'masked'"),
        (dict(views=dict(clean={}, masked=dict(smell=dict(kind="tube", ratio=0.5)))), "no such modality"),
        (dict(views=dict(clean={}, masked=dict(video=dict(kind="tub", ratio=0.5)))), "unknown mask"),
        (dict(views=dict(clean={}, masked=dict(video=0.5))), "views.masked.video: a mask is a group"),
        (dict(views=dict(clean={}, masked=dict(video=dict(kind="tube")))), "a kind and a ratio"),
        (
            dict(objectives=dict(label=dict(kind="classify", view="clean", labels={"x": 2}))),
            "objectives.label: .*another",
        ),
    ):
        recipe = whole_recipe(**changes)
        keys = jax.random.split(jax.random.key(0), len(batch.index))
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda key, r=recipe, k=keys: r.init(key, batch, k), jax.random.key(0))


@pytest.mark.parametrize("ema", [0.5, 0.0])
def test_the_teacher_is_the_average_before_the_step(ema: float):
    """A loss is given the running average as its teacher; without one, the student's own parameters."""

    def loss(params, teacher, batch, key):
        return params["a"]["kernel"].sum(), {"teacher": teacher["a"]["kernel"][0]}

    optim = Optim(learning_rate=0.1, weight_decay=0.0, clip=0.0, ema=ema)
    program = make_program(
        lambda key: {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}, loss, optim, steps=5, seed=0, mesh=None
    )
    state = program.init(jax.random.key(0))
    for step in range(4):
        teacher = (state.ema if ema else state.params)["a"]["kernel"][0]
        assert (float(teacher) == float(state.params["a"]["kernel"][0])) == (not ema or step == 0)
        teacher = float(teacher)
        state, metrics = program.step(state, jnp.zeros(1))
        assert float(metrics["teacher"]) == pytest.approx(teacher, rel=1e-6)
