"""The objective of events against numbers by hand and in float64, and what is unknown teaches nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from contracts import block_flops
from test_layers import parameters

from vmm import losses
from vmm.build import load_config
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.objectives.line import resampling
from vmm.objectives.localise import Localise, assign
from vmm.objectives.overlap import box_overlap, interval_overlap
from vmm.training.metrics import count_flops
from vmm.types import Batch, Outputs, Patches, Tokens

B, D = 4, 8
GRIDS = {"video": (4, 2, 3), "audio": (10, 2)}
FIELDS = dict(classes=3, seconds=4.0, participants=2, steps=8, width=16, depth=1, heads=2, points=2)


def test_focal_is_the_formula():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(5, 3)) * 3, np.float32(rng.integers(0, 2, (5, 3)))
    chance = 1 / (1 + np.exp(-logits))
    right = np.where(target == 1, chance, 1 - chance)
    expected = -np.where(target == 1, 0.25, 0.75) * (1 - right) ** 2 * np.log(right)
    np.testing.assert_allclose(losses.focal(jnp.asarray(logits, jnp.float32), jnp.asarray(target)), expected, rtol=1e-4)
    # Without focus and balance: half of the binary cross-entropy.
    np.testing.assert_allclose(
        2 * losses.focal(jnp.asarray(logits, jnp.float32), jnp.asarray(target), 0.5, 0.0), -np.log(right), rtol=1e-4
    )
    gradient = jax.grad(lambda x: losses.focal(x, jnp.asarray([[1.0, 0.0]])).sum())(jnp.array([[200.0, -200.0]]))
    assert np.isfinite(gradient).all()


def test_overlaps_by_hand():
    one = jnp.array([[0.0, 2.0], [0.0, 1.0], [1.0, 3.0]])
    other = jnp.array([[1.0, 3.0], [3.0, 4.0], [1.0, 3.0]])
    share, distance = interval_overlap(one, other)
    np.testing.assert_allclose(share, [1 / 3, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(distance, [1 / 3 - 1 / 9, -9 / 16, 1], rtol=1e-6)
    boxes = jnp.array([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.25, 0.25], [0.2, 0.2, 0.6, 0.6]])
    others = jnp.array([[0.25, 0.25, 0.75, 0.75], [0.75, 0.75, 1.0, 1.0], [0.2, 0.2, 0.6, 0.6]])
    share, general = box_overlap(boxes, others)
    np.testing.assert_allclose(share, [1 / 7, 0, 1], rtol=1e-5)
    # Around: 0.75² and 1; union: 7/16 and 1/8.
    np.testing.assert_allclose(general, [1 / 7 - (0.5625 - 0.4375) / 0.5625, -(1 - 0.125), 1], rtol=1e-5)
    # Apart, both still pull.
    for function, pair in ((interval_overlap, (one[1], other[1])), (box_overlap, (boxes[1], others[1]))):
        assert np.abs(jax.grad(lambda x, y, f=function: f(x, y)[1])(*pair)).max() > 0


def test_steps_are_resampled_by_time():
    np.testing.assert_array_equal(resampling(4, 4), np.eye(4))
    wide = resampling(2, 4)  # old steps at 1/4 and 3/4, new ones at 1/8, 3/8, …
    np.testing.assert_allclose(wide / wide.sum(1, keepdims=True), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    narrow = resampling(8, 2)
    line = narrow @ np.arange(8) / narrow.sum(1)
    np.testing.assert_allclose(line.sum(), 7)  # the same about the middle
    assert (narrow.sum(1) > 3).all()  # many old steps are in each new one
    # A straight line stays one, away from the ends.
    for old, new in ((5, 9), (16, 8), (50, 32)):
        weights = resampling(old, new)
        line = weights @ ((np.arange(old) + 0.5) / old) / weights.sum(1)
        np.testing.assert_allclose(line[2:-2], ((np.arange(new) + 0.5) / new)[2:-2], atol=0.01)


def test_steps_of_events_by_hand():
    times = np.arange(8) * 0.5 + 0.25  # 4 s
    start, end = jnp.array([[0.0, 2.0, 3.1, 0.0]]), jnp.array([[3.0, 2.5, 3.2, 4.0]])
    there = jnp.array([[True, True, True, False]])
    mine = np.asarray(assign(start, end, there, times, 1.5))[0]
    assert np.flatnonzero(mine[:, 0]).tolist() == [1, 2, 3, 4]  # within 0.75 s of 1.5
    assert np.flatnonzero(mine[:, 1]).tolist() == [4]
    assert np.flatnonzero(mine[:, 2]).tolist() == [6]  # shorter than a step: the nearest
    assert not mine[:, 3].any()
    assert np.flatnonzero(np.asarray(assign(start, end, there, times, 9.0))[0, :, 0]).tolist() == list(range(6))
    # Any event has a step.
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 3.9, (1, 500))
    end = np.minimum(start + rng.exponential(0.3, (1, 500)) + 1e-3, 4.0)
    assert (
        np.asarray(
            assign(jnp.asarray(start, jnp.float32), jnp.asarray(end, jnp.float32), jnp.ones((1, 500), bool), times, 0.5)
        )
        .any(1)
        .all()
    )


def view(seed: int = 0, present: dict | None = None) -> Outputs:
    rng = np.random.default_rng(seed)
    fused, patches = {}, {}
    for name, grid in GRIDS.items():
        count = int(np.prod(grid))
        there = np.ones((B, count), bool) if present is None else np.repeat(present[name][:, None], count, 1)
        at = np.tile(np.arange(count, dtype=np.int32), (B, 1))
        x = rng.normal(size=(B, count, D)).astype(np.float32)
        fused[name] = Tokens(*map(jnp.asarray, (x * there[..., None], there, at)))
        patches[name] = Patches(jnp.zeros((B, count, 1)), jnp.asarray(there), grid, 0)
    return Outputs(fused, fused, patches, {})


def events() -> dict:
    """Two events in each clip; box and participants of the second are unknown, all of clip 3's is."""
    nan = np.nan
    return {
        "start": np.tile(np.float32([0.2, 2.1]), (B, 1)),
        "end": np.tile(np.float32([1.4, 3.9]), (B, 1)),
        "label": np.tile(np.int32([0, 2]), (B, 1)),
        "box": np.tile(np.float32([[0.1, 0.2, 0.5, 0.6], [nan] * 4]), (B, 1, 1)),
        "participants": np.tile(np.float32([[1, 0], [nan, nan]]), (B, 1, 1)),
        "known": np.arange(B) < 3,
    }


def batch_of(truth: dict | None) -> Batch:
    there = {name: jnp.ones(B, bool) for name in GRIDS}
    targets = {} if truth is None else {"events": jax.tree.map(jnp.asarray, truth)}
    return Batch({}, there, {}, jnp.arange(B), jnp.ones(B, bool), targets=targets)


@functools.cache
def functions():
    module = Localise(**FIELDS)
    params = parameters(module, view(), batch_of(events()))

    def features(params, x, truth):
        outputs = view()
        fused = {name: tokens._replace(x=x[name]) for name, tokens in outputs.fused.items()}
        return module.apply({"params": params}, outputs._replace(fused=fused), batch_of(truth), method="features")

    def loss(params, x, truth):
        return module.apply({"params": params}, features(params, x, truth), method="loss")[0]

    return module, params, jax.jit(features), jax.jit(jax.grad(loss, (0, 1)))


CONTENT = {name: tokens.x for name, tokens in view().fused.items()}


def test_counts_are_of_what_is_known():
    _, params, features, _ = functions()
    found = features(params, CONTENT, events())
    # Steps of 0.5 s; middles 0.8 and 3.0, ±0.75 s, inside: steps 1, 2 (0.25 is inside too) and 5, 6 and 4, 7 (2.25, 3.75).
    times = np.arange(8) * 0.5 + 0.25
    first, second = (np.abs(times - m) <= min(h, 0.75) + 1e-6 for m, h in ((0.8, 0.6), (3.0, 0.9)))
    counts = {name: np.asarray(value["count"]) for name, value in found.items()}
    both = first.sum() + second.sum()
    np.testing.assert_array_equal(counts["scores"], [both, both, both, 0])
    np.testing.assert_array_equal(counts["time"], [both, both, both, 0])
    np.testing.assert_array_equal(counts["box"], [first.sum()] * 3 + [0])
    np.testing.assert_array_equal(counts["participants"], [first.sum()] * 3 + [0])
    assert all(np.asarray(value["error"])[3] == 0 for value in found.values())


def test_losses_are_those_of_what_is_told():
    """From predict's own numbers, in float64."""
    module, params, features, _ = functions()
    truth = events()
    told = module.apply({"params": params}, view(), method="_tell")
    told = {key: np.asarray(value, np.float64) for key, value in told.items()}
    found = features(params, CONTENT, truth)
    mine = np.asarray(
        assign(*map(jnp.asarray, (truth["start"], truth["end"], truth["label"] >= 0)), module.times, module.radius)
    )[0]
    target = np.zeros((8, 3))
    target[mine[:, 0], 0], target[mine[:, 1], 2] = 1, 1
    z = np.where(target == 1, 1, -1) * told["scores"][0]
    right = 1 / (1 + np.exp(-z))
    expected = (-np.where(target == 1, 0.25, 0.75) * (1 - right) ** 2 * np.log(right)).sum()
    np.testing.assert_allclose(found["scores"]["error"][0], expected, rtol=1e-4)
    box, who = told["boxes"][0][mine[:, 0]], told["participants"][0][mine[:, 0]]
    general = np.asarray(box_overlap(*map(jnp.float32, (box, np.tile(truth["box"][0, :1], (len(box), 1)))))[1])
    expected = (np.abs(box - truth["box"][0, 0]).sum(1) + 1 - general).sum()
    np.testing.assert_allclose(found["box"]["error"][0], expected, rtol=1e-4)
    cross = np.log1p(np.exp(np.where([1, 0], -who, who))).mean(1).sum()
    np.testing.assert_allclose(found["participants"]["error"][0], cross, rtol=1e-4)


def test_the_unknown_teaches_nothing():
    _, params, _, gradient = functions()
    own, by_x = gradient(params, CONTENT, events())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((own, by_x)))
    for x in by_x.values():  # clip 3's events are unknown
        assert not np.asarray(x)[3].any()
        assert np.asarray(x)[:3].any()
    blank = events() | {
        "box": np.full((B, 2, 4), np.nan, np.float32),
        "participants": np.full((B, 2, 2), np.nan, np.float32),
    }
    own, by_x = gradient(params, CONTENT, blank)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((own, by_x)))
    for head in ("box", "participants"):
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(own[head]))
    assert np.asarray(own["reach"]["kernel"]).any()
    # One corner that is not known: the whole box is not.
    partly = events()
    partly["box"][:, 0, 1] = np.nan
    assert not np.asarray(gradient(params, CONTENT, partly)[0]["box"]["kernel"]).any()
    nothing = events() | {"known": np.zeros(B, bool)}
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient(params, CONTENT, nothing)))
    # Known, and nothing happens: scores learn that, nothing else does.
    quiet = events() | {"label": np.full((B, 2), -1, np.int32)}
    own, _ = gradient(params, CONTENT, quiet)
    assert np.asarray(own["scores"]["bias"]).min() > 0
    assert not np.asarray(own["reach"]["kernel"]).any()


def test_predictions_are_of_the_window():
    module, params, _, _ = functions()
    outputs = view(present={"video": np.array([1, 1, 0, 0], bool), "audio": np.array([1, 0, 1, 0], bool)})
    told = jax.jit(lambda p: module.apply({"params": p}, outputs, batch_of(None), method="predict"))(params)
    assert {key: value.shape for key, value in told.items()} == {
        "scores": (B, 8, 3), "segments": (B, 8, 2), "boxes": (B, 8, 4), "participants": (B, 8, 2), "seconds": (B,),
    }  # fmt: skip
    segments, times = np.asarray(told["segments"]), np.arange(8) * 0.5 + 0.25
    assert (segments >= 0).all() and (segments <= 4).all()
    assert (segments[..., 0] <= times).all() and (segments[..., 1] >= times).all()
    assert not np.asarray(told["scores"])[3].any()  # nothing is there
    assert np.asarray(told["scores"])[:3].all()
    assert np.asarray(told["seconds"]).tolist() == [4.0] * B


def test_registers_and_hidden_tokens_have_no_step():
    """Tokens in another order, a register before them, are the same clip."""
    module, params, _, _ = functions()
    outputs = view()
    told = jax.jit(lambda f: module.apply({"params": params}, outputs._replace(fused=f), method="_tell"))
    rng, turned = np.random.default_rng(1), {}
    for name, tokens in outputs.fused.items():
        order = rng.permutation(tokens.x.shape[1])
        x, valid, at = (np.asarray(value)[:, order] for value in tokens)
        register = rng.normal(size=(B, 1, D)).astype(np.float32)
        turned[name] = Tokens(
            jnp.asarray(np.concatenate([register, x], 1)),
            jnp.asarray(np.concatenate([np.ones((B, 1), bool), valid], 1)),
            jnp.asarray(np.concatenate([np.full((B, 1), -1, np.int32), at], 1)),
        )
    one, other = told(outputs.fused), told(turned)
    for key in one:
        np.testing.assert_allclose(other[key], one[key], atol=1e-5)


def test_flops_are_the_closed_form():
    module, params, _, _ = functions()

    def tell(params, x):
        fused = {name: tokens._replace(x=x[name]) for name, tokens in view().fused.items()}
        return module.apply({"params": params}, view()._replace(fused=fused), method="_tell")

    points, width, steps, heads = 2, 16, 8, 3 + 6 + 2
    expected = block_flops(steps, width) + 2 * steps * width * heads
    for t, *rest in GRIDS.values():
        count, axes = t * int(np.prod(rest)), len(rest)
        expected += 4 * count * points * (D + axes) + 2 * t * points * (D + 2 * axes) * width
        expected += 2 * steps * t * (width + 1)
    assert count_flops(jax.jit(tell), params, CONTENT) == B * expected


@pytest.mark.parametrize(
    ("fields", "truth", "line"),
    [
        (dict(), None, "no events in data.targets.events"),
        (dict(events="what"), events(), "no events in data.targets.what"),
        (dict(participants=3), events(), "3 kinds of participants, but data.targets.events has 2"),
        (dict(streams=("text",)), events(), "'text', which has no time"),
        (dict(radius=0.2), events(), "radius 0.2 steps"),
        (dict(classes=0), events(), "classes 0"),
    ],
)
def test_bad_input_is_one_line(fields, truth, line):
    module = Localise(**FIELDS | fields)
    with pytest.raises(UserError, match=line):
        module.init(jax.random.key(0), view(), batch_of(truth))


def test_streams_without_time_are_one_line():
    outputs = view()
    still = {name: p._replace(grid=(1, p.valid.shape[1])) for name, p in outputs.patches.items()}
    with pytest.raises(UserError, match="have one step of time"):
        Localise(**FIELDS).init(jax.random.key(0), outputs._replace(patches=still), batch_of(events()))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"objectives.events.classes": 5}, "objectives.events.classes: 5, but data.targets.events.classes is 4"),
        ({"objectives.events.participants": 0}, "participants: 0, but data.targets.events.participants is 12"),
        (
            {"data.clip.seconds": 4.0, "data.clip.frames": 16},
            "objectives.events.seconds: 8.0, but windows are of 4 s",
        ),
        ({"data.augment.flip": True}, "data.augment, data.clip.crop: flip, area and crop move what is seen"),
    ],
)
def test_a_config_that_does_not_fit_its_data_is_one_line(changes, line):
    config = load_config(str(ROOT / "configs" / "finetune_localise.py") + ":small")
    for path, value in changes.items():
        *groups, key = path.split(".")
        group = config
        for name in groups:
            group = group.setdefault(name, {})
        group[key] = value
    with pytest.raises(UserError, match=line):
        Experiment(config)
