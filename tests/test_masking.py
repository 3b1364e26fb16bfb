"""Every mask: what it keeps and hides, how many, where, and that it is a function of the sample alone."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from vmm import masking
from vmm.errors import UserError
from vmm.masking import MASKS

GRID = (4, 3, 4)
COUNT = math.prod(GRID)
RATIOS = ("0.25", "0.5", "0.75", "0.9")
SAMPLES = 6
TUBES = ("tube", "multiblock")  # alike in every step of a video
WHOLE = (*TUBES, "frames")  # shapes of whole clips, which are there or not


def keys(seed: int = 0, samples: int = SAMPLES):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(samples))


def validity(kind: str) -> np.ndarray:
    """Rows of tokens: whole, absent and (where a mask promises something) padded at the end or anywhere."""
    valid = np.ones((SAMPLES, COUNT), bool)
    valid[1] = False
    if kind not in WHOLE:
        valid[2, COUNT // 2 :] = False
        valid[3, 5:] = False
        valid[4, np.random.default_rng(0).permutation(COUNT)[:20]] = False
    return valid


def hidden_of(mask, valid: np.ndarray) -> np.ndarray:
    """bool [B N]: valid tokens that are hidden."""
    result = np.zeros(valid.shape, bool)
    np.put_along_axis(result, np.asarray(mask.hidden), True, axis=1)
    return result & valid


def expected(kind: str, ratio: str, valid: np.ndarray) -> np.ndarray:
    """⌊ratio · valid tokens⌋ exactly; of a tube, ⌊ratio · places⌋ in every step; of frames, ⌊ratio · steps⌋ of them."""
    if kind == "frames":
        area = COUNT // GRID[0]
        return np.array([math.floor(Fraction(ratio) * (row.sum() // area)) * area for row in valid])
    if kind in TUBES:
        steps = GRID[0]
        return np.array([math.floor(Fraction(ratio) * (row.sum() // steps)) * steps for row in valid])
    return np.array([math.floor(Fraction(ratio) * int(row.sum())) for row in valid])


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", MASKS)
def test_parts_and_counts(kind: str, ratio: str):
    valid = validity(kind)
    mask = masking.sample(kind, keys(), jnp.asarray(valid), GRID, float(ratio))
    keep, hidden = np.asarray(mask.keep), np.asarray(mask.hidden)
    assert keep.dtype == hidden.dtype == np.int32
    # The split depends on the grid and the ratio alone, and follows what a whole sample hides.
    assert hidden.shape == (SAMPLES, expected(kind, ratio, np.ones((1, COUNT), bool))[0])
    assert keep.shape == (SAMPLES, COUNT - hidden.shape[1])
    for mine, theirs in zip(keep, hidden):
        assert sorted([*mine, *theirs]) == list(range(COUNT))
        assert (np.diff(mine) > 0).all()
        assert (np.diff(theirs) > 0).all()
    np.testing.assert_array_equal(hidden_of(mask, valid).sum(1), expected(kind, ratio, valid))


@pytest.mark.parametrize("kind", MASKS)
def test_padding_is_not_hidden_in_place_of_tokens(kind: str):
    """Every padded sample still hides its share of real tokens and shows the rest of them."""
    valid = validity(kind)
    mask = masking.sample(kind, keys(), jnp.asarray(valid), GRID, 0.5)
    shown = np.zeros(valid.shape, bool)
    np.put_along_axis(shown, np.asarray(mask.keep), True, axis=1)
    np.testing.assert_array_equal((shown & valid).sum(1), valid.sum(1) - expected(kind, "0.5", valid))


@pytest.mark.parametrize("kind", MASKS)
def test_counts_are_exact_in_decimals(kind: str):
    """0.29 · 100 is 28.999… in binary: neither the static nor the drawn count may lose a token by it."""
    grid = (2, 10, 10) if kind in TUBES else (100, 2) if kind == "frames" else (10, 10)
    count = math.prod(grid)
    mask = masking.sample(kind, keys(samples=2), jnp.ones((2, count), bool), grid, 0.29)
    assert mask.hidden.shape[1] == 29 * count // 100


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_of_its_sample_alone(kind: str):
    valid = validity(kind)
    whole = masking.sample(kind, keys(), jnp.asarray(valid), GRID, 0.5)
    order = np.array([4, 0, 3])
    some = masking.sample(kind, keys()[order], jnp.asarray(valid[order]), GRID, 0.5)
    jitted = jax.jit(lambda keys, valid: masking.sample(kind, keys, valid, GRID, 0.5))(keys(), jnp.asarray(valid))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), some, whole)
    jax.tree.map(np.testing.assert_array_equal, jitted, whole)


@pytest.mark.parametrize("kind", MASKS)
def test_keys_differ_and_cover(kind: str):
    samples = 64
    valid = np.ones((samples, COUNT), bool)
    mask = masking.sample(kind, keys(1, samples), jnp.asarray(valid), GRID, 0.5)
    hidden = hidden_of(mask, valid)
    # Two of four frames are hidden in six ways.
    assert len({row.tobytes() for row in hidden}) > (5 if kind == "frames" else 10)
    share = hidden.mean(0)
    # Every place is at times hidden and at times shown.
    assert share.min() > 0.02
    assert share.max() < 0.98


def test_random_is_uniform():
    valid = np.ones((512, 8), bool)
    hidden = hidden_of(masking.sample("random", keys(2, 512), jnp.asarray(valid), (8,), 0.5), valid)
    assert np.abs(hidden.mean(0) - 0.5).max() < 0.12  # 5 standard deviations


@pytest.mark.parametrize("ratio", RATIOS)
def test_tube_is_the_same_in_every_step(ratio: str):
    valid = validity("tube")
    hidden = hidden_of(masking.sample("tube", keys(), jnp.asarray(valid), GRID, float(ratio)), valid)
    steps = hidden.reshape(SAMPLES, GRID[0], -1)
    assert (steps == steps[:, :1]).all()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("grid", [(4, 3, 4), (6, 5), (12,)], ids=str)
def test_block_is_one_cluster(grid: tuple, ratio: str):
    count = math.prod(grid)
    valid = np.ones((32, count), bool)
    mask = masking.sample("block", keys(3, 32), jnp.asarray(valid), grid, float(ratio))
    for hidden in hidden_of(mask, valid).reshape(32, *grid):
        assert ndimage.label(hidden)[1] == 1
        # A block fills most of the box around it.
        box = ndimage.find_objects(hidden.astype(int))[0]
        assert hidden[box].mean() > 0.4


@pytest.mark.parametrize("ratio", RATIOS)
def test_span_is_one_run_of_valid_tokens(ratio: str):
    valid = validity("span")
    hidden = hidden_of(masking.sample("span", keys(), jnp.asarray(valid), GRID, float(ratio)), valid)
    for row, there in zip(hidden, valid):
        row = row[there]  # consecutive among the valid, wrapping round
        changes = (row != np.roll(row, 1)).sum()
        assert changes == (2 if row.any() else 0)


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_may_hide_all(kind: str):
    mask = masking.sample(kind, keys(), jnp.ones((SAMPLES, COUNT), bool), GRID, 1.0)
    assert mask.keep.shape == (SAMPLES, 0)
    np.testing.assert_array_equal(mask.hidden, np.tile(np.arange(COUNT), (SAMPLES, 1)))


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_that_hides_nothing_or_too_much_is_an_error(kind: str):
    for ratio in (0.0, 0.01, 1.1):
        with pytest.raises(UserError, match="hide some, and at most all"):
            masking.sample(kind, keys(), jnp.ones((SAMPLES, COUNT), bool), GRID, ratio)


@pytest.mark.parametrize(("blocks", "scale"), [(8, 0.15), (2, 0.7)], ids=["short", "long"])
def test_multiblock_is_the_boxes_drawn_grown_to_the_count(blocks: int, scale: float):
    """Against a loop: boxes from the same draws, all grown by the least factor that covers the count."""
    grid, ratio, samples = (3, 10, 12), 0.6, 16
    hide = math.floor(ratio * 120)
    mask = masking.sample(
        "multiblock", keys(4, samples), jnp.ones((samples, 360), bool), grid, ratio, dict(blocks=blocks, scale=scale)
    )
    hidden = hidden_of(mask, np.ones((samples, 360), bool)).reshape(samples, *grid)
    assert (hidden == hidden[:, :1]).all()
    aspects = []
    for key, mine in zip(keys(4, samples), hidden[:, 0]):
        shape_key, place_key = jax.random.split(key)
        aspect = np.asarray(jax.random.uniform(shape_key, (blocks,), minval=0.75, maxval=1.5), np.float64)
        draw = np.asarray(jax.random.uniform(place_key, (blocks, 2)), np.float64)
        aspects += list(aspect)
        height, width = np.minimum(1, np.sqrt(scale * aspect)), np.minimum(1, np.sqrt(scale / aspect))
        np.testing.assert_allclose((height * width)[(height < 1) & (width < 1)], scale)
        y, x = height / 2 + draw[:, 0] * (1 - height), width / 2 + draw[:, 1] * (1 - width)

        rows, columns = (np.arange(10) + 0.5) / 10 - y[:, None], (np.arange(12) + 0.5) / 12 - x[:, None]
        rows, columns = np.abs(rows) / (height / 2)[:, None], np.abs(columns) / (width / 2)[:, None]
        # Between the largest union of at most the count and the smallest of at least it.
        unions = [
            ((rows <= factor)[:, :, None] & (columns <= factor)[:, None]).any(0) for factor in np.linspace(0, 4, 4001)
        ]
        counts = np.array([u.sum() for u in unions])
        inner, outer = unions[np.flatnonzero(counts <= hide)[-1]], unions[np.flatnonzero(counts >= hide)[0]]
        assert (mine >= inner).all()
        assert (mine <= outer).all()
    assert min(aspects) < 0.9 < 1.3 < max(aspects)


def test_multiblock_of_sound_and_text_counts_their_own_tokens():
    """Two axes and one: exactly ⌊ratio · valid⌋, in few pieces."""
    for grid in ((8, 6), (48,)):
        valid = np.ones((8, 48), bool)
        valid[1, 20:] = False
        fields = dict(blocks=1, scale=0.3)
        mask = masking.sample("multiblock", keys(5, 8), jnp.asarray(valid), grid, 0.5, fields)
        hidden = hidden_of(mask, valid)
        np.testing.assert_array_equal(hidden.sum(1), valid.sum(1) // 2)
        for row in np.delete(hidden, 1, 0):
            assert ndimage.label(row.reshape(grid))[1] == 1


def test_wrong_fields_of_a_mask_are_errors():
    valid = jnp.ones((SAMPLES, COUNT), bool)
    with pytest.raises(UserError, match=r"views.masked.video.blocks: no such key; .*ratio"):
        masking.sample("tube", keys(), valid, GRID, 0.5, dict(blocks=2), "views.masked.video")
    for fields in (dict(blocks=0), dict(scale=1.5), dict(aspect=(2.0, 1.0))):
        with pytest.raises(UserError, match="a multiblock mask has blocks"):
            masking.sample("multiblock", keys(), valid, GRID, 0.5, fields)


def test_frames_are_hidden_whole_and_those_that_are_named():
    valid = np.ones((SAMPLES, COUNT), bool)
    valid[1] = False
    drawn = hidden_of(masking.sample("frames", keys(), jnp.asarray(valid), GRID, 0.5), valid).reshape(SAMPLES, 4, 12)
    assert (drawn.all(2) == drawn.any(2)).all()
    for hide, truth in (((1, 3), (1, 3)), ((-2, -1), (2, 3)), ((0, -2), (0, 2))):
        mask = masking.sample("frames", keys(), jnp.asarray(valid), GRID, 0.5, dict(hide=hide))
        named = hidden_of(mask, valid).reshape(SAMPLES, 4, 12)
        expected = np.zeros((4, 12), bool)
        expected[list(truth)] = True
        np.testing.assert_array_equal(np.delete(named, 1, 0), np.broadcast_to(expected, (SAMPLES - 1, 4, 12)))
        assert not named[1].any()
    # Of a third axis as of two: sound and text have frames and tokens.
    mask = masking.sample("frames", keys(), jnp.ones((SAMPLES, 6), bool), (6,), 0.5, dict(hide=(0, 2, 4)))
    np.testing.assert_array_equal(mask.hidden, np.tile([0, 2, 4], (SAMPLES, 1)))


@pytest.mark.parametrize("hide", [(1,), (1, 1), (1, -3), (1, 4), (-5, 0)], ids=str)
def test_frames_that_are_not_as_many_as_the_ratio_says_are_an_error(hide: tuple):
    with pytest.raises(UserError, match="must be different ones in 0 … 3 and, of ratio 0.5, 2"):
        masking.sample("frames", keys(), jnp.ones((SAMPLES, COUNT), bool), GRID, 0.5, dict(hide=hide))
