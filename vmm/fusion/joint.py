"""Joint fusion: one Transformer over the tokens of all streams in a row ("vanilla" fusion of MBT, Nagrani et al. 2021)."""

import flax.linen as nn

from vmm.fusion.enter import Enter, join, part
from vmm.fusion.layered import Fusion
from vmm.layers import Stack
from vmm.types import Streams


class Joint(Fusion):
    """Full self-attention over all tokens, weights shared. FLOPs forward: depth · block(Σ N_m, D)."""

    @nn.compact
    def __call__(self, streams: Streams, edges: bool = True) -> Streams:
        if edges:
            streams = Enter(self.width, name="enter")(streams)
        x = {name: tokens.x for name, tokens in streams.items()}
        valid = join({name: tokens.valid for name, tokens in streams.items()})
        stack = Stack(self.depth, self.heads, self.ratio, self.scan, self.remat, self.block, edges, name="stack")
        fused = part(stack(join(x), valid), x)
        return {name: tokens._replace(x=fused[name]) for name, tokens in streams.items()}
