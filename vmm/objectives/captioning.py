"""Captioning: the text of a clip, token by token, from its other streams (CoCa, Yu et al. 2022; BLIP, Li et al. 2022)."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmm import losses
from vmm.errors import UserError
from vmm.layers import Dense, Embed, LayerNorm, Positions, make_block, vector
from vmm.types import Batch, Outputs, Streams


class Writer(nn.Module):
    """Token ids [B L] and streams to tell of → logits float32 [B L V]; those at i know only the ids before i.

    The tokens are the queries of every block; its keys are those before them, and the streams. FLOPs forward a
    sample, K tokens in the streams: Σ_m 2 K_m D_m D + depth · [ 24 L D² + 4 K D² + 4 L (L + K) D ] + 2 L D V.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"], valid: Bool[Array, "B L"], context: Streams) -> Float[Array, "B L V"]:
        keys, there = [], []
        for name, tokens in context.items():
            y = Dense((self.width,), ("embed", None), name=f"enter_{name}")(tokens.x)
            keys.append(y + vector(self, f"modality_{name}", (self.width,)).astype(y.dtype))
            there.append(tokens.valid)
        keys, there = jnp.concatenate(keys, axis=1), jnp.concatenate(there, axis=1)
        # Shifted by one: a place is given what stands before it, and a learned vector stands before the first.
        length = ids.shape[1]
        begin = jnp.broadcast_to(vector(self, "begin", (self.width,)), (len(ids), 1, self.width))
        x = Embed(self.vocabulary, self.width, name="embed")(ids[:, :-1])
        x = jnp.concatenate([begin, x], axis=1).astype(keys.dtype)
        valid = jnp.concatenate([jnp.ones_like(valid[:, :1]), valid[:, :-1]], axis=1)
        at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
        x = Positions(self.positions, name="positions")(x, at, (length,))
        past = jnp.arange(length)[:, None] >= jnp.arange(length)
        mask = jnp.concatenate([past, jnp.ones((length, keys.shape[1]), bool)], axis=1)
        for i in range(self.depth):
            x = make_block(self.heads, self.ratio, self.block, f"layer_{i}")(x, valid, keys, there, mask)
        x = LayerNorm(self.block.get("epsilon", 1e-6), name="norm")(x).astype(jnp.float32)
        return Dense((self.vocabulary,), ("embed", "vocab"), name="head")(x)


class Captioning(nn.Module):
    """Prediction of each token of the text from the tokens before it and the other streams.

        −(1/n) Σ_i log p(y_i | y_1 … y_{i−1}, context),  over the n tokens of the batch that are no padding

    The text is taken from the batch, not from the trunk, and must not come in with the streams: they are read as
    encoded, before any fusion. stage "fused" asks for a view that hides all of the text (a mask of ratio 1): then
    no other stream can have seen it.

    view, weight: see Recipe. text: the modality that is written. context: streams it is written from; a sample with
    none of them does not count. stage: "encoded" or "fused". width, depth, heads, ratio, positions: of the decoder.
    block: further fields of layers.Block.
    """

    view: str = "clean"
    weight: float = 1.0
    text: str = "text"
    context: tuple[str, ...] = ("video", "audio")
    stage: str = "encoded"
    width: int = 256
    depth: int = 2
    heads: int = 4
    ratio: float = 4.0
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)

    @property
    def needs_hidden(self) -> bool:
        """Whether predict needs a view that hides something."""
        return self.stage == "fused"

    def _context(self, outputs: Outputs) -> Streams:
        if self.stage not in ("encoded", "fused"):
            raise UserError(f"captioning.stage: unknown {self.stage!r}; known: encoded, fused")
        missing = [name for name in (*self.context, self.text) if name not in outputs.patches]
        if missing or self.text in self.context or not self.context:
            raise UserError(
                f"captioning: {self.text!r} is written from one stream or more of the trunk, itself not among them; "
                f"the trunk has {sorted(outputs.patches)}, context is {self.context}"
            )
        if not outputs.patches[self.text].classes:
            raise UserError(f"captioning.text: {self.text!r} is no stream of token ids")
        mask = outputs.masks.get(self.text)
        if self.stage == "fused" and (mask is None or mask.keep.shape[1]):
            raise UserError(
                f"captioning.stage: fused streams have seen the text that the view {self.view!r} shows; give "
                f"views.{self.view}.{self.text} a mask of ratio 1, or read the encoded streams"
            )
        return {name: getattr(outputs, self.stage)[name] for name in self.context}

    @nn.compact
    def _write(self, ids: Int[Array, "B L"], valid: Bool[Array, "B L"], vocabulary: int, context: Streams):
        fields = (vocabulary, self.width, self.depth, self.heads, self.ratio, self.positions, self.block)
        return Writer(*fields, name="decoder")(ids, valid, context)

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns text → logits float32 [B L V] of each token, given those before it."""
        patches = outputs.patches[self.text]
        return {self.text: self._write(patches.values, patches.valid, patches.classes, self._context(outputs))}

    def generate(self, outputs: Outputs, end: int, length: int) -> Int[Array, "B L"]:
        """Returns the likeliest next id, one after the other, until `end`; 0 after it. int32 [B length].

        The whole text is read again for every token: for short captions.
        """
        context, vocabulary = self._context(outputs), outputs.patches[self.text].classes
        rows = len(outputs.patches[self.text].valid)

        def step(i, ids):
            # Places from i on are not seen by place i, whatever stands there.
            logits = self._write(ids, jnp.ones(ids.shape, bool), vocabulary, context)[:, i]
            done = ((ids == end) & (jnp.arange(length) < i)).any(1)
            return ids.at[:, i].set(jnp.where(done, 0, logits.argmax(-1).astype(jnp.int32)))

        return jax.lax.fori_loop(0, length, step, jnp.zeros((rows, length), jnp.int32))

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample the sum of errors over its tokens, how many it gets right, and their number."""
        patches = outputs.patches[self.text]
        context = self._context(outputs)
        logits = self._write(patches.values, patches.valid, patches.classes, context)
        told = jnp.stack([tokens.valid.any(1) for tokens in context.values()]).any(0) & batch.valid
        weight = (patches.valid & told[:, None]).astype(jnp.float32)
        right = logits.argmax(-1) == patches.values
        return {
            "error": (losses.cross_entropy(logits, patches.values) * weight).sum(1),
            "right": (right * weight).sum(1),
            "count": weight.sum(1),
        }

    def loss(self, features: dict) -> tuple:
        """Returns the mean cross-entropy per token of the global batch; metrics: accuracy, of next tokens."""
        count = jnp.maximum(features["count"].sum(), 1.0)
        return features["error"].sum() / count, {"accuracy": features["right"].sum() / count}

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple:
        return self.loss(self.features(outputs, batch))
