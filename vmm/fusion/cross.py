"""Cross-attention fusion: each stream queries itself and all others, in its own blocks.

Only a stream's own tokens are queries and pass the MLP; the others' give keys and values alone.
Computing every token in every stream's block and throwing the others' away, as public code does,
costs about twice as much.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from vmm.fusion.enter import Enter, Leave
from vmm.layers import Repeat, make_block
from vmm.types import Streams


class CrossLayer(nn.Module):
    """One layer: modality → x [B N D]; the constants are modality → valid [B N]."""

    heads: int
    ratio: float = 4.0
    block: Mapping = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, carry, constants):
        mixed = {}
        for name, x in carry.items():
            others = [other for other in carry if other != name]
            context = valid = None
            if others:
                context = jnp.concatenate([carry[other] for other in others], axis=1)
                valid = jnp.concatenate([constants[other] for other in others], axis=1)
            mixed[name] = make_block(self.heads, self.ratio, self.block, name)(x, constants[name], context, valid)
        return mixed


class Cross(nn.Module):
    """Cross-attention in every block.

    FLOPs forward: depth · Σ_m [ N_m (4 D² + 16 D²) + N 4 D² + 4 N_m N D ], N = Σ_m N_m.
    """

    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    scan: bool = False
    remat: bool = False
    block: Mapping = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        streams = Enter(self.width, name="enter")(streams)
        fields = dict(heads=self.heads, ratio=self.ratio, block=self.block)
        x = Repeat(CrossLayer, fields, self.depth, self.scan, self.remat, name="blocks")(
            {name: tokens.x for name, tokens in streams.items()},
            {name: tokens.valid for name, tokens in streams.items()},
        )
        return Leave(self.block.get("epsilon", 1e-6), name="leave")(
            {name: tokens._replace(x=x[name]) for name, tokens in streams.items()}
        )
