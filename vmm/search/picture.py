"""A sweep as a picture: what the best was after each trial, and the value over each key."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from vmm.search.space import Choice, Space, text
from vmm.search.trials import Trial

_DONE, _OTHER, _BEST = "#08519c", "#b0b0b0", "#c0392b"


def draw(trials: Sequence[Trial], space: Space, metric: str, goal: str, paths: Sequence[Path]) -> None:
    """Writes the picture to each path; the ending says what it is (.svg, .png).

    Trials without a value are ticks at the bottom. Values beyond the better nine tenths lie on the edge.
    """
    plt.switch_backend("Agg")  # draws files, needs no screen
    done = [trial for trial in trials if trial.state == "done"]
    other = [trial for trial in trials if trial.state != "done"]
    best = (min if goal == "min" else max)(done, key=lambda trial: trial.value)
    columns = min(3, 1 + len(space))
    rows = -(-(1 + len(space)) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    history, *slices = axes.flat

    # A few diverged trials would press all others into one line.
    worst = float(np.quantile([trial.value for trial in done], 0.9 if goal == "min" else 0.1))
    values = [(min if goal == "min" else max)(trial.value, worst) for trial in done]
    running = (np.minimum if goal == "min" else np.maximum).accumulate(values)
    numbers = [trial.number + 1 for trial in done]
    history.step([*numbers, len(trials)], [*running, running[-1]], where="post", color=_BEST, label="best so far")
    _dots(history, numbers, values, best.number + 1, best.value, [trial.number + 1 for trial in other])
    history.set_xlabel("trial")
    history.legend(fontsize=8, frameon=False)

    for axis, (key, domain) in zip(slices, space.items()):
        if isinstance(domain, Choice):
            # Side by side where many fall on one place; the same spread in every picture.
            spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(trials))
            places = {
                trial.number: domain.values.index(trial.parameters[key]) + shift for trial, shift in zip(trials, spread)
            }
            axis.set_xticks(range(len(domain.values)), [text(value) for value in domain.values])
            axis.set_xlim(-0.5, len(domain.values) - 0.5)
            if sum(len(text(value)) for value in domain.values) > 30:
                axis.tick_params("x", rotation=30)
        else:
            places = {trial.number: trial.parameters[key] for trial in trials}
            if domain.logarithmic:
                axis.set_xscale("log")
                if domain.high < 100 * domain.low:  # too few powers of ten to read by
                    ticks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5)]
                    ticks = [tick for tick in ticks if domain.low <= tick <= domain.high]
                    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                    axis.minorticks_off()
        _dots(
            axis,
            [places[trial.number] for trial in done],
            values,
            places[best.number],
            best.value,
            [places[trial.number] for trial in other],
        )
        axis.set_xlabel(key)
    for axis in slices[len(space) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel(f"{metric} ({'lower' if goal == 'min' else 'higher'} is better)", fontsize=8)
    for path in paths:
        figure.savefig(path, dpi=120)
    plt.close(figure)


def _dots(axis, places, values, best, value, without) -> None:
    axis.scatter(places, values, s=16, color=_DONE, alpha=0.7, linewidths=0, clip_on=False)
    axis.scatter([best], [value], s=110, marker="*", color=_BEST, zorder=3)
    if without:
        axis.plot(without, [0.02] * len(without), "|", color=_OTHER, transform=axis.get_xaxis_transform())
    axis.spines[["top", "right"]].set_visible(False)
