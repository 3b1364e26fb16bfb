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


def keys(seed: int = 0, samples: int = SAMPLES):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(samples))


def validity(kind: str) -> np.ndarray:
    """Rows of tokens: whole, absent and (where a mask promises something) padded at the end or anywhere."""
    valid = np.ones((SAMPLES, COUNT), bool)
    valid[1] = False
    if kind != "tube":  # a tube is a shape of whole clips, which are there or not
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
    """⌊ratio · valid tokens⌋ exactly; of a tube, ⌊ratio · places⌋ in every step."""
    if kind == "tube":
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
    grid = (2, 10, 10) if kind == "tube" else (10, 10)
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
    assert len({row.tobytes() for row in hidden}) > 10
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
def test_a_mask_that_hides_or_shows_nothing_is_an_error(kind: str):
    for ratio in (0.0, 0.01, 1.0):
        with pytest.raises(UserError, match="hide some and show some"):
            masking.sample(kind, keys(), jnp.ones((SAMPLES, COUNT), bool), GRID, ratio)
