"""vmm eval writes every clip's predictions and its suites; vmm compare joins two such files and tests the difference."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import tiny_config

from vmm.__main__ import main
from vmm.compare import compare
from vmm.corrupt import CORRUPTIONS
from vmm.errors import UserError
from vmm.evals.predictions import FORMAT, lines, read_predictions, write_predictions
from vmm.evals.scored import Scored
from vmm.evaluate import evaluate
from vmm.experiment import Experiment
from vmm.report import report
from vmm.run import Run
from vmm.sharding import MeshShape, make_mesh
from vmm.training.metrics import read_rows

LABELS = {"shape": 6, "both": 2}


@pytest.fixture(scope="module")
def run(world_folder, tmp_path_factory) -> Iterator[Path]:
    """The workdir of a model as it is before training, on one device, evaluated under every suite."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(world_folder, ("video", "audio", "text"), mixes=True)
    config["data"] |= {"labels": LABELS}
    config["objectives"] = {
        "contrast": config["objectives"]["contrast"],
        "labels": dict(kind="classify", labels=LABELS),
    }
    config["views"] = {"clean": {}}
    test = f"{world_folder}/test.jsonl"
    config["evals"] = {
        "retrieval": dict(kind="retrieval", data=test, objective="contrast"),
        "probe": dict(kind="probe", train=f"{world_folder}/train.jsonl", data=test, subsets=("V", "VAT")),
        "labels": dict(kind="classification", data=test, subsets=("V", "VA")),
    }
    experiment = Experiment(config)
    params = nn.unbox(experiment.initialise(jax.random.key(0)))
    mesh = make_mesh(MeshShape(), jax.local_devices()[:1])
    opened = Run(workdir, config, experiment, mesh, SimpleNamespace(ema={}, params=params), 1)
    row = {"step": 1, "loss": 1.0, "clips_per_second": 1.0, "input_wait": 0.0}
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("evaluate", "report"):
            patch.setattr(f"vmm.{module}.open_run", lambda path: opened)
        evaluate(workdir, suites=("robustness", "calibration", "classes"), predictions="")
        yield workdir


def test_record_has_values_intervals_and_suites(run, world_folder):
    record = read_rows(run / "evals.jsonl")[-1]
    values, ends = record["values"], record["intervals"]
    for key in ("retrieval/V→T/R@1", "retrieval/V→T/median_rank", "probe/VAT/shape", "labels/VA/both"):
        assert ends[key][0] <= values[key] <= ends[key][1], key
    assert "retrieval/clips" not in ends
    robust = record["suites"]["robustness"]
    assert set(robust) == {f"{name}/{severity}" for name in CORRUPTIONS for severity in range(1, 6)}
    one = robust["frame_drop/3"]
    assert {"retrieval/V→T/R@1", "probe/VAT/shape", "labels/VA/both"} <= set(one["values"]), "of all streams together"
    assert "labels/V/both" not in one["values"] and "labels/VA/both" in one["intervals"]
    assert robust["missing_text/5"]["values"]["labels/VA/both"] == values["labels/VA/both"], "no text was shown"
    clips = values["retrieval/clips"]
    for name in ("missing_text", "missing_video"):
        assert robust[f"{name}/5"]["values"]["retrieval/V→T/R@1"] <= 1 / clips, "nothing seen: chance at most"
    labelled = sum(json.loads(line)["labels"].get("both", -1) >= 0 for line in (world_folder / "test.jsonl").open())
    sure = record["suites"]["calibration"]["labels/VA/both"]
    assert sure["values"]["accuracy"] == pytest.approx(values["labels/VA/both"])
    assert sum(sure["bins"]["count"]) == labelled and 0 <= sure["values"]["error"] <= 1
    classes = record["suites"]["classes"]["labels/VA/both"]
    assert np.sum(classes["confusion"]) == sum(classes["count"]) == labelled
    assert np.trace(classes["confusion"]) / labelled == pytest.approx(values["labels/VA/both"])


def test_suites_are_kept_and_printed(run, capsys, monkeypatch):
    from vmm import evaluate as module

    def refuse(*_):
        raise AssertionError("predicts again")

    before = (run / "evals.jsonl").read_bytes()
    monkeypatch.setattr(module, "measure", refuse)
    assert main(["eval", str(run), "--suite", "all"]) == 0
    text = capsys.readouterr().out
    for part in (
        "by severity: probe",
        "A→T/R@1",
        "  wrong_caption",
        "calibration",
        "log_loss",
        "confusion: labels/VA/both",
    ):
        assert part in text, part
    assert (run / "evals.jsonl").read_bytes() == before


def test_report_shows_intervals(run, tmp_path):
    page = report(run, tmp_path / "report.html").read_text()
    ends = read_rows(run / "evals.jsonl")[-1]["intervals"]["labels/VA/both"]
    assert f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}" in page
    assert "Robustness" in page and "wrong_caption" in page
    assert "Calibration" in page


def test_predictions_are_those_of_the_numbers(run, world_folder):
    got = read_predictions(run / "predictions.jsonl")
    record = read_rows(run / "evals.jsonl")[-1]
    ids = [json.loads(line)["id"] for line in (world_folder / "test.jsonl").read_text().splitlines()]
    truth = {
        json.loads(line)["id"]: json.loads(line) for line in (world_folder / "test.jsonl").read_text().splitlines()
    }
    assert got.about["data"] == record["data"] and got.about["step"] == 1
    mine = got.rows["labels/VA/shape"]
    assert list(mine) == ids
    for id, line in mine.items():
        assert line["label"] == truth[id]["labels"]["shape"]
        assert line["scores"]["accuracy"] == float(line["prediction"] == line["label"])
        assert 1 / 6 <= line["probability"] <= 1
    for name, rows in got.rows.items():
        for metric in next(iter(rows.values()))["scores"]:
            key = name if metric == "accuracy" else f"{name}/{metric}"
            assert np.mean([line["scores"][metric] for line in rows.values()]) == pytest.approx(record["values"][key])
    ranks = [line["rank"] for line in got.rows["retrieval/V→T"].values()]
    assert np.median(ranks) == record["values"]["retrieval/V→T/median_rank"]


def test_a_run_equals_itself(run, capsys, tmp_path):
    assert main(["compare", str(run), str(run / "predictions.jsonl"), "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["clips"]["labels/VA/shape"] == 18 and result["only"]["labels/VA/shape"] == [0, 0]
    for value in result["metrics"].values():
        assert (value["difference"], value["low"], value["high"], value["p"], value["p_holm"]) == (0, 0, 0, 1, 1)
    assert "labels/VA/both" in capsys.readouterr().out


# ---- files by hand --------------------------------------------------------------------------------


def write(path: Path, right: dict[str, float], labels: dict | None = None, name: str = "VA/kind", **about) -> Path:
    ids = list(right)
    told = {"label": np.array([(labels or {}).get(id, 1) for id in ids]), "probability": np.full(len(ids), np.nan)}
    scored = Scored(name, "test.jsonl", "VA", np.arange(len(ids)), {"": np.array(list(right.values()))}, told)
    write_predictions(path, {"data": {"test.jsonl": "0"}} | about, list(lines("labels", scored, ids)))
    return path


def test_comparison_by_hand(tmp_path, capsys):
    """A has 0 of ids 0 … 9 right, B the first 9; both have more clips that the other lacks."""
    a = write(tmp_path / "a", {str(i): 0.0 if i < 10 else 1.0 for i in range(13)})
    b = write(tmp_path / "b", {str(i): 1.0 if i < 9 else 0.0 for i in (*range(9, -1, -1), 20)})
    result = compare(a, b)
    value = result["metrics"]["labels/VA/kind/accuracy"]
    assert result["clips"] == {"labels/VA/kind": 10} and result["only"] == {"labels/VA/kind": [3, 1]}
    assert (value["ours"], value["theirs"], value["difference"]) == (0.0, 0.9, 0.9)
    assert 0.5 < value["low"] < 0.9 < value["high"] <= 1.0
    assert value["p"] == 2 / 2**9 == value["p_holm"] == value["q"]
    assert value["mcnemar"] == {"only_ours": 0, "only_theirs": 9, "p": pytest.approx(2 / 2**9)}
    text = capsys.readouterr().out
    assert "+90.0" in text and "10 clips in both; at most 3 only in" in text
    assert "null" in a.read_text() and "NaN" not in a.read_text()


def test_what_cannot_be_compared(tmp_path, capsys):
    right = {"1": 1.0, "2": 0.0}
    a = write(tmp_path / "a", right)
    cases = {
        "none of its predictions .labels/V/kind. are in .*a .labels/VA/kind.": write(
            tmp_path / "b", right, name="V/kind"
        ),
        "labels/VA/kind: clip '2' has label 4, but 1 in .*different tasks": write(tmp_path / "c", right, {"2": 4}),
        "no clip and metric is in both": write(tmp_path / "d", {"8": 1.0}),
        "no such file; write it with": tmp_path / "none",
        "holds no predictions.jsonl; write it with `vmm eval": tmp_path,
    }
    (tmp_path / "e").write_text("{}\n")
    (tmp_path / "f").write_text(json.dumps({"format": FORMAT}) + "\n")
    (tmp_path / "g").write_text(a.read_text() + '{"evaluator": "labels"}\n')
    (tmp_path / "h").write_text(a.read_text() + a.read_text().splitlines()[1] + "\n")
    (tmp_path / "i").write_text(a.read_text().replace('"accuracy": 1.0', '"accuracy": "yes"'))
    cases |= {
        "line 1: format is not": tmp_path / "e",
        "holds no predictions; evaluate a split that has clips": tmp_path / "f",
        "g, line 4: lacks 'name'": tmp_path / "g",
        "h, line 4: id '1' stands twice under": tmp_path / "h",
        "i: labels/VA/kind: clip '1': scores.accuracy must be a number, got 'yes'": tmp_path / "i",
    }
    for message, other in cases.items():
        with pytest.raises(UserError, match=message):
            compare(a, other)
    assert capsys.readouterr().out == ""
    compare(a, write(tmp_path / "j", right, data={"test.jsonl": "1"}))
    assert "manifests of different content" in capsys.readouterr().out


def test_many_metrics_are_corrected_together(tmp_path):
    """Three metrics of p 1/4 are nothing after Holm."""
    files = []
    for name, scores in (("a", 0.0), ("b", 1.0)):
        rows = []
        for metric in ("x", "y", "z"):
            scored = Scored(metric, "t", "V", np.arange(3), {"": np.full(3, scores)})
            rows += lines("labels", scored, ["1", "2", "3"])
        write_predictions(tmp_path / name, {}, rows)
        files.append(tmp_path / name)
    result = compare(*files)["metrics"]
    assert [value["p"] for value in result.values()] == [0.25] * 3
    assert [value["p_holm"] for value in result.values()] == [0.75] * 3
    assert [value["q"] for value in result.values()] == [0.25] * 3
