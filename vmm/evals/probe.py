"""Linear probe: logistic regression on frozen features, per label and modality subset."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from vmm.evals.classification import score_classes
from vmm.evals.scored import Classes, Measured, Measuring
from vmm.types import SUBSETS

_FOLDS = 4  # of the training clips, to choose among `penalties`
UNTRAINED = " untrained"  # behind a subset's name, where its features are those of the same network before training


@dataclasses.dataclass(frozen=True)
class Probe(Measuring):
    """Multinomial logistic regression (L2, strength 1 / `penalty`) on pooled features, standardised.

    train, data: manifests to fit on and to score. stream: "fused" or "encoded" features; of a modality that is not fused
    (trunk.apart) the encoded ones. subsets: keys of types.SUBSETS; features of the streams shown are laid side by side.
    features: principal components of the training clips' standardised features that every subset is reduced to, so that more
    streams are no more features; 0: all are taken. penalties: values of `penalty`, of which each label of each subset takes
    the one with the highest accuracy of 4-fold cross-validation over the training clips (of equals, the stronger); (): `penalty`.
    untrained: subsets that are also scored with the features of the network as it was before training, under "VA untrained":
    what a probe finds in any network of this form. limit: training clips at most, the first ones.
    """

    hub_task = ("video-classification", "Classification")
    bare_metric = "accuracy"

    train: str
    data: str
    stream: str = "fused"
    subsets: tuple[str, ...] = ("V", "A", "T", "VA", "VAT")
    penalty: float = 1.0
    limit: int = 4096
    features: int = 0
    penalties: tuple[float, ...] = ()
    untrained: tuple[str, ...] = ()

    def _features(self, rows: dict, subset: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the features [n D] of a subset's streams, and which clips have all of them."""
        keys = {name: [f"{stage}/{name}" for stage in (self.stream, "encoded")] for name in SUBSETS[subset]}
        keys = {name: next((key for key in mine if key in rows), None) for name, mine in keys.items()}
        keys = {name: key for name, key in keys.items() if key is not None}
        shown = np.logical_and.reduce([rows[f"present/{name}"] for name in keys])
        return np.concatenate([rows[key] for key in keys.values()], axis=1), shown

    def _asked(self, predict: Callable) -> list[tuple[str, str, Callable]]:
        """Returns (name, subset, who predicts) of what is scored; only a whole model knows what it was before training."""
        asked = [(subset, subset, predict) for subset in self.subsets]
        before = getattr(predict, "untrained", None) if self.untrained else None
        return asked + [(subset + UNTRAINED, subset, before) for subset in self.untrained if before is not None]

    def prepare(self, predict: Callable) -> dict:
        """Returns (name, label) → what was fitted: the scaler, the regression."""
        fitted = {}
        for name, subset, predictor in self._asked(predict):
            rows = predictor(self.train, subset)
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
                if len(np.unique(y[use])) >= 2:
                    fitted[name, key.removeprefix("label/")] = self._fit(x[use], y[use])
        return fitted

    def _fit(self, x: np.ndarray, y: np.ndarray) -> tuple:
        """Returns the scaler and the regression fitted to features [n D] and classes [n]."""
        # Half a second to import, which training does without.
        from sklearn.decomposition import PCA
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from threadpoolctl import threadpool_limits

        steps = [StandardScaler()]
        if 0 < self.features < x.shape[1]:
            steps.append(PCA(min(self.features, len(x)), svd_solver="covariance_eigh"))
        # On such small matrices threads cost more than they save: a hundred times as much on a busy machine.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 200 steps are enough for a probe
            scaler = make_pipeline(*steps).fit(x)
            x = scaler.transform(x)
            penalty = self._choose(x, y) if self.penalties else self.penalty
            return scaler, LogisticRegression(C=penalty, max_iter=200).fit(x, y)

    def _choose(self, x: np.ndarray, y: np.ndarray) -> float:
        """Returns the best of `penalties`, by cross-validation."""
        from sklearn.linear_model import LogisticRegression

        fold = np.random.default_rng(0).permutation(len(y)) % _FOLDS
        right = dict.fromkeys(sorted(self.penalties), 0.0)
        for penalty in right:
            for held in range(_FOLDS):
                mine, others = fold == held, fold != held
                if mine.any() and len(np.unique(y[others])) >= 2:
                    model = LogisticRegression(C=penalty, max_iter=200).fit(x[others], y[others])
                    right[penalty] += float((model.predict(x[mine]) == y[mine]).sum())
        return max(right, key=right.get)

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns the accuracy under "subset/label"; classes that no training clip has are never predicted."""
        scored, asked = [], {name: (subset, predictor) for name, subset, predictor in self._asked(predict)}
        for (name, label), (scaler, model) in prepared.items():
            if name not in asked:
                continue
            subset, predictor = asked[name]
            rows = predictor(self.data, subset)
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
            scored.append(score_classes(f"{name}/{label}", self.data, subset, rows["row"][use], said))
        return Measured(scored, {})
