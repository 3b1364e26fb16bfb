"""When, where and with whom something happens: at each step of a time line, what happens there, and its extent."""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vmm import losses
from vmm.data.spec import DataSpec
from vmm.errors import UserError
from vmm.layers import Dense
from vmm.objectives.base import Objective
from vmm.objectives.line import TimeLine, check_window, have_time
from vmm.objectives.overlap import box_overlap, interval_overlap
from vmm.types import Batch, Outputs

_RARE = -math.log(99.0)  # logit of 0.01: at first nearly nothing happens (Lin et al. 2017, sec. 4.1)
_SHORT = -1.5  # logit of the share of the window that a distance has at first, 0.18


def assign(
    start: Float[Array, "B K"], end: Float[Array, "B K"], there: Bool[Array, "B K"], times: np.ndarray, radius: float
) -> Bool[Array, "B N K"]:
    """Returns which steps speak for which events: those inside, at most `radius` steps from the middle.

    An event shorter than a step has the nearest one. times: seconds [N] of the steps' middles, evenly apart.
    """
    step = 2 * times[0]
    half = jnp.maximum(0.5 * (end - start), 0.5 * step)
    reach = jnp.minimum(half, radius * step) * (1 + 1e-5)
    apart = jnp.abs(times[:, None] - 0.5 * (start + end)[:, None, :])
    return (apart <= reach[:, None, :]) & there[:, None, :]


class Localise(Objective):
    """Events of the window: their kind, start and end, and, where known, their box and who takes part.

    Anchor-free, one scale of time (ActionFormer, Zhang et al. 2022, without its pyramid): each step of a time line
    (line.TimeLine) says how sure it is of each kind of event, how far its start and end are, its box, its participants.

    classes, participants: kinds of both, as data.targets has them; participants 0: not asked. seconds: of the window, as
    data.clip.seconds. events: name in data.targets. view, weight: see Recipe. streams, steps, points
    and width … remat: of the time line.
    radius: steps from an event's middle that are trained to tell of it, of those within it. boxes: whether boxes are asked.
    alpha, gamma: of the focal loss. time_weight, box_weight, participants_weight: of these losses beside it.
    """

    classes: int
    seconds: float
    participants: int = 0
    events: str = "events"
    view: str = "clean"
    weight: float = 1.0
    streams: tuple[str, ...] = ("video", "audio")
    steps: int = 32
    width: int = 128
    depth: int = 2
    heads: int = 4
    ratio: float = 4.0
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)
    scan: bool = False
    remat: bool | str = False
    points: int = 4
    radius: float = 1.5
    boxes: bool = True
    alpha: float = 0.25
    gamma: float = 2.0
    time_weight: float = 1.0
    box_weight: float = 1.0
    participants_weight: float = 1.0

    def check(self, where: str, data: DataSpec) -> None:
        """Raises UserError where windows, classes or boxes are not the data's."""
        check_window(where, self.seconds, data)
        target = data.targets.get(self.events, {})
        if target.get("kind") != "events":
            return
        for key, value in {"participants": 0, **target}.items():
            if key in ("classes", "participants") and getattr(self, key) != value:
                raise UserError(
                    f"{where}.{key}: {getattr(self, key)}, but data.targets.{self.events}.{key} is {value}; give both the "
                    "same"
                )
        if self.boxes and data.moves_pixels:
            raise UserError(
                f"data.augment, data.clip.crop: flip, area and crop move what is seen, and not the boxes of {where}; take them out, or set its "
                "boxes=False"
            )

    @property
    def times(self) -> np.ndarray:
        """Seconds of the steps' middles [steps]."""
        return ((np.arange(self.steps) + 0.5) * self.seconds / self.steps).astype(np.float32)

    def _check(self) -> None:
        if self.classes < 1 or self.participants < 0 or self.seconds <= 0:
            raise UserError(
                f"localise: classes {self.classes} is at least 1, seconds {self.seconds} above 0, participants "
                f"{self.participants} not below 0"
            )
        if self.radius < 0.5:
            raise UserError(f"localise: radius {self.radius} steps; below 0.5 some events would have no step")

    @nn.compact
    def _tell(self, outputs: Outputs) -> dict:
        """Returns of each step: logits [B steps Y], segments [B steps 2] in seconds, boxes, participants (logits).

        FLOPs forward a sample: those of the line, and 2 steps W (Y + 6 + P).
        """
        self._check()
        line = TimeLine(
            self.streams, self.steps, self.width, self.depth, self.heads, self.ratio, self.positions, self.block,
            self.scan, self.remat, self.points, name="line",
        )  # fmt: skip
        x = line(outputs, "localise")

        def head(name, size):
            return Dense((size,), ("embed", None), name=name)(x)

        # A distance is within the window, as events are cut to it.
        reach = self.seconds * jax.nn.sigmoid(head("reach", 2) + _SHORT)
        times = self.times[:, None]
        result = {
            "scores": head("scores", self.classes) + _RARE,
            "segments": jnp.concatenate([times - reach[..., :1], times + reach[..., 1:]], axis=-1),
        }
        if self.boxes:
            middle, size = jnp.split(jax.nn.sigmoid(head("box", 4)), 2, axis=-1)
            result["boxes"] = jnp.concatenate([middle - 0.5 * size, middle + 0.5 * size], axis=-1)
        if self.participants:
            result["participants"] = head("participants", self.participants)
        return result

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns of each step: scores float32 [B steps Y] in [0, 1], segments [B steps 2] (start, end in seconds of the
        window), boxes [B steps 4] (left, top, right, bottom in [0, 1]), participants [B steps P] in [0, 1]; and seconds
        [B] of the window. Scores are 0 where the sample has none of the streams.
        """
        told = self._tell(outputs)
        there = have_time(outputs, self.streams)[:, None, None]
        result = {"scores": jnp.where(there, jax.nn.sigmoid(told["scores"]), 0.0)}
        result["segments"] = jnp.clip(told["segments"], 0.0, self.seconds)
        if "boxes" in told:
            result["boxes"] = jnp.clip(told["boxes"], 0.0, 1.0)
        if "participants" in told:
            result["participants"] = jax.nn.sigmoid(told["participants"])
        return result | {"seconds": jnp.full(len(there), self.seconds, jnp.float32)}

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample the sums of errors and how many steps they are of: name → {"error": [B], "count": [B]}.

        scores: the focal loss of all steps, counted by those that tell of an event; time, box, participants: of these
        alone, the latter two where known; overlap, box_overlap: IoU with the truth.
        """
        truth = self._truth(batch)
        told = self._tell(outputs)
        use = truth["known"] & batch.valid & have_time(outputs, self.streams)
        there = (truth["label"] >= 0) & use[:, None]
        mine = assign(truth["start"], truth["end"], there, self.times, self.radius)
        kinds = jax.nn.one_hot(truth["label"], self.classes)  # of −1: zeros
        target = (mine[..., None] * kinds[:, None]).max(2)
        error = losses.focal(told["scores"], target, self.alpha, self.gamma).sum((1, 2))
        # Where events overlap, a step tells the extent of the shortest.
        length = jnp.where(mine, (truth["end"] - truth["start"])[:, None], jnp.inf)
        own, tells = length.argmin(2), mine.any(2)

        def of_own(values: Float[Array, "B K *n"]) -> Float[Array, "B N *n"]:
            return jnp.take_along_axis(values, own.reshape(*own.shape, *(1,) * (values.ndim - 2)), axis=1)

        def sums(values: Float[Array, "B N"], where: Bool[Array, "B N"]) -> dict:
            return {
                "error": jnp.where(where, values, 0.0).sum(1),
                "count": where.sum(1).astype(jnp.float32),
            }

        share, distance = interval_overlap(told["segments"], of_own(jnp.stack([truth["start"], truth["end"]], -1)))
        result = {
            "scores": {"error": jnp.where(use, error, 0.0), "count": tells.sum(1).astype(jnp.float32)},
            "time": sums(1 - distance, tells),
            "overlap": sums(share, tells),
        }
        if self.boxes:
            box, known = _known(of_own(truth["box"]))
            share, general = box_overlap(told["boxes"], box)
            result["box"] = sums(jnp.abs(told["boxes"] - box).sum(-1) + 1 - general, tells & known)
            result["box_overlap"] = sums(share, tells & known)
        if self.participants:
            who, known = _known(of_own(truth["participants"]))
            # Without focus and balance half of the focal loss's cross-entropy.
            errors = 2 * losses.focal(told["participants"], who, 0.5, 0.0).mean(-1)
            result["participants"] = sums(errors, tells & known)
        return result

    def _truth(self, batch: Batch) -> Mapping:
        truth = batch.targets.get(self.events)
        if not isinstance(truth, Mapping) or "box" not in truth:
            raise UserError(
                f"localise: no events in data.targets.{self.events}; name them there, as "
                f'{{"kind": "events", "classes": {self.classes}}}'
            )
        if self.participants and truth["participants"].shape[-1] != self.participants:
            raise UserError(
                f"localise: {self.participants} kinds of participants, but data.targets.{self.events} has "
                f"{truth['participants'].shape[-1]}; give both the same"
            )
        return truth

    def loss(self, features: dict) -> tuple:
        """Returns the weighted sum of the errors, each a mean over its steps of the global batch; and each of them."""
        _, means = losses.mean_error(features)
        total = means["scores"] + self.time_weight * means["time"]
        if self.boxes:
            total += self.box_weight * means["box"]
        if self.participants:
            total += self.participants_weight * means["participants"]
        return total, means


def _known(values: Float[Array, "B N n"]) -> tuple[Float[Array, "B N n"], Bool[Array, "B N"]]:
    """Returns the values, 0 where they are not a number, and which rows are numbers throughout."""
    number = jnp.isfinite(values)
    return jnp.where(number, values, 0.0), number.all(-1)
