"""What every entry of ENCODERS promises; a new entry is tested as soon as it is listed."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import HEADS, B, D, assert_trees_equal, block_flops, finite
from test_layers import draw, parameters, stacked

from vmm import masking
from vmm.encoders import ENCODERS
from vmm.training.metrics import count_flops


def wave(samples: int):
    return 0.1 * draw((B, samples))


def pixels(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape), jnp.uint8)


def words(length: int, vocabulary: int):
    ids = np.random.default_rng(0).integers(1, vocabulary, (B, length))
    ids[1, length // 2 :] = 0
    return jnp.asarray(ids, jnp.int32)


# kind, or kind/what is special → (fields beside the Transformer's, input, grid, values of a token, FLOPs of embedding
# a token over D, or a function of D)
SOUND = dict(bins=16, window=64, hop=32)
ENCODER_CASES = {
    "video": (dict(tubelet=(2, 8, 8)), pixels(B, 4, 16, 24, 3), (2, 2, 3), 384, 2 * 384),
    "video/mixed": (
        dict(tubelet=(2, 8, 8), attention=dict(kind="mixed", heads=dict(local=1, temporal=1)), window=(2, 2, 2)),
        pixels(B, 4, 16, 24, 3), (2, 2, 3), 384, 2 * 384,
    ),
    "video/divided": (  # attention along time: 10 D² more a token in each of two layers
        dict(tubelet=(2, 8, 8), attention="divided", positions="factorised"),
        pixels(B, 4, 16, 24, 3), (2, 2, 3), 384, lambda width: 2 * 384 + 20 * width,
    ),
    "audio": (dict(patch=(4, 8), **SOUND), wave(520), (4, 2), 32, 2 * 32),
    "audio/overlap": (
        dict(frontend="kaldi", patch=(4, 8), stride=(3, 4), **SOUND), wave(520), (4, 3), 32, 2 * 32
    ),
    "audio/conv": (
        dict(frontend="whisper", stem="conv", **SOUND), wave(520), (8,), 80, lambda width: 18 * 16 + 6 * width
    ),
    "text": (dict(vocabulary=13), words(8, 13), (8,), None, 0),
    "text/clip": (
        dict(vocabulary=13, causal=True, padding=-1, end=0, positions="learned", block=dict(activation="gelu_quick")),
        words(8, 13), (8,), None, 0,
    ),
    "text/bert": (
        dict(vocabulary=13, positions="learned", norm_embedding=True, final_norm=False, block=dict(norm="post")),
        words(8, 13), (8,), None, 0,
    ),
}  # fmt: skip


def test_every_encoder_has_a_case():
    assert {name.partition("/")[0] for name in ENCODER_CASES} == set(ENCODERS)


def encoder_case(kind: str, **fields):
    extra, array, *facts = ENCODER_CASES[kind]
    return ENCODERS[kind.partition("/")[0]](**dict(width=D, depth=2, heads=HEADS) | extra | fields), array, *facts


@pytest.mark.parametrize("kind", ENCODER_CASES)
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


@pytest.mark.parametrize("kind", ENCODER_CASES)
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
@pytest.mark.parametrize("kind", ENCODER_CASES)
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


@pytest.mark.parametrize("kind", ENCODER_CASES)
def test_samples_do_not_mix_in_an_encoder(kind: str):
    params, patches, keep, function = encoder_functions(kind)
    tokens, _ = function(params, patches.values, patches.valid, keep)
    other, _ = function(params, patches.values.at[0].set(patches.values[1]), patches.valid, keep)
    np.testing.assert_array_equal(other.x[1], tokens.x[1])


@pytest.mark.parametrize("kind", ENCODER_CASES)
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
        each = embedding(width) if callable(embedding) else embedding
        expected = each * kept * width + depth * block_flops(kept, width)
        assert flops == pytest.approx(expected, rel=0.02)
        found.append(flops)
    assert found[0] > 1.9 * found[1] > found[2]


@pytest.mark.parametrize("kind", ENCODER_CASES)
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


def test_masks_of_a_view_fit_the_encoders():
    """What masking gives an encoder can keep, for every mask over every encoder's grid."""
    for kind in ENCODER_CASES:
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
