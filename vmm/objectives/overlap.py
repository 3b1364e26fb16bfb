"""How much stretches of time and boxes overlap, as losses with a gradient even where they do not."""

import jax.numpy as jnp
from jaxtyping import Array, Float

_LEAST = 1e-6


def interval_overlap(
    one: Float[Array, "*B 2"], other: Float[Array, "*B 2"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Returns (intersection over union of (start, end) pairs, their 1-D DIoU).

    DIoU is IoU − d² / c², d the distance of the middles, c the length of what holds both (Zheng et al. 2020, eq. 7, in
    one dimension, as ActionFormer has it).
    """
    inside = jnp.minimum(one[..., 1], other[..., 1]) - jnp.maximum(one[..., 0], other[..., 0])
    inside = jnp.maximum(inside, 0.0)
    union = (one[..., 1] - one[..., 0]) + (other[..., 1] - other[..., 0]) - inside
    around = jnp.maximum(one[..., 1], other[..., 1]) - jnp.minimum(one[..., 0], other[..., 0])
    apart = 0.5 * (one.sum(-1) - other.sum(-1))
    share = inside / jnp.maximum(union, _LEAST)
    return share, share - jnp.square(apart / jnp.maximum(around, _LEAST))


def box_overlap(
    one: Float[Array, "*B 4"], other: Float[Array, "*B 4"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Returns (intersection over union of boxes left, top, right, bottom, their GIoU).

    GIoU is IoU − (C − U) / C, U the area of both, C that of the box around both (Rezatofighi et al. 2019, alg. 1).
    """

    def area(low, high):
        return jnp.prod(jnp.maximum(high - low, 0.0), axis=-1)

    low, high, other_low, other_high = one[..., :2], one[..., 2:], other[..., :2], other[..., 2:]
    inside = area(jnp.maximum(low, other_low), jnp.minimum(high, other_high))
    union = area(low, high) + area(other_low, other_high) - inside
    around = area(jnp.minimum(low, other_low), jnp.maximum(high, other_high))
    share = inside / jnp.maximum(union, _LEAST)
    return share, share - (around - union) / jnp.maximum(around, _LEAST)
