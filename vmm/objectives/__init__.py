"""Objectives: what a view's outputs are trained for. Each is a Module that owns its heads.

Contract, held for every entry by tests/test_objectives.py:

    features(outputs, batch) → tree of [B ...]     per sample, where the arithmetic is
    loss(features) → (scalar, {name: scalar})      over the whole global batch
    __call__(outputs, batch) = loss(features(outputs, batch))
    predict(outputs, batch) → {name: array [B …]}  for evaluation and publishing

The split makes gradient accumulation exact: features are computed part by part, the loss once, so
that contrastive negatives and means are over the global batch whatever the number of parts.
"""

from vmm.objectives.classify import Classify
from vmm.objectives.contrastive import Contrastive
from vmm.objectives.masked import Masked

OBJECTIVES = {"contrastive": Contrastive, "masked": Masked, "classify": Classify}
