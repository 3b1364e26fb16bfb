"""`vmm bench step` measures the step that is trained: counts, rates that agree with each other, a trace, real input."""

import json

import jax
import pytest
from conftest import ROOT

from vmm.__main__ import main
from vmm.build import load_config, save_config
from vmm.training.metrics import count_flops


def test_bench_step(tmp_path, capsys, world_folder):
    config = load_config(f"{ROOT}/configs/pretrain_videomae.py:small")
    config["data"] |= {
        "train": f"{world_folder}/train.jsonl",
        "tokenizer": f"{world_folder}/tokenizer.json",
        "workers": 0,
    }
    save_config(config, tmp_path / "config.json")
    file = tmp_path / "numbers.json"
    words = [str(tmp_path / "config.json"), "batch=8", "--steps", "3", "--json", str(file)]
    assert main(["bench", "step", *words, "--trace", str(tmp_path / "trace")]) == 0
    drawn, trace = json.loads(file.read_text())[0], list(tmp_path.rglob("*.trace.json.gz"))
    assert len(trace) == 1 and "open it with" in capsys.readouterr().out
    assert main(["bench", "step", *words, "--input"]) == 0
    fed = json.loads(file.read_text())[0]
    assert drawn["input_wait"] is None and 0 < fed["input_wait"] < 1
    for row in (drawn, fed):
        assert row["batch"] == 8 and row["devices"] == 8
        assert row["clips_per_second"] == pytest.approx(8 / row["seconds_a_step"])
        assert row["tflops_per_second"] * 1e3 == pytest.approx(row["gflops_a_clip"] * row["clips_per_second"])
        assert row["memory_planned"] > 4 * 4 * row["parameters"] / 8 and row["loss"] > 0


def test_flops_are_those_of_the_closed_form():
    """202.3 GFLOPs a clip to train VideoMAE-B at 16 × 224², 90 % hidden, by hand; here from the traced step."""
    from vmm.bench.wait import clip_flops
    from vmm.experiment import Experiment

    config = load_config(f"{ROOT}/configs/pretrain_videomae.py:B", ["batch=8"])
    for part in (config["trunk"]["encoders"]["video"], config["objectives"]["pixels"]):
        part["remat"] = False
    experiment = Experiment(config)
    program = experiment.program(None)
    # On one CPU device attention computes its logits twice, and they would count so.
    with jax.set_mesh(experiment.make_mesh()):
        counted = count_flops(program.step, program.shapes, experiment.batch_shapes()) / 8
    assert counted == pytest.approx(clip_flops("videomae_b"), rel=0.005)
    assert counted == pytest.approx(202.3e9, rel=0.005)


def test_bad_words(capsys):
    assert main(["bench", "step", "configs/no_such.py"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "step", f"{ROOT}/configs/demo.py:small", "--steps", "0"])
