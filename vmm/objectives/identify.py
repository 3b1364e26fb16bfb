"""Who or what is it: unit embeddings that margins hold apart, compared by cosine with those never seen in training."""

import math
from collections.abc import Collection, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vmm import losses
from vmm.data.manifest import Row
from vmm.errors import UserError, one_of
from vmm.layers import Dense, Pool, vector
from vmm.objectives.base import Objective, Prediction
from vmm.types import Batch, Outputs

MARGINS = ("angle", "cosine")


def margin_logits(
    cosine: Float[Array, "B Y"], labels: Int[Array, " B"], kind: str, margin: float, scale: float
) -> Float[Array, "B Y"]:
    """Returns scale · cos θ, of the label's own class less its margin.

    kind "angle": cos(θ + m) (ArcFace, Deng et al. 2019, eq. 3), where θ + m passes π, cos θ − m sin m, so that it falls
    on; "cosine": cos θ − m (CosFace, Wang et al. 2018, eq. 4).
    """
    own = jax.nn.one_hot(labels, cosine.shape[1], dtype=bool)
    if kind == "cosine":
        less = cosine - margin
    else:
        inside = jnp.clip(cosine, -1 + 1e-6, 1 - 1e-6)
        turned = inside * math.cos(margin) - jnp.sqrt(1 - jnp.square(inside)) * math.sin(margin)
        less = jnp.where(inside > -math.cos(margin), turned, inside - margin * math.sin(margin))
    return scale * jnp.where(own, less, cosine)


class Identify(Objective):
    """Softmax with a margin over the identities of the training data; what stays is the embedding.

    label: of data.labels. classes: identities in training. width: E. kind, margin, scale: see margin_logits. view, weight: see
    Recipe. pooling, heads: see layers.Pool; the embedding is of the mean over the streams a sample has, each after a map of its
    own.
    """

    label: str
    classes: int
    view: str = "clean"
    weight: float = 1.0
    width: int = 128
    kind: str = "angle"
    margin: float = 0.3
    scale: float = 16.0
    pooling: str = "mean"
    heads: int = 4

    def prediction(self, key: str, tags: Collection[str]) -> Prediction:
        """Embeddings lie side by side."""
        return Prediction("embedding")

    def check_rows(self, where: str, rows: Sequence[Row]) -> None:
        """Raises UserError where training clips have more identities than the head knows."""
        largest = max((row.labels.get(self.label, -1) for row in rows), default=-1)
        if largest >= self.classes:
            raise UserError(
                f"{where}.classes: {self.classes}, but a training clip is of identity {largest} "
                f"(labels.{self.label}); raise it to {largest + 1}"
            )

    @nn.compact
    def _embed(self, outputs: Outputs) -> tuple[Float[Array, "B E"], Float[Array, "Y E"]]:
        """Returns unit embeddings of the samples and of the identities."""
        total = 0.0
        for stream, tokens in outputs.fused.items():
            there = tokens.valid.any(1, keepdims=True)
            features = Pool(self.pooling, self.heads, name=f"{stream}_pool")(tokens)
            total += Dense((self.width,), ("embed", None), name=f"{stream}_embed")(features) * there
        own = vector(self, "identities", (self.classes, self.width))
        return losses.normalise(total), losses.normalise(own)

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns embedding → unit vectors float32 [B E]; zero where a sample has no stream."""
        return {"embedding": self._embed(outputs)[0]}

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample the cross-entropy, whether the nearest identity is right, and whether it counts."""
        if self.kind not in MARGINS:
            raise UserError(f"identify.kind: unknown {self.kind!r}; {one_of(self.kind, MARGINS)}")
        if self.label not in batch.labels:
            raise UserError(
                f"identify.label: no label {self.label!r} in data.labels; {one_of(self.label, batch.labels)}"
            )
        labels = batch.labels[self.label]
        embedding, own = self._embed(outputs)
        cosine = embedding @ own.T
        logits = margin_logits(cosine, labels, self.kind, self.margin, self.scale)
        there = jnp.stack([tokens.valid.any(1) for tokens in outputs.fused.values()]).any(0)
        known = (labels >= 0) & (labels < self.classes) & there & batch.valid
        return {
            "error": losses.cross_entropy(logits, labels),
            "right": (cosine.argmax(-1) == labels).astype(jnp.float32),
            "weight": known.astype(jnp.float32),
        }

    def loss(self, features: dict) -> tuple:
        """Returns the mean cross-entropy of samples whose identity is known. Metrics: accuracy, without the margin."""
        value = losses.mean(features["error"], features["weight"])
        return value, {"accuracy": losses.mean(features["right"], features["weight"])}
