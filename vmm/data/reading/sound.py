"""Sound → one array by time: channels mixed so that nothing is louder than it was, placed by a steady clock."""

import math
from collections import Counter, deque
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

from vmm.data.reading.decode import frames
from vmm.data.reading.open import Medium
from vmm.data.reading.problems import DecodeError

PREROLL = 0.25  # seconds of sound decoded before the window: codecs overlap their blocks
HOLE = 0.1  # seconds without sound between two frames, above which they are no jitter of timestamps
_DRIFT = 0.02  # seconds by which the timestamps of many frames may leave the count of samples
_MANY = 64  # frames
_TOGETHER = 64  # frames in a graph before it is asked


def mix_weights(names: Sequence[str], outs: int) -> list[list[float]] | None:
    """Returns what each channel of a layout gives to one or two channels, rows of weights; None: all as they are.

    One channel is the mean of all. Of two, each has the channels of its side twice and those of the middle once, so that
    their mean is again the mean of all, and the same sound in every channel keeps its level.

    names: of the channels, as FFmpeg has them ("FL", "LFE", …).
    """
    count = len(names)
    if count == outs:
        return None
    if outs == 1:
        return [[1 / count] * count]
    rows = []
    for side in "LR":
        other = "R" if side == "L" else "L"
        row = [2.0 if _side(name) == side else 0.0 if _side(name) == other else 1.0 for name in names]
        rows.append([weight / max(count, sum(row)) for weight in row])
    return rows


def _side(name: str) -> str:
    return {"FLC": "L", "FRC": "R"}.get(name, name[-1:])


class Mixer:
    """Frames of one format → float32 [channels S] at a rate; what FFmpeg's filters do."""

    def __init__(self, frame, channels: int, rate: int):
        graph = av.filter.Graph()
        graph.threads = 1  # else each graph starts as many as there are cores: the pipeline runs in parallel over clips
        self.source = last = graph.add_abuffer(
            format=frame.format.name, sample_rate=frame.sample_rate, layout=frame.layout.name,
            time_base=Fraction(1, frame.sample_rate),
        )  # fmt: skip
        weights = mix_weights([channel.name for channel in frame.layout.channels], channels)
        steps = [("aformat", "sample_fmts=fltp")]
        if weights:
            outs = ("+".join(f"{weight:.9f}*c{place}" for place, weight in enumerate(row) if weight) for row in weights)
            layout = "mono" if channels == 1 else "stereo"
            steps.append(("pan", f"{layout}|" + "|".join(f"c{place}={out}" for place, out in enumerate(outs))))
        if frame.sample_rate != rate:
            steps += [("aresample", str(rate)), ("aformat", "sample_fmts=fltp")]
        for name, arguments in [*steps, ("abuffersink", None)]:
            node = graph.add(name) if arguments is None else graph.add(name, arguments)
            last.link_to(node)
            last = node
        graph.configure()
        self.graph, self.sink, self.inside = graph, last, 0

    def __call__(self, frame) -> list[np.ndarray]:
        """Returns what is ready after a frame went in; None ends it, and gives the rest."""
        self.source.push(frame)
        self.inside += 1
        if (
            frame is not None and self.inside % _TOGETHER
        ):  # asking a graph whether it has something costs as much as mixing
            return []
        found = []
        while True:
            try:
                found.append(self.sink.pull().to_ndarray())
            except (av.BlockingIOError, av.EOFError):
                return found


class _Run:
    """Frames without a hole between them."""

    def __init__(self, frame, channels: int, rate: int):
        self.mixer, self.kind = Mixer(frame, channels, rate), _kind(frame)
        self.pieces, self.length, self.shifts, self.sum = [], 0.0, [], 0.0
        self.recent = deque(maxlen=_MANY)

    @property
    def mean(self) -> float:
        """The mean of (time of a frame − sound before it): where the run begins, while it is read."""
        return self.sum / len(self.shifts)

    @property
    def end(self) -> float:
        return self.mean + self.length

    @property
    def begin(self) -> float:
        """Where the run begins: the mean without the fifth of frames furthest on either side, whose times are wrong."""
        shifts = np.sort(np.asarray(self.shifts))
        aside = len(shifts) // 5
        return float(shifts[aside : len(shifts) - aside].mean())

    def put(self, frame, time: float | None) -> None:
        if time is not None:
            self.shifts.append(time - self.length)
            self.sum += time - self.length
            self.recent.append(time - self.length)
        self.length += frame.samples / frame.sample_rate
        frame.pts = None
        self.pieces += self.mixer(frame)

    def close(self) -> None:
        if self.mixer is not None:
            self.pieces += self.mixer(None)
            self.mixer = None


def _kind(frame) -> tuple:
    return frame.format.name, frame.layout.name, frame.sample_rate


class Tape:
    """Sound on its way to one array. Jitter of timestamps is not followed, or every rounded one would click and the same
    moment would lie elsewhere in the next window; holes are, and clocks that drift apart.

    holes: seconds of them. end: where the sound ends so far, seconds.
    """

    def __init__(self, channels: int, rate: int, timed: bool = True, strict: bool = False):
        """timed: the container's timestamps tell where a frame is; else only the first one does."""
        self.channels, self.rate, self.timed, self.strict = channels, rate, timed, strict
        self.runs: list[_Run] = []
        self.holes = 0.0

    @property
    def end(self) -> float:
        return self.runs[-1].end if self.runs else -math.inf

    def put(self, frame, time: float) -> None:
        """Adds a frame. time: seconds after the beginning of the array, negative before it."""
        run = self.runs[-1] if self.runs else None
        apart = time - run.end if run is not None and self.timed else 0.0
        if apart < -HOLE and self.strict:
            raise DecodeError("damaged", f"the sound's time runs backwards by {-apart:.2f} s")
        drifts = (
            run is not None
            and self.timed
            and len(run.recent) == _MANY
            and abs(sum(run.recent) / _MANY - run.mean) > _DRIFT
        )
        if run is None or abs(apart) > HOLE or drifts or _kind(frame) != run.kind:
            if run is not None:
                run.close()
                self.holes += max(0.0, apart) if apart > HOLE else 0.0
                if abs(apart) <= HOLE and not drifts:
                    time = run.end
            self.runs.append(_Run(frame, self.channels, self.rate))
            self.runs[-1].put(frame, time)
        else:
            run.put(frame, time if self.timed else None)

    def wave(self, seconds: float) -> np.ndarray | None:
        """Returns float32 [channels S] from time 0 on, at most `seconds` of it; None: nothing is there."""
        pieces = []
        for run in self.runs:
            run.close()
            place = round(run.begin * self.rate)
            for piece in run.pieces:
                pieces.append((place, piece))
                place += piece.shape[1]
        end = max((place + piece.shape[1] for place, piece in pieces), default=0)
        end = min(end, round(seconds * self.rate)) if math.isfinite(seconds) else end
        if end <= 0:
            return None
        wave, heard = np.zeros((self.channels, end), np.float32), False
        for place, piece in pieces:
            low, high = max(0, place), min(end, place + piece.shape[1])
            if low < high:
                wave[:, low:high] = piece[:, low - place : high - place]
                heard = True
        return wave if heard else None


def window_sound(medium: Medium, start: float, seconds: float, rate: int, remarks: Counter) -> np.ndarray | None:
    """Returns the sound of a window in mono, float32 [S] in [-1, 1], silence where there is none; None: none at all.

    Raises:
      one of BROKEN: nothing of the stream decodes.
    """
    tape = Tape(1, rate, medium.timed)
    for frame, time in frames(
        medium, "audio", max(0.0, start - PREROLL), pixels=0, latest=max(0.0, start - PREROLL / 5), remarks=remarks
    ):
        tape.put(frame, time - start)
        if tape.end >= seconds:
            break
    wave = tape.wave(seconds)
    if wave is None:
        return None
    if tape.holes:
        remarks["holes in the sound"] += 1
    return filled_up(np.nan_to_num(np.clip(wave[0], -1.0, 1.0)), round(seconds * rate))


def filled_up(wave: np.ndarray, samples: int) -> np.ndarray:
    """Returns sound float32 [samples] of a wave [S]: cut, or filled up with silence that tells itself apart.

    What is beyond the sound's end is −0.0, and no sample of the sound is: both are silence, but a front end that leaves
    out what was never heard (AST's) sees where it begins.
    """
    result = np.full(samples, -0.0, np.float32)
    result[: len(wave)] = wave[:samples] + np.float32(0.0)  # −0.0 + 0.0 is 0.0
    return result
