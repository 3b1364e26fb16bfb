"""What fusions make their layers of besides whole blocks: attention to other tokens, and an MLP, each with its norm."""

import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmm.build import make
from vmm.errors import UserError
from vmm.fusion.layered import report
from vmm.layers import Attention, LayerNorm, Mlp, regularise, scalar
from vmm.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Options:
    """The fields of layers.Block that a fusion's own attention and MLP keep to; meaning and defaults are Block's."""

    norm: str = "pre"
    activation: str = "gelu_tanh"
    epsilon: float = 1e-6
    cap: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0


def options(block: Mapping) -> Options:
    """Returns the Options of a config's `block` group. Raises UserError for a key or norm that they have not."""
    made = make(Options, block, "block")
    if made.norm not in ("pre", "post"):
        raise UserError(f"block.norm: unknown {made.norm!r}; known: post, pre")
    return made


def around(given: Options, name: str) -> tuple[Callable, Callable]:
    """Returns (before, after) of a sublayer f with the norm `name`: x → after(x, f(before(x)))."""
    norm = LayerNorm(given.epsilon, name=name)

    def add(x, y):
        return x + regularise.dropped(norm, "sublayer", y, given.dropout, given.drop_path)

    if given.norm == "pre":
        return norm, add
    return lambda x: x, lambda x, y: norm(add(x, y))


class Feed(nn.Module):
    """An MLP with norm and residual. FLOPs forward a sample: 4 r N D²."""

    ratio: float
    options: Options

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], gate: Array | float = 1.0) -> Float[Array, "B N D"]:
        before, after = around(self.options, "norm")
        y = Mlp(self.ratio, self.options.activation, name="mlp")(before(x))
        return constrain(after(x, y * jnp.asarray(gate, x.dtype)), "batch", "tokens", None)


class Read(nn.Module):
    """x attends to a context, not to itself, and passes an MLP; each has norm and residual.

    gated: what is added is multiplied by tanh(α), α learned from 0 (Flamingo, Alayrac et al. 2022, sec. 2.2).
    FLOPs forward a sample: Q (4 D² + 4 r D²) + C 4 D² + 4 Q C D for Q tokens of x and C of the context.
    """

    heads: int
    ratio: float
    options: Options
    gated: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q D"], context: Float[Array, "B C D"], valid: Bool[Array, "B C"]
    ) -> Float[Array, "B Q D"]:
        gates = dict(attention=1.0, mlp=1.0)
        if self.gated:
            gates = {name: jnp.tanh(scalar(self, f"alpha_{name}", 0.0)) for name in gates}
            for name, gate in gates.items():
                report(self, f"gate_{name}", gate)
        before, after = around(self.options, "norm_attention")
        if self.options.norm == "pre":
            context = LayerNorm(self.options.epsilon, name="norm_context")(context)
        y = Attention(self.heads, self.options.cap, name="attention")(before(x), context, valid)
        x = after(x, y * jnp.asarray(gates["attention"], x.dtype))
        return Feed(self.ratio, self.options, name="feed")(x, gates["mlp"])
