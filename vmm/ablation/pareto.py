"""Score against cost: a dot a variant, a line through those that no other beats in both."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Returns the places, by rising cost, of points that no other costs at most as much as and scores more than."""
    best, result = -np.inf, []
    for place in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if scores[place] > best:
            best = scores[place]
            result.append(place)
    return result


def draw(
    costs: Mapping[str, Sequence[float]],
    names: Sequence[str],
    scores: Sequence[float],
    halves: Sequence[float],
    score: str,
    paths: Sequence[Path],
) -> None:
    """Writes the picture to each path.

    Args:
      costs: name of a cost → its value for each variant. names: of the variants. scores, halves: their means and the
        half-widths of the intervals, both shares; not-a-number: no interval. score: its name.
    """
    plt.switch_backend("Agg")  # draws files, needs no screen
    figure, axes = plt.subplots(
        1, len(costs), figsize=(4.2 * len(costs), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    scores, bars = 100 * np.asarray(scores), 100 * np.nan_to_num(np.asarray(halves))
    colours = plt.colormaps["tab10" if len(names) <= 10 else "tab20"]
    marks = "osD^vPX*<>"
    for axis, (label, values) in zip(axes[0], costs.items()):
        edge = front(values, scores)
        axis.plot(
            [values[i] for i in edge], scores[edge], color="#b0b0b0", linewidth=1, drawstyle="steps-post", zorder=0
        )
        for i, name in enumerate(names):
            axis.errorbar(
                values[i], scores[i], bars[i], fmt=marks[i % len(marks)], color=colours(i % colours.N), label=name,
                capsize=2, elinewidth=1, markersize=6,
            )  # fmt: skip
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
        if max(values) > 8 * min(values) > 0:
            axis.set_xscale("log")
    axes[0, 0].set_ylabel(f"{score}, %")
    if not np.isfinite(np.asarray(halves, float)).any():
        figure.suptitle("one seed each: no interval, so that a difference may be chance", fontsize=9, color="#666666")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(names)), fontsize=8, frameon=False)
    for path in paths:
        # No date: the same numbers give the same picture.
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
