"""Matching: do these streams belong together? (ALBEF, Li et al. 2021, sec. 3.2; InternVideo2, Wang et al. 2024)."""

from collections.abc import Collection

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmm import losses
from vmm.errors import UserError
from vmm.layers import Dense, Pool
from vmm.objectives.base import Objective, Prediction
from vmm.types import Batch, Outputs, Streams


class Matching(Objective):
    """Binary classification of fused streams: as they are (1), or with one stream of another sample (0).

        mean_i ½ [ −log σ(z_i) − log σ(−z'_i) ],  z the mean over a sample's streams of a linear head of each

    view: one that swaps, views.mixed = {"of": "clean", "swap": "text", "hard": "contrast"}, see Recipe: encoders run
    once, the fusion again for the mismatched. A sample counts where it found a partner. For negatives both ways, as
    in ALBEF, have a second view that swaps the other stream, and a second objective. weight: see Recipe.
    pooling, heads: see layers.Pool.
    """

    view: str = "mixed"
    weight: float = 1.0
    pooling: str = "mean"
    heads: int = 4

    across_batch = True

    def prediction(self, key: str, tags: Collection[str]) -> Prediction:
        """Logits of yes."""
        return Prediction("sigmoid")

    @nn.compact
    def _logits(self, pairs: tuple[Streams, ...]) -> list[Float[Array, "B"]]:
        """Returns z of each of several sets of streams."""
        pools = {name: Pool(self.pooling, self.heads, name=f"{name}_pool") for name in pairs[0]}
        heads = {name: Dense((1,), ("embed", None), name=f"{name}_match") for name in pairs[0]}
        result = []
        for streams in pairs:
            there = {name: tokens.valid.any(1).astype(jnp.float32) for name, tokens in streams.items()}
            votes = [heads[name](pools[name](tokens))[:, 0] * there[name] for name, tokens in streams.items()]
            result.append(sum(votes) / jnp.maximum(sum(there.values()), 1.0))
        return result

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns the logit float32 [B] that a sample's streams belong together."""
        return {"match": self._logits((outputs.fused,))[0]}

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample the logits of both sets of streams, and whether it counts."""
        if outputs.swapped is None:
            raise UserError(
                f"matching: the view {self.view!r} swaps no stream; name one such as "
                "views.mixed = {'of': 'clean', 'swap': 'text'}"
            )
        right, wrong = self._logits((outputs.target.fused, outputs.fused))
        return {"right": right, "wrong": wrong, "there": outputs.swapped & batch.valid, "row": batch.valid}

    def loss(self, features: dict) -> tuple:
        """Returns the mean cross-entropy of the global batch; metrics: accuracy (½ is chance), share swapped."""
        right, wrong, there = features["right"], features["wrong"], features["there"]
        errors = jax.nn.softplus(-right) + jax.nn.softplus(wrong)
        hits = (right > 0).astype(jnp.float32) + (wrong < 0).astype(jnp.float32)
        metrics = {"accuracy": losses.mean(0.5 * hits, there)}
        metrics["swapped"] = losses.mean(there.astype(jnp.float32), features["row"])
        return losses.mean(0.5 * errors, there), metrics
