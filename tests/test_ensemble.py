"""An ensemble is the mean of what its members say: probabilities of classes, dot products of embeddings, numbers."""

import contextlib
import json

import numpy as np
import pytest
from conftest import small_config
from test_average import slim, write_run

from vmm.__main__ import main
from vmm.ensemble import Ensemble, blend, ensemble
from vmm.errors import UserError
from vmm.evaluate import Predict
from vmm.experiment import Experiment
from vmm.run import open_run, weights


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def experiment(world_folder):
    """Of a config with labels, tags and a contrast; nothing is computed with it."""
    config = small_config(world_folder)
    config["data"]["labels"], config["data"]["tags"] = dict(shape=6), dict(things=4)
    config["objectives"] |= dict(labels=dict(kind="classify", labels=dict(shape=6, things=4)))
    return Experiment(config)


def test_means_against_numpy(experiment):
    rng = np.random.default_rng(0)
    row, present = np.arange(5), rng.random(5) > 0.3

    def says():
        told = {"row": row, "present/video": present, "label/shape": row % 6}
        logits = {name: 4 * rng.normal(size=(5, n)).astype(np.float32) for name, n in (("shape", 6), ("things", 4))}
        vectors = rng.normal(size=(2, 5, 8)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        told |= {f"labels/{name}": value for name, value in logits.items()}
        told |= {"contrast/video": vectors[0], "contrast/text": vectors[1], "fused/video": vectors[0]}
        return told | {"masked/video": rng.normal(size=(5, 3)).astype(np.float32)}

    found = [says() for _ in range(3)]
    mean = blend(found, experiment)
    wanted = np.mean([softmax(one["labels/shape"]) for one in found], 0)
    np.testing.assert_allclose(softmax(mean["labels/shape"]), wanted, rtol=1e-5, atol=1e-7)
    assert np.abs(wanted - softmax(np.mean([one["labels/shape"] for one in found], 0))).max() > 0.05  # not of logits
    tags = np.mean([1 / (1 + np.exp(-one["labels/things"].astype(np.float64))) for one in found], 0)
    np.testing.assert_allclose(1 / (1 + np.exp(-mean["labels/things"].astype(np.float64))), tags, rtol=1e-5)
    dots = np.mean([one["contrast/video"] @ one["contrast/text"].T for one in found], 0)
    np.testing.assert_allclose(mean["contrast/video"] @ mean["contrast/text"].T, dots, rtol=1e-4, atol=1e-6)
    assert mean["fused/video"].shape == (5, 24)
    np.testing.assert_allclose(
        mean["masked/video"], np.mean([one["masked/video"] for one in found], 0), rtol=1e-5, atol=1e-6
    )
    assert all(mean[key] is found[0][key] for key in ("row", "present/video", "label/shape"))
    assert {mean[key].dtype for key in mean if key.startswith(("labels", "contrast"))} == {np.dtype(np.float32)}


def test_one_model_that_is_sure_has_one_vote(experiment):
    """Two models lean to class 1, one is certain of class 0: the mean of logits would follow it, the vote does not."""
    sure, other = np.array([[50.0, 0, 0, 0, 0, 0]], np.float32), np.array([[0, 3.0, 0, 0, 0, 0]], np.float32)
    mean = blend([{"labels/shape": x} for x in (sure, other, other)], experiment)["labels/shape"]
    assert mean.argmax() == 1
    p = np.exp(3) / (np.exp(3) + 5)
    np.testing.assert_allclose(softmax(mean)[0, :2], [(1 + 2 * (1 - p) / 5) / 3, 2 * p / 3], rtol=1e-5)
    far = np.array([[1000.0, -1000.0, 0, 0]], np.float32)
    tags = blend([{"labels/things": x} for x in (far, far)], experiment)["labels/things"]
    np.testing.assert_allclose(tags, far, rtol=1e-6)  # no overflow


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"row": np.arange(3), "labels/shape": np.zeros((2, 6))}, "were shown other clips .row differs"),
        ({"row": np.arange(2)}, "not every model predicts 'labels/shape'"),
        ({"row": np.arange(2), "labels/shape": np.zeros((2, 5))}, "in shapes"),
    ],
)
def test_what_does_not_belong_together_is_one_line(experiment, other, message):
    with pytest.raises(UserError, match=message):
        blend([{"row": np.arange(2), "labels/shape": np.zeros((2, 6))}, other], experiment)


def test_runs_together(world_folder, tmp_path, capsys, monkeypatch):
    """Of runs: a model with itself scores as alone; two models give the mean of their probabilities, by hand."""
    for name, seed in (("a", 1), ("b", 2)):
        write_run(tmp_path / name, slim(world_folder), (4,), seed)
    runs = [open_run(tmp_path / name) for name in "ab"]
    members = [Predict(run.experiment, weights(run.state), run.mesh) for run in runs]
    data = runs[0].experiment.evals["labels"].data
    alone = [member(data, "V")["labels/shape"] for member in members]
    assert np.abs(alone[0] - alone[1]).max() > 0.1
    both = Ensemble(members)
    np.testing.assert_allclose(
        softmax(both(data, "V")["labels/shape"]), (softmax(alone[0]) + softmax(alone[1])) / 2, rtol=1e-5, atol=1e-7
    )
    assert both(data, "A") is None and not both.knows("VA") and both.knows("V")
    same = Ensemble([members[0], members[0]])(data, "V")["labels/shape"]
    np.testing.assert_allclose(softmax(same), softmax(alone[0]), rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match="what 'generate' writes has no mean"):
        both.ask(data, "V", "generate")

    doing = []

    @contextlib.contextmanager
    def progress(words):
        yield lambda *told: doing.append(told)

    monkeypatch.setattr("vmm.ensemble.progress", progress)
    monkeypatch.setattr("vmm.data.account.Account.lines", lambda self, of="": [f"{of}1 ends early"])
    said, out = str(tmp_path / "said.jsonl"), tmp_path / "a" / "ensembles.jsonl"
    words = ["ensemble", str(tmp_path / "a"), str(tmp_path / "b"), "--predictions", said]
    assert main(words) == 0
    record = json.loads(out.read_text())
    rows = members[0](data, "V")
    hits = both(data, "V")["labels/shape"].argmax(1) == rows["label/shape"]
    np.testing.assert_allclose(record["values"]["labels/V/shape"], hits.mean())
    low, high = record["intervals"]["labels/V/shape"]
    assert low <= hits.mean() <= high and [one["step"] for one in record["members"]] == [4, 4]
    assert len(open(said).read().splitlines()) == 1 + len(hits)
    printed = capsys.readouterr().out
    assert "labels" in printed and printed.count(f"{data}: 1 ends early\n") == 1, "of one file, whoever read it"
    count = len(rows["row"])
    assert {told for told in doing if told[0] == count} == {
        (count, count, f"model {number} of 2: reading {data}") for number in (1, 2)
    }
    assert main(["ensemble", str(tmp_path / "a")]) == 2
    assert main([*words[:3], "--evals", "label"]) == 2
    assert "has no evaluator 'label'; did you mean 'labels'" in capsys.readouterr().err
    with pytest.raises(UserError, match="at least two"):
        ensemble([tmp_path / "a"])
