"""A published folder is whole, tells only what the run's records tell, and loads in three lines."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tiny_config
from huggingface_hub import ModelCard

import vmm
import vmm.report as drawing
from vmm.__main__ import main
from vmm.config import Card
from vmm.errors import UserError
from vmm.evals import EVALS
from vmm.evaluate import Predict, evaluate
from vmm.experiment import Experiment
from vmm.publish import FILES, publish
from vmm.publishing import check as checking
from vmm.publishing.card import model_card, public
from vmm.publishing.check import check
from vmm.publishing.cost import describe, watts_of
from vmm.publishing.example import asked_of
from vmm.publishing.results import dataset_name, metric_type
from vmm.report import report
from vmm.run import open_run, weights
from vmm.train import train
from vmm.training.metrics import read_rows


@pytest.fixture(scope="module")
def run(world_folder, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "small"
    config = tiny_config(world_folder, ("video", "audio", "text"), mixes=True, steps=4, save_every=2, log_every=1)
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
    config = json.loads((run / "config.json").read_text())
    assert hashlib.sha256(Path(config["data"]["train"]).read_bytes()).hexdigest() in text
    assert record["config"] in text and "4 of 4 × 16 clips" in text
    assert f"{read_rows(run / 'metrics.jsonl')[-1]['loss']:.4f} at step 4" in text


def test_every_number_is_in_the_hubs_metadata(run, folder):
    record, found = read_rows(run / "evals.jsonl")[-1], ModelCard.load(folder / "README.md").data.eval_results
    numbers = {key for key, ends in record["intervals"].items() if not any(np.isnan(ends))}
    assert len(numbers) > 20 and {result.metric_name for result in found} >= numbers
    for result in found:
        name, where = result.metric_name, result.metric_name.partition("/")[0]
        assert result.metric_value == record["values"][name]
        assert result.metric_args == {"interval": record["intervals"][name], "level": 0.95}
        spec = json.loads((run / "config.json").read_text())["evals"][where]
        assert result.dataset_revision == hashlib.sha256(Path(spec["data"]).read_bytes()).hexdigest()
        assert result.dataset_name.endswith("/test") and result.metric_config == where
    types = {result.metric_name: (result.task_type, result.metric_type) for result in found}
    assert types["retrieval/V→T/R@5"] == ("feature-extraction", "R@5")
    assert types["probe/V/shape"] == ("video-classification", "accuracy")


def test_names_of_metrics_and_datasets():
    assert metric_type(EVALS["classification"], "VA/shape/macro_f1") == "macro_f1"
    assert (
        metric_type(EVALS["classification"], "VA/shape") == "accuracy"
        and metric_type(EVALS["identity"], "V/rank1") == "rank1"
    )
    assert dataset_name("data/world/test.jsonl") == "world/test" and dataset_name("test.jsonl") == "test"
    assert dataset_name("") == "unknown"


def test_card_tells_all_that_is_known_and_that_the_rest_is_not(run, tmp_path):
    opened = open_run(run)
    plain = model_card(opened)
    assert plain.data.license == "unknown" and plain.data.get("base_model") is None
    text = plain.text
    assert "Unknown: who published it did not say." in text and "Licence of the data: unknown." in text
    assert "8 × cpu" in text and "energy|unknown: the power of 'cpu' is not known here" in text
    flops = read_rows(run / "goodput.jsonl")[-1]["flops"]
    assert f"{4 * flops:.3g} FLOPs: {flops:.3g} a step in matrix products × 4 steps" in text
    assert "|48|" in text, "the number of training clips"
    low, high = read_rows(run / "evals.jsonl")[-1]["intervals"]["retrieval/V→T/R@5"]
    assert f"({100 * low:.1f}–{100 * high:.1f})" in text

    record = read_rows(run / "evals.jsonl")[-1]
    noisy = {"retrieval/V→T/R@1": record["values"]["retrieval/V→T/R@1"] / 2 + 0.01, "retrieval/V→A/R@1": 0.0}
    record["values"]["retrieval/V→A/R@1"] = 0.0
    ends = {key: [0.01, 0.5] for key in noisy}
    record["suites"] = {"robustness": {f"blur/{k}": {"values": noisy, "intervals": ends} for k in (1, 2)}}
    values = dict(accuracy=0.5, confidence=0.75, error=0.25, brier=0.6, log_loss=0.9)
    told = {"values": values, "intervals": {key: [0.1, 0.9] for key in values}}
    record["suites"]["calibration"] = {"labels/V/shape": told}
    for name in ("metrics.jsonl", "config.json"):
        shutil.copyfile(run / name, tmp_path / name)
    (tmp_path / "evals.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "average.json").write_text(json.dumps({"members": [{"run": "/users/someone/runs/a", "step": 3}]}))
    opened.experiment.card = Card(
        licence="lab-2", data_licence="cc-by-4.0", intended_use="counting circles", limits="no squares",
        out_of_scope="faces", base_model="owner/base",
    )  # fmt: skip
    card = model_card(opened._replace(workdir=tmp_path), adapters=True)
    assert (card.data.license, card.data.license_name) == ("other", "lab-2")
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/base", "adapter")
    for words in ("counting circles", "faces", "no squares", "Licence of the data: cc-by-4.0.", 'base="owner/base"'):
        assert words in card.text
    assert "unknown: the run kept no ledger" in card.text
    assert "mean of 1: runs/a at step 3" in card.text and "someone" not in card.text
    line = f"|retrieval/V→T/R@1|blur|{100 * record['values']['retrieval/V→T/R@1']:.1f} %|"
    assert line + "|".join([f"{100 * noisy['retrieval/V→T/R@1']:.1f} % (1.0–50.0)"] * 2) in card.text
    assert "|retrieval/V→A/R@1|blur" not in card.text, "a number that the noise leaves alone"
    assert "|labels/V/shape|50.0 % (10.0–90.0)|75.0 % (10.0–90.0)|25.0 % (10.0–90.0)|0.600 (0.100–0.900)|" in card.text


def test_words_of_a_card_are_checked(run):
    config = json.loads((run / "config.json").read_text())
    with pytest.raises(UserError, match="card.license: no such key; did you mean 'licence'"):
        Experiment(config | dict(card=dict(license="mit")))


def test_energy_is_devices_times_power_times_time():
    def row(began, at, step, **seconds):
        about = dict(device="NVIDIA H100 80GB HBM3", devices=8, flops=1e15)
        return dict(attempt=1, began=began, at=at, step=step, seconds=seconds) | about

    told = dict(describe([row(0, 3600, 50, steps=3000.0, start=600.0), row(5400, 9000, 100, steps=3600.0)]))
    assert told["energy"].startswith("about 11.2 kWh, an estimate")  # 8 × 700 W × 2 h; half an hour down is not counted
    assert told["time"] == "2.5 h in 2 starts, 73% of it in steps that counted"  # 6600 of 9000 s
    assert told["devices"] == "8 × NVIDIA H100 80GB HBM3" and told["arithmetic"].startswith("1e+17 FLOPs")
    assert watts_of("NVIDIA H200 NVL") == 600.0 and watts_of("NVIDIA H200") == 700.0 and watts_of("TPU v5 lite") is None
    old = [dict(attempt=1, began=0, at=60, step=5, seconds=dict(steps=60.0))]
    assert dict(describe(old))["energy"] == "unknown: the run did not record its devices"


# ---- vmm publish --check --------------------------------------------------------------------------


def test_a_published_folder_passes_its_check(folder, capsys):
    assert main(["publish", "--check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "checked; its example gives what it gave" in out and "video" in out and "text" in out


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the lowest bit of the last tensor's last number
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors: changed since it was published .SHA-256"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "example.safetensors").unlink(), "holds no example.safetensors"),
        (lambda folder: flip(folder / "example.mp4"), "example.mp4: changed"),
        (lambda folder: (folder / "README.md").unlink(), "README.md is missing"),
        (lambda folder: (folder / "README.md").write_text("# Nothing"), "has no example"),
        (
            lambda folder: (folder / "README.md").write_text("```python\nopen('ran', 'w')\n```\n"),
            "example is not the one that `vmm publish` writes",
        ),
    ],
    ids=("weight", "tokenizer", "record", "clip", "card", "no example", "other code"),
)  # fmt: skip
def test_what_was_harmed_is_one_line(folder, tmp_path, harm, message, capsys):
    shutil.copytree(folder, tmp_path / "copy")
    harm(tmp_path / "copy")
    with pytest.raises(UserError, match=message) as error:
        check(tmp_path / "copy")
    assert "\n" not in str(error.value)
    assert main(["publish", "--check", str(tmp_path / "copy")]) == 2
    assert capsys.readouterr().err.startswith("vmm: error: ")


def test_other_outputs_are_told(folder, monkeypatch):
    recorded = checking.read_record(folder)[0]

    def say(factor):
        monkeypatch.setattr(checking, "embed_as", lambda *_: {k: factor * v for k, v in recorded.items()})
        return check(folder)

    assert max(say(1.0005).values()) == pytest.approx(5e-4, rel=1e-3)
    with pytest.raises(
        UserError, match="gives another .* embedding .* by 0.002 of the largest value, allowed are 0.001"
    ):
        say(1.002)
    with pytest.raises(UserError, match="gives another .* embedding"):
        say(np.nan)
    monkeypatch.setattr(checking, "embed_as", lambda *_: {"video": recorded["video"]})
    with pytest.raises(UserError, match=r"gives \['video'\], at publishing it gave"):
        check(folder)


@pytest.mark.parametrize(
    ("path", "told"),
    [("/srv/someone/data/train.jsonl", "data/train.jsonl"), ("data/a.jsonl", "data/a.jsonl"), ("gs://b/c", "gs://b/c")],
)
def test_a_card_names_no_folder_of_a_user(path, told):
    assert public(path) == told


SAID = 'import vmm\n\nmodel = vmm.load(".")\nembeddings = model.embed(text="a", video="example.mp4")\n'


@pytest.mark.parametrize(
    "change",
    [
        ('text="a"', "text=open('/etc/passwd').read()"),
        ('"example.mp4"', "__import__('os').system('true')"),
        ("embeddings =", "import os\nembeddings ="),
        ("vmm.load", "vmm.publish"),
        ("import vmm", "import os as vmm"),
        ('load(".")', 'load("/elsewhere")'),
        ('"example.mp4"', '"/etc/passwd"'),
        ('text="a"', "**{'text': 'a'}"),
        ("model = ", "model = yield "),
    ],
)
def test_a_card_is_data(change, tmp_path):
    """An example is read, not run: the three lines that are published, and nothing else in them."""
    card = tmp_path / "README.md"
    assert asked_of(f"# A\n```python\n{SAID}```\n", None, card) == (None, {"text": "a", "video": "example.mp4"})
    assert change[0] in SAID
    with pytest.raises(UserError, match="is not the one that `vmm publish` writes|is not the folder's own"):
        asked_of(f"# A\n```python\n{SAID.replace(*change)}```\n", None, card)


def test_a_base_of_a_card_is_replaced():
    said = SAID.replace('"."', '".", base="path/of/its/base"')
    assert asked_of(f"```python\n{said}```\n", None, "card").base == "path/of/its/base"
    assert asked_of(f"```python\n{said}```\n", {"video": "x"}, "card").base == {"video": "x"}
    with pytest.raises(UserError, match="names no base"):
        asked_of(f"```python\n{SAID}```\n", "x", "card")


def test_the_check_is_alone(tmp_path, monkeypatch):
    """Nothing of the caller's Python, nor of where it is run, is in reach."""
    (tmp_path / "numpy.py").write_text("open('ran', 'w')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="its example fails"):
        checking.embed_as(tmp_path, asked_of(f"```python\n{SAID}```\n", None, "card"))
    assert not (tmp_path / "ran").exists()


def test_a_folder_to_write_is_needed(run, capsys):
    assert main(["publish", str(run)]) == 2
    assert "give the folder to write" in capsys.readouterr().err


def test_embeddings_are_those_of_the_run(run, folder, world_folder):
    opened = open_run(run)
    rows = Predict(opened.experiment, weights(opened.state), opened.mesh)(f"{world_folder}/test.jsonl", "VAT")
    lines = [json.loads(line) for line in (world_folder / "test.jsonl").read_text().splitlines()]
    whole = [i for i, line in enumerate(lines) if line["caption"] and "pitch" in line["labels"]][:3]
    paths = [str(world_folder / lines[i]["path"]) for i in whole]
    model = vmm.load(str(folder))
    got = model.embed(video=paths, audio=paths, text=[lines[i]["caption"][0] for i in whole])
    for name in ("video", "audio", "text"):
        assert got[name].shape == (3, 16)
        np.testing.assert_allclose(np.linalg.norm(got[name], axis=1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(got[name], rows[f"contrast/{name}"][whole], rtol=1e-4, atol=1e-5)


def test_embeds_paths_arrays_and_single_things(folder, world_folder):
    model = vmm.load(folder)
    path = next((world_folder / "test").glob("*.mp4"))
    one = model.embed(video=path)["video"]
    assert one.shape == (1, 16)
    clip = model.experiment.clip
    array = np.zeros((clip.frames, clip.size, clip.size, 3), np.uint8)
    assert model.embed(video=array)["video"].shape == (1, 16)
    assert model.embed(video=[array] * 3)["video"].shape == (3, 16)
    assert model.embed(video=np.stack([array] * 3))["video"].shape == (3, 16)
    assert model.embed(audio=np.zeros(100, np.float32))["audio"].shape == (1, 16)
    left, right = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 100))
    mean = model.embed(audio=(left + right) / 2)["audio"]
    for stereo in (np.stack([left, right], 1), [np.stack([left, right])]):
        np.testing.assert_allclose(model.embed(audio=stereo)["audio"], mean, rtol=1e-5)
    assert model.embed(audio=list(np.stack([left, right])))["audio"].shape == (2, 16)
    texts = model.embed(text=["a red circle moves left"] * 70)["text"]
    assert texts.shape == (70, 16)
    np.testing.assert_allclose(texts[0], texts[69], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(video="nowhere.mp4"), "nowhere.mp4: cannot be decoded .missing"),
        (dict(text=""), "not empty"),
        (dict(video=np.zeros((2, 2, 2, 3), np.uint8)), "must be uint8"),
        (dict(audio=np.zeros((3, 3, 3))), "must be float"),
        (dict(audio=np.zeros(0)), "must be float"),
        (dict(audio=np.full(50, np.nan)), "not finite"),
        (dict(audio=np.full(50, 12000.0)), "values up to 12000; divide"),
        (dict(audio=np.zeros((2, 50))), r"\[2, 50\] may be 2 clips or 2 channels"),
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
    assert done.stdout.strip() == "(1, 16)", done.stderr


def test_broken_folders(folder, tmp_path):
    for name in (str(tmp_path / "nothing here"), "tests/nowhere", "./nowhere", "README.md"):  # the Hub is not asked
        with pytest.raises(UserError, match="no such folder; give"):
            vmm.load(name)
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


def test_names_of_the_hub_have_an_owner_or_none(folder, monkeypatch, capsys):
    """Nothing is fetched here: the Hub has one repository, of one word."""
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        if name != "gpt2":
            raise OSError("404: no such repository")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert vmm.load("gpt2").params and vmm.load("gpt2@v1").params
    for name in ("published-demo", "owner/gpt2"):
        with pytest.raises(UserError, match=f"^{name}: neither a folder in .* nor a model .* from the Hub .404"):
            vmm.load(name)
    assert asked == [("gpt2", None), ("gpt2", "v1"), ("published-demo", None), ("owner/gpt2", None)]
    assert capsys.readouterr().err.count("no such folder; asking the Hub\n") == 4


def test_publishing_again_replaces_only_its_own_files(run, folder):
    (folder / "notes.txt").write_text("mine")
    publish(run, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert not folder.with_name("published.part").exists()


def test_publishing_into_the_folder_where_one_is(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(run, ".")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_a_tokenizer_that_is_elsewhere_is_one_line(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["tokenizer"] = "data/world/tokenizer.json"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="tokenizer data/world/tokenizer.json is not there: relative paths.*run this there"
    ):
        publish(tmp_path / "run", tmp_path / "published")


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


def test_captions_in_a_report_are_text(run, tmp_path, monkeypatch):
    evil = "<script>alert(1)</script>"
    rows = drawing.read_manifest
    monkeypatch.setattr(drawing, "read_manifest", lambda *told: [r._replace(captions=(evil,)) for r in rows(*told)])
    monkeypatch.setattr(drawing, "decode_ids", lambda *_: evil)
    page = report(run, tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 12


def test_report_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no config.json"):
        report(tmp_path)
