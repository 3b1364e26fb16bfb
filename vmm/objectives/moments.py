"""How much each moment is worth: curves over the window, as key-frame scores of summaries are."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from vmm import losses
from vmm.data.spec import DataSpec
from vmm.errors import UserError, one_of
from vmm.layers import Dense
from vmm.objectives.base import Objective
from vmm.objectives.line import TimeLine, check_window, have_time
from vmm.types import Batch, Outputs

ERRORS = ("squared", "logistic")


class Moments(Objective):
    """Curves of the window, a number at each of `steps` moments, from its time line (line.TimeLine).

    curves: names of data.targets of kind "curve", of as many points; moments where one is unknown do not count. error:
    "squared"; or "logistic", for curves in [0, 1]: a sigmoid and its cross-entropy. seconds: of the window, as
    data.clip.seconds. view, weight: see Recipe. The rest: of the line, see line.TimeLine.
    """

    curves: tuple[str, ...]
    seconds: float
    view: str = "clean"
    weight: float = 1.0
    error: str = "logistic"
    streams: tuple[str, ...] = ("video", "audio")
    steps: int = 16
    width: int = 128
    depth: int = 2
    heads: int = 4
    ratio: float = 4.0
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)
    scan: bool = False
    remat: bool | str = False
    points: int = 4

    over_time = True

    def check(self, where: str, data: DataSpec) -> None:
        """Raises UserError where windows are of another length."""
        check_window(where, self.seconds, data)

    @nn.compact
    def _tell(self, outputs: Outputs) -> dict:
        """Returns curve → [B steps], of "logistic" before the sigmoid."""
        line = TimeLine(
            self.streams, self.steps, self.width, self.depth, self.heads, self.ratio, self.positions, self.block,
            self.scan, self.remat, self.points, name="line",
        )  # fmt: skip
        x = line(outputs, "moments")
        return {name: Dense((1,), ("embed", None), name=name)(x)[..., 0] for name in self.curves}

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns curve → float32 [B steps], evenly over the window; and seconds [B] of the window."""
        told = self._tell(outputs)
        if self.error == "logistic":
            told = {name: jax.nn.sigmoid(value) for name, value in told.items()}
        return told | {"seconds": jnp.full(len(batch.valid), self.seconds, jnp.float32)}

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns curve → per sample the sum of errors over its known moments, and their number."""
        if self.error not in ERRORS:
            raise UserError(f"moments.error: unknown {self.error!r}; {one_of(self.error, ERRORS)}")
        answers, result = self._tell(outputs), {}
        use = have_time(outputs, self.streams) & batch.valid
        for name, told in answers.items():
            truth = batch.targets.get(name)
            if truth is None or isinstance(truth, Mapping) or truth.shape != told.shape:
                found = sorted(batch.targets) if truth is None else f"{name!r} of {truth.shape[1:]}"
                raise UserError(
                    f"moments.curves: {name!r} asks for a curve of {self.steps} points in data.targets, which has {found}"
                )
            known = jnp.isfinite(truth) & use[:, None]
            truth = jnp.where(known, truth, 0.0)
            logistic = self.error == "logistic"
            error = losses.binary_cross_entropy(told, truth) if logistic else jnp.square(told - truth)
            result[name] = {"error": jnp.where(known, error, 0.0).sum(1), "count": known.sum(1).astype(jnp.float32)}
        return result

    def loss(self, features: dict) -> tuple:
        """Returns the mean over curves of the mean error of known moments of the global batch; and each of them."""
        return losses.mean_error(features)
