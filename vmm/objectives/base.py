"""What every objective declares: nobody outside its file asks which kind it is."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from vmm.data.manifest import Row
from vmm.data.spec import DataSpec
from vmm.types import Batch, Outputs, Streams, Tokens


class Prediction(NamedTuple):
    """How what several models predict of one clip becomes one prediction (vmm ensemble).

    Attributes:
      how: "mean"; "softmax", "sigmoid" and "log": the logarithm of the mean probability, of logits of one class, logits of
        yes, and logarithms; "embedding": side by side, each 1 / √n; "none": it has no mean.
      reason: why not, where there is none.
    """

    how: str = "mean"
    reason: str = ""


class Objective(nn.Module):
    """Base of objectives. A subclass has the fields `view: str` and `weight: float`, features, loss and predict.

    Attributes:
      target: name of a teacher's view that it reads too; a field where there is one.
      needs_hidden: whether predict speaks of hidden tokens, and so needs a view that hides some.
      across_batch: whether samples are compared with all others of the global batch.
      accepts_mixed_labels: whether it knows samples that were mixed (MixUp, CutMix).
      over_time: whether predict gives curves over the window, [B steps], by their names.
    """

    target = None
    needs_hidden = False
    across_batch = False
    accepts_mixed_labels = False
    over_time = False

    @nn.nowrap
    def check(self, where: str, data: DataSpec) -> None:
        """Raises UserError where it does not fit what the data gives. where: its key in the config."""

    @nn.nowrap
    def check_rows(self, where: str, rows: Sequence[Row]) -> None:
        """Raises UserError where it does not fit the training clips."""

    @nn.nowrap
    def prediction(self, key: str, tags: Collection[str]) -> Prediction:
        """Returns how predictions of a key are combined. tags: labels of which a clip has any number."""
        return Prediction()

    @nn.nowrap
    def init_queue(self) -> dict | None:
        """Returns an empty queue of past features, which `loss` then takes as a second argument; None: it has none."""
        return None

    @nn.nowrap
    def enqueue(self, queue: dict, features: dict) -> dict:
        """Returns the queue with a step's features before the older ones."""
        raise NotImplementedError

    @nn.nowrap
    def compared(self, features: dict) -> dict:
        """Returns what the health panel compares: "one-two" → (unit embeddings [B E], [B E], valid bool [B])."""
        return {}

    def features(self, outputs: Outputs, batch: Batch):
        """Returns a tree of [B …], per sample."""
        raise NotImplementedError

    def loss(self, features) -> tuple:
        """Returns (scalar, metrics by name) of the global batch."""
        raise NotImplementedError

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns name → array [B …], for evaluation and publishing."""
        raise NotImplementedError

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple:
        return self.loss(self.features(outputs, batch))


class Embeds:
    """An objective that gives streams embeddings in one space."""

    modalities: tuple[str, ...]

    def embed(self, name: str, tokens: Tokens) -> Float[Array, "B E"]:
        """Returns the unit embedding of one stream's encoded tokens; zero where it has none."""
        raise NotImplementedError

    def similarity(self, name: str, encoded: Streams) -> tuple[Float[Array, "B E"], Float[Array, "B E"]]:
        """Returns (a, b) with a_i · b_j ∝ how well sample j's stream `name` fits sample i's other streams; no gradient."""
        raise NotImplementedError


class Generates:
    """An objective that generates text."""

    def generate(self, outputs: Outputs, batch: Batch, end: int, length: int, beams: int, penalty: float) -> dict:
        """Returns ids int32 [B L] and their likelihood [B]."""
        raise NotImplementedError


class Reconstructs:
    """An objective whose predict gives the values of hidden patches, modality → [B H P], or logits of ids [B H V]."""

    standardise: bool | str

    def restored(self, values: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """Returns predictions [H P] as values of the stream: pixels −1 … 1, spectrograms. values: the true ones [H P]."""
        raise NotImplementedError


def by_capability(objectives: Mapping[str, Objective], capability: type) -> list[str]:
    """Returns the names of the objectives that have a capability."""
    return [name for name, objective in objectives.items() if isinstance(objective, capability)]
