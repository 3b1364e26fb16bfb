"""The contracts of kinds, for parts of one's own: check_fusion(MyFusion) fails with a sentence on what it breaks.

Each check builds a small one, and raises AssertionError; they take seconds on a CPU, and need no test framework.
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vmm.types import SUBSETS, Batch, Mask, Outputs, Patches, Tokens

_WIDTH, _ROWS = 16, 5
_TOKENS = {"video": 6, "audio": 4, "text": 5}
# A sample of every kind: all streams, one lacks each, and none.
_PRESENT = {
    "video": (True, False, True, True, False), "audio": (True, True, False, True, False),
    "text": (True, True, True, False, False),
}  # fmt: skip


def check_fusion(cls: type[nn.Module], **fields) -> None:
    """Checks a fusion, Streams → Streams. fields: of the class, beside width, depth and heads.

    Raises:
      AssertionError: streams are lost or get another shape; a token that is not valid changes others; samples of a batch
        change each other; numbers or gradients are not finite; parameters are not float32.
    """
    module = _built(cls, dict(width=_WIDTH, depth=2, heads=2), fields)
    streams = _streams(0)
    params = _parameters(module, streams)
    apply = jax.jit(lambda params, streams: module.apply({"params": params}, streams))
    whole = apply(params, streams)
    _same_keys(whole, streams, "a fusion keeps every stream")
    for name, tokens in whole.items():
        _shape(tokens.x, (*streams[name].x.shape[:2], _WIDTH), f"the fused stream {name!r}")
        _equal(tokens.valid, streams[name].valid, f"a fusion leaves alone which tokens of {name!r} are valid")
        _finite(tokens.x, f"the fused stream {name!r}")
    _valid_only(whole, apply(params, _wild(streams)), streams)
    order = np.array([3, 0, 4, 1, 2])
    turned = apply(params, jax.tree.map(lambda leaf: leaf[order], streams))
    for name in streams:
        _close(turned[name].x, whole[name].x[order], f"a sample's {name!r} depends on the batch around it")
    for names in SUBSETS.values():
        some = {name: streams[name] for name in names}
        found = module.apply({"params": _parameters(module, some)}, some)
        _same_keys(found, some, f"a fusion takes any set of modalities, here {names}")

    def total(params, streams):
        fused = module.apply({"params": params}, streams)
        return sum(jnp.where(t.valid[..., None], t.x, 0).astype(jnp.float32).var() for t in fused.values())

    gradient, inner = jax.jit(jax.grad(total, (0, 1), allow_int=True))(params, streams)
    _finite(gradient, "the gradient of the fusion's parameters")
    for name, tokens in inner.items():
        _none(
            np.asarray(tokens.x)[~np.asarray(streams[name].valid)],
            f"a gradient reaches tokens of {name!r} that are not valid",
        )
    _on_several_devices(apply, params, streams, whole)


def check_encoder(cls: type[nn.Module], inputs: np.ndarray, **fields) -> None:
    """Checks an encoder. inputs: a batch [B …] of its modality, of four rows or more. fields: of the class.

    Raises:
      AssertionError: patches and grid disagree; kept tokens are not those that come out, or see hidden ones; samples of a
        batch change each other; tokens are not finite; parameters are not float32.
    """
    module = _built(cls, dict(width=_WIDTH, depth=1, heads=2), fields)
    assert len(inputs) >= 4, "check_encoder: give four rows or more"
    inputs = jnp.asarray(inputs)
    patches = module.patches(inputs)
    count = math.prod(patches.grid)
    _shape(patches.valid, (len(inputs), count), "`valid` of patches, whose second axis is the product of the grid")
    assert patches.values.shape[:2] == (len(inputs), count), "patches.values: [B N …], N the product of the grid"
    params = nn.unbox(module.init(jax.random.key(0), patches, None))["params"]
    _float32(params)
    apply = jax.jit(
        lambda params, values, keep: module.apply({"params": params}, patches._replace(values=values), keep)
    )
    whole = apply(params, patches.values, None)
    _finite(jnp.where(whole.valid[..., None], whole.x, 0), "encoded tokens")
    keep = jnp.tile(jnp.arange(0, count, 2, dtype=jnp.int32), (len(inputs), 1))
    some = apply(params, patches.values, keep)
    shown = np.asarray(some.at)[np.asarray(some.at) >= 0]
    assert set(shown.tolist()) == set(np.asarray(keep).ravel().tolist()), (
        "`at` of encoded tokens: the places that were kept"
    )
    hidden = np.setdiff1d(np.arange(count), np.asarray(keep[0]))
    other = np.array(patches.values)
    other[:, hidden] = np.roll(other[:, hidden], 1, axis=0)
    _close(apply(params, jnp.asarray(other), keep).x, some.x, "kept tokens see hidden ones")
    order = np.roll(np.arange(len(inputs)), 1)
    turned = module.apply(
        {"params": params}, jax.tree.map(lambda leaf: leaf[order] if hasattr(leaf, "shape") else leaf, patches), None
    )
    _close(turned.x, whole.x[order], "a sample's tokens depend on the batch around it")


def check_objective(cls: type[nn.Module], outputs: Outputs | None = None, batch: Batch | None = None, **fields) -> None:
    """Checks an objective. outputs, batch: of a view, for one that needs more than streams; fields: of the class.

    Without them: three streams of width 16, 6, 4 and 5 tokens, of which half are hidden where `needs_hidden`; a label
    "label" of 3 classes; five samples.

    Raises:
      AssertionError: features are not by sample; the loss of parts is not that of the whole; rows that only fill a batch
        count; the loss is no finite float32 number, also of a batch of nothing; predictions depend on the batch around.
    """
    module = _built(cls, {}, fields)
    made = _view(getattr(module, "needs_hidden", False))
    outputs, batch = outputs or made[0], batch or made[1]
    params = nn.unbox(module.init(jax.random.key(0), outputs, batch))["params"]
    _float32(params)
    variables = {"params": params}

    def rows(tree, chosen):
        return jax.tree.map(lambda leaf: leaf[chosen] if getattr(leaf, "ndim", 0) else leaf, tree)

    def features(outputs, batch):
        return module.apply(variables, outputs, batch, method="features")

    def loss(found):
        return module.apply(variables, found, method="loss")

    found, size = features(outputs, batch), len(batch.valid)
    for leaf in jax.tree.leaves(found):
        assert leaf.shape[:1] == (size,), f"features are by sample, [B …]: one is {leaf.shape}"
    value, metrics = loss(found)
    _shape(value, (), "the loss")
    assert value.dtype == jnp.float32, f"the loss is float32, got {value.dtype}"
    _finite((value, metrics), "the loss and its metrics")
    _close(module.apply(variables, outputs, batch)[0], value, "a call is the loss of the features")
    parts = [features(rows(outputs, part), rows(batch, part)) for part in (np.array([0, 1]), np.arange(2, size))]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    _close(
        loss(joined)[0],
        value,
        "features of parts of a batch do not give the loss of the whole: they depend on the batch",
    )
    filled = batch._replace(valid=batch.valid.at[-1].set(False))
    wild = rows(outputs, np.array([*range(size - 1), 0]))
    _close(
        loss(features(wild, filled))[0], loss(features(outputs, filled))[0],
        "rows that only fill a batch (batch.valid is False) count in the loss",
    )  # fmt: skip
    empty = batch._replace(valid=jnp.zeros_like(batch.valid))
    _finite(loss(features(outputs, empty))[0], "the loss of a batch of nothing")
    gradient = jax.grad(lambda p: module.apply({"params": p}, outputs, batch)[0])(params)
    _finite(gradient, "the gradient of the loss")
    order = np.roll(np.arange(size), 1)
    said, turned = (
        module.apply(variables, rows(outputs, chosen), rows(batch, chosen), method="predict")
        for chosen in (np.arange(size), order)
    )
    for name, values in said.items():
        assert values.shape[:1] == (size,), f"predictions are by sample, [B …]: {name!r} is {values.shape}"
        _close(turned[name], values[order], f"the prediction {name!r} depends on the batch around it")


def check_mask(cls: type, grid: tuple[int, ...] = (4, 4, 4), ratio: float = 0.5, **fields) -> None:
    """Checks a mask: (key, valid [N], grid) → Mask.

    Raises:
      AssertionError: shown and hidden places are not all and each once, in order; their number depends on the sample; the
        same key gives another mask, or all keys the same; padding is hidden in the place of tokens.
    """
    mask, count = cls(ratio=ratio, **fields), math.prod(grid)
    draw = jax.jit(jax.vmap(lambda key, valid: mask(key, valid, grid)))
    keys = jax.random.split(jax.random.key(0), 16)
    valid = jnp.ones((16, count), bool)
    found = draw(keys, valid)
    assert isinstance(found, Mask), f"a mask returns types.Mask, got {type(found).__name__}"
    for keep, hidden in zip(np.asarray(found.keep), np.asarray(found.hidden)):
        assert sorted([*keep, *hidden]) == list(range(count)), "keep and hidden are disjoint, together all places"
        assert (np.diff(keep) > 0).all() and (np.diff(hidden) > 0).all(), "keep and hidden ascend"
    _equal(draw(keys, valid).hidden, found.hidden, "the same keys give the same masks")
    assert len({row.tobytes() for row in np.asarray(found.hidden)}) > 1, "all keys give the same mask"
    padded = valid.at[:, count // 2 :].set(False)
    some = draw(keys, padded)
    assert some.hidden.shape == found.hidden.shape, "how many are hidden depends on the grid and the ratio alone"
    hidden = np.take_along_axis(np.asarray(padded), np.asarray(some.hidden), 1).sum(1)
    assert (hidden > 0).all(), "a padded sample hides tokens too, not its padding alone"


def check_evaluator(cls: type, predict: Callable, **fields) -> None:
    """Checks an evaluator. predict: (manifest, subset) → predictions, as vmm.evaluate.Predict. fields: of the class.

    Raises:
      AssertionError: it is no dataclass; its numbers are no floats by name; the same predictions give other numbers.
    """
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} is no dataclass: its fields are its config"
    found, again = (cls(**fields)(predict) for _ in range(2))
    assert found and all(isinstance(name, str) for name in found), "an evaluator returns name → number, and some"
    for name, value in found.items():
        assert isinstance(value, float), f"{name}: a float, got {type(value).__name__}"
        assert value == again[name] or (math.isnan(value) and math.isnan(again[name])), (
            f"{name}: differs when it is computed again"
        )


def _built(cls: type[nn.Module], usual: dict, fields: dict) -> nn.Module:
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in usual.items() if name in known} | fields)


def _streams(seed: int) -> dict[str, Tokens]:
    rng, result = np.random.default_rng(seed), {}
    for name, count in _TOKENS.items():
        valid = np.repeat(np.array(_PRESENT[name])[:, None], count, axis=1)
        valid[1, count - 2 :] = False  # padding
        x = rng.normal(size=(_ROWS, count, _WIDTH)).astype(np.float32) * valid[..., None]
        at = np.tile(np.arange(count, dtype=np.int32), (_ROWS, 1))
        result[name] = Tokens(jnp.asarray(x), jnp.asarray(valid), jnp.asarray(at))
    return result


def _view(hides: bool) -> tuple[Outputs, Batch]:
    rng, encoded, patches, masks = np.random.default_rng(1), _streams(0), {}, {}
    for name, tokens in encoded.items():
        count = _TOKENS[name]
        classes = 11 if name == "text" else 0
        values = rng.integers(1, 11, (_ROWS, count)) if classes else rng.normal(size=(_ROWS, count, 8))
        values = jnp.asarray(values, jnp.int32 if classes else jnp.float32)
        patches[name] = Patches(values, tokens.valid, (count,), classes)
        if hides:
            keep, hidden = np.arange(0, count, 2), np.arange(1, count, 2)
            masks[name] = Mask(*(jnp.tile(jnp.asarray(part, jnp.int32), (_ROWS, 1)) for part in (keep, hidden)))
            encoded[name] = Tokens(tokens.x[:, keep], tokens.valid[:, keep], tokens.at[:, keep])
    fused = {name: tokens._replace(x=tokens.x[..., ::-1]) for name, tokens in encoded.items()}
    batch = Batch(
        inputs={name: patch.values for name, patch in patches.items()},
        present={name: jnp.asarray(value) for name, value in _PRESENT.items()},
        labels={"label": jnp.asarray([0, 1, 2, -1, 1], jnp.int32)},
        index=jnp.arange(_ROWS, dtype=jnp.int32),
        valid=jnp.ones(_ROWS, bool),
    )
    return Outputs(encoded, fused, patches, masks), batch


def _parameters(module: nn.Module, streams: dict):
    params = nn.unbox(module.init(jax.random.key(0), streams)).get("params", {})
    _float32(params)
    # Initial zeros, as of gates and last maps, would hide what a part does.
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), max(1, len(leaves)))
    return structure.unflatten([leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)])


def _wild(streams: dict) -> dict:
    return {name: t._replace(x=jnp.where(t.valid[..., None], t.x, 1e3)) for name, t in streams.items()}


def _valid_only(whole: dict, other: dict, streams: dict) -> None:
    for name, tokens in streams.items():
        valid = np.asarray(tokens.valid)
        _close(
            np.asarray(other[name].x)[valid], np.asarray(whole[name].x)[valid],
            f"tokens that are not valid change valid ones of {name!r}",
        )  # fmt: skip


def _on_several_devices(apply: Callable, params, streams: dict, whole: dict) -> None:
    if jax.device_count() < _ROWS:
        return
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:_ROWS]), ("data",))
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = apply(jax.device_put(params, everywhere), jax.device_put(streams, by_row))
    for name in streams:
        _close(found[name].x, whole[name].x, f"{name!r} differs where the batch is split over devices")


def _same_keys(found: dict, wanted: dict, sentence: str) -> None:
    assert set(found) == set(wanted), f"{sentence}: {sorted(wanted)}, got {sorted(found)}"


def _shape(array, shape: tuple, what: str) -> None:
    assert array.shape == shape, f"{what}: shape {shape}, got {array.shape}"


def _float32(params) -> None:
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
    assert kinds <= {"float32"}, f"parameters are float32, got {sorted(kinds)}"


def _finite(tree, what: str) -> None:
    # Of whole numbers, as places, a gradient is of no numbers at all.
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)]
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in floats), f"{what}: not finite"


def _equal(one, two, sentence: str) -> None:
    assert np.array_equal(np.asarray(one), np.asarray(two)), sentence


def _close(one, two, sentence: str) -> None:
    one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
    assert one.shape == two.shape and np.allclose(one, two, rtol=1e-3, atol=1e-4), sentence


def _none(values: np.ndarray, sentence: str) -> None:
    assert not np.asarray(values).any(), sentence
