"""Linear map, norm, table, learned vectors: the leaves of every model, and where parameter axes are named.

A layer computes in the dtype of what it is given: parameters stay float32 and are cast at use, so
that mixed precision is one cast at a model's entrance. Norms run in float32.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from jaxtyping import Array, Float, Int

from vmm.errors import UserError
from vmm.sharding import constrain, named, platform


def on_one_cpu() -> bool:
    """Whether what is traced now is for one CPU device, where products and attention have forms of their own."""
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


@jax.custom_vjp
def _product(x: Float[Array, "N I"], kernel: Float[Array, "I O"]) -> Float[Array, "N O"]:
    """x @ kernel, whose kernel's gradient is one product without a transposed copy, the narrower operand first
    where there are many rows.

    XLA on CPU otherwise copies one operand and takes up to twice as long for the product.
    """
    return x @ kernel


def _product_backward(kept, gradient):
    x, kernel = kept
    columns = (((0,), (0,)), ((), ()))
    if len(x) >= 512 and x.shape[1] > gradient.shape[1]:
        # Held on both sides: XLA would turn the product round again, or have the optimizer read it across the rows.
        hold = jax.lax.optimization_barrier
        by_kernel = hold(hold(jax.lax.dot_general(gradient, x, columns)).T)
    else:
        by_kernel = jax.lax.dot_general(x, gradient, columns)
    return gradient @ kernel.T, by_kernel


_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


def parameter(module: nn.Module, name: str, init, shape: tuple[int, ...]) -> Array:
    """Returns a float32 parameter of the module, made by init(key, shape, dtype) where there is none yet.

    As `module.param`, which traces the initializer at every use to learn its shape: a fifth of the time of a trace.

    Raises:
      flax.errors.ScopeParamShapeError: what is there has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, jnp.float32)
    value = nn.unbox(module.get_variable("params", name))
    if value.shape != tuple(shape):
        raise ScopeParamShapeError(name, module.scope.path_text, tuple(shape), value.shape)
    return value


@functools.partial(jax.jit, static_argnums=(3, 4))
def _linear(x, kernel, bias, inputs: int, one_cpu: bool):
    if one_cpu:
        before, (shape, features) = x.shape[: x.ndim - inputs], (kernel.shape[:inputs], kernel.shape[inputs:])
        inside, after = math.prod(shape), math.prod(features)
        y = _product(x.reshape(math.prod(before), inside), kernel.reshape(inside, after))
        y = y.reshape(*before, *features)
    else:
        y = jnp.tensordot(x, kernel, axes=inputs)
    return y if bias is None else y + bias.astype(x.dtype)


class Dense(nn.Module):
    """Linear map over the last `inputs` axes: [... in] → [... out].

    features: sizes of the new axes. axes: logical names of kernel axes, old then new.
    inputs: how many trailing axes are contracted. Initialised Xavier-uniform (Glorot & Bengio 2010), or zero with
    `zero`; biases zero.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: int = 1
    bias: bool = True
    zero: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        shape = x.shape[x.ndim - self.inputs :]

        def init(key, shape_, dtype):
            flat = (math.prod(shape), math.prod(self.features))
            if self.zero:
                return jnp.zeros(shape_, dtype)
            return nn.initializers.xavier_uniform()(key, flat, dtype).reshape(shape_)

        kernel = parameter(self, "kernel", named(init, self.axes), (*shape, *self.features))
        # Held to how it is stored: it is gathered in the type it is used in, and its gradient scattered as it is summed.
        kernel = constrain(kernel.astype(x.dtype), *self.axes)
        bias = None
        if self.bias:
            zeros = named(nn.initializers.zeros, self.axes[self.inputs :])
            bias = parameter(self, "bias", zeros, self.features)
        return _linear(x, kernel, bias, self.inputs, on_one_cpu())


@functools.partial(jax.jit, static_argnums=3)
def _normalize(x, scale, bias, epsilon: float):
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return (y * scale + bias).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the last axis, in float32. [... D] → [... D]."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = parameter(self, "scale", named(nn.initializers.ones, ("embed",)), x.shape[-1:])
        bias = parameter(self, "bias", named(nn.initializers.zeros, ("embed",)), x.shape[-1:])
        return _normalize(x, scale, bias, self.epsilon)


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
        table = parameter(self, "table", init, (self.entries, self.width))
        # Rows are gathered whole before they are looked up: XLA's partitioner has no way from split rows to split tokens.
        x = constrain(table, self.axes[0], None)[ids] * self.width**0.5
        return constrain(x, "batch", *(None,) * (x.ndim - 1))


def vector(module: nn.Module, name: str, shape: tuple[int, ...]) -> Array:
    """Returns a learned parameter of the module whose last axis is the width; normal, 0.02."""
    if 0 in shape or min(shape) < 0:
        raise UserError(f"{name}: {shape[0]} of them; at least 1 is needed")
    names = (*(None,) * (len(shape) - 1), "embed")
    return parameter(module, name, named(nn.initializers.normal(0.02), names), shape)


def scalar(module: nn.Module, name: str, value: float) -> Array:
    """Returns a learned scalar parameter of the module."""
    return parameter(module, name, nn.initializers.constant(value), ())
