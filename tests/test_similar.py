"""Clips that are alike: the index of a real model, its graph beside the exact answer, and what a recommendation is worth."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from conftest import tiny_config

import vmm
from vmm.__main__ import main
from vmm.data.manifest import read_manifest
from vmm.errors import UserError
from vmm.evals.similar import Recommendation, discounted, relevance
from vmm.similar import Similar, ask, embed_clips, recall, write_index
from vmm.told import note_own
from vmm.train import train


@pytest.fixture(scope="module")
def run(world_folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("similar") / "run"
    config = tiny_config(world_folder, ("video", "audio", "text"), steps=2, save_every=2, log_every=1)
    config["optim"] |= {"warmup": 1}
    train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def index(run, world_folder):
    return write_index(str(run), f"{world_folder}/train.jsonl", run.parent / "index")


def test_vectors_are_those_of_the_model(run, index, world_folder):
    similar, model = Similar(index), vmm.load(str(run))
    row = read_manifest(f"{world_folder}/train.jsonl")[0]
    embedded = model.embed(video=row.path, audio=row.path)
    query = sum(value / np.linalg.norm(value) for value in embedded.values())
    assert similar.vectors[0] == pytest.approx(query[0] / np.linalg.norm(query[0]), abs=1e-5)
    assert np.linalg.norm(similar.vectors, axis=1) == pytest.approx(np.ones(len(similar.items)), rel=1e-5)
    assert similar.about["streams"] == ["video", "audio"] and similar.about["clips"] == len(similar.items)


def test_the_graph_finds_what_is_nearest(index):
    similar = Similar(index)
    assert recall(similar) > 0.95
    clip = similar.items[5]["id"]
    exact, near = similar.of_clip(clip, 5, exact=True), similar.of_clip(clip, 5)
    by_hand = np.argsort(-(similar.vectors @ similar.vectors[5]), kind="stable")
    assert exact.places[0].tolist() == [i for i in by_hand if i != 5][:5]
    assert 5 not in near.places[0] and near.likeness[0] == pytest.approx(exact.likeness[0], abs=0.05)


def test_the_same_clips_give_the_same_index(run, index, world_folder):
    again = write_index(str(run), f"{world_folder}/train.jsonl", run.parent / "again")
    for name in ("vectors.safetensors", "items.jsonl", "index.json", "graph.usearch"):
        assert (again / name).read_bytes() == (index / name).read_bytes()


def test_it_can_be_asked_by_clip_file_and_words(index, capsys):
    similar = Similar(index)
    own = similar.items[3]
    found = ask(index, file=own["path"], count=3)
    assert found.places[0, 0] == 3 and found.likeness[0, 0] == pytest.approx(1.0, abs=1e-4)
    assert ask(index, words="a red circle", count=2).places.shape == (1, 2)
    assert main(["similar", str(index), "--clip", own["id"], "--top", "2", "--exact"]) == 0
    assert "likeness" in capsys.readouterr().out


def test_captions_and_names_are_printed_as_text(index, tmp_path, capsys):
    """Neither markup of the table nor commands of the terminal."""
    shutil.copytree(index, tmp_path / "index")
    items = [json.loads(line) for line in (index / "items.jsonl").read_text().splitlines()]
    items = [item | {"caption": "[/red]\x1b[2J", "path": "[b]"} for item in items]
    (tmp_path / "index" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    ask(tmp_path / "index", clip=items[0]["id"], count=1)
    printed = capsys.readouterr().out
    assert "[/red]" in printed and "x1b" in printed and "\x1b[2J" not in printed and "[b]" in printed


def test_what_cannot_be_asked_is_one_line(run, index, world_folder, tmp_path, capsys):
    with pytest.raises(UserError, match="no clip 'train-00099'"):
        ask(index, clip="train-00099")
    with pytest.raises(UserError, match="give one of"):
        ask(index)
    with pytest.raises(UserError, match="not whole"):
        Similar(tmp_path)
    with pytest.raises(UserError, match="no stream 'smell'"):
        embed_clips(vmm.load(str(run)), f"{world_folder}/train.jsonl", ("smell",))
    for name in ("items.jsonl", "vectors.safetensors", "graph.usearch"):
        (tmp_path / name).write_bytes((index / name).read_bytes())
    (tmp_path / "index.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(UserError, match="format 9"):
        Similar(tmp_path)
    (tmp_path / "index.json").write_text("{")
    assert main(["similar", str(tmp_path), "--clip", "a"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_graph_that_somebody_else_wrote_is_never_read(index, tmp_path, monkeypatch):
    """usearch reads beyond the end of such files; the answers come from the vectors all the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # another user's: it has no note of the graph
    copy = tmp_path / "index"
    shutil.copytree(index, copy)
    (copy / "graph.usearch").write_bytes(b"x" * 300)
    monkeypatch.setattr("vmm.similar.Index.restore", lambda *_: pytest.fail("read a stranger's graph"))
    similar = Similar(copy)
    own = similar.items[5]["id"]
    assert similar.of_clip(own, 5).places.tolist() == similar.of_clip(own, 5, exact=True).places.tolist()


@pytest.mark.parametrize("climbs", [False, True])
def test_a_model_that_a_stranger_names_is_not_opened(run, index, tmp_path, monkeypatch, capsys, climbs):
    assert json.loads((index / "index.json").read_text())["model"] == "../run", "no path of this machine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "downloads" / "index"
    shutil.copytree(index, copy)
    about = json.loads((copy / "index.json").read_text()) | {
        "model": os.path.relpath(run, copy) if climbs else str(run)
    }
    (copy / "index.json").write_text(json.dumps(about))
    command = ["similar", str(copy), "--text", "a red circle", "--top", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("vmm.load", lambda *_: pytest.fail("opened what a stranger named"))
        assert main(command) == 2
        assert re.fullmatch(r"vmm: error: .* names .* give it as --model\n", capsys.readouterr().err)
    assert main([*command, "--model", str(run)]) == 0
    with monkeypatch.context() as patch:
        patch.chdir(run.parent)
        assert main(command) == 0, "below where vmm runs"
    note_own(copy / "graph.usearch")
    assert main(command) == 0, "this user's own"


def test_a_graph_that_this_user_wrote_is_read(index, monkeypatch):
    monkeypatch.setattr("vmm.similar._graph_of", lambda *_: pytest.fail("made the graph anew"))
    assert len(Similar(index).graph) == len(Similar(index).items)


# What a recommendation is worth.


def test_relevance_and_gain_by_hand():
    labels = {"a": np.array([0, 0, 1, -1]), "b": np.array([2, 3, 2, 2])}
    want = [[1, 0.5, 0.5, 1], [0.5, 1, 0, 0], [0.5, 0, 1, 1], [1, 0, 1, 1]]
    assert relevance(labels).tolist() == want
    assert discounted(np.array([[1.0, 0.0, 0.5]]))[0] == pytest.approx(1 + 0.5 / 2)


def rows_of(x, **labels) -> dict:
    told = {f"label/{name}": value for name, value in labels.items()}
    return {"contrast/video": x, "present/video": np.ones(len(x), bool), "row": np.arange(len(x)), **told}


def test_recommendation_of_truth_and_of_noise():
    rng = np.random.default_rng(0)
    kind = np.repeat(np.arange(8), 25)
    for x, want in ((np.eye(8)[kind] + 0.01 * rng.normal(size=(200, 8)), 1.0), (rng.normal(size=(200, 8)), None)):
        rows = rows_of(x, kind=kind)
        values = Recommendation("test", ("kind",), subsets=("V",), k=10)(lambda data, subset, rows=rows: rows)
        chance = values["chance/V"]
        assert chance == pytest.approx(24 / 199)
        assert values["V/precision@10"] == pytest.approx(want or chance, abs=0.03)
        assert values["V/nDCG@10"] == pytest.approx(want or chance, abs=0.03)


def test_recommendation_by_hand():
    x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.7]])
    rows = rows_of(x, kind=np.array([0, 1, 0, 0]))
    values = Recommendation("test", ("kind",), subsets=("V",), k=2)(lambda data, subset: rows)
    # Nearest two: of 0: 1, 3; of 1: 0, 3; of 2: 3, 1; of 3: 1, 0 or 2 (0.7 both; the nearest of 3 by cosine is 1).
    assert values["V/precision@2"] == pytest.approx(np.mean([0.5, 0.0, 0.5, 0.5]))
    second, ideal = 1 / np.log2(3), 1 + 1 / np.log2(3)
    assert values["V/nDCG@2"] == pytest.approx(np.mean([second / ideal, 0.0, 1 / ideal, second / ideal]))
    with pytest.raises(UserError, match="4 clips with the streams V; k 4"):
        Recommendation("test", ("kind",), subsets=("V",), k=4)(lambda data, subset: rows)
