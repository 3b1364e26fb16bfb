"""The world as a TensorFlow Dataset: prepared without TensorFlow, read through Grain, and built from again."""

import subprocess
import sys
from io import BytesIO

import grain
import numpy as np
import pytest

from vmm.data import media
from vmm.data.building.build import Settings, build
from vmm.data.manifest import read_manifest
from vmm.data.sources import open_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared `vmm_world/small`, made by another process, as a user's script would."""
    folder = tmp_path_factory.mktemp("tfds")
    code = f"""if __name__ == "__main__":
    import sys
    import tensorflow_datasets as tfds
    import vmm.data.world_tfds
    source = tfds.data_source("vmm_world/small", split="train", data_dir={str(folder)!r})
    assert len(source) == 48
    assert "tensorflow" not in sys.modules
"""
    script = folder / "prepare.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "vmm_world" / "small" / "1.0.0"


def test_examples_are_those_of_the_world(folder, world_folder):
    import tensorflow_datasets as tfds

    rows = {row.id: row for split in ("train", "test") for row in read_manifest(world_folder / f"{split}.jsonl")}
    for split, count in (("train", 48), ("test", 18)):
        source = tfds.builder_from_directory(str(folder)).as_data_source(split)
        assert len(source) == count
        seen = set()
        for example in grain.MapDataset.source(source):
            row = rows[example["id"].decode()]
            seen.add(row.id)
            with open(row.path, "rb") as file:
                assert example["media"] == file.read()
            assert tuple(text.decode() for text in example["caption"]) == row.captions
            labels = {name: int(example[name]) for name in ("shape", "pitch", "both")}
            assert labels == {name: row.labels.get(name, -1) for name in labels}
        assert len(seen) == count
    decoded = media.decode(
        BytesIO(example["media"]), pick=lambda _: 0.0, seconds=2.0, frames=4, size=24, sample_rate=16000
    )
    assert decoded.video.shape == (4, 24, 24, 3)


def test_a_prepared_dataset_is_a_source_of_builds(folder, tmp_path, world_folder):
    kind, entries, words = open_source(folder, None, {"label": "shape", "split": "test"})
    assert kind == "tfds"
    told = build(entries, tmp_path / "out", Settings(words), workers=1)
    assert (told["clips"], told["left_out"]) == (18, {})
    rows = {row.id: row for row in read_manifest(world_folder / "test.jsonl")}
    names = ["circle", "square", "triangle", "cross", "ring", "star"]
    classes = sorted(names)
    for row in read_manifest(tmp_path / "out" / "manifest.jsonl"):
        assert row.captions == rows[row.id].captions
        assert names[rows[row.id].labels["shape"]] == classes[row.labels["shape"]]
        assert np.isclose(row.seconds, 2.0, atol=0.1)
