"""Low-rank tensor fusion: the outer product of the streams' means, never formed (LMF, Liu et al. 2018)."""

import flax.linen as nn
import jax.numpy as jnp

from vmm.fusion.layered import Layer, Layered
from vmm.fusion.sublayers import around, options
from vmm.layers import Dense, make_block


class LowRankLayer(Layer):
    """One layer. With p_m the mean of a stream's valid tokens after a norm, and 1 appended to it (eq. 8):

        h = Σ_r Π_m W_m[r] [p_m; 1],  r = 1 … rank;  x_m ← x_m + U_m h;  x_m ← block(x_m)

    A stream that the sample lacks is left out of the product.
    """

    rank: int = 4

    @nn.compact
    def __call__(self, carry, valid):
        streams, _ = carry
        own, product, after = options(self.block), 1.0, {}
        for name, x in streams.items():
            before, after[name] = around(own, f"norm_{name}")
            weight = valid[name][..., None].astype(jnp.float32)
            total = (before(x).astype(jnp.float32) * weight).sum(1)
            mean = (total / jnp.maximum(weight.sum(1), 1)).astype(x.dtype)
            width = x.shape[-1]
            # The kernel's bias is the factor of the 1.
            factor = Dense((self.rank, width), ("embed", None, "mlp"), name=f"factor_{name}")(mean)
            product *= jnp.where(valid[name].any(1)[:, None, None], factor.astype(jnp.float32), 1.0)
        fused, mixed = product.sum(1), {}
        for name, x in streams.items():
            y = Dense((x.shape[-1],), ("mlp", "embed"), name=f"out_{name}")(fused.astype(x.dtype))
            mixed[name] = make_block(self.heads, self.ratio, self.block, name)(after[name](x, y[:, None]), valid[name])
        return mixed, ()


class LowRank(Layered):
    """Low-rank fusion of the streams' means in every layer, added to each token, before each stream's own block.

    FLOPs forward: depth · Σ_m [ block(N_m, D) + 2 rank D² + 2 D² ].
    """

    layer = LowRankLayer
    rank: int = 4
