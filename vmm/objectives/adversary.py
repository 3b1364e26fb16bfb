"""A critic of pictures, trained against the decoder that makes them, by one optimiser (Goodfellow et al. 2014)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from vmm.layers import Dense


class Critic(nn.Module):
    """Tells real places of a picture from made ones: [B T H W C] → scores [B T h w], h = H / 2^depth rounded up.

    `depth` strided convolutions of 4 × 4, each halving the sides and, up to 8 times, doubling `width`, then one score a
    place (PatchGAN, Isola et al. 2017; no norms). FLOPs forward: Σ 32 h w D_in D_out over the layers.
    """

    width: int = 32
    depth: int = 3

    @nn.compact
    def __call__(self, pictures: Float[Array, "B T H W C"]) -> Float[Array, "B T h w"]:
        x = pictures
        for i in range(self.depth):
            x = Dense((self.width * 2 ** min(i, 3),), (None, None), name=f"layer_{i}")(_windows(x))
            x = jax.nn.leaky_relu(x, 0.2)
        # No bias: the terms of real and made pictures would pull it both ways alike.
        return Dense((1,), (None, None), bias=False, name="head")(x)[..., 0]


def _windows(x: Float[Array, "B T H W C"]) -> Array:
    """Returns the 4 × 4 windows at every other place, zeros around: [B T ⌈H/2⌉ ⌈W/2⌉ 16 C]."""
    height, width = x.shape[2:4]
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)))
    x = rearrange(x, "b t (h q) (w r) c -> b t h w (q r c)", q=2, r=2)
    return jnp.concatenate([x[:, :, :-1, :-1], x[:, :, :-1, 1:], x[:, :, 1:, :-1], x[:, :, 1:, 1:]], axis=-1)


class Adversary(nn.Module):
    """The hinge losses of a critic and of the pictures it judges (Lim & Ye 2017), so that one optimiser serves both.

    The critic's parameters receive the gradient of its own loss alone, max(0, 1 − C(real)) + max(0, 1 + C(made)); the
    made pictures that of −C(made) alone, times `weight`. width, depth: of the Critic.
    """

    weight: float = 0.01
    width: int = 32
    depth: int = 3

    @nn.compact
    def __call__(
        self, real: Float[Array, "B T H W C"], made: Float[Array, "B T H W C"]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Returns (the critic's loss, −C(made)) of each picture, the means over its places."""
        critic = Critic(self.width, self.depth, name="critic")
        real_score, made_score = critic(jax.lax.stop_gradient(real)), critic(jax.lax.stop_gradient(made))
        its = (jax.nn.relu(1 - real_score) + jax.nn.relu(1 + made_score)).mean((2, 3))
        held = jax.lax.stop_gradient(critic.variables["params"])
        ours = -Critic(self.width, self.depth, parent=None).apply({"params": held}, made).mean((2, 3))
        return its, ours
