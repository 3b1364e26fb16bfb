"""Masked modelling: predict the hidden tokens of each stream from the shown tokens of all.

Pixels and spectrogram patches are regressed (MAE, He et al. 2022; VideoMAE, Tong et al. 2022;
Audio-MAE, Huang et al. 2022); text tokens are classified. Hidden tokens are never encoded: they
enter only here, as a learned vector and a position, in a small decoder.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from vmm import losses
from vmm.errors import UserError
from vmm.layers import Dense, Positions, Stack, as_float, gather, vector
from vmm.objectives.base import Objective, Reconstructs
from vmm.types import Batch, Outputs, Tokens

STANDARDISE = (True, False, "patch", "unbiased", "colour")


class Decoder(nn.Module):
    """Shown tokens of one stream, places of its hidden ones, shown tokens of others → predictions [B H P] for the hidden.

    FLOPs forward a sample: 2 K D_in D + depth · block(K + H, D) + 2 H D P, K shown tokens of all its streams.
    """

    outputs: int
    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)
    enter_bias: bool = True
    scan: bool = False
    remat: bool | str = False

    @nn.compact
    def __call__(self, shown: Tokens, hidden, hidden_valid, grid: tuple, others: Mapping = {}):
        """others: name → (Tokens, grid) of streams that are looked at too."""
        x = Dense((self.width,), ("embed", None), bias=self.enter_bias, name="enter")(shown.x)
        blank = vector(self, "mask", (self.width,)).astype(x.dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(blank, (*hidden.shape, self.width))], axis=1)
        at = jnp.concatenate([shown.at, hidden], axis=1)
        x = [Positions(self.positions, name="positions")(x, at, grid)]
        valid = [shown.valid, hidden_valid]
        for name, (tokens, its_grid) in others.items():
            y = Dense((self.width,), ("embed", None), bias=self.enter_bias, name=f"enter_{name}")(tokens.x)
            y = y + vector(self, f"modality_{name}", (self.width,)).astype(y.dtype)
            x.append(Positions(self.positions, name=f"positions_{name}")(y, tokens.at, its_grid))
            valid.append(tokens.valid)
        x, valid, first = jnp.concatenate(x, axis=1), jnp.concatenate(valid, axis=1), shown.x.shape[1]
        x = Stack(self.depth, self.heads, self.ratio, self.scan, self.remat, self.block, name="stack")(x, valid)
        x = x[:, first : first + hidden.shape[1]]
        return Dense((self.outputs,), ("embed", None), name="head")(x.astype(jnp.float32))


def running_cells(
    keys: Array, hidden: Int[Array, "B H"], valid: Bool[Array, "B H"], grid: tuple, count: int
) -> Int[Array, "B K"]:
    """Returns `count` of the hidden places, as a cell of 2 × 2 places runs through them (VideoMAE V2, Wang et al. 2023).

    Of each cell (of 2 where the grid has two axes, of 1 where it has one: then at random) the place that is taken
    first moves on with every step of the grid's first axis, so that a tube is decoded at some times and not at
    others. Where the cell begins and what is taken among equals are random; padding is taken last.
    """
    cells = 2 ** (len(grid) - 1)
    step, rest = 0, hidden
    for axis, size in reversed(list(enumerate(grid))):
        place, rest = rest % size, rest // size
        step = step + (place % 2 * 2 ** (axis - 1) if axis else place)
    first, ties = jax.vmap(
        lambda key: (
            jax.random.randint(key, (), 0, cells),
            jax.random.uniform(jax.random.fold_in(key, 1), (hidden.shape[1],)),
        )
    )(keys)
    score = jnp.where(valid, (step + first[:, None]) % cells + ties, jnp.inf)
    return gather(hidden, jnp.sort(jnp.argsort(score, axis=1)[:, :count], axis=1))


class Masked(Objective, Reconstructs):
    """Reconstruction of what the view hides.

    view, weight: see Recipe; the view must hide tokens of every modality named here.
    modalities: streams to predict. width, depth, heads, ratio: of each stream's decoder; enter_bias: of its first
    map. positions: of the decoder, see layers.Positions. block: further fields of layers.Block. scan, remat: of its layers,
    see layers.Repeat.
    context: streams whose shown tokens each decoder sees besides its own stream's. With a mask of ratio 1 for one
    modality it is painted in from the others alone (cross-modal inpainting). (): only what fusion has brought over.
    decode: share of the hidden tokens that training predicts, by `running_cells` (dual masking, VideoMAE V2): the
    decoder costs less. `predict` predicts all.
    standardise: targets are each patch with mean 0 and variance 1, True or "patch" (better features on natural
    images; on flat ones it is noise); "unbiased": the same by the variance over P − 1, as MAE has it; "colour": each colour
    of a patch by itself, as VideoMAE has it; False: as is.
    pixels: (mean, deviation) of each colour, in pixel values 0 … 255, that are subtracted from targets and divided out
    before that; (): pixels are −1 … 1.
    """

    view: str = "masked"
    weight: float = 1.0
    modalities: tuple[str, ...] = ("video", "audio", "text")
    width: int = 128
    depth: int = 2
    heads: int = 4
    ratio: float = 4.0
    standardise: bool | str = True
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)
    enter_bias: bool = True
    context: tuple[str, ...] = ()
    decode: float = 1.0
    scan: bool = False
    remat: bool | str = False
    pixels: tuple = ()

    needs_hidden = True

    def _check(self, outputs: Outputs) -> None:
        if self.standardise not in STANDARDISE:
            raise UserError(f"masked: standardise must be one of {STANDARDISE}, got {self.standardise!r}")
        if not 0 < self.decode <= 1:
            raise UserError(f"masked: decode is a share of the hidden tokens, in (0, 1], got {self.decode}")
        for name in self.modalities:
            if name not in outputs.masks:
                raise UserError(
                    f"masked: the view {self.view!r} hides nothing of {name!r} (it hides {sorted(outputs.masks)}); "
                    f"give views.{self.view}.{name} a mask or take {name!r} out of `modalities`"
                )
        apart = [name for name in self.modalities if name not in outputs.fused]
        if apart:
            raise UserError(f"masked: {apart} stay out of the fusion (trunk.apart); take them out of `modalities`")
        for name in self.context:
            if name not in outputs.fused:
                raise UserError(f"masked: context names {name!r}, but the trunk has {sorted(outputs.fused)}")

    @nn.compact
    def _decode(self, outputs: Outputs, hidden: Mapping) -> dict:
        """hidden: modality → places int32 [B H]. Returns modality → predictions [B H P]."""
        predictions = {}
        for name, places in hidden.items():
            patches = outputs.patches[name]
            decoder = Decoder(
                patches.classes or patches.values.shape[-1],
                self.width,
                self.depth,
                self.heads,
                self.ratio,
                self.positions,
                self.block,
                self.enter_bias,
                self.scan,
                self.remat,
                name=name,
            )
            others = {
                other: (outputs.fused[other], outputs.patches[other].grid) for other in self.context if other != name
            }
            valid = gather(patches.valid, places)
            predictions[name] = decoder(outputs.fused[name], places, valid, patches.grid, others)
        return predictions

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns modality → predictions [B H P] of its hidden tokens (normalised patches, or logits)."""
        self._check(outputs)
        return self._decode(outputs, {name: outputs.masks[name].hidden for name in self.modalities})

    @nn.nowrap
    def restored(self, values: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """Returns predictions [H P] of patches as values of the stream: pixels −1 … 1, spectrograms.

        values: the true patches [H P], for the mean and deviation where they were standardized.
        """
        pixels = values.dtype == np.uint8
        mean, deviation = self.pixels if pixels and self.pixels else ((127.5,) * 3, (127.5,) * 3)
        mean, deviation = (np.tile(np.float32(of), values.shape[-1] // 3) if pixels else of for of in (mean, deviation))
        target = (values.astype(np.float32) - mean) / deviation if pixels else values
        if self.standardise:
            colours = 3 if self.standardise == "colour" and pixels else 1
            own = target.reshape(len(target), -1, colours)
            spread, middle = own.std(1, keepdims=True), own.mean(1, keepdims=True)
            prediction = (prediction.reshape(own.shape) * spread + middle).reshape(prediction.shape)
        return (prediction * deviation + mean) / 127.5 - 1.0 if pixels else prediction

    def _places(self, name: str, outputs: Outputs, batch: Batch) -> Int[Array, "B H"]:
        """Returns the hidden places of one modality that are predicted in training."""
        patches, hidden = outputs.patches[name], outputs.masks[name].hidden
        if self.decode == 1:
            return hidden
        count = max(1, math.floor(self.decode * hidden.shape[1] + 1e-4))
        # A sample's place in the run is the seed of all that is random about it.
        key = jax.random.key(zlib.crc32(f"decode/{name}".encode()))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.index)
        return running_cells(keys, hidden, gather(patches.valid, hidden), patches.grid, count)

    def _target(self, values: Array) -> Array:
        """Returns patches as they are to be predicted."""
        target, pixels = as_float(values), values.dtype == jnp.uint8
        if pixels and self.pixels:
            mean, deviation = (np.tile(np.float32(of), values.shape[-1] // 3) for of in self.pixels)
            target = (values.astype(jnp.float32) - mean) / deviation
        if self.standardise == "colour":
            # VideoMAE's pixels are 0 … 1, ours −1 … 1: the same share of the deviation is added to it.
            return losses.standardise_colours(target, 3 if pixels else 1, 2e-6 if pixels and not self.pixels else 1e-6)
        return losses.standardise(target, less=self.standardise == "unbiased") if self.standardise else target

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample and modality the sum of errors over hidden tokens, and their number."""
        self._check(outputs)
        places = {name: self._places(name, outputs, batch) for name in self.modalities}
        result = {}
        for name, prediction in self._decode(outputs, places).items():
            patches, hidden = outputs.patches[name], places[name]
            target = gather(patches.values, hidden)
            weight = (gather(patches.valid, hidden) & batch.valid[:, None]).astype(jnp.float32)
            if patches.classes:
                error = losses.cross_entropy(prediction, target)
            else:
                error = losses.squared_error(prediction, self._target(target))
            result[name] = {"error": (error * weight).sum(1), "count": weight.sum(1)}
        return result

    def loss(self, features: dict) -> tuple:
        """Returns the mean over modalities of the mean error per hidden token of the global batch."""
        return losses.mean_error(features)
