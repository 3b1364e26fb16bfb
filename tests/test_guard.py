"""One bad step changes nothing but the step counter, on any mesh, and costs a healthy run no bit."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmm.errors import NumericError, UserError
from vmm.sharding import MeshShape, make_mesh
from vmm.training.guard import (
    Guard,
    Inspector,
    Rollbacks,
    Trouble,
    above,
    check_guard,
    layer_norms,
    layer_of,
    layers,
)
from vmm.training.optim import Optim
from vmm.training.step import make_program

OPTIM = Optim(learning_rate=0.1, warmup=2, clip=1.0, ema=0.9, ema_end=1.0)
STEPS = 12


def start(key):
    return {"a": {"kernel": jax.random.normal(key, (8, 4))}, "b": {"bias": jnp.ones(4)}}


def loss(params, teacher, batch, key, memory):
    """A regression, with a queue that grows."""
    y = batch @ params["a"]["kernel"] + params["b"]["bias"]
    value = jnp.square(y - 1.0 + 0.1 * jax.random.normal(key, y.shape)).mean()
    return value, ({"mean": y.mean()}, {"queue": memory["queue"] + batch.sum()})


def program(guard, mesh=None, **more):
    return make_program(
        start, loss, OPTIM, steps=STEPS, seed=0, mesh=mesh, guard=guard, memory={"queue": jnp.zeros(())}, **more
    )


def batches(bad=()) -> list[np.ndarray]:
    made = [np.random.default_rng(i).normal(size=(8, 8)).astype(np.float32) for i in range(STEPS)]
    for step, value in dict(bad).items():
        made[step - 1][3, 2] = value
    return made


def run(built, given) -> tuple[list, list]:
    """States and metrics after each step."""
    state, states, told = built.init(jax.random.key(0)), [], []
    for batch in given:
        state, metrics = built.step(state, batch)
        states.append(jax.device_get(state))
        told.append(jax.device_get(metrics))
    return states, told


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def near(one, two):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-7), one, two)


def test_a_healthy_run_is_the_same_with_the_guard():
    """Bit for bit as XLA compiles by itself (experiments/LOG.md); with the quick compilation of tests, to rounding."""
    plain, guarded = run(program(None), batches()), run(program(Guard(spike=1e3, history=2)), batches())
    for one, two in zip(plain[0], guarded[0]):
        near(one._replace(guard=()), two._replace(guard=()))
    for one, two in zip(plain[1], guarded[1]):
        assert two["skipped"] == two["skipped/row"] == 0
        near(one, {key: two[key] for key in one})


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=["one", "2x2x2"])
def test_one_bad_batch_skips_one_step(value: float, shape):
    """Parameters, moments, average and queue stay; the step counter and the schedule move on; all after it counts."""
    mesh = make_mesh(MeshShape(*shape)) if shape else None
    states, told = run(program(Guard(), mesh), batches({5: value}))
    assert [int(row["skipped"]) for row in told] == [0] * 4 + [1] * 8
    assert [int(row["skipped/row"]) for row in told] == [0] * 4 + [1] + [0] * 7
    before, after = states[3], states[4]
    for field in ("params", "ema", "memory"):
        same(getattr(before, field), getattr(after, field))
    assert [int(state.step) for state in states] == list(range(1, STEPS + 1))
    moved = [
        (a, b) for a, b in zip(jax.tree.leaves(before.optimizer), jax.tree.leaves(after.optimizer)) if np.any(a != b)
    ]
    assert [(int(a), int(b)) for a, b in moved] == [(4, 5)], "the schedule's counter alone"
    # As if the batch had never been: the same run passed over step 5.
    built = program(Guard(), mesh)
    state = built.init(jax.random.key(0))
    for step, batch in enumerate(batches(), 1):
        state = built.pass_over(state) if step == 5 else built.step(state, batch)[0]
    same(jax.device_get(state), states[-1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]._replace(guard=())))


def test_poison_is_a_loss_that_is_not_a_number():
    states, told = run(program(Guard(), poison=(3, 7)), batches())
    assert [step for step, row in enumerate(told, 1) if row["skipped/row"]] == [3, 7]
    assert math.isnan(told[2]["loss"]) and np.isnan(told[2]["layers"]).all()
    assert int(states[-1].guard.skipped) == 2


def test_a_spike_is_skipped_once_there_is_history():
    given = batches()
    given[1] = given[1] * 50  # too early to tell
    given[8] = given[8] * 50
    states, told = run(program(Guard(spike=8.0, window=8, history=4)), given)
    assert [step for step, row in enumerate(told, 1) if row["skipped/row"]] == [9]
    same(states[7].params, states[8].params)
    # A spike stays in the history, so that a new level is believed in the end.
    assert told[8]["loss"] in states[8].guard.losses.tolist()


def test_bound_against_numpy():
    values = np.array([3.0, 1.0, np.nan, 2.0, 100.0, 2.5], np.float32)
    finite = values[np.isfinite(values)].astype(float)
    middle = np.median(finite)
    bound = middle + 4.0 * max(1.4826 * np.median(np.abs(finite - middle)), 0.1 * middle)
    assert not above(jnp.float32(bound - 1e-3), jnp.array(values), 4.0, 5)
    assert above(jnp.float32(bound + 1e-3), jnp.array(values), 4.0, 5)
    assert not above(jnp.float32(1e9), jnp.array(values), 4.0, 6), "not enough history"
    still = jnp.full(8, 2.0)  # no deviation at all: a tenth of the median
    assert not above(jnp.float32(2.79), still, 4.0, 8) and above(jnp.float32(2.81), still, 4.0, 8)


def test_norms_of_parts():
    tree = {
        "model": {
            "encoder_video": {"stack": {"layer_0": {"k": jnp.array([3.0, 4.0]), "b": jnp.array(12.0)}}},
            "fuse": {"token": jnp.array(2.0)},
        },
        "scale": jnp.array(-1.0),
    }
    assert layers(tree) == ["model/encoder_video/stack/layer_0", "model/fuse", "scale"]
    np.testing.assert_allclose(layer_norms(tree), [13.0, 2.0, 1.0])
    assert layer_of("model/a/layer_11/mlp/kernel") == "model/a/layer_11"


def test_inspector_writes_evidence_and_raises(tmp_path, capsys):
    def told(row: int, loss: float) -> dict:
        numbers = {"loss": loss, "gradient_norm": 2.0, "skipped": row, "skipped/row": row}
        return {key: np.float32(value) for key, value in numbers.items()} | {"layers": np.array([1.0, np.inf])}

    inspect = Inspector(Guard(patience=2), tmp_path, ["x", "y"], lambda step: [{"index": step * 2}], True)
    assert inspect(4, told(0, 1.0)) == 0
    assert inspect(5, told(1, float("nan"))) == 1
    assert inspect(5, told(0, 0.0)) == 1, "read once"
    record = json.loads((tmp_path / "evidence" / "step_5.json").read_text())
    assert record["loss"] == "nan" and record["layers"] == {"x": 1.0, "y": "inf"}
    assert record["samples"] == [{"index": 10}] and record["gradient_norm"] == 2.0
    assert "step 5: the loss is nan" in capsys.readouterr().out
    with pytest.raises(Trouble) as caught:
        inspect(6, told(2, 7.0))
    assert (caught.value.first, caught.value.last) == (5, 6)


def test_rollbacks_are_written_down_before_they_are_done(tmp_path):
    guard = Guard(rollbacks=1)
    Rollbacks(tmp_path, guard).begin(Trouble(5, 7, "why"), 3, True)
    again = Rollbacks(tmp_path, guard)  # as a restart finds them
    assert again.passed_over == {5, 6, 7} and again.unfinished["first"] == 5
    again.end(True)
    again = Rollbacks(tmp_path, guard)
    assert again.unfinished is None
    with pytest.raises(NumericError, match="the loss is nan.*after 1 rollbacks; the checkpoint of step 3 is intact"):
        again.begin(Trouble(9, 11, "step 11: the loss is nan"), 3, True)


def test_wrong_sizes():
    for field in (dict(patience=0), dict(spike=-1.0), dict(history=200), dict(rollbacks=-1)):
        with pytest.raises(UserError, match="guard"):
            check_guard(Guard(**field))
