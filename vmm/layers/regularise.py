"""Dropout and stochastic depth: what is dropped of a sample is drawn from the sample's own key, in training alone.

Linen's streams of randomness have one key a batch. Here a caller of the model (Recipe, for what a student sees) hands
one key a sample to `dropping`, and every sublayer inside draws from it, its place in the model and its layer: the same
for any split of the batch, on any mesh, with scan and without. Outside of it, nothing is dropped and nothing is traced.
"""

import contextlib
import contextvars
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from vmm.errors import UserError

FIELDS = ("dropout", "drop_path")  # of layers.Block
# A layer's name is the same scanned or not; its number is drawn from besides.
_LAYER = re.compile(r"/(run_\d+/layers|layers|layer_\d+)(?=/|$)")


class _Dropping(NamedTuple):
    """keys: one a sample. of: what is looked at with them. number, total: the layer, and how many there are. before, whole: layers
    before those that are numbered, and all of them; whole 0: they are alone."""

    keys: Key[Array, " B"]
    of: str
    number: int | Int[Array, ""] | None = 0
    total: int = 0
    before: int = 0
    whole: int = 0


_NOW: contextvars.ContextVar[_Dropping | None] = contextvars.ContextVar("dropping", default=None)


@contextlib.contextmanager
def dropping(keys: Key[Array, " B"] | None, of: str) -> Iterator[None]:
    """What is applied inside drops what its fields say. keys: one a sample, None: nothing is dropped. of: a name, such
    as a view's: under each the draws are others."""
    before = _NOW.set(None if keys is None else _Dropping(keys, of))
    try:
        yield
    finally:
        _NOW.reset(before)


@contextlib.contextmanager
def layer(number: int | Int[Array, ""] | None, total: int) -> Iterator[None]:
    """What is applied inside is layer `number`, from 0, of `total` in a row; None: one that drops nothing."""
    now = _NOW.get()
    if now is not None and now.whole and number is not None:
        number, total = now.before + number, now.whole
    before = _NOW.set(None if now is None else now._replace(number=number, total=total))
    try:
        yield
    finally:
        _NOW.reset(before)


@contextlib.contextmanager
def run_of(before: int, whole: int) -> Iterator[None]:
    """The layers inside, numbered from 0, come after `before` others of `whole` in a row."""
    now = _NOW.get()
    token = _NOW.set(None if now is None else now._replace(before=before, whole=whole))
    try:
        yield
    finally:
        _NOW.reset(token)


def drops(block: Mapping) -> bool:
    """Whether layers with these fields of Block drop anything of what is traced now."""
    return _NOW.get() is not None and any(block.get(name) for name in FIELDS)


def path_rate(drop_path: float, number: int | Int[Array, ""], total: int) -> float | Float[Array, ""]:
    """Returns the rate of layer `number` of `total`: from 0 in the first, linearly, to drop_path in the last (Huang et
    al. 2016, sec. 3); a lone layer has 0, one that is in no row of layers the whole."""
    return drop_path * number / max(total - 1, 1) if total else drop_path


def dropped(module: nn.Module, name: str, x: Float[Array, "B N D"], dropout: float, drop_path: float):
    """Returns what a sublayer gives, [B N D], before it is added: parts of it zero, the rest larger, its mean the same.

    dropout: the share of values that are zero (Vaswani et al. 2017, sec. 5.4). drop_path: of samples whose sublayer is
    left out, in the last layer, see path_rate. module, name: whose draws they are.

    Raises:
      UserError: a rate is not in [0, 1).
    """
    for key, rate in zip(FIELDS, (dropout, drop_path)):
        if not 0 <= rate < 1:
            raise UserError(f"block.{key}: {rate}; a share from 0 up to, not with, 1")
    now = _NOW.get()
    if now is None:
        return x
    if len(now.keys) != len(x):
        raise ValueError(f"{module.path}: {len(now.keys)} keys for {len(x)} samples")
    place = _LAYER.sub("", "/" + "/".join(module.path))
    if dropout:
        x = _scaled(x, _keep(now, f"{place}/{name}/dropout", x.shape[1:], 1.0 - dropout), 1.0 - dropout)
    rate = path_rate(drop_path, now.number, now.total) if drop_path else 0.0
    if isinstance(rate, jax.Array) or rate:
        x = _scaled(x, _keep(now, f"{place}/{name}/path", (1,) * (x.ndim - 1), 1.0 - rate), 1.0 - rate)
    return x


def _keep(now: _Dropping, salt: str, shape: tuple, share) -> Array:
    """Returns bool [B, *shape], True for `share` of them."""
    seed = zlib.crc32(f"{now.of}{salt}".encode())

    def draw(key):
        return jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, seed), now.number), share, shape)

    return jax.vmap(draw)(now.keys)


def _scaled(x: Array, keep: Array, share) -> Array:
    return jnp.where(keep, x / jnp.asarray(share, x.dtype), jnp.zeros((), x.dtype))
