"""The study of real digits (experiments/0007-real): its splits, its arithmetic, and its short form from files to table."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from conftest import ROOT

DATA = ROOT.parent / "shared" / "data"
FOLDER = ROOT / "experiments" / "0007-real"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real recordings and pictures are not at hand")


def load(name: str):
    """A script of the study as a module; nothing of its folder stays on the path."""
    before, modules = list(sys.path), set(sys.modules)
    spec = importlib.util.spec_from_file_location(f"real_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
        if "make" not in modules:
            sys.modules.pop("make", None)
    return module


@pytest.fixture(scope="module")
def digits():
    return load("make")


@pytest.fixture(scope="module")
def study():
    return load("study")


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labelled_subsets_share_no_recording_and_grow(digits):
    lines = [
        {"labels": {"digit": i % 10}, "source": {"recording": f"r{i % 300}", "picture": i}} for i in range(900)
    ]  # each recording stands in three clips
    small, large = (digits.labelled(lines, count, [0, 4, 1]) for count in (5, 20))
    for found, count in ((small, 5), (large, 20)):
        assert np.bincount([row["labels"]["digit"] for row in found]).tolist() == [count] * 10
        assert len({row["source"]["recording"] for row in found}) == 10 * count
    assert all(row in large for row in small)
    assert digits.labelled(lines, 5, [0, 4, 2]) != small


def test_the_table_compares_with_the_better_scratch(study):
    """Four clips, two draws: scratch 3/8, the longer one 4/8, the probe 6/8, fine-tuned 8/8."""
    right = {
        "scratch": ([1, 0, 0, 0], [1, 1, 0, 0]),
        "scratch, twice as long": ([1, 1, 0, 0], [1, 1, 0, 0]),
        study.PROBE: ([1, 1, 1, 0], [1, 1, 1, 0]),
        "fine-tuned": ([1, 1, 1, 1], [1, 1, 1, 1]),
    }
    clips = {
        name: [{s: {f"c{i}": float(v) for i, v in enumerate(one)} for s in study.COLUMNS} for one in both]
        for name, both in right.items()
    }
    found = study.summary(clips)
    assert found["clips"] == 4 and set(found["scratch"].values()) == {"scratch, twice as long"}
    assert found["accuracy"]["scratch/V"][0] == pytest.approx(3 / 8)
    assert found["accuracy"]["linear probe/VA"][3] == [0.75, 0.75]
    difference = found["differences"]["fine-tuned − scratch/A"]
    assert difference["difference"] == pytest.approx(0.5)
    # The clip is the unit, not the clip of a draw: of 2² signs of the two clips that differ, two are as extreme.
    assert difference["p"] == pytest.approx(0.5)
    result = found | {"labels": 20, "seeds": 2, "data": "test", "seconds": {"pretraining": [300.0]}}
    text = study.table(result)
    assert "| fine-tuned | 100.0 [" in text and "Pretraining: 300 s of" in text


@needs_data
def test_pictures_and_recordings_are_split_before_they_are_paired(digits):
    images, labels = digits.read_images(DATA / "mnist")
    assert images.shape == (10_000, 28, 28) and np.bincount(labels).min() > 800
    pairs = digits.pair(DATA / "spoken_digits", labels, seed=0)
    assert {split: len(found) for split, found in pairs.items()} == {"test": 600, "validation": 300, "train": 6300}
    pictures = [image for found in pairs.values() for image, _ in found]
    assert len(set(pictures)) == len(pictures)
    sounds = {split: {path.stem for _, path in found} for split, found in pairs.items()}
    assert not sounds["test"] & (sounds["train"] | sounds["validation"]) and not sounds["train"] & sounds["validation"]
    official = {path.stem for path in (DATA / "spoken_digits").glob("*_[0-4].wav")}
    assert len(official) == 300 and official <= sounds["test"]
    assert all(labels[image] == int(path.name[0]) for found in pairs.values() for image, path in found)


@needs_data
@pytest.mark.exhaustive("a whole study: minutes of training")
def test_the_short_study_runs_goes_on_and_writes_its_table(study, tmp_path, capsys):
    text = study.study(DATA, tmp_path / "out", count=5, seeds=1, quick=True, evaluated="test")
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert text == (tmp_path / "out" / "table.md").read_text()
    assert {key.rpartition("/")[0] for key in result["accuracy"]} == {*study.VARIANTS, study.PROBE}
    assert all(low <= mean <= high for mean, low, high, _ in result["accuracy"].values())
    assert result["clips"] == len(rows(tmp_path / "out" / "data" / "test.jsonl"))
    capsys.readouterr()
    assert study.study(DATA, tmp_path / "out", count=5, seeds=1, quick=True, evaluated="test") == text
    assert "$ vmm" not in capsys.readouterr().out, "what is done is not done again"
