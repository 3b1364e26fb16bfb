"""Past embeddings as further negatives: in numbers, in the train state, through a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from vmm import losses
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.objectives.contrastive import Contrastive
from vmm.run import open_run
from vmm.train import train
from vmm.training.metrics import read_rows

B, Q, E = 5, 7, 6


def unit(seed: int, rows: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, E))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


FIRST, SECOND, OLD_FIRST, OLD_SECOND = unit(0, B), unit(1, B), unit(2, Q), unit(3, Q)
VALID, THERE = np.arange(B) != 2, np.arange(Q) % 3 != 0
SCALE, BIAS = 5.0, -2.0


def by_hand(variant: str) -> float:
    total = 0.0
    rows, past = np.flatnonzero(VALID), np.flatnonzero(THERE)
    for i in rows:
        for mine, others, old in ((FIRST, SECOND, OLD_SECOND), (SECOND, FIRST, OLD_FIRST)):
            now = {j: SCALE * mine[i] @ others[j] for j in rows}
            then = [SCALE * mine[i] @ old[j] for j in past]
            if variant == "softmax":
                total += 0.5 * (np.log(np.exp([*now.values(), *then]).sum()) - now[i])
            else:
                # Of this step's pairs each once, of the past's from either side.
                signs = [0.5 * np.log1p(np.exp(-(1 if j == i else -1) * (z + BIAS))) for j, z in now.items()]
                total += sum(signs) + sum(np.log1p(np.exp(z + BIAS)) for z in then)
    return total / len(rows)


@pytest.mark.parametrize("variant", ["softmax", "sigmoid"])
def test_the_past_is_further_negatives(variant: str):
    past = (jnp.asarray(OLD_FIRST), jnp.asarray(OLD_SECOND), jnp.asarray(THERE))

    def value(first, past):
        if variant == "softmax":
            return losses.contrastive_softmax(
                first, jnp.asarray(SECOND), jnp.asarray(VALID), jnp.float32(SCALE), past=past
            )
        return losses.contrastive_sigmoid(
            first, jnp.asarray(SECOND), jnp.asarray(VALID), jnp.float32(SCALE), jnp.float32(BIAS), past=past
        )

    both = jax.jit(jax.value_and_grad(value))
    loss, gradient = both(jnp.asarray(FIRST), past)
    assert loss == pytest.approx(by_hand(variant), rel=1e-5)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~VALID].any()
    # What is not there is no negative.
    dirty = (past[0].at[0].set(9.0), past[1].at[0].set(9.0), past[2])
    np.testing.assert_array_equal(both(jnp.asarray(FIRST), dirty)[1], gradient)
    nothing = (past[0], past[1], jnp.zeros(Q, bool))
    np.testing.assert_allclose(both(jnp.asarray(FIRST), nothing)[0], value(jnp.asarray(FIRST), None), rtol=1e-6)


def test_the_newest_stand_first_and_the_oldest_go():
    objective = Contrastive(width=4, pairs=(("video", "text"),), queue=3)
    memory = objective.init_queue()
    for step in (1.0, 2.0):
        rows = {name: {"all": jnp.full((2, 4), step)} for name in ("video", "text")}
        memory = objective.enqueue(memory, {"embeddings": rows, "there": dict.fromkeys(rows, jnp.ones(2, bool))})
    np.testing.assert_array_equal(memory["embeddings"]["video"]["all"][:, 0], [2, 2, 1])
    assert memory["there"]["text"].all()


def test_a_run_keeps_its_queue_over_a_restart(tmp_path, world_folder):
    config = tiny_config(world_folder, ("audio", "text"), steps=4, save_every=2, log_every=1)
    config |= dict(views=dict(clean={}), evals={})
    config["objectives"] = dict(contrast=dict(kind="contrastive", width=16, pairs=(("audio", "text"),), queue=40))
    config["optim"] |= dict(warmup=1)
    train(config, tmp_path / "whole")
    straight = read_rows(tmp_path / "whole" / "metrics.jsonl")
    queue = open_run(tmp_path / "whole").state.memory["contrast"]
    assert queue["embeddings"]["audio"]["all"].shape == (40, 16)
    norms = np.linalg.norm(queue["embeddings"]["text"]["all"], axis=1)
    np.testing.assert_allclose(norms[np.asarray(queue["there"]["text"])], 1.0, rtol=1e-5)
    # From the second step on the past makes the loss another.
    plain = config | dict(objectives=dict(contrast=config["objectives"]["contrast"] | dict(queue=0)))
    train(plain, tmp_path / "plain")
    other = read_rows(tmp_path / "plain" / "metrics.jsonl")
    assert other[0]["loss"] == pytest.approx(straight[0]["loss"], rel=1e-6)
    assert other[1]["loss"] < straight[1]["loss"] - 0.1
    # Cut after step 2, and on: the same losses.
    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    train(config, tmp_path / "cut")
    again = read_rows(tmp_path / "cut" / "metrics.jsonl")
    assert [row["loss"] for row in again] == [row["loss"] for row in straight]


def test_parts_of_a_batch_give_the_same_queue(world_folder):
    config = tiny_config(world_folder, steps=10)
    config["objectives"]["contrast"] |= dict(queue=8)
    shapes = []
    for accumulate in (1, 2):
        config["optim"] |= dict(accumulate=accumulate)
        experiment = Experiment(config)
        program = experiment.program(experiment.make_mesh())
        state, _ = jax.eval_shape(program.step, program.shapes, experiment.batch_shapes())
        shapes.append(jax.tree.map(lambda leaf: leaf.shape, state.memory))
    assert shapes[0] == shapes[1]


def test_a_queue_wants_no_chunks():
    objective = Contrastive(queue=4, chunk=4)
    with pytest.raises(UserError, match="chunk 0 with it"):
        _ = objective.bind({}).pool
