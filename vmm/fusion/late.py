"""Late fusion: streams never meet in the trunk; predictions or embeddings are joined by the objective."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn

from vmm.layers import Dense, Stack
from vmm.types import Streams


class Late(nn.Module):
    """Each stream in its own blocks; a depth of 0 leaves the encoders' streams as they are.

    FLOPs forward: Σ_m depth · block(N_m, D).
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
        result = {}
        for name, tokens in streams.items():
            x = tokens.x
            if x.shape[-1] != self.width:
                x = Dense((self.width,), (None, "embed"), name=f"project_{name}")(x)
            if self.depth:
                stack = Stack(self.depth, self.heads, self.ratio, self.scan, self.remat, self.block, name=name)
                x = stack(x, tokens.valid)
            result[name] = tokens._replace(x=x)
        return result
