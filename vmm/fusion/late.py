"""Late fusion: streams never meet in the trunk; predictions or embeddings are joined by the objective."""

import flax.linen as nn

from vmm.fusion.layered import Fusion
from vmm.layers import Dense, Stack
from vmm.types import Streams


class Late(Fusion):
    """Each stream in its own blocks; a depth of 0 leaves the encoders' streams as they are, a width of 0 their widths.

    FLOPs forward: Σ_m depth · block(N_m, D).
    """

    @property
    def keeps_streams(self) -> bool:
        """Whether encoders' streams come out as they are, but for their width."""
        return self.depth == 0

    @nn.compact
    def __call__(self, streams: Streams, edges: bool = True) -> Streams:
        result = {}
        for name, tokens in streams.items():
            x = tokens.x
            if self.width and x.shape[-1] != self.width:
                x = Dense((self.width,), (None, "embed"), name=f"project_{name}")(x)
            if self.depth:
                stack = Stack(self.depth, self.heads, self.ratio, self.scan, self.remat, self.block, edges, name=name)
                x = stack(x, tokens.valid)
            result[name] = tokens._replace(x=x)
        return result
