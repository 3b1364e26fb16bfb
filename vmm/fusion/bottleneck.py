"""Bottleneck fusion: streams exchange only through a few shared tokens (MBT, Nagrani et al. 2021, eq. 8-9)."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from vmm.fusion.enter import Enter, Leave
from vmm.layers import Repeat, make_block, vector
from vmm.types import Streams


class BottleneckLayer(nn.Module):
    """One layer: (modality → x [B N D], z [B Z D]); the constants are modality → valid [B N].

    Each stream attends over itself and z, and writes its own z; the new z is their mean over the
    streams that the sample has (z stays where it has none).
    """

    heads: int
    ratio: float = 4.0
    block: Mapping = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, carry, constants):
        streams, z = carry
        count = z.shape[1]
        mixed, written, weights = {}, [], []
        for name, x in streams.items():
            valid = jnp.pad(constants[name], ((0, 0), (0, count)), constant_values=True)
            y = make_block(self.heads, self.ratio, self.block, name)(jnp.concatenate([x, z], axis=1), valid)
            mixed[name] = y[:, :-count]
            written.append(y[:, -count:])
            weights.append(constants[name].any(1))
        weight = jnp.stack(weights).astype(z.dtype)[..., None, None]
        total = weight.sum(0)
        mean = (jnp.stack(written) * weight).sum(0) / jnp.maximum(total, 1)
        return mixed, jnp.where(total > 0, mean, z)


class Bottleneck(nn.Module):
    """Fusion through `bottlenecks` = Z shared tokens.

    Needs a depth of two: the first layer writes them, only the second reads. FLOPs forward: depth · Σ_m block(N_m + Z, D)."""

    width: int
    depth: int
    heads: int
    bottlenecks: int = 4
    ratio: float = 4.0
    scan: bool = False
    remat: bool = False
    block: Mapping = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        streams = Enter(self.width, name="enter")(streams)
        first = next(iter(streams.values())).x
        z = vector(self, "bottleneck", (self.bottlenecks, self.width)).astype(first.dtype)
        z = jnp.broadcast_to(z, (first.shape[0], *z.shape))
        fields = dict(heads=self.heads, ratio=self.ratio, block=self.block)
        x, _ = Repeat(BottleneckLayer, fields, self.depth, self.scan, self.remat, name="blocks")(
            ({name: tokens.x for name, tokens in streams.items()}, z),
            {name: tokens.valid for name, tokens in streams.items()},
        )
        return Leave(self.block.get("epsilon", 1e-6), name="leave")(
            {name: tokens._replace(x=x[name]) for name, tokens in streams.items()}
        )
