"""What tasks ask for beside labels: from the manifest's line to the batch."""

import json

import av
import numpy as np
import pytest

from vmm.data import text
from vmm.data.asked import cut
from vmm.data.building.build import Settings, build
from vmm.data.building.store import Storage
from vmm.data.loader import Loader, evaluation_batches, load_mixture
from vmm.data.manifest import Event, Row, read_manifest
from vmm.data.samples import Augment, Clip, Data, EvaluationViews
from vmm.data.sources import open_source
from vmm.data.targets import Curve, Events, Text, fill, make_targets
from vmm.errors import UserError

CLIP = Clip(seconds=1.0, frames=4, size=16, text_length=8)
ASKED = dict(
    mood=dict(kind="value", of="mood"),
    answer=dict(kind="text", of="{answer}", length=6),
    choices=dict(kind="choices", count=3, length=5),
    events=dict(kind="events", classes=3, most=2, participants=4),
)
LINES = [
    dict(
        id="a", path="a.mp4", end=3.0, caption="one two", labels={"tags": [0, 2], "kind": 1},
        values={"mood": -0.5}, texts={"question": "who", "answer": "red ring", "history": ["a", "b c"], "choices": ["red", "blue"]},
        events=[
            dict(start=1.2, end=1.8, label=2, box=[0.0, 0.25, 0.5, 1.0], participants=[3, 0]),
            dict(start=0.0, end=1.25, label=1),
            dict(start=2.9, end=3.0, label=0),
        ],
    ),
    dict(id="b", path="b.mp4", end=3.0, labels={"tags": [], "kind": 0}, events=[]),
    dict(id="c", path="c.mp4", end=3.0, labels={"kind": 0}),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    for line in LINES:
        with av.open(str(folder / line["path"]), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
            for i in range(24):
                frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 10 * i, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    text.train_tokenizer(["one two who red ring blue a b c"]).save(str(folder / "tokenizer.json"))
    return folder


def data_of(folder, **changes) -> Data:
    fields = dict(labels=dict(kind=2), tags=dict(tags=3), targets=ASKED, text="{history} {question}", workers=0)
    return Data(str(folder / "all.jsonl"), str(folder / "tokenizer.json"), **{**fields, **changes})


def test_a_batch_carries_what_is_asked(folder):
    data = data_of(folder)
    tokenizer = text.load_tokenizer(data.tokenizer)
    found = list(evaluation_batches(data.train, data, CLIP, batch=4, views=EvaluationViews(stride=1.0)))
    batch = [
        np.concatenate(parts) for parts in zip(*((b.labels["tags"], b.targets["mood"], rows) for b, rows, _ in found))
    ]
    starts = np.concatenate([starts for *_, starts in found])
    assert batch[2][:9].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert starts[:9] == pytest.approx([0, 1, 2] * 3)
    assert batch[0][[0, 3, 6]].tolist() == [[1, 0, 1], [0, 0, 0], [-1, -1, -1]]
    assert batch[1][0] == np.float32(-0.5) and np.isnan(batch[1][3:]).all()
    first, second = found[0][0], found[1][0]
    said = [text.decode_ids(tokenizer, ids) for ids in first.inputs["text"]]
    assert said[0] == "a b c who" and said[3] == ""
    assert first.present["text"].tolist() == [True, True, True, False]
    assert text.decode_ids(tokenizer, first.targets["answer"][0]) == "red ring"
    assert [text.decode_ids(tokenizer, ids) for ids in first.targets["choices"][0]] == ["red", "blue", ""]
    assert (first.targets["answer"][3] == text.padding_id(tokenizer)).all()
    events = first.targets["events"]
    assert events["known"].tolist() == [True, True, True, True]
    assert second.targets["events"]["known"].tolist() == [True, True, False, False]
    # The first window holds 80 % of the second event; of the window from 1 s on, the first; the last holds the third.
    assert events["label"].tolist() == [[1, -1], [2, -1], [0, -1], [-1, -1]]
    assert events["start"][:3, 0] == pytest.approx([0.0, 0.2, 0.9], abs=1e-6)
    assert events["end"][:3, 0] == pytest.approx([1.0, 0.8, 1.0], abs=1e-6)
    assert events["box"][1, 0].tolist() == [0.0, 0.25, 0.5, 1.0] and np.isnan(events["box"][0]).all()
    assert events["participants"][1, 0].tolist() == [1, 0, 0, 1] and np.isnan(events["participants"][0]).all()


def test_events_follow_the_window_that_training_draws(folder):
    data = data_of(folder)
    loader = Loader(data, CLIP, Augment(window=True), seed=3, batch=3, start=0, stop=30)
    starts = []
    for batch in loader:
        for video, events, kind in zip(
            batch.inputs["video"], *(batch.targets["events"][k] for k in ("start", "label"))
        ):
            moments = events[kind == 2]
            if len(moments) and moments[0] > 0:
                # A picture's brightness tells its time: 10 a frame, 8 frames a second.
                begins = video[0].mean() / 80
                assert 1.2 - moments[0] == pytest.approx(begins, abs=0.2)
                starts.append(begins)
    assert len(set(starts)) > 2


def test_templates_take_what_a_row_has():
    row = Row("a", "a.mp4", None, None, ("seen",), {}, texts={"question": "who", "history": ["x", "y"], "empty": []})
    assert fill("{history} {question}", row, "seen") == "x y who"
    assert fill("{caption}!", row, "seen") == "seen!" and fill("{caption}", row, "") == ""
    assert fill("{empty} {question}", row, "") == "who"  # a dialogue that has just begun
    assert fill("{answer}", row, "seen") == ""


def test_a_curve_is_read_at_the_windows_moments():
    row = Row("a", "a", 2.0, 6.0, (), {}, curves={"x": [1, 2, 3, 4]})  # one a second, from second 2 on
    assert Curve("x", 4).read(row, 3.0, 2.0, None).tolist() == [2, 2, 3, 3]
    got = Curve("x", 2).read(row, 5.0, 2.0, None)
    assert got[0] == 4 and np.isnan(got[1])
    assert np.isnan(Curve("y", 2).read(row, 5.0, 2.0, None)).all()


def test_events_are_cut_and_counted():
    row = Row("a", "a", None, None, (), {}, events=(Event(5.0, 7.0, 0), Event(0.0, 2.5, 1), Event(2.0, 4.0, 0)))
    got = Events(2, most=2).read(row, 1.0, 4.5, None)  # 1.5 of 2.5 s; whole; 0.5 of 2 s
    assert got["label"].tolist() == [1, 0] and got["start"].tolist() == [0.0, 1.0] and got["end"].tolist() == [1.5, 3.0]
    assert Events(2, most=4, least=0.2).read(row, 1.0, 4.5, None)["label"].tolist() == [1, 0, 0, -1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tags=dict(tags=2)), r"data\.tags\.tags: 2 classes, but .*all\.jsonl has class 2"),
        (dict(tags={}, labels=dict(tags=3)), r"data\.labels\.tags: lists of classes in .*data\.tags"),
        (dict(tags=dict(kind=2)), r"data\.tags\.kind: stands in data\.labels too"),
        (dict(tags=dict(other=2)), r"data\.tags\.other: no clip"),
        (dict(targets=dict(x=dict(kind="value", of="moot"))), r"data\.targets\.x: no clip has values\.moot.*mood"),
        (dict(targets=dict(x=dict(kind="curve", of="moot"))), r"data\.targets\.x: no clip has curves\.moot"),
        (dict(targets=dict(x=dict(kind="text", of="{anser}"))), r"no clip has texts\.anser.*answer"),
        (dict(targets=dict(x=dict(kind="events", classes=2))), "2 classes, but clip 'a' has an event of 2"),
        (dict(targets=dict(x=dict(kind="events", classes=3, participants=2))), "2 kinds of participants.*'a' has 3"),
        (dict(targets=dict(x=dict(kind="choices", count=1))), "'a'.*list of at most 1"),
    ],
)
def test_what_the_dataset_does_not_have_is_one_line(folder, changes, message):
    with pytest.raises(UserError, match=message) as error:
        load_mixture(data_of(folder, **changes))
    assert "\n" not in str(error.value)


def test_what_is_asked_is_cut_with_the_clip():
    asked = dict(
        values={"mood": 1.0},
        texts={"question": "who", "subtitles": ["0.00 2.00 first", "3.50 4.00 second"]},
        events=[dict(start=1.0, end=3.0, label=0), dict(start=3.5, end=4.0, label=1, box=[0.0, 0.0, 1.0, 1.0])],
        curves={"x": [1, 2, 3, 4]},
    )
    got = cut(asked, 1.5, 4.0, (0.0, 4.0))
    assert got["events"] == [
        dict(start=0.0, end=1.5, label=0),
        dict(start=2.0, end=2.5, label=1, box=[0.0, 0.0, 1.0, 1.0]),
    ]
    assert got["texts"] == {"question": "who", "subtitles": ["2.00 2.50 second"]} and got["values"] == {"mood": 1.0}
    assert got["curves"] == {"x": [2, 3, 4]}  # of moments 1.5, 2.5 and 3.5
    assert cut(asked, 0.0, 4.0, (None, 4.0))["curves"] == asked["curves"]
    assert cut(asked, None, None, (None, None)) == asked | {"events": asked["events"]}
    assert cut(asked, 1.0, None, (None, None))["curves"] == {}


def test_a_build_keeps_what_is_asked(folder, tmp_path):
    _, entries, words = open_source(folder / "all.jsonl", None, {})
    build(entries, tmp_path / "built", Settings(words, Storage(cut="windows", seconds=1.5)), 1)
    rows = {row.id: row for row in read_manifest(tmp_path / "built" / "manifest.jsonl")}
    # Row "a" has a span of its own: it is stored whole, from 0 on.
    assert rows["a"].events == read_manifest(folder / "all.jsonl")[0].events
    assert rows["a"].texts["answer"] == "red ring" and rows["a"].values == {"mood": -0.5}
    assert rows["b"].events == () and rows["c"].events is None


def test_wrong_kinds_and_templates():
    with pytest.raises(UserError, match=r"data\.targets\.x.*value"):
        make_targets({"x": {"kind": "valu", "of": "mood"}})
    with pytest.raises(UserError, match="names no text"):
        Text("answer").check([], "data.targets.x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (dict(values={"x": "high"}), "values must be name → number"),
        (dict(texts={"x": 3}), "texts must be name → string"),
        (dict(texts={"caption": "x"}), "stands under the key `caption`"),
        (dict(curves={"x": []}), "curves must be name → list of numbers"),
        (dict(texts={"subtitles": ["0.5 words"]}), 'a list of "START END words"'),
        (dict(events={}), "events must be a list"),
        (dict(events=[dict(start=1, end=2)]), r"events\[0\]: an event has start, end, label"),
        (dict(events=[dict(start=2, end=2, label=0)]), "start before end"),
        (dict(events=[dict(start=1, end=2, label=-1)]), "class index"),
        (dict(events=[dict(start=1, end=2, label=0, box=[0, 0, 1, 1.1])]), "left before right"),
        (dict(events=[dict(start=1, end=2, label=0, box=[0, 0, 1])]), r"box is \[left"),
        (dict(events=[dict(start=1, end=2, label=0, participants=[0.5])]), "participants are class indices"),
    ],
)
def test_a_wrong_line_names_file_and_key(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(dict(path="a.mp4", **line)) + "\n")
    with pytest.raises(UserError, match=message) as error:
        read_manifest(path)
    assert "bad.jsonl, line 1" in str(error.value)
