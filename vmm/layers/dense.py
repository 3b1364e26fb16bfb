"""Linear map, norm, table, learned vectors: the leaves of every model, and where parameter axes are named.

A layer computes in the dtype of what it is given: parameters stay float32 and are cast at use, so
that mixed precision is one cast at a model's entrance. Norms run in float32.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vmm.sharding import named


class Dense(nn.Module):
    """Linear map over the last `inputs` axes: [... in] → [... out].

    features: sizes of the new axes. axes: logical names of kernel axes, old then new.
    inputs: how many trailing axes are contracted. Initialised Xavier-uniform (Glorot & Bengio 2010),
    biases zero.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: int = 1
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        shape = x.shape[x.ndim - self.inputs :]

        def init(key, shape_, dtype):
            flat = (math.prod(shape), math.prod(self.features))
            return nn.initializers.xavier_uniform()(key, flat, dtype).reshape(shape_)

        kernel = self.param("kernel", named(init, self.axes), (*shape, *self.features), jnp.float32)
        y = jnp.tensordot(x, kernel.astype(x.dtype), axes=self.inputs)
        if self.bias:
            zeros = named(nn.initializers.zeros, self.axes[self.inputs :])
            y = y + self.param("bias", zeros, self.features, jnp.float32).astype(x.dtype)
        return y


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the last axis, in float32. [... D] → [... D]."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", named(nn.initializers.ones, ("embed",)), x.shape[-1:], jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros, ("embed",)), x.shape[-1:], jnp.float32)
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * scale + bias).astype(x.dtype)


class Embed(nn.Module):
    """Table lookup times √D: ids [...] → [... D] of unit variance at init (Vaswani et al. 2017, sec. 3.4).

    Smaller entries would drown in sin-cos positions, whose variance is near one half.
    """

    entries: int
    width: int
    axes: tuple[str | None, str | None] = ("vocab", "embed")

    @nn.compact
    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        init = named(nn.initializers.normal(self.width**-0.5), self.axes)
        return self.param("table", init, (self.entries, self.width), jnp.float32)[ids] * self.width**0.5


def vector(module: nn.Module, name: str, shape: tuple[int, ...]) -> Array:
    """Returns a learned parameter of the module whose last axis is the width; normal, 0.02."""
    names = (*(None,) * (len(shape) - 1), "embed")
    return module.param(name, named(nn.initializers.normal(0.02), names), shape, jnp.float32)


def scalar(module: nn.Module, name: str, value: float) -> Array:
    """Returns a learned scalar parameter of the module."""
    return module.param(name, nn.initializers.constant(value), (), jnp.float32)
