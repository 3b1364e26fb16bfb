"""Evaluators: predictions → {name: number}.

Contract: an evaluator is a dataclass, called with `predict(manifest, subset) → Predictions`, where
subset is a key of types.SUBSETS (the modalities that the model is shown). Predictions are rows of
real clips, each once, whatever the batch and the number of hosts; asking twice costs once.

One that derives from scored.Measuring tells what it finds clip by clip, and so gets intervals, calibration, robustness
and a place in the file of predictions; any other gives its numbers alone.
"""

from vmm.evals.answers import Answers
from vmm.evals.captions import Captions
from vmm.evals.classification import Classification
from vmm.evals.identity import Identity
from vmm.evals.localisation import Localisation
from vmm.evals.pictures import Pictures
from vmm.evals.probe import Probe
from vmm.evals.prompts import FewShot, ZeroShot
from vmm.evals.regression import Regression
from vmm.evals.retrieval import Retrieval
from vmm.evals.similar import Recommendation
from vmm.evals.subtitles import Subtitles
from vmm.evals.summary import Summary
from vmm.evals.tagging import Tagging
from vmm.plugins import Kinds

EVALS = Kinds(
    "evaluators",
    {
        "retrieval": Retrieval,
        "probe": Probe,
        "classification": Classification,
        "tagging": Tagging,
        "pictures": Pictures,
        "captions": Captions,
        "answers": Answers,
        "subtitles": Subtitles,
        "localisation": Localisation,
        "regression": Regression,
        "identity": Identity,
        "zero_shot": ZeroShot,
        "few_shot": FewShot,
        "recommendation": Recommendation,
        "summary": Summary,
    },
)
