"""Cross-attention fusion: each stream queries itself and all others, in its own blocks.

Only a stream's own tokens are queries and pass the MLP; the others' give keys and values alone.
Computing every token in every stream's block and throwing the others' away, as public code does,
costs about twice as much.
"""

import flax.linen as nn

from vmm.fusion.enter import join, without
from vmm.fusion.layered import Layer, Layered
from vmm.layers import make_block


class CrossLayer(Layer):
    """Each stream in its own block, over itself and the others as context."""

    @nn.compact
    def __call__(self, carry, valid):
        streams, _ = carry
        mixed = {}
        for name, x in streams.items():
            others = without(streams, name)
            context = (join(others), join(without(valid, name))) if others else ()
            mixed[name] = make_block(self.heads, self.ratio, self.block, name)(x, valid[name], *context)
        return mixed, ()


class Cross(Layered):
    """Cross-attention in every block.

    FLOPs forward: depth · Σ_m [ N_m (4 D² + 16 D²) + N 4 D² + 4 N_m N D ], N = Σ_m N_m.
    """

    layer = CrossLayer
