"""vmm sweep: spaces, what is tried next, what is stopped early, and trials as children that can be killed."""

import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, small_config

from vmm.build import load_config, save_config
from vmm.errors import UserError
from vmm.search import sweep as module
from vmm.search.picture import draw
from vmm.search.prune import asha, median, never
from vmm.search.space import Choice, Int, Log, Uniform, corners, grid, make_space, overrides, read_space, words
from vmm.search.suggest import METHODS, search
from vmm.search.sweep import Metric, Sweep, check, lines, parse_metric, write_best
from vmm.search.trials import Trial, best_of, read_trials, write_trial

SPACE = {
    "optim.learning_rate": dict(kind="log", low=1e-4, high=1e-2, points=3),
    "trunk.fusion.kind": ["joint", "cross"],
    "optim.warmup": dict(kind="int", low=1, high=4, points=2),
}

# ---- spaces ---------------------------------------------------------------------------------------


def test_grid_by_hand():
    points = grid(make_space(SPACE))
    assert len(points) == 3 * 2 * 2
    assert [round(p["optim.learning_rate"], 12) for p in points[::4]] == [1e-4, 1e-3, 1e-2]
    assert [p["optim.warmup"] for p in points[:2]] == [1, 4] and points[0]["trunk.fusion.kind"] == "joint"


def test_draws_are_of_the_domain():
    rng = np.random.default_rng(0)
    draws = [Log(1e-4, 1.0).draw(rng) for _ in range(4000)]
    assert np.log10(draws).mean() == pytest.approx(-2, abs=0.05), "every order of magnitude as likely"
    counts = np.bincount([Int(1, 4).draw(rng) for _ in range(8000)], minlength=5)
    assert counts[0] == 0 and abs(counts[1:] / 2000 - 1).max() < 0.1, "the ends are as likely as the others"
    whole = {Int(1, 100, log=True).draw(rng) for _ in range(2000)}
    assert min(whole) == 1 and max(whole) <= 100 and len([v for v in whole if v < 10]) == 9
    assert {Choice((True, (1, 2))).draw(rng) for _ in range(40)} == {True, (1, 2)}
    assert 0.2 <= min(Uniform(0.2, 0.3).draw(rng) for _ in range(99)) < 0.21


def test_overrides_come_back_as_they_were(tmp_path):
    save_config({"a": {}, "kind": ""}, tmp_path / "c.json")
    given = {"kind": "joint", "a.x": 1e-4, "a.y": (1, 2), "a.z": True, "a.s": "1", "a.g": {"kind": "late", "depth": 2}}
    config = load_config(str(tmp_path / "c.json"), overrides(given))
    assert config == {
        "kind": "joint",
        "a": {"x": 1e-4, "y": (1, 2), "z": True, "s": "1", "g": dict(kind="late", depth=2)},
    }


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ({}, "space: empty"),
        ({"steps": []}, "space.steps: holds no value"),
        ({"steps": dict(kind="lgo", low=1, high=2)}, "space.steps.kind: unknown kind 'lgo'; did you mean 'log'"),
        ({"steps": dict(kind="log", low=0.0, high=2.0)}, "a logarithm needs low above 0"),
        ({"steps": dict(kind="int", low=4, high=2)}, "low 4 must be below high 2"),
        ({"steps": dict(kind="int", low=4)}, "space.steps.high: missing"),
    ],
)
def test_spaces_that_are_none(spec, line):
    with pytest.raises(UserError, match=line):
        make_space(spec)


def test_space_files(tmp_path):
    (tmp_path / "s.py").write_text("SPACE = {'batch': [8, 16]}\n")
    (tmp_path / "s.json").write_text('{"batch": [8, 16]}')
    assert read_space(tmp_path / "s.py") == read_space(tmp_path / "s.json") == {"batch": Choice((8, 16))}
    (tmp_path / "t.json").write_text("{")
    (tmp_path / "t.py").write_text("")
    for name, line in (("t.json", "not valid JSON"), ("t.py", "defines no SPACE"), ("u.py", "no such file")):
        with pytest.raises(UserError, match=line):
            read_space(tmp_path / name)


def test_values_of_a_grid_are_written_short():
    """As they stand in the ledger and on the command line, which reads them back to the same bits."""
    space = {
        "rate": dict(kind="log", low=1e-4, high=1e-2, points=5),
        "drop": dict(kind="uniform", low=0.1, high=0.4, points=4),
        "long": dict(kind="uniform", low=0.1234567890123456, high=1.0, points=2),
        "size": dict(kind="int", low=10**15, high=10**15 + 3, points=2),
    }
    domains = make_space(space)
    assert repr(domains["rate"].grid("")) == "(0.0001, 0.000316227766017, 0.001, 0.00316227766017, 0.01)"
    assert repr(domains["drop"].grid("")) == "(0.1, 0.2, 0.3, 0.4)"
    assert domains["long"].grid("") == (0.1234567890123456, 1.0), "not below low"
    assert domains["size"].grid("") == (10**15, 10**15 + 3)


def test_grid_of_a_range_needs_points():
    with pytest.raises(UserError, match=r"space.x: a grid needs points=N"):
        grid(make_space({"x": dict(kind="uniform", low=0.0, high=1.0)}))


def test_words_and_corners():
    assert words({"a.width": 4, "b.width": 8, "rate": 1e-4}) == "a.width=4 b.width=8 rate=0.0001"
    assert corners(make_space({"a": [1, 2, 3], "b": dict(kind="log", low=0.1, high=1.0)})) == [
        {"a": 1, "b": 0.1}, {"a": 2, "b": 0.1}, {"a": 3, "b": 0.1}, {"a": 1, "b": 1.0},
    ]  # fmt: skip


# ---- what is tried next ---------------------------------------------------------------------------


def test_a_search_is_a_function_of_its_seed_and_goes_on_as_it_would_have():
    space = make_space(
        {"x": dict(kind="uniform", low=-1.0, high=1.0), "k": ["a", (1, 2)], "n": dict(kind="int", low=1, high=9)}
    )

    def value(p):
        return math.nan if p["n"] == 3 else p["x"] ** 2 + (p["k"] == "a")

    whole = search(value, space, "bayes", 20, seed=4)
    assert whole == search(value, space, "bayes", 20, seed=4)
    assert [t.parameters for t in whole] != [t.parameters for t in search(value, space, "bayes", 20, seed=5)]
    assert METHODS["bayes"](space, whole[:15], 15, seed=4, goal="min") == whole[15].parameters
    assert {t.state for t in whole} <= {"done", "failed"} and all(t.value is None for t in whole if t.state == "failed")
    # Running and pruned trials are known to it, too.
    mixed = [
        Trial(i, t.parameters, state) for (i, t), state in zip(enumerate(whole[:12]), ("running", "pruned", "done") * 4)
    ]
    for trial in mixed:
        trial.value = 1.0 if trial.state == "done" else None
    assert METHODS["bayes"](space, mixed, 12, seed=4, goal="max").keys() == space.keys()
    assert METHODS["grid"](make_space({"k": ["a"]}), [], 1, seed=0, goal="min") is None


def test_bayes_finds_a_planted_optimum_with_fewer_trials_than_chance():
    """The study's own function, on seeds of its own; the whole study: experiments/0005-search."""
    spec = importlib.util.spec_from_file_location("study_search", ROOT / "experiments" / "0005-search" / "study.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    needed = {m: [study.trials_needed(m, 2000 + seed, 60)[0] for seed in range(6)] for m in ("bayes", "random")}
    assert sum(needed["bayes"]) < sum(needed["random"])
    assert sum(b <= r for b, r in zip(*needed.values())) >= 5


# ---- what is stopped early ------------------------------------------------------------------------


def test_median_by_hand():
    others = [{10: value, 20: value / 2} for value in (1.0, 2.0, 3.0, 4.0)]
    assert median({10: 2.6}, others, 100, "min").startswith("2.6 by step 10: the median of 4 others is 2.5")
    assert median({10: 2.4}, others, 100, "min") is None
    assert median({10: 2.6}, others, 100, "max") is None and median({10: 2.4}, others, 100, "max")
    assert median({10: 9.0}, others[:3], 100, "min") is None, "three are too few"
    assert median({9: 9.0}, [{9: 1.0}] * 9, 100, "min") is None, "the first tenth"
    assert median({10: 1.2, 20: 5.0}, others, 100, "min") is None, "its best counts: 1.2 against 1.25"
    assert median({30: 9.0}, others, 100, "min") is None, "none has come so far"
    assert median({}, others, 100, "min") is None and never({10: 9.0}, others, 100, "min") is None


def test_asha_by_hand():
    """Of 81 steps the rungs are 3, 9 and 27."""
    others = [{3: value} for value in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert asha({3: 1.5}, others, 81, "min") is None, "second of six: the best third goes on"
    assert asha({3: 2.5}, others, 81, "min") == "2.5 at rung 3: 3 of 6"
    assert asha({3: 4.5}, others, 81, "max") is None
    assert asha({2: 9.0}, others, 81, "min") is None, "before the first rung"
    assert asha({3: 9.0}, others[:1], 81, "min") is None, "two at a rung: both go on"
    assert asha({3: 9.0, 5: 9.0}, others, 81, "min") is None, "judged when it got to the rung, not after"
    assert asha({3: 0.1, 9: 9.0}, others, 81, "min") is None, "alone at the second rung"


# ---- the ledger -----------------------------------------------------------------------------------


def test_ledger_outlives_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "trials.jsonl"
    first = Trial(0, {"a": (1, (2,)), "g": {"x": (3,)}}, "done", 0.25, {10: 1.0}, "", {"seed": 0})
    write_trial(path, Trial(0, {"a": (1, (2,)), "g": {"x": (3,)}}))
    write_trial(path, first)
    with open(path, "a") as file:
        file.write('{"number": 1, "para')
    assert read_trials(path) == [first]
    write_trial(path, Trial(1, {}))
    assert read_trials(path) == [first, Trial(1, {})]
    assert best_of([first, Trial(1, {}), Trial(2, {}, "done", 0.5)], "min") == first
    assert best_of([first, Trial(2, {}, "done", 0.5)], "max").number == 2 and best_of([Trial(1, {})], "min") is None


# ---- the sweep ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(world_folder, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("sweep") / "config.json"
    save_config(small_config(world_folder, evals={}, steps=4, batch=8, log_every=1, save_every=2, mesh={}), path)
    return str(path)


def make_sweep(config: str, out: Path, **fields) -> Sweep:
    space = make_space(fields.pop("space", {"optim.learning_rate": [1e-3, 2e-3], "optim.warmup": [1]}))
    given = dict(changes=(), metric=Metric("loss", "min"), method="grid", trials=9)
    return Sweep(config, space, out, **(given | fields))


def fake_vmm(monkeypatch, body: str) -> None:
    """Children run `body` in place of vmm: argv is (train|eval, words …); `workdir`, `keys` and `write` are theirs."""
    head = (
        "import sys, json, time, signal, pathlib\n"
        "stage, words = sys.argv[1], sys.argv[2:]\n"
        "workdir = pathlib.Path(words[words.index('--workdir') + 1] if stage == 'train' else words[0])\n"
        "keys = dict(w.split('=', 1) for w in words if '=' in w)\n"
        "def write(step, file='metrics.jsonl', **row):\n"
        "    with open(workdir / file, 'a') as f: f.write(json.dumps({'step': step, **row}) + chr(10))\n"
    )
    real = subprocess.Popen

    def popen(command, **options):
        if command[1:3] != ["-m", "vmm"]:  # git
            return real(command, **options)
        return real([sys.executable, "-c", head + body, *command[3:]], **options)

    monkeypatch.setattr(module.subprocess, "Popen", popen)
    monkeypatch.setattr(module, "_POLL", 0.02)
    monkeypatch.setattr(module, "check", lambda sweep: module.check_method(sweep.method, sweep.space, sweep.trials))


RATE = "rate = float(keys['optim.learning_rate'])\n"


def test_trials_in_parallel_their_values_and_the_best_config(config, tmp_path, monkeypatch):
    fake_vmm(monkeypatch, RATE + "write(4, loss=abs(rate - 2e-3))\n")
    sweep = make_sweep(config, tmp_path / "s", space={"optim.learning_rate": [1e-3, 2e-3, 4e-3]}, parallel=2)
    trials = module.run(sweep)
    assert [t.value for t in trials] == [1e-3, 0.0, 2e-3] and {t.state for t in trials} == {"done"}
    best = load_config(str(write_best(sweep, trials)))
    assert best == load_config(config, ["optim.learning_rate=2e-3"])
    facts = trials[0].facts
    assert (
        set(facts) == {"config", "data", "seed", "commit", "host", "workdir", "seconds"} and len(facts["config"]) == 12
    )
    assert len({t.facts["config"] for t in trials}) == 3
    monkeypatch.setattr(module, "_Child", None)
    assert module.run(sweep) == trials, "nothing is run again"
    draw(trials, sweep.space, "loss", "min", [tmp_path / "p.png", tmp_path / "p.svg"])
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_equal_parameters_are_trained_once(config, tmp_path, monkeypatch):
    fake_vmm(monkeypatch, "write(4, loss=1.0)\n")
    trials = module.run(make_sweep(config, tmp_path / "s", method="random", trials=12, space={"optim.warmup": [1, 2]}))
    assert len(trials) == 12 and len(list((tmp_path / "s").glob("0*"))) == 2
    assert trials[-1].why.startswith("as trial") and trials[-1].value == 1.0


def test_evaluation_where_the_metric_is_not_of_training(config, tmp_path, monkeypatch, world_folder):
    fake_vmm(monkeypatch, RATE_OR_EVAL)
    evals = {"r": dict(kind="retrieval", data=f"{world_folder}/test.jsonl", objective="contrast")}
    sweep = make_sweep(config, tmp_path / "s", metric=Metric("r/top", "max"), changes=(f"evals={evals!r}",))
    assert [t.value for t in module.run(sweep)] == [0.5, 0.5]
    wrong = make_sweep(config, tmp_path / "t", metric=Metric("r/tpo", "max"), changes=(f"evals={evals!r}",))
    with pytest.raises(
        UserError, match=r"metric r/tpo: trial 1 has none of the name; did you mean 'r/top'\? known: loss, r/top"
    ):
        module.run(wrong)
    mended = make_sweep(config, tmp_path / "t", metric=Metric("r/top", "max"), changes=(f"evals={evals!r}",))
    assert len(module.run(mended)) == 2


RATE_OR_EVAL = "if stage == 'train': write(4, loss=1.0)\nelse: write(4, file='evals.jsonl', values={'r/top': 0.5})\n"


def test_pruned_failed_and_not_finite(config, tmp_path, monkeypatch):
    fake_vmm(
        monkeypatch,
        RATE + "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
        "if rate == 6.0: sys.exit('vmm: error: broken')\n"
        "if rate == 7.0: write(4, loss=None); sys.exit()\n"
        "write(2, loss=rate)\n"
        "if rate == 5.0: time.sleep(60)\n"  # until it is stopped
        "write(4, loss=rate)\n",
    )
    sweep = make_sweep(
        config, tmp_path / "s", space={"optim.learning_rate": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}, prune="median"
    )
    trials = module.run(sweep)
    assert [t.state for t in trials] == ["done"] * 4 + ["pruned", "failed", "failed"]
    assert "the median of 4 others is 2.5" in trials[4].why and trials[4].seen == {2: 5.0}
    assert trials[5].why == "vmm train ended with code 1: vmm: error: broken" and "not finite" in trials[6].why
    assert read_trials(tmp_path / "s" / "trials.jsonl") == trials


def test_all_failed_is_one_line(config, tmp_path, monkeypatch):
    fake_vmm(monkeypatch, "sys.exit('vmm: error: broken')\n")
    with pytest.raises(
        UserError, match="no trial came to an end; the last: vmm train ended with code 1: vmm: error: broken"
    ):
        module.run(make_sweep(config, tmp_path / "s"))


def test_another_sweep_in_the_folder(config, tmp_path, monkeypatch):
    fake_vmm(monkeypatch, "write(4, loss=1.0)\n")
    module.run(make_sweep(config, tmp_path / "s"))
    with pytest.raises(UserError, match="holds another sweep; it differs in config, seed"):
        module.run(make_sweep(config, tmp_path / "s", changes=("batch=16",), seed=1))


def test_wrong_keys_before_anything_runs(config, tmp_path):
    wrong = make_sweep(config, tmp_path, space={"optim.learning_rat": [1e-3]})
    with pytest.raises(UserError, match="optim.learning_rat: no such key; did you mean 'learning_rate'"):
        check(wrong)
    with pytest.raises(UserError, match="trunk.fusion.kind: unknown kind 'jont'"):
        check(make_sweep(config, tmp_path, space={"trunk.fusion.kind": ["bottleneck", "jont"]}))
    for fields, line in (
        (dict(method="byes"), "did you mean 'bayes'"), (dict(prune="medain"), "did you mean 'median'"),
        (dict(trials=0), "trials: at least 1"), (dict(parallel=0), "parallel: at least 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=line):
            check(make_sweep(config, tmp_path, **fields))
    for text in ("loss", "loss:up", ":min"):
        with pytest.raises(UserError, match="say which way"):
            parse_metric(text)
    assert parse_metric("labels/VA/both:max") == Metric("labels/VA/both", "max")


def test_lines_for_a_launcher(config, tmp_path):
    printed = lines(make_sweep(config, tmp_path / "s", space={"objectives.contrast.pooling": ["mean", "attention"]}))
    assert len(printed) == 2 and printed[1].startswith(f"vmm train {config} --workdir {tmp_path}/s/0001 ")
    config_of = load_config(config, shlex.split(printed[1])[5:])
    assert config_of["objectives"]["contrast"]["pooling"] == "attention"
    with pytest.raises(UserError, match="depends on results"):
        lines(make_sweep(config, tmp_path / "s", method="bayes"))


def test_gpus_are_shared_out():
    assert module._slots(2, lambda: ["0", "1", "2"]) == [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    crowded = module._slots(2, lambda: ["3"])
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in crowded] == ["3", "3"]
    assert crowded[0]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert module._slots(1, lambda: ["0", "1"]) == [{}] and module._slots(2, list) == [{}, {}]


def tiny(world: Path) -> dict:
    config = small_config(world, evals={}, steps=4, batch=4, log_every=1, save_every=1, mesh={})
    dimensions = dict(width=16, depth=1, heads=2)
    config["trunk"] = dict(
        encoders=dict(video=dict(kind="video", tubelet=(4, 12, 12), **dimensions)),
        fusion=dict(kind="late", **dimensions),
    )
    config["views"] = dict(masked=dict(video=dict(kind="tube", ratio=0.5)))
    config["objectives"] = dict(pixels=dict(kind="masked", view="masked", modalities=("video",), **dimensions))
    return config


@pytest.mark.exhaustive("a long kill: four sweeps in processes of their own")
def test_a_real_sweep_killed_goes_on_to_the_same_end(world_folder, tmp_path):
    """The command itself; SIGKILL in the second trial, resumed: the value of that trial undisturbed."""
    save_config(tiny(world_folder), tmp_path / "tiny.json")

    def command(out: str, *rates: float) -> list[str]:
        (tmp_path / f"{out}.json").write_text(json.dumps({"optim.learning_rate": rates}))
        words = [
            str(tmp_path / "tiny.json"),
            str(tmp_path / f"{out}.json"),
            "--out",
            str(tmp_path / out),
            "--method",
            "grid",
        ]
        return [sys.executable, "-m", "vmm", "sweep", *words, "--metric", "loss:min", "optim.warmup=1"]

    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    first = subprocess.Popen(command("a", 1e-3, 3e-3), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 150
    while not (tmp_path / "a" / "0001" / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    begun = read_trials(tmp_path / "a" / "trials.jsonl")
    assert [t.state for t in begun] == ["done", "running"]
    for out, rates in (("a", (1e-3, 3e-3)), ("b", (3e-3,))):
        done = subprocess.run(command(out, *rates), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "best.json: the best trial's config" in done.stdout and (tmp_path / out / "sweep.svg").exists()
    a, b = (read_trials(tmp_path / out / "trials.jsonl") for out in "ab")
    assert a[0] == begun[0] and a[1].value == b[0].value and a[1].value is not None
    best = load_config(str(tmp_path / "a" / "best.json"))
    assert best["optim"]["learning_rate"] == min(a, key=lambda t: t.value).parameters["optim.learning_rate"]
