"""The fusion study: equal depth, resumable, and the exclusive-or that only real fusion can solve."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from vmm import ablate as module
from vmm.ablate import ablate, costs, interval, load_study, matched
from vmm.ablation.compare import clip_scores, compare, compared_table, over_seeds, pairs
from vmm.ablation.match import bracket, cost
from vmm.ablation.pareto import front
from vmm.ablation.tables import html_table, latex, markdown
from vmm.build import digest, load_config, save_config
from vmm.config import numbers
from vmm.data import world
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.training.metrics import read_rows


@pytest.fixture(scope="module")
def fusion_world(tmp_path_factory) -> Path:
    """Enough clips to learn two bits and their exclusive-or from."""
    folder = tmp_path_factory.mktemp("fusion_world")
    world.generate(folder, {"train": 640, "validation": 8, "test": 96}, seed=1, missing=0.0)
    return folder


def fusion_config(folder: Path, kind: str, steps: int) -> dict:
    config = load_config(str(ROOT / "configs" / "world_fusion.py") + ":quick", [f"trunk.fusion.kind={kind}"])
    labels = {"video": 2, "audio": 2, "both": 2}
    config["data"] |= {
        "train": f"{folder}/train.jsonl",
        "tokenizer": f"{folder}/tokenizer.json",
        "labels": labels,
        "workers": 0,
    }
    config["objectives"] = {"labels": dict(kind="classify", labels=labels)}
    config["evals"] = {"labels": dict(kind="classification", data=f"{folder}/test.jsonl", subsets=("V", "A", "VA"))}
    config["optim"] |= {"warmup": 20}
    return config | {"steps": steps, "save_every": 1000}


@pytest.mark.exhaustive("trains two models until they have learned; tests of fusion say what mixes in one pass")
@pytest.mark.parametrize("kind", ["late", "joint"])
def test_exclusive_or_separates_fusion_from_averaging(kind, fusion_world, tmp_path):
    """Each stream's own bit is learned either way; the bit of both only where streams meet."""
    save_config(fusion_config(fusion_world, kind, 250), tmp_path / "config.json")
    # In a process with one device: splitting a model this small over eight costs more than it computes.
    code = (
        "import sys\nfrom vmm.__main__ import main\n"
        f"sys.exit(main(['train', {str(tmp_path / 'config.json')!r}, '--workdir', {str(tmp_path / 'run')!r}])"
        f" or main(['eval', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    values = read_rows(tmp_path / "run" / "evals.jsonl")[-1]["values"]
    assert values["labels/VA/video"] >= 0.95 and values["labels/VA/audio"] >= 0.95
    assert values["labels/V/audio"] < 0.7 and values["labels/A/video"] < 0.7
    if kind == "late":
        assert 0.3 < values["labels/VA/both"] < 0.7
    else:
        assert values["labels/VA/both"] >= 0.95


def tiny_study(folder: Path, world_folder: Path, kinds: tuple = ("late", "joint")) -> Path:
    study = folder / "9999-tiny"
    study.mkdir(parents=True)
    config = fusion_config(world_folder, "late", 2)
    config |= {"log_every": 1, "batch": 8, "mesh": {}}
    dimensions = dict(width=16, depth=1, heads=2)
    config["trunk"] = dict(
        encoders=dict(
            video=dict(kind="video", tubelet=(8, 16, 16), **dimensions),
            audio=dict(kind="audio", bins=32, patch=(32, 32), **dimensions),
        ),
        fusion=dict(kind="late", **dimensions),
    )
    config["evals"]["labels"]["subsets"] = ("VA",)
    config["optim"] |= {"warmup": 1}
    (study / "config.py").write_text(f"def get_config(variant=''):\n    return {config!r}\n")
    (study / "study.py").write_text(
        f"def get_study(quick):\n    return dict(config={str(study / 'config.py')!r}, seeds=(0,), score='labels/VA/both', scores=('labels/VA/video',),\n"
        f"        chance={{'labels/VA/both': 0.5}}, variants={ {kind: (f'trunk.fusion.kind={kind}',) for kind in kinds}!r})\n"
    )
    return study


def test_study_resumes_where_it_stopped(world_folder, tmp_path, monkeypatch, capsys):
    study, out = tiny_study(tmp_path, world_folder), tmp_path / "out"
    real, calls = module.train, []

    def broken(config, workdir):
        calls.append(workdir)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(config, workdir)

    monkeypatch.setattr(module, "train", broken)
    with pytest.raises(KeyboardInterrupt):
        ablate(study, out=out)
    assert len(read_rows(out / "results.jsonl")) == 1
    rows = ablate(study, out=out)
    assert len(calls) == 3, "one was done, the second began again"
    assert [(row["variant"], row["seed"]) for row in rows] == [("late", 0), ("joint", 0)]
    assert ablate(study, out=out) == rows and len(calls) == 3
    # Interrupted and resumed, or straight in another folder: the same numbers.
    straight = ablate(tiny_study(tmp_path / "alone", world_folder, ("joint",)), out=tmp_path / "straight")
    same = ("variant", "seed", "config", "data", "parameters", "flops", "peak_bytes", "values", "tested")
    assert [[row[key] for key in same] for row in straight] == [[row[key] for key in same] for row in rows[1:]]
    tables = [json.loads((folder / "table.json").read_text()) for folder in (out, tmp_path / "straight")]
    assert {**tables[0][1], "step ms": ""} == {**tables[1][0], "step ms": ""}
    assert json.loads((out / "comparisons.json").read_text())[0]["clips"] > 10
    # Every number is traced.
    for row in rows:
        assert set(row) >= {"config", "data", "commit", "seed", "host", "workdir", "tested"}
        assert (out / row["workdir"] / "evals.jsonl").is_file() and row["workdir"] in (out / "table.md").read_text()
    page = (out / "table.html").read_text()
    assert "<svg" in page and "joint − late" in page and "<script" not in page
    assert r"\toprule" in (out / "table.tex").read_text() and (out / "pareto.png").stat().st_size > 5000
    table = json.loads((out / "table.json").read_text())
    assert [line["variant"] for line in table] == ["late", "joint", "chance"]
    assert set(table[0]) == {"variant", "parameters", "forward MFLOPs", "peak MB", "step ms", "both", "video"}
    assert "±" not in table[0]["both"], "one seed has no interval"
    assert "| joint |" in (out / "table.md").read_text()
    assert "joint" in capsys.readouterr().out


def test_costs_follow_the_mechanism(world_folder):
    configs = {kind: fusion_config(world_folder, kind, 100) for kind in ("late", "joint", "cross", "bottleneck")}
    found = {kind: {what: cost(config, what) for what in ("parameters", "flops")} for kind, config in configs.items()}
    assert found["joint"]["parameters"] < found["late"]["parameters"], "joint shares its blocks"
    # Four bottlenecks in each of two blocks cost what keys and values of the other stream do, to a thousandth.
    assert found["late"]["flops"] < min(found["bottleneck"]["flops"], found["cross"]["flops"])
    assert found["bottleneck"]["flops"] == pytest.approx(found["cross"]["flops"], rel=1e-3)
    whole = costs(configs["late"])
    assert whole["peak_bytes"] > 1e6 and {key: whole[key] for key in found["late"]} == found["late"]


def test_interval_by_hand():
    mean, half = interval([0.9, 1.0, 0.8])
    assert mean == pytest.approx(0.9)
    assert half == pytest.approx(4.302653 * 0.1 / np.sqrt(3), rel=1e-5)
    assert np.isnan(interval([0.5])[1])


def test_markdown():
    assert markdown([{"variant": "a", "both": "1.0"}]) == "| variant | both |\n|---|---:|\n| a | 1.0 |"


def test_latex_escapes():
    text = latex([{"variant": "a_b", "both": "1 ± 2 %"}], "50 % & more")
    assert r"a\_b & 1 $\pm$ 2 \% \\" in text and r"\caption{50 \% \& more}" in text and r"{lr}" in text


def test_html_table_escapes():
    assert html_table([{"a<": "b&"}]) == "<table class=''><tr><th>a&lt;</th></tr><tr><td>b&amp;</td></tr></table>"


def test_pareto_front_by_hand():
    assert front([1, 2, 3, 4, 2], [0.1, 0.5, 0.4, 0.6, 0.3]) == [0, 1, 3]
    assert front([2, 1], [0.5, 0.5]) == [1], "as good for less"


# ---- paired tests ---------------------------------------------------------------------------------


def test_over_seeds_by_hand():
    ours, theirs = [0.5, 0.6, 0.55], [0.7, 0.75, 0.8]
    assert over_seeds(ours, theirs) == pytest.approx(stats.ttest_rel(theirs, ours).pvalue, rel=1e-9)
    assert np.isnan(over_seeds([0.5], [0.6])) and over_seeds([0.5, 0.6], [0.5, 0.6]) == 1.0
    assert over_seeds([0.5, 0.5, 0.5], [1.0, 1.0, 1.0]) == 0.25


def test_pairs():
    assert pairs(("a", "b", "c")) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs(("a", "b", "c"), "b") == [("b", "a"), ("b", "c")]
    assert len(pairs(tuple("abcdef"))) == 5


def test_comparison_by_hand():
    """Three clips that b has right and a wrong, one the other way, the same for both seeds: exact sign flips."""
    a = {"1": 0.0, "2": 0.0, "3": 0.0, "4": 1.0, "5": 1.0}
    b = {"1": 1.0, "2": 1.0, "3": 1.0, "4": 0.0, "5": 1.0}
    values = {"a": {0: 0.4, 1: 0.4}, "b": {0: 0.8, 1: 0.8}, "c": {0: 0.4, 1: 0.4}}
    clips = {"a": {0: a, 1: a}, "b": {0: b, 1: b}, "c": {}}
    first, second = compare(values, clips, [("a", "b"), ("a", "c")])
    # Of 16 signs of four clips' differences, |sum| is at least 2 unless two are + and two −: 10 of 16.
    assert first.p_clips == pytest.approx(10 / 16) and first.p_seeds == 0.5 and first.p == pytest.approx(10 / 16)
    assert (
        first.difference == pytest.approx(0.4) and first.low < 0.4 < first.high and (first.clips, first.seeds) == (5, 2)
    )
    assert first.adjusted == 1.0 and second.p == 1.0 and np.isnan(second.p_clips) and second.clips == 0
    table = compared_table([first, second])
    assert table[0]["pair"] == "b − a" and table[0]["difference"].startswith("+40.0 (") and table[1]["p, clips"] == "–"


def test_clips_of_a_score(tmp_path):
    rows = [{"format": "x"}] + [
        dict(evaluator="e", name=name, id=str(i), scores=scores)
        for i in range(2)
        for name, scores in (("VA/both", {"accuracy": i}), ("V→T", {"R@1": 1 - i, "R@5": 1.0}))
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert clip_scores(tmp_path / "p.jsonl", "e/VA/both") == {"0": 0, "1": 1}
    assert clip_scores(tmp_path / "p.jsonl", "e/V→T/R@1") == {"0": 1, "1": 0}
    assert clip_scores(tmp_path / "p.jsonl", "e/V/both") == {} == clip_scores(tmp_path / "gone", "e/V/both")


# ---- equal compute --------------------------------------------------------------------------------


def test_bracket_by_hand():
    for target, start, expected in (
        (50, 3, (7, 8)),
        (49, 3, (6, 7)),
        (50, 40, (7, 8)),
        (0.5, 4, (1, 1)),
        (9, 3, (3, 3)),
    ):
        calls = []
        found = bracket(lambda n, calls=calls: calls.append(n) or n * n, target, start)
        low, high = found
        assert found == expected or (low * low <= target <= high * high and high == low + 1), (target, found)
        assert len(calls) < 40
    with pytest.raises(UserError, match="still below"):
        bracket(lambda n: 1.0, 2.0, 1)


@pytest.fixture(scope="module")
def matching(world_folder, tmp_path_factory) -> dict:
    """A study of a small trunk whose variants cost differently."""
    path = tmp_path_factory.mktemp("matching") / "config.json"
    save_config(fusion_config(world_folder, "joint", 100), path)
    variants = {kind: (f"trunk.fusion.kind={kind}",) for kind in ("joint", "cross")}
    return dict(config=str(path), variants=variants, seeds=(0,), score="", scores=(), chance={})


@pytest.mark.parametrize(("what", "by"), [("flops", "width"), ("parameters", "width"), ("parameters", "depth")])
def test_matched_compute(what, by, matching):
    study = matching | {"match": dict(what=what, by=by, tolerance=0.3 if by == "depth" else 0.07)}
    if by == "depth":  # cross has a stack for each of two streams: half the depth
        study["variants"] = {"joint": ("trunk.fusion.kind=joint", "trunk.fusion.depth=4"), "cross": ("trunk.fusion.kind=cross",
                             "trunk.fusion.depth=4")}  # fmt: skip
    found = matched(study)
    assert found["joint"] == study["variants"]["joint"], "the reference stays"
    configs = {name: load_config(study["config"], overrides) for name, overrides in found.items()}
    target, got = (cost(configs[name], what) for name in ("joint", "cross"))
    assert abs(got / target - 1) <= study["match"]["tolerance"]
    fusion = configs["cross"]["trunk"]["fusion"]
    if by == "width":
        widths = {spec["width"] for spec in (*configs["cross"]["trunk"]["encoders"].values(), fusion)}
        assert len(widths) == 1 and widths.pop() % fusion["heads"] == 0
        plain = cost(load_config(study["config"], study["variants"]["cross"]), what)
        assert abs(got - target) <= abs(plain - target)
    else:
        assert fusion["depth"] < 4


def test_matches_that_are_impossible(matching):
    with pytest.raises(UserError, match=r"variant cross: no width gives .* within 0%: .* or .*; raise match.tolerance"):
        matched(matching | {"match": dict(what="parameters", tolerance=1e-5)})
    for match, line in (
        ("flop", "match.what: 'flop' is none; did you mean 'flops'"),
        (dict(what="flops", by="heads"), "match.by: 'heads' is none"),
        (dict(what="flops", reference="jont"), "did you mean 'joint'"),
        (dict(what="flops", tol=1), "match.tol: no such key"),
    ):
        with pytest.raises(UserError, match=line):
            matched(matching | {"match": match})


# ---- shipped studies ------------------------------------------------------------------------------

STUDIES = sorted(
    path.parent.name for path in (ROOT / "experiments").glob("*/study.py") if "def get_study" in path.read_text()
)


@pytest.mark.parametrize("name", STUDIES)
def test_shipped_studies_build(name, monkeypatch):
    """Variants' configs are built, none is trained; no two are the same."""
    monkeypatch.chdir(ROOT)
    assert len(STUDIES) >= 5
    for quick in (True, False):
        study = load_study(ROOT / "experiments" / name, quick)
        assert len(study["seeds"]) >= 3 and len(study["variants"]) >= 3
        digests, shown = set(), {}
        for overrides in study["variants"].values():
            digests.add(digest(numbers(load_config(study["config"], overrides))))
            # One config for each set of keys, and for each kind: those that differ in a number build alike.
            keys = (*(item.partition("=")[0] for item in overrides), *(item for item in overrides if "kind=" in item))
            shown[keys] = overrides
        assert len(digests) == len(study["variants"])
        for overrides in shown.values():
            Experiment(load_config(study["config"], overrides))


def test_shipped_study_is_fair():
    study = load_study(ROOT / "experiments" / "0001-fusion", quick=True)
    assert len(study["seeds"]) >= 3
    config = load_config(str(ROOT / study["config"].partition(":")[0]) + ":quick")
    assert "text" not in config["trunk"]["encoders"], "captions tell the facts"
    for overrides in study["variants"].values():
        assert all(item.startswith("trunk.fusion.kind=") for item in overrides), (
            "variants differ in the mechanism alone"
        )


def test_missing_study():
    with pytest.raises(UserError, match="holds no study.py"):
        load_study(Path("nowhere"), False)
    with pytest.raises(UserError, match="defines no get_study"):
        load_study(ROOT / "experiments" / "0005-search", False)
