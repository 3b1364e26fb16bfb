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
from vmm.errors import UserError
from vmm.layers import Dense, Positions, Stack
from vmm.objectives.overlap import box_overlap, interval_overlap
from vmm.types import Batch, Outputs, Tokens

_RARE = -math.log(99.0)  # logit of 0.01: at first nearly nothing happens (Lin et al. 2017, sec. 4.1)
_SHORT = -1.5  # logit of the share of the window that a distance has at first, 0.18


def resampling(count: int, steps: int) -> np.ndarray:
    """Returns weights [steps count] from `count` steps that cover a window to `steps` that cover it too.

    A triangle around each new step, as wide as the coarser of both steps: linear interpolation, or its mean where there
    are fewer new ones. Rows are not of sum 1: who uses them divides by what was there.
    """
    new, old = (np.arange(steps) + 0.5) / steps, (np.arange(count) + 0.5) / count
    return np.maximum(0.0, 1.0 - np.abs(new[:, None] - old) / max(1 / count, 1 / steps)).astype(np.float32)


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


class Localise(nn.Module):
    """Events of the window: their kind, start and end, and, where known, their box and who takes part.

    Anchor-free, one scale of time (ActionFormer, Zhang et al. 2022, without its pyramid): the fused tokens of each
    stream become a line of `steps` steps over the window, the lines' mean goes through Transformer layers over time,
    and each step says how sure it is of each kind of event, how far its start and end are, its box, its participants.
    At each of its own steps a stream is looked at by `points` soft spotlights over the rest of its grid (rows and
    columns, mel bands), of which content, middle and spread are told: a mean alone would lose the place.

    classes, participants: kinds of both, as data.targets has them; participants 0: not asked. seconds: of the window, as
    data.clip.seconds. events: name in data.targets. view, weight: see Recipe. streams: those of the trunk that have time;
    each is taken to cover the whole window.
    width, depth, heads, ratio, positions, block, scan, remat: of the layers over time.
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

    needs_hidden = False  # whether predict speaks of hidden tokens, and so needs a view that hides some

    @property
    def times(self) -> np.ndarray:
        """Seconds of the steps' middles [steps]."""
        return ((np.arange(self.steps) + 0.5) * self.seconds / self.steps).astype(np.float32)

    def _check(self, outputs: Outputs) -> list[str]:
        if min(self.classes, self.steps, self.points) < 1 or self.participants < 0 or self.seconds <= 0:
            raise UserError(
                f"localise: classes {self.classes}, steps {self.steps}, points {self.points} are at least 1, "
                f"seconds {self.seconds} above 0, participants {self.participants} not below 0"
            )
        if self.radius < 0.5:
            raise UserError(f"localise: radius {self.radius} steps; below 0.5 some events would have no step")
        unknown = [name for name in self.streams if name not in ("video", "audio")]
        if unknown:
            raise UserError(f"localise: streams names {unknown[0]!r}, which has no time; take of video, audio")
        names = [name for name in self.streams if name in outputs.fused]
        if not names:
            raise UserError(f"localise: streams {self.streams}, but the trunk has {sorted(outputs.fused)}")
        if all(outputs.patches[name].grid[0] < 2 for name in names):
            grids = {name: outputs.patches[name].grid for name in names}
            raise UserError(
                f"localise: grids {grids} have one step of time; give the encoders a shorter tubelet or patch"
            )
        return names

    def _line(
        self, name: str, tokens: Tokens, grid: tuple
    ) -> tuple[Float[Array, "B steps W"], Float[Array, "B steps"]]:
        """Returns one stream's time line, and how much of each step is there."""
        batch, width, (count, *rest) = len(tokens.x), tokens.x.shape[-1], grid
        places = math.prod(rest)
        # Back to the whole grid. Registers have no place, and go beyond its end.
        at = jnp.where(tokens.valid & (tokens.at >= 0), tokens.at, count * places)

        def scatter(x, at):
            return jnp.zeros((count * places, *x.shape[1:]), x.dtype).at[at].set(x, mode="drop")

        x = jax.vmap(scatter)(jnp.where(tokens.valid[..., None], tokens.x, 0), at).reshape(batch, count, places, width)
        there = jax.vmap(scatter)(tokens.valid, at).reshape(batch, count, places)
        seen = x[:, :, 0]
        if places > 1:
            # No bias: it would change nothing of a softmax over places.
            logits = Dense((self.points,), ("embed", None), bias=False, name=f"{name}_look")(x).astype(jnp.float32)
            light = jax.nn.softmax(jnp.where(there[..., None], logits, -1e9), axis=2) * there[..., None]
            content = jnp.einsum("btsp,btsd->btpd", light.astype(x.dtype), x)
            spots = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n for n in rest), indexing="ij"), -1)
            spots = spots.reshape(places, len(rest)).astype(np.float32)
            middle = jnp.einsum("btsp,sc->btpc", light, spots)
            square = jnp.einsum("btsp,sc->btpc", light, spots**2)
            spread = jnp.sqrt(jnp.maximum(square - middle**2, 1e-6))
            parts = [part.reshape(batch, count, -1) for part in (content, middle, spread)]
            seen = jnp.concatenate([part.astype(x.dtype) for part in parts], axis=-1)
        y = Dense((self.width,), (None, "embed"), name=f"{name}_enter")(seen)
        told, weights = there.any(2).astype(jnp.float32), resampling(count, self.steps)
        total = jnp.einsum("jt,btd->bjd", weights, y.astype(jnp.float32) * told[..., None])
        share = told @ weights.T
        return total / jnp.maximum(share, 1e-6)[..., None], (share > 0).astype(jnp.float32)

    @nn.compact
    def _tell(self, outputs: Outputs) -> dict:
        """Returns of each step: logits [B steps Y], segments [B steps 2] in seconds, boxes, participants (logits).

        FLOPs forward a sample: for each stream of N tokens in t steps, with p points over a axes, 4 N p (D + a) + 2 t p
        (D + 2 a) W + 2 steps t (W + 1), 2 t D W + … where there are none; then depth · block(steps, W) + 2 steps W (Y + 6 + P).
        """
        names = self._check(outputs)
        lines = [self._line(name, outputs.fused[name], outputs.patches[name].grid) for name in names]
        count = sum(there for _, there in lines)
        x = sum(line * there[..., None] for line, there in lines) / jnp.maximum(count, 1.0)[..., None]
        x = x.astype(outputs.fused[names[0]].x.dtype)
        at = jnp.broadcast_to(jnp.arange(self.steps, dtype=jnp.int32), x.shape[:2])
        x = Positions(self.positions, name="positions")(x, at, (self.steps,))
        stack = Stack(self.depth, self.heads, self.ratio, self.scan, self.remat, self.block, name="stack")
        x = stack(x, count > 0).astype(jnp.float32)

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
        there = self._there(outputs)[:, None, None]
        result = {"scores": jnp.where(there, jax.nn.sigmoid(told["scores"]), 0.0)}
        result["segments"] = jnp.clip(told["segments"], 0.0, self.seconds)
        if "boxes" in told:
            result["boxes"] = jnp.clip(told["boxes"], 0.0, 1.0)
        if "participants" in told:
            result["participants"] = jax.nn.sigmoid(told["participants"])
        return result | {"seconds": jnp.full(len(there), self.seconds, jnp.float32)}

    def _there(self, outputs: Outputs) -> Bool[Array, "B"]:
        streams = [tokens for name, tokens in outputs.fused.items() if name in self.streams]
        return jnp.stack([(tokens.valid & (tokens.at >= 0)).any(1) for tokens in streams]).any(0)

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample the sums of errors and how many steps they are of: name → {"error": [B], "count": [B]}.

        scores: the focal loss of all steps, counted by those that tell of an event; time, box, participants: of these
        alone, the latter two where known; overlap, box_overlap: IoU with the truth.
        """
        truth = self._truth(batch)
        told = self._tell(outputs)
        use = truth["known"] & batch.valid & self._there(outputs)
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

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple:
        return self.loss(self.features(outputs, batch))


def _known(values: Float[Array, "B N n"]) -> tuple[Float[Array, "B N n"], Bool[Array, "B N"]]:
    """Returns the values, 0 where they are not a number, and which rows are numbers throughout."""
    number = jnp.isfinite(values)
    return jnp.where(number, values, 0.0), number.all(-1)
