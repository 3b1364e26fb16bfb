"""Pictures that a pixels objective makes against the true ones: PSNR and SSIM, beside copies of what was shown."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vmm.errors import UserError, one_of
from vmm.evals.classification import objectives_of
from vmm.evals.scored import Measured, Measuring, Scored

# What an objective of kind "pixels" scores → its name in the table.
WHO = {"made": "model", "nearest": "nearest", "blend": "blend"}
METRICS = {"psnr": "PSNR", "ssim": "SSIM"}


@dataclasses.dataclass(frozen=True)
class Pictures(Measuring):
    """PSNR in decibels and SSIM of a clip's predicted frames, means over frames and then over clips.

    Of the model, and of what needs none: `nearest`, a copy of the nearest shown frame, the earlier of two; `blend`, the
    two nearest weighted by time. "over nearest", "over blend": how much the model is better, with the interval of the
    difference within clips. Where the view adds noise, both are the noisy frame. Frames that are the same have 100 dB.

    data: manifest. objective: name of the pixels objective in the config. view: that it reads. subsets: keys of
    types.SUBSETS, those of them that name streams the model has; "VAT": all it has.
    """

    hub_task = ("video-to-video", "Frames of clips")
    scores_pictures = True

    asks = True

    data: str
    objective: str = "frames"
    view: str = "frames"
    subsets: tuple[str, ...] = ("VAT",)

    def measure(self, predict: Callable, prepared: Any) -> Measured:
        """Returns the scores under "who/metric"; with several subsets "subset who/metric"."""
        scored, notes = [], {}
        for subset in self.subsets:
            rows = predict.ask(self.data, subset, "predict", view=self.view)
            if rows is None:
                continue
            means, use, frames = self._means(rows)
            notes |= {"clips": int(len(np.unique(rows["row"][use]))), "frames": frames}
            for who, values in means.items():
                name = who if len(self.subsets) == 1 else f"{subset} {who}"
                scored.append(Scored(name, self.data, subset, rows["row"][use], values))
        return Measured(scored, notes)

    def _means(self, rows: Mapping) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray, int]:
        """Returns (who → metric → mean over each row's predicted frames, which rows have any, how many frames)."""
        if f"{self.objective}/psnr/made" not in rows:
            known = {name for name in objectives_of(rows) if f"{name}/psnr/made" in rows}
            raise UserError(
                f"evals (kind 'pictures'): no pixels objective {self.objective!r} reads the view {self.view!r}; "
                f"{one_of(self.objective, known)}"
            )
        share = rows[f"{self.objective}/share"] * (rows[f"{self.objective}/share"] > 0)
        use = share.any(1) & rows.get("present/video", np.ones(len(share), bool))
        weight = (share[use] > 0).astype(np.float64)
        means: dict[str, dict[str, np.ndarray]] = {}
        for key, who in WHO.items():
            means[who] = {
                metric: (rows[f"{self.objective}/{name}/{key}"][use] * weight).sum(1) / weight.sum(1)
                for name, metric in METRICS.items()
            }
        for who in ("nearest", "blend"):
            means[f"over {who}"] = {metric: means["model"][metric] - means[who][metric] for metric in METRICS.values()}
        return means, use, int(weight.sum())


def sheet(pictures: Mapping[str, np.ndarray], clips: Sequence[int], gap: int = 2) -> np.ndarray:
    """Returns one picture uint8 [H W 3]: for each clip a row each of truth, made, blend and nearest, its frames in a line.

    pictures: from Pixels.pictures, [B T H W 3] in 0 … 255. clips: which of them. gap: white lines between rows.
    """
    rows = []
    for clip in clips:
        for name in ("truth", "made", "blend", "nearest"):
            row = np.concatenate(list(np.asarray(pictures[name][clip])), axis=1)
            rows += [row, np.full((gap, *row.shape[1:]), 255.0)]
        rows.append(np.full((2 * gap, *rows[0].shape[1:]), 255.0))
    return np.concatenate(rows[:-2]).astype(np.uint8)
