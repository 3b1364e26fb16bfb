"""Alignment of posteriors: each modality tells the class of a clip by itself, and they are to agree.

Mutual learning (Zhang et al. 2018, eq. 4-7) between the modalities of one clip instead of between models.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from vmm import losses
from vmm.errors import UserError
from vmm.layers import Dense, Pool
from vmm.objectives.base import Objective
from vmm.types import Batch, Outputs


class Align(Objective):
    """Symmetric KL divergence between the modalities' posteriors p_m = softmax(W_m pool(x_m) / τ).

        mean over pairs (m, n) of  mean_i ½ [ KL(p_m,i ‖ p_n,i) + KL(p_n,i ‖ p_m,i) ]

    over the samples i that have both. Agreement alone is reached where nobody says anything, so something else must
    give the classes their meaning: with `labels`, the cross-entropy of every modality's own posterior where the label
    is known, times `supervise`; without, K free `prototypes`, of which every modality must use all over the batch:
    ln K − H(mean_i p_m,i), the mean over modalities, times `spread` (MSN, Assran et al. 2022, eq. 2).

    view, weight: see Recipe. modalities: those that are to agree. labels: label → number of classes.
    stage: "encoded" or "fused"; fused streams have seen each other and agree easily. temperature: τ.
    stop_gradient: each modality learns from the other's posterior as it is, and is not drawn to it as a target; the
    value stays the same. pooling, heads: see layers.Pool.
    """

    view: str = "clean"
    weight: float = 1.0
    modalities: tuple[str, ...] = ("video", "audio", "text")
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prototypes: int = 0
    stage: str = "encoded"
    temperature: float = 1.0
    stop_gradient: bool = False
    supervise: float = 1.0
    spread: float = 1.0
    pooling: str = "mean"
    heads: int = 4

    across_batch = True

    @nn.compact
    def _posteriors(self, outputs: Outputs) -> dict:
        """Returns head → modality → log p float32 [B K]. A head is a label, or "prototypes"."""
        if self.stage not in ("encoded", "fused"):
            raise UserError(f"align.stage: unknown {self.stage!r}; known: encoded, fused")
        if len(self.modalities) < 2 or not set(self.modalities) <= set(outputs.encoded):
            raise UserError(
                f"align.modalities: two or more of the trunk's {sorted(outputs.encoded)}, got {self.modalities}"
            )
        if bool(self.labels) == bool(self.prototypes):
            raise UserError("align: give either labels (label → classes) or a number of prototypes")
        result = {head: {} for head in self._heads}
        for name in self.modalities:
            x = Pool(self.pooling, self.heads, name=f"{name}_pool")(getattr(outputs, self.stage)[name])
            for head, classes in self._heads.items():
                logits = Dense((classes,), ("embed", None), name=f"{name}_{head}")(x)
                result[head][name] = jax.nn.log_softmax(logits / self.temperature)
        return result

    @property
    def _heads(self) -> Mapping[str, int]:
        return self.labels or {"prototypes": self.prototypes}

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns head/modality → posterior float32 [B K]; a stream that a sample lacks says what its head says to zeros."""
        said = self._posteriors(outputs)
        return {f"{head}/{name}": jnp.exp(value) for head, each in said.items() for name, value in each.items()}

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns every posterior, which samples have the modality, and the known labels."""
        streams = getattr(outputs, self.stage)
        return {
            "posteriors": self._posteriors(outputs),
            "there": {name: streams[name].valid.any(1) & batch.valid for name in self.modalities},
            "truth": {label: batch.labels[label] for label in self.labels},
        }

    def loss(self, features: dict) -> tuple:
        """Returns divergence + supervise · cross-entropy, or + spread · (ln K − entropy), of the global batch.

        Metrics: each pair's divergence, the mean over heads; of a label `LABEL/error`; of prototypes `entropy`, in nats.
        """
        there, divergence, extra = features["there"], {}, 0.0
        stop = jax.lax.stop_gradient if self.stop_gradient else lambda x: x
        metrics = {}
        for head, said in features["posteriors"].items():
            for one, two in itertools.combinations(self.modalities, 2):
                both = 0.5 * (
                    losses.divergence(stop(said[one]), said[two]) + losses.divergence(stop(said[two]), said[one])
                )
                divergence.setdefault(f"{one}-{two}", []).append(losses.mean(both, there[one] & there[two]))
            if self.labels:
                truth = features["truth"][head]
                errors = [
                    losses.mean(losses.cross_entropy(said[name], truth), there[name] & (truth >= 0)) for name in said
                ]
                metrics[f"{head}/error"] = sum(errors) / len(errors)
                extra += self.supervise * metrics[f"{head}/error"] / len(self.labels)
            else:
                means = {name: jax.vmap(losses.mean, (1, None))(jnp.exp(said[name]), there[name]) for name in said}
                entropy = {name: -(p * jnp.log(jnp.maximum(p, 1e-12))).sum() for name, p in means.items()}
                metrics["entropy"] = sum(entropy.values()) / len(entropy)
                lack = [
                    jnp.where(there[name].any(), math.log(self.prototypes) - value, 0.0)
                    for name, value in entropy.items()
                ]
                extra += self.spread * sum(lack) / len(lack)
        pairs = {name: sum(values) / len(values) for name, values in divergence.items()}
        return sum(pairs.values()) / len(pairs) + extra, metrics | pairs
