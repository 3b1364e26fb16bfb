"""Feature distillation: the student's tokens, mapped to a teacher's width, follow the teacher's features."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmm import losses
from vmm.errors import UserError, one_of
from vmm.layers import Dense, gather, pool
from vmm.objectives.base import Objective, Prediction
from vmm.types import Batch, Outputs, Tokens


class Distill(Objective):
    """Regression of a frozen teacher's features (FitNets, Romero et al. 2015; UMT, Li et al. 2023, tokens and cosine).

    width: of the teacher's tokens, and of the linear map's result, a map for each modality.
    view, weight: see Recipe. target: a teacher's view that shows everything; `views.<target>.teacher` is the folder of a
    published model, or True: the running average. modalities: streams that follow their namesake of the teacher.
    stage: "encoded" or "fused", of both. of: "tokens": each shown token follows the teacher's of the same place (one
    grid for both); "pooled": the mean token follows the mean token (any two grids).
    error: "cosine", 1 − cos, or "l2", the mean squared difference to the features with mean 0 and variance 1 each.
    """

    width: int
    view: str = "clean"
    target: str = "target"
    weight: float = 1.0
    modalities: tuple[str, ...] = ("video",)
    stage: str = "encoded"
    of: str = "tokens"
    error: str = "cosine"

    def prediction(self, key: str, tags: Collection[str]) -> Prediction:
        """Embeddings lie side by side."""
        return Prediction("embedding")

    def setup(self):
        for field, known in (
            ("stage", ("encoded", "fused")),
            ("of", ("pooled", "tokens")),
            ("error", ("cosine", "l2")),
        ):
            value = getattr(self, field)
            if value not in known:
                raise UserError(f"distill.{field}: unknown {value!r}; {one_of(value, known)}")
        self.project = {name: Dense((self.width,), ("embed", None)) for name in self.modalities}

    def _tokens(self, outputs: Outputs, name: str) -> Tokens:
        streams = getattr(outputs, self.stage)
        if name not in streams:
            raise UserError(
                f"distill: modalities name {name!r}, but the model or its teacher has only {sorted(streams)}"
            )
        return streams[name]

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns modality → the mean token in the teacher's space, float32 [B width]."""
        return {name: self.project[name](pool(self._tokens(outputs, name))) for name in self.modalities}

    def _pair(self, outputs: Outputs, name: str) -> tuple[Array, Array, Array]:
        """Returns (student's, teacher's) features float32 [B n width] and where both are, bool [B n]."""
        mine, theirs = self._tokens(outputs, name), self._tokens(outputs.target, name)
        if theirs.x.shape[-1] != self.width:
            raise UserError(
                f"distill.width: {self.width}, but the teacher's tokens of {name!r} have {theirs.x.shape[-1]}"
            )
        if name in outputs.target.masks:
            raise UserError(
                f"distill: views.{self.target} hides some of {name!r}; a teacher's view must show all of it"
            )
        if self.of == "pooled":
            there = mine.valid.any(1) & theirs.valid.any(1)
            return self.project[name](pool(mine))[:, None], pool(theirs)[:, None], there[:, None]
        grids = outputs.patches[name].grid, outputs.target.patches[name].grid
        if grids[0] != grids[1]:
            raise UserError(
                f"distill: tokens of {name!r} are on grids {grids[0]} and {grids[1]} (teacher); give the encoders one grid, or `of='pooled'`"
            )
        registers = theirs.x.shape[1] - outputs.target.patches[name].valid.shape[1]
        at = jnp.maximum(mine.at, 0)
        there = mine.valid & (mine.at >= 0) & gather(theirs.valid[:, registers:], at)
        return (
            self.project[name](mine.x.astype(jnp.float32)),
            gather(theirs.x[:, registers:], at).astype(jnp.float32),
            there,
        )

    def _error(self, mine: Float[Array, "B n O"], theirs: Float[Array, "B n O"]) -> Float[Array, "B n"]:
        theirs = jax.lax.stop_gradient(theirs)
        if self.error == "cosine":
            return 1.0 - (losses.normalise(mine) * losses.normalise(theirs)).sum(-1)
        return losses.squared_error(mine, losses.standardise(theirs))

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample and modality the sum of errors, and how many features it is of.

        Raises:
          UserError: the teacher's tokens are of another width, modality or grid.
        """
        result = {}
        for name in self.modalities:
            if outputs.target is None:  # while parameters are made: a teacher of another model is not at hand
                error = self.predict(outputs, batch)[name].sum(-1, keepdims=True)
                there = jnp.zeros(error.shape, bool)
            else:
                mine, theirs, there = self._pair(outputs, name)
                error = self._error(mine, theirs)
            weight = (there & batch.valid[:, None]).astype(jnp.float32)
            result[name] = {"error": (error * weight).sum(1), "count": weight.sum(1)}
        return result

    def loss(self, features: dict) -> tuple:
        """Returns the mean over modalities of the mean error of a feature of the global batch."""
        return losses.mean_error(features)
