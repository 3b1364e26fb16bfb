"""Linear probe: logistic regression on frozen features, per label and modality subset."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from vmm.evals.classification import score_classes
from vmm.evals.scored import Classes, Measured, Measuring
from vmm.types import SUBSETS


@dataclasses.dataclass(frozen=True)
class Probe(Measuring):
    """Multinomial logistic regression (L2, strength 1 / `penalty`) on pooled features, standardised.

    train, data: manifests to fit on and to score. stream: "fused" or "encoded" features.
    subsets: keys of types.SUBSETS; features of the streams shown are laid side by side.
    limit: training clips at most, the first ones.
    """

    train: str
    data: str
    stream: str = "fused"
    subsets: tuple[str, ...] = ("V", "A", "T", "VA", "VAT")
    penalty: float = 1.0
    limit: int = 4096

    def _features(self, rows: dict, subset: str) -> tuple[np.ndarray, np.ndarray]:
        names = [name for name in SUBSETS[subset] if f"{self.stream}/{name}" in rows]
        shown = np.logical_and.reduce([rows[f"present/{name}"] for name in names])
        return np.concatenate([rows[f"{self.stream}/{name}"] for name in names], axis=1), shown

    def prepare(self, predict: Callable) -> dict:
        """Returns (subset, label) → what was fitted: the scaler, the regression."""
        # Half a second to import, which training does without.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        fitted = {}
        for subset in self.subsets:
            rows = predict(self.train, subset)
            if rows is None:
                continue
            x, shown = self._features(rows, subset)
            x, shown = x[: self.limit], shown[: self.limit]
            for key in rows:
                if not key.startswith("label/"):
                    continue
                y = rows[key][: self.limit]
                if y.ndim > 1:  # tags
                    continue
                use = shown & (y >= 0)
                if len(np.unique(y[use])) < 2:
                    continue
                scaler = StandardScaler().fit(x[use])
                model = LogisticRegression(C=self.penalty, max_iter=200)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)  # 200 steps are enough for a probe
                    model.fit(scaler.transform(x[use]), y[use])
                fitted[subset, key.removeprefix("label/")] = (scaler, model)
        return fitted

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns the accuracy under "subset/label"; classes that no training clip has are never predicted."""
        scored = []
        for (subset, label), (scaler, model) in prepared.items():
            rows = predict(self.data, subset) if subset in self.subsets else None
            if rows is None:
                continue
            x, shown = self._features(rows, subset)
            truth = rows[f"label/{label}"]
            use = shown & (truth >= 0)
            if not use.any():
                continue
            decision = model.decision_function(scaler.transform(x[use]))
            if decision.ndim == 1:  # of the second class against the first
                decision = np.stack([-decision / 2, decision / 2], axis=1)
            logits = np.full((int(use.sum()), int(max(truth.max(), model.classes_.max())) + 1), -np.inf)
            logits[:, model.classes_] = decision
            said = Classes(label, logits, truth[use])
            scored.append(score_classes(f"{subset}/{label}", self.data, subset, rows["row"][use], said))
        return Measured(scored, {})
