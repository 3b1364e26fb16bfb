"""Numbers of a clip from the fused streams: sentiment, ratings, counts; each stream votes, the votes are averaged."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from vmm import losses
from vmm.errors import UserError, one_of
from vmm.layers import Dense, Pool
from vmm.objectives.base import Objective
from vmm.types import Batch, Outputs

ERRORS = ("squared", "absolute", "huber")


class Regress(Objective):
    """A linear head per stream and number; the answer is the mean over the streams a sample has.

    values: names of data.targets of kind "value"; samples where one is unknown do not count. view, weight: see Recipe.
    error: "squared", "absolute", or "huber": squared up to 1, absolute beyond. bound: answers are bound · tanh(x / bound), for
    numbers that lie in ± bound; 0: free. pooling, heads: see layers.Pool.
    """

    values: tuple[str, ...]
    view: str = "clean"
    weight: float = 1.0
    error: str = "squared"
    bound: float = 0.0
    pooling: str = "mean"
    heads: int = 4

    @nn.compact
    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns name → number float32 [B]."""
        sums = dict.fromkeys(self.values, 0.0)
        count = 0.0
        for stream, tokens in outputs.fused.items():
            there = tokens.valid.any(1).astype(jnp.float32)
            features = Pool(self.pooling, self.heads, name=f"{stream}_pool")(tokens)
            count += there
            for name in self.values:
                sums[name] += Dense((1,), ("embed", None), name=f"{stream}_{name}")(features)[:, 0] * there
        found = {name: value / jnp.maximum(count, 1.0) for name, value in sums.items()}
        return {name: self.bound * jnp.tanh(x / self.bound) if self.bound else x for name, x in found.items()}

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample and number the error, its absolute value, and whether it counts."""
        if self.error not in ERRORS:
            raise UserError(f"regress.error: unknown {self.error!r}; {one_of(self.error, ERRORS)}")
        result = {}
        for name, answer in self.predict(outputs, batch).items():
            if name not in batch.targets:
                raise UserError(f"regress.values: no target {name!r} in data.targets; {one_of(name, batch.targets)}")
            truth = batch.targets[name]
            if isinstance(truth, Mapping) or truth.shape != answer.shape:
                raise UserError(
                    f"regress.values: data.targets.{name} is no number of a clip; it must be of kind 'value'"
                )
            known = jnp.isfinite(truth) & batch.valid
            off = answer - jnp.where(known, truth, 0.0)
            absolute = jnp.abs(off)
            error = {
                "squared": jnp.square(off),
                "absolute": absolute,
                "huber": jnp.where(absolute <= 1, 0.5 * jnp.square(off), absolute - 0.5),
            }[self.error]
            result[name] = {"error": error, "absolute": absolute, "weight": known.astype(jnp.float32)}
        return result

    def loss(self, features: dict) -> tuple:
        """Returns the mean over numbers of the mean error of samples that tell them. Metrics: NAME/absolute, the mean of |error|."""
        errors = [losses.mean(value["error"], value["weight"]) for value in features.values()]
        metrics = {f"{n}/absolute": losses.mean(value["absolute"], value["weight"]) for n, value in features.items()}
        return sum(errors) / len(errors), metrics
