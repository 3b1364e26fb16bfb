"""What the tests of several tables share."""

import jax
import numpy as np

B, D, HEADS = 3, 16, 2


def block_flops(tokens: int, width: int) -> int:
    """Forward products of a pre-norm block with MLP ratio 4, one sample."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def finite(tree) -> bool:
    return all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree))


def assert_trees_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
