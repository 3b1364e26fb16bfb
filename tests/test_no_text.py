"""Video and sound without a word: no tokenizer anywhere."""

import json

import numpy as np
from conftest import tiny_config

import vmm
from vmm.evaluate import evaluate
from vmm.publish import FILES, publish
from vmm.report import report
from vmm.similar import write_index
from vmm.train import train


def test_a_model_without_text_needs_no_tokenizer(world_folder, tmp_path):
    """From data without captions to a published model; nothing on the way asks for one."""
    rows = [json.loads(line) for line in (world_folder / "test.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"caption": None, "path": str(world_folder / row["path"])}) for row in rows]
    (tmp_path / "silent.jsonl").write_text("\n".join(lines) + "\n")
    config = tiny_config(world_folder, ("video", "audio"), steps=1, batch=8, save_every=1, log_every=1)
    config["data"] |= {"train": str(tmp_path / "silent.jsonl")}
    del config["data"]["tokenizer"]
    config["evals"] = {"retrieval": dict(kind="retrieval", data=str(tmp_path / "silent.jsonl"))}
    config["optim"] |= {"warmup": 0}
    train(config, tmp_path / "run")
    assert evaluate(tmp_path / "run")["values"]["retrieval/clips"] > 0
    folder = publish(tmp_path / "run", tmp_path / "published")
    assert sorted(path.name for path in folder.iterdir()) == sorted(set(FILES) - {"tokenizer.json"})
    assert vmm.load(folder).embed(audio=np.zeros(100))["audio"].shape == (1, 16)
    assert write_index(str(folder), str(tmp_path / "silent.jsonl"), tmp_path / "index").is_dir()
    report(tmp_path / "run", tmp_path / "report.html")
