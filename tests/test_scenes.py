"""Scenes: what the manifest tells of a clip is what stands in the file."""

import json

import numpy as np
import pytest

from vmm.data import media, scenes
from vmm.data.loader import evaluation_batches
from vmm.data.manifest import read_manifest
from vmm.data.samples import Clip, Data
from vmm.data.world import COLOURS, FPS, SIZE
from vmm.errors import UserError

SIZES = {"train": 6, "test": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    scenes.generate(folder, SIZES, seed=3)
    return folder


def decoded(row) -> media.Media:
    return media.decode(row.read(), pick=lambda duration: 0.0, seconds=8.0, frames=96, size=SIZE, sample_rate=16000)


def test_things_are_seen_when_and_where_the_events_say(folder):
    for row in read_manifest(folder / "train.jsonl"):
        clip = decoded(row)
        video = clip.video.astype(float)
        ground = np.median(video, axis=(0, 1, 2))
        there = np.abs(video - ground).max(-1) > 40  # [T H W]
        for frame in range(96):
            moment = (frame + 0.5) / FPS
            now = [event for event in row.events if event.start <= moment < event.end]
            if not now:
                assert there[frame].mean() < 0.003
        for event in row.events:
            mine = there[round(event.start * FPS) : round(event.end * FPS)].any(0)
            assert mine.any()
            y, x = np.nonzero(mine)
            seen = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            # A shape fills its circle up to a few pixels; H.264 blurs edges.
            for edge, found, outward in zip(event.box, seen, (-1, -1, 1, 1)):
                assert -8 <= outward * (found - edge * SIZE) <= 3, (row.id, event, seen)


def test_sound_is_heard_when_someone_plays(folder):
    for row in read_manifest(folder / "train.jsonl"):
        wave, rate = decoded(row).audio, 16000
        for event in row.events:
            middle = wave[round((event.start + 0.2) * rate) : round((event.end - 0.2) * rate)]
            heard = [one for one in event.participants if one >= len(scenes.SHAPES)]
            assert (np.sqrt(np.square(middle).mean()) > 0.02) == bool(heard)


def test_a_clips_words_agree_with_its_script():
    for number in range(30):
        events, row = scenes.script(7, number), scenes.row(7, number)
        assert len({(one.shape, one.colour) for one in events}) == len(events) == row["labels"]["count"] + 1
        assert all(0 <= one.start < one.end <= 8 for one in events)
        assert all(a.end + 0.15 <= b.start for a, b in zip(events, events[1:]))
        for one, line, event in zip(events, row["texts"]["subtitles"], row["events"]):
            start, end, words = line.split(" ", 2)
            assert (float(start), float(end)) == pytest.approx((event["start"], event["end"]), abs=0.006)
            assert one.who in words and scenes.ACTIONS[event["label"]] in words and words in row["caption"][0]
        curve = np.array(row["curves"]["importance"])
        assert (curve > 0).sum() * 0.5 == pytest.approx(sum(one.end - one.start for one in events), abs=1.5)
        warm = [1 if one.colour < len(COLOURS) // 2 else -1 for one in events]
        assert min(warm) <= row["values"]["mood"] <= max(warm)
        for asked in scenes.questions(7, number):
            texts = asked["texts"]
            assert texts["choices"][asked["labels"]["answer"]] == texts["answer"]
            assert len(set(texts["choices"])) == 4
        # What is asked of "it" cannot be told without what was said before.
        assert texts["history"][0].startswith("which shape comes") and "it" in texts["question"]


def test_every_task_finds_what_it_asks_for(folder):
    data = Data(
        str(folder / "train.jsonl"), str(folder / "tokenizer.json"), labels=scenes.LABELS, tags=scenes.TAGS,
        targets=dict(
            mood=dict(kind="value", of="mood"), importance=dict(kind="curve", of="importance"),
            events=dict(kind="events", classes=4, participants=12),
        ),
    )  # fmt: skip
    clip = Clip(seconds=8.0, frames=8, size=16, text_length=64)
    ((batch, _, _),) = evaluation_batches(data.train, data, clip, batch=6)
    rows = [scenes.row(3, number) for number in range(6)]
    assert batch.labels["count"].tolist() == [row["labels"]["count"] for row in rows]
    assert batch.labels["shapes"].sum(1).tolist() == [len(row["labels"]["shapes"]) for row in rows]
    assert batch.targets["mood"] == pytest.approx([row["values"]["mood"] for row in rows])
    assert batch.targets["importance"].tolist() == np.float32([row["curves"]["importance"] for row in rows]).tolist()
    assert (batch.targets["events"]["label"] >= 0).sum(1).tolist() == [len(row["events"]) for row in rows]
    data = Data(
        str(folder / "train_questions.jsonl"), data.tokenizer, labels=dict(answer=4), text="{history} {question}",
        targets=dict(answer=dict(kind="text", of="{answer}"), choices=dict(kind="choices")),
    )  # fmt: skip
    batch, rows, _ = next(evaluation_batches(data.train, data, clip, batch=6))
    right = batch.targets["choices"][np.arange(6), batch.labels["answer"]]
    assert np.array_equal(right, batch.targets["answer"][:, :16])
    assert len(rows) == 6 and batch.present["text"].all()


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    scenes.generate(tmp_path, SIZES, seed=3)
    for name in ("train.jsonl", "test_questions.jsonl", "train/00003.mp4", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    before = (tmp_path / "train.jsonl").stat().st_mtime_ns
    scenes.generate(tmp_path, SIZES, seed=3)
    assert (tmp_path / "train.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        scenes.generate(tmp_path, SIZES, seed=4)
    names = json.loads((tmp_path / "labels.json").read_text())
    assert names["events"] == list(scenes.ACTIONS) and len(names["participants"]) == 12
