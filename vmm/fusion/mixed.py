"""Mixed fusion: self-, cross- and global attention side by side, weighted token by token by learned gates.

The gates are a softmax over branches, as over the experts of Jacobs et al. 1991.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmm.fusion.enter import join, without
from vmm.fusion.layered import Layer, Layered, report
from vmm.fusion.sublayers import Feed, around, options
from vmm.layers import Dense, LayerNorm, attention, vector

BRANCHES = ("self", "cross", "global")


class MixedLayer(Layer):
    """One layer. Each stream has its own queries q, keys and values; for a stream m with h = norm(x_m)

        y = g_self · attention(q, m) + g_cross · attention(q, the others) + g_global · attention(q, Z latents),
        (g_self, g_cross, g_global) = softmax(G_m h) for each token;  x ← x + U_m y;  x ← x + MLP_m(norm(x))

    where the latents have themselves attended to all tokens of all streams. The gate of `cross` is 0 in a sample that
    has no other stream. Gates: the mean over the batch's valid tokens, for each stream and branch.
    """

    latents: int = 8

    @nn.compact
    def __call__(self, carry, valid):
        streams, _ = carry
        own = options(self.block)
        first = next(iter(streams.values()))
        split, into = (self.heads, first.shape[-1] // self.heads), ("embed", "heads", "head_dim")
        valid = {name: valid[name] for name in streams}
        norms = {name: around(own, f"norm_{name}") for name in streams}
        seen = {name: norms[name][0](x) for name, x in streams.items()}
        query, key, value = (
            {name: Dense(split, into, name=f"{part}_{name}")(x) for name, x in seen.items()}
            for part in ("query", "key", "value")
        )
        z = self._latents(join(key), join(value), join(valid), own)
        shared = [Dense(split, into, name=f"{part}_latents")(z) for part in ("key", "value")]
        everywhere = jnp.ones(z.shape[:2], bool)
        mixed = {}
        for name, x in streams.items():
            branches = {
                "self": attention(query[name], key[name], value[name], valid[name], cap=own.cap),
                "global": attention(query[name], *shared, everywhere, cap=own.cap),
            }
            company = jnp.zeros(x.shape[0], bool)
            if len(streams) > 1:
                others = join(without(valid, name))
                company = others.any(1)
                rows = [join(without(part, name)) for part in (key, value)]
                branches["cross"] = attention(query[name], *rows, others, cap=own.cap)
            gates = self._gates(name, seen[name], valid[name], company).astype(x.dtype)
            y = sum(gates[..., BRANCHES.index(branch), None, None] * part for branch, part in branches.items())
            y = Dense((x.shape[-1],), into[1:] + into[:1], inputs=2, name=f"out_{name}")(y)
            mixed[name] = Feed(self.ratio, own, name=f"mlp_{name}")(norms[name][1](x, y))
        return mixed, ()

    def _latents(self, key, value, valid, own) -> Float[Array, "B Z D"]:
        """Returns the latents' view of all tokens."""
        heads, width = key.shape[2:], math.prod(key.shape[2:])
        # Normed, latents ask different questions from the first step on.
        z = LayerNorm(own.epsilon, name="norm_latents")(vector(self, "latents", (self.latents, width)))
        query = Dense(heads, ("embed", "heads", "head_dim"), name="query_latents")(z.astype(key.dtype))
        query = jnp.broadcast_to(query, (key.shape[0], *query.shape))
        z = attention(query, key, value, valid, cap=own.cap)
        z = Dense((width,), ("heads", "head_dim", "embed"), inputs=2, name="out_latents")(z)
        return LayerNorm(own.epsilon, name="norm_global")(z)

    def _gates(self, name: str, x, valid, company) -> Float[Array, "B N 3"]:
        """Returns the branches' shares of each token of a stream; company: bool [B], whether the sample has others."""
        kernel = vector(self, f"gate_{name}", (len(BRANCHES), x.shape[-1]))
        logits = jnp.einsum("bnd,gd->bng", x.astype(jnp.float32), kernel)
        shut = jnp.array([branch == "cross" for branch in BRANCHES]) & ~company[:, None, None]
        gates = jax.nn.softmax(jnp.where(shut, -1e30, logits), axis=-1)
        weight = valid[..., None].astype(jnp.float32)
        for branch, mean in zip(BRANCHES, (gates * weight).sum((0, 1)) / jnp.maximum(weight.sum(), 1)):
            report(self, f"{name}_{branch}", mean)
        return gates


class Mixed(Layered):
    """Self-, cross- and global attention in every block, through `latents` = Z global tokens.

    FLOPs forward, a layer: Σ_m N_m (8 D² + 4 r D² + 6 D) + 4 N_m N D for own and others' tokens, N = Σ_m N_m;
    6 Z D² + 8 Z N D for the global ones; their 2 Z D² of queries once a batch.
    """

    layer = MixedLayer
    latents: int = 8
