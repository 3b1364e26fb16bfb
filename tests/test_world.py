"""The synthetic world: every label is true of the media, read back from the files with plain signal processing."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from vmm.data import media, text, world
from vmm.data.manifest import read_manifest
from vmm.data.samples import Augment, Clip, Data, Samples
from vmm.errors import UserError

SPLITS = {"train": 48, "validation": 12, "test": 18}
SMALL = {"train": 6, "test": 3}


def lines(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(names(folder))}


# What the generator promises of its lists.


def test_the_folder_holds_what_it_says(world_folder):
    files = names(world_folder)
    for split, size in SPLITS.items():
        rows = read_manifest(world_folder / f"{split}.jsonl")
        assert len(rows) == size
        assert all(Path(row.path).is_file() for row in rows)
        assert sum(name.startswith(f"{split}/") for name in files) == size
    assert {name for name in files if "/" not in name} == {
        "train.jsonl", "validation.jsonl", "test.jsonl", "tokenizer.json", "labels.json", "world.json",
        "identity_train.jsonl", "identity_test.jsonl",
    }  # fmt: skip
    assert not [name for name in files if name.endswith(".part")]


def test_identities_of_the_test_are_none_of_training(world_folder):
    train, test = (lines(world_folder, f"identity_{name}") for name in ("train", "test"))
    pairs = {}
    for line in train + test:
        pairs.setdefault(line["labels"]["identity"], set()).add((line["labels"]["shape"], line["labels"]["colour"]))
    assert all(len(found) == 1 for found in pairs.values()) and len(set.union(*pairs.values())) == len(pairs)
    assert all(line["labels"]["identity"] < 36 and line["path"].startswith("train/") for line in train)
    assert all(36 <= line["labels"]["identity"] < 48 and not line["path"].startswith("train/") for line in test)


def test_a_world_of_an_older_format_keeps_its_clips(tmp_path):
    world.generate(tmp_path, SMALL, seed=5)
    whole = digests(tmp_path)
    record = json.loads((tmp_path / "world.json").read_text())
    record["settings"]["format"] = 1
    (tmp_path / "world.json").write_text(json.dumps(record))
    (tmp_path / "identity_train.jsonl").unlink()
    before = (tmp_path / "train/00000.mp4").stat().st_mtime_ns
    world.generate(tmp_path, SMALL, seed=5)
    assert digests(tmp_path) == whole and (tmp_path / "train/00000.mp4").stat().st_mtime_ns == before


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        world.generate(tmp_path / name, SMALL, seed=5)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_another_seed_gives_another_world(tmp_path):
    world.generate(tmp_path / "one", SMALL, seed=5)
    world.generate(tmp_path / "two", SMALL, seed=6)
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    assert one.keys() == two.keys()
    same = {name for name in one if one[name] == two[name]}
    assert same <= {"labels.json"}


def test_no_combination_occurs_twice(world_folder):
    heard, seen_only = [], []
    for split in SPLITS:
        for line in lines(world_folder, split):
            facts = tuple(line["labels"].get(name) for name in world.FACTS)
            (heard if facts[-1] is not None else seen_only).append(facts)
    assert len(set(heard)) == len(heard)
    assert len(heard) + len(seen_only) == sum(SPLITS.values())


def test_combinations_do_not_repeat_with_every_stream_there(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(world, "parallel", lambda write, work, progress: jobs.extend(work))
    world.generate(tmp_path, {"train": 3000, "validation": 500, "test": 500}, seed=1)
    numbers = {}
    for path, _, combination, _ in jobs:
        numbers.setdefault(path.parent.name, set()).add(combination)
    assert {split: len(some) for split, some in numbers.items()} == {"train": 3000, "validation": 500, "test": 500}
    assert len(set().union(*numbers.values())) == 4000


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> list[dict]:
    """The training lines of a world of 3,000 clips, whose media are not written."""
    folder = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "parallel", lambda write, work, progress: None)
        world.generate(folder, {"train": 3000}, seed=2, missing=0.2)
    return lines(folder, "train")


def test_labels_are_balanced(large):
    for name, classes in world.CLASSES.items():
        values = [line["labels"][name] for line in large if name in line["labels"]]
        counts = np.bincount(values, minlength=classes)
        assert len(counts) == classes
        expected = len(values) / classes
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected), name


def test_no_easier_label_tells_a_harder_one(large):
    # `both` is independent of either half; `order`, `sync` and `either` of everything that is seen or heard.
    whole = [line["labels"] for line in large if "both" in line["labels"]]
    for hard in ("both", "order", "sync", "either"):
        for easy in world.CLASSES:
            if easy == hard:
                continue
            for value in range(world.CLASSES[easy]):
                some = [labels[hard] for labels in whole if labels[easy] == value]
                assert abs(np.mean(some) - 0.5) < 2.5 / np.sqrt(len(some)) + 0.05, (hard, easy, value)


def test_labels_follow_their_definitions(large, world_folder):
    warm = {"red", "orange", "yellow", "pink"}
    pitches = sorted(world.PITCHES, key=world.PITCHES.get)
    for line in [*large, *lines(world_folder, "train"), *lines(world_folder, "test")]:
        labels = line["labels"]
        assert labels["video"] == (world.FACTS["colour"][labels["colour"]] in warm)
        if "pitch" in labels:
            assert labels["audio"] == (world.FACTS["pitch"][labels["pitch"]] in pitches[4:])
            assert labels["both"] == labels["video"] ^ labels["audio"]


@pytest.mark.parametrize(("size", "missing"), [(48, 1 / 9), (40, 0.25), (10, 0.0), (10, 1.0), (7, 0.5)])
def test_the_number_of_missing_streams_is_exact(tmp_path, monkeypatch, size, missing):
    monkeypatch.setattr(world, "parallel", lambda write, work, progress: None)
    world.generate(tmp_path, {"train": size}, missing=missing)
    mute = {line["id"] for line in lines(tmp_path, "train") if "pitch" not in line["labels"]}
    untold = {line["id"] for line in lines(tmp_path, "train") if line["caption"] is None}
    assert len(mute) + len(untold) == round(missing * size)
    assert len(mute) - len(untold) in (0, 1)
    assert not mute & untold


def test_a_mute_clip_has_no_label_and_no_word_of_sound(large):
    mute = [line for line in large if "pitch" not in line["labels"]]
    assert mute
    spoken = {word.lower() for name in ("pitch", "timbre") for word in world.FACTS[name]}
    spoken |= {"beats", "note", "match", "clash"}
    for line in mute:
        assert set(line["labels"]) == {"shape", "colour", "motion", "video", "either", "order"}
        for caption in line["caption"] or ():
            assert not spoken & set(caption.lower().replace(",", "").split())
    for line in large:
        if line not in mute:
            assert set(line["labels"]) == set(world.CLASSES)


def test_captions_hold_the_facts_in_several_phrasings(large):
    moves = {"left": "left", "growing": "grows", "shrinking": "shrinks", "clockwise": "circles clockwise"}
    for line in large:
        if line["caption"] is None:
            continue
        labels = line["labels"]
        assert len(set(line["caption"])) == len(line["caption"]) >= (4 if "pitch" in labels else 2)
        for caption in line["caption"]:
            assert " ," not in caption
            words = caption.replace(",", "").split()
            for name in ("shape", "colour", *(("pitch", "timbre") if "pitch" in labels else ())):
                found = [value for value in world.FACTS[name] if value in words]
                assert found == [world.FACTS[name][labels[name]]], caption
            motion = world.FACTS["motion"][labels["motion"]]
            assert moves.get(motion, motion) in caption
            if "rhythm" in labels:
                assert world.FACTS["rhythm"][labels["rhythm"]] in words
                assert [word for word in words if word in ("match", "clash")] == [("match", "clash")[labels["both"]]]
            assert {"yes", "no", "sync", "order"}.isdisjoint(words)  # the planted labels are not told


def test_captions_fit_the_tokenizer(world_folder):
    tokenizer = text.load_tokenizer(world_folder / "tokenizer.json")
    assert tokenizer.get_vocab_size() <= 512
    for line in lines(world_folder, "test"):
        for caption in line["caption"] or ():
            assert text.decode_ids(tokenizer, text.encode(tokenizer, caption, 48)) == caption.lower()


def test_the_names_of_the_classes_are_written(world_folder):
    written = json.loads((world_folder / "labels.json").read_text())
    assert {name: len(values) for name, values in written.items()} == world.CLASSES
    assert written["colour"] == list(world.COLOURS)


# Writing: completed, refused, left alone.


def test_an_interrupted_world_is_completed(tmp_path, monkeypatch):
    world.generate(tmp_path / "straight", SMALL, seed=3)
    real, done = world._write, []

    def write_four(job):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(job)
        real(job)

    with monkeypatch.context() as patch:
        patch.setattr(world, "_write", write_four)
        with pytest.raises(KeyboardInterrupt):
            world.generate(tmp_path / "cut", SMALL, seed=3)
    assert not (tmp_path / "cut" / "train.jsonl").exists()
    first = done[0][0]
    stamp = first.stat().st_mtime_ns
    first.with_suffix(".part").write_bytes(b"half")  # as a kill leaves it
    (tmp_path / "cut" / "train" / "00005.part").write_bytes(b"half")
    world.generate(tmp_path / "cut", SMALL, seed=3)
    assert first.stat().st_mtime_ns == stamp  # what was whole stays
    first.with_suffix(".part").unlink()
    assert digests(tmp_path / "cut") == digests(tmp_path / "straight")


def test_a_complete_world_is_left_alone(tmp_path, monkeypatch):
    world.generate(tmp_path, SMALL, seed=3)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in names(tmp_path)}
    monkeypatch.setattr(world, "write_clip", lambda *_: pytest.fail("a clip was written again"))
    world.generate(tmp_path, SMALL, seed=3)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in names(tmp_path)} == before


@pytest.mark.parametrize(
    "changes", [{"seed": 4}, {"missing": 0.5}, {"vocabulary": 300}, {"sizes": {"train": 7, "test": 3}}]
)
def test_another_setting_in_the_same_folder_is_an_error(tmp_path, changes):
    world.generate(tmp_path, SMALL, seed=3)
    before = digests(tmp_path)
    with pytest.raises(UserError, match="other settings") as error:
        world.generate(tmp_path, **({"sizes": SMALL, "seed": 3} | changes))
    assert str(tmp_path) in str(error.value)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3"])
def test_a_broken_record_is_an_error(tmp_path, content):
    (tmp_path / "world.json").write_text(content)
    with pytest.raises(UserError) as error:
        world.generate(tmp_path, SMALL)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [{"sizes": {"train": 200_000}}, {"sizes": {"train": 0}}, {"missing": 1.5}, {"missing": -0.1}, {"sizes": {}}],
)
def test_sizes_that_cannot_be_are_an_error(tmp_path, wrong):
    with pytest.raises(UserError, match="a world has"):
        world.generate(tmp_path, **({"sizes": SMALL} | wrong))


def test_progress_counts_to_the_end(tmp_path):
    steps = []
    world.generate(tmp_path, SMALL, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(i, 9) for i in range(1, 10)]


# The planted facts, in the media.

FRAMES = round(world.SECONDS * world.FPS)


@pytest.fixture(scope="module")
def decoded(world_folder) -> list[tuple[dict, media.Media]]:
    """Every training and test clip: its labels, and all its frames and sound."""
    found = []
    for split in ("train", "test"):
        for line in lines(world_folder, split):
            got = media.decode(
                str(world_folder / line["path"]), pick=lambda _: 0.0, seconds=world.SECONDS, frames=FRAMES,
                size=world.SIZE, sample_rate=world.RATE,
            )  # fmt: skip
            found.append((line["labels"], got))
    return found


@pytest.fixture(scope="module")
def sounding(decoded) -> list[tuple[dict, media.Media]]:
    return [(labels, got) for labels, got in decoded if "pitch" in labels]


def cover(video: np.ndarray) -> np.ndarray:
    """Where the picture is coloured rather than grey: bool [T H W]."""
    pixels = video.astype(int)
    return pixels.max(-1) - pixels.min(-1) > 60


def centres(video: np.ndarray) -> np.ndarray:
    """The middle of the coloured part in each frame: [T 2], y and x."""
    spots = cover(video)
    y, x = np.mgrid[: video.shape[1], : video.shape[2]]
    area = spots.sum((1, 2))
    return np.stack([(spots * y).sum((1, 2)) / area, (spots * x).sum((1, 2)) / area], 1)


def share(pairs: list) -> float:
    """The share of pairs that agree."""
    return float(np.mean([a == b for a, b in pairs]))


def test_there_is_a_sound_exactly_where_the_labels_say(decoded):
    for labels, got in decoded:
        assert got.video.shape == (FRAMES, world.SIZE, world.SIZE, 3)
        assert (got.audio is not None) == ("pitch" in labels)
        if got.audio is not None:
            assert got.audio.shape == (round(world.SECONDS * world.RATE),)
            assert 0.05 < np.abs(got.audio).max() <= 1.0


def test_colour(decoded):
    table = np.array(list(world.COLOURS.values()))
    for labels, got in decoded:
        colour = np.median(got.video[cover(got.video)], 0)
        brightness = colour.sum() / table.sum(1, keepdims=True)
        assert np.abs(table * brightness - colour).sum(1).argmin() == labels["colour"]


def read_motion(video: np.ndarray) -> str:
    area = cover(video).sum((1, 2))
    if max(area[:4].mean(), area[-4:].mean()) > 2.5 * min(area[:4].mean(), area[-4:].mean()):
        return "growing" if area[-4:].mean() > area[:4].mean() else "shrinking"
    path = centres(video)
    dy, dx = path[-3:].mean(0) - path[:3].mean(0)
    if max(abs(dy), abs(dx)) > 10:
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"
    about = path - path.mean(0)
    angle = np.unwrap(np.arctan2(about[:, 0], about[:, 1]))  # y runs down: a growing angle is clockwise
    return "clockwise" if angle[-1] > angle[0] else "anticlockwise"


def test_motion(decoded):
    for labels, got in decoded:
        assert read_motion(got.video) == world.MOTIONS[labels["motion"]]


def outline(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The shape in its bounding square from -1 to 1, by its textbook definition."""
    distance = np.hypot(y, x)
    if shape == "circle":
        return distance < 1
    if shape == "ring":
        return (distance < 1) & (distance > 0.48)
    if shape == "square":
        return np.ones_like(y, bool)
    if shape == "cross":
        return np.minimum(abs(y), abs(x)) < 0.3
    if shape == "triangle":
        return abs(x) < (y + 1) / 2
    # A star of five points, one of them upward; its box is a little less high than wide.
    y = (y + 1) * 0.93 - 1.0
    angle = np.arctan2(y, x) + np.pi / 2
    return np.hypot(y, x) < 0.7 + 0.3 * np.cos(5 * angle)


def read_shape(video: np.ndarray) -> str:
    y, x = np.mgrid[-1:1:24j, -1:1:24j]
    outlines = {shape: outline(shape, y, x) for shape in world.SHAPES}
    score = dict.fromkeys(world.SHAPES, 0.0)
    for spot in cover(video):
        rows, columns = np.flatnonzero(spot.any(1)), np.flatnonzero(spot.any(0))
        if len(rows) < 14 or len(columns) < 14:
            continue
        at = np.round(np.linspace(rows[0], rows[-1], 24)).astype(int)
        across = np.round(np.linspace(columns[0], columns[-1], 24)).astype(int)
        box = spot[np.ix_(at, across)]
        for shape, wanted in outlines.items():
            score[shape] += (box & wanted).sum() / (box | wanted).sum()
    return max(score, key=score.get)


def test_shape(decoded):
    pairs = [(read_shape(got.video), world.SHAPES[labels["shape"]]) for labels, got in decoded]
    assert share(pairs) > 0.95, [pair for pair in pairs if pair[0] != pair[1]]


def test_pitch(sounding):
    for labels, got in sounding:
        power = np.abs(np.fft.rfft(got.audio)) ** 2
        hertz = np.fft.rfftfreq(len(got.audio), 1 / world.RATE)
        # The vibrato and the tremble spread a note over about 30 Hz.
        near = [power[np.abs(hertz - pitch) < 30].sum() for pitch in world.PITCHES.values()]
        assert int(np.argmax(near)) == labels["pitch"]


def spectrogram(wave: np.ndarray) -> np.ndarray:
    frames = np.lib.stride_tricks.sliding_window_view(wave, 512)[::256] * np.hanning(512)
    return np.log(np.abs(np.fft.rfft(frames, axis=1))[:, 4:] + 0.3)  # from 125 Hz: above the hum


def nearest(labels: dict, wave: np.ndarray, name: str) -> int:
    """The class of the fact with which the same clip, played anew, is most like the sound."""
    ours = spectrogram(wave)
    distance = []
    for value in range(world.CLASSES[name]):
        played = world.sound(labels | {name: value}, 0.9, np.random.default_rng(0))
        distance.append(np.abs(spectrogram(played) - ours).mean())
    return int(np.argmin(distance))


@pytest.mark.parametrize("name", ["timbre", "rhythm"])
def test_timbre_and_rhythm(sounding, name):
    for labels, got in sounding[:40]:
        assert nearest(labels, got.audio, name) == labels[name]


def test_beats_come_when_the_rhythm_says(sounding):
    checked = 0
    for labels, got in sounding:
        beats = world.RHYTHMS[world.FACTS["rhythm"][labels["rhythm"]]]
        if world.TIMBRES[labels["timbre"]] not in ("whistle", "clarinet", "buzzer") or len(beats) < 4:
            continue
        spectrum = loudness(got.audio, list(world.PITCHES.values())[labels["pitch"]])
        gaps = [spectrum[round((beat + 0.01) * 100) : round((beat + 0.1) * 100)].max() for beat in beats]
        assert min(gaps) > 0.5 * max(gaps)
        for beat in beats[1:]:  # a short rest stands before each beat
            rest = spectrum[round((beat - 0.05) * 100) : round((beat + 0.01) * 100)].min()
            assert rest < 0.6 * max(gaps)
        checked += 1
    assert checked > 5


def loudness(wave: np.ndarray, pitch: float) -> np.ndarray:
    """How loud the pitch is in each hundredth of a second (windows of 20 ms)."""
    time = np.arange(len(wave)) / world.RATE
    carried = wave * np.exp(-2j * np.pi * pitch * time)
    window = np.hanning(320)
    return np.abs(np.convolve(carried, window / window.sum(), "same"))[::160]


def test_either_is_a_bright_ground_and_a_low_hum(decoded):
    for labels, got in decoded:
        ground = np.median(got.video[:, 20:44, 4:6].reshape(-1, 3).mean(-1))
        assert (ground > 115) == bool(labels["either"])
        if got.audio is not None:
            power = np.abs(np.fft.rfft(got.audio)) / len(got.audio)
            hertz = np.fft.rfftfreq(len(got.audio), 1 / world.RATE)
            hum = power[np.abs(hertz - 82.4) < 2].max()
            assert (hum > 0.02) == bool(labels["either"])


def lit(video: np.ndarray, corner: tuple) -> float:
    """The time at which a corner is at its whitest, as the middle of the lit frames."""
    values = video[(slice(None), *corner)].min(-1).mean((1, 2)).astype(float)
    bright = np.flatnonzero(values > 235)
    return float(bright.mean()) / world.FPS if len(bright) else np.nan


def test_order(decoded):
    for labels, got in decoded:
        first = lit(got.video, (slice(7, 13), slice(7, 13)))
        second = lit(got.video, (slice(-13, -7), slice(-13, -7)))
        assert abs(first - second) > 0.4
        assert (first < second) == bool(labels["order"])


def flash_time(video: np.ndarray) -> float:
    """When the border changes: the first frame that is far from the border's own median."""
    border = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], 1).mean((1, 2))
    change = np.abs(border - np.median(border))
    return float(np.flatnonzero(change > change.max() / 2)[0]) / world.FPS


def click_time(wave: np.ndarray, pitch: float) -> float:
    """The middle of the loudest noise between the overtones of the pitch."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 320)[::80] * np.hanning(320)
    hertz = np.fft.rfftfreq(320, 1 / world.RATE)
    spectrum = np.abs(np.fft.rfft(frames, axis=1))
    between = (np.abs((hertz / pitch + 0.5) % 1 - 0.5) * pitch > 120) & (hertz > 300)
    noise = np.median(spectrum[:, between if between.sum() > 10 else hertz > 300], 1)
    return (noise.argmax() * 80 + 160) / world.RATE


def test_sync(sounding):
    told = []
    for labels, got in sounding:
        if world.TIMBRES[labels["timbre"]] == "engine":  # its own noise hides the click from so simple an ear
            continue
        click = click_time(got.audio, list(world.PITCHES.values())[labels["pitch"]])
        apart = abs(flash_time(got.video) - click + 0.015)
        told.append((apart < 0.2, bool(labels["sync"])))
        if labels["sync"]:
            assert apart < 0.12
        else:
            assert apart > 0.3
    assert len(told) > 20
    assert {label for _, label in told} == {True, False}


def test_the_facts_are_drawn_anew_for_each_clip(decoded):
    # Nothing identifies a clip but its facts: two clips never share their bytes.
    prints = {hashlib.sha256(got.video.tobytes()).hexdigest() for _, got in decoded}
    assert len(prints) == len(decoded)


def test_a_world_clip_is_decoded_as_any_file(world_folder, monkeypatch):
    asked = []
    real = media.decode
    monkeypatch.setattr(media, "decode", lambda path, **more: asked.append(path) or real(path, **more))
    rows = read_manifest(world_folder / "test.jsonl")
    data = Data(str(world_folder / "test.jsonl"), str(world_folder / "tokenizer.json"), labels=world.CLASSES)
    samples = Samples(rows, data, Clip(frames=2, size=16), Augment(), 0)
    for row in range(len(rows)):
        samples(row, 0, row)
    assert asked == [row.path for row in rows]
