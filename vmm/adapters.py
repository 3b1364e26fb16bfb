"""Adapters: small parameters that change large ones, as data over parameter paths; no module knows of them.

A config's `adapt` is ordered pairs (regex, {"kind": k, **fields}) over parameter paths ("model/encoder_video/stack/blocks/
layer_0/block/attention/query/kernel"); the first that matches a parameter counts, and a parameter that none matches has no
adapter. Adapters are parameters like others, under "adapters/<path of the parameter>/<name>".

    effective = merge(params, adapt)      # the base's tree, with what its adapters make of it

A kernel [in… out…] counts as a matrix in × out, as Dense multiplies by it; scanned kernels have an axis of layers
before that, and one adapter a layer.
"""

import dataclasses
import functools
import math
import typing
import zlib
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vmm.build import build
from vmm.errors import UserError
from vmm.rules import first_matches, matcher
from vmm.sharding import Named

KEY = "adapters"  # of the parameter tree


class Place(typing.NamedTuple):
    """A parameter that an adapter is for. names: logical axes; batch: how many of them count layers, the first;
    inputs: how many of the others are contracted."""

    path: str
    shape: tuple
    names: tuple
    batch: int
    inputs: int

    @property
    def matrix(self) -> tuple[int, int]:
        """(inputs, outputs) of one layer."""
        axes = self.shape[self.batch :]
        return math.prod(axes[: self.inputs]), math.prod(axes[self.inputs :])

    def sides(self, values: tuple) -> tuple[tuple, tuple, tuple]:
        """Returns values, one an axis, of layers, inputs and outputs."""
        split = self.batch + self.inputs
        return values[: self.batch], values[self.batch : split], values[split:]


def _normal(key, shape: tuple, names: tuple, deviation: float) -> Named:
    return Named(deviation * jax.random.normal(key, shape, jnp.float32), names)


def _product(one, two, batch: int):
    """[l… in… r] × [l… r out…] → [l… in… out…], each layer by itself; no axis is joined to another."""
    function = functools.partial(jnp.tensordot, axes=1)
    for _ in range(batch):
        function = jax.vmap(function)
    return function(one, two)


def _check_rank(rank: int, place: Place) -> None:
    if place.inputs == 0:
        raise UserError(f"adapt: {place.path} of shape {list(place.shape)} is no matrix; match kernels alone")
    if not 1 <= rank <= min(place.matrix):
        raise UserError(f"adapt: rank {rank} for {place.path}, a matrix {place.matrix}; 1 to {min(place.matrix)}")


@dataclasses.dataclass(frozen=True)
class Lora:
    """W + alpha / rank · A B (LoRA, Hu et al. 2022, eq. 3), A [in… r] normal of variance 1 / in, B [r out…] zero.

    Parameters: rank · (in + out) a matrix. FLOPs a step: 2 rank · in · out a matrix, once, whatever the batch.
    """

    rank: int = 8
    alpha: float = 16.0

    def init(self, key, place: Place) -> dict:
        """Returns the parameters, boxed with their axes."""
        _check_rank(self.rank, place)
        (batch, inputs, outputs), names = place.sides(place.shape), place.sides(place.names)
        a = _normal(key, (*batch, *inputs, self.rank), (*names[0], *names[1], None), place.matrix[0] ** -0.5)
        return {
            "a": a,
            "b": Named(jnp.zeros((*batch, self.rank, *outputs), jnp.float32), (*names[0], None, *names[2])),
        }

    def apply(self, base, own: Mapping, batch: int):
        """Returns the effective parameter."""
        return base + self.alpha / self.rank * _product(own["a"], own["b"], batch)


@dataclasses.dataclass(frozen=True)
class Dora(Lora):
    """m · V / ‖V‖ with V = W + alpha / rank · A B (DoRA, Liu et al. 2024, eq. 5), norms over the inputs of each output.

    The magnitude m is `magnitude` · ‖W‖, and `magnitude` begins at one: the same for whatever weights are put under it. No
    gradient flows through the norms (sec. 4.3). Parameters: rank · (in + out) + out a matrix.
    """

    def init(self, key, place: Place) -> dict:
        """Returns the parameters, boxed with their axes."""
        batch, _, outputs = place.sides(place.shape)
        names = place.sides(place.names)
        ones = Named(jnp.ones((*batch, *outputs), jnp.float32), (*names[0], *names[2]))
        return super().init(key, place) | {"magnitude": ones}

    def apply(self, base, own: Mapping, batch: int):
        """Returns the effective parameter."""
        value = super().apply(base, own, batch)
        inputs = tuple(range(batch, batch + own["a"].ndim - batch - 1))

        def norm(x):
            return jnp.sqrt(jnp.square(x).sum(inputs, keepdims=True))

        # Exactly one where nothing is changed yet: the base is then the base to the bit.
        ratio = jax.lax.stop_gradient(norm(base) / jnp.maximum(norm(value), 1e-12))
        return value * (ratio * jnp.expand_dims(own["magnitude"], inputs))


@dataclasses.dataclass(frozen=True)
class Scale:
    """(IA)³ (Liu et al. 2022, sec. 3.3): what a Dense gives, bias included, times a learned number for each output.

    of: "outputs" (keys and values), or "inputs", which then are what is scaled (the hidden units of an MLP, at its `down`).
    Begins at one. Parameters: out, or in, a matrix.
    """

    of: str = "outputs"

    def init(self, key, place: Place) -> dict:
        """Returns the parameters, boxed with their axes."""
        if self.of not in ("inputs", "outputs"):
            raise UserError(f"adapt: scale.of: unknown {self.of!r}; known: inputs, outputs")
        if place.inputs == 0:
            raise UserError(f"adapt: {place.path} of shape {list(place.shape)} is no matrix; match kernels alone")
        side = 1 if self.of == "inputs" else 2
        shape, names = place.sides(place.shape), place.sides(place.names)
        return {"scale": Named(jnp.ones((*shape[0], *shape[side]), jnp.float32), (*names[0], *names[side]))}

    def apply(self, base, own: Mapping, batch: int):
        """Returns the effective kernel."""
        scale = own["scale"]
        new = base.ndim - scale.ndim
        at = range(batch, batch + new) if self.of == "outputs" else range(base.ndim - new, base.ndim)
        return base * jnp.expand_dims(scale, tuple(at))

    def apply_bias(self, bias, own: Mapping):
        """Returns the effective bias of the same Dense."""
        return bias * own["scale"] if self.of == "outputs" else bias


@dataclasses.dataclass(frozen=True)
class AdaLora:
    """W + alpha / rank · P Λ Q (AdaLoRA, Zhang et al. 2023, eq. 3), P [in… r] and Q [r out…] normal of 0.02, Λ [r] zero.

    penalty: of ‖PᵀP − I‖² + ‖QQᵀ − I‖² in the loss (eq. 4), which keeps the triplets apart.
    rank: at first; target: at last, as a mean over all matrices. The triplets that count least over all matrices have
    their Λ set to zero at each step (training/allocation.py): none for the first share `warmup` of the run, then more and
    more; for the last share `settled` as many are left as the target says. b1, b2: of the averages of sensitivity and of its
    uncertainty (eq. 9 and 10). Parameters: rank · (in + out + 1) a matrix.
    """

    rank: int = 12
    target: int = 8
    alpha: float = 16.0
    penalty: float = 0.1
    warmup: float = 0.1
    settled: float = 0.3
    b1: float = 0.85
    b2: float = 0.85

    def init(self, key, place: Place) -> dict:
        """Returns the parameters, boxed with their axes."""
        _check_rank(self.rank, place)
        if not 1 <= self.target <= self.rank:
            raise UserError(f"adapt: adalora.target: {self.target}; 1 to rank {self.rank}")
        (batch, inputs, outputs), names = place.sides(place.shape), place.sides(place.names)
        one, two = jax.random.split(key)
        return {
            "p": _normal(one, (*batch, *inputs, self.rank), (*names[0], *names[1], None), 0.02),
            "values": Named(jnp.zeros((*batch, self.rank), jnp.float32), (*names[0], None)),
            "q": _normal(two, (*batch, self.rank, *outputs), (*names[0], None, *names[2]), 0.02),
        }

    def apply(self, base, own: Mapping, batch: int):
        """Returns the effective parameter."""
        values = jnp.expand_dims(own["values"], tuple(range(batch, own["p"].ndim - 1)))
        return base + self.alpha / self.rank * _product(own["p"] * values, own["q"], batch)

    def loss(self, own: Mapping, batch: int):
        """Returns the penalty of all layers of the parameter."""

        def one(p, q):
            eye = jnp.eye(self.rank)
            p, q = p.reshape(-1, self.rank), q.reshape(self.rank, -1)
            return jnp.square(p.T @ p - eye).sum() + jnp.square(q @ q.T - eye).sum()

        for _ in range(batch):
            one = jax.vmap(one)
        return self.penalty * one(own["p"], own["q"]).sum()


ADAPTERS = {"adalora": AdaLora, "dora": Dora, "lora": Lora, "scale": Scale}


def check(adapt) -> tuple:
    """Returns (regex, adapter) pairs of a config's `adapt`.

    Raises:
      UserError: no pairs, an unknown kind or field.
    """
    pairs = []
    for i, pair in enumerate(adapt):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UserError(f'adapt: ordered pairs (regex, {{"kind": …}}) over parameter paths, got {pair!r}')
        pairs.append((pair[0], build(ADAPTERS, pair[1], f"adapt[{i}]")))
    return tuple(pairs)


def layer_axes(path: tuple) -> int:
    """Returns how many axes of a parameter count layers: one for each scan that it is in."""
    return path.count("layers")


def _place(path: tuple, leaf, flat: Mapping) -> Place:
    value = nn.unbox(leaf)
    names = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * value.ndim
    batch, axes = layer_axes(path), value.ndim - layer_axes(path)
    bias = flat.get((*path[:-1], "bias"))
    if axes < 2:
        inputs = 0
    elif bias is not None:
        inputs = axes - (nn.unbox(bias).ndim - batch)
    else:  # the one map of several inputs is that from heads
        inputs = 2 if tuple(names[batch : batch + 2]) == ("heads", "head_dim") else 1
    return Place("/".join(path), value.shape, tuple(names), batch, inputs)


def add(params, adapt, key):
    """Returns boxed parameters with new adapters under "adapters"; no effect where `adapt` is empty.

    Args:
      params: boxed tree, as Linen's init gives. adapt: of the config. key: each adapter's own is made of it and its path.

    Raises:
      UserError: as `check` and rules.first_matches; a parameter that its adapter cannot change.
    """
    pairs = check(adapt)
    if not pairs:
        return params
    flat = flatten_dict(params)
    paths = {"/".join(path): path for path in flat}
    own, kernels = {}, [name for name, path in paths.items() if path[-1] == "kernel"]
    for name, adapter in first_matches(pairs, paths, "adapt", kernels[:3]).items():
        path, mine = paths[name], jax.random.fold_in(key, zlib.crc32(name.encode()))
        made = adapter.init(mine, _place(path, flat[path], flat))
        own |= {(*path, part): value for part, value in made.items()}
    return {**params, KEY: unflatten_dict(own)}


def adapters_of(params, adapt) -> dict:
    """Returns path of an adapted parameter → (its adapter, the adapter's parameters)."""
    pairs, groups = check(adapt), {}
    for path, value in flatten_dict(params.get(KEY, {})).items():
        groups.setdefault(path[:-1], {})[path[-1]] = value
    result = {}
    for path, own in groups.items():
        adapter = next((one for pattern, one in pairs if matcher(pattern, "adapt").fullmatch("/".join(path))), None)
        assert adapter is not None, f"no adapter of {path} in the config"
        result[path] = (adapter, own)
    return result


def merge(params, adapt):
    """Returns the parameters that the model computes with: the base, changed by its adapters, and no adapters.

    params: unboxed tree; one without adapters is returned as it is.
    """
    if not adapt or KEY not in params:
        return params
    flat = flatten_dict({name: value for name, value in params.items() if name != KEY})
    for path, (adapter, own) in adapters_of(params, adapt).items():
        flat[path] = adapter.apply(flat[path], own, layer_axes(path))
        bias = (*path[:-1], "bias")
        if isinstance(adapter, Scale) and bias in flat:
            flat[bias] = adapter.apply_bias(flat[bias], own)
    return unflatten_dict(flat)


def penalty(params, adapt):
    """Returns what adapters add to the loss; 0 where none does."""
    if not adapt or KEY not in params:
        return 0.0
    found = adapters_of(params, adapt).items()
    return sum(a.loss(own, layer_axes(path)) for path, (a, own) in found if isinstance(a, AdaLora))


def freezing(params) -> tuple:
    """Returns the rate rules that train adapters and the objectives' heads, and freeze all else."""
    heads = (("objective_.*", 1.0),) if any(name.startswith("objective_") for name in params) else ()
    doubt = (("balance_.*", 1.0),) if any(name.startswith("balance_") for name in params) else ()
    return ((f"{KEY}/.*", 1.0), *heads, *doubt, (".*", 0.0))
