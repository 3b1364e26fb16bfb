"""Contrastive alignment of modalities: softmax (CLIP) or sigmoid (SigLIP), over any set of pairs."""

import dataclasses
import math
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmm import losses
from vmm.errors import UserError
from vmm.layers import Dense, Pool, scalar
from vmm.objectives.base import Embeds, Objective, Prediction
from vmm.types import Batch, Outputs, Streams, Tokens


class Contrastive(Objective, Embeds):
    """Pulls the streams of one clip together in a space of `width` E; the others of the batch are negatives.

    view, weight: see Recipe. pairs: modality pairs, each its own loss, averaged. variant: "softmax"
    or "sigmoid". scale: initial logit scale (1 / temperature), learned, at most `max_scale`.
    bias: initial logit bias of the sigmoid loss, learned. pooling, heads, block: see layers.Pool. project:
    what is done to the pooled vector, "linear", "affine" (with a bias) or "none". pooling and project: one for all
    modalities, or modality → one.
    separate: each pair has its own share of E, with its own heads (as the spaces of VATT, Akbari et
    al. 2021), so that a caption need not tell of sight and of sound in the same directions. A
    modality's embedding is zero in the shares of pairs without it; a dot product over all of E
    then counts just the shares that two modalities have in common.
    chunk: rows of the other side that a device compares its own with at a time, see losses.contrastive_softmax; 0:
    all, so that each of P devices holds B² / P similarities. A few thousand serve for large batches.

    queue: how many embeddings of the last steps are negatives too (XBM, Wang et al. 2020; MoCo's queue, He et al. 2020,
    whose keys are a momentum encoder's), carried in the train state; 0: none. Not together with chunk: a batch that
    needs chunks needs no queue.

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
    pooling: str | Mapping[str, str] = "mean"
    project: str | Mapping[str, str] = "linear"
    heads: int = 4
    block: Mapping = dataclasses.field(default_factory=dict)
    separate: bool = False
    chunk: int = 0
    queue: int = 0

    def setup(self):
        if self.variant not in ("softmax", "sigmoid"):
            raise UserError(f"contrastive: unknown variant {self.variant!r}; known: sigmoid, softmax")
        if self.chunk < 0:
            raise UserError(f"contrastive: chunk must be at least 0 (0: all at once), got {self.chunk}")
        if self.queue < 0 or (self.queue and self.chunk):
            raise UserError("contrastive: queue must be at least 0, and chunk 0 with it")
        if self.width % len(self.shares):
            raise UserError(f"contrastive: width {self.width} does not divide over {len(self.shares)} separate pairs")
        part = (self.width // len(self.shares),)
        names = {f"{name}_{share}": name for share, members in self.shares.items() for name in members}
        how = {key: self._of("project", name) for key, name in names.items()}
        unknown = set(how.values()) - {"affine", "linear", "none"}
        if unknown:
            raise UserError(f"contrastive.project: unknown kind {unknown.pop()!r}; known: affine, linear, none")
        self.pool = {key: Pool(self._of("pooling", name), self.heads, self.block) for key, name in names.items()}
        # Of these names since checkpoints have them.
        self.projection = {
            key: Dense(part, ("embed", None), bias=kind == "affine", name=f"project_{key}")
            for key, kind in how.items()
            if kind != "none"
        }
        self.log_scale = scalar(self, "log_scale", math.log(self.scale))
        if self.variant == "sigmoid":
            self.logit_bias = scalar(self, "logit_bias", self.bias)

    def _of(self, field: str, name: str) -> str:
        value = getattr(self, field)
        if isinstance(value, Mapping) and name not in value:
            raise UserError(f"contrastive.{field}: has {sorted(value)}, lacks {name!r}, which a pair names")
        return value[name] if isinstance(value, Mapping) else value

    across_batch = True

    def prediction(self, key: str, tags: Collection[str]) -> Prediction:
        """Embeddings lie side by side."""
        return Prediction("embedding")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that have an embedding."""
        return tuple(sorted({name for pair in self.pairs for name in pair}))

    @property
    def shares(self) -> dict[str, tuple[str, ...]]:
        """A share of the space → the modalities in it; a head is named by both."""
        if self.separate:
            return {f"{one}-{two}": (one, two) for one, two in self.pairs}
        return {"all": self.modalities}

    def init_queue(self) -> dict | None:
        """Returns an empty queue, of the form of `features`; None without one."""
        if not self.queue:
            return None
        part = self.width // len(self.shares)
        return {
            "embeddings": {
                name: {
                    share: jnp.zeros((self.queue, part)) for share, members in self.shares.items() if name in members
                }
                for name in self.modalities
            },
            "there": {name: jnp.zeros(self.queue, bool) for name in self.modalities},
        }

    def enqueue(self, queue: dict, features: dict) -> dict:
        """Returns the queue with a step's embeddings before the older ones, the oldest dropped; no gradient."""
        joined = jax.tree.map(lambda old, new: jnp.concatenate([new, old])[: self.queue], queue, features)
        return jax.lax.stop_gradient(joined)

    def compared(self, features: dict) -> dict:
        """As Objective.compared."""
        result, there = {}, features["there"]
        for one, two in self.pairs:
            share = f"{one}-{two}" if self.separate else "all"
            first, second = features["embeddings"][one][share], features["embeddings"][two][share]
            result[f"{one}-{two}"] = (first, second, there[one] & there[two])
        return result

    def _parts(self, name: str, tokens: Tokens) -> dict[str, Float[Array, "B E"]]:
        """Returns share → unit vectors, for the shares that the modality is in."""
        there = tokens.valid.any(1, keepdims=True)
        return {
            share: losses.normalise(self._project(f"{name}_{share}", self.pool[f"{name}_{share}"](tokens))) * there
            for share, members in self.shares.items()
            if name in members
        }

    def _project(self, key: str, vector: Float[Array, "B D"]) -> Float[Array, "B E"]:
        if key in self.projection:
            return self.projection[key](vector)
        part = self.width // len(self.shares)
        if vector.shape[-1] != part:
            raise UserError(
                f"contrastive.project: 'none' keeps a stream's width {vector.shape[-1]}, but embeddings have {part}; "
                "let them be the same, or choose linear"
            )
        return vector

    def embed(self, name: str, tokens: Tokens) -> Float[Array, "B E"]:
        """Returns the unit embedding of one stream's encoded tokens; zero where it has none."""
        parts = self._parts(name, tokens)
        blank = jnp.zeros_like(next(iter(parts.values())))
        return jnp.concatenate([parts.get(share, blank) for share in self.shares], axis=1) / math.sqrt(len(parts))

    def similarity(self, name: str, encoded: Streams) -> tuple[Float[Array, "B E"], Float[Array, "B E"]]:
        """Returns (a, b) with a_i · b_j ∝ the mean logit of sample i's other streams with sample j's stream `name`.

        The other streams are those that stand in a pair with it; no gradient.
        """
        others = sorted({other for pair in self.pairs if name in pair for other in pair if other != name})
        anchor = sum(self.embed(other, encoded[other]) for other in others) / max(1, len(others))
        scale = jnp.minimum(jnp.exp(self.log_scale), self.max_scale)
        return jax.lax.stop_gradient((scale * anchor, self.embed(name, encoded[name])))

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

    def loss(self, features: dict, memory: dict | None = None) -> tuple:
        """Returns the mean loss over pairs. Global: every other clip of the batch is a negative, and of the queue."""
        # At most max_scale, with the gradient of the unclamped: else it could never come back.
        log_scale = self.log_scale - jax.lax.stop_gradient(jnp.maximum(self.log_scale - math.log(self.max_scale), 0.0))
        scale = jnp.exp(log_scale)
        total, metrics = 0.0, {"scale": scale}
        for one, two in self.pairs:
            share = f"{one}-{two}" if self.separate else "all"
            first, second = features["embeddings"][one][share], features["embeddings"][two][share]
            valid = features["there"][one] & features["there"][two]
            past = None
            if memory is not None:
                kept, there = memory["embeddings"], memory["there"]
                past = (kept[one][share], kept[two][share], there[one] & there[two])
            if self.variant == "softmax":
                value = losses.contrastive_softmax(first, second, valid, scale, self.chunk, past)
            else:
                value = losses.contrastive_sigmoid(first, second, valid, scale, self.logit_bias, self.chunk, past)
            metrics[f"{one}-{two}"] = value
            total += value / len(self.pairs)
        return total, metrics
