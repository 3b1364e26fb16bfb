"""Attention and MLP as a Transformer block; a block, depth times."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float

from vmm.build import make
from vmm.errors import UserError, one_of
from vmm.layers import regularise
from vmm.layers.attention import Attention
from vmm.layers.dense import Dense, LayerNorm
from vmm.sharding import constrain

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5)),  # by erfc, as in Flax, it takes 2.5 times as long
    "gelu_tanh": nn.gelu,
    "gelu_quick": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
    "relu": nn.relu,
}


class Mlp(nn.Module):
    """Two-layer perceptron; hidden = ratio * D. activation: one of ACTIVATIONS (GELU: Hendrycks & Gimpel 2016)."""

    ratio: float = 4.0
    activation: str = "gelu_tanh"

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        if self.activation not in ACTIVATIONS:
            raise UserError(f"block.activation: unknown {self.activation!r}; {one_of(self.activation, ACTIVATIONS)}")
        hidden = ACTIVATIONS[self.activation](Dense((round(width * self.ratio),), ("embed", "mlp"), name="up")(x))
        return Dense((width,), ("mlp", "embed"), name="down")(hidden)


class Bottleneck(nn.Module):
    """x + up(act(down(x))), down to `width` values; the zero map at first, so that nothing changes (Houlsby et al. 2019)."""

    width: int
    activation: str = "gelu_tanh"

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        hidden = ACTIVATIONS[self.activation](Dense((self.width,), ("embed", None), name="down")(x))
        return x + Dense((x.shape[-1],), (None, "embed"), zero=True, name="up")(hidden)


class Block(nn.Module):
    """Transformer block. Queries and MLP are for x; keys are x and, if given, a context.

    norm: "pre", of what goes into attention and MLP, or "post", of what comes out (Vaswani et al. 2017; BERT).
    activation: of the MLP. epsilon: of the norms. cap: of attention's logits, 0: none. The call's mask is broadcast
    to [B A Q K], rotary from positions.rotary.

    bottleneck: width of adapters behind attention and MLP, before each is added (Houlsby et al. 2019, fig. 2), 0: none.
    prefix: learned keys and values of attention (Li & Liang 2021, without the reparametrising MLP), 0: none. Both are for
    fine-tuning, with optim.rate_rules ((".*/(bottleneck|prefix)_.*", 1.0), ("objective_.*", 1.0), (".*", 0.0)).

    dropout: share of the values of what attention and MLP give that training sets to zero before it is added.
    drop_path: share of samples that pass by attention or MLP in the last layer, less in those before it (stochastic
    depth), see layers.regularise. Nothing is dropped in predict, embed and a teacher's views.

    FLOPs forward a sample: Q (8 D² + 4 r D²) + K 4 D² − Q 4 D² + 4 Q K D for Q tokens of x and
    K keys in all (r the MLP ratio): 24 N D² + 4 N² D where they are the same N and r = 4. Bottlenecks of width h: 8 Q h D
    more; n of a prefix: 4 Q n D more.
    """

    heads: int
    ratio: float = 4.0
    norm: str = "pre"
    activation: str = "gelu_tanh"
    epsilon: float = 1e-6
    cap: float = 0.0
    bottleneck: int = 0
    prefix: int = 0
    dropout: float = 0.0
    drop_path: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        valid: Bool[Array, "B Q"],
        context: Float[Array, "B C D"] | None = None,
        context_valid: Bool[Array, "B C"] | None = None,
        mask: Bool[Array, "... Q K"] | tuple | None = None,
        rotary: tuple | None = None,
    ) -> Float[Array, "B Q D"]:
        if self.norm not in ("pre", "post"):
            raise UserError(f"block.norm: unknown {self.norm!r}; known: post, pre")
        pre = self.norm == "pre"
        norm_attention = LayerNorm(self.epsilon, name="norm_attention")
        norm_mlp = LayerNorm(self.epsilon, name="norm_mlp")
        attention = self.attend("attention")
        query = norm_attention(x) if pre else x
        keys, keys_valid = None, valid
        if context is not None:
            keys = jnp.concatenate([query, norm_attention(context) if pre else context], axis=1)
            keys_valid = jnp.concatenate([valid, context_valid], axis=1)
        mlp = Mlp(self.ratio, self.activation, name="mlp")
        if pre:
            x = x + self.adapted("attention", attention(query, keys, keys_valid, mask, rotary))
            x = x + self.adapted("mlp", mlp(norm_mlp(x)))
        else:
            x = norm_attention(x + self.adapted("attention", attention(query, keys, keys_valid, mask, rotary)))
            x = norm_mlp(x + self.adapted("mlp", mlp(x)))
        return constrain(x, "batch", "tokens", None)

    def attend(self, name: str) -> Attention:
        """The block's attention; another kind of block replaces this."""
        return Attention(self.heads, self.cap, self.prefix, name=name)

    def adapted(self, name: str, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        """What a sublayer gives, through its bottleneck if there is one, and what training keeps of it."""
        if self.bottleneck:
            x = Bottleneck(self.bottleneck, self.activation, name=f"bottleneck_{name}")(x)
        return regularise.dropped(self, name, x, self.dropout, self.drop_path)


def make_block(heads: int, ratio: float, spec: Mapping, name: str) -> Block:
    """Returns a Block of a config's `block` group. Raises UserError for a key that Block has not."""
    return make(Block, spec, "block", heads=heads, ratio=ratio, name=name)


# What is kept of a layer for its gradient; the rest is computed again (Chen et al. 2016). The numbers are the same.
REMAT = {
    "full": None,  # nothing but the layer's input
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # of parameters: all but attention's own
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),  # those, in the host's memory
}


def rematerialised(layer: type[nn.Module], remat: bool | str, scan: bool) -> type[nn.Module]:
    """Returns the layer, or one that keeps for its gradient what REMAT[remat] says; True is "full", False keeps everything.

    Raises:
      UserError: no such way.
    """
    if not remat:
        return layer
    way = "full" if remat is True else remat
    if way not in REMAT:
        raise UserError(f"remat: unknown {remat!r}; False, True, or {one_of(way, REMAT)}")
    return nn.remat(layer, prevent_cse=not scan, policy=REMAT[way])


class Repeat(nn.Module):
    """A layer, depth times: carry → carry, with constants that every layer reads.

    layer: a Module class with __call__(carry, constants) → carry. fields: its fields.
    scan: one compiled layer over stacked parameters (axis "layers"): compile time does not grow
    with depth. remat: what of a layer is computed again for the gradient: True or a name of REMAT.
    before, after: layers of the same row, for the rates of drop_path.
    """

    layer: type[nn.Module]
    fields: Mapping
    depth: int
    scan: bool = False
    remat: bool | str = False
    before: int = 0
    after: int = 0

    @nn.compact
    def __call__(self, carry, constants):
        layer = rematerialised(self.layer, self.remat, self.scan)
        total = self.before + self.depth + self.after
        if not self.scan or self.depth == 0:
            for i in range(self.depth):
                with regularise.layer(self.before + i, total):
                    carry = layer(**self.fields, name=f"layer_{i}")(carry, constants)
            return carry

        def body(module, carry, constants, number):
            with regularise.layer(number, total):
                return module(carry, constants), None

        # Layers that drop nothing need no number.
        numbered = regularise.drops(self.fields.get("block", {}))
        scanned = nn.scan(
            body,
            variable_axes={"params": 0, "layers": 0, "gates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        numbers = jnp.arange(self.before, self.before + self.depth) if numbered else None
        return scanned(layer(**self.fields, name="layers"), carry, constants, numbers)[0]


class BlockLayer(nn.Module):
    """A Block as a layer of Repeat: the carry is x [B N D], the constants its validity [B N], mask and rotary."""

    heads: int
    ratio: float = 4.0
    block: Mapping = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, carry, constants):
        valid, mask, rotary = constants
        x = make_block(self.heads, self.ratio, self.block, "block")(carry, valid, mask=mask, rotary=rotary)
        # For who asks for the collection "layers"; else nothing is kept.
        self.sow("layers", "x", x, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return x


def layers_of(sown: Mapping) -> list[Array]:
    """Returns the blocks' outputs [B N D] of a module's collection "layers", in order."""

    def number(path: tuple) -> list:
        return [int(part) for name in path for part in name.split("_") if part.isdigit()]

    flat = flatten_dict(sown)
    result = []
    for path in sorted(flat, key=number):
        result += list(flat[path]) if "layers" in path else [flat[path]]
    return result


class Stack(nn.Module):
    """Blocks of self-attention and a final norm: x [B N D], valid [B N] → [B N D].

    block: further fields of Block. final_norm: False where the last block norms already (post-norm).
    """

    depth: int
    heads: int
    ratio: float = 4.0
    scan: bool = False
    remat: bool | str = False
    block: Mapping = dataclasses.field(default_factory=dict)
    final_norm: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"], mask=None, rotary=None
    ) -> Float[Array, "B N D"]:
        fields = dict(heads=self.heads, ratio=self.ratio, block=self.block)
        x = Repeat(BlockLayer, fields, self.depth, self.scan, self.remat, name="blocks")(x, (valid, mask, rotary))
        return LayerNorm(self.block.get("epsilon", 1e-6), name="norm")(x) if self.final_norm else x
