"""Events found in time: average precision over overlaps, recall of proposals, boxes and participants of what was found."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vmm.data.manifest import Row
from vmm.errors import UserError
from vmm.evals.classification import heads, shown_clips
from vmm.evals.scored import Measured, Measuring, Scored
from vmm.evals.segments import Detections, Window, decode, join, overlaps, soft_nms
from vmm.types import SUBSETS

FOUND = 0.5  # tIoU from which an event is found, for its box and participants
RECALLS = tuple(np.arange(0.5, 1.0, 0.05).round(2))  # tIoU of the recall of proposals (ActivityNet)


def matches(found: Detections, truth: Detections, least: float) -> np.ndarray:
    """Returns of each detection, which are best first, the true event that it finds, −1: none.

    Each takes, of the events of its class with a tIoU of `least` or more that no better one took, the one it overlaps
    most (the protocol of THUMOS and ActivityNet).
    """
    result = np.full(len(found.score), -1)
    if not len(truth.label) or not len(result):
        return result
    alike = overlaps(found.start, found.end, truth.start, truth.end)
    alike = np.where((found.label[:, None] == truth.label) & (alike >= least), alike, -1.0)
    for i in np.flatnonzero((alike >= 0).any(1)):
        best = alike[i].argmax()
        if alike[i, best] >= 0:
            result[i] = best
            alike[:, best] = -1.0
    return result


class Curve:
    """Detections of one class and which of them are right under M rules, sorted once; asked with several weights.

    score: [n]; right: [M n].
    """

    def __init__(self, score: np.ndarray, right: np.ndarray):
        self.order = np.argsort(-score, kind="stable")
        score = score[self.order]
        self.right = right[:, self.order].astype(np.float64)
        self.last = np.append(score[1:] < score[:-1], True)[: len(score)]  # of its threshold

    def average_precision(self, weight: np.ndarray, total: float) -> np.ndarray:
        """Returns the area under the precision-recall curve [M], precision made to fall with recall, at all points (VOC 2010).

        Detections of one score lie under one threshold. Nan where there is nothing to find.

        weight: [n], how often each detection counts. total: events.
        """
        if total <= 0:
            return np.full(len(self.right), np.nan)
        weight = weight[self.order].astype(np.float64)
        true = np.cumsum(self.right * weight, axis=1)[:, self.last]
        precision = true / np.maximum(np.cumsum(weight)[self.last], 1e-12)
        falling = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        return (np.diff(true, axis=1, prepend=0.0) * falling).sum(1) / total


def box_iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns intersection over union of boxes [n 4], left, top, right, bottom."""

    def area(low, high):
        return np.prod(np.maximum(high - low, 0.0), axis=-1)

    low, high, other_low, other_high = one[:, :2], one[:, 2:], other[:, :2], other[:, 2:]
    inside = area(np.maximum(low, other_low), np.minimum(high, other_high))
    return inside / np.maximum(area(low, high) + area(other_low, other_high) - inside, 1e-9)


def truth_of(row: Row, seen: Sequence[tuple[float, float]], participants: int) -> Detections:
    """Returns the events of a row that its windows show at least half of, cut to them; score 1.

    seen: (start, end) of the windows in seconds of the file. participants: number of kinds; 0: not told.
    """
    spans: list[list[float]] = []
    for start, end in sorted(seen):
        if spans and start <= spans[-1][1] + 1e-6:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    kept = []
    for event in row.events or ():
        shown = [(max(event.start, a), min(event.end, b)) for a, b in spans]
        start, end = max(shown, key=lambda pair: pair[1] - pair[0])
        if end > start and end - start >= 0.5 * (event.end - event.start):
            box = (np.nan,) * 4 if event.box is None else event.box
            who = np.full(participants, np.nan)
            if event.participants is not None:
                who = np.isin(np.arange(participants), event.participants).astype(np.float64)
            kept.append((start, end, 1.0, event.label, box, who))
    start, end, score, label, box, who = zip(*kept) if kept else ((),) * 6
    return Detections(
        np.array(start, np.float64), np.array(end, np.float64), np.array(score, np.float64), np.array(label, int),
        np.array(box, np.float64).reshape(-1, 4), np.array(who, np.float64).reshape(len(kept), participants),
    )  # fmt: skip


class Clip(NamedTuple):
    """One clip: its row in the manifest, what is true and what was found, in seconds of the file, the best first."""

    row: int
    truth: Detections
    found: Detections
    start: float
    end: float


def summaries(clips: Sequence[Clip], classes: int, thresholds: Sequence[float], proposals: int) -> Callable:
    """Returns (places int [m] in the clips, repeats included) → metric → number.

    Matching is done once, of each clip by itself; a resample only weighs it.
    """
    none = np.zeros(0, int)
    of_clip = np.concatenate([none, *(np.full(len(c.found.score), i) for i, c in enumerate(clips))])
    score = np.concatenate([np.zeros(0), *(clip.found.score for clip in clips)])
    label = np.concatenate([none, *(clip.found.label for clip in clips)])
    levels = sorted({*thresholds, FOUND})
    right = np.stack(
        [np.concatenate([none, *(matches(c.found, c.truth, level) for c in clips)]) >= 0 for level in levels]
    )
    curves = [(of_clip[label == y], Curve(score[label == y], right[:, label == y])) for y in range(classes)]
    total = np.zeros((len(clips), classes))  # true events of each clip and class
    recalled = np.zeros((len(clips), len(RECALLS)))
    sums = {key: np.zeros(len(clips)) for key in ("boxes", "box", "who", "exact", "hit", "said", "true")}
    for i, clip in enumerate(clips):
        np.add.at(total[i], clip.truth.label, 1)
        best = clip.found.at(np.arange(min(proposals, len(clip.found.score))))
        if len(best.score) and len(clip.truth.label):
            alike = overlaps(clip.truth.start, clip.truth.end, best.start, best.end).max(1)
            recalled[i] = (alike[:, None] >= RECALLS).sum(0)
        for key, value in _details(clip).items():
            sums[key][i] = value

    def ratio(one: np.ndarray, other: np.ndarray) -> float:
        return float(one / other) if other else float("nan")

    def rest(places: np.ndarray) -> dict[str, float]:
        count = np.bincount(places, minlength=len(clips)).astype(np.float64)
        events = count @ total
        each = np.stack([curve.average_precision(count[of], events[y]) for y, (of, curve) in enumerate(curves)])
        mean = each[events > 0].mean(0) if (events > 0).any() else np.full(len(levels), np.nan)
        chosen = [levels.index(level) for level in thresholds]
        result = {"mAP": float(mean[chosen].mean())}
        result |= {f"mAP@{level:g}": float(value) for level, value in zip(levels, mean)}
        result[f"AR@{proposals}"] = ratio((count @ recalled).mean(), events.sum())
        mine = {key: count @ value for key, value in sums.items()}
        if sums["boxes"].any():
            result["box_IoU"] = ratio(mine["box"], mine["boxes"])
        if sums["who"].any():
            result["participants_exact"] = ratio(mine["exact"], mine["who"])
            result["participants_F1"] = ratio(2 * mine["hit"], mine["said"] + mine["true"])
        at = levels.index(FOUND)
        return result | {f"AP@{FOUND:g}/class_{y}": float(each[y, at]) for y in range(classes) if total[:, y].any()}

    return rest


def _details(clip: Clip) -> dict[str, float]:
    """Sums over the events that were found: boxes and their IoU; participants: all right, and hits, said, true of kinds."""
    own = matches(clip.found, clip.truth, FOUND)
    found, truth = clip.found.at(own >= 0), clip.truth.at(own[own >= 0])
    boxes = np.isfinite(found.box).all(1) & np.isfinite(truth.box).all(1)
    who = np.isfinite(truth.participants).all(1) & (truth.participants.shape[1] > 0)
    said, true = found.participants[who] > 0.5, truth.participants[who] > 0.5
    return {
        "boxes": boxes.sum(),
        "box": box_iou(found.box[boxes], truth.box[boxes]).sum(),
        "who": who.sum(),
        "exact": (said == true).all(1).sum(),
        "hit": (said & true).sum(),
        "said": said.sum(),
        "true": true.sum(),
    }


@dataclasses.dataclass(frozen=True)
class Localisation(Measuring):
    """Events of whole clips, however many windows they are seen in (data.evaluation.stride), against the manifest's.

    Of each window, what its steps say passes soft-NMS by class; windows are then joined, see segments.join. Gives "mAP",
    the mean over `overlaps` of the mean over classes; "mAP@0.5" and so on; "AR@K", the recall of the K best proposals of
    any class, mean over tIoU 0.5 … 0.95; and, of events found at a tIoU of 0.5, the mean IoU of boxes and whether all
    participants are right, and F1 over them (said where above 0.5). Events count that a clip's windows show half of.

    data: manifest. objective: name of the localise objective. subsets: as of Classification. overlaps: tIoU. sigma: of
    segments.soft_nms. least: score below which nothing is kept. most: detections of a window, before and after.
    proposals: K. picture: a file (.png, .svg) to which true and found events of the first clips are drawn, "": none;
    of the subset that comes last.
    """

    data: str
    objective: str = "events"
    subsets: tuple[str, ...] = tuple(SUBSETS)
    overlaps: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    sigma: float = 0.5
    least: float = 1e-3
    most: int = 100
    proposals: int = 10
    picture: str = ""

    asks = True

    def __post_init__(self):
        if not self.overlaps or not all(0 < level <= 1 for level in self.overlaps):
            raise UserError(f"evals (kind 'localisation'): overlaps are tIoU above 0, at most 1; got {self.overlaps}")
        if min(self.most, self.proposals) < 1 or self.sigma < 0:
            raise UserError(
                f"evals (kind 'localisation'): most {self.most} and proposals {self.proposals} are at least 1, sigma "
                f"{self.sigma} not below 0"
            )

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns the scores under "subset"; each clip's recall under "subset/clip"."""
        manifest = predict.rows(self.data)
        if not any(row.events for row in manifest):
            raise UserError(f"dataset {self.data}: no clip has an event; give rows a key `events`, or another dataset")
        scored, notes = [], {}
        for subset in self.subsets:
            rows = predict.ask(self.data, subset)
            if rows is None:
                continue
            told = heads(rows, self.objective, "localisation")
            clips = self.clips(rows, told, manifest, shown_clips(rows, subset))
            notes = {"clips": float(len(clips)), "events": float(sum(len(clip.truth.label) for clip in clips))}
            if clips:
                scored += self._score(subset, clips, told["scores"].shape[2])
                if self.picture and predict.writes:
                    from vmm.evals.timeline import draw  # matplotlib takes long to import

                    draw(clips[:12], self.picture)
        return Measured(scored, notes)

    def _score(self, subset: str, clips: list[Clip], classes: int) -> list[Scored]:
        row = np.array([clip.row for clip in clips])
        rest = summaries(clips, classes, self.overlaps, self.proposals)
        events = np.array([len(clip.truth.label) for clip in clips])
        one = Scored(subset, self.data, subset, row, told={"events": events}, rest=rest)
        some = [clip for clip in clips if len(clip.truth.label)]
        recall = np.array([(matches(c.found, c.truth, FOUND) >= 0).sum() / len(c.truth.label) for c in some])
        places = np.array([clip.row for clip in some], int)
        return [one, Scored(f"{subset}/clip", self.data, subset, places, {f"recall@{FOUND:g}": recall})]

    def clips(self, rows: Mapping, told: Mapping, manifest: Sequence[Row], shown: np.ndarray) -> list[Clip]:
        """Returns the clips whose events are known and that have a stream shown. told: what the objective says of windows.

        Raises:
          UserError: the objective tells no segments, or knows fewer classes or participants than the data.
        """
        if not {"scores", "segments", "seconds"} <= set(told):
            raise UserError(
                f"evals (kind 'localisation'): objective {self.objective!r} tells no segments; name one of kind 'localise'"
            )
        classes, kinds = told["scores"].shape[2], told.get("participants", np.zeros((0, 0, 0))).shape[2]
        self._check(manifest, classes, kinds)
        result = []
        for number in np.unique(rows["row"][shown]):
            row, windows = manifest[number], []
            if row.events is None:
                continue
            for i in np.flatnonzero(shown & (rows["row"] == number)):
                start, length = float(rows["start"][i]), float(told["seconds"][i])
                boxes, who = (told[key][i] if key in told else None for key in ("boxes", "participants"))
                found = decode(told["scores"][i], told["segments"][i], boxes, who, self.least, 2 * self.most)
                found = soft_nms(found, self.sigma, self.least, self.most)
                found = found._replace(start=found.start + start, end=found.end + start)
                windows.append(Window(start, start + length, found))
            seen = [(window.start, window.end) for window in windows]
            ends = min(a for a, _ in seen), max(b for _, b in seen)
            result.append(Clip(int(number), truth_of(row, seen, kinds), join(windows), *ends))
        return result

    def _check(self, manifest: Sequence[Row], classes: int, participants: int) -> None:
        for row in manifest:
            for event in row.events or ():
                if event.label >= classes:
                    raise UserError(
                        f"dataset {self.data}: clip {row.id!r} has an event of class {event.label}, but the objective knows "
                        f"{classes} (0 to {classes - 1}); raise its classes, or correct the data"
                    )
                if max(event.participants or (), default=-1) >= participants > 0:
                    raise UserError(
                        f"dataset {self.data}: clip {row.id!r} has a participant {max(event.participants)}, but the "
                        f"objective knows {participants} (0 to {participants - 1}); raise its participants, or correct the data"
                    )
