"""Streams → a line of steps over the window's time: what objectives look at that tell of moments."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vmm.data.spec import DataSpec
from vmm.errors import UserError
from vmm.layers import Dense, Positions, Stack
from vmm.types import Outputs, Tokens


def resampling(count: int, steps: int) -> np.ndarray:
    """Returns weights [steps count] from `count` steps that cover a window to `steps` that cover it too.

    A triangle around each new step, as wide as the coarser of both steps: linear interpolation, or its mean where there
    are fewer new ones. Rows are not of sum 1: who uses them divides by what was there.
    """
    new, old = (np.arange(steps) + 0.5) / steps, (np.arange(count) + 0.5) / count
    return np.maximum(0.0, 1.0 - np.abs(new[:, None] - old) / max(1 / count, 1 / steps)).astype(np.float32)


def have_time(outputs: Outputs, streams: Sequence[str]) -> Bool[Array, "B"]:
    """Returns which samples have any of the streams."""
    there = [tokens for name, tokens in outputs.fused.items() if name in streams]
    return jnp.stack([(tokens.valid & (tokens.at >= 0)).any(1) for tokens in there]).any(0)


def check_window(where: str, seconds: float, data: DataSpec) -> None:
    """Raises UserError where windows are not all of the length that an objective knows."""
    if set(data.seconds) != {seconds}:
        lengths = ", ".join(f"{length:g}" for length in data.seconds)
        raise UserError(
            f"{where}.seconds: {seconds}, but windows are of {lengths} s (data.clip, data.buckets); this objective knows "
            "one length, give it that"
        )


class TimeLine(nn.Module):
    """The fused tokens of each stream become a line of `steps` steps over the window; the lines' mean goes through
    Transformer layers over time.

    At each of its own steps a stream is looked at by `points` soft spotlights over the rest of its grid (rows and
    columns, mel bands), of which content, middle and spread are told: a mean alone would lose the place.

    streams: those of the trunk that have time; each is taken to cover the whole window. width, depth, heads, ratio,
    positions, block, scan, remat: of the layers over time.
    FLOPs forward a sample: for each stream of N tokens in t steps, with p points over a axes, 4 N p (D + a) + 2 t p
    (D + 2 a) W + 2 steps t (W + 1), 2 t D W + … where there are none; then depth · block(steps, W).
    """

    streams: tuple[str, ...]
    steps: int
    width: int
    depth: int
    heads: int
    ratio: float = 4.0
    positions: str = "sincos"
    block: Mapping = dataclasses.field(default_factory=dict)
    scan: bool = False
    remat: bool | str = False
    points: int = 4

    def _names(self, outputs: Outputs, kind: str) -> list[str]:
        if min(self.steps, self.points) < 1:
            raise UserError(f"{kind}: steps {self.steps}, points {self.points} are at least 1")
        unknown = [name for name in self.streams if name not in ("video", "audio")]
        if unknown:
            raise UserError(f"{kind}: streams names {unknown[0]!r}, which has no time; take of video, audio")
        names = [name for name in self.streams if name in outputs.fused]
        if not names:
            raise UserError(f"{kind}: streams {self.streams}, but the trunk has {sorted(outputs.fused)}")
        if all(outputs.patches[name].grid[0] < 2 for name in names):
            grids = {name: outputs.patches[name].grid for name in names}
            raise UserError(
                f"{kind}: grids {grids} have one step of time; give the encoders a shorter tubelet or patch"
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
    def __call__(self, outputs: Outputs, kind: str) -> Float[Array, "B steps W"]:
        """Returns the line, float32. kind: of the objective, for error lines.

        Raises:
          UserError: no stream of the trunk, one without time, or grids of one step.
        """
        names = self._names(outputs, kind)
        lines = [self._line(name, outputs.fused[name], outputs.patches[name].grid) for name in names]
        count = sum(there for _, there in lines)
        x = sum(line * there[..., None] for line, there in lines) / jnp.maximum(count, 1.0)[..., None]
        x = x.astype(outputs.fused[names[0]].x.dtype)
        at = jnp.broadcast_to(jnp.arange(self.steps, dtype=jnp.int32), x.shape[:2])
        x = Positions(self.positions, name="positions")(x, at, (self.steps,))
        stack = Stack(self.depth, self.heads, self.ratio, self.scan, self.remat, self.block, name="stack")
        return stack(x, count > 0).astype(jnp.float32)
