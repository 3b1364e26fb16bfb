"""Layers from which encoders, fusions and heads are made; the only place that names parameter axes."""

from vmm.layers.attention import Attention, attention
from vmm.layers.blocks import Block, BlockLayer, Mlp, Repeat, Stack, make_block
from vmm.layers.dense import Dense, Embed, LayerNorm, scalar, vector
from vmm.layers.positions import Positions, rotary, sincos
from vmm.layers.tokens import Pool, as_float, gather, pool, prepend, select

__all__ = [
    "Attention", "Block", "BlockLayer", "Dense", "Embed", "LayerNorm", "Mlp", "Pool", "Positions", "Repeat", "Stack",
    "as_float", "attention", "gather", "make_block", "pool", "prepend", "rotary", "scalar", "select", "sincos", "vector",
]  # fmt: skip
