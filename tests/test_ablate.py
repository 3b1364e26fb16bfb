"""The fusion study: equal depth, resumable, and the exclusive-or that only real fusion can solve."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from vmm import ablate as module
from vmm.ablate import ablate, costs, interval, load_study, markdown
from vmm.build import load_config, save_config
from vmm.data import world
from vmm.errors import UserError
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


def tiny_study(folder: Path, world_folder: Path) -> Path:
    study = folder / "9999-tiny"
    study.mkdir()
    config = fusion_config(world_folder, "late", 2)
    config |= {"log_every": 1, "batch": 8}
    config["optim"] |= {"warmup": 1}
    (study / "config.py").write_text(f"def get_config(variant=''):\n    return {config!r}\n")
    (study / "study.py").write_text(
        f"def get_study(quick):\n    return dict(config={str(study / 'config.py')!r}, seeds=(0, 1), score='labels/VA/both', scores=('labels/VA/video',),\n"
        "        chance={'labels/VA/both': 0.5}, variants={'late': ('trunk.fusion.kind=late',), 'joint': ('trunk.fusion.kind=joint',)})\n"
    )
    return study


def test_study_resumes_where_it_stopped(fusion_world, tmp_path, monkeypatch, capsys):
    study, out = tiny_study(tmp_path, fusion_world), tmp_path / "out"
    real, calls = module.train, []

    def broken(config, workdir):
        calls.append(workdir)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(config, workdir)

    monkeypatch.setattr(module, "train", broken)
    with pytest.raises(KeyboardInterrupt):
        ablate(study, out=out)
    assert len(read_rows(out / "results.jsonl")) == 2
    rows = ablate(study, out=out)
    assert len(calls) == 5, "two were done, the third began again, the fourth is new"
    assert [(row["variant"], row["seed"]) for row in rows] == [("late", 0), ("late", 1), ("joint", 0), ("joint", 1)]
    assert ablate(study, out=out) == rows and len(calls) == 5
    table = json.loads((out / "table.json").read_text())
    assert [line["variant"] for line in table] == ["late", "joint", "chance"]
    assert set(table[0]) == {"variant", "parameters", "forward MFLOPs", "peak MB", "step ms", "both", "video"}
    assert "±" in table[0]["both"] and "| joint |" in (out / "table.md").read_text()
    assert "joint" in capsys.readouterr().out


def test_costs_follow_the_mechanism(fusion_world):
    found = {kind: costs(fusion_config(fusion_world, kind, 100)) for kind in ("late", "joint", "cross", "bottleneck")}
    assert found["joint"]["parameters"] < found["late"]["parameters"], "joint shares its blocks"
    assert found["late"]["flops"] < found["bottleneck"]["flops"] < found["cross"]["flops"]
    assert all(row["peak_bytes"] > 1e6 for row in found.values())


def test_interval_by_hand():
    mean, half = interval([0.9, 1.0, 0.8])
    assert mean == pytest.approx(0.9)
    assert half == pytest.approx(4.302653 * 0.1 / np.sqrt(3), rel=1e-5)
    assert np.isnan(interval([0.5])[1])


def test_markdown():
    assert markdown([{"variant": "a", "both": "1.0"}]) == "| variant | both |\n|---|---:|\n| a | 1.0 |"


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
