"""Adversarial perturbation: the loss also under a small change of the encoded streams that raises it most."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmm.errors import UserError, one_of
from vmm.settings import setting


@dataclasses.dataclass(frozen=True)
class Adversary:
    """What is added to the loss: weight · loss(streams + δ), δ as in `ascend` (Miyato et al. 2017; VILLA, Gan et al. 2020).

    Changed are the encoded streams, what the fusion is given: encoders run once, fusion and heads again, once more for
    each step, and both gradients reach every encoder.
    """

    epsilon: float = setting(
        1.0,
        "Norm of δ, for each sample and stream; one of N normed tokens of width D has itself about √(N D), so "
        "a share s of it is s √(N D).",
    )
    steps: int = setting(1, "Steps of ascent.")
    weight: float = setting(1.0, "Of the added loss.")
    modalities: tuple[str, ...] = setting((), "Streams that are changed; (): all.")


def check(adversary: Adversary, encoders: Mapping, accumulate: int) -> None:
    """Raises UserError where a field is wrong, or the loss is computed in parts."""
    if adversary.epsilon < 0 or adversary.steps < 1 or adversary.weight <= 0:
        raise UserError(
            f"adversary: epsilon is at least 0, steps at least 1 and weight above 0; got {adversary.epsilon}, "
            f"{adversary.steps} and {adversary.weight}"
        )
    for name in adversary.modalities:
        if name not in encoders:
            raise UserError(f"adversary.modalities: {name!r} is no stream of the trunk; {one_of(name, encoders)}")
    if accumulate > 1:
        raise UserError(
            f"adversary: knows no accumulation, which needs the whole batch's streams at once; set optim.accumulate to 1, "
            f"not {accumulate}, and a smaller batch or `remat`"
        )


def unit(gradient: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """Returns each sample's gradient at norm 1, float32; 0 stays 0."""
    gradient = gradient.astype(jnp.float32)
    # By the largest first: squares of small gradients would vanish.
    largest = jnp.abs(gradient).max((1, 2), keepdims=True)
    scaled = gradient / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.sqrt(jnp.square(scaled).sum((1, 2), keepdims=True))
    return scaled / jnp.where(largest > 0, norm, 1.0)


def ascend(loss: Callable, streams, adversary: Adversary):
    """Returns δ, float32, shaped as `streams` (a tree of [B N D]); no gradient flows through it.

        δ ← δ + (ε / steps) ∇loss(δ) / ‖∇loss(δ)‖,  from 0; each sample and stream by its own norm

    One step is the fast gradient method; more stay within ε. loss: δ → scalar.
    """
    change = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), streams)
    for _ in range(adversary.steps):
        step = adversary.epsilon / adversary.steps
        change = jax.tree.map(lambda c, g: c + step * unit(g), change, jax.grad(loss)(change))  # noqa: B023
    return jax.lax.stop_gradient(change)
