"""Adapters against matrices by hand: what they compute, what they leave alone, and what of them is written and read."""

import functools
import json
import math
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import assert_trees_equal
from flax.traverse_util import flatten_dict, unflatten_dict
from test_layers import assert_trees_close, draw, numpy_attention, parameters

import vmm
from vmm import adapters, layers, losses
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.publish import publish
from vmm.publishing.check import check
from vmm.run import open_run, weights
from vmm.sharding import MeshShape, make_mesh, to_device
from vmm.told import note_own
from vmm.train import train
from vmm.training.allocation import allocating
from vmm.training.depth import layer_rates
from vmm.training.optim import Optim, make_optimizer, path_of, trainable
from vmm.types import Batch
from vmm.weights import load_tensors, save_params

LORA = dict(kind="lora", rank=2, alpha=6.0)
KERNELS = ".*/(query|value|out|up)/kernel"


def tiny(**changes) -> dict:
    """A config of a video encoder with a label, no files behind it; scanned unless told."""
    encoder = dict(kind="video", tubelet=(2, 8, 8), width=16, depth=2, heads=2, scan=True)
    config = dict(
        steps=4, batch=8, seed=3,
        data=dict(
            train="", tokenizer="", clip=dict(seconds=2.0, frames=4, size=16, text_length=8), labels=dict(shape=6)
        ),
        trunk=dict(encoders=dict(video=encoder), fusion=dict(kind="late", width=16, depth=0, heads=2)),
        views=dict(clean={}),
        objectives=dict(labels=dict(kind="classify", labels=dict(shape=6))),
        optim=dict(learning_rate=1e-2, weight_decay=0.1, ema=0.9),
    )  # fmt: skip
    return config | changes


def batch_of(experiment: Experiment, rows: int = 8) -> Batch:
    rng = np.random.default_rng(5)
    batch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), experiment.batch_shapes(rows))
    batch.inputs["video"][:] = rng.integers(0, 255, batch.inputs["video"].shape)
    batch.present["video"][:] = True
    batch.labels["shape"][:] = rng.integers(0, 6, rows)
    return batch._replace(valid=np.ones(rows, bool), index=np.arange(rows, dtype=np.int32))


def paths(tree) -> dict:
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def drawn(shapes, seed: int = 0):
    """Random parameters in the place of shapes, boxes taken off."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype), nn.unbox(shapes))


# ---- the arithmetic ------------------------------------------------------------------------------


class Pair(nn.Module):
    """A map to heads and one from them, in a loop or scanned: kernels [D A d] and [A d D]."""

    scan: bool = False

    @nn.compact
    def __call__(self, x):
        return layers.Repeat(PairLayer, {}, 3, self.scan, name="blocks")(x, None)


class PairLayer(nn.Module):
    @nn.compact
    def __call__(self, carry, constants):
        split = layers.Dense((2, 4), ("embed", "heads", "head_dim"), name="query")(carry)
        return carry + layers.Dense((16,), ("heads", "head_dim", "embed"), inputs=2, bias=False, name="out")(split)


@functools.cache
def pair(scan: bool, kind: str):
    """(boxed parameters with adapters, drawn ones, the config) of Pair."""
    adapt = ((".*/kernel", dict(kind=kind, rank=2, alpha=6.0) | (dict(target=1) if kind == "adalora" else {})),)

    def init(key):
        return {"model": Pair(scan).init(key, jnp.zeros((1, 3, 16)))["params"]}

    boxed = jax.eval_shape(lambda key: adapters.add(init(key), adapt, key), jax.random.key(0))
    return boxed, drawn(boxed), adapt


def weighted(adapt, other):
    """Returns params → the sum of the merged tree, each number times that of `other`: a gradient that shows every place."""
    return lambda params: sum(
        (a * b).sum() for a, b in zip(jax.tree.leaves(adapters.merge(params, adapt)), jax.tree.leaves(other))
    )


def program_of(config: dict):
    return Experiment(config).program(None)


def matrices(flat: dict, name: str, scan: bool, layer: int) -> dict:
    """The kernel, as a matrix, and its adapters of one layer."""
    where = f"model/blocks/{'layers' if scan else f'layer_{layer}'}/{name}/kernel"

    def pick(leaf):
        return np.asarray(leaf[layer] if scan else leaf, np.float64)

    rows = 16 if name == "query" else 8
    result = {"w": pick(flat[where]).reshape(rows, -1)}
    for key, leaf in flat.items():
        if key.startswith(f"adapters/{where}/"):
            result[key.rsplit("/", 1)[1]] = pick(leaf)
    return result


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_effective_kernels_are_those_by_hand(kind, scan):
    _, params, adapt = pair(scan, kind)
    flat, merged = paths(params), paths(adapters.merge(params, adapt))
    assert not any(name.startswith("adapters") for name in merged)
    for name in ("query", "out"):
        for layer in range(3):
            m = matrices(flat, name, scan, layer)
            change = 3.0 * m["a"].reshape(len(m["w"]), 2) @ m["b"].reshape(2, -1)
            wanted = m["w"] + change
            if kind == "dora":
                magnitude = m["magnitude"].reshape(-1) * np.linalg.norm(m["w"], axis=0)
                wanted = magnitude * wanted / np.linalg.norm(wanted, axis=0)
            got = matrices(merged, name, scan, layer)["w"]
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert merged["model/blocks/layers/query/bias" if scan else "model/blocks/layer_0/query/bias"].any()


def test_gradients_of_lora_are_those_by_hand():
    """Of Σ G ∘ W': G to the base, alpha/rank · G Bᵀ to A, alpha/rank · Aᵀ G to B, each layer by itself."""
    _, params, adapt = pair(True, "lora")
    other = drawn(jax.eval_shape(lambda p: adapters.merge(p, adapt), params), seed=1)
    gradient = paths(jax.grad(weighted(adapt, other))(params))
    flat, g = paths(params), paths(other)
    for name in ("query", "out"):
        for layer in range(3):
            m, mine = matrices(flat, name, True, layer), matrices(gradient, name, True, layer)
            by_kernel = matrices(g, name, True, layer)["w"]
            np.testing.assert_allclose(mine["w"], by_kernel, rtol=1e-5)
            a, b = m["a"].reshape(len(m["w"]), 2), m["b"].reshape(2, -1)
            np.testing.assert_allclose(mine["a"].reshape(a.shape), 3.0 * by_kernel @ b.T, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(mine["b"].reshape(b.shape), 3.0 * a.T @ by_kernel, rtol=1e-4, atol=1e-5)


def test_dora_moves_magnitude_and_direction_apart():
    """Of Σ G ∘ W': ‖W‖ ⟨G, v⟩ to the magnitude, v the direction; to A as LoRA's with G m / ‖V‖, the norm held still."""
    _, params, adapt = pair(True, "dora")
    other = drawn(jax.eval_shape(lambda p: adapters.merge(p, adapt), params), seed=1)
    gradient, flat, g = paths(jax.grad(weighted(adapt, other))(params)), paths(params), paths(other)
    for name in ("query", "out"):
        m, mine = matrices(flat, name, True, 1), matrices(gradient, name, True, 1)
        by_kernel = matrices(g, name, True, 1)["w"]
        value = m["w"] + 3.0 * m["a"].reshape(len(m["w"]), 2) @ m["b"].reshape(2, -1)
        ratio = np.linalg.norm(m["w"], axis=0) / np.linalg.norm(value, axis=0)
        np.testing.assert_allclose(mine["magnitude"].reshape(-1), (by_kernel * value * ratio).sum(0), rtol=1e-4)
        magnitude = m["magnitude"].reshape(-1)
        expected = 3.0 * (by_kernel * ratio * magnitude) @ m["b"].reshape(2, -1).T
        np.testing.assert_allclose(mine["a"].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_adalora_is_its_product_and_its_penalty():
    _, params, adapt = pair(True, "adalora")
    flat, merged, wanted = paths(params), paths(adapters.merge(params, adapt)), 0.0
    for name in ("query", "out"):
        for layer in range(3):
            m = matrices(flat, name, True, layer)
            p, q = m["p"].reshape(len(m["w"]), 2), m["q"].reshape(2, -1)
            got = matrices(merged, name, True, layer)["w"]
            np.testing.assert_allclose(got, m["w"] + 3.0 * p @ np.diag(m["values"]) @ q, rtol=1e-5, atol=1e-6)
            wanted += 0.1 * (((p.T @ p - np.eye(2)) ** 2).sum() + ((q @ q.T - np.eye(2)) ** 2).sum())
    np.testing.assert_allclose(adapters.penalty(params, adapt), wanted, rtol=1e-5)
    assert adapters.penalty(params, ((".*/kernel", LORA),)[:0]) == 0.0


def test_ranks_go_to_the_triplets_that_count():
    """Six steps of SGD with hand-made gradients against numpy: which values are zero, and what the others are."""
    steps, rate = 6, 0.05
    adapt = ((".*/kernel", dict(kind="adalora", rank=2, target=1, warmup=0.2, settled=0.3)),)
    _, params, _ = pair(True, "adalora")
    optimizer = allocating(optax.sgd(rate), adapt, params, steps)
    state, rng = optimizer.init(params), np.random.default_rng(0)
    update = jax.jit(optimizer.update)
    mean, doubt, values = {}, {}, {}
    groups = [(name, layer) for name in ("query", "out") for layer in range(3)]
    kept = []
    for step in range(1, steps + 1):
        gradient = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
        flat, by = paths(params), paths(gradient)
        scores, moved = [], []
        for group in groups:
            m, g = matrices(flat, *group[:1], True, group[1]), matrices(by, *group[:1], True, group[1])
            total = 0.0
            for part, axes in (("p", -1), ("values", None), ("q", 0)):
                now, key = np.abs(m[part] * g[part]), (*group, part)
                mean[key] = 0.85 * mean.get(key, 0.0) + 0.15 * now
                doubt[key] = 0.85 * doubt.get(key, 0.0) + 0.15 * np.abs(now - mean[key])
                score = mean[key] * doubt[key]
                total = total + (
                    score if axes is None else score.reshape(-1, 2).mean(0) if axes else score.reshape(2, -1).mean(1)
                )
            scores.append(total)
            moved.append(m["values"] - rate * g["values"])
        share = np.clip((step - 1.2) / (4.2 - 1.2), 0, 1)
        count = round(6 + 6 * (1 - share) ** 3)
        threshold = np.sort(np.concatenate(scores))[::-1][count - 1]
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        flat = paths(params)
        for group, score, value in zip(groups, scores, moved):
            values = matrices(flat, group[0], True, group[1])["values"]
            np.testing.assert_allclose(values, np.where(score >= threshold, value, 0.0), rtol=1e-4, atol=1e-6)
        kept.append(sum(int((matrices(flat, *group[:1], True, group[1])["values"] != 0).sum()) for group in groups))
    assert kept[0] == 12 and kept[-1] == 6 and kept == sorted(kept, reverse=True)


def test_a_run_with_adalora_ends_at_its_budget():
    adapt = ((KERNELS, dict(kind="adalora", rank=3, target=1, warmup=0.0)),)
    experiment = Experiment(tiny(adapt=adapt, mesh=dict(data=2), optim=dict(learning_rate=1e-2)))
    mesh = experiment.make_mesh(jax.devices()[:2])
    program, batch = experiment.program(mesh), batch_of(experiment)
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(0))
        before = jax.device_get(state.params)
        for _ in range(4):
            state, _ = program.step(state, to_device(batch, mesh))
    assert_trees_equal(jax.device_get(state.params["model"]), before["model"])
    values = [leaf for name, leaf in paths(jax.device_get(state.params)).items() if name.endswith("/values")]
    assert sum(int((leaf != 0).sum()) for leaf in values) == 4 * 2 * 1  # 4 kernels in each of 2 layers
    assert {leaf.shape for leaf in values} == {(2, 3)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [(dict(target=13), "adalora.target: 13; 1 to rank 12"), (dict(warmup=0.8), "shares of the run, in all below 1")],
)
def test_bad_ranks(fields, message):
    adapt = ((KERNELS, dict(kind="adalora", **fields)),)
    with pytest.raises(UserError, match=message):
        program_of(tiny(adapt=adapt))


@pytest.mark.parametrize(("of", "size"), [("outputs", 6), ("inputs", 5)])
def test_scale_is_what_a_dense_gives_or_takes_times_the_numbers(of, size):
    dense, x = layers.Dense((2, 3), ("embed", "heads", "head_dim")), draw((4, 5))
    adapt = ((".*/kernel", dict(kind="scale", of=of)),)
    params = {"model": parameters(dense, x)}
    boxed = adapters.add(params, adapt, jax.random.key(0))
    scale = boxed["adapters"]["model"]["kernel"]["scale"].value
    assert scale.size == size and (scale == 1).all()
    assert_trees_equal(adapters.merge(nn.unbox(boxed), adapt), params)
    numbers = draw(scale.shape, 3)
    tree = nn.unbox(boxed) | {"adapters": {"model": {"kernel": {"scale": numbers}}}}
    merged = adapters.merge(tree, adapt)
    plain = dense.apply({"params": params["model"]}, x if of == "outputs" else x * numbers)
    wanted = plain * numbers if of == "outputs" else plain
    np.testing.assert_allclose(dense.apply({"params": merged["model"]}, x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_axes_are_named(scan):
    boxed, _, _ = pair(scan, "dora")
    where = ("adapters", "model", "blocks", "layers" if scan else "layer_0")
    own = {path[-3:]: leaf.names for path, leaf in flatten_dict(boxed).items() if path[:4] == where}
    layer = ("layers",) if scan else ()
    assert own == {
        ("query", "kernel", "a"): (*layer, "embed", None),
        ("query", "kernel", "b"): (*layer, None, "heads", "head_dim"),
        ("query", "kernel", "magnitude"): (*layer, "heads", "head_dim"),
        ("out", "kernel", "a"): (*layer, "heads", "head_dim", None),
        ("out", "kernel", "b"): (*layer, None, "embed"),
        ("out", "kernel", "magnitude"): (*layer, "embed"),
    }


def test_the_first_match_counts():
    adapt = ((".*/out/kernel", dict(kind="lora", rank=1)), (".*/kernel", dict(kind="lora", rank=3)))
    boxed = adapters.add(nn.unbox({"model": pair(False, "lora")[1]["model"]}), adapt, jax.random.key(0))
    ranks = {
        path[-3]: leaf.shape[-1] for path, leaf in flatten_dict(nn.unbox(boxed["adapters"])).items() if path[-1] == "a"
    }
    assert ranks == {"out": 1, "query": 3}


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        (((".*/kernal", LORA),), "'.*/kernal' matches no parameter; paths look like model/encoder_video/"),
        (((KERNELS, dict(kind="lorra")),), r"adapt\[0\].kind: unknown kind 'lorra'"),
        (((KERNELS, dict(kind="lora", ranks=3)),), r"adapt\[0\].ranks: no such key"),
        (((".*/bias", LORA),), "is no matrix; match kernels alone"),
        (((KERNELS, dict(kind="lora", rank=17)),), "rank 17 for model/encoder_video/.*; 1 to 16"),
        (((KERNELS, dict(kind="lora", rank=0)),), "rank: must be at least 1"),
        (((KERNELS, dict(kind="scale", of="middle")),), "scale.of: unknown 'middle'"),
        ((("(", LORA),), "no regular expression"),
        (("query", "lora"), "ordered pairs"),
    ],
)  # fmt: skip
def test_bad_input(adapt, message):
    with pytest.raises(UserError, match=message):
        Experiment(tiny(adapt=adapt))


@pytest.mark.parametrize(
    ("labels", "message"),
    [(dict(shape=5), "a head of 5 classes, but data.labels.shape has 6"), (dict(shap=6), "no label 'shap'.*shape")],
)
def test_a_head_that_does_not_fit_the_labels(labels, message):
    with pytest.raises(UserError, match=message):
        Experiment(tiny(objectives=dict(labels=dict(kind="classify", labels=labels))))


# ---- in a model and its step ---------------------------------------------------------------------


def test_a_model_with_new_adapters_is_its_base_to_the_bit():
    kinds = [dict(kind="dora", rank=2), dict(kind="scale"), dict(kind="lora", rank=2)]
    experiment = Experiment(tiny())
    batch = jax.tree.map(jnp.asarray, batch_of(experiment))
    params = nn.unbox(experiment.initialise(jax.random.key(1)))
    plain = jax.jit(lambda p: experiment.recipe.apply({"params": p}, batch, method="predict"))(params)
    for kind in kinds:
        adapted = Experiment(tiny(adapt=((KERNELS, kind),)))
        own = nn.unbox(adapted.initialise(jax.random.key(1)))
        assert_trees_equal({name: own[name] for name in params}, params)
        assert_trees_equal(adapted.merged(own), params)
    told = jax.jit(lambda p: adapted.recipe.apply({"params": p}, batch, method="predict"))(own)
    assert_trees_equal(told, plain)


@functools.cache
def stepped(mesh: tuple, scan: bool = True, **changes):
    """(experiment, state before, state after two steps, metrics) on a mesh."""
    config = tiny(adapt=((KERNELS, LORA),), mesh=dict(zip(("data", "fsdp", "tensor"), mesh)), **changes)
    config["trunk"]["encoders"]["video"]["scan"] = scan
    experiment = Experiment(config)
    mesh = experiment.make_mesh(jax.devices()[: math.prod(mesh)])
    program, batch = experiment.program(mesh), batch_of(experiment)
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(0))
        before = jax.device_get(state)
        for _ in range(2):
            state, metrics = program.step(state, to_device(batch, mesh))
    return experiment, before, jax.device_get(state), jax.device_get(metrics)


def test_only_adapters_and_heads_move_and_have_moments():
    experiment, before, after, _ = stepped((1, 1, 1))
    for tree in ("params", "ema"):
        old, new = paths(getattr(before, tree)), paths(getattr(after, tree))
        for name, leaf in old.items():
            same = leaf.tobytes() == new[name].tobytes()
            assert same is not name.startswith(("adapters/", "objective_")), name
    own = {name: leaf for name, leaf in paths(after.params).items() if name.startswith(("adapters/", "objective_"))}
    moments = [leaf for leaf in jax.tree.leaves(after.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in own.values())
    assert experiment.trained() == sum(leaf.size for leaf in own.values())
    assert experiment.parameters() == sum(leaf.size for leaf in paths(after.params).values())


def test_rate_rules_say_what_else_moves():
    rules = ((".*/bias", 1.0), ("adapters/.*", 0.0), (".*", 0.0))
    experiment = Experiment(tiny(adapt=((KERNELS, LORA),), optim=dict(rate_rules=rules)))
    assert experiment.optim.rate_rules == rules


def test_a_mesh_of_eight_devices_gives_the_same_step():
    _, _, one, told = stepped((1, 1, 1))
    _, _, eight, same = stepped((2, 2, 2))
    np.testing.assert_allclose(told["loss"], same["loss"], rtol=1e-5)
    np.testing.assert_allclose(told["gradient_norm"], same["gradient_norm"], rtol=1e-4)
    assert_trees_close(eight.params, one.params, 1e-4)


def test_adapters_are_split_as_what_they_adapt():
    experiment = Experiment(tiny(adapt=((KERNELS, LORA),)))
    mesh = make_mesh(MeshShape(2, 2, 2), jax.devices()[:8])
    shapes = paths(experiment.program(mesh).shapes.params)
    where = "adapters/model/encoder_video/stack/blocks/layers/block/attention/query/kernel"
    assert "fsdp" in str(shapes[f"{where}/a"].sharding.spec)
    assert "tensor" in str(shapes[f"{where}/b"].sharding.spec)


def test_a_scanned_step_is_that_of_the_loop():
    """The same adapters in both layouts of layers: gradients are the same."""
    scanned, looped = (Experiment(tiny(adapt=((KERNELS, LORA),))) for _ in range(2))
    config = tiny(adapt=((KERNELS, LORA),))
    config["trunk"]["encoders"]["video"]["scan"] = False
    looped = Experiment(config)
    params, batch = drawn(scanned.shapes), jax.tree.map(jnp.asarray, batch_of(scanned))
    flat = {}
    for path, leaf in flatten_dict(params).items():
        if "layers" in path:
            for i in range(2):
                flat[tuple(f"layer_{i}" if word == "layers" else word for word in path)] = leaf[i]
        else:
            flat[path] = leaf
    key = jax.random.key(0)
    gradients = [
        jax.jit(jax.grad(lambda p, e=e: e.loss()(p, p, batch, key)[0]))(p)
        for e, p in ((scanned, params), (looped, unflatten_dict(flat)))
    ]
    ours, theirs = (paths(g["adapters"]) for g in gradients)
    name = "model/encoder_video/stack/blocks/{}/block/mlp/up/kernel/a"
    np.testing.assert_allclose(
        ours[name.format("layers")][1], theirs[name.format("layer_1")], rtol=1e-3, atol=1e-6
    )  # fmt: skip
    assert np.abs(theirs[name.format("layer_1")]).max() > 1e-4


def test_at_most_two_percent_of_a_large_model_are_trained():
    """LoRA of rank 8 on query and value of ViT-B: 12 · 2 · 8 · 2 · 768 parameters, 0.3 %; heads beside."""
    config = tiny(adapt=((".*/(query|value)/kernel", dict(kind="lora", rank=8)),))
    config["trunk"]["encoders"]["video"] |= dict(width=768, depth=12, heads=12)
    config["trunk"]["fusion"]["width"] = 768
    experiment = Experiment(config)
    assert experiment.trained() == 12 * 2 * 8 * 2 * 768 + 768 * 6 + 6
    assert experiment.trained() / experiment.parameters() < 0.005


# ---- published and loaded ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(world_folder, tmp_path_factory):
    """(workdir of a base, workdir of adapters trained on it)."""
    folder = tmp_path_factory.mktemp("adapted")
    data = dict(train=f"{world_folder}/train.jsonl", tokenizer=f"{world_folder}/tokenizer.json", workers=0)
    config = tiny(steps=2, save_every=2, log_every=1)
    config["data"] |= data
    train(config, folder / "base")
    adapt = ((KERNELS, LORA), (".*/key/kernel", dict(kind="dora", rank=1)), (".*/down/kernel", dict(kind="scale")))
    config = config | dict(init_from=str(folder / "base"), adapt=adapt, seed=4)
    train(config, folder / "adapted")
    return folder / "base", folder / "adapted"


def test_merged_is_unmerged(runs):
    run = open_run(runs[1])
    params, batch = jax.device_get(weights(run.state)), jax.tree.map(jnp.asarray, batch_of(run.experiment))
    folder = publish(runs[1], runs[1].parent / "merged")
    model = vmm.load(folder)
    assert "adapters" not in model.params and not model.experiment.config.adapt

    def predict(recipe, p):
        return jax.jit(lambda p: recipe.apply({"params": p}, batch, method="predict"))(p)

    ours, theirs = predict(run.experiment.recipe, params), predict(model.recipe, model.params)
    assert_trees_close(ours, theirs, 1e-6)
    base = open_run(runs[0])
    old = predict(base.experiment.recipe, jax.device_get(weights(base.state)))
    assert np.abs(old["encoded/video"] - theirs["encoded/video"]).max() > 1e-4


def test_adapters_alone_are_small_and_come_back_over_their_base(runs):
    folder = publish(runs[1], runs[1].parent / "alone", adapters=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapters.safetensors", "config.json", "example.mp4", "example.safetensors"
    ], "without text there is no tokenizer"  # fmt: skip
    names = set(load_tensors(folder / "adapters.safetensors"))
    assert names == {
        name.replace("/", ".")
        for name in paths(open_run(runs[1]).state.params)
        if name.startswith(("adapters/", "objective_"))
    }
    whole = vmm.load(publish(runs[1], runs[1].parent / "merged"))
    assert_trees_equal(vmm.load(folder).params, whole.params)  # over what the config names
    copy = publish(runs[0], runs[0].parent / "copy")  # the same base elsewhere
    assert_trees_equal(vmm.load(folder, base=str(copy)).params, whole.params)
    assert max(check(folder, base=str(copy)).values()) < 1e-5  # in a clean process


def test_adapters_of_another_base_are_one_line(runs):
    folder = publish(runs[1], runs[1].parent / "alone", adapters=True)
    other = publish(runs[0], runs[0].parent / "other")
    tensors = load_tensors(other / "model.safetensors")
    changed = tensors["model.encoder_video.stack.blocks.layers.block.norm_mlp.scale"]
    changed[1, 3] = np.nextafter(changed[1, 3], np.float32(9))  # one bit of one tensor
    save_params(tensors, other / "model.safetensors")
    with pytest.raises(UserError, match="are of another base than .*other .SHA-256") as error:
        vmm.load(folder, base=str(other))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="its base cannot be read; give it as `base`"):
        vmm.load(folder, base=str(folder.parent / "nowhere"))
    with pytest.raises(UserError, match="holds a whole model, no adapters"):
        vmm.load(other, base=str(other))
    with pytest.raises(UserError, match="has no init_from"):
        publish(runs[0], runs[0].parent / "none", adapters=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["base"] == "../base" and len(config["base_sha256"]) == 64


@pytest.mark.parametrize("told", ["ABSOLUTE", "../../elsewhere/base", {"video": "ABSOLUTE"}, 5])
def test_a_strangers_adapters_lead_nowhere(runs, tmp_path, monkeypatch, told):
    """The config of a folder of adapters is its author's; this user's own is followed, also one of before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(runs[0], tmp_path / "elsewhere" / "base")
    folder = tmp_path / "downloads" / "alone"
    shutil.copytree(publish(runs[1], runs[1].parent / "alone", adapters=True), folder)
    place = str(tmp_path / "elsewhere" / "base")
    told = {"video": place} if isinstance(told, dict) else place if told == "ABSOLUTE" else told
    config = json.loads((folder / "config.json").read_text()) | {"base": told}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="give it as `base`") as refused:
        vmm.load(folder)
    assert "\n" not in str(refused.value)
    if not isinstance(told, str):
        return
    assert vmm.load(folder, base=place).params
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        assert vmm.load(folder).params, "below where vmm runs"
    note_own(folder / "config.json")
    assert vmm.load(folder).params, "this user wrote it"


# ---- adapters that are modules -------------------------------------------------------------------


def block_with(**fields):
    return layers.Block(heads=2, **fields)


X, THERE = draw((2, 5, 16)), jnp.asarray([[True] * 5, [True, True, False, True, False]])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_bottlenecks_change_nothing_at_first_and_something_when_trained(norm):
    plain, adapted = block_with(norm=norm), block_with(norm=norm, bottleneck=3)
    params = parameters(plain, X, THERE)
    own = jax.eval_shape(lambda key: nn.unbox(adapted.init(key, X, THERE)), jax.random.key(0))["params"]
    extra = {name: own[name] for name in own if name.startswith("bottleneck")}
    assert sorted(extra) == ["bottleneck_attention", "bottleneck_mlp"]
    assert sum(leaf.size for leaf in jax.tree.leaves(extra)) == 2 * (2 * 16 * 3 + 3 + 16)
    real = nn.unbox(layers.blocks.Bottleneck(3).init(jax.random.key(0), X))["params"]
    new = params | dict.fromkeys(extra, real)
    assert_trees_equal(adapted.apply({"params": new}, X, THERE), plain.apply({"params": params}, X, THERE))
    filled = params | drawn(extra)
    changed = adapted.apply({"params": filled}, X, THERE) - plain.apply({"params": params}, X, THERE)
    assert np.abs(changed).max() > 1e-2


def test_a_bottleneck_is_the_formula():
    module = layers.blocks.Bottleneck(3, "relu")
    p = parameters(module, X)
    x = np.asarray(X, np.float64)
    hidden = np.maximum(x @ p["down"]["kernel"] + p["down"]["bias"], 0)
    np.testing.assert_allclose(
        module.apply({"params": p}, X), x + hidden @ p["up"]["kernel"] + p["up"]["bias"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("masked", [False, True])
def test_a_prefix_is_keys_and_values_that_every_query_sees(masked):
    module = layers.Attention(2, prefix=3)
    mask = jnp.tril(jnp.ones((5, 5), bool))[None, None] if masked else None
    p = parameters(module, X, None, THERE)
    got = module.apply({"params": p}, X, None, THERE, mask)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    for i in range(2):
        x = np.asarray(X[i], np.float64)
        query, key, value = (
            np.einsum("nd,dah->nah", x, p[name]["kernel"]) + p[name]["bias"] for name in ("query", "key", "value")
        )
        key, value = np.concatenate([p["prefix_key"], key]), np.concatenate([p["prefix_value"], value])
        for q in range(5):
            seen = np.asarray(THERE[i]) & (np.arange(5) <= q) if masked else np.asarray(THERE[i])
            mixed = numpy_attention(query[q : q + 1], key, value, np.concatenate([[True] * 3, seen]))
            wanted = np.einsum("nah,ahd->nd", mixed, p["out"]["kernel"]) + p["out"]["bias"]
            np.testing.assert_allclose(got[i, q : q + 1], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "rules", "moved"),
    [
        ({}, ((".*/bias", 1.0), ("objective_.*", 1.0), (".*", 0.0)), ("/bias",)),
        (dict(registers=2), ((".*/registers", 1.0), ("objective_.*", 1.0), (".*", 0.0)), ("/registers",)),
        (
            dict(block=dict(bottleneck=2, prefix=2)),
            ((".*/(bottleneck|prefix)_.*", 1.0), ("objective_.*", 1.0), (".*", 0.0)),
            ("/bottleneck_", "/prefix_"),
        ),
    ],
)  # fmt: skip
def test_the_rules_of_other_ways_free_what_they_say(changes, rules, moved):
    """Bias-only tuning, visual prompts (VPT: registers), bottlenecks and prefixes: the rules of README and docstrings."""
    config = tiny(optim=dict(rate_rules=rules))
    config["trunk"]["encoders"]["video"] |= changes
    experiment = Experiment(config)
    params, batch = drawn(experiment.shapes), jax.tree.map(jnp.asarray, batch_of(experiment))
    free = paths(trainable(experiment.optim, params))
    own = {name for name, mine in free.items() if mine and not name.startswith("objective_")}
    assert own == {name for name in free if any(part in name for part in moved) and not name.startswith("objective_")}
    assert own
    gradient = paths(jax.jit(jax.grad(lambda p: experiment.loss()(p, p, batch, jax.random.key(0))[0]))(params))
    assert all(
        np.abs(gradient[name]).max() > 0 for name in own if "key/bias" not in name
    )  # softmax knows no such shift


def test_prefix_and_merging_do_not_go_together():
    config = tiny()
    config["trunk"]["encoders"]["video"] |= dict(block=dict(prefix=2), attention="divided")
    with pytest.raises(UserError, match="block.prefix: only where a token sees every other"):
        Experiment(config)


# ---- layer-wise rates, smoothed labels -----------------------------------------------------------


def layered(scan: bool) -> dict:
    """Parameters of an encoder of 2 layers and one of 3, a fusion of 2, a head, an adapter."""

    def stack(depth):
        if scan:
            return {"layers": {"block": {"kernel": np.ones((depth, 4), np.float32)}}}
        return {f"layer_{i}": {"block": {"kernel": np.ones(4, np.float32)}} for i in range(depth)}

    def encoder(depth):
        blocks = {"blocks": stack(depth), "norm": {"scale": np.ones(4, np.float32)}}
        return {"embed": {"kernel": np.ones(4, np.float32)}, "stack": blocks}

    model = {
        "encoder_video": encoder(2),
        "encoder_text": encoder(3),
        "fuse": {
            "enter": {"modality_text": np.ones(4, np.float32)},
            "blocks": stack(2),
            "leave": {"scale": np.ones(4)},
        },
    }
    adapted = {"encoder_text": {"stack": {"blocks": stack(3)}}}
    return {"model": model, "objective_labels": {"kernel": np.ones(4)}, "adapters": {"model": adapted}}


@pytest.mark.parametrize("scan", [False, True])
def test_rates_fall_by_layers(scan):
    rates = paths(layer_rates(0.5, layered(scan)))

    def of(place: str, depth: int) -> list:
        names = [f"{place}/layers"] if scan else [f"{place}/layer_{i}" for i in range(depth)]
        values = [rates[f"{name}/block/kernel"] for name in names]
        if scan:
            assert values[0].shape == (depth, 1) and values[0].dtype == np.float32
        return np.concatenate([np.ravel(value) for value in values]).tolist()

    assert rates["objective_labels/kernel"] == rates["model/fuse/leave/scale"] == 1.0
    assert of("model/fuse/blocks", 2) == [0.25, 0.5]
    assert rates["model/fuse/enter/modality_text"] == rates["model/encoder_video/stack/norm/scale"] == 0.25
    assert of("model/encoder_video/stack/blocks", 2) == [1 / 16, 1 / 8]
    assert rates["model/encoder_video/embed/kernel"] == 1 / 32
    assert of("model/encoder_text/stack/blocks", 3) == [1 / 32, 1 / 16, 1 / 8]
    assert of("adapters/model/encoder_text/stack/blocks", 3) == [1 / 32, 1 / 16, 1 / 8]
    assert rates["model/encoder_text/embed/kernel"] == 1 / 64


def test_rates_of_an_encoder_alone_are_those_of_mae():
    """Embeddings 0.75 ^ 13, block i of 12 (from 1) 0.75 ^ (13 − i), last norm and head 1."""
    config = tiny()
    config["trunk"]["encoders"]["video"] |= dict(depth=12, scan=False)
    rates = paths(layer_rates(0.75, nn.unbox(Experiment(config).shapes)))
    prefix = "model/encoder_video"
    assert rates[f"{prefix}/embed/kernel"] == pytest.approx(0.75**13)
    for i in range(12):
        assert rates[f"{prefix}/stack/blocks/layer_{i}/block/mlp/up/kernel"] == pytest.approx(0.75 ** (12 - i))
    assert rates[f"{prefix}/stack/norm/scale"] == rates["objective_labels/video_shape/kernel"] == 1.0


def test_stretches_of_layers_follow_one_another():
    """Scanned runs, and layers over time behind those over space: run_0 of 2, run_1 of 1, temporal of 1."""
    one, two = ({"layers": {"block": {"kernel": np.ones((depth, 4))}}} for depth in (1, 2))
    stack = {"blocks": {"run_0": two, "run_1": one}, "temporal": one}
    rates = paths(layer_rates(0.5, {"model": {"encoder_video": {"stack": stack}}}))
    assert [np.ravel(rate).tolist() for rate in rates.values()] == [[1 / 16, 1 / 8], [1 / 4], [1 / 2]]


@pytest.mark.parametrize("scan", [False, True])
def test_the_optimizer_steps_by_these_rates(scan):
    """Adam's first step is the rate itself; decay is scaled with it; what is frozen stays."""
    params = jax.tree.map(jnp.asarray, layered(scan))
    rules = (("objective_.*", 0.0), (".*", 1.0))
    optim = Optim(learning_rate=0.1, clip=0.0, layer_decay=0.5, weight_decay=0.2, rate_rules=rules)
    optimizer = make_optimizer(optim, params, 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    rates, decayed = paths(layer_rates(0.5, params)), lambda name: 1.2 if name.endswith("kernel") else 1.0
    for name, update in paths(updates).items():
        wanted = 0.0 if name.startswith("objective_") else -0.1 * rates[name] * decayed(name)
        np.testing.assert_allclose(update, np.broadcast_to(wanted, update.shape), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_a_decay_that_is_none(decay):
    with pytest.raises(UserError, match="optim.layer_decay: above 0 and at most 1"):
        make_optimizer(Optim(layer_decay=decay), layered(False), 10)


def test_smoothed_labels():
    logits, labels = draw((5, 4)), jnp.asarray([0, 3, 1, 2, 2])
    logs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    target = 0.9 * np.eye(4)[labels] + 0.1 / 4
    np.testing.assert_allclose(losses.cross_entropy(logits, labels, 0.1), -(target * logs).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), -logs[np.arange(5), labels], rtol=1e-5)
