"""Objectives: what a view's outputs are trained for. Each is a Module that owns its heads.

What an objective declares beside is in base.py: what it needs of data, how its predictions are combined, what it embeds.

Contract, held for every entry by tests/test_objectives.py:

    features(outputs, batch) → tree of [B ...]     per sample, where the arithmetic is
    loss(features) → (scalar, {name: scalar})      over the whole global batch
    __call__(outputs, batch) = loss(features(outputs, batch))
    predict(outputs, batch) → {name: array [B …]}  for evaluation and publishing

`view` names what `outputs` is. An objective with a field `target` names a teacher's view too, whose outputs of the same
batch are then in `outputs.target`; predict has no need of them, and no gradient goes there.
Where a view swaps a stream, `outputs.swapped` says of which samples, and `outputs.target` is the view before.

The split makes gradient accumulation exact: features are computed part by part, the loss once, so
that contrastive negatives and means are over the global batch whatever the number of parts.
"""

from vmm.objectives.align import Align
from vmm.objectives.captioning import Captioning
from vmm.objectives.classify import Classify
from vmm.objectives.contrastive import Contrastive
from vmm.objectives.distill import Distill
from vmm.objectives.identify import Identify
from vmm.objectives.latent import Latent
from vmm.objectives.localise import Localise
from vmm.objectives.masked import Masked
from vmm.objectives.matching import Matching
from vmm.objectives.moments import Moments
from vmm.objectives.pixels import Pixels
from vmm.objectives.regress import Regress
from vmm.objectives.words import Words
from vmm.plugins import Kinds

OBJECTIVES = Kinds(
    "objectives",
    {
        "contrastive": Contrastive,
        "masked": Masked,
        "classify": Classify,
        "captioning": Captioning,
        "align": Align,
        "matching": Matching,
        "latent": Latent,
        "distill": Distill,
        "pixels": Pixels,
        "moments": Moments,
        "regress": Regress,
        "identify": Identify,
        "localise": Localise,
        "words": Words,
    },
)
