"""Every function of vmm/losses.py against numbers worked by hand and a float64 reference: value and gradient."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.selection import covering, first

from vmm import losses
from vmm.sharding import MeshShape, batch_sharding, make_mesh, to_device

B, E, V = 4, 5, 3
VALID = np.array([True, False, True, True])


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference_mean(values, weight):
    return (values * weight).sum() / weight.sum() if weight.sum() else 0.0


def reference_normalise(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def reference_cross_entropy(logits, labels):
    return -np.array([log_softmax(row)[label] for row, label in zip(logits, labels)])


def reference_softmax(first, second, valid, scale):
    """InfoNCE over the valid rows alone: the others are cut out, not masked."""
    logits = scale * first[valid] @ second[valid].T
    return -0.5 * np.mean(np.diag(log_softmax(logits)) + np.diag(log_softmax(logits.T)))


def reference_sigmoid(first, second, valid, scale, bias):
    logits = scale * first[valid] @ second[valid].T + bias
    signs = 2 * np.eye(len(logits)) - 1
    return np.logaddexp(0.0, -signs * logits).sum() / len(logits)


def reference_focal(logits, target):
    chance = 1 / (1 + np.exp(-logits))
    so = np.where(target > 0, chance, 1 - chance)
    return -np.where(target > 0, 0.25, 0.75) * (1 - so) ** 2 * np.log(so)


def reference_binary(logits, truth):
    chance = 1 / (1 + np.exp(-logits))
    return -truth * np.log(chance) - (1 - truth) * np.log(1 - chance)


def reference_divergence(one, other):
    p, q = np.exp(one), np.exp(other)
    return np.array([sum(a * np.log(a / b) for a, b in zip(*rows)) for rows in zip(p, q)])


def reference_standardise(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def reference_standardise_colours(x):
    x = x.reshape(-1, 3, 2)
    return ((x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-6)).reshape(-1, 6)


def reference_squared_error(prediction, target):
    return ((prediction - target) ** 2).mean(-1)


def unit(rng, *shape):
    return reference_normalise(rng.normal(size=shape))


def cases():
    """name → (function, reference, float arguments with a gradient, place → argument that is none)."""
    rng = np.random.default_rng(0)
    values, logits, patches = rng.normal(size=B), rng.normal(size=(B, V)), rng.normal(2.0, 3.0, (B, E))
    first, second = unit(rng, B, E), unit(rng, B, E)
    table = {
        "mean": (losses.mean, reference_mean, {0: values}, {1: VALID}),
        "mean, light": (losses.mean, reference_mean, {0: values}, {1: np.array([0.1, 0.0, 0.2, 0.3])}),
        "normalise": (losses.normalise, reference_normalise, {0: patches}, {}),
        "cross_entropy": (losses.cross_entropy, reference_cross_entropy, {0: logits}, {1: np.array([0, 2, 1, 2])}),
        "focal": (losses.focal, reference_focal, {0: logits}, {1: (rng.uniform(size=(B, V)) < 0.4).astype(float)}),
        "binary_cross_entropy": (
            losses.binary_cross_entropy,
            reference_binary,
            {0: logits, 1: rng.uniform(size=(B, V))},
            {},
        ),
        "divergence": (
            losses.divergence,
            reference_divergence,
            {0: log_softmax(logits), 1: log_softmax(rng.normal(size=(B, V)))},
            {},
        ),
        "contrastive_softmax": (
            losses.contrastive_softmax,
            reference_softmax,
            {0: first, 1: second, 3: np.array(7.0)},
            {2: VALID},
        ),
        "contrastive_softmax, chunked": (
            lambda *arguments: losses.contrastive_softmax(*arguments, chunk=3),
            reference_softmax,
            {0: first, 1: second, 3: np.array(7.0)},
            {2: VALID},
        ),
        "standardise": (losses.standardise, reference_standardise, {0: patches}, {}),
        "standardise_colours": (
            lambda x: losses.standardise_colours(x, 2),
            reference_standardise_colours,
            {0: rng.normal(2.0, 3.0, (B, 6))},
            {},
        ),
        "squared_error": (losses.squared_error, reference_squared_error, {0: patches, 1: first}, {}),
    }
    # At the usual bias of −10 negatives weigh nothing, and a loss without them would look right.
    for bias in (0.0, -1.0, -2.0):
        table[f"contrastive_sigmoid, bias {bias}"] = (
            losses.contrastive_sigmoid,
            reference_sigmoid,
            {0: first, 1: second, 3: np.array(5.0), 4: np.array(bias)},
            {2: VALID},
        )
        table[f"contrastive_sigmoid, chunked, bias {bias}"] = (
            lambda *arguments: losses.contrastive_sigmoid(*arguments, chunk=3),
            *table[f"contrastive_sigmoid, bias {bias}"][1:],
        )
    return table


CASES = cases()


def test_every_function_has_a_case():
    public = {
        name
        for name, value in vars(losses).items()
        if inspect.isfunction(value) and value.__module__ == losses.__name__ and not name.startswith("_")
    }
    assert public == {name.split(",")[0] for name in CASES} | {"mean_error"}  # of a tree: below


def test_mean_error_is_over_items_then_over_modalities():
    sums = {"video": ([6.0, 2.0], [2.0, 2.0]), "audio": ([5.0, 0.0], [1.0, 0.0]), "text": ([0.0, 0.0], [0.0, 0.0])}
    features = {name: {"error": jnp.array(e), "count": jnp.array(c)} for name, (e, c) in sums.items()}
    value, means = losses.mean_error(features)
    assert {name: float(mean) for name, mean in means.items()} == {"video": 2.0, "audio": 5.0, "text": 0.0}
    assert float(value) == pytest.approx(7.0 / 3)


def arguments(floats: dict, others: dict) -> list:
    return [value for _, value in sorted((floats | others).items())]


def on_device(value):
    value = np.asarray(value)
    narrow = {"f": np.float32, "i": np.int32}
    return jnp.asarray(value.astype(narrow.get(value.dtype.kind, value.dtype)))


def differences(function, floats: dict, others: dict, place: int) -> np.ndarray:
    """The gradient by central differences, float64."""
    result = np.zeros(np.shape(floats[place]))
    for index in np.ndindex(result.shape):
        sides = []
        for step in (1e-6, -1e-6):
            moved = np.array(floats[place], np.float64)
            moved[index] += step
            sides.append(function(*arguments(floats | {place: moved}, others)))
        result[index] = (sides[0] - sides[1]) / 2e-6
    return result


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_the_reference(name: str):
    function, reference, floats, others = CASES[name]
    expected = np.asarray(reference(*arguments(floats, others)))
    # A random direction makes a scalar of what is none.
    direction = np.random.default_rng(1).normal(size=expected.shape)
    given = [on_device(value) for value in arguments(floats, others)]
    places = tuple(floats)

    def both(*given):
        scalar = lambda *given: (function(*given) * direction.astype(np.float32)).sum()  # noqa: E731
        return function(*given), jax.grad(scalar, places)(*given)

    value, gradient = jax.jit(both)(*given)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6)
    for place, ours in zip(places, gradient):
        theirs = differences(lambda *a: (reference(*a) * direction).sum(), floats, others, place)
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-5, err_msg=f"argument {place}")


def test_hand_numbers():
    assert float(losses.mean(jnp.array([1.0, 2.0, 6.0]), jnp.array([1, 0, 1]))) == 3.5
    assert float(losses.mean(jnp.array([1.0, 2.0]), jnp.zeros(2, bool))) == 0.0
    np.testing.assert_allclose(losses.normalise(jnp.array([[3.0, 4.0]])), [[0.6, 0.8]], rtol=1e-6)
    # Two equal logits: ln 2. One ahead by ln 3: −ln ¾.
    logits = jnp.array([[0.0, 0.0], [np.log(3.0), 0.0]], jnp.float32)
    np.testing.assert_allclose(losses.cross_entropy(logits, jnp.array([1, 0])), [np.log(2), np.log(4 / 3)], rtol=1e-6)
    # Two orthogonal pairs at scale ln 3: each query gives its own 3 / (3 + 1).
    eye = jnp.eye(2)
    value = losses.contrastive_softmax(eye, eye, jnp.ones(2, bool), jnp.float32(np.log(3.0)))
    assert float(value) == pytest.approx(np.log(4 / 3), rel=1e-6)
    # The same, by pairs: n (ln(1 + 1/3) + (n − 1) ln 2) / n at bias 0.
    value = losses.contrastive_sigmoid(eye, eye, jnp.ones(2, bool), jnp.float32(np.log(3.0)), jnp.float32(0.0))
    assert float(value) == pytest.approx(np.log(4 / 3) + np.log(2), rel=1e-6)
    np.testing.assert_allclose(losses.standardise(jnp.array([[1.0, 3.0]])), [[-1.0, 1.0]], rtol=1e-5)
    # A coin against one that is three times as often heads: ½ ln(½ / ¾) + ½ ln(½ / ¼).
    coins = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
    assert float(losses.divergence(coins[0], coins[1])) == pytest.approx(0.5 * np.log(4 / 3), rel=1e-6)
    assert float(losses.squared_error(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0]))) == 2.5


def contrastive(variant: str, chunk: int = 0):
    """(first, second, valid) → loss."""
    if variant == "softmax":
        return lambda first, second, valid: losses.contrastive_softmax(first, second, valid, jnp.float32(10.0), chunk)
    return lambda first, second, valid: losses.contrastive_sigmoid(
        first, second, valid, jnp.float32(10.0), jnp.float32(-1.0), chunk
    )


CONTRASTIVE = {
    "softmax": contrastive("softmax"),
    "sigmoid": contrastive("sigmoid"),
    "softmax, chunked": contrastive("softmax", 3),
    "sigmoid, chunked": contrastive("sigmoid", 3),
}


@pytest.mark.parametrize("variant", CONTRASTIVE)
def test_garbage_in_masked_rows_changes_nothing(variant: str):
    rng = np.random.default_rng(2)
    first, second = (on_device(unit(rng, B, E)) for _ in range(2))
    function = jax.jit(jax.value_and_grad(CONTRASTIVE[variant], (0, 1)))
    clean = function(first, second, VALID)
    for garbage in (1e4, -1e4, 0.0):
        hidden = ~VALID[:, None]
        dirty = function(jnp.where(hidden, garbage, first), jnp.where(hidden, -garbage, second), VALID)
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    for gradient in clean[1]:
        assert not gradient[~VALID].any()
        assert np.abs(gradient[VALID]).max() > 1e-3


def test_garbage_of_no_weight_changes_no_mean():
    function = jax.jit(jax.value_and_grad(losses.mean))
    clean = function(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.asarray(VALID))
    dirty = function(jnp.array([1.0, 3e38, 3.0, 4.0]), jnp.asarray(VALID))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@functools.cache
def normalised_contrast(variant: str):
    def loss(first, second, valid):
        return CONTRASTIVE[variant](losses.normalise(first), losses.normalise(second), valid)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


@pytest.mark.parametrize("variant", CONTRASTIVE)
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("valid", [VALID, np.zeros(B, bool), np.arange(B) == 2], ids=["some", "none", "one"])
def test_constant_embeddings_have_finite_gradients(variant: str, value: float, valid: np.ndarray):
    """Zeros are what an absent stream pools to; constants are a collapsed model. Both must be survived."""

    same = jnp.full((B, E), value)
    result, gradient = normalised_contrast(variant)(same, same, jnp.asarray(valid))
    assert np.isfinite(result)
    assert all(np.isfinite(leaf).all() for leaf in gradient)
    if not valid.any():
        assert result == 0.0
        assert not any(leaf.any() for leaf in gradient)
    elif variant.startswith("softmax"):  # chance: every row of n equal logits gives ln n
        assert float(result) == pytest.approx(np.log(valid.sum()), abs=1e-5)


def test_flat_patches_and_zero_vectors_are_finite():
    flat = jnp.full((2, E), 0.5)
    for function, x in (
        (losses.standardise, flat),
        (lambda x: losses.standardise_colours(x, 1), flat),
        (losses.normalise, jnp.zeros((2, E))),
    ):
        value, pull = jax.vjp(function, x)
        assert not np.asarray(value).any()
        assert np.isfinite(pull(jnp.ones_like(value))[0]).all()


def test_unknown_labels_are_finite_and_take_class_zero():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(4, V)), jnp.float32)
    labels = jnp.array([-1, V, V + 100, 0])
    np.testing.assert_array_equal(
        losses.cross_entropy(logits, labels), losses.cross_entropy(logits, jnp.zeros(4, jnp.int32))
    )


def test_large_logits_do_not_overflow():
    logits = jnp.array([[3e4, -3e4, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: losses.cross_entropy(x, jnp.array([1]))[0])(logits)
    assert float(value) == 6e4
    assert np.isfinite(gradient).all()
    eye = jnp.eye(3)
    for variant in ("softmax", "sigmoid"):
        extra = (jnp.float32(0.0),) if variant == "sigmoid" else ()
        function = losses.contrastive_sigmoid if extra else losses.contrastive_softmax
        assert np.isfinite(function(eye, eye, jnp.ones(3, bool), jnp.float32(1e4), *extra))


def test_errors_of_half_precision_predictions_are_float32():
    prediction, target = jnp.full((2, 3), 0.1, jnp.bfloat16), jnp.zeros((2, 3))
    assert losses.squared_error(prediction, target).dtype == jnp.float32


ROWS = 64


@functools.cache
def dense_and_inputs(variant: str):
    """(value, gradients in both sides), inputs: of a batch of which a fifth is not valid."""
    rng = np.random.default_rng(4)
    first = unit(rng, ROWS, 16)
    second = reference_normalise(first + 0.5 * rng.normal(size=first.shape))
    inputs = (first.astype(np.float32), second.astype(np.float32), rng.random(ROWS) < 0.8)
    return jax.device_get(jax.jit(jax.value_and_grad(CONTRASTIVE[variant], (0, 1)))(*inputs)), inputs


@pytest.mark.parametrize(
    ("mesh", "chunk", "variant"), covering([(2, 2, 2), (4, 2, 1), (1, 1, 1)], [24, 16, 1000], ["softmax", "sigmoid"])
)
def test_chunks_are_the_whole(variant: str, mesh: tuple, chunk: int):
    """Any chunk, also one that does not divide the batch, on any mesh: value and gradient to 1e-6."""
    (value, gradients), inputs = dense_and_inputs(variant)
    mesh = make_mesh(MeshShape(*mesh), jax.devices()[: int(np.prod(mesh))])
    with jax.set_mesh(mesh):
        ours, our_gradients = jax.jit(jax.value_and_grad(contrastive(variant, chunk), (0, 1)))(*to_device(inputs, mesh))
    np.testing.assert_allclose(ours, value, rtol=1e-6)
    for one, other in zip(our_gradients, gradients):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * np.abs(other).max())


def temporary_bytes(variant: str, devices: int, chunk: int, batch: int = 32_768, width: int = 64) -> int:
    """What a device needs besides arguments and results, for loss and gradient of a global batch; nothing is run."""
    mesh = make_mesh(MeshShape(-1, 2, 1), jax.devices()[:devices])
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for shape, dtype in (((batch, width), jnp.float32), ((batch, width), jnp.float32), ((batch,), jnp.bool_))
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(contrastive(variant, chunk), (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("variant", first(["softmax", "sigmoid"]))
def test_memory_grows_with_the_local_batch(variant: str):
    """Of a global batch of 32,768: half the rows a device, half the memory; the matrix of all pairs is 4 GiB."""
    sizes = {devices: temporary_bytes(variant, devices, 512) for devices in (2, 4, 8)}
    print(variant, sizes)
    for devices, size in sizes.items():
        assert size * devices == pytest.approx(sizes[2] * 2, rel=0.02)
        assert size < 4 * (32_768 // devices) * 512 * 4  # four times [B / devices, chunk] of float32
    assert temporary_bytes(variant, 8, 0) > 50 * sizes[8]
