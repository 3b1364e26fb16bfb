"""Joint fusion: one Transformer over the tokens of all streams in a row ("vanilla" fusion of MBT, Nagrani et al. 2021)."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn

from vmm.fusion.enter import Enter, join, part
from vmm.layers import Stack
from vmm.types import Streams


class Joint(nn.Module):
    """Full self-attention over all tokens, weights shared. FLOPs forward: depth · block(Σ N_m, D)."""

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
        x, valid = join(streams)
        stack = Stack(self.depth, self.heads, self.ratio, self.scan, self.remat, self.block, name="stack")
        return part(streams, stack(x, valid))
