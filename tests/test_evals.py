"""Evaluators against hand-made truth: perfect, chance, ties, gaps; exact for any size, batch and shard count."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from conftest import small_config, tiny_config
from sklearn import metrics

from vmm.build import load_config
from vmm.data.manifest import Row
from vmm.errors import UserError
from vmm.evals.calibration import softmax
from vmm.evals.classification import Classification, accuracy, confusion, hits, macro, per_class, votes
from vmm.evals.predictions import lines
from vmm.evals.probe import Probe
from vmm.evals.retrieval import Retrieval, found, ranks, recall, score, table, unit
from vmm.evals.tables import grid
from vmm.evals.tagging import Tagging, average_precision, curves, roc_area
from vmm.evaluate import Predict
from vmm.experiment import Experiment
from vmm.objectives import OBJECTIVES
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
    assert recall(*ranks(np.full((5, 3), np.nan), np.ones((5, 3))), 1) == 0.0


def test_ranks_equal_a_sort():
    rng = np.random.default_rng(1)
    queries, keys = rng.normal(size=(50, 6)), rng.normal(size=(50, 6))
    above, level, right = ranks(queries, keys)
    scores = queries @ keys.T
    expected = [int(np.flatnonzero(np.argsort(-scores[i]) == i)[0]) for i in range(50)]
    assert above.tolist() == expected
    assert level.tolist() == [0] * 50 and right.tolist() == [1] * 50


def test_several_captions_that_all_tie_are_found_by_chance():
    """Two videos, three captions and one, all embedded alike: the first of four is right in 3/4 and 1/4 of the orders."""
    owners = np.array([0, 1]), np.array([0, 0, 0, 1])
    scored = score("", "", "", np.arange(2), np.ones((2, 8)), np.ones((4, 8)), owners)
    assert scored.means["R@1"] == pytest.approx([3 / 4, 1 / 4])  # of all clips 1/2: chance among two
    assert scored.told["rank"] == pytest.approx([1.25, 2.5])  # the mean place of the first of 3, and of 1, among 4


def test_chance_of_ties_is_that_of_all_orders():
    """One key above; then two of its own among five that tie: every order of them is counted."""
    orders = list(itertools.permutations([True, True, False, False, False]))
    for k in range(1, 8):
        by_hand = np.mean([any(order[: max(k - 1, 0)]) for order in orders])
        assert found(np.array([1]), np.array([3]), np.array([2]), k) == pytest.approx([by_hand]), k
    first = np.mean([2 + order.index(True) for order in orders])
    scores = np.array([[2.0, 1, 1, 1, 1, 1, 0]])  # by keys: other, 2 own, 3 others, own
    owners = np.array([0]), np.array([1, 0, 0, 1, 1, 1, 0])
    assert [int(x[0]) for x in ranks(np.ones((1, 1)), scores.T, owners)] == [1, 3, 2]
    assert score("", "", "", np.arange(1), np.ones((1, 1)), scores.T, owners).told["rank"][0] == pytest.approx(first)


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


class Told:
    """Predictions of a manifest of clips, each with a caption or several, as evaluate.Predict gives them."""

    def __init__(self, rows: dict, manifest: list[Row], texts: dict | None = None):
        self.found, self.manifest, self.texts = rows, manifest, texts or {}

    def __call__(self, manifest, subset):
        return self.found

    def knows(self, subset):
        return True

    def rows(self, manifest):
        return self.manifest

    def phrasings(self, manifest):
        return [row.captions for row in self.manifest]

    def embed(self, texts):
        return {"contrast/text": np.array([self.texts[text] for text in texts])}


def one_caption_each(rows: dict) -> Told:
    count = len(rows["row"])
    return Told(rows, [Row(str(i), f"{i}.mp4", None, None, ("words",), {}) for i in range(count)])


def test_each_caption_is_a_query_and_any_of_them_is_found():
    """MSR-VTT's protocol by hand: 3 videos, captions of a and b, the first two rows of one video."""
    x, y, z = np.eye(3)
    rows = {
        "contrast/video": np.stack([x, x, y, z]),
        "contrast/text": np.stack([x, x + 0.5 * y, z, z]),  # of the third row, wrong
        "present/video": np.ones(4, bool), "present/text": np.ones(4, bool), "row": np.arange(4),
    }  # fmt: skip
    captions = [("a",), ("b",), ("c", "more c"), ("d", "bad d")]
    manifest = [
        Row(str(i), name, None, None, texts, {})
        for i, (name, texts) in enumerate(zip(["ab.mp4", "ab.mp4", "c.mp4", "d.mp4"], captions))
    ]
    told = Told(rows, manifest, {"more c": y, "bad d": x + 0.1 * z})
    evaluator = Retrieval(data="test")
    gallery = evaluator.prepare(told)
    measured = evaluator.measure(told, gallery)
    values, scored = measured.numbers(), {one.name: one for one in measured.scored}
    assert values["clips"] == 3 and values["captions"] == 6 and values["chance/R@1"] == pytest.approx(1 / 3)
    # Queries: a, b, c, more c, d, bad d among the videos x, y, z.
    assert scored["T→V"].told["rank"].tolist() == [1.0, 1.0, 2.5, 1.0, 1.0, 2.0]
    assert scored["T→V"].row.tolist() == [0, 0, 2, 2, 3, 3], "clips, for the bootstrap: rows of one video are one"
    # Video x: its a is first, and its b no wrong answer. y: "more c" is first. z: of c (wrong, cosine 1) and d, as near.
    assert scored["V→T"].told["rank"].tolist() == [1.0, 1.0, 1.5]
    assert values["V→T/R@1"] == pytest.approx((1 + 1 + 0.5) / 3)
    ids = [line["id"] for line in lines("retrieval", scored["T→V"], [row.id for row in manifest])]
    assert ids == ["0", "0#2", "2", "2#2", "3", "3#2"]
    # One caption a clip, every clip a video: nothing to prepare.
    assert evaluator.prepare(one_caption_each(rows)) is None


def test_retrieval_takes_the_same_complete_clips_for_every_direction():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = {f"contrast/{name}": vectors for name in ("video", "audio", "text")}
    rows |= {f"present/{name}": np.ones(20, bool) for name in ("video", "audio", "text")} | {"row": np.arange(20)}
    rows["present/audio"] = np.arange(20) >= 5
    values = Retrieval(data="test")(one_caption_each(rows))
    assert values["clips"] == 15
    assert values["chance/R@1"] == pytest.approx(1 / 15)
    directions = {key.split("/")[0] for key in values if "→" in key}
    assert directions == {"V→A", "V→T", "A→V", "A→T", "T→V", "T→A", "VA→T", "VT→A", "AT→V"}
    assert all(values[f"{direction}/R@1"] == 1.0 for direction in directions)


def test_a_direction_that_was_not_trained_is_not_shown(world_folder):
    """The pairs are those of the objective, by the experiment; a query of several streams needs all of them."""
    evaluator = Experiment(small_config(world_folder)).evals["retrieval"]
    assert evaluator.pairs == (("video", "text"), ("audio", "text"))
    rng = np.random.default_rng(0)
    rows = {f"contrast/{name}": rng.normal(size=(9, 4)) for name in ("video", "audio", "text")}
    rows |= {f"present/{name}": np.ones(9, bool) for name in ("video", "audio", "text")} | {"row": np.arange(9)}
    values = evaluator(one_caption_each(rows))
    assert {key.split("/")[0] for key in values if "→" in key} == {"V→T", "A→T", "T→V", "T→A", "VA→T"}
    both = {"contrast": OBJECTIVES["contrastive"]()}
    assert Retrieval(data="test").trained_on(both).pairs == (
        ("video", "text"),
        ("audio", "text"),
        ("video", "audio"),
    )
    given = Retrieval(data="test", pairs=(("audio", "text"),))
    assert given.trained_on(both) is given


def test_a_probe_of_more_streams_has_no_more_features_and_chooses_its_penalty():
    data = {"train": predictions(120), "test": predictions(60, 1)}
    probe = Probe(train="train", data="test", subsets=("V", "VA"), features=3, penalties=(1e-4, 1.0))
    fitted = probe.prepare(lambda manifest, subset: data[manifest])
    assert {name: model.coef_.shape for (name, _), (_, model) in fitted.items()} == {"V": (3, 3), "VA": (3, 3)}
    x, y = (
        np.random.default_rng(0).normal(size=(80, 30)),
        np.arange(80) % 2,
    )  # nothing to be found: the stronger of equals
    assert probe._fit(x, y)[1].C in probe.penalties
    assert dataclasses.replace(probe, penalties=(1.0, 1e-4))._choose(np.zeros((80, 3)), y) == 1e-4
    assert fitted["V", "kind"][1].C == 1.0  # at 1e-4 it would tell nothing


def test_untrained_features_stand_beside_the_trained():
    data = {"train": predictions(120), "test": predictions(60, 1)}

    class Model:
        def __call__(self, manifest, subset):
            return data[manifest]

        @property
        def untrained(self):
            return lambda manifest, subset: {
                key: np.zeros_like(value) if key.startswith("fused") else value for key, value in data[manifest].items()
            }

    probe = Probe(train="train", data="test", subsets=("VA",), untrained=("VA",))
    values = probe(Model())
    assert set(values) == {"VA/kind", "VA untrained/kind"}
    assert values["VA/kind"] > 0.95 and values["VA untrained/kind"] < 0.6
    assert set(probe(lambda manifest, subset: data[manifest])) == {"VA/kind"}  # who cannot tell, as under noise


def test_a_stream_that_is_not_fused_is_probed_as_encoded():
    rows = predictions(120)
    rows["encoded/text"], rows["present/text"] = rows["fused/video"], np.ones(120, bool)
    values = Probe(train="a", data="a", subsets=("T", "AT"))(lambda manifest, subset: rows)
    assert values["T/kind"] == 1.0 and values["AT/kind"] > 0.95


def world_predict(world, mesh: tuple, batch: int) -> Predict:
    config = tiny_config(world, ("video", "audio", "text"), mixes=True, batch=batch)
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
    config = load_config("configs/demo.py:small") | {"evals": {"x": {"kind": "retreival", "data": ""}}}
    with pytest.raises(UserError, match="did you mean 'retrieval'"):
        Experiment(config)


# ---- classes and tags -----------------------------------------------------------------------------


def test_hits_share_ties_at_the_edge():
    logits = np.array([[3.0, 2, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [np.nan, 0, 0, 0], [0, np.nan, 1, 0]])
    labels = np.array([1, 2, 3, 0, 2])
    assert hits(logits, labels).tolist() == [0, 1 / 3, 1 / 4, 0, 1]
    assert hits(logits, labels, 2).tolist() == [1, 2 / 3, 1 / 2, 0, 1]
    assert hits(logits, labels, 5).tolist() == [1, 1, 1, 0, 1]
    noise = np.random.default_rng(0).normal(size=(2000, 20))
    assert hits(noise, np.arange(2000) % 20, 5).mean() == pytest.approx(0.25, abs=0.04)


def test_per_class_by_hand():
    """Truth 0 0 0 1 1 2; predicted 0 0 1 1 0 2: precision 2/3, 1/2, 1; recall 2/3, 1/2, 1."""
    labels, guess = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 2])
    logits = np.eye(4)[guess]
    assert confusion(logits, labels).tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    scores = per_class(votes(logits), labels)
    assert scores.precision[:3] == pytest.approx([2 / 3, 1 / 2, 1]) and scores.recall[:3] == pytest.approx(
        [2 / 3, 0.5, 1]
    )
    assert scores.f1[:3] == pytest.approx([2 / 3, 1 / 2, 1]) and scores.count.tolist() == [3, 2, 1, 0]
    assert np.isnan([scores.precision[3], scores.recall[3], scores.f1[3]]).all(), "no clip of class 3"
    found = macro(votes(logits), labels)
    assert found == pytest.approx(dict.fromkeys(("macro_precision", "macro_recall", "macro_f1"), 13 / 18))


def test_macro_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    labels, logits = rng.integers(0, 5, 200), rng.normal(size=(200, 5))
    found = macro(votes(logits), labels)
    for name in ("precision", "recall", "f1"):
        expected = getattr(metrics, f"{name}_score")(labels, logits.argmax(1), average="macro")
        assert found[f"macro_{name}"] == pytest.approx(expected), name
    assert confusion(logits, labels).tolist() == metrics.confusion_matrix(labels, logits.argmax(1)).tolist()
    assert macro(votes(np.eye(5)[labels]), labels) == dict.fromkeys(found, 1.0)
    assert macro(votes(np.zeros((200, 5))), labels)["macro_recall"] == pytest.approx(0.2), "constants: chance"
    assert macro(votes(np.full((200, 5), np.nan)), labels) == dict.fromkeys(found, 0.0)


def test_average_precision_and_roc_by_hand():
    """Scores 4 3 2 1, truth 1 0 1 0: AP ½ × 1 + ½ × 2/3; three of the four pairs are in order."""
    scores, truth = np.array([[4.0], [3], [2], [1]]), np.array([[1], [0], [1], [0]])
    assert average_precision(scores, truth)[0] == pytest.approx(5 / 6)
    assert roc_area(scores, truth)[0] == 0.75
    tied = np.array([[2.0], [2], [2], [1]])
    assert average_precision(tied, truth)[0] == pytest.approx(2 / 3), "one threshold takes three, two of them right"
    assert roc_area(tied, truth)[0] == 0.75
    for constant in (0.0, np.nan):
        assert average_precision(np.full((4, 1), constant), truth)[0] == 0.5
        assert roc_area(np.full((4, 1), constant), truth)[0] == 0.5
    nan = np.array([[np.nan], [3], [2], [1]])
    assert average_precision(nan, truth)[0] == pytest.approx(0.5 * 0.5 + 0.5 * 0.5), "not-a-number is last"
    unknown = np.array([[1], [-1], [1], [0]])
    assert average_precision(scores, unknown)[0] == roc_area(scores, unknown)[0] == 1.0
    assert np.isnan(average_precision(scores, np.zeros((4, 1)))[0]) and np.isnan(roc_area(scores, np.ones((4, 1)))[0])


def test_tags_are_scored_as_scikit_learn_does():
    rng = np.random.default_rng(2)
    truth, scores = rng.integers(0, 2, (300, 4)), np.round(rng.normal(size=(300, 4)), 1)  # rounded: many ties
    expected = [metrics.average_precision_score(truth[:, y], scores[:, y]) for y in range(4)]
    assert average_precision(scores, truth) == pytest.approx(expected)
    assert roc_area(scores, truth) == pytest.approx(
        [metrics.roc_auc_score(truth[:, y], scores[:, y]) for y in range(4)]
    )
    drawn = curves(scores[:, 0], truth[:, 0])
    assert metrics.auc(drawn["fpr"], drawn["tpr"]) == pytest.approx(roc_area(scores, truth)[0])
    assert drawn["recall"][0] == 1.0 and drawn["precision"][0] == pytest.approx(truth[:, 0].mean())
    assert curves(scores[:, 0], np.zeros(300))["fpr"] == []


def test_tagging_truth_noise_and_absent_classes():
    rows = predictions(300)
    values = Tagging(data="test", subsets=("V",))(lambda manifest, subset: rows)
    assert values == {"V/kind/mAP": 1.0, "V/kind/ROC_area": 1.0}
    rows["labels/kind"] = np.random.default_rng(3).normal(size=(300, 3))
    values = Tagging(data="test", subsets=("V",))(lambda manifest, subset: rows)
    assert values["V/kind/mAP"] == pytest.approx(1 / 3, abs=0.1)
    assert values["V/kind/ROC_area"] == pytest.approx(0.5, abs=0.1)
    rows["labels/kind"] = rows["fused/video"][:, :2]
    rows["label/kind"] = np.stack([rows["label/kind"] != 2, rows["label/kind"] == 1], 1).astype(
        np.int32
    )  # two tags a clip
    values = Tagging(data="test", subsets=("V",))(lambda manifest, subset: rows)
    assert values["V/kind/mAP"] < 1.0 and values["V/kind/ROC_area"] < 1.0
    rows["labels/kind"] = rows["label/kind"].astype(float)
    assert Tagging(data="test", subsets=("V",))(lambda manifest, subset: rows)["V/kind/mAP"] == 1.0


@pytest.mark.parametrize("kind", [Tagging, Classification])
def test_what_does_not_fit_is_named(kind):
    extra = {"metrics": ("accuracy", "macro_f1")} if kind is Classification else {}

    def run(**changes):
        rows = predictions(40)
        rows |= changes.pop("rows", {})
        return kind(data="d.jsonl", subsets=("V",), **(extra | changes))(lambda manifest, subset: rows)

    some = {"label/kind": np.zeros(40, np.int32)}
    with pytest.raises(UserError, match=r"dataset d.jsonl, labels.kind: no clip of class 1 \(2 of 3"):
        run(rows=some)
    run(rows=some, absent=True)
    with pytest.raises(UserError, match="dataset d.jsonl, labels.kind: has class 7, but the head knows 3"):
        run(rows={"label/kind": np.full(40, 7, np.int32)})
    with pytest.raises(UserError, match="no objective 'label' predicts anything; did you mean 'labels'"):
        run(objective="label")
    with pytest.raises(UserError, match="d.jsonl was read without label 'other'.*known: kind"):
        run(rows={"labels/other": np.zeros((40, 2))})
    if kind is Classification:
        with pytest.raises(UserError, match="no metric 'macro_f2'; did you mean 'macro_f1'"):
            run(metrics=("macro_f2",))


def test_measured_numbers_have_intervals():
    rows = predictions(60)
    rows["labels/kind"] = rows["labels/kind"] + 1.2 * np.random.default_rng(4).normal(size=(60, 3))
    evaluator = Classification(data="test", subsets=("V",), metrics=("accuracy", "top5", "macro_f1"))
    measured = evaluator.measure(lambda manifest, subset: rows, None)
    values, ends = measured.numbers(), measured.intervals()
    assert list(values) == ["V/kind", "V/kind/top5", "V/kind/macro_f1"] == list(ends)
    assert values == evaluator(lambda manifest, subset: rows)
    for key, (low, high) in ends.items():
        assert low <= values[key] <= high, key
    low, high = ends["V/kind"]
    p = values["V/kind"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 60), rel=0.15)
    assert ends["V/kind/top5"] == pytest.approx((0.025 ** (1 / 60), 1.0)), "all right, but of 60 clips only"


def test_retrieval_has_a_score_for_each_query():
    rng = np.random.default_rng(5)
    rows = {f"contrast/{name}": unit(rng.normal(size=(30, 4))) for name in ("video", "text")}
    rows |= {f"present/{name}": np.ones(30, bool) for name in ("video", "text")} | {"row": np.arange(30)}
    measured = Retrieval(data="test").measure(lambda manifest, subset: rows, None)
    scored = measured.scored[0]
    assert scored.name == "V→T" and scored.row.tolist() == list(range(30))
    order = np.argsort(-rows["contrast/video"] @ rows["contrast/text"].T, axis=1)
    assert scored.told["rank"].tolist() == [1 + int(np.flatnonzero(order[i] == i)[0]) for i in range(30)]
    ends = measured.intervals()
    assert set(ends) == {f"{d}/{m}" for d in ("V→T", "T→V") for m in ("R@1", "R@5", "R@10", "median_rank")}
    low, high = ends["V→T/median_rank"]
    assert low <= measured.numbers()["V→T/median_rank"] <= high and low < high
    with pytest.raises(UserError, match="objective 'contrats' embeds nothing; did you mean 'contrast'"):
        Retrieval(data="test", objective="contrats")(one_caption_each(rows))


def test_probabilities_of_a_probe_of_two_classes():
    """They are those of the regression itself."""
    rows = predictions(80)
    rows["label/kind"] = (rows["label/kind"] > 0).astype(np.int32)
    rows["fused/video"] = rows["fused/video"] + np.random.default_rng(6).normal(size=(80, 3))
    probe = Probe(train="a", data="a", subsets=("V",))
    prepared = probe.prepare(lambda manifest, subset: rows)
    said = probe.measure(lambda manifest, subset: rows, prepared).scored[0].classes
    scaler, model = prepared["V", "kind"]
    expected = model.predict_proba(scaler.transform(rows["fused/video"]))
    np.testing.assert_allclose(softmax(said.logits), expected, rtol=1e-6)
