"""Linear probe: logistic regression on frozen features, per label and modality subset."""

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vmm.evals.classification import accuracy
from vmm.types import SUBSETS


@dataclasses.dataclass(frozen=True)
class Probe:
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

    def __call__(self, predict: Callable) -> dict[str, float]:
        result = {}
        for subset in self.subsets:
            fit, test = predict(self.train, subset), predict(self.data, subset)
            if fit is None or test is None:
                continue
            x, shown = self._features(fit, subset)
            x_test, shown_test = self._features(test, subset)
            x, shown = x[: self.limit], shown[: self.limit]
            for key in fit:
                if not key.startswith("label/"):
                    continue
                y = fit[key][: self.limit]
                use = shown & (y >= 0)
                truth = np.where(shown_test, test[key], -1)
                if len(np.unique(y[use])) < 2 or not (truth >= 0).any():
                    continue
                scaler = StandardScaler().fit(x[use])
                model = LogisticRegression(C=self.penalty, max_iter=200)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)  # 200 steps are enough for a probe
                    model.fit(scaler.transform(x[use]), y[use])
                scores = np.full((len(truth), int(max(truth.max(), y.max())) + 1), -np.inf)
                decision = model.decision_function(scaler.transform(x_test))
                if decision.ndim == 1:
                    decision = np.stack([-decision, decision], axis=1)
                scores[:, model.classes_] = decision
                result[f"{subset}/{key.removeprefix('label/')}"] = accuracy(scores, truth)
        return result
