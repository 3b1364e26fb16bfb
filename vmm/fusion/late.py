"""Late fusion: streams never meet in the trunk; predictions or embeddings are joined by the objective."""

import flax.linen as nn

from vmm.fusion.enter import Enter
from vmm.layers import Stack
from vmm.types import Streams


class Late(nn.Module):
    """Each stream in its own blocks. FLOPs forward: Σ_m depth · block(N_m, D)."""

    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        return {
            name: tokens._replace(
                x=Stack(self.depth, self.heads, self.ratio, self.scan, self.remat, name=name)(tokens.x, tokens.valid)
            )
            for name, tokens in Enter(self.width, name="enter")(streams).items()
        }
