"""Evaluators: predictions → {name: number}.

Contract: an evaluator is a dataclass, called with `predict(manifest, subset) → Predictions`, where
subset is a key of types.SUBSETS (the modalities that the model is shown). Predictions are rows of
real clips, each once, whatever the batch and the number of hosts; asking twice costs once.
"""

from vmm.evals.classification import Classification
from vmm.evals.probe import Probe
from vmm.evals.retrieval import Retrieval

EVALS = {"retrieval": Retrieval, "probe": Probe, "classification": Classification}
