"""Classification of labels and tags from the fused streams; each stream votes, the votes are averaged."""

from collections.abc import Collection, Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from vmm import losses
from vmm.data.spec import DataSpec
from vmm.errors import UserError, one_of
from vmm.layers import Dense, Pool
from vmm.objectives.base import Objective, Prediction
from vmm.types import Batch, Outputs


class Classify(Objective):
    """A linear head per stream and label; logits are the mean over the streams a sample has.

    The same head serves every fusion (as MBT averages its streams' logits): after `late` the
    streams know only themselves, and the mean of their logits is the classical late fusion.

    view, weight: see Recipe. labels: label → number of classes; samples without it do not count. Tags (data.tags, of which
    a clip has any number) are told each by itself: a sigmoid and a binary cross-entropy a class, their mean over classes.
    pooling, heads: see layers.Pool. smoothing: of the labels, see losses.cross_entropy; of a tag, ε / 2 of either answer.
    """

    labels: Mapping[str, int]
    view: str = "clean"
    weight: float = 1.0
    pooling: str = "mean"
    heads: int = 4
    smoothing: float = 0.0

    accepts_mixed_labels = True

    def check(self, where: str, data: DataSpec) -> None:
        """Raises UserError where the head is for other classes than the data's."""
        for label, classes in self.labels.items():
            if label not in data.labels:
                raise UserError(f"{where}.labels: no label {label!r} in data.labels; {one_of(label, data.labels)}")
            if classes != data.labels[label]:
                raise UserError(
                    f"{where}.labels.{label}: a head of {classes} classes, but data.labels.{label} has "
                    f"{data.labels[label]}; give both the same"
                )

    def prediction(self, key: str, tags: Collection[str]) -> Prediction:
        """Logits of one class, or of each tag."""
        return Prediction("sigmoid" if key in tags else "softmax")

    @nn.compact
    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns label → logits float32 [B Y]."""
        sums = dict.fromkeys(self.labels, 0.0)
        count = 0.0
        for stream, tokens in outputs.fused.items():
            there = tokens.valid.any(1).astype(jnp.float32)[:, None]
            features = Pool(self.pooling, self.heads, name=f"{stream}_pool")(tokens)
            count += there
            for label, classes in self.labels.items():
                vote = Dense((classes,), ("embed", None), name=f"{stream}_{label}")(features)
                sums[label] += vote * there
        return {label: value / jnp.maximum(count, 1.0) for label, value in sums.items()}

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample and label the cross-entropy, whether it is right, and whether it counts."""
        result = {}
        for label, logits in self.predict(outputs, batch).items():
            truth = batch.labels[label]
            if truth.ndim == 2:
                result[label] = self._tags(logits, truth, batch, label)
                continue
            error, known = losses.cross_entropy(logits, truth, self.smoothing), truth >= 0
            if batch.mixed is not None:  # MixUp: each source's error by its share
                share, others = batch.mixed.share, batch.mixed.labels[label]
                theirs = [losses.cross_entropy(logits, others[:, k], self.smoothing) for k in range(others.shape[1])]
                error = (1 - share.sum(1)) * error + (share * jnp.stack(theirs, 1)).sum(1)
                known &= ((others >= 0) | (share == 0)).all(1)
            result[label] = {
                "error": error,
                "right": (logits.argmax(-1) == truth).astype(jnp.float32),
                "weight": (known & batch.valid).astype(jnp.float32),
            }
        return result

    def _tags(self, logits: Array, truth: Array, batch: Batch, label: str) -> dict:
        def errors(truth):
            soft = (1 - self.smoothing) * truth + self.smoothing / 2
            return losses.binary_cross_entropy(logits, soft).mean(-1)

        error, known = errors(truth), (truth >= 0).all(-1)
        if batch.mixed is not None:
            share, others = batch.mixed.share, batch.mixed.labels[label]
            theirs = [errors(others[:, k]) for k in range(others.shape[1])]
            error = (1 - share.sum(1)) * error + (share * jnp.stack(theirs, 1)).sum(1)
            known &= ((others >= 0).all(-1) | (share == 0)).all(1)
        return {
            "error": error,
            "right": ((logits > 0) == (truth > 0)).mean(-1).astype(jnp.float32),
            "weight": (known & batch.valid).astype(jnp.float32),
        }

    def loss(self, features: dict) -> tuple:
        """Returns the mean over labels of the mean cross-entropy of labelled samples. Metrics: accuracy, of tags over all classes."""
        errors = [losses.mean(value["error"], value["weight"]) for value in features.values()]
        metrics = {
            f"{label}/accuracy": losses.mean(value["right"], value["weight"]) for label, value in features.items()
        }
        return sum(errors) / len(errors), metrics
