"""Mixtures, buckets of length, addresses and views of a clip, through the loader: still a function of (seed, step)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import small_config, tiny_config
from test_loader import CLIP, PLAIN, RANDOM, assert_same, batches, heard, order, tone_data, write_manifest, write_tone

from vmm.data import text
from vmm.data.loader import Loader, evaluation_batches, train_digests
from vmm.data.manifest import Row, read_manifest
from vmm.data.samples import Clip, Data, EvaluationViews, Samples
from vmm.errors import UserError
from vmm.evaluate import mean_of_views
from vmm.experiment import Experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tones 0 to 7 in high.jsonl, 8 to 11 in low.jsonl, one of them broken in broken.jsonl."""
    folder = tmp_path_factory.mktemp("mixture")
    for number in range(12):
        write_tone(folder / f"{number}.wav", number)
    lines = [{"id": f"t{n}", "path": f"{n}.wav", "caption": "a tone", "labels": {"number": n}} for n in range(12)]
    write_manifest(folder / "high.jsonl", lines[:8])
    write_manifest(folder / "low.jsonl", lines[8:])
    (folder / "bad.wav").write_bytes(b"RIFF nothing")
    write_manifest(folder / "broken.jsonl", [*lines[8:10], lines[10] | {"path": "bad.wav"}, lines[11]])
    text.train_tokenizer(["a tone sounds low and high"] * 3, 300).save(str(folder / "tokenizer.json"))
    return folder


def mixed(folder: Path, weights=(3.0, 1.0), low: str = "low.jsonl", **changes) -> Data:
    train = {
        "high": dict(manifest=str(folder / "high.jsonl"), weight=weights[0]),
        "low": dict(manifest=str(folder / low), weight=weights[1]),
    }
    return Data(
        **(dict(train=train, tokenizer=str(folder / "tokenizer.json"), labels={"number": 12}, workers=0) | changes)
    )


def test_a_mixture_draws_by_weight(folder):
    numbers = np.array(order(batches(mixed(folder), batch=20, stop=30)))
    assert np.mean(numbers < 8) == pytest.approx(0.75, abs=0.04)
    # Small datasets are repeated whole before any clip comes again.
    _, counts = np.unique(numbers[numbers >= 8], return_counts=True)
    assert len(counts) == 4


def test_a_sample_is_of_the_dataset_that_it_says(folder):
    for batch in batches(mixed(folder), stop=4):
        assert [heard(wave) for wave in batch.inputs["audio"]] == batch.labels["number"].tolist()


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_workers_do_not_matter(folder, workers):
    straight = batches(mixed(folder), augment=RANDOM, stop=6)
    assert_same(batches(mixed(folder, workers=workers, threads=1), augment=RANDOM, stop=6), straight)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_and_resuming_do_not_matter(folder, hosts):
    straight = batches(mixed(folder), augment=RANDOM, stop=8)
    parts = [batches(mixed(folder), augment=RANDOM, start=3, stop=8, host=host, hosts=hosts) for host in range(hosts)]
    for step, whole in enumerate(straight[3:]):
        for name in ("audio", "text"):
            assert np.array_equal(np.concatenate([part[step].inputs[name] for part in parts]), whole.inputs[name])


def test_a_bad_file_is_replaced_from_its_own_dataset_and_moves_nothing(folder):
    good, bad = (order(batches(mixed(folder, low=name, budget=0.5), stop=30)) for name in ("low.jsonl", "broken.jsonl"))
    assert 10 in good
    for one, two in zip(good, bad):
        assert (one == two) if one != 10 else two in (8, 9, 11)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({}, "no dataset"),
        ({"a": {"manifest": "x.jsonl"}}, "data.train.a.weight: missing"),
        ({"a": {"manifest": "x.jsonl", "weight": 0.0}}, "data.train.a.weight: must be above 0"),
        ({"a": {"manifest": "x.jsonl", "weight": 1.0, "size": 3}}, "data.train.a.size: no such key"),
    ],
)
def test_a_mixture_that_is_wrong(folder, train, words):
    with pytest.raises(UserError) as error:
        Loader(mixed(folder, train=train), CLIP, PLAIN, seed=0, batch=4, start=0, stop=1)
    assert words in str(error.value)


def test_a_mixture_is_quoted_by_the_digest_of_each_manifest(folder):
    told = train_digests(mixed(folder).train)
    assert list(told) == [str(folder / "high.jsonl"), str(folder / "low.jsonl")]
    assert len(set(told.values())) == 2
    assert train_digests("no.jsonl") == {"no.jsonl": None}


# Buckets.


@pytest.fixture(scope="module")
def lengths(folder) -> Path:
    """The tones as clips of 0.03 s (0 to 3), 0.06 s (4 to 7) and 0.1 s (8 to 11), the last told by the build."""
    lines = []
    for n in range(12):
        line = {"id": f"t{n}", "path": f"{n}.wav", "labels": {"number": n}}
        span = {"start": 0.02, "end": 0.05 if n < 4 else 0.08} if n < 8 else {"media": {"duration": 0.1}}
        lines.append(line | span)
    return write_manifest(folder / "lengths.jsonl", lines)


BUCKETS = (dict(seconds=0.03, frames=1), dict(seconds=0.06, frames=2), dict(seconds=0.1, frames=4))


def test_a_batch_is_of_one_length_and_each_clip_is_in_its_bucket(folder, lengths):
    data = mixed(folder, train=str(lengths), buckets=BUCKETS)
    got = batches(data, stop=60)
    seen = {}
    for batch in got:
        shape = batch.inputs["audio"].shape[1], batch.inputs["video"].shape[1]
        seen.setdefault(shape, set()).update(batch.labels["number"].tolist())
    assert seen == {(480, 1): {0, 1, 2, 3}, (960, 2): {4, 5, 6, 7}, (1600, 4): {8, 9, 10, 11}}
    assert_same(batches(data, start=17, stop=30), got[17:30])
    assert_same(batches(dataclasses.replace(data, workers=2, threads=1), stop=12), got[:12])


def test_a_bucket_without_clips_has_no_batches(folder, lengths):
    data = mixed(folder, train=str(lengths), buckets=(dict(seconds=0.05, frames=1), dict(seconds=9.0, frames=2)))
    assert {batch.inputs["audio"].shape[1] for batch in batches(data, stop=8)} == {800}


@pytest.mark.parametrize(
    ("buckets", "words"),
    [
        ((dict(seconds=2.0, frames=2), dict(seconds=1.0, frames=2)), "ascend"),
        ((dict(seconds=2.0),), "seconds and frames"),
    ],
)
def test_buckets_that_are_wrong(world_folder, buckets, words):
    config = small_config(world_folder)
    config["data"]["buckets"] = buckets
    with pytest.raises(UserError, match=r"data\.buckets") as error:
        Experiment(config)
    assert words in str(error.value)


def test_a_run_trains_in_buckets_and_compiles_once_for_each(world_folder, tmp_path):
    import jax

    from vmm.sharding import MeshShape, make_mesh, to_device

    lines = [json.loads(line) for line in (world_folder / "train.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {"path": str(world_folder / line["path"]), "end": 1.0 if number % 2 else 2.0}
    config = tiny_config(world_folder)
    config["data"] |= {
        "train": str(write_manifest(tmp_path / "m.jsonl", lines)),
        "buckets": (dict(seconds=1.0, frames=2), dict(seconds=2.0, frames=4)),
    }
    config["optim"]["warmup"] = 1
    experiment, mesh = Experiment(config), make_mesh(MeshShape(data=8))
    program = experiment.program(mesh)
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(0))
        loader = Loader(experiment.data, experiment.clip, experiment.augment, seed=0, batch=16, start=0, stop=6)
        shapes, losses = set(), []
        for batch in loader:
            shapes.add(batch.inputs["video"].shape)
            state, metrics = program.step(state, to_device(batch, mesh))
            losses.append(float(metrics["loss"]))
        loader.close()
    assert len(shapes) == 2
    assert program.step._cache_size() == 2
    assert np.isfinite(losses).all()


# Views of a clip, in evaluation.


def test_views_lie_evenly():
    row = Row("a", "a.mp4", 1.0, 11.0, (), {})
    assert EvaluationViews().places(row, 2.0) == [(0.5, 0.5)]
    places = EvaluationViews(clips=2, crops=3).places(row, 2.0)
    assert places == [(0.25, 0.0), (0.25, 0.5), (0.25, 1.0), (0.75, 0.0), (0.75, 0.5), (0.75, 1.0)]
    with pytest.raises(UserError, match=r"data\.evaluation"):
        EvaluationViews(clips=0)


def test_views_without_the_stream_say_nothing():
    """A clip of three windows, of which the middle one is silent, and one of two that are."""
    values = {
        "row": np.array([0, 0, 0, 1, 1]), "present/audio": np.array([True, False, True, False, False]),
        "present/video": np.ones(5, bool), "numbers/mood": np.array([0.8, np.nan, 0.6, 0.0, 0.2]),
        "label/x": np.array([3, 3, 3, 4, 4]), "start": np.array([0.0, 2, 4, 0, 2], np.float32),
    }  # fmt: skip
    got = mean_of_views(values, ("audio",))
    assert got["numbers/mood"] == pytest.approx([0.7, 0.1]) and got["present/audio"].tolist() == [True, False]
    assert got["label/x"].tolist() == [3, 4] and got["start"].tolist() == [0, 0]
    values["numbers/mood"][1] = 0.1
    assert mean_of_views(values, ("video", "audio"))["numbers/mood"] == pytest.approx([0.5, 0.1])


def test_windows_overlap_as_far_as_a_long_clip_goes():
    views = EvaluationViews(stride=3.0)

    def starts(end: float) -> list[float]:
        places = views.places(Row("a", "a.mp4", 1.0, end, (), {}), 4.0)
        return [1.0 + window * max(0.0, end - 1.0 - 4.0) for window, _ in places]

    assert starts(3.0) == [1.0]  # shorter than a window
    assert starts(11.0) == pytest.approx([1.0, 4.0, 7.0])
    assert starts(12.0) == pytest.approx([1.0, 4.0, 7.0, 8.0])  # the last one at the end
    with pytest.raises(UserError, match=r"stride.*a\.mp4 does not tell how long"):
        views.places(Row("a", "a.mp4", None, None, (), {}), 4.0)
    with pytest.raises(UserError, match="in place of clips"):
        EvaluationViews(clips=2, stride=1.0)


def test_evaluation_goes_through_every_view_of_every_clip(folder):
    data = mixed(folder)
    clip = Clip(seconds=0.02, frames=1, size=8, text_length=8)
    views = EvaluationViews(clips=3, crops=2)
    pieces = list(evaluation_batches(folder / "high.jsonl", data, clip, batch=10, views=views))
    rows = np.concatenate([rows[batch.valid] for batch, rows, _ in pieces])
    assert rows.tolist() == [row for row in range(8) for _ in range(6)]
    audio = np.concatenate([batch.inputs["audio"][batch.valid] for batch, *_ in pieces]).reshape(8, 3, 2, -1)
    assert np.array_equal(audio[:, :, 0], audio[:, :, 1])  # a crop does not change the sound
    samples = Samples(read_manifest(folder / "high.jsonl"), data, Clip(seconds=0.1, frames=1, size=8), None, 0)
    whole = samples.view(5, 0.5, 0.5)["audio"]
    for number, start in enumerate((0.08 / 6, 0.04, 0.08 * 5 / 6)):
        first = round(start * 16000)
        # The first samples come out of the resampler's own beginning.
        assert np.allclose(audio[5, number, 0][32:], whole[first + 32 : first + 320], atol=1e-3)


def test_crops_go_along_the_longer_side(tmp_path, folder):
    from test_media import grey, numbers, write

    wide = np.concatenate([grey(2, 48, 48), grey(9, 48, 48), grey(5, 48, 48)], 1)
    write(tmp_path / "wide.mp4", [wide] * 20)
    write(tmp_path / "tall.mp4", [wide.transpose(1, 0, 2)] * 20)
    manifest = write_manifest(tmp_path / "m.jsonl", [{"path": "wide.mp4"}, {"path": "tall.mp4"}])
    data = mixed(folder, train=str(manifest), labels={})
    clip = Clip(seconds=0.5, frames=1, size=48, text_length=8)
    (batch, *_), *_ = evaluation_batches(manifest, data, clip, batch=6, views=EvaluationViews(crops=3))
    assert numbers(batch.inputs["video"][:, 0]) == [2, 9, 5, 2, 9, 5]


def test_views_are_averaged_and_labels_are_not():
    values = {
        "row": np.array([0, 0, 0, 2, 2]),
        "labels/kind": np.array([[1.0, 3], [2, 5], [6, 1], [1, 1], [0, 3]], np.float32),
        "label/kind": np.array([4, 4, 4, 7, 7]),
        "present/video": np.array([True, True, True, False, False]),
    }
    got = mean_of_views(values, ("video",))
    assert got["row"].tolist() == [0, 2]
    assert got["labels/kind"].tolist() == [[3, 3], [0.5, 2]]
    assert got["labels/kind"].dtype == np.float32
    assert got["label/kind"].tolist() == [4, 7]
    assert got["present/video"].tolist() == [True, False]


# Addresses.


def test_addresses_need_the_option(folder, tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"path": f"file://{folder}/0.wav"}])
    with pytest.raises(UserError, match=r"line 1: file://.*data\.remote"):
        read_manifest(manifest)
    with pytest.raises(UserError, match=r"file://.*data\.remote"):
        read_manifest(f"file://{folder}/high.jsonl")


def test_a_manifest_at_an_address_names_clips_beside_it(folder, tmp_path):
    address = f"file://{folder}/high.jsonl"
    assert_same(
        batches(mixed(folder, train=address, remote=str(tmp_path / "kept"))),
        batches(mixed(folder, train=str(folder / "high.jsonl"))),
    )
    assert not (tmp_path / "kept").exists()  # single files are read where they are


def test_a_shard_at_an_address_is_fetched_once(folder, tmp_path):
    import hashlib

    from vmm.data.shards import write_shard

    files = [(folder / f"{number}.wav").read_bytes() for number in range(4)]
    write_shard(tmp_path / "s.arrayrecord", files)
    lines = [
        {"path": "s.arrayrecord", "record": n, "sha256": hashlib.sha256(data).hexdigest(), "labels": {"number": n}}
        for n, data in enumerate(files)
    ]
    for n, line in enumerate(lines):
        line["id"] = f"t{n}"
    write_manifest(tmp_path / "m.jsonl", lines)
    data = mixed(folder, train=f"file://{tmp_path}/m.jsonl", remote=str(tmp_path / "kept"))
    for batch in batches(data, stop=3):
        assert [heard(wave) for wave in batch.inputs["audio"]] == batch.labels["number"].tolist()
    (kept,) = (tmp_path / "kept").iterdir()
    (tmp_path / "s.arrayrecord").unlink()
    assert len(batches(data, stop=3)) == 3
    assert kept.name.endswith("-s.arrayrecord")


def test_nothing_at_an_address(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl"):
        read_manifest(f"file://{tmp_path}/nowhere.jsonl", remote=True)
    with pytest.raises(UserError, match="nosuch"):
        read_manifest("nosuch://bucket/m.jsonl", remote=True)
    manifest = write_manifest(
        tmp_path / "m.jsonl", [{"path": f"file://{tmp_path}/{n}.wav", "id": str(n)} for n in range(3)]
    )
    with pytest.raises(UserError, match="missing"):
        batches(mixed(folder, train=str(manifest), labels={}, remote=str(tmp_path / "kept")))
    assert tone_data(folder, "high.jsonl", labels={}).remote == ""


# Only what a model takes.


def test_what_a_model_does_not_take_is_not_decoded_and_absent(world_folder):
    from test_loader import WORLD_CLIP, world_data

    rows = read_manifest(world_folder / "train.jsonl")
    whole = Samples(rows, world_data(world_folder), WORLD_CLIP, RANDOM, 0)
    for modalities in (("video",), ("audio", "text"), ("text",)):
        some = Samples(rows, world_data(world_folder), WORLD_CLIP, dataclasses.replace(RANDOM, drop=0.0), 0, modalities)
        every = Samples(rows, world_data(world_folder), WORLD_CLIP, dataclasses.replace(RANDOM, drop=0.0), 0)
        for row in range(24):  # some have no sound, some no caption
            one, two = some(0, 1, row), every(0, 1, row)
            assert one["failed"] == -1
            for name in ("video", "audio", "text"):
                if name in modalities:
                    assert np.array_equal(one[name], two[name])
                    assert one["present"][name] == two["present"][name]
                else:
                    assert not one["present"][name]
                    assert not one[name].any()
    assert whole.modalities == ("video", "audio", "text")


def test_a_text_model_opens_no_file(folder):
    rows = read_manifest(folder / "broken.jsonl")
    samples = Samples(rows, mixed(folder), CLIP, PLAIN, 0, ("text",))
    assert [int(samples(0, 0, row)["failed"]) for row in range(4)] == [-1] * 4
    video = Samples(rows, mixed(folder), CLIP, PLAIN, 0, ("video",))
    assert [int(video(0, 0, row)["failed"]) for row in range(4)] == [-1, -1, 2, -1]  # a broken file is still one
