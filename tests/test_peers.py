"""`vmm bench peers` runs, small: two processes, the same losses, a table and a file."""

import json

import pytest

from vmm.__main__ import main
from vmm.bench import peers


@pytest.mark.exhaustive("PyTorch and transformers at run time")
def test_peers_runs_small(tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    file = tmp_path / "peers.json"
    assert main(["bench", "peers", "--size", "tiny", "--rounds", "2", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    for one, two in zip(*told["losses"].values()):
        assert one == pytest.approx(two, rel=1e-3)
    for word in ("train", "infer"):
        assert told[word]["low"] <= told[word]["ratio"] <= told[word]["high"]
        assert all(seconds > 0 for seconds in told[word]["seconds"].values())
    assert min(told["memory_mb"].values()) > 50 and min(told["gflops"].values()) > 0
    assert "ratio" in capsys.readouterr().out


def test_without_the_libraries_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "peers", "--size", "tiny"]) == 2
    assert "requirements-peers.txt" in capsys.readouterr().err
