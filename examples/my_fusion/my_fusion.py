"""A fusion of one's own: every stream's tokens are shifted by what the other streams are on average."""

import jax.numpy as jnp
from flax import linen as nn

from vmm.fusion.layered import Fusion
from vmm.layers import Dense
from vmm.types import Streams


class MyFusion(Fusion):
    """x_m ← W_m x_m + mean over the other streams of tanh(U_n mean x_n), and a norm. strength: of what is added."""

    strength: float = 1.0

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        says, result = {}, {}
        for name, tokens in streams.items():
            valid = tokens.valid[..., None]
            mean = jnp.where(valid, tokens.x, 0).sum(1) / jnp.maximum(valid.sum(1), 1)
            said = nn.tanh(Dense((self.width,), (None, "embed"), name=f"say_{name}")(mean))
            says[name] = jnp.where(tokens.valid.any(1, keepdims=True), said, 0)  # who is not there says nothing
        for name, tokens in streams.items():
            x = Dense((self.width,), (None, "embed"), name=f"hear_{name}")(tokens.x)
            others = [said for other, said in says.items() if other != name] or [jnp.zeros_like(says[name])]
            x = nn.LayerNorm(name=f"norm_{name}")(x + self.strength * jnp.mean(jnp.stack(others), 0)[:, None])
            result[name] = tokens._replace(x=x)
        return result
