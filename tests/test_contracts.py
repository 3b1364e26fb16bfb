"""What every entry of ENCODERS, FUSIONS and OBJECTIVES promises; a new entry is tested as soon as it is listed."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import assert_trees_close, draw, parameters, stacked

from vmm import masking
from vmm.encoders import ENCODERS
from vmm.fusion import FUSIONS
from vmm.objectives import OBJECTIVES
from vmm.objectives.contrastive import Contrastive
from vmm.training.metrics import count_flops
from vmm.types import MODALITIES, SUBSETS, Batch, Mask, Outputs, Patches, Tokens

B, D, HEADS = 3, 16, 2


def block_flops(tokens: int, width: int) -> int:
    """Forward products of a pre-norm block with MLP ratio 4, one sample."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def finite(tree) -> bool:
    return all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree))


def assert_trees_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# Encoders


def wave(samples: int):
    return 0.1 * draw((B, samples))


def pixels(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape), jnp.uint8)


def words(length: int, vocabulary: int):
    ids = np.random.default_rng(0).integers(1, vocabulary, (B, length))
    ids[1, length // 2 :] = 0
    return jnp.asarray(ids, jnp.int32)


# kind → (fields beside the Transformer's, input, grid, values of a token, FLOPs of embedding a token over D)
ENCODER_CASES = {
    "video": (dict(tubelet=(2, 8, 8)), pixels(B, 4, 16, 24, 3), (2, 2, 3), 384, 2 * 384),
    "audio": (dict(bins=16, window=64, hop=32, patch=(4, 8)), wave(520), (4, 2), 32, 2 * 32),
    "text": (dict(vocabulary=13), words(8, 13), (8,), None, 0),
}


def encoder_case(kind: str, **fields):
    assert kind in ENCODER_CASES, f"give the new encoder {kind!r} a small case in ENCODER_CASES"
    extra, array, *facts = ENCODER_CASES[kind]
    return ENCODERS[kind](**dict(width=D, depth=2, heads=HEADS) | extra | fields), array, *facts


@pytest.mark.parametrize("kind", ENCODERS)
def test_patches(kind: str):
    encoder, array, grid, size, _ = encoder_case(kind)
    patches = jax.jit(lambda a: encoder.patches(a)[:2])(array)
    whole = encoder.patches(array)
    assert whole.grid == grid
    assert isinstance(whole.classes, int)
    assert whole.values.shape == (B, math.prod(grid), *([size] if size else []))
    assert whole.valid.shape == (B, math.prod(grid))
    assert whole.valid.dtype == bool
    assert (whole.classes > 0) == (size is None)
    assert_trees_equal(patches[1], whole.valid)
    # Each sample's patches are its own.
    alone = encoder.patches(array[1:2])
    np.testing.assert_allclose(alone.values[0], whole.values[1], atol=1e-5)


def test_video_patches_are_tubelets():
    encoder, video, *_ = encoder_case("video")
    values = np.asarray(encoder.patches(video).values)
    t, h, w = 1, 0, 2
    place = (t * 2 + h) * 3 + w
    expected = np.asarray(video)[:, 2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
    np.testing.assert_array_equal(values[:, place], expected.reshape(B, -1))
    assert values.dtype == np.uint8


def test_text_padding_is_not_valid():
    encoder, text, *_ = encoder_case("text")
    np.testing.assert_array_equal(encoder.patches(text).valid, np.asarray(text) != 0)


@functools.cache
def encoder_functions(kind: str):
    """(parameters, patches, keep, (params, values, valid, keep) → (tokens, gradients of the kept valid ones))."""
    encoder, array, *_ = encoder_case(kind)
    patches = encoder.patches(array)
    # Padded at the end in sample 1, absent in sample 2.
    valid = np.array(patches.valid)
    valid[1, -2:] = False
    valid[2] = False
    patches = patches._replace(valid=jnp.asarray(valid))
    rng = np.random.default_rng(0)
    count = valid.shape[1]
    keep = jnp.asarray(np.sort([rng.permutation(count)[: count // 2 + 1] for _ in range(B)]), jnp.int32)
    params = parameters(encoder, patches, keep)

    def function(params, values, valid, keep):
        def loss(params):
            tokens = encoder.apply({"params": params}, patches._replace(values=values, valid=valid), keep)
            return jnp.square(tokens.x * tokens.valid[..., None]).sum(), tokens

        gradient, tokens = jax.grad(loss, has_aux=True)(params)
        return tokens, gradient

    return params, patches, keep, jax.jit(function)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_keeps_what_it_is_told(kind: str):
    params, patches, keep, function = encoder_functions(kind)
    tokens, gradient = function(params, patches.values, patches.valid, keep)
    assert tokens.x.shape == (B, keep.shape[1], D)
    assert tokens.at.dtype == jnp.int32
    np.testing.assert_array_equal(tokens.at, keep)
    np.testing.assert_array_equal(tokens.valid, np.take_along_axis(np.asarray(patches.valid), np.asarray(keep), 1))
    assert finite(tokens.x)
    assert finite(gradient)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-3
    # None keeps all; so does keeping all, token for token.
    everything = jnp.broadcast_to(jnp.arange(patches.valid.shape[1], dtype=jnp.int32), patches.valid.shape)
    full, _ = function(params, patches.values, patches.valid, None)
    np.testing.assert_array_equal(full.at, everything)
    np.testing.assert_array_equal(full.valid, patches.valid)
    turned = everything[:, ::-1]
    back, _ = function(params, patches.values, patches.valid, turned)
    there = np.asarray(patches.valid)
    np.testing.assert_allclose(np.asarray(back.x)[:, ::-1][there], np.asarray(full.x)[there], atol=2e-5)


@pytest.mark.parametrize("keeps", [True, False], ids=["keep", "all"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_hidden_and_invalid_tokens_change_no_encoding(kind: str, keeps: bool):
    params, patches, keep, function = encoder_functions(kind)
    keep = keep if keeps else None
    tokens, gradient = function(params, patches.values, patches.valid, keep)
    shown = np.array(patches.valid)
    if keeps:
        shown[:] = False
        np.put_along_axis(shown, np.asarray(keep), True, axis=1)
        shown &= np.asarray(patches.valid)
    mask = shown.reshape(*shown.shape, *(1,) * (patches.values.ndim - 2))
    if patches.classes:
        garbage = (patches.values + 3) % patches.classes
    else:
        garbage = jnp.full_like(patches.values, 200)
    changed = jnp.where(mask, patches.values, garbage.astype(patches.values.dtype))
    dirty, dirty_gradient = function(params, changed, patches.valid, keep)
    there = np.asarray(tokens.valid)
    np.testing.assert_array_equal(np.asarray(dirty.x)[there], np.asarray(tokens.x)[there])
    assert_trees_equal(dirty_gradient, gradient)
    # The test can see: a shown token does change the others.
    alive = jnp.where(~mask, patches.values, garbage.astype(patches.values.dtype))
    other, _ = function(params, alive, patches.valid, keep)
    assert np.abs(np.asarray(other.x)[there] - np.asarray(tokens.x)[there]).max() > 1e-3


@pytest.mark.parametrize("kind", ENCODERS)
def test_samples_do_not_mix_in_an_encoder(kind: str):
    params, patches, keep, function = encoder_functions(kind)
    tokens, _ = function(params, patches.values, patches.valid, keep)
    other, _ = function(params, patches.values.at[0].set(patches.values[1]), patches.valid, keep)
    np.testing.assert_array_equal(other.x[1], tokens.x[1])


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_flops_are_of_kept_tokens(kind: str):
    """The closed form of the docstring: K kept tokens are computed, never the hidden ones."""
    width, depth = 128, 2
    encoder, array, grid, _, embedding = encoder_case(kind, width=width, depth=depth)
    patches = encoder.patches(array)
    params = jax.eval_shape(lambda key: nn.unbox(encoder.init(key, patches, None)), jax.random.key(0))
    found = []
    for kept in (math.prod(grid), math.prod(grid) // 2, 1):
        keep = jnp.zeros((B, kept), jnp.int32)
        flops = count_flops(jax.jit(lambda p, k: encoder.apply(p, patches, k)), params, keep) / B
        expected = embedding * kept * width + depth * block_flops(kept, width)
        assert flops == pytest.approx(expected, rel=0.02)
        found.append(flops)
    assert found[0] > 1.9 * found[1] > found[2]


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_in_half_precision_and_scanned(kind: str):
    params, patches, keep, function = encoder_functions(kind)
    tokens, gradient = function(params, patches.values, patches.valid, keep)
    there = np.asarray(tokens.valid)
    half = encoder_case(kind, dtype="bfloat16")[0]
    x = jax.jit(lambda p: half.apply({"params": p}, patches, keep).x)(params)
    assert x.dtype == jnp.bfloat16
    error = np.abs(np.asarray(x, np.float32) - np.asarray(tokens.x))[there]
    assert error.max() < 0.05 * np.abs(np.asarray(tokens.x)[there]).max()
    scanned = encoder_case(kind, scan=True)[0]
    x = jax.jit(lambda p: scanned.apply({"params": p}, patches, keep).x)(stacked(params))
    np.testing.assert_allclose(x, tokens.x, atol=2e-5)


# Fusions

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


# Objectives

LABELS = {"action": 3, "sound": 2}
OBJECTIVE_FIELDS = {
    "contrastive": dict(width=8),
    "masked": dict(width=D, depth=1, heads=HEADS),
    "classify": dict(labels=LABELS),
}
ROWS = 5
PATCHES = {"video": ((2, 2, 2), 12, 0), "audio": ((3, 2), 6, 0), "text": ((6,), None, 11)}
SHOWN = {"video": 3, "audio": 2, "text": 3}
objectives = pytest.mark.parametrize("kind", OBJECTIVES)


def objective_of(kind: str, **fields):
    return OBJECTIVES[kind](**OBJECTIVE_FIELDS.get(kind, {}) | fields)


def view_of(present: dict, valid, seed: int = 0) -> tuple[Outputs, Batch]:
    """One view's outputs and its batch. present: modality → bool [ROWS]; text has some padding."""
    rng = np.random.default_rng(seed)
    encoded, fused, patches, masks, inputs = {}, {}, {}, {}, {}
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
    )
    return Outputs(encoded, fused, patches, masks), batch


SOME = {
    "video": np.array([True, True, True, False, True]),
    "audio": np.array([True, False, True, True, True]),
    "text": np.array([True, True, True, True, False]),
}
NONE = {name: np.zeros(ROWS, bool) for name in SOME}
LAST_IS_FILLING = np.arange(ROWS) < ROWS - 1


def arrays_of(outputs: Outputs) -> tuple:
    """The arrays of the outputs; grids and classes are static and stand aside."""
    return outputs.encoded, outputs.fused, {k: (p.values, p.valid) for k, p in outputs.patches.items()}, outputs.masks


def outputs_from(arrays: tuple) -> Outputs:
    encoded, fused, patches, masks = arrays
    patches = {k: Patches(*patches[k], PATCHES[k][0], PATCHES[k][2]) for k in patches}
    return Outputs(encoded, fused, patches, masks)


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
    ("masked", (("standardise", False), ("modalities", ("audio", "text")))),
    ("classify", (("pooling", "attention"), ("heads", 2))),
]
variants = pytest.mark.parametrize(("kind", "fields"), VARIANTS, ids=lambda v: v if isinstance(v, str) else str(len(v)))


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


@variants
def test_rows_that_only_fill_a_batch_change_nothing(kind: str, fields: tuple):
    """Garbage in them, and the loss is that of the batch without them."""
    params, function = objective_functions(kind, fields)
    outputs, batch = view_of(SOME, LAST_IS_FILLING)
    arrays = arrays_of(outputs)
    clean = function(params, arrays, batch)
    strange, strange_batch = view_of({name: np.ones(ROWS, bool) for name in SOME}, LAST_IS_FILLING, seed=9)
    mix = lambda ours, theirs: jax.tree.map(lambda a, b: a.at[-1].set(b[-1]), ours, theirs)  # noqa: E731
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
    encoded, fused, patches, masks = arrays_of(outputs)
    clean = function(params, arrays_of(outputs), batch)
    wild = lambda streams: {  # noqa: E731
        k: t._replace(x=jnp.where(t.valid[..., None], t.x, 1e3)) for k, t in streams.items()
    }
    moved = {}
    for name, (values, valid) in patches.items():
        mask = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2))
        moved[name] = (jnp.where(mask, values, 7).astype(values.dtype), valid)
    dirty = function(params, (wild(encoded), wild(fused), moved, masks), batch)
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


@variants
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


def test_masks_of_a_view_fit_the_encoders():
    """What masking gives an encoder can keep, for every mask over every encoder's grid."""
    for kind in ENCODERS:
        encoder, array, grid, *_ = encoder_case(kind)
        patches = encoder.patches(array)
        for mask_kind in masking.MASKS:
            if mask_kind == "tube" and len(grid) == 1:
                continue  # one axis has no tube

            def encode(key, e=encoder, p=patches, m=mask_kind):
                mask = masking.sample(m, jax.random.split(key, B), p.valid, p.grid, 0.5)
                return e.init_with_output(key, p, mask.keep)[0], mask

            tokens, mask = jax.eval_shape(encode, jax.random.key(0))
            assert tokens.x.shape == (B, mask.keep.shape[1], D)
