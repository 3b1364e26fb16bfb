"""The evaluator of events: by hand, the truth, noise, one window or many, and what it says of bad input."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import ROOT

from vmm.build import load_config
from vmm.data import scenes as synthetic
from vmm.data.manifest import read_manifest
from vmm.errors import UserError
from vmm.evals.localisation import Curve, Localisation, box_iou, matches
from vmm.evals.predictions import lines
from vmm.evals.segments import Detections, Window, decode, join, overlaps, soft_nms
from vmm.evals.timeline import surest
from vmm.evaluate import Predict
from vmm.experiment import Experiment
from vmm.sharding import MeshShape, make_mesh

CLASSES, KINDS, STEP = 3, 4, 0.25


def detections(*found, kinds: int = 0) -> Detections:
    """Of (start, end, score, label), without boxes and participants."""
    start, end, score, label = (np.array(values) for values in zip(*found)) if found else (np.zeros(0),) * 4
    blank = np.full((len(found), 4), np.nan), np.full((len(found), kinds), np.nan)
    return Detections(start.astype(float), end.astype(float), score.astype(float), label.astype(int), *blank)


class Told:
    """Stands for Predict: what it says of every subset."""

    writes = True

    def __init__(self, values: dict):
        self.values = values

    def ask(self, manifest: str, subset: str) -> dict | None:
        return self.values if subset in ("V", "VA") else None

    def rows(self, manifest: str) -> list:
        return read_manifest(manifest)


def average_precision(score, right, weight, total):
    return Curve(score, right).average_precision(weight, total)


def write(path, clips: list) -> str:
    """A manifest of clips, each a list of events (start, end, label[, box, participants]), or None."""
    rows = []
    for i, events in enumerate(clips):
        row = {"id": f"c{i}", "path": f"{i}.mp4", "start": 0.0, "end": 8.0}
        if events is not None:
            keys = ("start", "end", "label", "box", "participants")
            row["events"] = [dict(zip(keys, event)) for event in events]
        rows.append(json.dumps(row))
    (path / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    return str(path / "manifest.jsonl")


def windows_of(clips: list, seconds: float, starts, score=lambda i, j: 0.9) -> dict:
    """What a model that knows the truth says: at the step of the middle of what its window shows of an event."""
    times = np.arange(round(seconds / STEP)) * STEP + STEP / 2
    rows = {key: [] for key in ("row", "start", "scores", "segments", "boxes", "participants")}
    for i, events in enumerate(clips):
        for begin in starts:
            scores, segments = np.zeros((len(times), CLASSES)), np.stack([times, times], 1)
            boxes, who = np.zeros((len(times), 4)), np.zeros((len(times), KINDS))
            for j, (start, end, label, *rest) in enumerate(events or ()):
                first, last = max(start - begin, 0.0), min(end - begin, seconds)
                if last <= first:
                    continue
                step = np.abs(times - (first + last) / 2).argmin()
                scores[step, label], segments[step] = score(i, j), (first, last)
                if rest:
                    boxes[step] = rest[0]
                    who[step] = np.isin(np.arange(KINDS), rest[1])
            values = (i, begin, scores, segments, boxes, who)
            for key, value in zip(rows, values):
                rows[key].append(value)
    count = len(rows["row"])
    told = {f"events/{key}": np.float32(rows[key]) for key in ("scores", "segments", "boxes", "participants")}
    told["events/seconds"] = np.full(count, seconds, np.float32)
    there = {f"present/{name}": np.ones(count, bool) for name in ("video", "audio")}
    return told | there | {"row": np.array(rows["row"]), "start": np.float32(rows["start"])}


def scenes(count: int, seed: int = 0) -> list:
    """Clips of 8 s with one to three events one after the other, each with box and participants."""
    rng, clips = np.random.default_rng(seed), []
    for _ in range(count):
        edges = np.sort(rng.choice(np.arange(1, 32), 2 * rng.integers(1, 4), replace=False)) / 4
        clips.append(
            [
                (float(a), float(b), int(rng.integers(CLASSES)), [0.1, 0.2, 0.6, 0.5], [int(rng.integers(KINDS))])
                for a, b in edges.reshape(-1, 2)
            ]
        )
    return clips


def test_overlaps_by_hand():
    found = overlaps(np.array([0.0, 5.0]), np.array([2.0, 5.0]), np.array([1.0, 0.0, 5.0]), np.array([3.0, 2.0, 5.0]))
    np.testing.assert_allclose(found, [[1 / 3, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(box_iou(np.array([[0, 0, 0.5, 0.5]]), np.array([[0.25, 0.25, 0.75, 0.75]])), [1 / 7])


def test_matching_by_hand():
    truth = detections((0, 2, 1, 0), (3, 5, 1, 0), (0, 2, 1, 1))
    found = detections(
        (0, 1.9, 0.9, 0),  # the first
        (0, 2, 0.8, 0),  # better placed, but it is taken
        (0, 2, 0.7, 2),  # of another class
        (3.5, 5, 0.6, 0),  # the second, tIoU 0.75
        (0.1, 2, 0.5, 1),  # the third
    )
    assert matches(found, truth, 0.5).tolist() == [0, -1, -1, 1, 2]
    assert matches(found, truth, 0.8).tolist() == [0, -1, -1, -1, 2]
    assert matches(found.at(np.zeros(0, int)), truth, 0.5).tolist() == []
    assert matches(found, truth.at(np.zeros(0, int)), 0.5).tolist() == [-1] * 5


def test_average_precision_by_hand():
    # Right, wrong, right, right, wrong of 4: precisions 1, 2/3, 3/4; made to fall: 1, 3/4, 3/4.
    score, right = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([[1, 0, 1, 1, 0]], bool)
    order = [3, 0, 4, 2, 1]
    found = average_precision(score[order], right[:, order], np.ones(5), 4)
    np.testing.assert_allclose(found, [(1 + 0.75 + 0.75) / 4])
    # Of one score, they lie under one threshold, in any order.
    for mine in ([1, 0, 0, 0], [0, 0, 0, 1]):
        np.testing.assert_allclose(average_precision(np.ones(4), np.array([mine], bool), np.ones(4), 2), [0.25 / 2])
    assert np.isnan(average_precision(score, right, np.ones(5), 0))
    assert average_precision(np.zeros(0), np.zeros((1, 0), bool), np.zeros(0), 3) == 0
    # Weights are repetitions.
    weight = np.array([2, 0, 1, 3, 1])
    several = np.repeat(np.arange(5), weight)
    np.testing.assert_allclose(
        average_precision(score, right, weight, 8), average_precision(score[several], right[:, several], np.ones(7), 8)
    )


def test_soft_nms_by_hand():
    found = detections((0, 2, 0.9, 0), (0, 2, 0.8, 1), (0.5, 2, 0.7, 0), (4, 6, 0.3, 0), (0, 2, 0.01, 0))
    kept = soft_nms(found, 0.5, 0.01)
    assert kept.label.tolist() == [0, 1, 0, 0]
    # tIoU 0.75 with the best: 0.7 · exp(−0.75² / 0.5). The last falls below 0.01.
    np.testing.assert_allclose(kept.score, [0.9, 0.8, 0.3, 0.7 * np.exp(-1.125)][:2] + [0.3, 0.7 * np.exp(-1.125)])
    assert kept.start.tolist() == [0, 0, 4, 0.5]
    np.testing.assert_allclose(soft_nms(found, 0.0, 0.01).score, [0.9, 0.8, 0.7, 0.3, 0.01])
    assert len(soft_nms(found, 0.5, 0.01, 2).score) == 2
    assert len(soft_nms(detections(), 0.5).score) == 0


def test_soft_nms_is_the_loop_of_the_paper():
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 6, 40)
    found = detections(*zip(start, start + rng.uniform(0.2, 2, 40), rng.uniform(0, 1, 40), rng.integers(0, 2, 40)))
    expected, open_ = {}, {i: found.score[i] for i in range(40)}
    alike = overlaps(found.start, found.end, found.start, found.end)
    while open_:
        best = max(open_, key=open_.get)
        expected[best] = open_.pop(best)
        for i in open_:
            if found.label[i] == found.label[best]:
                open_[i] *= np.exp(-(alike[best, i] ** 2) / 0.5)
    kept = soft_nms(found, 0.5, 0.0)
    np.testing.assert_allclose(kept.score, sorted(expected.values(), reverse=True))
    assert kept.start.tolist() == [found.start[i] for i in sorted(expected, key=expected.get, reverse=True)]


def test_decoding_by_hand():
    scores = np.array([[0.1, 0.9], [np.nan, 0.5], [0.0, 0.2]])
    segments = np.array([[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]])
    found = decode(scores, segments, None, None, least=0.15)
    assert found.label.tolist() == [1, 1, 1]
    assert found.start.tolist() == [0.0, 1.0, 2.0]
    assert found.score.tolist() == [0.9, 0.5, 0.2]
    assert len(decode(scores, segments, None, None, 0.0, 2).score) == 2


def test_windows_are_joined_by_hand():
    first = Window(0, 4, detections((1, 2, 0.9, 0), (3, 4, 0.6, 1), (2.5, 3.5, 0.4, 2)))
    second = Window(2, 6, detections((3, 5, 0.8, 1), (2, 2.2, 0.3, 0), (5, 5.5, 0.7, 0)))
    found = join([second, first])
    rows = {(a, b, y): s for a, b, s, y in zip(*found[:4])}
    assert set(rows) == {(1, 2, 0), (3, 5, 1), (2.5, 3.5, 2), (2, 2.2, 0), (5, 5.5, 0)}
    assert rows[1, 2, 0] == 0.9  # the second window does not show it
    assert rows[3, 5, 1] == pytest.approx((0.6 * 1 + 0.8 * 2) / 3)  # the first shows half of it
    assert rows[2.5, 3.5, 2] == pytest.approx(0.2)  # the second shows it too, and said nothing
    assert rows[2, 2.2, 0] == pytest.approx(0.15)
    assert rows[5, 5.5, 0] == 0.7
    assert found.score.tolist() == sorted(found.score, reverse=True)
    # Both see start and end: the mean, weighed by score.
    both = join([Window(0, 4, detections((2.5, 3.5, 0.5, 0))), Window(2, 6, detections((2.6, 3.4, 0.5, 0)))])
    np.testing.assert_allclose([both.start[0], both.end[0], both.score[0]], [2.55, 3.45, 0.5])
    # One is longer than any window.
    long = [Window(a, a + 4, detections((max(1, a), min(9, a + 4), 0.5, 0))) for a in (0, 2, 4, 6)]
    found = join(long)
    assert (found.start.tolist(), found.end.tolist(), found.score.tolist()) == ([1.0], [9.0], [pytest.approx(0.5)])


def test_windows_give_what_the_whole_gives(tmp_path):
    clips = scenes(40)
    data = write(tmp_path, clips)
    evaluator = Localisation(data, subsets=("V",))
    found = []
    for seconds, starts in ((8.0, [0.0]), (4.0, [0.0, 2.0, 4.0]), (2.0, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])):
        told = Told(windows_of(clips, seconds, starts))
        values = evaluator(told)
        assert values["V/mAP"] == values["V/AR@10"] == 1.0
        assert values["V/box_IoU"] == pytest.approx(1.0)
        assert values["V/participants_F1"] == values["V/participants_exact"] == 1.0
        assert values["V/clip/recall@0.5"] == 1.0
        assert values["events"] == sum(map(len, clips))
        rows = told.values
        parts = {key.partition("/")[2]: value for key, value in rows.items() if key.startswith("events/")}
        mine = evaluator.clips(rows, parts, read_manifest(data), np.ones(len(rows["row"]), bool))
        found.append([sorted(zip(c.found.start.round(4), c.found.end.round(4), c.found.label)) for c in mine])
    assert found[0] == found[1] == found[2]


def test_two_clips_by_hand(tmp_path):
    box, other = [0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.75, 0.75]
    clips = [[(1.0, 3.0, 0, box, [0, 1]), (5.0, 7.0, 1)], [(2.0, 4.0, 0, box, [2])], None, []]
    data = write(tmp_path, clips)
    said = [
        [(1.0, 3.0, 0, other, [0]), (5.0, 6.0, 1)],  # half of class 1's event: tIoU 0.5
        [(6.0, 7.0, 0), (2.0, 4.0, 0, box, [2, 3])],
        [(0.0, 1.0, 2)],  # its events are unknown: not scored
        [(0.0, 1.0, 0)],  # nothing happens there
    ]
    scores = {(0, 0): 0.9, (0, 1): 0.5, (1, 0): 0.8, (1, 1): 0.6, (2, 0): 0.9, (3, 0): 0.7}
    values = Localisation(data, subsets=("V", "A"), overlaps=(0.3, 0.5, 0.7))(
        Told(windows_of(said, 8.0, [0.0], lambda i, j: scores[i, j]))
    )
    # Class 0: right, wrong, wrong, right: (1 + 0.5) / 2.
    assert values["V/AP@0.5/class_0"] == pytest.approx(0.75)
    assert values["V/AP@0.5/class_1"] == pytest.approx(1.0)
    assert "V/AP@0.5/class_2" not in values  # it never happens, and is in no mean
    assert values["V/mAP@0.5"] == pytest.approx(0.875)
    assert values["V/mAP@0.7"] == pytest.approx(0.375)
    assert values["V/mAP"] == pytest.approx((0.875 + 0.875 + 0.375) / 3)
    # Of 3 events two are met fully, one at tIoU 0.5 alone, the first of ten levels.
    assert values["V/AR@10"] == pytest.approx((2 + 0.1) / 3)
    assert values["V/box_IoU"] == pytest.approx((1 / 7 + 1) / 2)
    assert values["V/participants_exact"] == 0.0
    assert values["V/participants_F1"] == pytest.approx(2 * 2 / (3 + 3))
    assert values["V/clip/recall@0.5"] == 1.0
    assert (values["clips"], values["events"]) == (3.0, 3.0)
    assert not any(key.startswith("A/") for key in values)


def test_noise_finds_next_to_nothing(tmp_path):
    clips = scenes(100)
    rng = np.random.default_rng(0)
    rows = windows_of(clips, 8.0, [0.0])
    shape = rows["events/scores"].shape
    middle, length = np.arange(32) / 4 + 0.125, rng.uniform(0.5, 4, (*shape[:2], 1))
    noise = rows | {
        "events/scores": rng.uniform(0, 1, shape).astype(np.float32),
        "events/segments": (middle[:, None] + length * [-0.5, 0.5]).clip(0, 8).astype(np.float32),
        "events/participants": rng.uniform(0, 1, rows["events/participants"].shape).astype(np.float32),
    }
    evaluator = Localisation(write(tmp_path, clips), subsets=("V",))
    values = evaluator(Told(noise))
    assert values["V/mAP@0.5"] < 0.06
    assert values["V/mAP@0.7"] < 0.03
    assert 0.2 < values["V/participants_F1"] < 0.45  # one of four, each said by a coin
    silent = evaluator(Told(rows | {"events/scores": np.zeros(shape, np.float32)}))
    assert silent["V/mAP"] == silent["V/AR@10"] == silent["V/clip/recall@0.5"] == 0.0
    assert np.isnan(silent.get("V/box_IoU", np.nan))


def test_intervals_and_the_file_of_predictions(tmp_path):
    clips = scenes(30)
    rng = np.random.default_rng(1)
    rows = windows_of(clips, 8.0, [0.0], lambda i, j: rng.uniform())
    lost = rng.random(len(rows["row"])) < 0.4
    rows["events/scores"][lost] = 0
    measured = Localisation(write(tmp_path, clips), subsets=("V",)).measure(Told(rows), None)
    numbers, ends = measured.numbers(), measured.intervals()
    for key in ("V/mAP", "V/mAP@0.5", "V/AR@10", "V/clip/recall@0.5", "V/AP@0.5/class_0"):
        low, high = ends[key]
        assert low < numbers[key] < high, key
        assert 0.1 < high - low < 0.6, key
    told = [line for scored in measured.scored for line in lines("events", scored, [f"c{i}" for i in range(30)])]
    assert len({(line["name"], line["id"]) for line in told}) == len(told) == 60
    # A resample of every clip once is the whole; of every clip twice too.
    rest, every = measured.scored[0].rest, np.arange(30)
    assert rest(every) == pytest.approx(rest(np.repeat(every, 2)), nan_ok=True)


def test_the_picture_is_drawn(tmp_path):
    clips = scenes(4)
    path = tmp_path / "events.png"
    Localisation(write(tmp_path, clips), subsets=("V",), picture=str(path))(Told(windows_of(clips, 8.0, [0.0])))
    assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("clips", "change", "line"),
    [
        ([[], None], {}, "no clip has an event"),
        ([[(1.0, 2.0, 7)]], {}, "clip 'c0' has an event of class 7, but the objective knows 3"),
        ([[(1.0, 2.0, 0, None, [9])]], {}, "a participant 9, but the objective knows 4"),
        ([[(1.0, 2.0, 0)]], {"events/segments": None}, "objective 'events' tells no segments"),
        ([[(1.0, 2.0, 0)]], {"events/": None}, "no objective 'events' predicts anything"),
    ],
)
def test_bad_input_is_one_line(tmp_path, clips, change, line):
    rows = windows_of([[(1.0, 2.0, 0)]], 8.0, [0.0])
    rows = {key: value for key, value in rows.items() if not any(key.startswith(name) for name in change)}
    with pytest.raises(UserError, match=line):
        Localisation(write(tmp_path, clips), subsets=("V",))(Told(rows))


def test_bad_fields_are_one_line():
    for fields in (dict(overlaps=()), dict(overlaps=(0.0,)), dict(most=0), dict(sigma=-1.0)):
        with pytest.raises(UserError, match="localisation"):
            Localisation("x.jsonl", **fields)


def test_only_the_surest_of_a_time_is_drawn():
    found = detections((0, 2, 0.9, 0), (0.1, 2, 0.8, 1), (3, 4, 0.5, 1), (5, 6, 0.01, 0))
    assert surest(found, 0.1).start.tolist() == [0, 3]


def test_a_model_is_asked_window_by_window(tmp_path):
    """From files through a model that has learned nothing; windows of 4 s of clips of 8 s."""
    synthetic.generate(tmp_path, {"train": 2, "test": 2})
    config = load_config(str(ROOT / "configs" / "finetune_localise.py") + ":small")
    config["data"] |= {
        "train": f"{tmp_path}/train.jsonl",
        "tokenizer": f"{tmp_path}/tokenizer.json",
        "evaluation": dict(stride=2.0),
        "workers": 0,
    }
    config["data"]["clip"] |= dict(seconds=4.0, frames=8)
    config["objectives"]["events"] |= dict(seconds=4.0, steps=8)
    config["evals"] = {"events": dict(kind="localisation", data=f"{tmp_path}/test.jsonl", subsets=("V", "VA", "VT"))}
    experiment = Experiment(config)
    rng = np.random.default_rng(0)
    shapes = jax.tree.map(
        lambda leaf: leaf.shape, nn.unbox(experiment.shapes), is_leaf=lambda leaf: hasattr(leaf, "shape")
    )
    params = jax.tree.map(
        lambda shape: np.float32(rng.normal(size=shape) * 0.1), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    predict = Predict(experiment, params, make_mesh(MeshShape(), jax.devices()[:1]))
    values = experiment.evals["events"](predict)
    asked = predict.ask(f"{tmp_path}/test.jsonl", "VA")
    assert asked["row"].tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(asked["start"], [0, 2, 4] * 2, atol=1e-6)
    events = [row.events for row in read_manifest(f"{tmp_path}/test.jsonl")]
    assert values["events"] == sum(map(len, events))
    assert {key.split("/")[0] for key in values} == {"clips", "events", "V", "VA"}
    assert 0 <= values["VA/mAP"] <= 1
