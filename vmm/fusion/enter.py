"""What every fusion does first and last: bring streams to one width, mark whose they are; join and part them."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from vmm.layers import Dense, LayerNorm, vector
from vmm.types import Streams


class Enter(nn.Module):
    """Streams of any widths → streams of width D, each plus its modality's learned vector."""

    width: int

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        entered = {}
        for name, tokens in streams.items():
            x = tokens.x
            if x.shape[-1] != self.width:
                x = Dense((self.width,), (None, "embed"), name=f"project_{name}")(x)
            entered[name] = tokens._replace(x=x + vector(self, f"modality_{name}", (self.width,)).astype(x.dtype))
        return entered


class Leave(nn.Module):
    """A final norm for each stream."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        return {
            name: tokens._replace(x=LayerNorm(self.epsilon, name=f"norm_{name}")(tokens.x))
            for name, tokens in streams.items()
        }


def join(parts: Mapping[str, Array]) -> Array:
    """Returns all streams' rows in a row: modality → [B N ...] → [B ΣN ...]."""
    return jnp.concatenate(list(parts.values()), axis=1)


def part(x: Array, like: Mapping[str, Array]) -> dict:
    """Returns modality → its rows of x [B ΣN ...], counts and order as in `like`: the inverse of join."""
    parted, place = {}, 0
    for name, rows in like.items():
        parted[name] = x[:, place : place + rows.shape[1]]
        place += rows.shape[1]
    return parted


def without(parts: Mapping, name: str) -> dict:
    """Returns the other streams' parts."""
    return {other: value for other, value in parts.items() if other != name}
