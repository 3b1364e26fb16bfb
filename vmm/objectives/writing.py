"""A decoder that writes texts: all at once for its loss, or token by token, with several texts in work at a time."""

import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmm.build import make
from vmm.layers import Dense, Embed, LayerNorm, Positions, make_block, regularise, vector
from vmm.layers.attention import Attention, attention
from vmm.layers.blocks import Block
from vmm.types import Streams


class Recalling(Attention):
    """Attention that reads one token a time of each of K texts [B K D], and keeps keys and values of those before.

    The K texts of a sample stand in the places of queries, so that what they tell of is held once for all of them. It
    comes as the context of the first call, with the collections "told" and "written" mutable; later calls have no
    context, and change "written" alone. length: L, tokens a text can have. FLOPs forward a step: 4 K (K L + C) D a sample
    for C keys of the context, besides the projections.
    """

    length: int = 0

    def mix(self, query, key, value, valid, mask) -> Float[Array, "B K A d"]:
        """The attention of each text's newest token over that text and what it tells of."""
        texts, before = query.shape[1], self.prefix
        if self.is_mutable_collection("told"):
            # The learned prefix, then the texts' tokens, then the context.
            rest = (jnp.concatenate([x[:, :before], x[:, before + texts :]], axis=1) for x in (key, value, valid))
            for name, x in zip(("keys", "values", "there"), rest):
                self.variable("told", name, lambda x=x: x)
        told = [self.get_variable("told", name) for name in ("keys", "values", "there")]
        place = self.variable("written", "place", lambda: jnp.zeros((), jnp.int32))
        seen = jnp.arange(self.length) <= place.value
        keys = []
        for name, x, context in zip(("keys", "values"), (key, value), told):
            shape = (len(x), texts, self.length, *x.shape[2:])
            past = self.variable("written", name, lambda x=x, shape=shape: jnp.zeros(shape, x.dtype))
            new = x[:, before : before + texts, None]
            past.value = jax.lax.dynamic_update_slice_in_dim(past.value, new, place.value, axis=2)
            keys.append(jnp.concatenate([past.value.reshape(len(x), -1, *x.shape[2:]), context], axis=1))
        place.value += 1
        own = (jnp.eye(texts, dtype=bool)[:, :, None] & seen).reshape(texts, -1)
        whole = jnp.concatenate([own, jnp.ones((texts, told[2].shape[1]), bool)], axis=1)
        there = jnp.concatenate([jnp.ones((len(query), own.shape[1]), bool), told[2]], axis=1)
        return attention(query, *keys, there, whole, self.cap)


class RecallingBlock(Block):
    """A Block whose attention is Recalling. length: as there."""

    length: int = 0

    def attend(self, name: str) -> Recalling:
        """The block's attention."""
        return Recalling(self.heads, self.cap, self.prefix, self.length, name=name)


class Writer(nn.Module):
    """Token ids [B L] and streams to tell of → logits float32 [B L V]; those at i know only the ids before i.

    The tokens are the queries of every block; its keys are those before them, and the streams. FLOPs forward a
    sample, C tokens in the streams: Σ_m 2 C_m D_m D + depth · [ 24 L D² + 4 C D² + 4 L (L + C) D ] + 2 L D V.

    recall: L, 0: whole texts are read. Else the newest tokens [B K] of K texts, which stand at the call's `place` − 1 (at
    place 0 there are none, whatever the ids), give the logits [B K V] of the next; streams are given at place 0 alone,
    see Recalling. FLOPs then, a token of K texts: depth · [ 24 K D² + 4 K (K L + C) D ] + 2 K D V. dtype: of the streams.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)
    recall: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "B L"],
        valid: Bool[Array, "B L"],
        context: Streams,
        place: Int[Array, ""] | int = 0,
    ) -> Float[Array, "B L V"]:
        keys, there = self._enter(context)
        begin = vector(self, "begin", (self.width,))
        embed = Embed(self.vocabulary, self.width, name="embed")
        if self.recall:
            x = jnp.where(place == 0, begin, embed(ids)).astype(self.dtype)
            at, length, mask = jnp.full(ids.shape, place, jnp.int32), self.recall, None
        else:
            # Shifted by one: a place is given what stands before it, and a learned vector stands before the first.
            length = ids.shape[1]
            x = jnp.concatenate([jnp.broadcast_to(begin, (len(ids), 1, self.width)), embed(ids[:, :-1])], axis=1)
            x = x.astype(keys.dtype)
            valid = jnp.concatenate([jnp.ones_like(valid[:, :1]), valid[:, :-1]], axis=1)
            at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
            past = jnp.arange(length)[:, None] >= jnp.arange(length)
            mask = jnp.concatenate([past, jnp.ones((length, keys.shape[1]), bool)], axis=1)
        x = Positions(self.positions, name="positions")(x, at, (length,))
        for i in range(self.depth):
            with regularise.layer(i, self.depth):
                x = self._layer(f"layer_{i}")(x, valid, keys, there, mask)
        x = LayerNorm(self.block.get("epsilon", 1e-6), name="norm")(x).astype(jnp.float32)
        return Dense((self.vocabulary,), ("embed", "vocab"), name="head")(x)

    def _enter(self, context: Streams) -> tuple:
        """Returns the streams as keys [B C D] and where they are valid; (None, None) without any."""
        if not context:
            return None, None
        keys, there = [], []
        for name, tokens in context.items():
            y = Dense((self.width,), ("embed", None), name=f"enter_{name}")(tokens.x)
            keys.append(y + vector(self, f"modality_{name}", (self.width,)).astype(y.dtype))
            there.append(tokens.valid)
        return jnp.concatenate(keys, axis=1), jnp.concatenate(there, axis=1)

    def _layer(self, name: str) -> Block:
        if not self.recall:
            return make_block(self.heads, self.ratio, self.block, name)
        fields = dict(heads=self.heads, ratio=self.ratio, length=self.recall, name=name)
        return make(RecallingBlock, self.block, "block", **fields)


def length_penalty(length: Array, power: float) -> Array:
    """Returns ((5 + n) / 6)^power, by which the log-probability of a text of n tokens is divided (Wu et al. 2016, eq. 14)."""
    return ((5.0 + length) / 6.0) ** power


def beam_search(
    step: Callable, memory, logits: Float[Array, "B K V"], length: int, end: int, padding: int = 0, penalty: float = 0.0
) -> tuple[Int[Array, "B L"], Float[Array, "B"]]:
    """Returns the best text found, ids [B L], and the sum of its tokens' log-probabilities [B], natural.

    Of all texts in work and all their next tokens, the K best by log p / length_penalty go on; a text that has its end stays as it
    is, and keeps its rank. The best of the last K is returned, ended or cut at L tokens. n counts the end. K = 1 is greedy;
    with K of at least the number of texts there are, it is the best of all.

    step: (memory, tokens int32 [B K], place) → (logits of the next tokens float32 [B K V], memory). memory: arrays [B K …]
    that go with the texts, and scalars. logits: of the first token. end: id that ends a text. padding: id after it,
    which no text has before, unless it is the end itself.
    """
    rows, beams, vocabulary = logits.shape
    minus = -jnp.inf

    def choose(place, ids, score, done, count, memory, logits):
        chance = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        if padding != end:
            chance = jnp.where(jnp.arange(vocabulary) == padding, minus, chance)
        # What has ended goes on in one way only.
        stay = jnp.where(jnp.arange(vocabulary) == 0, 0.0, minus)
        total = score[..., None] + jnp.where(done[..., None], stay, chance)
        rank = total / length_penalty(count + ~done, penalty)[..., None]
        picked = jax.lax.top_k(rank.reshape(rows, -1), beams)[1]
        parent, token = picked // vocabulary, (picked % vocabulary).astype(jnp.int32)

        def of_parent(x):
            return x if x.ndim < 2 else jax.vmap(lambda mine, which: mine[which])(x, parent)

        ids, done, count, memory = jax.tree.map(of_parent, (ids, done, count, memory))
        token = jnp.where(done, padding, token)
        score = jnp.take_along_axis(total.reshape(rows, -1), picked, axis=1)
        ids = jax.lax.dynamic_update_slice_in_dim(ids, token[..., None], place, axis=2)
        return ids, score, done | (token == end), count + ~done, memory, token

    def body(carry):
        place, *state = carry
        *state, memory, token = choose(place, *state)
        logits, memory = step(memory, token, jnp.minimum(place + 1, length - 1))
        return place + 1, *state, memory, logits

    def more(carry):
        return (carry[0] < length) & ~carry[3].all()

    # All texts begin as one: the others would be its copies.
    score = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, minus), (rows, beams))
    ids, blank = jnp.full((rows, beams, length), padding, jnp.int32), jnp.zeros((rows, beams), jnp.int32)
    start = (jnp.int32(0), ids, score, blank.astype(bool), blank, memory, logits)
    _, ids, score, _, count, *_ = jax.lax.while_loop(more, body, start)
    best = jnp.argmax(score / length_penalty(count, penalty), axis=1)[:, None]
    return jnp.take_along_axis(ids, best[..., None], axis=1)[:, 0], jnp.take_along_axis(score, best, axis=1)[:, 0]
