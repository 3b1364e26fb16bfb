"""Every function of vmm/losses.py against numbers worked by hand and a float64 reference: value and gradient."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmm import losses

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


def reference_standardise(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


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
        "contrastive_softmax": (
            losses.contrastive_softmax,
            reference_softmax,
            {0: first, 1: second, 3: np.array(7.0)},
            {2: VALID},
        ),
        "standardise": (losses.standardise, reference_standardise, {0: patches}, {}),
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
    return table


CASES = cases()


def test_every_function_has_a_case():
    public = {
        name
        for name, value in vars(losses).items()
        if inspect.isfunction(value) and value.__module__ == losses.__name__ and not name.startswith("_")
    }
    assert public == {name.split(",")[0] for name in CASES}


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
    assert float(losses.squared_error(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0]))) == 2.5


CONTRASTIVE = {
    "softmax": lambda first, second, valid: losses.contrastive_softmax(first, second, valid, jnp.float32(10.0)),
    "sigmoid": lambda first, second, valid: losses.contrastive_sigmoid(
        first, second, valid, jnp.float32(10.0), jnp.float32(-1.0)
    ),
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


@pytest.mark.parametrize("variant", CONTRASTIVE)
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("valid", [VALID, np.zeros(B, bool), np.arange(B) == 2], ids=["some", "none", "one"])
def test_constant_embeddings_have_finite_gradients(variant: str, value: float, valid: np.ndarray):
    """Zeros are what an absent stream pools to; constants are a collapsed model. Both must be survived."""

    def loss(first, second):
        return CONTRASTIVE[variant](losses.normalise(first), losses.normalise(second), jnp.asarray(valid))

    result, gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))(jnp.full((B, E), value), jnp.full((B, E), value))
    assert np.isfinite(result)
    assert all(np.isfinite(leaf).all() for leaf in gradient)
    if not valid.any():
        assert result == 0.0
        assert not any(leaf.any() for leaf in gradient)
    elif variant == "softmax":  # chance: every row of n equal logits gives ln n
        assert float(result) == pytest.approx(np.log(valid.sum()), abs=1e-5)


def test_flat_patches_and_zero_vectors_are_finite():
    flat = jnp.full((2, E), 0.5)
    for function, x in ((losses.standardise, flat), (losses.normalise, jnp.zeros((2, E)))):
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
