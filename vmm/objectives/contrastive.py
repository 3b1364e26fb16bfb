"""Contrastive alignment of modalities: softmax (CLIP) or sigmoid (SigLIP), over any set of pairs."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmm import losses
from vmm.errors import UserError
from vmm.layers import Dense, Pool, scalar
from vmm.types import Batch, Outputs, Tokens


class Contrastive(nn.Module):
    """Pulls the streams of one clip together in a shared space of `width` E; the others are negatives.

    view, weight: see Recipe. pairs: modality pairs, each its own loss, averaged. variant: "softmax"
    or "sigmoid". scale: initial logit scale (1 / temperature), learned, at most `max_scale`.
    bias: initial logit bias of the sigmoid loss, learned. pooling, heads: see layers.Pool.

    Embeddings are of the encoded streams: after fusion each stream has seen the other, and
    matching them would be trivial.
    """

    view: str = "clean"
    weight: float = 1.0
    width: int = 256
    pairs: tuple[tuple[str, str], ...] = (("video", "text"), ("audio", "text"), ("video", "audio"))
    variant: str = "softmax"
    scale: float = 1 / 0.07
    max_scale: float = 100.0
    bias: float = -10.0
    pooling: str = "mean"
    heads: int = 4

    needs_hidden = False  # whether predict speaks of hidden tokens, and so needs a view that hides some

    def setup(self):
        if self.variant not in ("softmax", "sigmoid"):
            raise UserError(f"contrastive: unknown variant {self.variant!r}; known: sigmoid, softmax")
        names = sorted({name for pair in self.pairs for name in pair})
        self.pool = {name: Pool(self.pooling, self.heads) for name in names}
        self.project = {name: Dense((self.width,), ("embed", None), bias=False) for name in names}
        self.log_scale = scalar(self, "log_scale", math.log(self.scale))
        if self.variant == "sigmoid":
            self.logit_bias = scalar(self, "logit_bias", self.bias)

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns modality → unit embeddings float32 [B E]; a lacking stream's is zero."""
        missing = [name for name in self.project if name not in outputs.encoded]
        if missing:
            raise UserError(
                f"contrastive: pairs name {missing}, but the view {self.view!r} shows {sorted(outputs.encoded)}"
            )
        return {name: self.embed(name, outputs.encoded[name]) for name in self.project}

    def embed(self, name: str, tokens: Tokens) -> Float[Array, "B E"]:
        """Returns the unit embedding of one stream's encoded tokens."""
        return losses.normalise(self.project[name](self.pool[name](tokens)))

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns embeddings, and which samples have each."""
        embeddings = self.predict(outputs, batch)
        there = {name: outputs.encoded[name].valid.any(1) & batch.valid for name in embeddings}
        return {"embeddings": embeddings, "there": there}

    def loss(self, features: dict) -> tuple:
        """Returns the mean loss over pairs. Global: every other clip of the batch is a negative."""
        scale = jnp.exp(jnp.minimum(self.log_scale, math.log(self.max_scale)))
        total, metrics = 0.0, {"scale": scale}
        for one, two in self.pairs:
            first, second = features["embeddings"][one], features["embeddings"][two]
            valid = features["there"][one] & features["there"][two]
            if self.variant == "softmax":
                value = losses.contrastive_softmax(first, second, valid, scale)
            else:
                value = losses.contrastive_sigmoid(first, second, valid, scale, self.logit_bias)
            metrics[f"{one}-{two}"] = value
            total += value / len(self.pairs)
        return total, metrics

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple:
        return self.loss(self.features(outputs, batch))
