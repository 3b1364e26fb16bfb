"""What every fusion does first and last: bring streams to one width, mark whose they are; join and part them."""

import flax.linen as nn
import jax.numpy as jnp

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


def join(streams: Streams) -> tuple:
    """Returns (x [B ΣN D], valid [B ΣN]) of all streams in a row."""
    tokens = list(streams.values())
    return jnp.concatenate([t.x for t in tokens], axis=1), jnp.concatenate([t.valid for t in tokens], axis=1)


def part(streams: Streams, x) -> Streams:
    """Returns the streams with their rows of x in place of their own: the inverse of join."""
    parted, place = {}, 0
    for name, tokens in streams.items():
        count = tokens.x.shape[1]
        parted[name] = tokens._replace(x=x[:, place : place + count])
        place += count
    return parted
