"""Each fusion mechanism against its formula in numpy, float64, over the valid tokens alone; and what follows from it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import HEADS, D, finite
from test_fusion import compiled, fusion_flops
from test_layers import assert_trees_close, draw, numpy_attention, numpy_block, numpy_norm, parameters

from vmm.fusion import FUSIONS
from vmm.fusion.mutual import exchange, gather, segments
from vmm.types import Tokens

COUNTS = {"video": 6, "audio": 5, "text": 3}
FRAMES = 2
# Sample → valid tokens of each stream; the last lacks one, its first token is not its first in time.
VALID = [dict(video=6, audio=5, text=3), dict(video=4, audio=0, text=2), dict(video=0, audio=3, text=0)]
FIELDS = dict(mixed=dict(latents=3), mutual=dict(frames=FRAMES), perceiver=dict(latents=4), lowrank=dict(rank=3))


def streams_of(counts=COUNTS) -> dict:
    streams = {}
    for seed, (name, count) in enumerate(counts.items()):
        valid = np.array([np.arange(count) < sample[name] for sample in VALID])
        at = np.stack([np.random.default_rng(10 * seed + i).permutation(20)[:count] for i in range(len(VALID))])
        x = draw((len(VALID), count, D), seed + 1)
        streams[name] = Tokens(x, jnp.asarray(valid), jnp.asarray(at, jnp.int32))
    return streams


def built(kind: str, seed: int = 0, **fields):
    """(fusion, parameters with gates and the like at no special value, streams)."""
    module = FUSIONS[kind](width=D, heads=HEADS, **(dict(depth=1) | FIELDS.get(kind, {}) | fields))
    streams = streams_of()
    return module, parameters(module, streams, seed=seed), streams


def run(module, params, streams) -> dict:
    fused = compiled(lambda params, s: module.apply({"params": params}, s))(params, streams)
    return {name: tokens.x for name, tokens in fused.items()}


# One layer of each mechanism: (its parameters, modality → x [N D] of valid tokens, modality → at [N]) → modality → x


def split(p, x):
    return np.einsum("nd,dah->nah", x, p["kernel"]) + p["bias"]


def merge(p, y):
    return np.einsum("nah,ahd->nd", y, p["kernel"]) + p["bias"]


def attend(query, key, value):
    return numpy_attention(query, key, value, np.ones(len(key), bool))


def mlp(p, x):
    hidden = x @ p["up"]["kernel"] + p["up"]["bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ p["down"]["kernel"] + p["down"]["bias"]


def feed(p, x, gate=1.0):
    return x + gate * mlp(p["mlp"], numpy_norm(p["norm"], x))


def block(p, x):
    return numpy_block(p, x, np.ones(len(x), bool))


def read(p, x, context, gates=(1.0, 1.0)):
    context, q = numpy_norm(p["norm_context"], context), numpy_norm(p["norm_attention"], x)
    a = p["attention"]
    x = x + gates[0] * merge(
        a["out"], attend(split(a["query"], q), split(a["key"], context), split(a["value"], context))
    )
    return feed(p["feed"], x, gates[1])


def others(xs, name):
    return [x for other, x in xs.items() if other != name]


def softmax(x, axis):
    weights = np.exp(x - x.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def cross(p, xs, at, carried):
    return {
        name: numpy_block(
            p[name],
            x,
            np.ones(len(x), bool),
            *((c := np.concatenate(others(xs, name))), np.ones(len(c), bool)) if others(xs, name) else (),
        )
        for name, x in xs.items()
    }


def bottleneck(p, xs, at, carried):
    return {name: block(p[name], np.concatenate([x, carried]))[: len(x)] for name, x in xs.items()}


def gated(p, xs, at, carried):
    result = {}
    for name, x in xs.items():
        if others(xs, name):
            mine = p[f"read_{name}"]
            gates = np.tanh(mine["alpha_attention"]), np.tanh(mine["alpha_mlp"])
            x = read(mine, x, np.concatenate(others(xs, name)), gates)
        result[name] = block(p[name], x)
    return result


def perceiver(p, xs, at, carried):
    z = block(p["latent"], read(p["read"], carried, np.concatenate(list(xs.values()))))
    return {name: read(p[f"write_{name}"], x, z) for name, x in xs.items()}


def lowrank(p, xs, at, carried):
    """The whole tensor, formed: [D+1 for each stream …, D], contracted with each stream's [mean; 1]."""
    means, factors = [], []
    for name, x in xs.items():
        means.append(np.append(numpy_norm(p[f"norm_{name}"], x).mean(0), 1.0))
        kernel, bias = p[f"factor_{name}"]["kernel"], p[f"factor_{name}"]["bias"]
        factors.append(np.concatenate([kernel, bias[None]]))  # [D+1 R D]
    letters = "ijk"[: len(xs)]
    tensor = np.einsum(",".join(f"{letter}ro" for letter in letters) + f"->{letters}o", *factors)
    fused = np.einsum(f"{letters}o,{','.join(letters)}->o", tensor, *means)
    out = {name: fused @ p[f"out_{name}"]["kernel"] + p[f"out_{name}"]["bias"] for name in xs}
    return {name: block(p[name], x + out[name]) for name, x in xs.items()}


def experts(p, xs, at, carried):
    x = np.concatenate([numpy_norm(p[f"norm_{name}"], x) for name, x in xs.items()])
    a = p["attention"]
    y = merge(a["out"], attend(*(split(a[part], x) for part in ("query", "key", "value"))))
    y = np.split(y, np.cumsum([len(x) for x in xs.values()])[:-1])
    return {name: feed(p[f"expert_{name}"], x + y) for (name, x), y in zip(xs.items(), y)}


def mixed_gates(p, name, h, company):
    logits = h @ p[f"gate_{name}"].T
    if not company:
        logits[:, 1] = -np.inf
    return softmax(logits, -1)


def mixed(p, xs, at, carried):
    h = {name: numpy_norm(p[f"norm_{name}"], x) for name, x in xs.items()}
    q, k, v = ({name: split(p[f"{part}_{name}"], y) for name, y in h.items()} for part in ("query", "key", "value"))

    def join(parts):
        return np.concatenate(list(parts))

    z = split(p["query_latents"], numpy_norm(p["norm_latents"], p["latents"]))
    z = numpy_norm(p["norm_global"], merge(p["out_latents"], attend(z, join(k.values()), join(v.values()))))
    result = {}
    for name, x in xs.items():
        company = others(xs, name)
        y = [attend(q[name], k[name], v[name]), 0.0]
        if company:
            y[1] = attend(q[name], join(others(k, name)), join(others(v, name)))
        y.append(attend(q[name], split(p["key_latents"], z), split(p["value_latents"], z)))
        gates = mixed_gates(p, name, h[name], company)
        y = sum(gates[:, i, None, None] * part for i, part in enumerate(y))
        result[name] = feed(p[f"mlp_{name}"], x + merge(p[f"out_{name}"], y))
    return result


def fields_of_view(at):
    """Token, frame, clip: each a list of token lists."""
    order = np.argsort(at)
    frames = [[order[i] for i in range(len(at)) if i * FRAMES // len(at) == s] for s in range(FRAMES)]
    return {"token": [[i] for i in range(len(at))], "frame": [f for f in frames if f], "clip": [list(range(len(at)))]}


def mutual(p, xs, at, carried):
    h = {name: numpy_norm(p[f"norm_{name}"], x) for name, x in xs.items()}
    result = {name: x.copy() for name, x in xs.items()}
    for field in ("token", "frame", "clip") if len(xs) > 1 else ():
        groups = {name: fields_of_view(at[name])[field] for name in xs}
        pooled = {name: np.stack([h[name][g].mean(0) for g in groups[name]]) for name in xs}
        f, v = ({name: split(p[f"{part}_{name}"], y) for name, y in pooled.items()} for part in ("affinity", "value"))
        heard = {name: np.zeros_like(f[name]) for name in xs}
        for one, two in itertools.combinations(xs, 2):
            matrix = np.einsum("nah,kah->ank", f[one], f[two]) / np.sqrt(D // HEADS)
            heard[one] += np.einsum("ank,kah->nah", softmax(matrix, 2), v[two]) / (len(xs) - 1)
            heard[two] += np.einsum("ank,nah->kah", softmax(matrix, 1), v[one]) / (len(xs) - 1)
        for name, segments_ in groups.items():
            out = merge(p[f"out_{field}_{name}"], heard[name])
            for segment, y in zip(segments_, out):
                result[name][segment] += y
    return {name: block(p[name], x) for name, x in result.items()}


REFERENCES = dict(
    cross=cross, bottleneck=bottleneck, mixed=mixed, mutual=mutual, gated=gated, perceiver=perceiver, lowrank=lowrank,
    experts=experts,
)  # fmt: skip


@pytest.mark.parametrize("kind", REFERENCES)
def test_fusion_is_its_formula(kind: str):
    module, params, streams = built(kind)
    fused = run(module, params, streams)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    carried = p.get("bottleneck", p.get("latents"))
    for i, sample in enumerate(VALID):
        xs, at = {}, {}
        for name, count in sample.items():
            if count:
                xs[name] = np.asarray(streams[name].x, np.float64)[i, :count] + p["enter"][f"modality_{name}"]
                at[name] = np.asarray(streams[name].at)[i, :count]
        theirs = REFERENCES[kind](p["blocks"]["layer_0"], xs, at, carried)
        for name, x in theirs.items():
            expected = numpy_norm(p["leave"][f"norm_{name}"], x)
            np.testing.assert_allclose(fused[name][i, : sample[name]], expected, atol=1e-4, rtol=1e-4)


def late_of(params, blocks) -> dict:
    """Parameters of a late fusion with the blocks given and the norms of `params`."""
    return {
        name: {"blocks": {"layer_0": {"block": blocks[name]}}, "norm": params["leave"][f"norm_{name}"]}
        for name in COUNTS
    }


def entered(params, streams) -> dict:
    return {name: t._replace(x=t.x + params["enter"][f"modality_{name}"]) for name, t in streams.items()}


def test_gated_starts_as_late():
    module, params, streams = built("gated")
    start = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if "alpha" in str(path) else leaf, params
    )  # as initialised: see below
    alphas = compiled(
        lambda key: [
            module.init(key, streams)["params"]["blocks"]["layer_0"]["read_video"][f"alpha_{name}"]
            for name in ("attention", "mlp")
        ]
    )
    assert alphas(jax.random.key(0)) == [0, 0]
    late = FUSIONS["late"](width=D, depth=1, heads=HEADS)
    theirs = run(late, late_of(params, params["blocks"]["layer_0"]), entered(params, streams))
    ours = run(module, start, streams)
    assert_trees_close(ours, theirs)
    assert np.abs(np.asarray(run(module, params, streams)["video"] - theirs["video"])[0]).max() > 0.1


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_equal_experts_are_joint(norm: str):
    module, params, streams = built("experts", block=dict(norm=norm))
    layer = params["blocks"]["layer_0"]
    for name in ("audio", "text"):
        layer[f"norm_{name}"], layer[f"expert_{name}"] = layer["norm_video"], layer["expert_video"]
        params["leave"][f"norm_{name}"] = params["leave"]["norm_video"]
    joint = FUSIONS["joint"](width=D, depth=1, heads=HEADS, block=dict(norm=norm))
    one = dict(
        attention=layer["attention"],
        norm_attention=layer["norm_video"],
        norm_mlp=layer["expert_video"]["norm"],
        mlp=layer["expert_video"]["mlp"],
    )
    stack = dict(blocks=dict(layer_0=dict(block=one)), norm=params["leave"]["norm_video"])
    theirs = run(joint, dict(enter=params["enter"], stack=stack), streams)
    ours = run(module, params, streams)
    for name, tokens in streams.items():
        np.testing.assert_allclose(ours[name][tokens.valid], theirs[name][tokens.valid], atol=2e-5)


@pytest.mark.parametrize("kind", ["gated", "mutual", "mixed", "perceiver", "lowrank"])
def test_post_norm_keeps_the_contract(kind: str):
    """A lacking stream is as if it were not there, whatever side the norm is on."""
    module, params, streams = built(kind, block=dict(norm="post"))
    fused = run(module, params, streams)
    assert finite(fused)
    alone = run(module, params, {"audio": jax.tree.map(lambda leaf: leaf[2:], streams["audio"])})
    there = VALID[2]["audio"]
    np.testing.assert_allclose(fused["audio"][2, :there], alone["audio"][0, :there], atol=2e-5)


def test_perceivers_cost_is_linear():
    cost = [fusion_flops("perceiver", dict(video=n, audio=n // 2), 64, depth=2, heads=4)[0] for n in (100, 200, 300)]
    assert cost[2] - cost[1] == cost[1] - cost[0] > 0
    joint = [fusion_flops("joint", dict(video=n, audio=n // 2), 64, depth=2, heads=4)[0] for n in (100, 200, 300)]
    assert joint[2] - joint[1] > joint[1] - joint[0]


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_a_schedule_of_one_kind_is_that_kind(scan: bool):
    module, params, streams = built("bottleneck", depth=2, bottlenecks=3, scan=scan)
    schedule = FUSIONS["schedule"](
        width=D, heads=HEADS, layers=("bottleneck",) * 2, scan=scan, fields=dict(bottleneck=dict(bottlenecks=3))
    )
    inner = {key: params[key] for key in ("bottleneck", "blocks")}
    mine = dict(enter=params["enter"], leave=params["leave"], run_0=inner)
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, parameters(schedule, streams))
    assert_trees_close(run(schedule, mine, streams), run(module, params, streams))


def test_a_schedule_is_its_runs_in_turn():
    """("none", "cross"): late without norms at its end, then cross without an entrance."""
    schedule, _, streams = built("cross")
    schedule = FUSIONS["schedule"](width=D, heads=HEADS, layers=("none", "cross"))
    params = parameters(schedule, streams)
    leave = {f"norm_{name}": dict(scale=jnp.ones(D), bias=jnp.zeros(D)) for name in COUNTS}
    late = FUSIONS["late"](width=D, depth=1, heads=HEADS)
    blocks = {name: params["run_0"][name]["blocks"]["layer_0"]["block"] for name in COUNTS}
    none_only = FUSIONS["schedule"](width=D, heads=HEADS, layers=("none",))
    normed = run(none_only, dict(enter=params["enter"], run_0=params["run_0"], leave=leave), streams)
    theirs = run(late, late_of(dict(leave=leave), blocks), entered(params, streams))
    assert_trees_close(normed, theirs)
    # The rest in numpy, by the formula of cross.
    ours = run(schedule, params, streams)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    xs = {}
    for name in COUNTS:
        x = np.asarray(streams[name].x, np.float64)[0] + p["enter"][f"modality_{name}"]
        xs[name] = block(p["run_0"][name]["blocks"]["layer_0"]["block"], x)
    for name, x in cross(p["run_1"]["blocks"]["layer_0"], xs, None, None).items():
        np.testing.assert_allclose(ours[name][0], numpy_norm(p["leave"][f"norm_{name}"], x), atol=1e-4, rtol=1e-4)


def test_mixed_reports_the_mean_of_its_gates():
    module, params, streams = built("mixed")
    _, sown = compiled(lambda p: module.apply({"params": p}, streams, mutable=["gates"]))(params)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    layer = p["blocks"]["layer_0"]
    for name in COUNTS:
        gates = []
        for i, sample in enumerate(VALID):
            x = np.asarray(streams[name].x, np.float64)[i, : sample[name]] + p["enter"][f"modality_{name}"]
            company = sum(count > 0 for other, count in sample.items() if other != name)
            gates.append(mixed_gates(layer, name, numpy_norm(layer[f"norm_{name}"], x), company))
        mine = sown["gates"]["blocks"]["layer_0"]
        ours = [float(mine[f"{name}_{branch}"][0]) for branch in ("self", "cross", "global")]
        np.testing.assert_allclose(ours, np.concatenate(gates).mean(0), rtol=1e-4)


def test_an_exchange_uses_one_matrix_both_ways():
    first, second = draw((2, 4, HEADS, 8)), draw((2, 3, HEADS, 8), 1)
    values = draw((2, 4, HEADS, 8), 2), draw((2, 3, HEADS, 8), 3)
    valid = jnp.array([[True, True, False, True], [False] * 4]), jnp.array([[True, False, True], [True] * 3])
    function = jax.jit(exchange)
    one, two = function((first, second), values, valid)
    other = function((second, first), values[::-1], valid[::-1])
    np.testing.assert_allclose(one, other[1], atol=1e-6)
    np.testing.assert_allclose(two, other[0], atol=1e-6)
    assert not two[1].any(), "nothing comes of a stream that is not there"
    # A token that the other stream likes most gets all of one, wherever the other's own softmax goes.
    sharp = function((first * 1e5, second), values, valid)
    matrix = np.einsum("nah,kah->ank", first[0], second[0])
    for head in range(HEADS):
        liked = np.argmax(np.where(np.asarray(valid[0][0])[:, None], matrix[head], -np.inf), axis=0)
        np.testing.assert_allclose(sharp[1][0, :, head], values[0][0][liked, head], atol=1e-4)


def test_segments_by_hand():
    at = jnp.array([[9, 1, 5, 3, 7], [4, 0, -1, 2, 6]], jnp.int32)
    valid = jnp.array([[True, True, True, True, True], [True, False, True, True, False]])
    members = jax.jit(segments, static_argnums=1)(Tokens(jnp.zeros((2, 5, 1)), valid, at), 2)
    # Ranks 4 0 2 1 3 of five: the first three (0·2/5, 1·2/5, 2·2/5 < 1) are one half.
    np.testing.assert_array_equal(members[0].argmax(-1), [1, 0, 0, 0, 1])
    np.testing.assert_array_equal(members[1], [[0, 1], [0, 0], [0, 0], [1, 0], [0, 0]])
    x = jnp.arange(10.0).reshape(2, 5, 1, 1)
    np.testing.assert_allclose(gather(x, members)[0, :, 0, 0], [2.0, 2.0])
    np.testing.assert_allclose(gather(x, members)[1, :, 0, 0], [8.0, 5.0])
