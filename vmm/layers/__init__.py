"""Layers from which encoders, fusions and heads are made; the only place that names parameter axes."""

from vmm.layers.attention import Attention, attention
from vmm.layers.blocks import Block, BlockLayer, Mlp, Repeat, Stack, layers_of, make_block
from vmm.layers.dense import Dense, Embed, LayerNorm, scalar, vector
from vmm.layers.merging import MergingStack
from vmm.layers.packing import pack, unpack
from vmm.layers.positions import Positions, ravel, rotary, rotary_at, sincos
from vmm.layers.spacetime import SpaceTimeStack, lay_out, prepend_each
from vmm.layers.tokens import Pool, as_float, gather, pool, prepend, select

__all__ = [
    "Attention", "Block", "BlockLayer", "Dense", "Embed", "LayerNorm", "MergingStack", "Mlp", "Pool", "Positions",
    "Repeat", "SpaceTimeStack", "Stack", "as_float", "attention", "gather", "lay_out", "layers_of", "make_block",
    "pack", "pool", "prepend", "prepend_each", "ravel", "rotary", "rotary_at", "scalar", "select", "sincos", "unpack",
    "vector",
]  # fmt: skip
