"""Contrastive alignment of modalities: softmax (CLIP) or sigmoid (SigLIP), over any set of pairs."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmm import losses
from vmm.errors import UserError
from vmm.layers import Dense, Pool, scalar
from vmm.types import Batch, Outputs, Tokens


class Contrastive(nn.Module):
    """Pulls the streams of one clip together in a space of `width` E; the others of the batch are negatives.

    view, weight: see Recipe. pairs: modality pairs, each its own loss, averaged. variant: "softmax"
    or "sigmoid". scale: initial logit scale (1 / temperature), learned, at most `max_scale`.
    bias: initial logit bias of the sigmoid loss, learned. pooling, heads: see layers.Pool.
    separate: each pair has its own share of E, with its own heads (as the spaces of VATT, Akbari et
    al. 2021), so that a caption need not tell of sight and of sound in the same directions. A
    modality's embedding is zero in the shares of pairs without it; a dot product over all of E
    then counts just the shares that two modalities have in common.

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
    separate: bool = False

    needs_hidden = False  # whether predict speaks of hidden tokens, and so needs a view that hides some

    def setup(self):
        if self.variant not in ("softmax", "sigmoid"):
            raise UserError(f"contrastive: unknown variant {self.variant!r}; known: sigmoid, softmax")
        # A share of the space and the modalities in it; a head is named by both.
        self.shares = {f"{one}-{two}": (one, two) for one, two in self.pairs}
        if not self.separate:
            self.shares = {"all": self.modalities}
        if self.width % len(self.shares):
            raise UserError(f"contrastive: width {self.width} does not divide over {len(self.shares)} separate pairs")
        part = (self.width // len(self.shares),)
        names = [f"{name}_{share}" for share, members in self.shares.items() for name in members]
        self.pool = {name: Pool(self.pooling, self.heads) for name in names}
        self.project = {name: Dense(part, ("embed", None), bias=False) for name in names}
        self.log_scale = scalar(self, "log_scale", math.log(self.scale))
        if self.variant == "sigmoid":
            self.logit_bias = scalar(self, "logit_bias", self.bias)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that have an embedding."""
        return tuple(sorted({name for pair in self.pairs for name in pair}))

    def _parts(self, name: str, tokens: Tokens) -> dict[str, Float[Array, "B E"]]:
        """Returns share → unit vectors, for the shares that the modality is in."""
        return {
            share: losses.normalise(self.project[f"{name}_{share}"](self.pool[f"{name}_{share}"](tokens)))
            for share, members in self.shares.items()
            if name in members
        }

    def embed(self, name: str, tokens: Tokens) -> Float[Array, "B E"]:
        """Returns the unit embedding of one stream's encoded tokens; zero where it has none."""
        parts = self._parts(name, tokens)
        blank = jnp.zeros_like(next(iter(parts.values())))
        return jnp.concatenate([parts.get(share, blank) for share in self.shares], axis=1) / math.sqrt(len(parts))

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns modality → unit embeddings float32 [B E]; a lacking stream's is zero."""
        self._check(outputs)
        return {name: self.embed(name, outputs.encoded[name]) for name in self.modalities}

    def _check(self, outputs: Outputs) -> None:
        missing = [name for name in self.modalities if name not in outputs.encoded]
        if missing:
            raise UserError(
                f"contrastive: pairs name {missing}, but the view {self.view!r} shows {sorted(outputs.encoded)}"
            )

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns each modality's unit vectors by share, and which samples have it."""
        self._check(outputs)
        return {
            "embeddings": {name: self._parts(name, outputs.encoded[name]) for name in self.modalities},
            "there": {name: outputs.encoded[name].valid.any(1) & batch.valid for name in self.modalities},
        }

    def loss(self, features: dict) -> tuple:
        """Returns the mean loss over pairs. Global: every other clip of the batch is a negative."""
        # At most max_scale, with the gradient of the unclamped: else it could never come back.
        log_scale = self.log_scale - jax.lax.stop_gradient(jnp.maximum(self.log_scale - math.log(self.max_scale), 0.0))
        scale = jnp.exp(log_scale)
        total, metrics = 0.0, {"scale": scale}
        for one, two in self.pairs:
            share = f"{one}-{two}" if self.separate else "all"
            first, second = features["embeddings"][one][share], features["embeddings"][two][share]
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
