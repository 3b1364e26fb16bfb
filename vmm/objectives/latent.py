"""Latent prediction: from the tokens that are shown, what a teacher makes of the hidden ones.

The teacher is the running average of the model and sees everything; the student encodes the shown tokens alone; a narrow
Transformer, the predictor, is given the student's tokens and, for every hidden place, a learned vector and its position.
No pixel is drawn, and no negative is needed.
"""

import dataclasses
from collections.abc import Collection, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmm import losses
from vmm.errors import UserError, one_of
from vmm.layers import Dense, Positions, Stack, gather, rotary, vector
from vmm.objectives.base import Objective, Prediction
from vmm.types import Batch, Outputs, Streams, Tokens

ERRORS = ("l1", "l2", "smooth_l1")


class Predictor(nn.Module):
    """Shown tokens of some streams + places of one stream's hidden tokens → predictions float32 [B H O] for the hidden.

    FLOPs forward a sample, of one stream: 2 K C D + depth · block(K + H, D) + 2 H D O, for K shown tokens of width C.
    """

    outputs: int
    width: int
    depth: int
    heads: int
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)
    scan: bool = False
    remat: bool | str = False

    @nn.compact
    def __call__(
        self, shown: Streams, name: str, hidden: Int[Array, "B H"], hidden_valid: Bool[Array, "B H"], grids: Mapping
    ) -> Float[Array, "B H O"]:
        blank = vector(self, "mask", (self.width,))
        blank = jnp.broadcast_to(blank, (*hidden.shape, self.width)).astype(shown[name].x.dtype)
        parts, turns = [], []
        # The hidden tokens stand last.
        for stream in [*(stream for stream in shown if stream != name), name]:
            tokens = shown[stream]
            x, valid, at = (
                Dense((self.width,), ("embed", None), name=f"enter_{stream}")(tokens.x),
                tokens.valid,
                tokens.at,
            )
            if stream == name:
                x = jnp.concatenate([x, blank], axis=1)
                valid = jnp.concatenate([valid, hidden_valid], axis=1)
                at = jnp.concatenate([at, hidden], axis=1)
            x = Positions(self.positions, name=f"positions_{stream}")(x, at, grids[stream])
            if len(shown) > 1:
                x = x + vector(self, f"modality_{stream}", (self.width,)).astype(x.dtype)
            parts.append((x, valid))
            turns.append(rotary(self.positions, at, grids[stream], self.width // self.heads))
        x, valid = (jnp.concatenate(part, axis=1) for part in zip(*parts))
        turn = None if turns[0] is None else tuple(jnp.concatenate(part, axis=1) for part in zip(*turns))
        stack = Stack(self.depth, self.heads, scan=self.scan, remat=self.remat, block=self.block, name="stack")
        x = stack(x, valid, rotary=turn)
        return Dense((self.outputs,), ("embed", None), name="head")(
            x[:, x.shape[1] - hidden.shape[1] :].astype(jnp.float32)
        )


class Latent(Objective):
    """Prediction of a teacher's tokens at the places that the view hides.

    V-JEPA (Bardes et al. 2024; V-JEPA 2, Assran et al. 2025): as the defaults, with "multiblock" masks; its clips are
    masked twice, by short- and long-range blocks: two views, each with its objective. data2vec (Baevski et al. 2022;
    2.0, 2023, whose student too sees shown tokens alone): layers above 1, error "smooth_l1" or "l2". Joint prediction of
    sight and sound: stage "fused", or context "all".

    view, weight: see Recipe; the view must hide tokens of every modality named here. target: a teacher's view, in which
    nothing of them is hidden. modalities: streams to predict, each with a predictor of its own.
    stage: which tokens are read and predicted, "encoded" or "fused". context: the predictor reads the shown tokens of
    its "own" stream or of "all". layers: 1: the teacher's last outputs, normed; k: the mean of its encoder's last k
    blocks, each token of each normalised. normalise: targets have mean 0 and variance 1 a token.
    error: "l1", "l2" or "smooth_l1" (e² / 2β below β, |e| − β / 2 above), the mean over the width. beta: β.
    width, depth, heads: of the predictor. positions: its kind, see layers.Positions; a rotary one too. block: further
    fields of layers.Block. scan, remat: of its layers, see layers.Repeat.
    """

    view: str = "masked"
    target: str = "target"
    weight: float = 1.0
    modalities: tuple[str, ...] = ("video", "audio")
    stage: str = "encoded"
    context: str = "own"
    layers: int = 1
    normalise: bool = True
    error: str = "l1"
    beta: float = 2.0
    width: int = 128
    depth: int = 2
    heads: int = 4
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)
    scan: bool = False
    remat: bool | str = False

    needs_hidden = True

    def prediction(self, key: str, tags: Collection[str]) -> Prediction:
        """Places in a space that each model has for itself have no mean."""
        return Prediction("none", "places in its own teacher's space")

    def _check(self, outputs: Outputs) -> None:
        for field, known in (("stage", ("encoded", "fused")), ("context", ("own", "all")), ("error", ERRORS)):
            if getattr(self, field) not in known:
                value = getattr(self, field)
                raise UserError(f"latent.{field}: unknown {value!r}; {one_of(value, known)}")
        if self.layers < 1 or (self.layers > 1 and self.stage == "fused"):
            raise UserError("latent.layers: at least 1; above 1 they are of the encoder: stage must be 'encoded'")
        for name in self.modalities:
            if name not in outputs.masks:
                raise UserError(
                    f"latent: the view {self.view!r} hides nothing of {name!r} (it hides {sorted(outputs.masks)}); "
                    f"give views.{self.view}.{name} a mask or take {name!r} out of `modalities`"
                )

    @nn.compact
    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns modality → predictions float32 [B H D] of the teacher's tokens at its hidden places."""
        self._check(outputs)
        streams: Streams = getattr(outputs, self.stage)
        grids = {name: patches.grid for name, patches in outputs.patches.items()}
        predictions = {}
        for name in self.modalities:
            shown = streams if self.context == "all" else {name: streams[name]}
            hidden = outputs.masks[name].hidden
            there = gather(outputs.patches[name].valid, hidden)
            size = streams[name].x.shape[-1]
            fields = (size, self.width, self.depth, self.heads, self.positions, self.block, self.scan, self.remat)
            predictor = Predictor(*fields, name=name)
            predictions[name] = predictor(shown, name, hidden, there, grids)
        return predictions

    def _target(self, outputs: Outputs, name: str) -> Float[Array, "B H D"]:
        """Returns what the teacher makes of the hidden tokens; no gradient goes there."""
        seen, count = outputs.target, outputs.patches[name].valid.shape[1]
        if seen is None:  # while parameters are made: a teacher of another model is not at hand
            width = getattr(outputs, self.stage)[name].x.shape[-1]
            return jnp.zeros((*outputs.masks[name].hidden.shape, width), jnp.float32)
        if name in seen.masks:
            raise UserError(f"latent: views.{self.target} hides some of {name!r}; a teacher's view must show all of it")
        tokens: Tokens = getattr(seen, self.stage)[name]
        layers = [tokens.x]
        if self.layers > 1:
            if self.layers > len(seen.layers[name]):
                raise UserError(
                    f"latent.layers: {self.layers}, but the encoder of {name!r} has {len(seen.layers[name])} blocks"
                )
            layers = seen.layers[name][-self.layers :]
        # Registers stand before the tokens of the grid.
        layers = [gather(x[:, x.shape[1] - count :], outputs.masks[name].hidden).astype(jnp.float32) for x in layers]
        layers = [losses.standardise(x) for x in layers] if self.normalise or self.layers > 1 else layers
        return jax.lax.stop_gradient(sum(layers) / len(layers))

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample and modality the sum of errors over hidden tokens, and their number."""
        result = {}
        for name, prediction in self.predict(outputs, batch).items():
            error = prediction - self._target(outputs, name)
            size = jnp.abs(error)
            if self.error == "l1":
                error = size
            elif self.error == "l2":
                error = jnp.square(error)
            else:
                error = jnp.where(size < self.beta, jnp.square(error) / (2 * self.beta), size - self.beta / 2)
            there = gather(outputs.patches[name].valid, outputs.masks[name].hidden) & batch.valid[:, None]
            weight = there.astype(jnp.float32)
            result[name] = {"error": (error.mean(-1) * weight).sum(1), "count": weight.sum(1)}
        return result

    def loss(self, features: dict) -> tuple:
        """Returns the mean over modalities of the mean error per hidden token of the global batch."""
        return losses.mean_error(features)
