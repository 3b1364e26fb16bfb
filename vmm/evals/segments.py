"""Detections of one video: what each step of a window says → few, told apart, in seconds of the file; windows made one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Detections(NamedTuple):
    """Events that were found. start, end: seconds [n]; score [n]; label: int [n]; box: [n 4]; participants: [n P].

    box and participants are nan where a model does not tell them.
    """

    start: np.ndarray
    end: np.ndarray
    score: np.ndarray
    label: np.ndarray
    box: np.ndarray
    participants: np.ndarray

    def at(self, places: np.ndarray) -> "Detections":
        """Returns those at some places."""
        return Detections(*(value[places] for value in self))


class Window(NamedTuple):
    """What was found in one window. start, end: seconds of the file that it shows; found: in seconds of the file too."""

    start: float
    end: float
    found: Detections


def overlaps(start: np.ndarray, end: np.ndarray, others_start: np.ndarray, others_end: np.ndarray) -> np.ndarray:
    """Returns intersection over union in time (tIoU) [n m] of n stretches with m others; 0 where both are empty."""
    inside = np.minimum(end[:, None], others_end) - np.maximum(start[:, None], others_start)
    inside = np.maximum(inside, 0.0)
    union = (end - start)[:, None] + (others_end - others_start) - inside
    return inside / np.maximum(union, 1e-9)


def soft_nms(found: Detections, sigma: float = 0.5, least: float = 1e-3, most: int = 100) -> Detections:
    """Returns at most `most` detections, best first, whose scores fall by how much better ones of their class cover them.

    A score is multiplied by exp(−tIoU² / σ) for each better one (Bodla et al. 2017, eq. 4); below `least` it goes.
    sigma 0: nothing falls.
    """
    score = np.asarray(found.score, np.float64).copy()
    if sigma > 0:
        for label in np.unique(found.label):
            mine = np.flatnonzero(found.label == label)
            alike = np.exp(-(overlaps(*(found.at(mine)[:2]), *(found.at(mine)[:2])) ** 2) / sigma)
            own, open_ = score[mine], np.ones(len(mine), bool)
            for _ in range(min(len(mine), most)):
                best = np.where(open_, own, -1.0).argmax()
                if own[best] < least:
                    break
                open_[best] = False
                own = np.where(open_, own * alike[best], own)
            score[mine] = np.where(open_, 0.0, own)
    keep = np.argsort(-score, kind="stable")[:most]
    keep = keep[score[keep] >= least]
    return found.at(keep)._replace(score=score[keep])


def decode(
    scores: np.ndarray, segments: np.ndarray, boxes: np.ndarray | None, participants: np.ndarray | None,
    least: float = 1e-3, most: int = 200,
) -> Detections:  # fmt: skip
    """Returns a window's detections, best first: each step and class whose score is at least `least`, at most `most`.

    scores [N Y], segments [N 2], boxes [N 4], participants [N P]: of N steps, see objectives.localise.
    """
    flat = np.where(np.isfinite(scores), scores, 0.0).ravel()
    keep = np.argsort(-flat, kind="stable")[:most]
    keep = keep[flat[keep] >= least]
    step, label = np.divmod(keep, scores.shape[1])
    start, end = segments[step, 0].astype(np.float64), segments[step, 1].astype(np.float64)
    box = np.full((len(step), 4), np.nan) if boxes is None else boxes[step]
    who = np.full((len(step), 0), np.nan) if participants is None else participants[step]
    return Detections(start, end, flat[keep].astype(np.float64), label, box, who)


def join(windows: Sequence[Window], agreement: float = 0.5) -> Detections:
    """Returns the detections of overlapping windows of a file as one list, best first.

    Two windows tell of one event where the class is the same, and their segments, each cut to what both windows show,
    have a tIoU of `agreement`. The earlier window then tells its start, the later its end, unless both see it: then the
    mean, weighed by score. So an event may be longer than a window. Its score is the mean over the windows that show
    at least half of it or told of it, weighed by how much of it they show, 0 of those that did not tell: what only
    one window saw at its edge weighs less. Box and participants are the mean of those told, weighed the same way.
    """
    windows = sorted(windows, key=lambda window: (window.start, window.end))
    if len(windows) == 1:
        return windows[0].found
    total = sum(len(window.found.score) for window in windows)
    start, end, label = np.zeros(total), np.zeros(total), np.zeros(total, int)
    weight = np.zeros(total)  # score of the last fragment
    parts: list[list[tuple[int, int]]] = []  # of each joined event, (window, detection)
    seen = -np.inf
    for number, window in enumerate(windows):
        found = window.found
        joined = _same(start, end, label, weight, len(parts), window, seen, agreement)
        for j in range(len(found.score)):
            i, (first, last, score) = joined[j], (found.start[j], found.end[j], found.score[j])
            if i < 0:
                i = len(parts)
                start[i], end[i], label[i] = first, last, found.label[j]
                parts.append([])
            else:
                share = score / max(score + weight[i], 1e-12)
                if start[i] >= window.start:
                    start[i] += share * (first - start[i])
                end[i] = last if last >= seen - 1e-6 else end[i] + share * (last - end[i])
            weight[i] = score
            parts[i].append((number, j))
        seen = max(seen, window.end)
    start, end, label = start[: len(parts)], end[: len(parts)], label[: len(parts)]
    begins, ends = np.array([w.start for w in windows]), np.array([w.end for w in windows])
    score, box, who = [], [], []
    for i, told in enumerate(parts):
        shown = np.maximum(np.minimum(end[i], ends) - np.maximum(start[i], begins), 0.0)
        tellers = np.array([number for number, _ in told])
        counts = shown >= 0.5 * (end[i] - start[i])
        counts[tellers] = True
        shown = np.maximum(np.where(counts, shown, 0.0), 1e-9 * counts)
        fragments = [windows[number].found.at(j) for number, j in told]
        mine = shown[tellers]
        score.append(sum(m * one.score for m, one in zip(mine, fragments)) / shown.sum())
        box.append(np.average([one.box for one in fragments], axis=0, weights=mine))
        who.append(np.average([one.participants for one in fragments], axis=0, weights=mine))
    width = windows[0].found.participants.shape[1]
    result = Detections(
        start, end, np.array(score), label, np.array(box).reshape(-1, 4), np.array(who).reshape(len(parts), width)
    )
    return result.at(np.argsort(-result.score, kind="stable"))


def _same(start, end, label, weight, count: int, window: Window, seen: float, agreement: float) -> np.ndarray:
    """Returns of each detection of a window which of the first `count` events it is, −1: a new one. seen: their windows' end."""
    found = window.found
    result = np.full(len(found.score), -1)
    near = np.flatnonzero(end[:count] > window.start)
    if not len(near) or not len(result) or seen <= window.start:
        return result

    def cut(times):
        return np.clip(times, window.start, seen)

    alike = overlaps(cut(start[near]), cut(end[near]), cut(found.start), cut(found.end))
    worth = np.where((label[near][:, None] == found.label) & (alike >= agreement), alike, 0.0)
    worth *= weight[near][:, None] + found.score
    taken = set()
    for place in np.argsort(-worth, axis=None, kind="stable"):
        i, j = divmod(int(place), len(result))
        if worth[i, j] <= 0:
            break
        if result[j] < 0 and i not in taken:
            result[j] = near[i]
            taken.add(i)
    return result
