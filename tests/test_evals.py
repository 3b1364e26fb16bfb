"""Evaluators against hand-made truth: perfect, chance, ties, gaps; exact for any size, batch and shard count."""

import jax
import numpy as np
import pytest
from conftest import small_config

from vmm.build import load_config
from vmm.evals.classification import Classification, accuracy
from vmm.evals.probe import Probe
from vmm.evals.retrieval import Retrieval, ranks, recall, table
from vmm.evaluate import Predict, grid
from vmm.experiment import Experiment
from vmm.sharding import MeshShape, make_mesh


def test_recall_by_hand():
    queries = np.eye(4)
    keys = np.eye(4)[[0, 1, 3, 2]]  # the last two are swapped: each ranks second
    keys[2] += 0.1 * np.eye(4)[2]
    keys[3] += 0.1 * np.eye(4)[3]
    values = table(queries, keys)
    assert values == {"R@1": 0.5, "R@5": 1.0, "R@10": 1.0, "median_rank": 1.5}


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_recall_of_truth_and_of_constants(size):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(size, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert table(vectors, vectors)["R@1"] == 1.0
    constant = table(np.ones((size, 8)), np.ones((size, 8)))
    assert constant["R@1"] == pytest.approx(1 / size)
    assert constant["R@10"] == pytest.approx(min(1.0, 10 / size))
    assert constant["median_rank"] == pytest.approx((size + 1) / 2)


def test_nan_is_never_a_hit():
    above, level = ranks(np.full((5, 3), np.nan), np.ones((5, 3)))
    assert recall(above, level, 1) == 0.0


def test_ranks_equal_a_sort():
    rng = np.random.default_rng(1)
    queries, keys = rng.normal(size=(50, 6)), rng.normal(size=(50, 6))
    above, level = ranks(queries, keys)
    scores = queries @ keys.T
    expected = [int(np.flatnonzero(np.argsort(-scores[i]) == i)[0]) for i in range(50)]
    assert above.tolist() == expected
    assert level.tolist() == [0] * 50


def test_accuracy_by_hand():
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [np.nan, np.nan], [9.0, 0.0]])
    assert accuracy(logits, np.array([0, 0, 0, 0, -1])) == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert np.isnan(accuracy(logits, np.full(5, -1)))


def predictions(count: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    return {
        "fused/video": np.eye(3)[labels] + 0.01 * rng.normal(size=(count, 3)),
        "fused/audio": rng.normal(size=(count, 3)),
        "labels/kind": np.eye(3)[labels],
        "label/kind": labels.astype(np.int32),
        "present/video": np.ones(count, bool),
        "present/audio": np.arange(count) % 4 != 0,
        "row": np.arange(count),
    }


def test_probe_finds_what_is_there_and_nothing_else():
    data = {"train": predictions(200), "test": predictions(300, 1)}
    values = Probe(train="train", data="test", subsets=("V", "A", "VA"))(lambda manifest, subset: data[manifest])
    assert values["V/kind"] == 1.0
    assert values["VA/kind"] > 0.95
    assert values["A/kind"] == pytest.approx(1 / 3, abs=0.1)


def test_classification_counts_labelled_clips_that_show_a_stream():
    rows = predictions(40)
    rows["labels/kind"][::4] = [[0, 0, 1]]  # wrong or right by luck where there is no sound
    truth = rows["label/kind"]
    values = Classification(data="test", subsets=("A", "VA"))(lambda manifest, subset: rows)
    assert values["A/kind"] == 1.0
    assert values["VA/kind"] == pytest.approx((30 + (truth[::4] == 2).sum()) / 40)


def test_retrieval_takes_the_same_complete_clips_for_every_direction():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = {f"contrast/{name}": vectors for name in ("video", "audio", "text")}
    rows |= {f"present/{name}": np.ones(20, bool) for name in ("video", "audio", "text")}
    rows["present/audio"] = np.arange(20) >= 5
    values = Retrieval(data="test")(lambda manifest, subset: rows)
    assert values["clips"] == 15
    assert values["chance/R@1"] == pytest.approx(1 / 15)
    directions = {key.split("/")[0] for key in values if "→" in key}
    assert directions == {"V→A", "V→T", "A→V", "A→T", "T→V", "T→A", "VA→T", "VT→A", "AT→V"}
    assert all(values[f"{direction}/R@1"] == 1.0 for direction in directions)


def world_predict(world, mesh: tuple, batch: int) -> Predict:
    config = small_config(world, batch=batch)
    config["objectives"] |= {"labels": dict(kind="classify", labels={"shape": 6, "both": 2})}
    config["data"] |= {"labels": {"shape": 6, "both": 2}}
    experiment = Experiment(config)
    params = __import__("flax").linen.unbox(jax.jit(experiment.initialise)(jax.random.key(0)))
    return Predict(experiment, params, make_mesh(MeshShape(*mesh), jax.devices()[: int(np.prod(mesh))]))


def test_predictions_do_not_depend_on_batch_or_devices(world_folder):
    """18 clips in batches of 4, 7, 16 and 32, on 1 to 8 devices: each clip once, the same numbers."""
    manifest = f"{world_folder}/test.jsonl"
    expected = world_predict(world_folder, (1, 1, 1), 18)(manifest, "VA")
    assert expected["row"].tolist() == list(range(18))
    for mesh, batch in (((1, 1, 1), 4), ((1, 1, 1), 7), ((8, 1, 1), 16), ((2, 2, 2), 32)):
        values = world_predict(world_folder, mesh, batch)(manifest, "VA")
        assert set(values) == set(expected)
        for key, value in values.items():
            np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-5, err_msg=f"{mesh} {batch} {key}")


def test_a_subset_hides_the_other_streams(world_folder):
    predict = world_predict(world_folder, (1, 1, 1), 18)
    manifest = f"{world_folder}/test.jsonl"
    alone, all_ = predict(manifest, "V"), predict(manifest, "VAT")
    assert (alone["encoded/audio"] == 0).all() and (alone["encoded/text"] == 0).all()
    np.testing.assert_allclose(alone["encoded/video"], all_["encoded/video"], rtol=1e-5, atol=1e-6)
    assert np.abs(alone["fused/video"] - all_["fused/video"]).max() > 1e-4
    assert (alone["present/audio"] == all_["present/audio"]).all(), "presence is the clip's, not the subset's"


def test_grid_keeps_order():
    rows, columns, cells, notes = grid(
        {"clips": 3.0, "V→T/R@1": 0.5, "V→T/R@5": 0.6, "A→T/R@1": 0.1, "chance/R@1": 0.3}
    )
    assert (rows, columns) == (["V→T", "A→T"], ["R@1", "R@5"])
    assert cells["A→T", "R@1"] == 0.1
    assert notes == {"clips": 3.0, "chance/R@1": 0.3}


def test_unknown_evaluator_lists_the_known(world_folder):
    from vmm.errors import UserError

    config = load_config("configs/demo.py:small") | {"evals": {"x": {"kind": "retreival", "data": ""}}}
    with pytest.raises(UserError, match="did you mean 'retrieval'"):
        Experiment(config)
