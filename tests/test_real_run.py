"""Real clips of every codec train for a few steps, publish and embed. Skipped where the clips are not at hand."""

import csv
import json
import math

import numpy as np
import pytest
from conftest import ROOT, tiny_config

import vmm
from vmm.data.manifest import read_manifest
from vmm.data.text import train_tokenizer
from vmm.publish import publish
from vmm.train import train
from vmm.training.metrics import read_rows

CLIPS = ROOT.parent / "shared" / "clips"
pytestmark = pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not at hand")


def test_real_clips_train_and_embed(tmp_path):
    with open(CLIPS / "catalogue.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    captions = [row["name"].rpartition(".")[0].replace("_", " ").replace("-", " ") for row in rows]
    lines = [{"path": str(CLIPS / row["name"]), "caption": caption} for row, caption in zip(rows, captions)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_manifest(tmp_path / "train.jsonl")) == len(rows)
    train_tokenizer(captions, 400).save(str(tmp_path / "tokenizer.json"))
    config = tiny_config(tmp_path, ("video", "audio", "text"), steps=4, batch=16, log_every=1, evals={})
    config["data"] |= {"labels": {}, "augment": dict(area=(0.6, 1.0), flip=True), "budget": 0.0}
    config["optim"] |= {"warmup": 1}
    train(config, tmp_path / "run")
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)

    model = vmm.load(publish(tmp_path / "run", tmp_path / "published"))
    seen = [CLIPS / row["name"] for row in rows if row["vcodec"]][:6]
    heard = [CLIPS / row["name"] for row in rows if row["acodec"]][:6]
    video, audio = model.embed(video=seen)["video"], model.embed(audio=heard)["audio"]
    for vectors in (video, audio):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-4)
        assert np.abs(vectors[:, None] - vectors[None]).max() > 1e-4, "different clips are told apart"
