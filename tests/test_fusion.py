"""What every entry of FUSIONS promises, over every subset of modalities."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import HEADS, B, D, assert_trees_equal, block_flops, finite
from test_layers import assert_trees_close, draw, parameters, stacked

from vmm.fusion import FUSIONS
from vmm.training.metrics import count_flops
from vmm.types import MODALITIES, SUBSETS, Tokens

# Widths differ from the fusion's: streams are brought to one.
STREAMS = {"video": (6, D), "audio": (4, 12), "text": (5, 20)}
PAIRS = list(itertools.product(FUSIONS, SUBSETS.values()))
fusions = pytest.mark.parametrize("kind", FUSIONS)
fusions_and_subsets = pytest.mark.parametrize(
    ("kind", "names"), PAIRS, ids=lambda v: v if isinstance(v, str) else "+".join(v)
)

# Forward FLOPs of a sample, as each docstring says. counts: tokens of each stream.
FUSION_FLOPS = {
    "late": lambda counts, width, module: sum(block_flops(n, width) for n in counts),
    "joint": lambda counts, width, module: block_flops(sum(counts), width),
    "cross": lambda counts, width, module: sum(
        n * 20 * width**2 + sum(counts) * 4 * width**2 + 4 * n * sum(counts) * width for n in counts
    ),
    "bottleneck": lambda counts, width, module: sum(block_flops(n + module.bottlenecks, width) for n in counts),
}


def streams_of(names: tuple) -> dict:
    """Sample 0 has all, padded; sample 1 lacks the first stream; sample 2 has nothing."""
    result = {}
    for seed, name in enumerate(names):
        count, width = STREAMS[name]
        valid = np.ones((B, count), bool)
        valid[0, -1] = False
        valid[1, -2:] = False
        if seed == 0 and len(names) > 1:
            valid[1] = False
        valid[2] = False
        at = np.broadcast_to(np.arange(count, dtype=np.int32) * 2, (B, count))
        x = np.asarray(draw((B, count, width), seed + 1)) * valid[..., None]
        result[name] = Tokens(jnp.asarray(x), jnp.asarray(valid), jnp.asarray(at))
    return result


def fusion_of(kind: str, depth: int = 1, **fields):
    return FUSIONS[kind](width=D, depth=depth, heads=HEADS, **fields)


@functools.cache
def fusion_functions(kind: str, names: tuple, depth: int = 1, scan: bool = False):
    """(streams, parameters, (params, streams) → (fused x, gradients in both)) of one fusion over some streams."""
    module = fusion_of(kind, depth, scan=scan)
    streams = streams_of(names)

    def function(params, x, streams):
        def loss(params, x):
            fused = module.apply({"params": params}, {name: streams[name]._replace(x=x[name]) for name in names})
            total = sum(jnp.sin(t.x * t.valid[..., None]).sum() for t in fused.values())
            return total, {name: t.x for name, t in fused.items()}

        gradient, fused = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return fused, gradient

    jitted = jax.jit(function)
    call = lambda params, streams: jitted(params, {name: t.x for name, t in streams.items()}, streams)  # noqa: E731
    return streams, parameters(module, streams), call


def valid_parts(fused, streams) -> dict:
    return {name: np.asarray(fused[name])[np.asarray(streams[name].valid)] for name in streams}


@fusions_and_subsets
def test_fusion_keeps_keys_and_counts(kind: str, names: tuple):
    streams, module = streams_of(names), fusion_of(kind)
    fused = jax.eval_shape(lambda key, s: module.init_with_output(key, s)[0], jax.random.key(0), streams)
    assert set(fused) == set(names)
    for name in names:
        assert fused[name].x.shape == (B, STREAMS[name][0], D)
        assert fused[name].at.dtype == jnp.int32
    half = {name: t._replace(x=t.x.astype(jnp.bfloat16)) for name, t in streams.items()}
    fused = jax.eval_shape(lambda key, s: module.init_with_output(key, s)[0], jax.random.key(0), half)
    assert {t.x.dtype for t in fused.values()} == {jnp.dtype("bfloat16")}


@fusions_and_subsets
def test_invalid_tokens_change_no_fusion(kind: str, names: tuple):
    streams, params, function = fusion_functions(kind, names)
    fused, (gradient, inner) = function(params, streams)
    assert finite(fused)
    assert finite((gradient, inner))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-3
    for name in names:
        assert not np.asarray(inner[name])[~np.asarray(streams[name].valid)].any(), "gradient into an invalid token"
    for value in (1e3, -7.0):
        dirty = {name: t._replace(x=jnp.where(t.valid[..., None], t.x, value)) for name, t in streams.items()}
        other, other_gradient = function(params, dirty)
        assert_trees_equal(valid_parts(other, streams), valid_parts(fused, streams))
        assert_trees_equal(other_gradient, (gradient, inner))


@fusions_and_subsets
def test_a_stream_that_goes_leaves_other_samples_alone(kind: str, names: tuple):
    streams, params, function = fusion_functions(kind, names)
    fused, _ = function(params, streams)
    last = names[-1]
    gone = streams | {last: streams[last]._replace(valid=streams[last].valid.at[0].set(False))}
    other, _ = function(params, gone)
    for name in names:
        np.testing.assert_array_equal(other[name][1:], fused[name][1:])


def turned(tokens: Tokens) -> Tokens:
    """Other contents, in another direction: a norm would undo a shift or a scale."""
    return tokens._replace(x=tokens.x[..., ::-1])


@fusions_and_subsets
def test_late_keeps_streams_apart_and_others_mix(kind: str, names: tuple):
    streams, params, function = fusion_functions(kind, names)
    fused, _ = function(params, streams)
    for name in names:
        moved = streams | {name: turned(streams[name])}
        other, _ = function(params, moved)
        for target in names:
            difference = np.abs(
                np.asarray(other[target] - fused[target])[0][np.asarray(streams[target].valid)[0]]
            ).max()
            # Bottleneck tokens carry a stream to the others one layer later: see the test at depth 2.
            if kind == "late" and target != name:
                assert difference == 0, f"{name} reaches {target}"
            elif kind != "bottleneck" or target == name:
                assert difference > 1e-4, f"{name} does not reach {target}"


@pytest.mark.parametrize("kind", [kind for kind in FUSIONS if kind != "late"])
def test_two_layers_mix(kind: str):
    streams, params, function = fusion_functions(kind, MODALITIES[:2], 2)
    fused, _ = function(params, streams)
    moved = streams | {"audio": turned(streams["audio"])}
    other, _ = function(params, moved)
    for target in fused:
        assert np.abs(np.asarray(other[target] - fused[target])[0, 0]).max() > 1e-4, target


@fusions
def test_a_lacking_stream_is_as_if_it_were_not_there(kind: str):
    """Sample 1 has no video: its audio comes out as from a fusion of audio alone, with the same parameters."""
    names = MODALITIES[:2]
    streams, params, function = fusion_functions(kind, names, 2)
    assert not streams["video"].valid[1].any()
    fused, _ = function(params, streams)
    module = fusion_of(kind, 2)
    alone = jax.jit(lambda p, s: module.apply({"params": p}, s)["audio"].x)(params, {"audio": streams["audio"]})
    there = np.asarray(streams["audio"].valid)[1]
    np.testing.assert_allclose(np.asarray(fused["audio"])[1][there], np.asarray(alone)[1][there], atol=2e-5)


@fusions_and_subsets
def test_fusion_in_half_precision_keeps_places(kind: str, names: tuple):
    streams, params, function = fusion_functions(kind, names)
    fused, _ = function(params, streams)
    module = fusion_of(kind)
    forward = jax.jit(lambda p, s: module.apply({"params": p}, s))
    other = forward(params, {name: t._replace(x=t.x.astype(jnp.bfloat16)) for name, t in streams.items()})
    for name in names:
        assert_trees_equal(other[name][1:], streams[name][1:])
        assert other[name].x.dtype == jnp.bfloat16
        there = np.asarray(streams[name].valid)
        error = np.abs(np.asarray(other[name].x, np.float32) - np.asarray(fused[name]))[there]
        assert error.max() < 0.06 * np.abs(np.asarray(fused[name])[there]).max()


@fusions
def test_scanned_fusion_is_the_loop(kind: str):
    names = MODALITIES[:2]
    streams, params, loop = fusion_functions(kind, names, 2)
    _, shapes, scan = fusion_functions(kind, names, 2, True)
    mine = stacked(params)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, mine)
    fused, (gradient, inner) = loop(params, streams)
    other, (other_gradient, other_inner) = scan(mine, streams)
    assert_trees_close(other, fused)
    assert_trees_close((other_gradient, other_inner), (stacked(gradient), inner))


@fusions_and_subsets
def test_scanned_fusion_has_the_loops_parameters(kind: str, names: tuple):
    streams = streams_of(names)
    shapes = [
        jax.eval_shape(lambda key, m=fusion_of(kind, 2, scan=scan): nn.unbox(m.init(key, streams)), jax.random.key(0))
        for scan in (False, True)
    ]
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(shapes[0]) == count(shapes[1])


def fusion_flops(kind: str, counts: dict, width: int, depth: int, **fields) -> tuple[float, object]:
    """FLOPs of one sample's forward pass, traced from shapes alone."""
    module = FUSIONS[kind](width=width, depth=depth, **fields)
    shaped = {
        name: Tokens(
            jax.ShapeDtypeStruct((2, count, width), jnp.float32),
            jax.ShapeDtypeStruct((2, count), jnp.bool_),
            jax.ShapeDtypeStruct((2, count), jnp.int32),
        )
        for name, count in counts.items()
    }
    params = jax.eval_shape(lambda key, s: nn.unbox(module.init(key, s)), jax.random.key(0), shaped)
    return count_flops(jax.jit(module.apply), params, shaped) / 2, module


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@fusions_and_subsets
def test_fusion_flops_are_the_closed_form(kind: str, names: tuple, scan: bool):
    assert kind in FUSION_FLOPS, f"give the new fusion {kind!r} the closed form of its docstring"
    counts = {name: count for name, count in dict(video=96, audio=40, text=24).items() if name in names}
    flops, module = fusion_flops(kind, counts, 128, 2, heads=4, scan=scan)
    assert flops == pytest.approx(2 * FUSION_FLOPS[kind](list(counts.values()), 128, module), rel=0.05)


def test_cross_fusion_at_full_size():
    """ViT-B over 1568 video and 200 audio tokens: half of what computing every token for every stream costs."""
    flops, _ = fusion_flops("cross", dict(video=1568, audio=200), 768, 12, heads=12)
    assert flops == pytest.approx(466e9, rel=0.01)
