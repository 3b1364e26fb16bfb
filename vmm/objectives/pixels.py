"""Whole pictures from the others of a clip: frames between, frames to come, frames without their noise.

What the view hides is first filled from what it shows at the same place, blended by time; a decoder then says how to
blend instead, and what to add. So an untrained model is the blend, and training can only gain on it.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from vmm import losses
from vmm.build import make
from vmm.errors import UserError, one_of
from vmm.layers import Dense, Positions, Stack, as_float, gather, vector
from vmm.objectives.adversary import Adversary
from vmm.objectives.base import Objective, Prediction
from vmm.objectives.likeness import charbonnier, decibels, edge_error, psnr, ssim
from vmm.types import Batch, Outputs

ERRORS = {
    "charbonnier": charbonnier,
    "l1": lambda prediction, target: jnp.abs(prediction - target).mean(-1),
    "l2": losses.squared_error,
}


def neighbours(
    values: Float[Array, "B N P"], seen: Bool[Array, "B N"], steps: int, frames: int
) -> tuple[Float[Array, "B N P"], Float[Array, "B N P"], Float[Array, "B N P"]]:
    """Returns, of every pixel, its value in the nearest seen frame before and in that after, and the share of the latter.

    A frame that is seen is its own neighbour on both sides; where one side has none the other stands for both, where
    no frame is seen at that place, zero. The share grows linearly from one to the other.

    Args:
      values: tubelets, of which the frames come first among the values. seen: which of them may be used.
      steps: of the grid's first axis. frames: of one tubelet.
    """
    split = "b (t s) (p r) -> b (t p) s r"
    x = rearrange(values, split, t=steps, p=frames)
    there = jnp.repeat(rearrange(seen, "b (t s) -> b t s", t=steps), frames, axis=1)
    count = steps * frames
    now = jnp.arange(count)[:, None]
    before = jax.lax.cummax(jnp.where(there, now, -1), axis=1)
    after = jax.lax.cummin(jnp.where(there, now, count), axis=1, reverse=True)
    any_before, any_after = before >= 0, after < count
    first = jnp.where(any_before, before, jnp.where(any_after, after, 0))
    last = jnp.where(any_after, after, first)
    share = (now - first) / jnp.maximum(last - first, 1)
    share = jnp.where(last > first, share, 0.0)[..., None]
    some = (any_before | any_after)[..., None]

    def back(x):
        return rearrange(x, "b (t p) s r -> b (t s) (p r)", t=steps, p=frames)

    def at(place):
        return back(jnp.where(some, jnp.take_along_axis(x, place[..., None], axis=1), 0.0))

    return at(first), at(last), back(jnp.broadcast_to(share, x.shape))


class Pixels(Objective):
    """Pictures of the frames that the view hides, or, where it adds noise, of all frames without it.

    view, weight: see Recipe. The view hides tokens of the video (masks of kind "frames": whole ones), or has `noise`.
    tubelet: that of the video encoder. width, depth, heads, ratio, positions, block, scan, remat: of the decoder, which
    works on the whole grid; a place that is hidden enters as a learned vector. Every place also enters with the pixels
    of its neighbours in time. context: streams whose shown tokens the decoder sees besides.
    error: of a hidden tubelet's pixels, in −1 … 1: "charbonnier", "l1" or "l2". similarity: weight of 1 − SSIM, edges:
    weight of edge_error, both of frames with something hidden. adversary: fields of Adversary; {}: none.
    """

    view: str = "frames"
    weight: float = 1.0
    tubelet: tuple[int, int, int] = (1, 8, 8)
    width: int = 128
    depth: int = 2
    heads: int = 4
    ratio: float = 4.0
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)
    context: tuple[str, ...] = ()
    error: str = "charbonnier"
    similarity: float = 0.0
    edges: float = 0.0
    adversary: Mapping = dataclasses.field(default_factory=dict)
    scan: bool = False
    remat: bool | str = False

    needs_hidden = True

    def prediction(self, key: str, tags: Collection[str]) -> Prediction:
        """Scores of other pictures have no mean."""
        return Prediction("none", "scores of its own pictures")

    def _check(self, outputs: Outputs) -> None:
        if self.error not in ERRORS:
            raise UserError(f"pixels: unknown error {self.error!r}; {one_of(self.error, ERRORS)}")
        if "video" not in outputs.patches:
            raise UserError(f"pixels: predicts the video, but the trunk has {sorted(outputs.patches)}")
        size = outputs.patches["video"].values.shape[-1]
        if size != 3 * math.prod(self.tubelet):
            raise UserError(
                f"pixels: tubelet {self.tubelet} has {3 * math.prod(self.tubelet)} values, but a video token has {size}; "
                "give it the video encoder's tubelet"
            )
        if not ("video" in outputs.masks or "video" in outputs.clean):
            raise UserError(
                f"pixels: the view {self.view!r} shows the whole video as it is; give views.{self.view}.video a mask of "
                'kind "frames", or noise'
            )
        for name in self.context:
            if name not in outputs.fused:
                raise UserError(f"pixels: context names {name!r}, but the trunk has {sorted(outputs.fused)}")

    @nn.compact
    def _paint(self, outputs: Outputs, judge: bool = False) -> dict:
        """Returns tubelets [B N P] in −1 … 1: truth, made, blend, nearest; and bool [B N] which are predicted, `scored`.

        judge: where there is an adversary, also its losses [B T], `critic` and `fooled`.

        FLOPs forward: 2 K D_in D + 4 N P D + depth · block(N, D) + 8/3 N P D (under noise 10/3), with K shown tokens of N.
        """
        self._check(outputs)
        patches, shown, mask = outputs.patches["video"], outputs.fused["video"], outputs.masks.get("video")
        batch, count = patches.valid.shape
        x = Dense((self.width,), ("embed", None), name="enter")(shown.x)
        at, seen = shown.at, shown.valid
        if mask is not None:
            blank = vector(self, "mask", (self.width,)).astype(x.dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(blank, (*mask.hidden.shape, self.width))], axis=1)
            at = jnp.concatenate([at, mask.hidden], axis=1)
            seen = jnp.concatenate([seen, jnp.zeros(mask.hidden.shape, bool)], axis=1)
        # In the order of the grid; registers, of no place, come first and go.
        order = jnp.argsort(at, axis=1)[:, at.shape[1] - count :]
        x, seen = gather(x, order), gather(seen, order)
        given = as_float(patches.values)
        before, after, share = neighbours(given, seen, patches.grid[0], self.tubelet[0])
        known = jnp.concatenate([before, after], axis=-1).astype(x.dtype)
        x = x + Dense((self.width,), (None, "embed"), name="known")(known)
        place = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
        streams = [Positions(self.positions, name="positions")(x, place, patches.grid)]
        valid = [patches.valid]
        for name in self.context:
            tokens = outputs.fused[name]
            y = Dense((self.width,), ("embed", None), name=f"enter_{name}")(tokens.x)
            y = y + vector(self, f"modality_{name}", (self.width,)).astype(y.dtype)
            streams.append(
                Positions(self.positions, name=f"positions_{name}")(y, tokens.at, outputs.patches[name].grid)
            )
            valid.append(tokens.valid)
        x, valid = jnp.concatenate(streams, axis=1), jnp.concatenate(valid, axis=1)
        x = Stack(self.depth, self.heads, self.ratio, self.scan, self.remat, self.block, name="stack")(x, valid)
        size = given.shape[-1]
        noisy = "video" in outputs.clean
        # Zero at first: then what is made is the blend. Numbers of a pixel are one for its three colours.
        head = Dense((size + size // 3 * (2 if noisy else 1),), ("embed", None), zero=True, name="head")
        more, turn, *less = jnp.split(
            head(x[:, :count].astype(jnp.float32)), [size, size + size // 3][: 1 + noisy], axis=-1
        )
        odds = jnp.log(jnp.maximum(share, 1e-6)) - jnp.log(jnp.maximum(1 - share, 1e-6))
        mixed = jax.nn.sigmoid(odds + jnp.repeat(turn, 3, axis=-1))
        mixed = before + jnp.where(share > 0, mixed, 0.0) * (after - before)
        # The noise of a patch has more numbers than the decoder is wide: it cannot be taken away, but left out.
        made = mixed * (1 - sum(jnp.repeat(part, 3, axis=-1) for part in less)) + more
        truth = as_float(outputs.clean["video"].values) if noisy else given
        scored = patches.valid & (~seen | noisy)

        def fill(values):
            return jnp.where(scored[..., None], values, truth)

        painted = {
            "truth": truth,
            "made": fill(made),
            "blend": fill(before + share * (after - before)),
            "nearest": fill(jnp.where(share > 0.5, after, before)),
            "scored": scored,
        }
        if judge and self.adversary:
            adversary = make(Adversary, self.adversary, "pixels: adversary", name="adversary")
            pictures = (self._pictures(painted[name], outputs) for name in ("truth", "made"))
            painted["critic"], painted["fooled"] = adversary(*pictures)
        return painted

    def _pictures(self, values: Array, outputs: Outputs) -> Float[Array, "B T H W C"]:
        (t, h, w), (p, q, r) = outputs.patches["video"].grid, self.tubelet
        split = "b (t h w) (p q r c) -> b (t p) (h q) (w r) c"
        return rearrange(values, split, t=t, h=h, w=w, p=p, q=q, r=r)

    def _pixels(self, painted: Mapping, outputs: Outputs) -> dict:
        return {
            name: jnp.round(jnp.clip((self._pictures(painted[name], outputs) + 1) * 127.5, 0, 255))
            for name in ("truth", "made", "blend", "nearest")
        }

    def _scored_frames(self, scored: Bool[Array, "B N"], outputs: Outputs) -> Float[Array, "B T"]:
        """Returns the share of each frame's places that are predicted."""
        steps = rearrange(scored, "b (t s) -> b t s", t=outputs.patches["video"].grid[0])
        return jnp.repeat(steps.astype(jnp.float32).mean(2), self.tubelet[0], axis=1)

    def pictures(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns truth, made, blend and nearest as pixels 0 … 255, rounded, float32 [B T H W 3]; what is shown is true."""
        return self._pixels(self._paint(outputs), outputs)

    def predict(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns scores of each frame against the true one, float32 [B T], not the frames: those would fill the memory.

        `psnr/made` (decibels) and `ssim/made`; the same of `blend` and `nearest`, what the view's own frames give without
        a model (where it adds noise, both are the noisy frame). `share`: of a frame's places that are predicted; the
        others are true.
        """
        painted = self._paint(outputs)
        pictures = self._pixels(painted, outputs)
        result = {"share": self._scored_frames(painted["scored"], outputs)}
        for name in ("made", "blend", "nearest"):
            result[f"psnr/{name}"] = psnr(pictures[name], pictures["truth"])
            result[f"ssim/{name}"] = ssim(pictures[name], pictures["truth"])
        return result

    def features(self, outputs: Outputs, batch: Batch) -> dict:
        """Returns per sample the sums of errors over what is predicted, and their number: name → {"error", "count"}."""
        painted = self._paint(outputs, judge=True)
        scored = (painted["scored"] & batch.valid[:, None]).astype(jnp.float32)

        def tokens(error):
            return {"error": (error * scored).sum(1), "count": scored.sum(1)}

        result = {"error": tokens(ERRORS[self.error](painted["made"], painted["truth"]))}
        for name in ("made", "blend"):
            result[name] = tokens(losses.squared_error(painted[name], painted["truth"]))
        if not (self.similarity or self.edges or self.adversary):
            return result
        truth, made = (self._pictures(painted[name], outputs) for name in ("truth", "made"))
        there = (self._scored_frames(painted["scored"], outputs) > 0) & batch.valid[:, None]

        def frames(error):
            return {"error": (error * there).sum(1), "count": there.sum(1).astype(jnp.float32)}

        if self.similarity:
            result["similarity"] = frames(1 - ssim(made + 1, truth + 1, peak=2.0))
        if self.edges:
            result["edges"] = frames(edge_error(made, truth))
        for name in ("critic", "fooled") if self.adversary else ():
            result[name] = frames(painted[name])
        return result

    def loss(self, features: dict) -> tuple:
        """Returns the weighted sum of mean errors of the global batch, and each; PSNRs in decibels, of all pixels at once."""
        _, means = losses.mean_error(features)
        made, blend = means.pop("made"), means.pop("blend")
        total = means["error"]
        for name, weight in (("similarity", self.similarity), ("edges", self.edges), ("critic", 1.0)):
            total += weight * means.get(name, 0.0)
        if "fooled" in means:
            total += make(Adversary, self.adversary, "pixels: adversary", parent=None).weight * means["fooled"]
        return total, means | {"psnr": decibels(made, 2.0), "psnr_blend": decibels(blend, 2.0)}
