"""Words: which tokens does the caption hold? A caption as labels (Joulin et al. 2016; SuperClass, Huang et al. 2024)."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmm import losses
from vmm.errors import UserError
from vmm.layers import Dense, Pool
from vmm.objectives.base import Objective
from vmm.types import Batch, Outputs


class Words(Objective):
    """Each entry of the vocabulary is a question: is it in the clip's caption, in whatever place?

        mean_i Σ_v BCE(z_iv, [v ∈ caption_i]),  z the sum over a sample's streams of a linear head of each, less log V

    Without the log of the vocabulary's size V the first steps would only learn that most words are in no caption (the prior
    of RetinaNet, Lin et al. 2017, sec. 4.1).
    So the pooled streams must hold what the caption tells, and hold it where a linear map finds it: a word that only sight
    and sound together decide is learned by their fusion, or not at all. There is no decoder that could work it out.

    view, weight: see Recipe. text: the modality whose ids are the labels. streams: those that answer; a sample that has none
    of them, or no text, does not count. stage: "fused", of a trunk that keeps the text apart, or "encoded".
    pooling, heads: see layers.Pool. Padding is no word; ids that every caption holds are known by the bias.
    """

    view: str = "clean"
    weight: float = 1.0
    text: str = "text"
    streams: tuple[str, ...] = ("video", "audio")
    stage: str = "fused"
    pooling: str = "mean"
    heads: int = 4

    def _check(self, outputs: Outputs) -> None:
        if self.stage not in ("encoded", "fused"):
            raise UserError(f"words.stage: unknown {self.stage!r}; known: encoded, fused")
        if self.text not in outputs.patches or not outputs.patches[self.text].classes:
            raise UserError(f"words.text: {self.text!r} is no stream of token ids of the trunk")
        known = [name for name in getattr(outputs, self.stage) if name != self.text]
        if not self.streams or [name for name in self.streams if name not in known]:
            raise UserError(f"words.streams: some of {known}, got {list(self.streams)}")
        mask = outputs.masks.get(self.text)
        if self.stage == "fused" and self.text in outputs.fused and (mask is None or mask.keep.shape[1]):
            raise UserError(
                f"words.stage: fused streams have seen the text that they are asked about; set trunk.apart=({self.text!r},), "
                f"give views.{self.view}.{self.text} a mask of ratio 1, or read the encoded streams"
            )

    @nn.compact
    def _logits(self, outputs: Outputs) -> Float[Array, "B V"]:
        classes = outputs.patches[self.text].classes
        total = -math.log(classes)
        for name in self.streams:
            tokens = getattr(outputs, self.stage)[name]
            there = tokens.valid.any(1, keepdims=True)
            features = Pool(self.pooling, self.heads, name=f"{name}_pool")(tokens)
            total += Dense((classes,), ("embed", "vocab"), name=f"{name}_words")(features) * there
        return total

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns the logits float32 [B V] of each word."""
        self._check(outputs)
        return {"words": self._logits(outputs)}

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample the sum of errors over the vocabulary, the share of its words found, and whether it counts."""
        self._check(outputs)
        logits, patches = self._logits(outputs), outputs.patches[self.text]
        ids = jnp.where(patches.valid, patches.values, patches.classes)  # what is no token falls off the end
        rows = jnp.arange(len(ids))[:, None]
        truth = jnp.zeros(logits.shape, jnp.float32).at[rows, ids].set(1.0, mode="drop")
        there = jnp.stack([getattr(outputs, self.stage)[name].valid.any(1) for name in self.streams]).any(0)
        found = ((logits > 0) * truth).sum(1) / jnp.maximum(truth.sum(1), 1.0)
        return {
            "error": losses.binary_cross_entropy(logits, truth).sum(1),
            "found": found,
            "there": there & patches.valid.any(1) & batch.valid,
        }

    def loss(self, features: dict) -> tuple:
        """Returns the mean over samples of the error; metrics: found, the mean share of a caption's words with z > 0."""
        return losses.mean(features["error"], features["there"]), {
            "found": losses.mean(features["found"], features["there"])
        }
