"""Gated cross-attention fusion: what streams read of each other enters through gates that start shut (Flamingo, Alayrac et al. 2022)."""

import flax.linen as nn
import jax.numpy as jnp

from vmm.fusion.enter import join, without
from vmm.fusion.layered import Layer, Layered
from vmm.fusion.sublayers import Read, options
from vmm.layers import make_block


class GatedLayer(Layer):
    """One layer. For each stream x, with y the others' tokens in a row:

        x ← x + tanh(α) · attention(norm(x), norm(y));  x ← x + tanh(β) · MLP(norm(x));  x ← block(x)

    A sample that has no other stream passes the block alone. Gates: tanh(α), tanh(β) of each stream.
    """

    @nn.compact
    def __call__(self, carry, valid):
        streams, _ = carry
        mixed = {}
        for name, x in streams.items():
            others = without(streams, name)
            if others:
                there = join(without(valid, name))
                read = Read(self.heads, self.ratio, options(self.block), gated=True, name=f"read_{name}")
                x = jnp.where(there.any(1)[:, None, None], read(x, join(others), there), x)
            mixed[name] = make_block(self.heads, self.ratio, self.block, name)(x, valid[name])
        return mixed, ()


class Gated(Layered):
    """tanh-gated cross attention before each stream's own block; α = β = 0 at the start, which is late fusion.

    FLOPs forward: depth · Σ_m [ block(N_m, D) + N_m (4 D² + 4 r D²) + (N − N_m) 4 D² + 4 N_m (N − N_m) D ],
    N = Σ_m N_m; one stream alone: its block.
    """

    layer = GatedLayer
