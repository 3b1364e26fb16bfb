"""Modality experts: attention shared by all streams, norms and MLP each stream's own (VLMo, Bao et al. 2022; BEiT-3, Wang et al. 2023)."""

import flax.linen as nn

from vmm.fusion.enter import join, part
from vmm.fusion.layered import Layer, Layered
from vmm.fusion.sublayers import Feed, around, options
from vmm.layers import Attention


class ExpertsLayer(Layer):
    """One layer: each stream's own norm, one self-attention over all tokens in a row, each stream's own MLP."""

    @nn.compact
    def __call__(self, carry, valid):
        streams, _ = carry
        own = options(self.block)
        norms = {name: around(own, f"norm_{name}") for name in streams}
        x = join({name: norms[name][0](x) for name, x in streams.items()})
        valid = join({name: valid[name] for name in streams})
        seen = part(Attention(self.heads, own.cap, name="attention")(x, None, valid), streams)
        mixed = {}
        for name, x in streams.items():
            mixed[name] = Feed(self.ratio, own, name=f"expert_{name}")(norms[name][1](x, seen[name]))
        return mixed, ()


class Experts(Layered):
    """Shared attention, an expert a modality. FLOPs forward: depth · block(Σ N_m, D), as joint."""

    layer = ExpertsLayer
