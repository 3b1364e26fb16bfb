"""What every entry of FUSIONS promises, over every subset of modalities."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import HEADS, D, assert_trees_equal, block_flops, finite
from support.selection import covering, first
from test_layers import assert_trees_close, draw, parameters, stacked

from vmm.errors import UserError
from vmm.fusion import FUSIONS
from vmm.sharding import MeshShape, batch_sharding, make_mesh, place_state
from vmm.training.metrics import count_flops
from vmm.types import MODALITIES, SUBSETS, Tokens

# Widths differ from the fusion's: streams are brought to one.
STREAMS = {"video": (6, D), "audio": (4, 12), "text": (5, 20)}
# A batch has a sample of every subset, one of all with more padding, and one of nothing.
SAMPLES = [*SUBSETS.values(), MODALITIES, ()]
ALL = len(SUBSETS) - 1  # the sample that has all streams
B = len(SAMPLES)
EVERY = np.ones(B, bool)
# These programs are compiled for one call or two: without optimisation, a quarter of the time.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# Bottleneck tokens carry a stream to the others one layer later: what mixes, mixes within two.
FIELDS = {kind: dict(depth=2) for kind in FUSIONS} | {"schedule": dict(layers=("none", "bottleneck", "bottleneck"))}
FIELDS["mutual"]["frames"] = 2
fusions = pytest.mark.parametrize("kind", FUSIONS)


def named(value) -> str:
    return value if isinstance(value, str) else "+".join(value)


BATCH = 2  # samples whose FLOPs are counted


def pair_flops(counts, width, module):
    """What every two streams exchange through one matrix, at three fields of view."""
    return sum(6 * (n * m + module.frames**2 + 1) * width for n, m in itertools.combinations(counts, 2))


# Forward FLOPs of a sample and layer, as each docstring says. counts: tokens of each stream.
FUSION_FLOPS = {
    "late": lambda counts, width, module: sum(block_flops(n, width) for n in counts),
    "joint": lambda counts, width, module: block_flops(sum(counts), width),
    "cross": lambda counts, width, module: sum(
        n * 20 * width**2 + sum(counts) * 4 * width**2 + 4 * n * sum(counts) * width for n in counts
    ),
    "bottleneck": lambda counts, width, module: sum(block_flops(n + module.bottlenecks, width) for n in counts),
    "mixed": lambda counts, width, module: (
        sum(n * (24 * width**2 + 6 * width) + 4 * n * sum(counts) * width for n in counts)
        + (6 + 2 / BATCH) * module.latents * width**2
        + 8 * module.latents * sum(counts) * width
    ),
    "mutual": lambda counts, width, module: (
        sum(block_flops(n, width) for n in counts)
        + (len(counts) > 1)
        * sum(
            6 * n * width**2 + 2 * (module.frames + 1) * width**2 + 6 * n * (module.frames + 1) * width for n in counts
        )
        + pair_flops(counts, width, module)
    ),
    "gated": lambda counts, width, module: sum(
        block_flops(n, width)
        + (len(counts) > 1) * (n * 20 * width**2 + (sum(counts) - n) * (4 * width**2 + 4 * n * width))
        for n in counts
    ),
    "perceiver": lambda counts, width, module: (
        block_flops(module.latents, width)
        + (module.latents + sum(counts)) * 20 * width**2
        + (sum(counts) + len(counts) * module.latents) * 4 * width**2
        + 8 * module.latents * sum(counts) * width
    ),
    "lowrank": lambda counts, width, module: sum(
        block_flops(n, width) + (2 * module.rank + 2) * width**2 for n in counts
    ),
    "experts": lambda counts, width, module: block_flops(sum(counts), width),
}


def streams_of(names: tuple) -> dict:
    """Every sample has the streams that SAMPLES gives it, the last tokens of each padding."""
    result = {}
    for seed, name in enumerate(MODALITIES):
        count, width = STREAMS[name]
        valid = np.zeros((B, count), bool)
        for i, sample in enumerate(SAMPLES):
            if name in sample:
                valid[i, : count - 1 - (i > ALL)] = True
        at = np.broadcast_to(np.random.default_rng(seed).permutation(2 * count)[:count], (B, count))
        x = np.asarray(draw((B, count, width), seed + 1)) * valid[..., None]
        result[name] = Tokens(jnp.asarray(x), jnp.asarray(valid), jnp.asarray(at, jnp.int32))
    return {name: result[name] for name in names}


def fusion_of(kind: str, **fields):
    return FUSIONS[kind](width=D, heads=HEADS, **(FIELDS[kind] | fields))


def differentiated(module, streams):
    """Returns the compiled (params, streams, samples=all) → (fused x, gradients of those samples' loss)."""
    names = list(streams)

    def function(params, x, streams, samples):
        def loss(params, x):
            fused = module.apply({"params": params}, {name: streams[name]._replace(x=x[name]) for name in names})
            there = {name: (t.valid & samples[:, None])[..., None] for name, t in fused.items()}
            total = sum(jnp.sin(t.x * there[name]).sum() for name, t in fused.items())
            return total, {name: t.x for name, t in fused.items()}

        gradient, fused = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return fused, gradient

    jitted = compiled(function)
    return lambda params, streams, samples=EVERY: jitted(
        params, {name: t.x for name, t in streams.items()}, streams, samples
    )


@functools.cache
def whole(kind: str):
    """(streams, parameters, compiled function) over all modalities, scanned: its compile time knows no depth."""
    module = fusion_of(kind, scan=True)
    streams = streams_of(MODALITIES)
    return streams, stacked(parameters(fusion_of(kind), streams)), differentiated(module, streams)


@functools.cache
def seen(kind: str):
    """What `whole` gives of its own streams."""
    streams, params, function = whole(kind)
    return function(params, streams)


def valid_parts(fused, streams) -> dict:
    return {name: np.asarray(fused[name])[np.asarray(streams[name].valid)] for name in streams}


@pytest.mark.parametrize(("kind", "names"), covering(FUSIONS, SUBSETS.values(), ids=named))
def test_fusion_keeps_keys_and_counts(kind: str, names: tuple):
    """bfloat16 in is bfloat16 out, and parameters are float32."""
    half = {name: t._replace(x=t.x.astype(jnp.bfloat16)) for name, t in streams_of(names).items()}
    fused, variables = jax.eval_shape(fusion_of(kind, scan=True).init_with_output, jax.random.key(0), half)
    assert set(fused) == set(names)
    for name in names:
        assert fused[name].x.shape == (B, STREAMS[name][0], D)
        assert fused[name].x.dtype == jnp.bfloat16
        assert fused[name].at.dtype == jnp.int32
    assert {leaf.dtype for leaf in jax.tree.leaves(nn.unbox(variables["params"]))} == {jnp.dtype("float32")}


@fusions
def test_invalid_tokens_change_no_fusion(kind: str):
    streams, params, function = whole(kind)
    fused, (gradient, inner) = seen(kind)
    assert finite(fused)
    assert finite((gradient, inner))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        if "alpha" not in str(path):
            assert np.abs(leaf).max() > 0, f"no gradient for {path}"
    for name, tokens in streams.items():
        assert np.abs(np.asarray(inner[name])[np.asarray(tokens.valid)]).max(-1).min() > 1e-6, "a token unheard of"
        assert not np.asarray(inner[name])[~np.asarray(tokens.valid)].any(), "gradient into an invalid token"
    for value in (1e3, -7.0):
        dirty = {
            name: t._replace(x=jnp.where(t.valid[..., None], t.x, value), at=jnp.where(t.valid, t.at, 99 - t.at))
            for name, t in streams.items()
        }
        other, other_gradient = function(params, dirty)
        assert_trees_equal(valid_parts(other, streams), valid_parts(fused, streams))
        assert_trees_equal(other_gradient, (gradient, inner))


@pytest.mark.parametrize(("kind", "names"), covering(FUSIONS, list(SUBSETS.values())[:ALL], ids=named))
def test_a_lacking_stream_is_as_if_it_were_not_there(kind: str, names: tuple):
    """A sample of a subset comes out as from a fusion of that subset alone, with the same parameters."""
    streams, params, _ = whole(kind)
    fused, _ = seen(kind)
    i = SAMPLES.index(names)
    module = fusion_of(kind, scan=True)
    mine = {name: jax.tree.map(lambda leaf: leaf[i : i + 1], streams[name]) for name in names}
    alone = compiled(lambda params, s: module.apply({"params": params}, s))(params, mine)
    for name in names:
        there = np.asarray(mine[name].valid)[0]
        np.testing.assert_allclose(np.asarray(alone[name].x)[0][there], np.asarray(fused[name])[i][there], atol=5e-5)


@fusions
def test_a_stream_that_goes_leaves_other_samples_alone(kind: str):
    streams, params, function = whole(kind)
    fused, _ = seen(kind)
    for name in MODALITIES:
        gone = streams | {name: streams[name]._replace(valid=streams[name].valid.at[ALL].set(False))}
        other, _ = function(params, gone)
        for target in MODALITIES:
            np.testing.assert_array_equal(np.delete(other[target], ALL, 0), np.delete(fused[target], ALL, 0))


@fusions
def test_a_samples_loss_is_its_own_tokens_alone(kind: str):
    streams, params, function = whole(kind)
    _, (gradient, inner) = function(params, streams, np.arange(B) == ALL)
    _, (_, every) = seen(kind)
    for name in MODALITIES:
        assert not np.delete(inner[name], ALL, 0).any()
        np.testing.assert_allclose(inner[name][ALL], every[name][ALL], atol=1e-5)
    assert finite(gradient)


def turned(tokens: Tokens) -> Tokens:
    """Other contents, in another direction: a norm would undo a shift or a scale."""
    return tokens._replace(x=tokens.x[..., ::-1])


@fusions
def test_late_keeps_streams_apart_and_others_mix(kind: str):
    streams, params, function = whole(kind)
    fused, _ = seen(kind)
    for name in MODALITIES:
        other, _ = function(params, streams | {name: turned(streams[name])})
        for target, (i, sample) in itertools.product(MODALITIES, enumerate(SAMPLES)):
            if name not in sample or target not in sample:
                continue
            there = np.asarray(streams[target].valid)[i]
            difference = np.abs(np.asarray(other[target] - fused[target])[i][there]).max()
            if kind == "late" and target != name:
                assert difference == 0, f"{name} reaches {target}"
            else:
                assert difference > 1e-4, f"{name} does not reach {target} in {sample}"


@fusions
def test_fusion_in_half_precision_keeps_places(kind: str):
    streams, params, _ = whole(kind)
    fused, _ = seen(kind)
    module = fusion_of(kind, scan=True)
    forward = compiled(lambda p, s: module.apply({"params": p}, s))
    other = forward(params, {name: t._replace(x=t.x.astype(jnp.bfloat16)) for name, t in streams.items()})
    for name in MODALITIES:
        assert_trees_equal(other[name][1:], streams[name][1:])
        assert other[name].x.dtype == jnp.bfloat16
        there = np.asarray(streams[name].valid)
        error = np.abs(np.asarray(other[name].x, np.float32) - np.asarray(fused[name]))[there]
        assert error.max() < 0.06 * np.abs(np.asarray(fused[name])[there]).max()


# One scans for all; these differ in what a layer hands on.
@pytest.mark.parametrize(
    "kind", first(sorted(FUSIONS, key=lambda kind: kind not in ("bottleneck", "mutual", "schedule")), 3)
)
def test_scanned_fusion_is_the_loop(kind: str):
    streams, mine, _ = whole(kind)
    loop, scan = (fusion_of(kind, scan=scanned) for scanned in (False, True))
    params = parameters(loop, streams)
    shapes = jax.eval_shape(scan.init, jax.random.key(0), streams)["params"]
    assert jax.tree.map(jnp.shape, nn.unbox(shapes)) == jax.tree.map(jnp.shape, mine)
    fused, (gradient, inner) = differentiated(loop, streams)(params, streams)
    other, (other_gradient, other_inner) = seen(kind)
    assert finite((other, other_gradient, other_inner))
    assert_trees_close(other, fused)
    assert_trees_close((other_gradient, other_inner), (stacked(gradient), inner))


@fusions
def test_fusion_on_a_mesh_is_the_fusion(kind: str):
    """Batch over four devices, heads and hidden units over two."""
    streams, params, _ = whole(kind)
    fused, _ = seen(kind)
    module = fusion_of(kind, scan=True)
    rows = [i % B for i in range(12)]
    shapes = jax.eval_shape(module.init, jax.random.key(0), streams)["params"]
    mesh = make_mesh(MeshShape(2, 2, 2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, place_state(shapes, mesh))
        assert any(not sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings))
        placed = jax.device_put(params, shardings)
        batch = jax.device_put(jax.tree.map(lambda leaf: leaf[np.array(rows)], streams), batch_sharding(mesh))
        other = compiled(lambda p, s: {name: t.x for name, t in module.apply({"params": p}, s).items()})(placed, batch)
    for name in MODALITIES:
        there = np.asarray(streams[name].valid)[rows]
        np.testing.assert_allclose(np.asarray(other[name])[there], np.asarray(fused[name])[rows][there], atol=5e-5)


def fusion_flops(kind: str, counts: dict, width: int, **fields) -> tuple[float, object]:
    """FLOPs of one sample's forward pass, traced from shapes alone."""
    module = FUSIONS[kind](width=width, **fields)
    shaped = {
        name: Tokens(
            jax.ShapeDtypeStruct((BATCH, count, width), jnp.float32),
            jax.ShapeDtypeStruct((BATCH, count), jnp.bool_),
            jax.ShapeDtypeStruct((BATCH, count), jnp.int32),
        )
        for name, count in counts.items()
    }
    params = jax.eval_shape(lambda key, s: nn.unbox(module.init(key, s)), jax.random.key(0), shaped)
    return count_flops(jax.jit(module.apply), params, shaped) / BATCH, module


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.exhaustive("a scan is traced sooner"))])
@pytest.mark.parametrize(("kind", "names"), covering(FUSIONS, reversed(SUBSETS.values()), ids=named))
def test_fusion_flops_are_the_closed_form(kind: str, names: tuple, scan: bool):
    counts = {name: count for name, count in dict(video=96, audio=40, text=24).items() if name in names}
    layers = ("none", "mixed", "mixed", "perceiver") if kind == "schedule" else (kind,) * 2
    fields = dict(layers=layers) if kind == "schedule" else dict(depth=2)
    flops, _ = fusion_flops(kind, counts, 128, heads=4, scan=scan, **fields)
    expected = 0
    for layer in layers:
        layer = "late" if layer == "none" else layer
        assert layer in FUSION_FLOPS, f"give the new fusion {layer!r} the closed form of its docstring"
        expected += FUSION_FLOPS[layer](list(counts.values()), 128, FUSIONS[layer](width=128, depth=1, heads=4))
    assert flops == pytest.approx(expected, rel=0.005)


def test_cross_fusion_at_full_size():
    """ViT-B over 1568 video and 200 audio tokens: half of what computing every token for every stream costs."""
    flops, _ = fusion_flops("cross", dict(video=1568, audio=200), 768, depth=12, heads=12, scan=True)
    assert flops == pytest.approx(466e9, rel=0.01)


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("kind", ["mixed", "gated", "schedule"])
def test_gates_are_reported_to_who_asks(kind: str, scan: bool):
    fields = dict(layers=("none", "gated", "gated")) if kind == "schedule" else {}
    module = fusion_of(kind, scan=scan, remat=True, **fields)
    streams = streams_of(MODALITIES[:2])
    params = parameters(module, streams)

    def apply(params, **asked):
        return module.apply({"params": params}, streams, **asked)

    assert "gates" not in jax.eval_shape(module.init, jax.random.key(0), streams)
    assert isinstance(jax.eval_shape(apply, params), dict), "streams alone"
    fused, sown = compiled(lambda params: apply(params, mutable=["gates"]))(params)
    assert list(sown) == ["gates"]
    gates = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(sown["gates"])
    }
    depth = 1 if scan else 2
    names = ("self", "cross", "global") if kind == "mixed" else ("attention", "mlp")
    assert len(gates) == depth * 2 * len(names)
    assert all(value.shape == ((2,) if scan else ()) for value in gates.values())
    if kind == "mixed":
        total = sum(np.sum(value) for value in gates.values())
        assert total == pytest.approx(4, rel=1e-5), "shares of two streams in two layers"
        assert all((value > 0).all() for value in gates.values())
    else:
        place = params["run_1" if kind == "schedule" else "blocks"]
        place = place["blocks"] if kind == "schedule" else place
        layer = place["layers" if scan else "layer_1"]["read_audio"]["alpha_mlp"]
        mine = [value for path, value in gates.items() if "read_audio/gate_mlp" in path and ("layer_0" not in path)]
        np.testing.assert_allclose(mine[0], np.tanh(layer), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (dict(layers=("none", "bottlneck")), r"trunk.fusion.layers: unknown kind 'bottlneck'; did you mean 'bottleneck'\? "),
        (dict(layers=("late",)), r"trunk.fusion.layers: unknown kind 'late'; .*known: bottleneck, cross, .*none"),
        (dict(layers=("none",), fields=dict(crss={})), r"trunk.fusion.fields: unknown kind 'crss'"),
        (dict(layers=("mixed",), fields=dict(mixed=dict(bottlenecks=2))), r"fusion.fields.mixed.bottlenecks: no such key"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be(fields: dict, line: str):
    with pytest.raises(UserError, match=line):
        jax.eval_shape(fusion_of("schedule", **fields).init, jax.random.key(0), streams_of(("video",)))


def test_a_sublayers_options_are_checked():
    with pytest.raises(UserError, match=r"block.sharpness: no such key"):
        jax.eval_shape(fusion_of("experts", block=dict(sharpness=1)).init, jax.random.key(0), streams_of(("video",)))
    with pytest.raises(UserError, match=r"block.norm: unknown 'between'; known: post, pre"):
        jax.eval_shape(fusion_of("mixed", block=dict(norm="between")).init, jax.random.key(0), streams_of(("video",)))
