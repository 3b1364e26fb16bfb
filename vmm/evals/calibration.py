"""Whether a model is as sure as it is right: expected calibration error, Brier score, log loss, reliability."""

from typing import NamedTuple

import numpy as np

BINS = 15


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities float64 [n Y]; a row with not-a-number, or without any finite logit, says nothing: 1 / Y."""
    logits = np.asarray(logits, np.float64)
    best = logits.max(1, keepdims=True)
    said = np.isfinite(best)
    powers = np.exp(np.where(said, logits - np.where(said, best, 0.0), 0.0))
    return powers / powers.sum(1, keepdims=True)


class Reliability(NamedTuple):
    """Bins of confidence, each [bins]. confidence and accuracy: means of the bin, nan where it is empty."""

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability(confidence: np.ndarray, hits: np.ndarray, bins: int = BINS) -> Reliability:
    """Sorts predictions into bins of equal width; bin m holds the confidences in ((m − 1) / bins, m / bins].

    confidence [n]: probability of the predicted class. hits [n]: whether it is right.
    """
    edges = np.arange(bins + 1) / bins
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    some = np.where(count, count, np.nan)
    return Reliability(
        count, np.bincount(place, confidence, bins) / some, np.bincount(place, hits, bins) / some
    )  # fmt: skip


def expected_error(confidence: np.ndarray, hits: np.ndarray, bins: int = BINS) -> float:
    """Returns ECE (Guo et al. 2017, equation 3): the mean over clips of |accuracy − confidence| of their bin."""
    count, sure, right = reliability(confidence, hits, bins)
    return float(np.nansum(count * np.abs(right - sure)) / count.sum()) if count.sum() else float("nan")


def brier(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns each row's squared distance [n] from the truth's one-hot vector, 0 to 2 (Brier 1950). labels [n] ≥ 0."""
    truth = np.eye(probabilities.shape[1])[labels]
    return ((probabilities - truth) ** 2).sum(1)


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns each row's −ln of the truth's probability [n], which counts as 1e-7 at least. labels [n] ≥ 0."""
    return -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-7))
