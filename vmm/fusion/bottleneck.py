"""Bottleneck fusion: streams exchange only through a few shared tokens (MBT, Nagrani et al. 2021, eq. 8-9)."""

import flax.linen as nn
import jax.numpy as jnp

from vmm.fusion.layered import Layer, Layered
from vmm.layers import make_block, vector


class BottleneckLayer(Layer):
    """One layer: (modality → x [B N D], z [B Z D]).

    Each stream attends over itself and z, and writes its own z; the new z is their mean over the
    streams that the sample has (z stays where it has none).
    """

    @nn.compact
    def __call__(self, carry, valid):
        streams, z = carry
        count = z.shape[1]
        mixed, written, weights = {}, [], []
        for name, x in streams.items():
            there = jnp.pad(valid[name], ((0, 0), (0, count)), constant_values=True)
            y = make_block(self.heads, self.ratio, self.block, name)(jnp.concatenate([x, z], axis=1), there)
            mixed[name] = y[:, :-count]
            written.append(y[:, -count:])
            weights.append(valid[name].any(1))
        weight = jnp.stack(weights).astype(z.dtype)[..., None, None]
        total = weight.sum(0)
        mean = (jnp.stack(written) * weight).sum(0) / jnp.maximum(total, 1)
        return mixed, jnp.where(total > 0, mean, z)


class Bottleneck(Layered):
    """Fusion through `bottlenecks` = Z shared tokens.

    Needs a depth of two: the first layer writes them, only the second reads. FLOPs forward: depth · Σ_m block(N_m + Z, D)."""

    layer = BottleneckLayer
    bottlenecks: int = 4

    def carried(self, batch: int, dtype):
        z = vector(self, "bottleneck", (self.bottlenecks, self.width)).astype(dtype)
        return jnp.broadcast_to(z, (batch, *z.shape))
