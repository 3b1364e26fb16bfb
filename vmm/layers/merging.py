"""Tokens merged layer by layer, for quicker inference with trained parameters (ToMe, Bolya et al. 2023)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vmm.errors import UserError
from vmm.layers import regularise
from vmm.layers.attention import Attention, rotate
from vmm.layers.blocks import Block, Mlp, Stack
from vmm.layers.dense import Dense, LayerNorm


def match(
    metric: Float[Array, "B N d"], valid: Bool[Array, "B N"], registers: int, merge: int
) -> tuple[Int[Array, "B M"], Int[Array, "B N"]]:
    """Bipartite soft matching (Bolya et al. 2023, sec. 3): which tokens become one with which.

    Every other token (those of even index) finds its nearest among the rest, by the cosine of `metric`; the `merge`
    nearest pairs, at most half of the tokens, become one each. The first `registers` tokens stay as they are. What
    is not valid goes first, and nothing merges into it while anything else is left.

    Returns:
      kept: the old index of each of the M = N − merge new tokens: registers, those unmatched, those merged into.
      into: the new index of each old token.
    """
    batch, count = valid.shape
    one = np.arange(registers + registers % 2, count, 2)
    two = np.arange(registers + 1 - registers % 2, count, 2)
    merge = min(merge, len(one), (count - registers) // 2)
    unit = metric.astype(jnp.float32)
    unit = unit * jax.lax.rsqrt(jnp.maximum(jnp.square(unit).sum(-1, keepdims=True), 1e-12))
    score = jnp.einsum("bid,bjd->bij", unit[:, one], unit[:, two])
    score = jnp.where(valid[:, None, two], score, -2.0)
    score = jnp.where(valid[:, one, None], score, 3.0)
    order = jnp.argsort(-score.max(-1), axis=1) if merge else jnp.broadcast_to(jnp.arange(len(one)), (batch, len(one)))
    gone, stay = order[:, :merge], jnp.sort(order[:, merge:], axis=1)
    first = registers + len(one) - merge  # the new index of the first of the second set
    row = jnp.arange(batch)[:, None]
    kept = jnp.concatenate(
        [
            jnp.broadcast_to(jnp.arange(registers), (batch, registers)),
            jnp.asarray(one)[stay],
            jnp.broadcast_to(two, (batch, len(two))),
        ],
        axis=1,
    )
    into = jnp.zeros((batch, count), jnp.int32).at[row, kept].set(jnp.arange(count - merge))
    if merge:
        target = jnp.take_along_axis(score.argmax(-1), gone, axis=1)
        into = into.at[row, jnp.asarray(one)[gone]].set(first + target)
    return kept.astype(jnp.int32), into


def merged(x: Float[Array, "B N D"], size: Float[Array, "B N"], kept: Int[Array, "B M"], into: Int[Array, "B N"]):
    """Returns (x [B M D], size [B M]): each new token the mean of its old ones, weighted by size."""
    row = jnp.arange(x.shape[0])[:, None]
    sizes = jnp.zeros(kept.shape, jnp.float32).at[row, into].add(size)
    total = jnp.zeros((*kept.shape, x.shape[-1]), jnp.float32)
    total = total.at[row, into].add(jnp.where(size[..., None] > 0, x.astype(jnp.float32) * size[..., None], 0.0))
    return (total / jnp.maximum(sizes, 1.0)[..., None]).astype(x.dtype), sizes


class SizedAttention(Attention):
    """Attention in which a token of size s counts as s tokens (proportional attention, Bolya et al. 2023, eq. 1).

    Softmax of logits + log s; size 0: not there. Also returns its keys' mean over heads, before rotary turns them.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], size: Float[Array, "B N"], rotary: tuple | None = None) -> tuple:
        split, axes = (self.heads, x.shape[-1] // self.heads), ("embed", "heads", "head_dim")
        query, key, value = (Dense(split, axes, name=name)(x) for name in ("query", "key", "value"))
        metric = key.mean(2)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        logits = jnp.einsum("bqad,bkad->baqk", query, key, preferred_element_type=jnp.float32)
        logits = logits / math.sqrt(split[1])
        if self.cap:
            logits = self.cap * jnp.tanh(logits / self.cap)
        there = (size > 0)[:, None, None]
        logits = jnp.where(there, logits + jnp.log(jnp.maximum(size, 1.0))[:, None, None], -1e30)
        weights = jax.nn.softmax(logits, axis=-1) * there.any(-1, keepdims=True)
        mixed = jnp.einsum("baqk,bkad->bqad", weights.astype(value.dtype), value)
        return Dense((x.shape[-1],), ("heads", "head_dim", "embed"), inputs=2, name="out")(mixed), metric


class MergingBlock(Block):
    """A Block that merges tokens between attention and MLP: (x, size, rotary) → the same and `into`, see match.

    A merged token keeps the place, for rotary, of the token it was merged into.
    """

    registers: int = 0
    merge: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], size: Float[Array, "B N"], rotary: tuple | None = None) -> tuple:
        if self.bottleneck or self.prefix:
            raise UserError("video encoder: merge knows no block.bottleneck and no block.prefix; set them to 0")
        if regularise.drops({"dropout": self.dropout, "drop_path": self.drop_path}):
            raise UserError("video encoder: merge drops nothing while training; set block.dropout and drop_path to 0")
        pre = self.norm == "pre"
        norm_attention = LayerNorm(self.epsilon, name="norm_attention")
        norm_mlp = LayerNorm(self.epsilon, name="norm_mlp")
        attention = SizedAttention(self.heads, self.cap, name="attention")
        mlp = Mlp(self.ratio, self.activation, name="mlp")
        y, metric = attention(norm_attention(x) if pre else x, size, rotary)
        x = x + y if pre else norm_attention(x + y)
        kept, into = match(metric, size > 0, self.registers, self.merge)
        x, size = merged(x, size, kept, into)
        if rotary is not None:
            rotary = tuple(jnp.take_along_axis(part, kept[..., None], axis=1) for part in rotary)
        x = x + mlp(norm_mlp(x)) if pre else norm_mlp(x + mlp(x))
        return x, size, rotary, into


class MergingStack(Stack):
    """A Stack, parameters and all, that merges tokens: `merge` of them in each layer, for inference.

    Every token comes back, with the value of the one it was merged into: x [B N D] → [B N D]. registers: tokens that
    come first and are never merged.

    FLOPs forward a sample, n the tokens of a layer before it merges r: 8 n D² + 4 n² D + (n/2)² 2 D/A + 16 (n − r) D²
    for A heads and an MLP ratio of 4.
    """

    registers: int = 0
    merge: int = 0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"], mask: None = None, rotary: tuple | None = None
    ) -> Float[Array, "B N D"]:
        if self.is_initializing():
            return super().__call__(x, valid, rotary=rotary)
        params = nn.unbox(self.variables["params"])
        size, place = valid.astype(jnp.float32), jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        fields = dict(heads=self.heads, ratio=self.ratio, registers=self.registers, merge=self.merge)
        block = MergingBlock(**fields, **self.block, parent=None)
        for i in range(self.depth):
            own = jax.tree.map(lambda p, i=i: p[i], params["blocks"]["layers"]) if self.scan else None
            own = params["blocks"][f"layer_{i}"] if own is None else own
            x, size, rotary, into = block.apply({"params": own["block"]}, x, size, rotary)
            place = jnp.take_along_axis(into, place, axis=1)
        if self.final_norm:
            x = LayerNorm(self.block.get("epsilon", 1e-6), parent=None).apply({"params": params["norm"]}, x)
        return jnp.take_along_axis(x, place[..., None], axis=1)
