"""AdaLoRA's ranks while training: each step the triplets that count least, over all matrices, are set to zero."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vmm.adapters import KEY, AdaLora, adapters_of, layer_axes
from vmm.errors import UserError


class Allocation(NamedTuple):
    """State of `allocating`. mean, doubt: path of an adapter → its parameters' smoothed sensitivity, and how far that is off."""

    inner: Any
    count: Any
    mean: Any
    doubt: Any


def budget(adapter: AdaLora, whole: int, target: int, step, steps: int):
    """Returns how many triplets are kept after a step (AdaLoRA, eq. 12): all, then fewer by a cube, then the target.

    whole, target: of all matrices together. step: int32 [], from 1.
    """
    first, last = adapter.warmup * steps, (1 - adapter.settled) * steps
    share = jnp.clip((step - first) / (last - first), 0.0, 1.0)
    return jnp.round(target + (whole - target) * (1 - share) ** 3).astype(jnp.int32)


def importance(mean: dict, doubt: dict, batch: int):
    """Returns the importance [l… r] of each triplet (eq. 7 and 11): of its value, and the mean of its two vectors.

    mean, doubt: of "p" [l… in… r], "values" [l… r] and "q" [l… r out…].
    """
    score = {name: mean[name] * doubt[name] for name in mean}
    inputs = tuple(range(batch, score["p"].ndim - 1))
    outputs = tuple(range(batch + 1, score["q"].ndim))
    return score["values"] + score["p"].mean(inputs) + score["q"].mean(outputs)


def allocating(optimizer: optax.GradientTransformation, adapt, params, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer, with the ranks of AdaLoRA adapters kept to their budget; itself where there are none.

    One schedule for all: that of the first AdaLoRA in `adapt`. params: arrays or shapes, unboxed. steps: of the run.

    Raises:
      UserError: a schedule that is none.
    """
    own = {path: adapter for path, (adapter, _) in adapters_of(params, adapt).items() if isinstance(adapter, AdaLora)}
    if not own:
        return optimizer
    schedule = next(iter(own.values()))
    if not 0 <= schedule.warmup < 1 - schedule.settled <= 1:
        raise UserError(
            f"adapt: adalora.warmup {schedule.warmup} and settled {schedule.settled} are shares of the run, in all below 1"
        )
    names = {"/".join(path): path for path in own}

    def pick(tree) -> dict:
        found = {}
        for name, path in names.items():
            leaf = tree[KEY]
            for word in path:
                leaf = leaf[word]
            found[name] = leaf
        return found

    shapes = {name: leaf["values"].shape for name, leaf in pick(params).items()}
    sizes = {name: math.prod(leaf["values"].shape) for name, leaf in pick(params).items()}
    whole = sum(sizes.values())
    target = sum(size // own[names[name]].rank * own[names[name]].target for name, size in sizes.items())

    def init(params) -> Allocation:
        mean, doubt = (jax.tree.map(jnp.zeros_like, pick(params)) for _ in range(2))
        return Allocation(optimizer.init(params), jnp.zeros((), jnp.int32), mean, doubt)

    def update(gradient, state: Allocation, params):
        updates, inner = optimizer.update(gradient, state.inner, params)
        mine, b1, b2 = pick(params), schedule.b1, schedule.b2
        now = jax.tree.map(lambda g, p: jnp.abs(g * p), pick(gradient), mine)  # eq. 8
        mean = jax.tree.map(lambda m, s: b1 * m + (1 - b1) * s, state.mean, now)  # eq. 9
        doubt = jax.tree.map(lambda u, m, s: b2 * u + (1 - b2) * jnp.abs(s - m), state.doubt, mean, now)  # eq. 10
        scores = {name: importance(mean[name], doubt[name], layer_axes(names[name])) for name in names}
        flat = jnp.concatenate([scores[name].ravel() for name in names])
        order = jnp.zeros(whole, jnp.int32).at[jnp.argsort(-flat)].set(jnp.arange(whole))
        count = state.count + 1
        keep = order < budget(schedule, whole, target, count, steps)
        at = 0
        for name, path in names.items():
            kept = keep[at : at + sizes[name]].reshape(shapes[name])
            at += sizes[name]
            values, moved = mine[name]["values"], _get(updates, path)
            updates = _set(updates, (KEY, *path, "values"), jnp.where(kept, moved, -values))
        return updates, Allocation(inner, count, mean, doubt)

    return optax.GradientTransformation(init, update)


def _get(tree, path: tuple):
    leaf = tree[KEY]
    for word in path:
        leaf = leaf[word]
    return leaf["values"]


def _set(tree, path: tuple, value) -> dict:
    if not path:
        return value
    return {**tree, path[0]: _set(tree[path[0]], path[1:], value)}
