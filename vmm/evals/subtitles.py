"""Subtitles that were written: whether they stand at the right time, and say the right thing."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmm.data import subtitles
from vmm.data.subtitles import Segment
from vmm.errors import UserError
from vmm.evals.captions import Cider, rouge_l, words_of, written
from vmm.evals.scored import Measured, Measuring, Scored
from vmm.evals.segments import overlaps


class Pairs(NamedTuple):
    """Segments found and true ones, one to one. found, true: places int [m]; overlap: tIoU float [m], above 0."""

    found: np.ndarray
    true: np.ndarray
    overlap: np.ndarray


def pair(found: Sequence[Segment], true: Sequence[Segment]) -> Pairs:
    """Returns the pairs with the largest sum of tIoU (intersection over union in time), each segment in one at most."""
    from scipy.optimize import linear_sum_assignment  # a second to import, which training does without

    sides = [np.array([[one.start, one.end] for one in side], np.float64).reshape(-1, 2) for side in (found, true)]
    shared = overlaps(sides[0][:, 0], sides[0][:, 1], sides[1][:, 0], sides[1][:, 1])
    rows, columns = linear_sum_assignment(shared, maximize=True)
    keep = shared[rows, columns] > 0
    return Pairs(rows[keep], columns[keep], shared[rows, columns][keep])


@dataclasses.dataclass(frozen=True)
class Subtitles(Measuring):
    """Subtitles that an objective writes window by window, as segments of the whole clip, against texts.OF of the row.

    Found segments are paired with true ones one to one, see `pair`. Clip by clip, sums over pairs are divided by the larger
    number of segments, so that what is missing counts as 0, and so does what is too much: "tIoU"; "cider" and "rouge_l"
    of a pair's words, each against the true ones alone, n-grams counted over the segments of all clips; "f1", pairs
    of a tIoU of 0.5 or more. Over all pairs: "seconds", the mean distance of a start or end from the true one. Clips that do
    not tell their subtitles are left out; where nothing is said and nothing written, all scores are full ("cider" 10).

    data: manifest. objective: name of the captioning objective in the config, which writes a target of kind subtitles.
    step: the target's. of: OF. subsets: keys of types.SUBSETS, those of
    them that name streams the model has. folder: where the subtitles of each clip are written, ID.vtt and ID.srt of the
    first subset; "": nowhere. beams, penalty, length: see Captioning.generate.
    """

    hub_task = ("video-text-to-text", "Text of clips")

    asks = True

    data: str
    objective: str = "captioning"
    step: float = subtitles.STEP
    of: str = "subtitles"
    subsets: tuple[str, ...] = ("VAT",)
    folder: str = ""
    beams: int = 4
    penalty: float = 0.6
    length: int = 0

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns the scores under the subset; notes: clips, and the scores of another clip's true subtitles, "chance"."""
        scored, notes, folder = [], {}, self.folder
        for subset in self.subsets:
            rows = written(predict, self, subset)
            if rows is None:
                continue
            clips = predict.rows(self.data)
            found = self.found(rows, predict.seconds)
            if folder and predict.writes:
                self._write(folder, {clips[row].id: segments for row, segments in found.items()})
            folder = ""
            told = [row for row in found if self.of in clips[row].texts]
            if not told:
                raise UserError(f"dataset {self.data}: no row has texts.{self.of}, which evals (subtitles) asks for")
            true = [self._true(clips[row].texts[self.of], clips[row].id) for row in told]
            scored.append(self._score(subset, np.array(told), [found[row] for row in told], true))
            notes["clips"] = float(len(told))
            # What the true subtitles of the next clip are worth: right by chance.
            other = self._score("chance", np.array(told), true[1:] + true[:1], true).numbers()
            notes |= {key: other[key] for key in ("chance/tIoU", "chance/cider", "chance/rouge_l")}
        return Measured(scored, notes)

    def found(self, rows: dict, seconds: float) -> dict[int, list[Segment]]:
        """Returns clip's number → its segments in seconds of the file, from the texts of its windows of `seconds`."""
        windows: dict[int, list] = {}
        key = f"{self.objective}/likelihood"
        # The likeliest window's words stay where two tell of the same time.
        for i in np.lexsort((-rows[key], rows["row"])):
            start = float(rows["start"][i])
            here = subtitles.parse(rows["texts"][i], seconds, self.step)
            moved = [Segment(start + one.start, start + one.end, one.words) for one in here]
            shown = subtitles.Window(start, start + seconds, moved)
            windows.setdefault(int(rows["row"][i]), []).append(shown)
        return {row: subtitles.merge(several) for row, several in windows.items()}

    def _true(self, value: str | list[str], clip: str) -> list[Segment]:
        lines = [value] if isinstance(value, str) else value
        segments = [subtitles.segment_of(line) for line in lines]
        if None in segments:
            raise UserError(
                f'dataset {self.data}: clip {clip!r}: texts.{self.of} must be lines "START END words" in seconds, '
                f"got {lines[segments.index(None)]!r}"
            )
        return segments

    def _score(self, subset: str, row: np.ndarray, found: list, true: list) -> Scored:
        cider = Cider([[words_of(one.words)] for several in true for one in several])
        means = {name: np.zeros(len(row)) for name in ("tIoU", "f1", "cider", "rouge_l")}
        errors, texts = [], []
        for i, (mine, theirs) in enumerate(zip(found, true)):
            pairs, most = pair(mine, theirs), max(len(mine), len(theirs))
            words = [(words_of(mine[a].words), [words_of(theirs[b].words)]) for a, b in zip(pairs.found, pairs.true)]
            means["tIoU"][i] = pairs.overlap.sum() / most if most else 1.0
            both = len(mine) + len(theirs)
            means["f1"][i] = 2 * (pairs.overlap >= 0.5).sum() / both if both else 1.0
            means["cider"][i] = sum(cider(*pair) for pair in words) / most if most else 10.0
            means["rouge_l"][i] = sum(rouge_l(*pair) for pair in words) / most if most else 1.0
            errors.append(
                [
                    abs(one - other)
                    for a, b in zip(pairs.found, pairs.true)
                    for one, other in zip(mine[a][:2], theirs[b][:2])
                ]
            )
            texts.append(subtitles.spell(mine, self.step))

        def rest(places: np.ndarray) -> dict[str, float]:
            every = [error for place in places for error in errors[place]]
            return {"seconds": float(np.mean(every)) if every else float("nan")}

        return Scored(subset, self.data, subset, row, means, {"text": np.array(texts, str)}, rest)

    def _write(self, folder: str, found: dict[str, list[Segment]]) -> None:
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for clip, segments in found.items():
            for ending in (".vtt", ".srt"):
                # An id may be a path; a file's name is not.
                subtitles.write(place / f"{clip.replace('/', '_')}{ending}", segments)
