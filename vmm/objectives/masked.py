"""Masked modelling: predict the hidden tokens of each stream from the shown tokens of all.

Pixels and spectrogram patches are regressed (MAE, He et al. 2022; VideoMAE, Tong et al. 2022;
Audio-MAE, Huang et al. 2022); text tokens are classified. Hidden tokens are never encoded: they
enter only here, as a learned vector and a position, in a small decoder.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from vmm import losses
from vmm.errors import UserError
from vmm.layers import Dense, Positions, Stack, as_float, gather, vector
from vmm.types import Batch, Outputs, Tokens


class Decoder(nn.Module):
    """Shown tokens of one stream + places of its hidden ones → predictions [B H P] for the hidden."""

    outputs: int
    width: int
    depth: int
    heads: int
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, shown: Tokens, hidden, hidden_valid, grid: tuple):
        x = Dense((self.width,), ("embed", None), name="enter")(shown.x)
        blank = vector(self, "mask", (self.width,)).astype(x.dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(blank, (*hidden.shape, self.width))], axis=1)
        at = jnp.concatenate([shown.at, hidden], axis=1)
        valid = jnp.concatenate([shown.valid, hidden_valid], axis=1)
        x = Positions(self.positions, name="positions")(x, at, grid)
        x = Stack(self.depth, self.heads, block=self.block, name="stack")(x, valid)[:, shown.x.shape[1] :]
        return Dense((self.outputs,), ("embed", None), name="head")(x.astype(jnp.float32))


class Masked(nn.Module):
    """Reconstruction of what the view hides.

    view, weight: see Recipe; the view must hide tokens of every modality named here.
    modalities: streams to predict. width, depth, heads: of each stream's decoder. standardise: targets
    are each patch with mean 0 and variance 1 (better features on natural images; on flat ones it is noise).
    positions: of the decoder, see layers.Positions. block: further fields of layers.Block.
    """

    view: str = "masked"
    weight: float = 1.0
    modalities: tuple[str, ...] = ("video", "audio", "text")
    width: int = 128
    depth: int = 2
    heads: int = 4
    standardise: bool = True
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)

    needs_hidden = True  # whether predict speaks of hidden tokens, and so needs a view that hides some

    @nn.compact
    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns modality → predictions [B H P] of its hidden tokens (normalised patches, or logits)."""
        predictions = {}
        for name in self.modalities:
            if name not in outputs.masks:
                raise UserError(
                    f"masked: the view {self.view!r} hides nothing of {name!r} (it hides {sorted(outputs.masks)}); "
                    f"give views.{self.view}.{name} a mask or take {name!r} out of `modalities`"
                )
            patches, hidden = outputs.patches[name], outputs.masks[name].hidden
            size = patches.classes or patches.values.shape[-1]
            decoder = Decoder(size, self.width, self.depth, self.heads, self.positions, self.block, name=name)
            predictions[name] = decoder(outputs.fused[name], hidden, gather(patches.valid, hidden), patches.grid)
        return predictions

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample and modality the sum of errors over hidden tokens, and their number."""
        result = {}
        for name, prediction in self.predict(outputs, batch).items():
            patches, hidden = outputs.patches[name], outputs.masks[name].hidden
            target = gather(patches.values, hidden)
            weight = (gather(patches.valid, hidden) & batch.valid[:, None]).astype(jnp.float32)
            if patches.classes:
                error = losses.cross_entropy(prediction, target)
            else:
                target = as_float(target)
                error = losses.squared_error(prediction, losses.standardise(target) if self.standardise else target)
            result[name] = {"error": (error * weight).sum(1), "count": weight.sum(1)}
        return result

    def loss(self, features: dict) -> tuple:
        """Returns the mean over modalities of the mean error per hidden token of the global batch."""
        metrics = {
            name: value["error"].sum() / jnp.maximum(value["count"].sum(), 1.0) for name, value in features.items()
        }
        return sum(metrics.values()) / len(metrics), metrics

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple:
        return self.loss(self.features(outputs, batch))
