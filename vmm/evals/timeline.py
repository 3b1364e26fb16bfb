"""True and found events of some clips as a picture: a row a clip, time to the right."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from vmm.errors import UserError
from vmm.evals.segments import Detections, overlaps

_SHOWN = 0.2  # score, as a share of the picture's best, from which a found event is drawn


def surest(found: Detections, least: float) -> Detections:
    """Returns detections, best first, that overlap no better one of any class by a tIoU of 0.3, and score at least `least`."""
    found = found.at(found.score >= least)
    alike = overlaps(found.start, found.end, found.start, found.end)
    kept: list[int] = []
    for i in range(len(found.score)):
        if not (alike[i, kept] > 0.3).any():
            kept.append(i)
    return found.at(np.array(kept, int))


def draw(clips: Sequence, path: str) -> None:
    """Writes the picture; the ending says what it is (.svg, .png). Of each clip the truth above, below it what was found.

    Colours are classes. What was found is the darker, the surer the model is; only the surest of what lies at one time is
    drawn, and nothing below a fifth of the surest of all.

    clips: as evals.localisation.Clip.

    Raises:
      UserError: the file cannot be written.
    """
    plt.switch_backend("Agg")  # draws files, needs no screen
    best = max([float(clip.found.score[0]) for clip in clips if len(clip.found.score)], default=1.0)
    figure, axes = plt.subplots(figsize=(9.0, 0.7 + 0.55 * len(clips)), layout="constrained")
    names = {}
    for i, clip in enumerate(clips):
        for above, events in ((True, clip.truth), (False, surest(clip.found, _SHOWN * best))):
            for j in range(len(events.label)):
                names |= _bar(axes, i, events, j, clip.start, above, best)
    axes.set_yticks(range(len(clips)), [f"clip {clip.row}" for clip in clips], fontsize=8)
    axes.set_ylim(len(clips) - 0.45, -0.55)
    axes.set_xlim(0, max(clip.end - clip.start for clip in clips))
    axes.set_xlabel("seconds; above: true, below: found, with its score")
    axes.legend(
        [names[name] for name in sorted(names)],
        [f"class {name}" for name in sorted(names)],
        fontsize=8,
        ncols=8,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        frameon=False,
    )
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"evals (kind 'localisation'): picture {path}: cannot be written ({error})") from None
    plt.close(figure)


def _bar(axes, row: int, events: Detections, j: int, origin: float, above: bool, best: float) -> dict:
    start, length = events.start[j] - origin, events.end[j] - events.start[j]
    label, score = int(events.label[j]), float(events.score[j])
    strength = 1.0 if above else 0.15 + 0.85 * min(1.0, score / best)
    y = row - 0.36 if above else row + 0.04
    (bar,) = axes.barh(y, length, 0.32, start, align="edge", color=f"C{label % 10}", alpha=strength, linewidth=0)
    if not above:
        axes.text(start + 0.03, y + 0.17, f"{score:.2f}", fontsize=6, va="center")
    return {label: bar} if above else {}
