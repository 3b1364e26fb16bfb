"""Numbers, identities and prompts: the truth scores perfectly, noise at chance, small cases as counted by hand."""

import numpy as np
import pytest

from vmm.data.manifest import Row
from vmm.errors import UserError
from vmm.evals import EVALS
from vmm.evals.identity import Identity, verification
from vmm.evals.prompts import FewShot, ZeroShot
from vmm.evals.regression import Regression


class Manifest:
    """Predictions beside what a manifest tells; the latter alone knows labels that data.labels does not name."""

    def __init__(self, found: dict, labels: list[dict]):
        self.found, self.labels = found, labels

    def __call__(self, data, subset):
        return self.found if subset == "V" else None

    def rows(self, data) -> list[Row]:
        return [Row(str(i), "", None, None, (), labels) for i, labels in enumerate(self.labels)]


def rows_of(count: int, **more) -> dict:
    return {"present/video": np.ones(count, bool), "row": np.arange(count), **more}


# Numbers.


def test_regression_by_hand():
    rows = rows_of(
        4, **{"numbers/mood": np.array([1.0, -1.0, 2.0, 5.0]), "target/mood": np.array([2.0, -2.0, 0.0, np.nan])}
    )
    values = Regression("test", subsets=("V",))(lambda data, subset: rows)
    assert values["V/mood/MAE"] == pytest.approx((1 + 1 + 2) / 3)
    assert values["V/mood/sign"] == 1.0  # of two: the third has none
    assert values["V/mood/R2"] == pytest.approx(1 - (1 + 1 + 4) / 8)
    assert values["V/mood/pearson"] == pytest.approx(np.corrcoef([1, -1, 2], [2, -2, 0])[0, 1])


def test_regression_of_truth_and_of_noise():
    rng = np.random.default_rng(0)
    true = rng.normal(size=600)
    for said, want in ((true, dict(MAE=0, pearson=1, R2=1, sign=1)), (rng.normal(size=600), dict(pearson=0, sign=0.5))):
        rows = rows_of(600, **{"numbers/mood": said, "target/mood": true})
        values = Regression("test", subsets=("V",))(lambda data, subset, rows=rows: rows)
        for name, value in want.items():
            assert values[f"V/mood/{name}"] == pytest.approx(
                value, abs=0.1 if value in (0.5, 0) and said is not true else 1e-9
            )


def test_regression_names_what_is_missing():
    with pytest.raises(UserError, match=r"'regression'.*no objective 'numbers'"):
        Regression("test", subsets=("V",))(lambda data, subset: rows_of(2))
    rows = rows_of(2, **{"numbers/mood": np.zeros(2), "target/moot": np.zeros(2)})
    with pytest.raises(UserError, match=r"without a target 'mood'.*moot"):
        Regression("test", subsets=("V",))(lambda data, subset: rows)


# Identities.


def test_verification_by_hand():
    # Sorted: same .9, other .8, same .7, other .2, other .1
    scores, same = np.array([0.7, 0.2, 0.9, 0.8, 0.1]), np.array([True, False, True, False, False])
    got = verification(scores, same, alarms=0.5)
    assert got["ROC_area"] == pytest.approx(5 / 6)  # pairs in order: 3 + 2 of 6
    # Accepting the first three refuses no friend and takes one stranger of three; one less refuses half of the friends.
    assert got["EER"] == pytest.approx(1 / 3)
    assert got["TAR@0.5"] == 1.0
    assert verification(scores, same, alarms=0.0)["TAR@0"] == 0.5
    assert verification(np.zeros(4), np.array([True, False, True, False]))["ROC_area"] == 0.5
    assert verification(np.zeros(4), np.array([True, False, True, False]))["EER"] == pytest.approx(0.5)
    assert np.isnan(verification(scores, np.ones(5, bool))["EER"])


def test_identity_of_truth_and_of_noise():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(10), 20)
    for x, want in (
        (np.eye(10)[labels], (1.0, 1.0, 0.0)),
        (rng.normal(size=(200, 8)), (0.1, 0.5, 0.5)),
        (np.ones((200, 4)), (0.1, 0.5, 0.5)),
    ):
        rows = rows_of(200, **{"identity/embedding": x, "label/who": labels})
        evaluator = Identity("test", "who", subsets=("V",))
        values = evaluator(lambda data, subset, rows=rows: rows)
        got = values["V/rank-1"], values["V/ROC_area"], values["V/EER"]
        assert got == pytest.approx(want, abs=0.09 if want[0] < 1 else 1e-9)
        assert values["identities"] == 10 and values["chance/rank-1"] == 0.1
    measured = evaluator.measure(
        lambda data, subset: rows_of(200, **{"identity/embedding": np.eye(10)[labels], "label/who": labels}), None
    )
    low, high = measured.scored[0].intervals()["V/rank-1"]
    assert low == high == 1.0


def test_labels_that_training_lacks_are_read_from_the_manifest():
    x = np.array([[1, 0], [0, 1], [0.9, 0.1], [0.6, 0.8], [0.8, 0.6]])
    rows = rows_of(5, **{"identity/embedding": x})
    told = [{"who": 0}, {"who": 1}, {"who": 0}, {"who": 1}, {"who": 1}]
    assert Identity("test", "who", subsets=("V",))(Manifest(rows, told))["V/rank-1"] == pytest.approx(2 / 3)
    for labels in (told[:4] + [{"who": [1]}], None):
        if labels is None:
            rows["label/who"] = np.zeros((5, 3), int)
        with pytest.raises(UserError, match="'who' of test are tags"):
            Identity("test", "who", subsets=("V",))(Manifest(rows, labels or told))


def test_rank_one_by_hand():
    x = np.array([[1, 0], [0, 1], [0.9, 0.1], [0.6, 0.8], [0.8, 0.6]])
    rows = rows_of(5, **{"identity/embedding": x, "label/who": np.array([0, 1, 0, 1, 1])})
    # The gallery is the first clip of either; of the other three, the last lies nearer to the wrong one.
    assert Identity("test", "who", subsets=("V",))(lambda data, subset: rows)["V/rank-1"] == pytest.approx(2 / 3)
    with pytest.raises(UserError, match=r"labels\.who: 2 identities of at most 3 clips"):
        Identity("test", "who", subsets=("V",), gallery=3)(lambda data, subset: rows)
    with pytest.raises(UserError, match="no clip of test has a label 'whom'.*who"):
        Identity("test", "whom", subsets=("V",))(Manifest(rows, [{"who": 0}]))


# Prompts.


class Words:
    """A model whose words and clips of a class lie on one axis, or that knows nothing."""

    def __init__(self, knows: bool, count: int = 400):
        rng = np.random.default_rng(2)
        self.labels, self.knows = rng.integers(0, 4, count), knows
        x = np.eye(4)[self.labels] + 0.05 * rng.normal(size=(count, 4))
        self.found = rows_of(
            count, **{"contrast/video": x if knows else rng.normal(size=(count, 4)), "label/shape": self.labels}
        )

    def __call__(self, data, subset):
        return self.found if subset == "V" else None

    def rows(self, data):
        return [Row("a", "", None, None, (), {"shape": 0})]

    def embed(self, texts):
        self.texts = texts
        names = ["ring", "star", "cross", "cube"]
        return {"contrast/text": np.stack([np.eye(4)[[name in text for name in names].index(True)] for text in texts])}


NAMES = {"shape": ("ring", "star", "cross", "cube")}


@pytest.mark.parametrize("knows", [True, False])
def test_zero_and_few_shot_of_truth_and_of_noise(knows):
    model, want = Words(knows), dict(abs=1e-9) if knows else dict(abs=0.08)
    values = ZeroShot("test", NAMES, ("a {}", "the {} moves"))(model)
    assert values["V/shape"] == pytest.approx(1.0 if knows else 0.25, **want)
    assert values["chance/shape"] == 0.25
    assert model.texts[:3] == ["a ring", "the ring moves", "a star"] and len(model.texts) == 8
    for method in ("prototype", "linear"):
        few = FewShot("train", "test", ("shape",), shots=(1, 8), method=method)(model)
        assert few["V/shape 8-shot"] == pytest.approx(1.0 if knows else 0.25, **want)
        assert set(few) == {"V/shape 1-shot", "V/shape 8-shot"}


def test_prompts_bring_their_classes_order():
    model = Words(True)
    values = ZeroShot("test", {"shape": ("star", "ring", "cross", "cube")})(model)
    assert values["V/shape"] == pytest.approx(np.isin(model.labels, (2, 3)).mean())


def test_what_prompts_cannot_do_is_one_line():
    model = Words(True)
    for evaluator, message in (
        (ZeroShot("test", {"shape": ("ring", "star")}), "2 names, but test has class 3"),
        (ZeroShot("test", NAMES, ("a shape",)), "write {} for the name"),
        (ZeroShot("test", NAMES, {"colour": ("{}",)}), "none for 'shape'"),
        (ZeroShot("test", NAMES, objective="other"), "'other' embeds no text"),
        (FewShot("train", "test", ("shape",), shots=(300,)), "300 clips a class, but train has only"),
        (FewShot("train", "test", ("colour",)), "no clip of train has a label 'colour'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluator(model)
    with pytest.raises(UserError, match="unknown 'knn'"):
        FewShot("train", "test", ("shape",), method="knn")


def test_every_evaluator_is_in_the_table():
    assert {"regression", "identity", "zero_shot", "few_shot"} <= set(EVALS)
