"""The layers against numpy in float64, and against themselves: scanned, recomputed, in half precision."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmm import layers
from vmm.errors import UserError
from vmm.types import Patches, Tokens

B, N, C, D, HEADS = 2, 5, 3, 16, 2


def draw(shape, seed: int = 0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def parameters(module: nn.Module, *args, method=None, seed: int = 0):
    """Random parameters of a module, none of them at a special value; drawn in numpy, nothing is compiled."""
    shapes = jax.eval_shape(lambda key: nn.unbox(module.init(key, *args, method=method)), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            rng.normal(size=leaf.shape) / math.sqrt(leaf.shape[0] if leaf.shape else 1), leaf.dtype
        ),
        shapes.get("params", {}),
    )


def stacked(params):
    """Returns parameters of a loop in the layout of its scan: layer_0, layer_1, … → layers with a first axis."""
    if not isinstance(params, dict):
        return params
    if "layer_0" in params:
        loop = [params[f"layer_{i}"] for i in range(len(params))]
        return {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)}
    return {name: stacked(value) for name, value in params.items()}


def assert_trees_close(ours, theirs, tolerance: float = 1e-5):
    """Each leaf to `tolerance` of the largest number of the whole tree."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    scale = max([1.0, *(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(theirs) if leaf.size)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=tolerance), ours, theirs)


# numpy, float64


def numpy_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def numpy_attention(query, key, value, valid):
    """[Q A d], [K A d], [K A d], [K] → [Q A d], one sample; zeros where no key is valid."""
    if not valid.any():
        return np.zeros_like(query)
    key, value = key[valid], value[valid]
    result = np.zeros_like(query)
    for head in range(query.shape[1]):
        logits = query[:, head] @ key[:, head].T / math.sqrt(query.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        result[:, head] = weights / weights.sum(-1, keepdims=True) @ value[:, head]
    return result


def numpy_block(p, x, valid, context=None, context_valid=None):
    """A pre-norm block of one sample [N D]."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    query = numpy_norm(p["norm_attention"], x)
    keys = query
    if context is not None:
        keys = np.concatenate([query, numpy_norm(p["norm_attention"], context)])
        valid = np.concatenate([valid, context_valid])
    split = lambda name, y: np.einsum("nd,dah->nah", y, p["attention"][name]["kernel"]) + p["attention"][name]["bias"]  # noqa: E731
    mixed = numpy_attention(split("query", query), split("key", keys), split("value", keys), valid)
    x = x + np.einsum("nah,ahd->nd", mixed, p["attention"]["out"]["kernel"]) + p["attention"]["out"]["bias"]
    hidden = numpy_norm(p["norm_mlp"], x) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return x + hidden @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]


VALID = np.array([[True, True, False, True, False], [False] * N])
CONTEXT_VALID = np.array([[True, False, True], [False] * C])
THERE = jnp.asarray(VALID)  # the same on the device


def test_attention_is_the_reference():
    query, key, value = (draw((B, n, HEADS, 4), seed) for seed, n in enumerate((3, N, N)))
    ours = jax.jit(layers.attention)(query, key, value, VALID)
    for i in range(B):
        theirs = numpy_attention(*(np.asarray(x[i], np.float64) for x in (query, key, value)), VALID[i])
        np.testing.assert_allclose(ours[i], theirs, atol=1e-5)
    assert not ours[1].any()  # no valid key: exactly zero


def test_attention_without_valid_keys_has_finite_gradients():
    query, key, value = (draw((B, N, HEADS, 4), seed) for seed in range(3))
    gradient = jax.jit(jax.grad(lambda *a: jnp.square(layers.attention(*a, THERE)).sum(), (0, 1, 2)))(query, key, value)
    for leaf in gradient:
        assert np.isfinite(leaf).all()
        assert not leaf[1].any()
        assert np.abs(leaf[0]).max() > 1e-4
    for leaf in gradient[1:]:  # nothing flows into keys and values that are not valid
        assert not leaf[~VALID].any()


def test_attention_ignores_garbage_keys():
    query, key, value = (draw((B, N, HEADS, 4), seed) for seed in range(3))
    function = jax.jit(layers.attention)
    there = VALID[:, :, None, None]
    dirty = function(query, jnp.where(there, key, 1e4), jnp.where(there, value, -1e4), VALID)
    np.testing.assert_array_equal(dirty, function(query, key, value, VALID))


@pytest.mark.parametrize("with_context", [False, True], ids=["self", "context"])
def test_block_is_the_reference(with_context: bool):
    block = layers.Block(HEADS)
    x, context = draw((B, N, D)), draw((B, C, D), 1)
    extra = (context, jnp.asarray(CONTEXT_VALID)) if with_context else ()
    params = parameters(block, x, THERE, *extra)
    ours = jax.jit(lambda p, x: block.apply({"params": p}, x, THERE, *extra))(params, x)
    for i in range(B):
        other = (np.asarray(context[i], np.float64), CONTEXT_VALID[i]) if with_context else ()
        theirs = numpy_block(params, np.asarray(x[i], np.float64), VALID[i], *other)
        np.testing.assert_allclose(ours[i], theirs, atol=3e-5, rtol=1e-4)


def test_dense_contracts_the_last_axes():
    x = draw((B, N, HEADS, 4))
    dense = layers.Dense((3, 2), ("heads", "head_dim", "embed", None), inputs=2)
    params = parameters(dense, x)
    assert params["kernel"].shape == (HEADS, 4, 3, 2)
    theirs = np.einsum("bnij,ijkl->bnkl", x, params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(dense.apply({"params": params}, x), theirs, atol=1e-5)


def test_dense_starts_as_xavier():
    dense = layers.Dense((4, 16), ("embed", "heads", "head_dim"))
    params = nn.unbox(dense.init(jax.random.key(0), jnp.zeros((1, 64))))["params"]
    bound = math.sqrt(6 / (64 + 64))
    assert 0.95 * bound < np.abs(params["kernel"]).max() <= bound
    assert not params["bias"].any()


def test_layer_norm_is_the_reference():
    x = 3.0 + 5.0 * draw((B, N, D))
    norm = layers.LayerNorm()
    params = parameters(norm, x)
    theirs = numpy_norm(jax.tree.map(lambda p: np.asarray(p, np.float64), params), np.asarray(x, np.float64))
    np.testing.assert_allclose(norm.apply({"params": params}, x), theirs, atol=1e-5)
    gradient = jax.grad(lambda x: norm.apply({"params": params}, x).sum())(jnp.zeros((1, 1, D)))
    assert np.isfinite(gradient).all()


def test_embed_has_unit_variance():
    embed = layers.Embed(500, 64)
    ids = jnp.arange(500)
    params = nn.unbox(embed.init(jax.random.key(0), ids))
    assert float(embed.apply(params, ids).std()) == pytest.approx(1.0, abs=0.02)


def stack(**fields):
    return layers.Stack(depth=2, heads=HEADS, **fields)


@functools.cache
def reference_stack():
    """(parameters, input, (output, gradients)) of the plain loop."""
    x = draw((B, N, D))
    params = parameters(stack(), x, THERE)
    return params, x, value_and_gradient(stack(), params, x)


def value_and_gradient(module, params, x):
    def loss(params, x):
        y = module.apply({"params": params}, x, THERE)
        return jnp.square(y * VALID[..., None]).sum() + y[0, 0, 0], y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return y, *gradient


@pytest.mark.parametrize("remat", [False, True, "products", "offload"])
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_scan_and_remat_are_the_loop(scan: bool, remat: bool | str):
    if not scan and not remat:
        params, x, (ours, *_) = reference_stack()
        for i in range(B):
            y = np.asarray(x[i], np.float64)
            for layer in ("layer_0", "layer_1"):
                y = numpy_block(params["blocks"][layer]["block"], y, VALID[i])
            theirs = numpy_norm(jax.tree.map(np.asarray, params["norm"]), y)
            np.testing.assert_allclose(ours[i], theirs, atol=1e-4, rtol=1e-4)
        return
    params, x, (y, gradient, inner) = reference_stack()
    layout = stacked if scan else lambda tree: tree
    module = stack(scan=scan, remat=remat)
    shapes = jax.eval_shape(lambda key: nn.unbox(module.init(key, x, THERE)), jax.random.key(0))["params"]
    mine = layout(params)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, mine)
    assert_trees_close(value_and_gradient(module, mine, x), (y, layout(gradient), inner))


def test_scanned_layers_start_different():
    module = stack(scan=True)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), draw((B, N, D)), VALID))["params"]
    one, two = params["blocks"]["layers"]["block"]["mlp"]["up"]["kernel"]
    assert np.abs(one - two).max() > 0.1


def test_remat_recomputes():
    """The gradient of a recomputed stack does the forward products again."""
    from vmm.training.metrics import count_flops

    x = draw((B, N, D))
    params = parameters(stack(), x, THERE)
    flops = {
        remat: count_flops(
            jax.jit(jax.grad(lambda p, m=stack(remat=remat): m.apply({"params": p}, x, THERE).sum())), params
        )
        for remat in (False, True, "full", "products", "offload")
    }
    assert flops[True] == flops["full"] > 1.2 * flops[False]
    # Attention's two products of 2 N² D multiply-adds a sample are done again, no others.
    assert flops["products"] == flops["offload"] == flops[False] + 2 * B * 2 * 2 * N * N * D
    with pytest.raises(UserError, match="remat: unknown 'dots'.*full, offload, products"):
        stack(remat="dots").init(jax.random.key(0), x, THERE)


@pytest.mark.parametrize("depth", [0, 1])
def test_shallow_stacks(depth: int):
    module = layers.Stack(depth=depth, heads=HEADS, scan=True)
    x = draw((B, N, D))
    params = parameters(module, x, THERE)
    assert module.apply({"params": params}, x, THERE).shape == x.shape


def test_sincos_by_hand():
    table = layers.sincos((3,), 4)
    assert table.dtype == np.float32
    rates = [1.0, 0.01]
    for place in range(3):
        hand = [
            math.sin(place * rates[0]),
            math.sin(place * rates[1]),
            math.cos(place * rates[0]),
            math.cos(place * rates[1]),
        ]
        np.testing.assert_allclose(table[place], hand, atol=1e-6)


def test_sincos_axes_are_apart_and_places_distinct():
    grid, width = (2, 3, 4), 20
    table = layers.sincos(grid, width).reshape(*grid, width)
    assert not table[..., 18:].any()  # 20 // 3 → 6 an axis; the rest is zero
    for axis in range(3):
        own = table[..., axis * 6 : (axis + 1) * 6]
        first = np.take(own, [0], axis=axis)
        for other in {0, 1, 2} - {axis}:
            np.testing.assert_array_equal(own, np.broadcast_to(np.take(own, [0], axis=other), own.shape))
        assert (own != first).any()
    flat = table.reshape(-1, width)
    assert len(np.unique(flat.round(5), axis=0)) == len(flat)
    np.testing.assert_allclose(layers.sincos((5,), 6), layers.sincos((9,), 6)[:5])


@pytest.mark.parametrize("kind", ["sincos", "learned", "none"])
def test_positions_follow_the_place_in_the_full_grid(kind: str):
    x = draw((B, 3, D))
    at = jnp.array([[5, 0, 3], [1, 1, 2]])
    module = layers.Positions(kind)
    params = parameters(module, x, at, (2, 3))
    added = module.apply({"params": params}, x, at, (2, 3)) - x
    table = {"sincos": layers.sincos((2, 3), D), "none": np.zeros((6, D))}.get(kind)
    table = np.asarray(params["table"]).reshape(6, D) if table is None else table
    np.testing.assert_allclose(added, table[np.asarray(at)], atol=1e-6)
    assert (kind == "learned") == bool(params)


def pool_of(kind: str):
    module = layers.Pool(kind, HEADS)
    tokens = Tokens(draw((B, N, D)), THERE, jnp.zeros((B, N), jnp.int32))
    return jax.jit(lambda p, t: module.apply({"params": p}, t)), parameters(module, tokens), tokens


@pytest.mark.parametrize("kind", ["mean", "attention"])
def test_pool_ignores_what_is_not_valid(kind: str):
    function, params, tokens = pool_of(kind)
    pooled = function(params, tokens)
    assert pooled.shape == (B, D)
    assert pooled.dtype == jnp.float32
    assert not pooled[1].any()  # nothing valid: exactly zero, bias or not
    assert np.abs(pooled[0]).max() > 0.01
    dirty = tokens._replace(x=jnp.where(VALID[..., None], tokens.x, 1e4))
    np.testing.assert_array_equal(function(params, dirty), pooled)
    # Order does not count, tokens do.
    order = np.array([3, 4, 1, 0, 2])
    turned = tokens._replace(x=tokens.x[:, order], valid=tokens.valid[:, order])
    np.testing.assert_allclose(function(params, turned), pooled, atol=1e-5)
    gradient = np.asarray(jax.grad(lambda t: jnp.square(function(params, tokens._replace(x=t))).sum())(tokens.x))
    assert np.isfinite(gradient).all()
    assert not gradient[~VALID].any()
    assert np.abs(gradient[VALID]).min() > 0
    half = function(params, tokens._replace(x=tokens.x.astype(jnp.bfloat16)))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, pooled, atol=0.03)


def test_pool_mean_by_hand():
    function, params, tokens = pool_of("mean")
    np.testing.assert_allclose(function(params, tokens)[0], np.asarray(tokens.x)[0][VALID[0]].mean(0), atol=1e-6)


def test_unknown_kinds_are_errors():
    x, at = draw((B, N, D)), jnp.zeros((B, N), jnp.int32)
    for module, args in (
        (layers.Pool("max"), (Tokens(x, THERE, at),)),
        (layers.Positions("rope"), (x, at, (N,))),
        (layers.Block(heads=3), (x, THERE)),
    ):
        with pytest.raises(UserError, match=r"known|multiple"):
            jax.eval_shape(lambda key, m=module, a=args: m.init(key, *a), jax.random.key(0))


HALF = {
    "dense": (layers.Dense((8,), ("embed", None)), ()),
    "norm": (layers.LayerNorm(), ()),
    "mlp": (layers.Mlp(), ()),
    "attention": (layers.Attention(HEADS), (None, THERE)),
    "block": (layers.Block(HEADS), (THERE,)),
    "positions": (layers.Positions("learned"), (jnp.zeros((B, N), jnp.int32), (N,))),
    "stack": (layers.Stack(2, HEADS), (THERE,)),
}


@pytest.mark.parametrize("name", HALF)
def test_half_precision_in_and_out_over_float32_parameters(name: str):
    module, args = HALF[name]
    x = draw((B, N, D))
    apply = jax.jit(lambda p, x: module.apply({"params": p}, x, *args))
    params = parameters(module, x.astype(jnp.bfloat16), *args)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    full, half = apply(params, x), apply(params, x.astype(jnp.bfloat16))
    assert full.dtype == jnp.float32
    assert half.dtype == jnp.bfloat16
    assert np.abs(full - half.astype(jnp.float32)).max() < 0.04 * np.abs(full).max()


def test_gather_and_select():
    values = jnp.arange(2 * 4 * 3).reshape(2, 4, 3)
    at = jnp.array([[3, 1], [0, 2]])
    np.testing.assert_array_equal(
        layers.gather(values, at), np.stack([np.asarray(values)[0, [3, 1]], np.asarray(values)[1, [0, 2]]])
    )
    patches = Patches(values, jnp.arange(8).reshape(2, 4) % 3 > 0, (4,), 0)
    kept, valid, place = layers.select(patches, at)
    np.testing.assert_array_equal(kept, layers.gather(values, at))
    np.testing.assert_array_equal(valid, [[False, True], [True, False]])
    np.testing.assert_array_equal(place, at)
    everything = layers.select(patches, None)
    np.testing.assert_array_equal(everything[0], values)
    np.testing.assert_array_equal(everything[2], [[0, 1, 2, 3]] * 2)


def test_pixels_become_minus_one_to_one():
    assert layers.as_float(jnp.array([0, 255], jnp.uint8)).tolist() == [-1.0, 1.0]
    assert layers.as_float(jnp.array([0.5])).tolist() == [0.5]
