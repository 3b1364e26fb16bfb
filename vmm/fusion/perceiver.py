"""Perceiver fusion: a few latents read all streams, think, and are read back (Perceiver, Perceiver IO, Jaegle et al. 2021)."""

import flax.linen as nn
import jax.numpy as jnp

from vmm.fusion.enter import join
from vmm.fusion.layered import Layer, Layered
from vmm.fusion.sublayers import Read, options
from vmm.layers import make_block, vector


class PerceiverLayer(Layer):
    """One layer: (modality → x [B N D], z [B Z D]).

    z reads the tokens of all streams by cross attention, passes a block of its own, and each stream reads z by cross
    attention. Tokens never attend to tokens: the cost is linear in their number.
    """

    @nn.compact
    def __call__(self, carry, valid):
        streams, z = carry
        own, there = options(self.block), jnp.ones(z.shape[:2], bool)
        z = Read(self.heads, self.ratio, own, name="read")(z, join(streams), join(valid))
        z = make_block(self.heads, self.ratio, self.block, "latent")(z, there)
        read = {
            name: Read(self.heads, self.ratio, own, name=f"write_{name}")(x, z, there) for name, x in streams.items()
        }
        return read, z


class Perceiver(Layered):
    """Fusion through `latents` = Z latents, carried from layer to layer.

    Every layer reads and writes: the Perceiver reads anew in each, Perceiver IO writes once, in the end.
    FLOPs forward, a layer: Z (4 D² + 4 r D²) + N 4 D² + 4 Z N D to read, block(Z, D) to think,
    N (4 D² + 4 r D²) + M Z 4 D² + 4 N Z D to write; N = Σ_m N_m over M streams.
    """

    layer = PerceiverLayer
    latents: int = 32

    def carried(self, batch: int, dtype):
        z = vector(self, "latents", (self.latents, self.width)).astype(dtype)
        return jnp.broadcast_to(z, (batch, *z.shape))
