"""Manifest → batches: a pure function of (seed, step), whatever the workers, hosts, caches and broken files."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from vmm.data import media, text
from vmm.data.account import bad_list, bad_summary, remark_summary
from vmm.data.loader import Loader, evaluation_batches, load_mixture
from vmm.data.manifest import manifest_digest, read_manifest
from vmm.data.order import position_to_sample
from vmm.data.samples import Augment, Clip, Data, Samples
from vmm.errors import DataBudgetError, UserError
from vmm.types import Batch

COUNT = 17
CLIP = Clip(seconds=0.1, frames=1, size=8, text_length=24)
WORLD_CLIP = Clip(seconds=2.0, frames=4, size=24, text_length=48)
PLAIN = Augment(window=False, caption=False)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def spelt(number: int) -> str:
    return f"{WORDS[number // 10]} {WORDS[number % 10]}"


def heard(audio: np.ndarray) -> int:
    """Reads a clip's number from the pitch of its sound: 300 Hz and 100 Hz for each number."""
    spectrum = np.abs(np.fft.rfft(audio))
    return round((spectrum.argmax() * 16000 / len(audio) - 300) / 100)


def write_tone(path: Path, number: int) -> None:
    wave = 12000 * np.sin(2 * np.pi * (300 + 100 * number) * np.arange(1600) / 16000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def tones(tmp_path_factory) -> Path:
    """17 short sounds: each clip's number is in its pitch, in both its captions and in its label."""
    folder = tmp_path_factory.mktemp("tones")
    lines = []
    for number in range(COUNT):
        write_tone(folder / f"{number}.wav", number)
        caption = [f"number {spelt(number)}", f"the tone of {spelt(number)} sounds"]
        lines.append({"id": f"t{number}", "path": f"{number}.wav", "caption": caption, "labels": {"number": number}})
    write_manifest(folder / "all.jsonl", lines)
    phrases = [phrase for line in lines for phrase in line["caption"]]
    text.train_tokenizer(phrases, 400).save(str(folder / "tokenizer.json"))
    return folder


def write_manifest(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tone_data(folder: Path, manifest: str | Path = "all.jsonl", **changes) -> Data:
    settings = dict(labels={"number": COUNT}, workers=0, threads=2, prefetch=2) | changes
    return Data(train=str(folder / manifest), tokenizer=str(folder / "tokenizer.json"), **settings)


def world_data(folder: Path, split: str = "train", **changes) -> Data:
    settings = dict(labels={"shape": 6, "colour": 8, "pitch": 8, "sync": 2}, workers=0, threads=2, prefetch=2) | changes
    return Data(train=str(folder / f"{split}.jsonl"), tokenizer=str(folder / "tokenizer.json"), **settings)


def batches(data: Data, clip: Clip = CLIP, augment: Augment = PLAIN, **where) -> list[Batch]:
    """Every batch that a loader gives from start to stop."""
    loader = Loader(data, clip, augment, **(dict(seed=3, batch=4, start=0, stop=10) | where))
    try:
        return list(loader)
    finally:
        loader.close()


def arrays(batch: Batch) -> dict[str, np.ndarray]:
    """The batch as one flat dict."""
    flat = {"index": batch.index, "valid": batch.valid}
    for group in ("inputs", "present", "labels"):
        flat |= {f"{group}.{name}": value for name, value in getattr(batch, group).items()}
    return flat


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for step, (one, two) in enumerate(zip(ours, theirs)):
        one, two = arrays(one), arrays(two)
        assert one.keys() == two.keys()
        for name in one:
            assert one[name].dtype == two[name].dtype
            assert np.array_equal(one[name], two[name]), f"step {step}: {name}"


def order(batches: list[Batch]) -> list[int]:
    return [int(number) for batch in batches for number in batch.labels["number"]]


# The order.


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 100])
def test_each_epoch_holds_each_row_once(size):
    for seed in (0, 7):
        for epoch in range(4):
            places = [position_to_sample(epoch * size + i, size, seed) for i in range(size)]
            assert {place[0] for place in places} == {epoch}
            assert sorted(place[1] for place in places) == list(range(size))


def test_the_order_differs_between_epochs_and_seeds():
    def epoch(number: int, seed: int) -> list[int]:
        return [position_to_sample(number * 100 + i, 100, seed)[1] for i in range(100)]

    orders = [epoch(number, seed) for number in range(3) for seed in range(3)]
    assert len({tuple(one) for one in orders}) == 9
    assert list(range(100)) not in orders
    for one in orders[1:]:  # and they have little in common: about one place of 100 by chance
        assert sum(a == b for a, b in zip(orders[0], one)) < 12


def test_batches_follow_the_order(tones):
    got = batches(tone_data(tones), stop=9)
    assert order(got) == [position_to_sample(i, COUNT, 3)[1] for i in range(36)]
    assert [int(i) for batch in got for i in batch.index] == list(range(36))
    assert sorted(order(got)[:COUNT]) == list(range(COUNT))
    assert sorted(order(got)[COUNT : 2 * COUNT]) == list(range(COUNT))


def test_a_batch_has_its_shapes_and_types(world_folder):
    batch = batches(world_data(world_folder), WORLD_CLIP, stop=1)[0]
    assert batch.inputs["video"].shape == (4, 4, 24, 24, 3)
    assert batch.inputs["video"].dtype == np.uint8
    assert batch.inputs["audio"].shape == (4, 32000)
    assert batch.inputs["audio"].dtype == np.float32
    assert batch.inputs["text"].shape == (4, 48)
    assert batch.inputs["text"].dtype == np.int32
    assert {name: (value.shape, value.dtype) for name, value in batch.present.items()} == dict.fromkeys(
        ("video", "audio", "text"), ((4,), np.dtype(bool))
    )
    assert {name: value.dtype for name, value in batch.labels.items()} == dict.fromkeys(
        ("shape", "colour", "pitch", "sync"), np.dtype(np.int32)
    )
    assert batch.index.dtype == np.int32
    assert batch.valid.all()


def test_no_steps_give_no_batches(tones):
    assert batches(tone_data(tones), start=5, stop=5) == []
    assert batches(tone_data(tones), start=6, stop=5) == []


def test_a_dataset_smaller_than_a_batch(tones):
    manifest = write_manifest(tones / "one.jsonl", [json.loads((tones / "all.jsonl").read_text().splitlines()[5])])
    assert order(batches(tone_data(tones, manifest), stop=2)) == [5] * 8


# What must not matter.

RANDOM = Augment(area=(0.5, 1.0), flip=True, drop=0.3)


@pytest.fixture(scope="module")
def straight(tones) -> list[Batch]:
    """10 batches of 4 over 17 clips (two epoch boundaries), everything random on."""
    return batches(tone_data(tones, threads=1, prefetch=0), augment=RANDOM)


@pytest.mark.parametrize("prefetch", [0, 2, 8])
@pytest.mark.parametrize("threads", [1, 4])
def test_threads_and_prefetch_do_not_matter(tones, straight, threads, prefetch):
    assert_same(batches(tone_data(tones, threads=threads, prefetch=prefetch), augment=RANDOM), straight)


def test_worker_processes_do_not_matter(tones, straight):
    assert_same(batches(tone_data(tones, workers=2, threads=1), augment=RANDOM), straight)
    assert_same(batches(tone_data(tones, workers=3, threads=1), augment=RANDOM, start=3), straight[3:])


def test_the_cache_does_not_matter(tones, world_folder):
    for size in (0, 7000, 1 << 30):  # none, a part of the clips, all
        assert_same(batches(tone_data(tones, cache=size)), batches(tone_data(tones)))
    for augment in (Augment(), Augment(area=(0.5, 1.0), flip=True)):
        where = dict(clip=WORLD_CLIP, augment=augment, batch=16, stop=7)
        assert_same(
            batches(world_data(world_folder, cache=1 << 30), **where), batches(world_data(world_folder), **where)
        )


def test_the_cache_saves_decoding(tones, monkeypatch):
    calls = []
    real = media.decode
    monkeypatch.setattr(media, "decode", lambda path, **more: calls.append(path) or real(path, **more))
    batches(tone_data(tones, cache=1 << 30, threads=1), stop=17)
    assert len(calls) == COUNT
    calls.clear()
    batches(tone_data(tones, threads=1), stop=17)
    assert len(calls) == 4 * COUNT


def test_the_cache_keeps_to_its_limit(tones):
    rows = read_manifest(tones / "all.jsonl")
    one = CLIP.samples * 4
    samples = Samples(rows, tone_data(tones, cache=3 * one + 5), CLIP, PLAIN, 0)
    for row in range(COUNT):
        samples(row, 0, row)
    assert samples.cache.used == 3 * one
    assert len(samples.cache.kept) == 3


def test_a_longer_clip_is_cut_anew_although_a_cache_is_on(tmp_path, tones):
    # A window that can move must not be frozen by the cache.
    path = tmp_path / "long.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        ramp = np.arange(32000).astype(np.int16)[None]  # the level tells the time
        frame = av.AudioFrame.from_ndarray(ramp, format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    manifest = write_manifest(tmp_path / "m.jsonl", [{"path": "long.wav", "labels": {"number": 0}}])
    data = Data(str(manifest), str(tones / "tokenizer.json"), labels={"number": 1}, workers=0, cache=1 << 30)
    got = batches(data, augment=Augment(window=True), stop=3)
    levels = {round(float(wave.mean()), 4) for batch in got for wave in batch.inputs["audio"]}
    assert len(levels) > 6
    middle = batches(data, augment=PLAIN, stop=1)[0].inputs["audio"]
    assert np.array_equal(middle[0], middle[1])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_the_one_batch(tones, straight, hosts):
    parts = [batches(tone_data(tones), augment=RANDOM, host=host, hosts=hosts) for host in range(hosts)]
    for step, whole in enumerate(straight):
        pieces = [arrays(part[step]) for part in parts]
        for name, value in arrays(whole).items():
            assert np.array_equal(np.concatenate([piece[name] for piece in pieces]), value), f"step {step}: {name}"


def test_a_batch_that_does_not_divide_over_hosts_is_an_error(tones):
    with pytest.raises(UserError, match="4 clips do not divide over 3 hosts"):
        Loader(tone_data(tones), CLIP, PLAIN, seed=0, batch=4, start=0, stop=1, hosts=3)


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_resumed_run_goes_on_as_the_straight_one(tones, straight, cut):
    assert_same(batches(tone_data(tones), augment=RANDOM, start=cut), straight[cut:])
    assert_same(batches(tone_data(tones, prefetch=8), augment=RANDOM, stop=cut), straight[:cut])


def test_resuming_on_other_hosts_keeps_the_order(tones, straight):
    parts = [batches(tone_data(tones), augment=RANDOM, start=4, host=host, hosts=4) for host in range(4)]
    for step, whole in enumerate(straight[4:]):
        assert [int(part[step].labels["number"][0]) for part in parts] == whole.labels["number"].tolist()


def test_the_seed_matters(tones, straight):
    other = batches(tone_data(tones), augment=RANDOM, seed=4)
    assert order(other) != order(straight)


# The randomness of a sample.


@pytest.fixture(scope="module")
def world_samples(world_folder):
    """A function of the augmentation: Samples over the small world."""
    rows = read_manifest(world_folder / "train.jsonl")
    data = world_data(world_folder)
    return lambda augment, seed=0, some=rows: Samples(some, data, WORLD_CLIP, augment, seed)


def test_a_sample_is_a_function_of_seed_epoch_and_row(world_samples):
    one, two = world_samples(RANDOM), world_samples(RANDOM)
    for row in (0, 5, 11):
        ours = one(100, 2, row)
        two(7, 1, row + 1)  # what was drawn in between is of no matter
        theirs = two(100, 2, row)
        for name in ("video", "audio", "text"):
            assert np.array_equal(ours[name], theirs[name])
        assert ours["present"] == theirs["present"]


def test_neighbours_do_not_matter(world_samples, world_folder):
    rows = read_manifest(world_folder / "train.jsonl")
    other = [*rows[:3], rows[3], *reversed(rows[4:])]
    ours, theirs = world_samples(RANDOM)(0, 1, 3), world_samples(RANDOM, some=other)(0, 1, 3)
    for name in ("video", "audio", "text"):
        assert np.array_equal(ours[name], theirs[name])


def test_the_draw_differs_by_epoch_and_by_seed(world_samples):
    rows = range(12)
    base = world_samples(Augment(area=(0.4, 1.0), flip=True))
    first = [base(0, 0, row)["video"] for row in rows]
    for samples, epoch in ((base, 1), (world_samples(Augment(area=(0.4, 1.0), flip=True), 1), 0)):
        again = [samples(0, epoch, row)["video"] for row in rows]
        assert not any(np.array_equal(a, b) for a, b in zip(first, again))


def test_samples_of_one_epoch_are_drawn_apart(world_samples):
    flips = []
    plain, mirrored = world_samples(PLAIN), world_samples(Augment(window=False, caption=False, flip=True))
    for row in range(48):
        a, b = plain(0, 0, row)["video"], mirrored(0, 0, row)["video"]
        assert np.array_equal(b, a) or np.array_equal(b, a[:, :, ::-1])
        flips.append(not np.array_equal(a, b))
    assert 10 <= sum(flips) <= 38  # half of them: 24 ± 14 is four deviations


def test_all_off_gives_the_middle_and_the_first_caption(world_samples, world_folder):
    samples = world_samples(PLAIN)
    tokenizer = text.load_tokenizer(world_folder / "tokenizer.json")
    for row in range(6):
        one = samples(0, 0, row)
        assert np.array_equal(one["video"], samples(0, 9, row)["video"])
        if samples.rows[row].captions:
            assert text.decode_ids(tokenizer, one["text"]) == samples.rows[row].captions[0].lower()


def test_captions_are_drawn_among_the_phrasings(world_samples, world_folder):
    samples = world_samples(Augment())
    tokenizer = text.load_tokenizer(world_folder / "tokenizer.json")
    row = next(i for i, item in enumerate(samples.rows) if len(item.captions) == 4)
    known = [caption.lower() for caption in samples.rows[row].captions]
    drawn = [text.decode_ids(tokenizer, samples(0, epoch, row)["text"]) for epoch in range(24)]
    assert set(drawn) == set(known)


def test_a_random_crop_keeps_at_least_its_share(world_samples, monkeypatch):
    crops = []
    real = media.decode
    monkeypatch.setattr(media, "decode", lambda path, **more: crops.append(more["crop"]) or real(path, **more))
    samples = world_samples(Augment(area=(0.6, 1.0)))
    for epoch in range(40):
        samples(0, epoch, 0)
    scales = [crop.area for crop in crops]
    assert 0.6 <= min(scales) < 0.7
    assert 0.9 < max(scales) <= 1.0
    assert all(0 <= crop.y <= 1 and 0 <= crop.x <= 1 and not crop.flip for crop in crops)
    stretches = [crop.aspect for crop in crops]
    assert 3 / 4 <= min(stretches) < 0.85
    assert 1.2 < max(stretches) <= 4 / 3
    assert abs(np.corrcoef(scales, stretches)[0, 1]) < 0.5
    assert max(crop.x for crop in crops) > 0.8
    assert min(crop.x for crop in crops) < 0.2


@pytest.mark.parametrize("drop", [0.5, 0.9, 1.0])
def test_dropping_never_withholds_everything(world_samples, drop):
    samples, whole = world_samples(Augment(drop=drop)), world_samples(PLAIN)
    withheld = there = 0
    for row in range(24):
        full = whole(0, 0, row)
        for epoch in range(3):
            sample = samples(0, epoch, row)
            assert any(sample["present"].values())
            for name in ("video", "audio", "text"):
                if sample["present"][name]:
                    assert full["present"][name]  # nothing appears that is not there
                    assert sample[name].any()
                else:
                    assert not sample[name].any()  # and nothing of a withheld stream leaks
                there += bool(full["present"][name])
                withheld += bool(full["present"][name]) and not sample["present"][name]
    assert abs(withheld / there - min(drop, 0.66)) < 0.15


def test_one_option_does_not_move_the_draws_of_another(world_samples):
    plain, cropped = world_samples(Augment(drop=0.5)), world_samples(Augment(drop=0.5, area=(0.5, 1.0), flip=True))
    for row in range(12):
        one, two = plain(0, 1, row), cropped(0, 1, row)
        assert one["present"] == two["present"]
        assert np.array_equal(one["text"], two["text"])


# Presence and labels.


def test_presence_and_labels_are_those_of_the_manifest(world_folder):
    lines = [json.loads(line) for line in (world_folder / "train.jsonl").read_text().splitlines()]
    got = batches(world_data(world_folder), WORLD_CLIP, batch=16, stop=3)
    rows = [position_to_sample(i, 48, 3)[1] for i in range(48)]
    place = 0
    for batch in got:
        for i in range(16):
            line = lines[rows[place]]
            mute = "pitch" not in line["labels"]
            assert bool(batch.present["audio"][i]) != mute
            assert bool(batch.present["text"][i]) == bool(line["caption"])
            assert batch.present["video"][i]
            assert batch.inputs["audio"][i].any() != mute
            assert batch.inputs["text"][i].any() == bool(line["caption"])
            for name, values in batch.labels.items():
                assert values[i] == line["labels"].get(name, -1)
            place += 1
    assert not all(bool(batch.present["audio"].all()) for batch in got)
    assert not all(bool(batch.present["text"].all()) for batch in got)


def test_captions_never_drift_from_their_clips(world_folder):
    names = json.loads((world_folder / "labels.json").read_text())
    tokenizer = text.load_tokenizer(world_folder / "tokenizer.json")
    told = 0
    for batch in batches(world_data(world_folder), WORLD_CLIP, Augment(flip=True, drop=0.2), batch=12, stop=8):
        for i, ids in enumerate(batch.inputs["text"]):
            words = text.decode_ids(tokenizer, ids).replace(",", " ").split()
            assert bool(words) == bool(batch.present["text"][i])
            if words:
                told += 1
                for name in ("shape", "colour"):
                    assert [names[name].index(word) for word in words if word in names[name]] == [batch.labels[name][i]]
                pitches = [value.lower() for value in names["pitch"]]
                said = [pitches.index(word) for word in words if word in pitches]
                assert (said or [-1]) == [batch.labels["pitch"][i]]
    assert told > 50


# Broken files.


@pytest.fixture
def broken(tones, tmp_path) -> Path:
    """The same 17 clips, of which three give nothing: an HTML page, an empty file and no file."""
    lines = [json.loads(line) for line in (tones / "all.jsonl").read_text().splitlines()]
    (tmp_path / "page.wav").write_text("<html>404</html>")
    (tmp_path / "empty.wav").write_bytes(b"")
    for number, line in enumerate(lines):
        line["path"] = {2: "page.wav", 7: "empty.wav", 11: "none.wav"}.get(number, str(tones / line["path"]))
    (tmp_path / "tokenizer.json").write_bytes((tones / "tokenizer.json").read_bytes())
    write_manifest(tmp_path / "all.jsonl", lines)
    return tmp_path


def test_a_bad_file_moves_nothing_else(tones, broken):
    good, bad = batches(tone_data(tones)), batches(tone_data(broken, budget=0.5))
    assert len(good) == len(bad)
    for before, after in zip(good, bad):
        hit = np.isin(before.labels["number"], (2, 7, 11))
        assert np.array_equal(before.labels["number"][~hit], after.labels["number"][~hit])
        assert np.array_equal(before.inputs["audio"][~hit], after.inputs["audio"][~hit])
        assert np.array_equal(before.index, after.index)
        assert not np.isin(after.labels["number"], (2, 7, 11)).any()
        assert after.valid.all()


def test_substitutes_do_not_depend_on_threads_cache_or_hosts(broken):
    straight = batches(tone_data(broken, budget=0.5, threads=1))
    assert_same(batches(tone_data(broken, budget=0.5, threads=4, prefetch=8, cache=1 << 30)), straight)
    assert_same(batches(tone_data(broken, budget=0.5), start=5), straight[5:])
    parts = [batches(tone_data(broken, budget=0.5), host=host, hosts=2) for host in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(straight)  # no host stops early
    for step, whole in enumerate(straight):
        assert order([parts[0][step], parts[1][step]]) == whole.labels["number"].tolist()


def test_a_substitute_comes_whole_with_its_own_caption_and_label(tones, broken):
    tokenizer = text.load_tokenizer(tones / "tokenizer.json")
    for folder in (tones, broken):
        got = batches(tone_data(folder, budget=0.5), augment=Augment(), stop=13)
        for batch in got:
            for audio, ids, label in zip(batch.inputs["audio"], batch.inputs["text"], batch.labels["number"]):
                assert heard(audio) == label
                assert spelt(int(label)) in text.decode_ids(tokenizer, ids)


def test_bad_files_are_counted_once_by_reason(broken):
    loader = Loader(tone_data(broken, budget=0.5), CLIP, PLAIN, seed=3, batch=4, start=0, stop=13)
    list(loader)
    loader.close()
    assert {row: (item.id, item.reason) for row, item in loader.account.bad.items()} == {
        2: ("t2", "undecodable"),
        7: ("t7", "undecodable"),
        11: ("t11", "missing"),
    }
    assert bad_summary(loader.account.bad) == "2 undecodable, 1 missing"
    assert len(bad_list(loader.account.bad).splitlines()) == 3
    assert str(broken / "none.wav") in bad_list(loader.account.bad)


@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_files_that_are_not_decoded_just_as_they_are_are_counted_once_by_remark(tones, cache):
    for seconds, wanted in ((CLIP.seconds, {}), (0.3, {"ends early": set(range(COUNT))})):
        clip = dataclasses.replace(CLIP, seconds=seconds)
        loader = Loader(tone_data(tones, cache=cache), clip, PLAIN, seed=3, batch=4, start=0, stop=13)
        list(loader)
        loader.close()
        assert loader.account.remarks == wanted and not loader.account.bad
    assert remark_summary(loader.account.remarks) == f"{COUNT} ends early"


@pytest.mark.parametrize("tracks", [{"audio": -1}, {"sound": 0}, {"audio": "deu"}])
def test_tracks_that_are_none(tones, tracks):
    with pytest.raises(UserError, match="data.tracks"):
        Samples(read_manifest(tones / "all.jsonl"), tone_data(tones, tracks=tracks), CLIP, PLAIN, 0)


def test_over_budget_is_an_error_that_lists_the_files(broken):
    with pytest.raises(DataBudgetError) as error:
        batches(tone_data(broken, budget=0.15), stop=13)  # 2.55 files may fail
    message = str(error.value)
    assert "3 of 17" in message
    assert "data.budget" in message
    for name in ("page.wav", "empty.wav", "none.wav"):
        assert str(broken / name) in message
    assert error.value.code == 3
    assert len(batches(tone_data(broken, budget=0.18), stop=13)) == 13  # 3.06 may


def test_nothing_decodable_is_an_error_and_no_endless_search(tones, tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"path": f"{i}.mp4", "labels": {"number": 0}} for i in range(5)])
    data = Data(str(manifest), str(tones / "tokenizer.json"), labels={"number": 1}, workers=0, budget=1.0)
    with pytest.raises(DataBudgetError, match="check the paths"):
        batches(data)


def test_nothing_decodable_is_the_same_error_from_worker_processes(tones, tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"path": f"{i}.mp4", "labels": {"number": 0}} for i in range(5)])
    data = Data(str(manifest), str(tones / "tokenizer.json"), labels={"number": 1}, workers=1, budget=1.0)
    with pytest.raises(DataBudgetError, match="check the paths"):
        batches(data)


# Evaluation.


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("batch", [4, 8])
def test_evaluation_shows_each_row_once(tones, tmp_path, batch, hosts):
    lines = (tones / "all.jsonl").read_text().splitlines(keepends=True)
    for size in range(1, COUNT + 1):
        manifest = tmp_path / f"{size}.jsonl"
        manifest.write_text("".join(lines[:size]).replace('"path": "', f'"path": "{tones}/'))
        shown, lengths = [], set()
        for host in range(hosts):
            got = list(evaluation_batches(manifest, tone_data(tones), CLIP, batch=batch, host=host, hosts=hosts))
            lengths.add(len(got))
            for one, numbers, _ in got:
                assert len(numbers) == len(one.valid) == batch // hosts
                assert np.array_equal(one.labels["number"][one.valid], numbers[one.valid])
                assert (one.labels["number"][~one.valid] == -1).all()
                assert not any(value[~one.valid].any() for value in one.present.values())
                assert not any(value[~one.valid].any() for value in one.inputs.values())
                for audio, number in zip(one.inputs["audio"][one.valid], numbers[one.valid]):
                    assert heard(audio) == number
                shown += numbers[one.valid].tolist()
        assert sorted(shown) == list(range(size)), f"{size} clips"
        assert len(lengths) == 1  # every host the same number of batches


def test_evaluation_never_leaves_a_row_out_when_hosts_do_not_divide_the_batch(tones):
    try:
        parts = [
            list(evaluation_batches(tones / "all.jsonl", tone_data(tones), CLIP, batch=6, host=h, hosts=4))
            for h in range(4)
        ]
    except UserError:
        return
    assert sorted(int(n) for part in parts for one, rows, _ in part for n in rows[one.valid]) == list(range(COUNT))


def test_evaluation_leaves_out_what_cannot_be_decoded(broken):
    got = list(evaluation_batches(broken / "all.jsonl", tone_data(broken), CLIP, batch=4))
    shown = [int(n) for one, rows, _ in got for n in rows[one.valid]]
    assert shown == [n for n in range(COUNT) if n not in (2, 7, 11)]


def test_evaluation_is_without_randomness(world_folder):
    data = world_data(world_folder, augment=dict(area=(0.5, 1.0), flip=True, drop=0.9))
    one, two = ([batch for batch, *_ in evaluation_batches(data.train, data, WORLD_CLIP, batch=16)] for _ in range(2))
    assert_same(one, two)
    assert np.array_equal(
        one[0].inputs["video"][0], Samples(read_manifest(data.train), data, WORLD_CLIP, PLAIN, 5)(0, 4, 0)["video"]
    )


# Manifests.

GOOD = '{"id": "a", "path": "a.mp4", "caption": "x", "labels": {"k": 1}}\n'


def refused(path: Path, *parts: str) -> str:
    """The one line in which the manifest is refused; it names the file and holds each part."""
    with pytest.raises(UserError) as error:
        read_manifest(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def test_a_missing_manifest(tmp_path):
    refused(tmp_path / "none.jsonl", "no such file")
    refused(tmp_path, "no such file")


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_manifest(tmp_path, content):
    path = tmp_path / "m.jsonl"
    path.write_text(content)
    refused(path, "no clips")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"path": "b.mp4"', "not valid JSON"),
        ("b.mp4", "not valid JSON"),
        ("[1, 2]", "needs a `path`"),
        ("3", "needs a `path`"),
        ('{"id": "b"}', "needs a `path`"),
        ('{"path": 3}', "needs a `path`"),
        ('{"path": "b.mp4", "captoin": "x"}', "did you mean 'caption'"),
        ('{"path": "b.mp4", "start": "1"}', "start must be seconds"),
        ('{"path": "b.mp4", "start": true}', "start must be seconds"),
        ('{"path": "b.mp4", "start": -1.0}', "start must be seconds"),
        ('{"path": "b.mp4", "start": NaN}', "start must be seconds"),
        ('{"path": "b.mp4", "start": Infinity}', "start must be seconds"),
        ('{"path": "b.mp4", "end": NaN}', "end must be seconds"),
        ('{"path": "b.mp4", "end": [2]}', "end must be seconds"),
        ('{"path": "b.mp4", "start": 2.0, "end": 2.0}', "not after start"),
        ('{"path": "b.mp4", "end": 0}', "not after start"),
        ('{"path": "b.mp4", "caption": 3}', "caption must be"),
        ('{"path": "b.mp4", "caption": ["a", 3]}', "caption must be"),
        ('{"path": "b.mp4", "caption": {"a": "b"}}', "caption must be"),
        ('{"path": "b.mp4", "labels": {"k": "1"}}', "labels must be"),
        ('{"path": "b.mp4", "labels": {"k": 1.5}}', "labels must be"),
        ('{"path": "b.mp4", "labels": {"k": true}}', "labels must be"),
        ('{"path": "b.mp4", "labels": {"k": -2}}', "labels must be"),
        ('{"path": "b.mp4", "labels": [1]}', "labels must be"),
        ('{"id": "a", "path": "b.mp4"}', "stands already in line 1"),
    ],
)
def test_a_line_that_is_no_clip(tmp_path, line, says):
    path = tmp_path / "m.jsonl"
    path.write_text(GOOD + "\n" + line + "\n")
    refused(path, "line 3", says)


def test_a_manifest_that_is_not_text(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(GOOD.encode() + b'{"path": "b.mp4", "caption": "caf\xe9"}\n')
    refused(path)


def test_the_same_path_twice_without_ids(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"path": "b.mp4"}\n{"path": "b.mp4"}\n')
    refused(path, "line 2", "ids must differ")


def test_null_stands_for_absent(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"id": null, "path": "a.mp4", "start": null, "end": null, "caption": null, "labels": null}\n'
        '{"id": null, "path": "b.mp4"}\n'
    )
    one, two = read_manifest(path)
    assert (one.id, two.id) == ("a.mp4", "b.mp4")
    assert (one.start, one.end, one.captions, one.labels) == (None, None, (), {})


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c"])
def test_a_caption_may_hold_any_line_separator_of_unicode(tmp_path, separator):
    path = tmp_path / "m.jsonl"
    if separator == "\x0c":  # JSON asks for control characters to be escaped
        path.write_text(json.dumps({"path": "a.mp4", "caption": f"one{separator}two"}) + "\n")
    else:
        path.write_text(
            json.dumps({"path": "a.mp4", "caption": f"one{separator}two"}, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    assert read_manifest(path)[0].captions == (f"one{separator}two",)


def test_what_a_manifest_says_is_read(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"path": "sub/a.mp4", "start": 1, "end": 2.5, "caption": ["one", " ", "two"], "labels": {"k": -1}}\r\n'
        f'{{"id": 7, "path": "{tmp_path / "b.mp4"}", "caption": "ünï"}}'
    )
    one, two = read_manifest(path)
    assert one.path == str(tmp_path / "sub" / "a.mp4")
    assert (one.id, one.start, one.end, one.captions, one.labels) == ("sub/a.mp4", 1, 2.5, ("one", "two"), {"k": -1})
    assert (two.id, two.path, two.start, two.captions) == ("7", str(tmp_path / "b.mp4"), None, ("ünï",))


def labelled(path, labels):
    return load_mixture(Data(train=str(path), tokenizer="", labels=labels))[0]


def test_a_label_out_of_range(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(GOOD + '{"path": "b.mp4", "labels": {"k": 4}}\n')
    assert len(labelled(path, {"k": 5})) == 2
    with pytest.raises(UserError, match=r"labels\.k: 4 classes") as error:
        labelled(path, {"k": 4})
    assert str(path) in str(error.value)
    assert "4" in str(error.value)


def test_a_label_that_no_clip_has(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(GOOD)
    with pytest.raises(UserError, match=r"data\.labels\.other") as error:
        labelled(path, {"other": 2})
    assert str(path) in str(error.value)


def test_the_digest_is_of_the_content(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_text(GOOD)
    two.write_text(GOOD)
    assert manifest_digest(one) == manifest_digest(two)
    two.write_text(GOOD.replace("x", "y"))
    assert manifest_digest(one) != manifest_digest(two)


# Text.


@pytest.fixture(scope="module")
def tokenizer(tones):
    return text.load_tokenizer(tones / "tokenizer.json")


def test_encode_pads_and_cuts(tokenizer):
    start, end = tokenizer.token_to_id(text.START), tokenizer.token_to_id(text.END)
    caption = "the tone of one two sounds"
    whole = text.encode(tokenizer, caption, 60)
    assert whole.shape == (60,)
    assert whole.dtype == np.int32
    length = int((whole != 0).sum())
    assert whole[0] == start
    assert whole[length - 1] == end
    assert (whole[length:] == 0).all()
    for cut in (length, length - 1, 4, 3, 2):
        short = text.encode(tokenizer, caption, cut)
        assert short.shape == (cut,)
        assert short[0] == start
        assert short[-1] == end
        assert np.array_equal(short[: cut - 1], whole[: cut - 1])
    assert text.encode(tokenizer, "", 4).tolist() == [start, end, 0, 0]


@pytest.mark.parametrize(
    "caption", ["number one two", "the tone of zero nine sounds", "a word it never saw: Ærøskøbing 東京 🙂"]
)
def test_encode_round_trips(tokenizer, caption):
    assert text.decode_ids(tokenizer, text.encode(tokenizer, caption, 120)) == caption.lower()


def test_a_caption_cannot_spell_special_tokens(tokenizer):
    ids = text.encode(tokenizer, "one <pad> two </s> three", 60)
    length = int(np.flatnonzero(ids)[-1]) + 1
    assert (ids[:length] > 0).all()  # no padding in the middle
    assert (ids == tokenizer.token_to_id(text.END)).sum() == 1


def test_captions_are_encoded_alike_in_worker_processes(tones):
    rows = [row._replace(captions=("one <pad> two </s> three",)) for row in read_manifest(tones / "all.jsonl")]
    samples = Samples(rows, tone_data(tones), CLIP, PLAIN, 0)
    sent = pickle.loads(pickle.dumps(samples))
    assert np.array_equal(sent(0, 0, 0)["text"], samples(0, 0, 0)["text"])


def test_padding_is_zero_and_the_vocabulary_keeps_its_limit():
    trained = text.train_tokenizer(["a red star", "a blue ring"] * 5, 300)
    assert trained.token_to_id(text.PAD) == 0
    assert trained.get_vocab_size() <= 300
    assert text.train_tokenizer(["a red star", "a blue ring"] * 5, 300).to_str() == trained.to_str()


def test_tokenizer_errors(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="no such file") as error:
        text.load_tokenizer(path)
    assert str(path) in str(error.value)
    for content in (b"", b"{}", b"<html>", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"not a tokenizer\.json"):
            text.load_tokenizer(path)


def save_vocabulary(path: Path, *tokens: str) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_may_pad_with_another_id(tmp_path):
    path = save_vocabulary(tmp_path / "t.json", "<unk>", "<pad>", "<s>", "</s>", "a")
    assert text.encode(text.load_tokenizer(path), "a", 5).tolist() == [2, 4, 3, 1, 1]


@pytest.mark.parametrize("lacking", ["<s>", "</s>"])
def test_a_tokenizer_without_start_or_end_is_refused(tmp_path, lacking):
    tokens = [token for token in ("<pad>", "<unk>", "<s>", "</s>", "a") if token != lacking]
    with pytest.raises(UserError, match=lacking):
        text.load_tokenizer(save_vocabulary(tmp_path / "t.json", *tokens))


def test_a_loader_left_in_the_middle_leaves_nothing_behind(tones, tmp_path):
    # Batches of worker processes lie in shared memory; what is not freed is said at the end of the program.
    script = tmp_path / "leave.py"
    script.write_text(f"""if __name__ == "__main__":
    from vmm.data.loader import Loader
    from vmm.data.samples import Augment, Clip, Data
    data = Data({str(tones / "all.jsonl")!r}, {str(tones / "tokenizer.json")!r}, workers=2, threads=1)
    loader = Loader(data, Clip(seconds=0.1, frames=1, size=8), Augment(), seed=0, batch=4, start=0, stop=40)
    batches = iter(loader)
    for _ in range(3):
        batch = next(batches)
    loader.close()
    print("closed")
""")
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert run.stdout == "closed\n", run.stderr
    assert "leaked" not in run.stderr
    assert "Traceback" not in run.stderr
