"""Early stopping: on which evaluation a run ends, which checkpoint stays, and that a killed run decides the same."""

import json
import math
import os
import signal

import pytest
from conftest import small_config

import vmm.run
import vmm.session
from vmm.config import numbers
from vmm.errors import Preempted, UserError
from vmm.evaluate import run_evals
from vmm.experiment import Experiment
from vmm.run import open_run
from vmm.train import train
from vmm.training.checkpoint import Checkpoints
from vmm.training.early import Early, Watch
from vmm.training.metrics import read_rows

METRIC = "retrieval/V→T/R@1"


def rows(*values) -> list:
    return [[10 * (i + 1), value] for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("early", "values", "best", "worse"),
    [
        (Early("x"), (0.1, 0.3, 0.2, 0.3), 20, 2),  # as good is not better
        (Early("x", mode="min"), (0.3, 0.1, 0.2), 20, 1),
        (Early("x", min_delta=0.1), (0.1, 0.15, 0.19, 0.25), 40, 0),  # of the best, not of the one before
        (Early("x", min_delta=0.1), (0.1, 0.15, 0.2, 0.19), 10, 3),
        (Early("x"), (math.nan, 0.1, math.nan), 20, 1),
        (Early("x"), (math.nan, math.nan, math.nan), None, 2),
        (Early("x"), (), None, 0),
    ],
)
def test_the_best_and_how_long_ago_it_was(early, values, best, worse):
    found = early.best(rows(*values))
    assert (found and found[0]) == best
    assert early.worse(rows(*values)) == worse


def test_the_record_decides_alone(tmp_path):
    """Whatever was in memory: a new Watch of the same file, cut to any step, goes on alike."""
    values, early = [0.5, 0.4, 0.6, 0.55, 0.6, 0.1], Early("x", patience=3)

    def run(until: int, watch: Watch) -> list:
        told = []
        for step in range(until, 7):
            watch.add(step, {"x": values[step - 1]})
            told.append((step, watch.best, watch.why is not None))
        return told

    straight = run(1, Watch(tmp_path, early))
    assert straight == [(1, 1, False), (2, 1, False), (3, 3, False), (4, 3, False), (5, 3, False), (6, 3, True)]
    for start in range(6):
        watch = Watch(tmp_path, early)
        watch.back_to(start)
        assert run(start + 1, watch) == straight[start:]
    assert Watch(tmp_path, Early("x", patience=4)).why is None  # more patience trains on
    assert Watch(tmp_path, Early("y")).best is None  # another metric's numbers say nothing


def test_a_step_is_evaluated_once(tmp_path):
    watch = Watch(tmp_path, Early("x"))
    assert watch.lacks(3) and not watch.lacks(0)
    watch.add(3, {"x": 1.0})
    assert not watch.lacks(3) and watch.lacks(6)


def test_wrong_fields_are_errors(world_folder):
    for early, words in (
        (dict(metric=METRIC, mode="most"), "early.mode: max or min, got 'most'"),
        (dict(metric=METRIC, patience=0), "patience is at least 1"),
        (dict(metric="retrieve/x"), "'retrieve/x' is of no evaluator of `evals`; did you mean 'retrieval'"),
        (dict(metrics=METRIC), "metrics"),
    ):
        with pytest.raises(UserError, match=words):
            Experiment(small_config(world_folder, early=early))
    one, two = (small_config(world_folder, early=dict(metric=METRIC, patience=n)) for n in (1, 2))
    assert numbers(one) == numbers(two)  # patience may be raised, and the run goes on


# Runs


def config_of(world, **early) -> dict:
    """Twelve steps of the smallest model, evaluated every second."""
    config = small_config(world, steps=12, batch=8, save_every=4, keep=1, log_every=1)
    config["trunk"]["encoders"] = {
        name: spec | dict(width=8, heads=1, scan=True)
        for name, spec in config["trunk"]["encoders"].items()
        if name != "audio"
    }
    config["trunk"]["fusion"] = dict(kind="late", width=0, depth=0, heads=1)
    config["views"] = {"clean": {}}
    config["objectives"] = {"contrast": dict(kind="contrastive", width=8, pairs=(("video", "text"),))}
    return config | {"early": dict(metric=METRIC, patience=2, every=2) | early}


@pytest.fixture
def planted(monkeypatch):
    """Plants what evaluations find: call number → value, from the evaluation before training on."""
    calls = []

    def plant(values):
        def found(experiment, params, mesh):
            assert list(experiment.evals) == ["retrieval"]
            calls.append(params)
            return {METRIC: values[len(calls) - 1], "retrieval/V→T/R@5": 0.0}

        monkeypatch.setattr(vmm.session, "run_evals", found)
        return calls

    return plant


def steps_on_disk(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_a_metric_that_never_improves_stops_after_patience_evaluations(world_folder, tmp_path, planted, capsys):
    calls = planted([0.9, 0.5, 0.5, 0.4, 0.9, 0.9, 0.8])
    last = train(config_of(world_folder), tmp_path)
    # Before training; after 2, the best; after 4 and 6, without improvement.
    assert len(calls) == 4 and last["loss"] > 0
    found = read_rows(tmp_path / "metrics.jsonl")
    assert max(row["step"] for row in found) == 6
    assert [row["step"] for row in found if f"eval/{METRIC}" in row] == [2, 4, 6]
    assert f"stopped at step 6 of 12: {METRIC} was best at step 2 (0.5), not in the 2 evaluations since" in (
        capsys.readouterr().out
    )
    assert steps_on_disk(tmp_path) == [2, 6], "the newest, and the best though keep is 1"
    run = open_run(tmp_path)
    assert run.step == 2
    # Started again it stays stopped, and says why; with more patience it goes on.
    assert train(config_of(world_folder), tmp_path) == {}
    assert "stopped at step 6" in capsys.readouterr().out and len(calls) == 4
    train(config_of(world_folder, patience=3), tmp_path)
    assert len(calls) == 7
    record = json.loads((tmp_path / "early.json").read_text())
    assert record["rows"] == [[2, 0.5], [4, 0.5], [6, 0.4], [8, 0.9], [10, 0.9], [12, 0.8]]
    assert steps_on_disk(tmp_path) == [8, 12]


def test_killed_and_resumed_it_decides_the_same(world_folder, tmp_path, monkeypatch):
    """A run that is ended by SIGTERM at any step, also between a checkpoint and its evaluation, stops where a straight one does."""
    planted = {0: 0.0, 2: 0.1, 4: 0.3, 6: 0.2, 8: 0.3, 10: 0.9, 12: 0.9}
    add = Watch.add
    monkeypatch.setattr(vmm.session.Session, "evaluate", lambda *args, **options: {})
    monkeypatch.setattr(Watch, "add", lambda self, step, _: add(self, step, {METRIC: planted[step]}))
    train(config_of(world_folder), tmp_path / "straight")
    want = json.loads((tmp_path / "straight" / "early.json").read_text())
    assert want["rows"][-1][0] == 8

    # Asked to stop at steps 2 and 6 it saves, and leaves the evaluation to its successor.
    save, kill_at = Checkpoints.save, {2, 6}

    def saving(self, state, step, samples, *more):
        if step in kill_at:
            kill_at.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, state, step, samples, *more)

    monkeypatch.setattr(Checkpoints, "save", saving)
    attempts = 0
    for _ in range(5):
        try:
            train(config_of(world_folder), tmp_path / "killed")
            break
        except Preempted:
            attempts += 1
    assert attempts == 2
    assert json.loads((tmp_path / "killed" / "early.json").read_text()) == want
    assert steps_on_disk(tmp_path / "killed") == steps_on_disk(tmp_path / "straight") == [4, 8]
    one, two = (
        [row.get("loss") for row in read_rows(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("straight", "killed")
    )
    assert one == two


def test_an_unknown_metric_is_known_before_training(world_folder, tmp_path):
    """With the evaluator itself: one line, the near name first, and nothing trained."""
    with pytest.raises(
        UserError, match=r"early\.metric: no number 'retrieval/V→T/median'.*did you mean 'retrieval/V→T/median_rank'"
    ) as error:
        train(config_of(world_folder, metric="retrieval/V→T/median"), tmp_path)
    assert "retrieval/V→T/R@10" in str(error.value) and "\n" not in str(error.value)
    assert not steps_on_disk(tmp_path) and not read_rows(tmp_path / "metrics.jsonl")


def test_the_value_is_that_of_the_evaluation(world_folder, tmp_path):
    """A whole small run: what is recorded of the best step is what its checkpoint evaluates to."""
    train(config_of(world_folder, every=6), tmp_path)
    record = json.loads((tmp_path / "early.json").read_text())
    assert [step for step, _ in record["rows"]] == [6, 12]
    run = open_run(tmp_path)
    assert run.step == max(record["rows"], key=lambda row: (row[1], -row[0]))[0]
    values = run_evals(run.experiment, vmm.run.weights(run.state), run.mesh)
    assert values[METRIC] == pytest.approx(dict(record["rows"])[run.step])
