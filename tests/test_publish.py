"""A published folder is whole, tells only what the run's records tell, and loads in three lines."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, small_config
from huggingface_hub import ModelCard

import vmm
from vmm.errors import UserError
from vmm.evaluate import Predict, evaluate
from vmm.publish import FILES, publish
from vmm.report import report
from vmm.run import open_run, weights
from vmm.train import train
from vmm.training.metrics import read_rows


@pytest.fixture(scope="module")
def run(world_folder, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "small"
    config = small_config(world_folder, steps=4, save_every=2, log_every=1)
    config["optim"] |= {"warmup": 1}
    config["evals"] |= {
        "probe": dict(
            kind="probe", train=f"{world_folder}/train.jsonl", data=f"{world_folder}/test.jsonl", subsets=("V", "VAT")
        )
    }
    train(config, workdir)
    evaluate(workdir)
    return workdir


@pytest.fixture(scope="module")
def folder(run) -> Path:
    return publish(run, run.parent / "published")


def test_layout_and_card(run, folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "vmm"
    record = read_rows(run / "evals.jsonl")[-1]
    text = card.text
    assert f"{100 * record['values']['retrieval/V→T/R@5']:.1f} %" in text
    import hashlib

    config = json.loads((run / "config.json").read_text())
    assert hashlib.sha256(Path(config["data"]["train"]).read_bytes()).hexdigest() in text
    assert record["config"] in text and "4 of 4 × 16 clips" in text
    assert f"{read_rows(run / 'metrics.jsonl')[-1]['loss']:.4f} at step 4" in text


def test_embeddings_are_those_of_the_run(run, folder, world_folder):
    opened = open_run(run)
    rows = Predict(opened.experiment, weights(opened.state), opened.mesh)(f"{world_folder}/test.jsonl", "VAT")
    lines = [json.loads(line) for line in (world_folder / "test.jsonl").read_text().splitlines()]
    whole = [i for i, line in enumerate(lines) if line["caption"] and "pitch" in line["labels"]][:3]
    paths = [str(world_folder / lines[i]["path"]) for i in whole]
    model = vmm.load(str(folder))
    got = model.embed(video=paths, audio=paths, text=[lines[i]["caption"][0] for i in whole])
    for name in ("video", "audio", "text"):
        assert got[name].shape == (3, 32)
        np.testing.assert_allclose(np.linalg.norm(got[name], axis=1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(got[name], rows[f"contrast/{name}"][whole], rtol=1e-4, atol=1e-5)


def test_embeds_paths_arrays_and_single_things(folder, world_folder):
    model = vmm.load(folder)
    path = next((world_folder / "test").glob("*.mp4"))
    one = model.embed(video=path)["video"]
    assert one.shape == (1, 32)
    clip = model.experiment.clip
    array = np.zeros((clip.frames, clip.size, clip.size, 3), np.uint8)
    assert model.embed(video=array)["video"].shape == (1, 32)
    assert model.embed(video=[array] * 3)["video"].shape == (3, 32)
    assert model.embed(video=np.stack([array] * 3))["video"].shape == (3, 32)
    assert model.embed(audio=np.zeros(100, np.float32))["audio"].shape == (1, 32)
    texts = model.embed(text=["a red circle moves left"] * 70)["text"]
    assert texts.shape == (70, 32)
    np.testing.assert_allclose(texts[0], texts[69], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(video="nowhere.mp4"), "nowhere.mp4: cannot be decoded .missing"),
        (dict(text=""), "not empty"),
        (dict(video=np.zeros((2, 2, 2, 3), np.uint8)), "must be uint8"),
        (dict(audio=np.zeros((3, 3, 3))), "must be float"),
        (dict(), "the model takes"),
        (dict(text=["a", "b"], audio=[np.zeros(5, np.float32)]), "of one length"),
    ],
)
def test_bad_input_to_embed(folder, given, message):
    with pytest.raises(UserError, match=message):
        vmm.load(folder).embed(**given)


def test_loads_in_a_clean_process_without_jax_at_import(folder, world_folder):
    path = next((world_folder / "test").glob("*.mp4"))
    code = (
        "import sys, vmm\nassert 'jax' not in sys.modules\n"
        f"model = vmm.load({str(folder)!r})\n"
        f"print(model.embed(video={str(path)!r}, text='a red circle moves left')['video'].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "(1, 32)", done.stderr


def test_broken_folders(folder, tmp_path):
    import shutil

    with pytest.raises(UserError, match="neither a folder nor a model"):
        vmm.load(str(tmp_path / "nothing here"))
    with pytest.raises(UserError, match="holds no model published"):
        vmm.load(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        vmm.load(copy)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["trunk"]["encoders"]["video"]["width"] = 64
    (copy / "config.json").write_text(json.dumps(config))
    shutil.copyfile(folder / "model.safetensors", copy / "model.safetensors")
    with pytest.raises(UserError, match="tensors do not fit the config, the first"):
        vmm.load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        vmm.load(copy)


def test_publishing_again_replaces_only_its_own_files(run, folder):
    (folder / "notes.txt").write_text("mine")
    publish(run, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert not folder.with_name("published.part").exists()


def test_evaluating_again_is_free_and_the_same(run, capsys):
    rows = read_rows(run / "evals.jsonl")
    record = evaluate(run)
    assert read_rows(run / "evals.jsonl") == rows
    assert record == rows[-1]
    assert "retrieval" in capsys.readouterr().out


def test_report_is_self_contained(run, tmp_path, capsys):
    table = [{"variant": "late", "both": "50.0"}, {"variant": "joint", "both": "99.0"}]
    (tmp_path / "table.json").write_text(json.dumps(table))
    page = report(run, tmp_path / "report.html", [tmp_path]).read_text()
    for heading in (
        "Loss",
        "Retrieval against chance",
        "Similarity",
        "nearest captions",
        "Masked reconstruction",
        "Ablation",
    ):
        assert heading in page
    assert "<script" not in page
    links = [part.split('"')[0] for part in page.split('src="')[1:] + page.split('href="')[1:]]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "V→T R@1" in capsys.readouterr().out


def test_report_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no config.json"):
        report(tmp_path)
