"""Means of checkpoints are NumPy's, are runs of their own, and are made only of what belongs together."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from flax.traverse_util import flatten_dict

from vmm import average as averaging
from vmm.__main__ import main
from vmm.average import average
from vmm.build import save_config
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.run import open_run, weights
from vmm.training.checkpoint import Checkpoints
from vmm.training.step import State


def slim(world: Path, **changes) -> dict:
    """A video model that classifies shapes."""
    config = small_config(world, steps=8, batch=8, keep=4)
    width = dict(width=16, depth=1, heads=2)
    config["trunk"] = dict(
        encoders=dict(video=dict(kind="video", tubelet=(2, 12, 12), **width)), fusion=dict(kind="late", **width)
    )
    config["views"], config["objectives"] = dict(clean={}), dict(labels=dict(kind="classify", labels=dict(shape=6)))
    config["data"]["labels"] = dict(shape=6)
    config["evals"] = dict(labels=dict(kind="classification", data=f"{world}/validation.jsonl", subsets=("V",)))
    return config | changes


def write_run(workdir: Path, config: dict, steps: tuple[int, ...], seed: int) -> dict[int, State]:
    """Writes checkpoints of drawn numbers; returns step → the state."""
    experiment = Experiment(config)
    program, rng = experiment.program(None), np.random.default_rng(seed)
    checkpoints, states = Checkpoints(workdir, config["keep"]), {}

    def draw(leaf):
        kind = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape) if kind else np.zeros(leaf.shape), leaf.dtype)

    for step in steps:
        states[step] = jax.tree.map(draw, nn.unbox(program.shapes))
        checkpoints.save(states[step], step, step * config["batch"])
    checkpoints.close()
    save_config(config, workdir / "config.json")
    return jax.device_get(states)


@pytest.fixture(scope="module")
def runs(world_folder, tmp_path_factory):
    """(folder, states of a, states of b): two runs of one model, with a running average."""
    folder = tmp_path_factory.mktemp("average")
    config = slim(world_folder)
    a = write_run(folder / "a", config, (2, 4, 6), seed=1)
    b = write_run(folder / "b", config | dict(optim=config["optim"] | dict(learning_rate=2e-3)), (3, 5), seed=2)
    return folder, a, b


def assert_mean(workdir: Path, trees: list, step: int, both: bool = True) -> None:
    """The run's weights are the mean of the trees, and so are its parameters and its running average."""
    run = open_run(workdir)
    assert run.step == step
    ours = [run.state.params, run.state.ema] if both else [weights(run.state)]
    for tree in ours:
        flat = flatten_dict(jax.device_get(tree), sep="/")
        others = [flatten_dict(one, sep="/") for one in trees]
        for name, value in flat.items():
            wanted = np.mean([np.asarray(one[name], np.float64) for one in others], 0)
            np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-8, err_msg=name)
            assert value.dtype == others[0][name].dtype


def test_last_checkpoints_of_a_run(runs, tmp_path, capsys):
    folder, a, _ = runs
    out = tmp_path / "mean"
    assert main(["average", str(folder / "a"), "--last", "2", "--out", str(out)]) == 0
    assert_mean(out, [a[4].ema, a[6].ema], step=6)
    members = json.loads((out / "average.json").read_text())["members"]
    assert [one["step"] for one in members] == [4, 6]
    assert "mean of 2 checkpoints" in capsys.readouterr().out
    assert main(["average", str(folder / "a"), "--last", "2", "--out", str(out)]) == 2  # nothing is overwritten
    assert "holds a run already" in capsys.readouterr().err


def test_steps_and_runs(runs, tmp_path, capsys):
    folder, a, b = runs
    average([folder / "a"], tmp_path / "steps", steps=(2, 6))
    assert_mean(tmp_path / "steps", [a[2].ema, a[6].ema], step=6)
    average([folder / "a", folder / "b"], tmp_path / "soup")
    assert_mean(tmp_path / "soup", [a[6].ema, b[5].ema], step=6)
    assert "different parameters" not in capsys.readouterr().out


def test_of_runs_without_a_running_average_it_is_the_parameters(world_folder, tmp_path):
    config = slim(world_folder)
    config["optim"] = {key: value for key, value in config["optim"].items() if key != "ema"}
    states = write_run(tmp_path / "raw", config, (2, 4), seed=3)
    average([tmp_path / "raw"], tmp_path / "mean", last=2)
    assert_mean(tmp_path / "mean", [states[2].params, states[4].params], step=4, both=False)


def test_bfloat16_is_summed_in_float64():
    values = [jnp.asarray(x, jnp.bfloat16) for x in (1.0, 1.0078125, 1.0078125)]
    found = averaging.mean([{"w": np.asarray(value)} for value in values])["w"]
    assert found.dtype == jnp.bfloat16 and float(found) == float(jnp.bfloat16(3.015625 / 3))


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (dict(last=4), "has checkpoints of steps 2, 4, 6, not 4; `keep` .4. says"),
        (dict(steps=(2, 5)), "not of step 5"),
        (dict(last=1), "one checkpoint alone has no mean"),
        (dict(last=2, greedy="loss"), "say which way"),
    ],
)
def test_bad_wishes_are_one_line(runs, tmp_path, give, message):
    with pytest.raises(UserError, match=message):
        average([runs[0] / "a"], tmp_path / "out", **give)
    assert not (tmp_path / "out").exists()


def test_models_that_differ_are_one_line(runs, world_folder, tmp_path):
    folder = runs[0]
    wider, other = slim(world_folder), slim(world_folder)
    wider["trunk"]["encoders"]["video"]["width"] = wider["trunk"]["fusion"]["width"] = 32
    other["data"]["clip"] = other["data"]["clip"] | dict(seconds=1.0)
    for name, config, message in (
        ("wider", wider, "has other parameters than .*, the first"),
        ("other", other, "clip.seconds"),
    ):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        save_config(config, tmp_path / name / "config.json")
        with pytest.raises(UserError, match=message):
            average([folder / "a", tmp_path / name], tmp_path / "out")
    with pytest.raises(UserError, match="give the workdir of a `vmm train`"):
        average([folder / "a", tmp_path / "nowhere"], tmp_path / "out")


def test_a_greedy_soup_takes_what_helps(runs, tmp_path, monkeypatch):
    """A score that is highest at the mean of b's two checkpoints: they are taken, a's are not."""
    folder, _, b = runs
    key = "objective_labels.video_shape.kernel"
    flat = [flatten_dict(state.ema, sep=".")[key] for state in b.values()]
    best = np.mean(flat, 0)
    monkeypatch.setattr(averaging, "scorer", lambda *_: lambda values: -float(np.abs(values[key] - best).max()))
    told = average([folder / "a", folder / "b"], tmp_path / "soup", last=2, greedy="any:max")
    assert [(one["step"], one["taken"]) for one in told] == [(4, False), (6, False), (3, True), (5, True)]
    found = flatten_dict(jax.device_get(weights(open_run(tmp_path / "soup").state)), sep=".")[key]
    np.testing.assert_allclose(found, best, rtol=1e-6)
    record = json.loads((tmp_path / "soup" / "average.json").read_text())
    assert len(record["members"]) == 2 and len(record["candidates"]) == 4


def test_scores_are_those_of_the_evaluators(runs):
    folder, a, _ = runs
    run = open_run(folder / "a")
    score = averaging.scorer(run.experiment, "labels/V/shape")
    flat = {name: np.array(value) for name, value in flatten_dict(a[6].ema, sep=".").items()}
    found = []
    for bias in (0, 3):  # always the same class: the score is its share of the clips
        flat["objective_labels.video_shape.bias"] = 1e4 * np.eye(6, dtype=np.float32)[bias]
        found.append(score(flat))
    lines = Path(run.experiment.evals["labels"].data).read_text().splitlines()
    shapes = [json.loads(line)["labels"]["shape"] for line in lines]
    np.testing.assert_allclose(found, [np.mean([s == bias for s in shapes]) for bias in (0, 3)])
    with pytest.raises(UserError, match="the evaluators tell no such number; did you mean 'labels/V/shape'"):
        averaging.scorer(run.experiment, "labels/V/shap")(flat)
