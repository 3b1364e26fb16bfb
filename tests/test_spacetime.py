"""Attention over parts of space-time, packed clips and merged tokens: against numpy, those of `transformers` and themselves."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from contracts import block_flops
from test_layers import assert_trees_close, draw, numpy_attention, numpy_block, numpy_norm, parameters, stacked

from vmm import layers
from vmm.encoders.video import VideoEncoder
from vmm.errors import UserError
from vmm.layers import merging, positions, spacetime
from vmm.training.metrics import count_flops
from vmm.types import Patches

B, D, HEADS = 2, 16, 4
GRID, WINDOW = (4, 3, 5), (2, 2, 3)
COUNT = math.prod(GRID)
COORDINATES = list(itertools.product(*map(range, GRID)))
MIXED = dict(kind="mixed", heads=dict(joint=1, temporal=1, local=1, spatial=1))


def sees(pattern: str, one: tuple | None, other: tuple | None, shifted: bool = False) -> bool:
    """Whether a token at one place sees one at the other, by the words of the module's table; None: a register."""
    if pattern == "joint" or one is None or other is None:
        return True
    if pattern == "spatial":
        return one[0] == other[0]
    if pattern == "temporal":
        return one[1:] == other[1:]
    shift = [size // 2 if shifted else 0 for size in WINDOW]
    return all((a + s) // size == (b + s) // size for a, b, s, size in zip(one, other, shift, WINDOW))


def layout_of(registers: int, whole: bool) -> spacetime.Layout:
    at = np.r_[np.full(registers, -1), np.arange(COUNT)]
    at = jnp.asarray(np.broadcast_to(at, (B, len(at))), jnp.int32)
    return spacetime.Layout(positions.places(at, GRID), GRID, registers, whole)


def some_valid(registers: int) -> np.ndarray:
    """Holes in the first sample, one of its frames empty; the last frames of the second are padding."""
    valid = np.ones((B, registers + COUNT), bool)
    valid[0, registers + np.array([2, 7, 40])] = False
    valid[0, registers + 15 : registers + 30] = False
    valid[1, registers + 30 :] = False
    return valid


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("pattern", ["spatial", "temporal", "local", "shifted", "by_frame"])
def test_patterns_are_the_reference_by_parts_and_masked(pattern: str, registers: int):
    kind = {"shifted": "local", "by_frame": "spatial"}.get(pattern, pattern)
    fields = dict(window=WINDOW, count=int(pattern == "shifted"), by_frame=pattern == "by_frame")
    valid = some_valid(registers)
    query, key, value = (draw((B, registers + COUNT, 2, 4), seed) for seed in range(3))

    def both(query, key, value):
        def loss(arrays, whole):
            y = spacetime.spacetime_attention(kind, *arrays, jnp.asarray(valid), layout_of(registers, whole), **fields)
            return jnp.sin(y * valid[..., None, None]).sum(), y

        return [jax.grad(loss, has_aux=True)((query, key, value), whole) for whole in (True, False)]

    (gradient, parts), (masked_gradient, masked) = jax.jit(both)(query, key, value)
    places = [None] * registers + COORDINATES
    see = np.array([[sees(kind, one, other, pattern == "shifted") for other in places] for one in places])
    for i in range(B):
        exact = [np.asarray(array[i], np.float64) for array in (query, key, value)]
        theirs = np.stack(
            [numpy_attention(exact[0][n : n + 1], *exact[1:], valid[i] & see[n])[0] for n in range(registers + COUNT)]
        )
        if pattern == "by_frame":  # a register: the mean over frames that are there of what it sees in each
            frames = [np.array([p is None or p[0] == t for p in places]) for t in range(GRID[0])]
            frames = [inside for inside in frames if (valid[i] & inside)[registers:].any()]
            each = [numpy_attention(exact[0][:registers], *exact[1:], valid[i] & inside) for inside in frames]
            theirs[:registers] = np.mean(each, axis=0)
            assert len(frames) == (3, 2)[i]
        np.testing.assert_allclose(parts[i][valid[i]], theirs[valid[i]], atol=1e-5)
        np.testing.assert_allclose(masked[i][valid[i]], theirs[valid[i]], atol=1e-5)
    assert_trees_close(gradient, masked_gradient)
    for leaf in gradient:
        assert np.isfinite(leaf).all()
        assert not leaf[~valid].any()
        assert np.abs(leaf[valid]).max() > 1e-3


def test_windows_are_clamped_and_alternate():
    assert spacetime.windows((8, 2, 7), (4, 3, 7), 0) == ([4, 2, 7], [0, 0, 0])
    assert spacetime.windows((8, 2, 7), (4, 3, 7), 3) == ([4, 2, 7], [0, 1, 0])
    # As data, for packed clips of grids (4, 3, 7) and (9, 9, 9): the same.
    sizes, shifts = spacetime.windows((8, 2, 7), jnp.array([[4, 3, 7], [9, 9, 9]]), 3)
    assert np.stack(sizes, -1).tolist() == [[4, 2, 7], [8, 2, 7]]
    assert np.stack(shifts, -1).tolist() == [[0, 1, 0], [4, 1, 3]]


def test_heads_are_shared_out_and_gated():
    """Each head by its own pattern, in the table's order whatever the config's; gates begin as plain."""
    plan = spacetime.make_plan(MIXED, HEADS)
    module = spacetime.SpaceTimeAttention(HEADS, shares=plan["shares"], window=WINDOW, gated=True)
    x, valid = draw((1, COUNT, D)), jnp.ones((1, COUNT), bool)
    at = jnp.arange(COUNT, dtype=jnp.int32)[None]
    layout = spacetime.Layout(positions.places(at, GRID), GRID, whole=True)
    start = jax.jit(lambda key: nn.unbox(module.init(key, x, None, valid, (layout, 0))))(jax.random.key(0))["params"]
    assert {name: float(start[f"gate_{name}"]) for name in spacetime.PATTERNS} == dict.fromkeys(spacetime.PATTERNS, 0.0)
    params = parameters(module, x, None, valid, (layout, 0))
    run = jax.jit(lambda p: module.apply({"params": p}, x, None, valid, (layout, 0), mutable=["gates"]))
    ours, sown = run(params)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    split = {
        name: np.einsum("nd,dah->nah", np.asarray(x[0], np.float64), exact[name]["kernel"]) + exact[name]["bias"]
        for name in ("query", "key", "value")
    }
    mixed = np.zeros((COUNT, HEADS, D // HEADS))
    for head, pattern in enumerate(("local", "spatial", "temporal", "joint")):
        gate = 2 / (1 + math.exp(-exact[f"gate_{pattern}"]))
        assert float(sown["gates"][pattern][0]) == pytest.approx(gate, rel=1e-5)
        for n, one in enumerate(COORDINATES):
            allowed = np.array([sees(pattern, one, other) for other in COORDINATES])
            own = slice(head, head + 1)
            part = numpy_attention(
                split["query"][n : n + 1, own], split["key"][:, own], split["value"][:, own], allowed
            )
            mixed[n, head] = gate * part[0, 0]
    theirs = np.einsum("nah,ahd->nd", mixed, exact["out"]["kernel"]) + exact["out"]["bias"]
    np.testing.assert_allclose(ours[0], theirs, atol=2e-5)
    assert spacetime.make_plan("dot_product", 4)["shares"] == (("spatial", 2), ("temporal", 2))


def video_of(batch: int, grid: tuple, seed: int = 0):
    shape = (batch, 2 * grid[0], 4 * grid[1], 4 * grid[2], 3)
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape), jnp.uint8)


def encoder_of(attention="joint", **fields) -> VideoEncoder:
    fields = dict(width=D, depth=2, heads=HEADS, tubelet=(2, 4, 4), window=WINDOW, attention=attention) | fields
    return VideoEncoder(**fields, temporal_depth=int(str(attention).startswith("factorised")))


def applied(encoder, **other):
    return jax.jit(lambda params, patches, keep: encoder.apply({"params": params}, patches._replace(**other), keep))


def arrays_of(patches: Patches) -> tuple:
    """(patches without what is static, the static rest), for jit."""
    return patches._replace(grid=None, classes=None), dict(grid=patches.grid, classes=patches.classes)


ENCODINGS = {
    "divided": ("divided", dict(registers=1, positions="factorised")),
    "factorised": ("factorised", dict(registers=1, positions="rotary")),
    "factorised_places": ("factorised_places", dict(registers=1, positions="places")),
    "mixed": (MIXED, dict(registers=1)),
    "layers": (("windowed", "joint", "windowed"), dict(depth=3, positions="learned")),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_kept_tokens_are_as_if_the_others_were_not_valid(name: str):
    """Of any mask; so the masked path and that by parts are one, and what is not valid changes nothing."""
    attention, fields = ENCODINGS[name]
    encoder = encoder_of(attention, **fields)
    patches, static = arrays_of(encoder.patches(video_of(B, GRID)))
    rng = np.random.default_rng(0)
    keep = np.sort([rng.permutation(COUNT)[:23] for _ in range(B)])
    valid = np.zeros((B, COUNT), bool)
    np.put_along_axis(valid, keep, True, axis=1)
    params = parameters(encoder, patches._replace(**static), None)
    run = applied(encoder, **static)
    garbage = jnp.where(valid[..., None], patches.values, 7)
    whole = run(params, patches._replace(valid=jnp.asarray(valid), values=garbage), None)
    kept = run(params, patches, jnp.asarray(keep, jnp.int32))
    registers = fields.get("registers", 0)
    np.testing.assert_array_equal(kept.at[:, registers:], keep)
    theirs = np.take_along_axis(np.asarray(whole.x)[:, registers:], keep[..., None], axis=1)
    np.testing.assert_allclose(kept.x[:, registers:], theirs, atol=1e-5)
    np.testing.assert_allclose(kept.x[:, :registers], whole.x[:, :registers], atol=1e-5)
    assert len(np.unique(np.asarray(kept.x).round(3), axis=1)[0]) > 20


def numpy_tree(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def test_factorised_is_a_transformer_of_frames_over_those_within_frames():
    """ViViT model 2, in numpy; the mean over tokens is its pooled output."""
    stack = spacetime.SpaceTimeStack(2, 2, attention="factorised", temporal_depth=1)
    x, layout = draw((B, COUNT, D)), layout_of(0, whole=True)
    params = parameters(stack, x, jnp.ones((B, COUNT), bool), layout)
    ours = jax.jit(lambda p, x: stack.apply({"params": p}, x, jnp.ones((B, COUNT), bool), layout))(params, x)
    p = numpy_tree(params)
    places = GRID[1] * GRID[2]
    for i in range(B):
        frames = np.asarray(x[i], np.float64).reshape(GRID[0], places, D)
        inside = [numpy_block(p["blocks"]["layer_0"]["block"], frame, np.ones(places, bool)) for frame in frames]
        inside = numpy_norm(p["norm_spatial"], np.stack(inside))
        mean = inside.mean(1)
        y = numpy_block(p["temporal"]["layer_0"]["block"], mean, np.ones(GRID[0], bool))
        y = numpy_norm(p["norm"], y)
        np.testing.assert_allclose(ours[i].mean(0), y.mean(0), atol=1e-5)
        np.testing.assert_allclose(ours[i].reshape(*frames.shape), inside + (y - mean)[:, None], atol=3e-5)


def attention_flops(name: str, width: int, registers: int) -> float:
    """The closed forms of the docstrings: products of the blocks of two layers, a sample."""
    t, h, w = GRID
    count, space = COUNT, h * w
    linear = 24 * (count + registers) * width**2
    outward = 4 * width * registers * (count + registers)
    spatial = 4 * width * count * (space + registers)
    temporal = 4 * width * count * (t + registers)
    windows = math.prod(-(-have // size) * size for have, size in zip(GRID, WINDOW))
    local = 4 * width * windows * (math.prod(WINDOW) + registers)
    frames = t + registers
    divided = 10 * count * width**2 + 4 * width * count * t + 4 * width * t * (space + registers) ** 2
    joint = 4 * width * (count + registers) ** 2
    return {
        "joint": 2 * (linear + joint),
        "spatial": 2 * (linear + spatial + outward),
        "temporal": 2 * (linear + temporal + outward),
        "windowed": 2 * (linear + local + outward),
        "dot_product": 2 * (linear + (spatial + temporal) / 2 + outward),
        "divided": 2 * (linear + divided),
        "factorised": linear + spatial + outward + block_flops(frames, width),
        "factorised_places": 2 * (linear + outward) + spatial + temporal,
        "mixed": 2 * (linear + (spatial + temporal + local + joint + 3 * outward) / 4),
    }[name]


@pytest.mark.parametrize("registers", [0, 1])
@pytest.mark.parametrize("attention", [kind for kind in spacetime.KINDS if kind != "mixed"] + [MIXED], ids=str)
def test_flops_are_those_of_the_parts(attention, registers: int):
    width = 64
    name = attention if isinstance(attention, str) else "mixed"
    encoder = encoder_of(attention, width=width, registers=registers)
    patches = encoder.patches(video_of(1, GRID))

    def flops(keep) -> int:  # to initialise takes none
        return count_flops(jax.jit(lambda key: encoder.init_with_output(key, patches, keep)[0]), jax.random.key(0))

    found = flops(None)
    expected = 2 * COUNT * 96 * width + attention_flops(name, width, registers)
    assert found == pytest.approx(expected, rel=1e-3)
    if name != "joint":
        assert flops(jnp.arange(COUNT, dtype=jnp.int32)[None]) > found


@pytest.mark.parametrize("name", ["factorised_places", "windowed", "layers"])
def test_scan_and_remat_are_the_loop(name: str):
    attention = ENCODINGS[name][0] if name in ENCODINGS else name
    depth = 3 if name == "layers" else 2
    stack = functools.partial(spacetime.SpaceTimeStack, depth, HEADS, attention=attention, window=WINDOW)
    if name == "factorised_places":
        stack = functools.partial(stack, temporal_depth=2, positions="places")
    x, layout, valid = draw((B, COUNT, D)), layout_of(0, whole=True), jnp.asarray(some_valid(0))
    params = parameters(stack(), x, valid, layout)
    plain = jax.jit(lambda p, m=stack(): m.apply({"params": p}, x, valid, layout) * valid[..., None])

    def run(params, **fields):
        def loss(params):
            y = stack(**fields).apply({"params": params}, x, valid, layout) * valid[..., None]
            return jnp.sin(y).sum(), y

        gradient, y = jax.jit(jax.grad(loss, has_aux=True))(params)
        return y, gradient

    y, gradient = run(params)

    def scanned(tree):
        if name != "layers":
            return stacked(tree)
        runs = {f"run_{i}": stacked({"layer_0": tree["blocks"][f"layer_{i}"]}) for i in range(depth)}
        return dict(tree, blocks=runs)

    shapes = jax.eval_shape(lambda key: nn.unbox(stack(scan=True).init(key, x, valid, layout)), jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, scanned(params))
    assert_trees_close(run(scanned(params), scan=True, remat=True), (y, scanned(gradient)))
    if name == "layers":  # every other of the windowed layers is shifted, those between do not count
        pair = spacetime.SpaceTimeStack(2, HEADS, attention=("windowed", "windowed"), window=WINDOW)
        two = dict(params, blocks={"layer_0": params["blocks"]["layer_0"], "layer_1": params["blocks"]["layer_2"]})
        silent = jax.tree.map(jnp.zeros_like, params["blocks"]["layer_1"])
        muted = dict(params, blocks=dict(params["blocks"], layer_1=silent))
        theirs = jax.jit(lambda p: pair.apply({"params": p}, x, valid, layout))(two)
        np.testing.assert_allclose(plain(muted), theirs * valid[..., None], atol=1e-5)


def test_wrong_specs_are_errors_that_say_how():
    x, valid = draw((1, COUNT, D)), jnp.ones((1, COUNT), bool)
    at = jnp.arange(COUNT, dtype=jnp.int32)[None]
    layout = spacetime.Layout(positions.places(at, GRID), GRID, whole=True)
    for fields, line in (
        (dict(attention="spacial"), "did you mean 'spatial'"),
        (dict(attention=("spatial",) * 3), "3 kinds for 2 layers"),
        (dict(attention="factorised"), "temporal_depth"),
        (dict(attention="spatial", temporal_depth=1), "temporal_depth"),
        (dict(attention=dict(kind="mixed", heads=dict(spatial=3))), "3 heads, not 4"),
        (dict(attention=dict(kind="mixed", heads=dict(space=4))), "no such pattern"),
        (dict(attention=dict(kind="spatial", heads=4)), "no such key"),
        (dict(attention="windowed", window=(0, 2, 2)), "1 or more"),
        (dict(attention="dot_product", heads=1), "odd"),
    ):
        stack = spacetime.SpaceTimeStack(**dict(depth=2, heads=HEADS) | fields)
        with pytest.raises(UserError, match=line):
            jax.eval_shape(lambda key, s=stack: s.init(key, x, valid, layout), jax.random.key(0))
    encoder = encoder_of("divided", merge=2)
    patches = encoder.patches(video_of(1, GRID))
    with pytest.raises(UserError, match="merge"):
        jax.eval_shape(lambda key: encoder.init(key, patches, None), jax.random.key(0))


# The originals


def linear(state, name: str, *shape) -> dict:
    """A Linear of PyTorch as our Dense, its kernel [in, out] in another shape."""
    kernel = state[f"{name}.weight"].T
    kernel = kernel.reshape(shape) if shape else kernel
    bias = state[f"{name}.bias"]
    return dict(kernel=kernel, bias=bias.reshape(shape[1:]) if len(shape) == 3 and shape[0] == D else bias)


def norm(state, name: str) -> dict:
    return dict(scale=state[f"{name}.weight"], bias=state[f"{name}.bias"])


def convolution(weight) -> np.ndarray:
    """A convolution's weight [D C (t) h w] as the kernel of a tubelet's values [(t h w C) D]."""
    weight = weight if weight.ndim == 5 else weight[:, :, None]
    return weight.transpose(2, 3, 4, 1, 0).reshape(-1, weight.shape[0])


def relative_error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def test_divided_is_timesformer():
    reference = references.read("timesformer_encoder")
    state, video, expected = reference.tensors, jnp.asarray(reference.inputs["video"]), reference.outputs["tokens"]
    split = (D, HEADS, D // HEADS)

    def attention(name: str) -> dict:
        parts = np.split(state[f"{name}.attention.qkv.weight"], 3), np.split(state[f"{name}.attention.qkv.bias"], 3)
        result = {
            part: dict(kernel=weight.T.reshape(split), bias=bias.reshape(split[1:]))
            for part, weight, bias in zip(("query", "key", "value"), *parts)
        }
        out = linear(state, f"{name}.output.dense")
        return dict(result, out=dict(out, kernel=out["kernel"].reshape(*split[1:], D)))

    def block(i: int) -> dict:
        at = f"encoder.layer.{i}"
        return dict(
            norm_temporal=norm(state, f"{at}.temporal_layernorm"),
            attention_temporal=attention(f"{at}.temporal_attention"),
            temporal_out=linear(state, f"{at}.temporal_dense"),
            norm_attention=norm(state, f"{at}.layernorm_before"),
            attention=attention(f"{at}.attention"),
            norm_mlp=norm(state, f"{at}.layernorm_after"),
            mlp=dict(
                up=linear(state, f"{at}.intermediate.dense"),
                down=linear(state, f"{at}.output.dense"),
            ),
        )

    places = state["embeddings.position_embeddings"][0]
    projection = "embeddings.patch_embeddings.projection"
    params = dict(
        embed=dict(kernel=convolution(state[f"{projection}.weight"]), bias=state[f"{projection}.bias"]),
        positions=dict(first=state["embeddings.time_embeddings"][0], rest=places[1:].reshape(3, 3, D)),
        registers=state["embeddings.cls_token"][0] + places[:1],
        stack=dict(
            blocks={f"layer_{i}": dict(block=block(i)) for i in range(2)},
            norm=norm(state, "layernorm"),
        ),
    )
    encoder = VideoEncoder(
        D, 2, HEADS, tubelet=(1, 4, 4), attention="divided", positions="factorised", registers=1,
        block=dict(activation="gelu", epsilon=reference.config["layer_norm_eps"]),
    )  # fmt: skip
    patches, static = arrays_of(encoder.patches(video))
    run = applied(encoder, **static)
    ours = run(params, patches, None)
    assert relative_error(ours.x, expected) < 1e-5
    everything = jnp.broadcast_to(jnp.arange(27, dtype=jnp.int32), (B, 27))
    assert relative_error(run(params, patches, everything).x, expected) < 1e-5


def test_joint_with_rotary_is_vjepa2():
    width, heads = 28, 2  # of a head's 14 values, three axes turn 4 each and two are left
    reference = references.read("vjepa2_encoder")
    state, video, theirs = reference.tensors, jnp.asarray(reference.inputs["video"]), reference.outputs["tokens"]
    split = (width, heads, width // heads)

    def block(i: int) -> dict:
        at = f"layer.{i}"
        attention = {
            name: dict(
                kernel=state[f"{at}.attention.{name}.weight"].T.reshape(split),
                bias=state[f"{at}.attention.{name}.bias"].reshape(split[1:]),
            )
            for name in ("query", "key", "value")
        }
        out = linear(state, f"{at}.attention.proj")
        attention["out"] = dict(out, kernel=out["kernel"].reshape(*split[1:], width))
        mlp = dict(up=linear(state, f"{at}.mlp.fc1"), down=linear(state, f"{at}.mlp.fc2"))
        return dict(
            norm_attention=norm(state, f"{at}.norm1"), attention=attention, norm_mlp=norm(state, f"{at}.norm2"), mlp=mlp
        )

    projection = "embeddings.patch_embeddings.proj"
    params = dict(
        embed=dict(kernel=convolution(state[f"{projection}.weight"]), bias=state[f"{projection}.bias"]),
        stack=dict(
            blocks={f"layer_{i}": dict(block=block(i)) for i in range(2)},
            norm=norm(state, "layernorm"),
        ),
    )
    encoder = VideoEncoder(
        width, 2, heads, ratio=2.0, tubelet=(2, 4, 4), positions="rotary_vjepa2",
        block=dict(activation="gelu", epsilon=reference.config["layer_norm_eps"]),
    )  # fmt: skip
    patches, static = arrays_of(encoder.patches(video))
    assert relative_error(applied(encoder, **static)(params, patches, None).x, theirs) < 1e-5


# Clips of several lengths and sizes in a row

CLIPS = (((1, 2, 3), 1), ((3, 2, 2), 2))  # grid, how many


@pytest.mark.parametrize(
    ("attention", "kind"),
    [
        ("joint", "learned"),
        ("divided", "factorised"),
        ("factorised", "rotary"),
        ("factorised_places", "places"),
        (MIXED, "sincos"),
    ],
    ids=str,
)
def test_packed_clips_are_as_if_encoded_alone(attention, kind: str):
    depth = 1 if attention in ("joint", "divided") else 2  # what alternates or is halved needs two
    encoder = encoder_of(attention, depth=depth, positions=kind, registers=2)
    together = [encoder.patches(video_of(count, grid)) for grid, count in CLIPS]
    params = parameters(encoder, encoder.patches(video_of(1, (2, 3, 2))), None)  # learned tables of a third grid
    alone, clips = [], []
    for patches, (_, count) in zip(together, CLIPS):
        arrays, static = arrays_of(patches)
        tokens = applied(encoder, **static)(params, arrays, None)
        for i in range(count):
            alone.append(tokens.x[i])
            clips.append(patches._replace(values=patches.values[i : i + 1], valid=patches.valid[i : i + 1]))
    packed, slots = layers.pack(clips, 20)
    assert packed.grid == (3, 2, 3)
    assert [tuple(slot) for slot in slots] == [(0, 1, 12, 6), (0, 0, 0, 12), (1, 0, 0, 12)]
    arrays, static = arrays_of(packed)
    run = applied(encoder, **static)
    tokens = run(params, arrays, None)
    for ours, theirs, clip in zip(layers.unpack(tokens, packed, slots), alone, clips):
        assert ours.x.shape == (1, 2 + math.prod(clip.grid), D)
        assert ours.valid.all()
        assert ours.at[0, :3].tolist() == [-1, -1, 0]
        np.testing.assert_allclose(ours.x[0], theirs, atol=1e-5)
    assert not np.asarray(tokens.valid)[1, 2:4].any()  # the second row has no second clip
    # Padding and a neighbour change nothing.
    values = jnp.where(packed.segment[..., None] == 0, arrays.values, 99)
    other = layers.unpack(run(params, arrays._replace(values=values), None), packed, slots)
    np.testing.assert_array_equal(other[1].x, layers.unpack(tokens, packed, slots)[1].x)
    # So do hidden tokens: two a row kept, as alone.
    if attention == "divided":
        keep = jnp.array([[3, 13], [0, 7]], jnp.int32)
        kept = run(params, arrays, keep)
        part = applied(encoder, grid=(3, 2, 2), classes=0)
        theirs = part(params, arrays_of(together[1])[0], jnp.array([[3], [0]], jnp.int32))
        np.testing.assert_array_equal(kept.at[:, 4:], keep)
        np.testing.assert_allclose(kept.x[0, 4], theirs.x[0, 2], atol=1e-5)


def test_packing_says_what_does_not_fit():
    clip = Patches(jnp.zeros((1, 8, 3)), jnp.ones((1, 8), bool), (2, 2, 2), 0)
    with pytest.raises(UserError, match="8 tokens does not fit rows of 7"):
        layers.pack([clip], 7)
    with pytest.raises(UserError, match="one clip or more"):
        layers.pack([])


# Tokens merged


def numpy_match(metric, valid, registers: int, merge: int):
    """ToMe's matching of one sample, pair after pair: old index → the set of old indices it is in."""
    one = [n for n in range(registers, len(metric)) if n % 2 == 0]
    two = [n for n in range(registers, len(metric)) if n % 2]
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    best = []
    for n in one:
        score = [unit[n] @ unit[m] if valid[m] else -2.0 for m in two]
        best.append((3.0 if not valid[n] else max(score), n, two[int(np.argmax(score))]))
    groups = {n: [n] for n in range(len(metric))}
    for _, n, m in sorted(best, key=lambda item: -item[0])[:merge]:
        groups[m] += groups.pop(n)
    return groups


@pytest.mark.parametrize("registers", [0, 1, 2])
def test_matching_is_the_reference(registers: int):
    count, merge = 11, 3
    metric = draw((B, count, 5), 3)
    valid = np.ones((B, count), bool)
    valid[1, [2, 3, 8]] = False
    kept, into = jax.jit(merging.match, static_argnums=(2, 3))(metric, jnp.asarray(valid), registers, merge)
    assert kept.shape == (B, count - merge)
    for i in range(B):
        groups = numpy_match(np.asarray(metric[i], np.float64), valid[i], registers, merge)
        ours = {}
        for old, new in enumerate(np.asarray(into[i])):
            ours.setdefault(int(kept[i, new]), set()).add(old)
        if valid[i].all():
            assert ours == {n: set(group) for n, group in groups.items()}
        assert all(ours[n] == {n} for n in range(registers))
        alive = set(np.flatnonzero(valid[i]))
        one, other = (sorted(sorted(alive & set(s)) for s in sets.values()) for sets in (ours, groups))
        assert [group for group in one if group] == [group for group in other if group]


def numpy_merging(p, x, registers: int, merge: int):
    """Two ToMe layers of one sample, all of it valid, then the final norm."""
    size, groups = np.ones(len(x)), [[n] for n in range(len(x))]
    for i in range(2):
        own = p["blocks"][f"layer_{i}"]["block"]
        query = numpy_norm(own["norm_attention"], x)
        q, k, v = (
            np.einsum("nd,dah->nah", query, own["attention"][name]["kernel"]) + own["attention"][name]["bias"]
            for name in ("query", "key", "value")
        )
        logits = np.einsum("qah,kah->aqk", q, k) / math.sqrt(q.shape[-1]) + np.log(size)
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        mixed = np.einsum("aqk,kah->qah", weights, v)
        x = x + np.einsum("nah,ahd->nd", mixed, own["attention"]["out"]["kernel"]) + own["attention"]["out"]["bias"]
        sets = numpy_match(k.mean(1), np.ones(len(x), bool), registers, merge)
        order = [n for n in sets if n < registers]  # then those left of the first set, then the second
        order += [n for n in sets if n >= registers and n % 2 == 0] + [n for n in sets if n >= registers and n % 2]
        x = np.stack([sum(size[m] * x[m] for m in sets[n]) / sum(size[m] for m in sets[n]) for n in order])
        groups = [[old for m in sets[n] for old in groups[m]] for n in order]
        size = np.array([len(group) for group in groups], float)
        hidden = numpy_norm(own["norm_mlp"], x) @ own["mlp"]["up"]["kernel"] + own["mlp"]["up"]["bias"]
        hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + hidden @ own["mlp"]["down"]["kernel"] + own["mlp"]["down"]["bias"]
    result = np.zeros((sum(map(len, groups)), x.shape[-1]))
    for value, group in zip(numpy_norm(p["norm"], x), groups):
        result[group] = value
    return result


def test_merging_is_the_reference_and_scans():
    registers, merge, count = 1, 3, 14
    stack = functools.partial(merging.MergingStack, 2, HEADS, registers=registers)
    x, valid = draw((B, count, D)), jnp.ones((B, count), bool)
    params = parameters(layers.Stack(2, HEADS), x, valid)
    shapes = jax.eval_shape(lambda key: nn.unbox(stack(merge=merge).init(key, x, valid)), jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, params)
    ours = jax.jit(lambda p: stack(merge=merge).apply({"params": p}, x, valid))(params)
    for i in range(B):
        theirs = numpy_merging(numpy_tree(params), np.asarray(x[i], np.float64), registers, merge)
        np.testing.assert_allclose(ours[i], theirs, atol=3e-5)
        assert len(np.unique(np.asarray(ours[i]).round(5), axis=0)) == count - 2 * merge
    scanned = jax.jit(lambda p: stack(merge=merge, scan=True).apply({"params": p}, x, valid))(stacked(params))
    np.testing.assert_array_equal(scanned, ours)
    # Nothing merged is the stack itself, also with tokens that are not valid and with rotary.
    some = jnp.asarray(np.arange(count) % 5 != 3)[None].repeat(B, 0)
    turn = positions.rotary("rotary", jnp.arange(count, dtype=jnp.int32)[None].repeat(B, 0), (count,), D // HEADS)
    both = jax.jit(
        lambda p: [
            module.apply({"params": p}, x, some, rotary=turn) for module in (stack(merge=0), layers.Stack(2, HEADS))
        ]
    )
    none, plain = both(params)
    np.testing.assert_allclose(none[:, some[0]], plain[:, some[0]], atol=1e-5)


def test_merging_in_the_encoder_keeps_tokens_and_saves_work():
    encoder, quick = encoder_of(positions="rotary", registers=1), encoder_of(positions="rotary", registers=1, merge=20)
    patches, static = arrays_of(encoder.patches(video_of(B, GRID)))
    patches = patches._replace(valid=jnp.asarray(some_valid(0)))
    params = parameters(encoder, patches._replace(**static), None)
    run = applied(quick, **static)
    tokens = run(params, patches, None)
    np.testing.assert_array_equal(tokens.valid[:, 1:], patches.valid)
    assert tokens.x.shape == (B, 1 + COUNT, D)
    garbage = jnp.where(patches.valid[..., None], patches.values, 77)
    dirty = run(params, patches._replace(values=garbage), None)
    np.testing.assert_array_equal(dirty.x[tokens.valid], tokens.x[tokens.valid])
    # Where the tokens of a clip are alike, merging them changes little; where not, more.
    flat = patches._replace(values=jnp.full_like(patches.values, 90))
    plain = applied(encoder, **static)
    change = [
        relative_error(run(params, p, None).x[0], np.asarray(plain(params, p, None).x[0])) for p in (flat, patches)
    ]
    assert change[0] < change[1]
    width, n, merge = 64, COUNT + 1, 20
    flops = []
    for module in (encoder_of(width=width, registers=1), encoder_of(width=width, registers=1, merge=merge)):
        one = module.patches(video_of(1, GRID))
        shapes = jax.eval_shape(lambda key, m=module, o=one: nn.unbox(m.init(key, o, None)), jax.random.key(0))
        flops.append(count_flops(jax.jit(lambda p, m=module, o=one: m.apply(p, o, None)), shapes))
    expected = 2 * COUNT * 96 * width
    for tokens in (n, n - merge):
        pairs = 2 * (tokens // 2) ** 2 * width // HEADS
        expected += 8 * tokens * width**2 + 4 * tokens**2 * width + pairs + 16 * (tokens - merge) * width**2
    assert flops[1] == pytest.approx(expected, rel=0.01)
    assert flops[1] < 0.75 * flops[0]


# Places beyond those that were seen


def test_learned_positions_are_resized_and_fixed_ones_go_on():
    small, large = (2, 3, 3), (4, 6, 5)
    at = jnp.arange(math.prod(large), dtype=jnp.int32)[None]
    x = jnp.zeros((1, math.prod(large), D))
    tables = {}
    for kind in ("learned", "factorised", "sincos"):
        module = layers.Positions(kind)
        first = jnp.arange(math.prod(small), dtype=jnp.int32)[None]
        params = parameters(module, x[:, : math.prod(small)], first, small)
        # As data, of a token's own grid, the same; another grid bounds it.
        own = (positions.places(at, large), jnp.broadcast_to(jnp.array(large), (1, math.prod(large), 3)))
        bound = positions.ravel(own[0], (5, 7, 6))
        both = jax.jit(
            lambda p, m=module, bound=bound, own=own: (
                m.apply({"params": p}, x, at, large)[0],
                m.apply({"params": p}, x, bound, (5, 7, 6), own)[0],
            )
        )
        table, packed = (np.asarray(result).reshape(*large, D) for result in both(params))
        np.testing.assert_allclose(packed, table, atol=2e-6)
        tables[kind] = params, table
    params, table = tables["learned"]
    # A table linear in each place goes on being so inside: cubic interpolation is exact on it.
    ramp = np.arange(12.0)[None, :, None, None] + np.zeros((1, 12, 12, 1))
    wide = np.asarray(positions.resize(jnp.asarray(ramp, jnp.float32), (1, 24, 12), cut=False))[0, :, 5, 0]
    np.testing.assert_allclose(wide[4:-4], (np.arange(24) / 2 - 0.25)[4:-4], atol=1e-5)
    assert table.std() == pytest.approx(float(params["table"].std()), rel=0.5)
    first, rest = (np.asarray(tables["factorised"][0][name]) for name in ("first", "rest"))
    along = np.asarray(positions.resize(jnp.asarray(first), large[:1], cut=False))
    np.testing.assert_allclose(
        tables["factorised"][1][:, 2, 1] - tables["factorised"][1][0, 2, 1], along - along[:1], atol=1e-5
    )
    assert rest.shape == (3, 3, D)
    # Fixed positions of a place are the same in any grid.
    np.testing.assert_array_equal(tables["sincos"][1][:2, :3, :3], layers.sincos(small, D).reshape(*small, D))


def test_rotary_attention_sees_only_relative_places():
    """Moved as a whole, in time and space and beyond any grid that was seen, tokens attend as before."""
    from vmm.layers.attention import rotate

    rng = np.random.default_rng(0)
    place = jnp.asarray(rng.integers(0, 6, (1, 9, 3)), jnp.int32)
    query, key = draw((1, 9, 2, 14)), draw((1, 9, 2, 14), 1)

    @jax.jit
    def logits(place):
        turn = positions.rotary_at("rotary", place, 14)
        return jnp.einsum("bqad,bkad->baqk", rotate(query, turn), rotate(key, turn))

    here = logits(place)
    np.testing.assert_allclose(logits(place + jnp.array([40, 3, 17])), here, atol=2e-4)
    assert np.abs(logits(place * 2) - here).max() > 0.1
    at = positions.ravel(place, (6, 6, 6))
    for ours, theirs in zip(positions.rotary("rotary", at, (6, 6, 6), 14), positions.rotary_at("rotary", place, 14)):
        np.testing.assert_array_equal(ours, theirs)
