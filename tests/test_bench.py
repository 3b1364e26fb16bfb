"""vmm bench data on tiny settings: its tables and numbers are there; the arithmetic against numbers made by hand."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from vmm.__main__ import main
from vmm.bench import clips, decode, wait, workers
from vmm.errors import UserError


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def samples(scratch):
    return clips.make(scratch, 3.5)


@pytest.fixture(scope="module")
def told(scratch, samples):
    """(what it wrote, what it printed) of one whole run."""
    done = subprocess.run(
        [
            sys.executable, "-m", "vmm", "bench", "data", "--scratch", str(scratch), "--length", "3.5", "--seconds",
            "0.05", "--batch", "2", "--batches", "8", "--cores", "1", "--json", str(scratch / "out" / "told.json"),
        ],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((scratch / "out" / "told.json").read_text()), done.stdout


@pytest.mark.exhaustive("runs every benchmark; its parts are tested below")
def test_every_part_is_told(told, samples):
    numbers, printed = told
    assert set(numbers) == {"machine", "decode", "workers", "wait", "memory"}
    names = [sample.name for sample in samples]
    assert {"H.264 320×240", "H.264 1280×720", "H.264 as stored 456×256"} <= set(names)
    assert [row["clip"] for row in numbers["decode"]] == names
    assert [(row["workers"], row["threads"]) for row in numbers["workers"]] == [(0, 1), (1, 1)]
    assert [(row["model"], row["clip"]) for row in numbers["wait"]] == [
        (model, name) for model in ("vit_b", "videomae_b") for name in names
    ]
    for name in names:
        assert printed.count(name) == 3
    assert re.search(r"Memory over 8 batches \(16 clips\), 1 workers: [+-]\d+ KiB for 1,000 clips", printed)


@pytest.mark.exhaustive("runs every benchmark; its parts are tested below")
def test_numbers_are_finite_and_positive(told):
    numbers, _ = told
    for row in [*numbers["decode"], *numbers["workers"], *numbers["wait"]]:
        for name, value in row.items():
            if not isinstance(value, str):
                low = 0 if name in ("workers", "waiting", "core_ms") else 1e-9
                assert math.isfinite(value) and value >= low, (name, value)
    for row in numbers["decode"]:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"] and row["pairs"] >= 3
    assert all(row["efficiency"] == 1 for row in numbers["workers"])  # one against one
    assert math.isfinite(numbers["memory"]["slope"]) and numbers["memory"]["mebibytes"] > 50


@pytest.mark.exhaustive("runs every benchmark; its parts are tested below")
def test_waiting_follows_from_what_was_measured(told):
    numbers, _ = told
    rates = {row["clip"]: row["vmm"] for row in numbers["decode"]}
    for row in numbers["wait"]:
        assert row["supply"] == pytest.approx(16 * rates[row["clip"]])
        assert row["waiting"] == pytest.approx(max(0, 1 - row["supply"] / row["need"]))
        assert row["cores_needed"] == pytest.approx(16 * row["need"] / row["supply"])


def test_both_ways_decode_the_same_window(samples):
    window = decode.Window()
    for sample in samples:
        ours = decode._ours(sample.path, 0.7, window)
        plain = decode.straight_loop(sample.path, 0.7, window)
        assert ours.video.shape == plain.video.shape == (16, 224, 224, 3)
        # The middle square may begin two pixels elsewhere, which fine texture shows; another picture differs more.
        apart = np.abs(ours.video.astype(int) - plain.video).mean((1, 2, 3))
        another = np.abs(np.roll(ours.video, 1, 0).astype(int) - plain.video).mean((1, 2, 3))
        assert (apart < 0.6 * another).all(), (sample.name, apart, another)
        assert ours.audio.shape == plain.audio.shape
        # WebM tells times in milliseconds: the plain loop is as much late.
        lags = [np.corrcoef(ours.audio[:-16], np.roll(plain.audio, -lag)[:-16])[0, 1] for lag in range(17)]
        assert max(lags) > 0.98, (sample.name, lags)


def test_files_are_made_once(scratch, samples):
    written = []
    times = {sample.path: sample.path.stat().st_mtime_ns for sample in samples}
    again = clips.make(scratch, 3.5, written.append)
    assert written == [] and again == samples
    assert {sample.path: sample.path.stat().st_mtime_ns for sample in again} == times


def test_operations_of_a_clip():
    # Counted by a walk over the program of a training step: 202.3 and about 1,080 GFLOP.
    assert wait.clip_flops("videomae_b") / 1e9 == pytest.approx(202.3, abs=0.05)
    assert wait.clip_flops("vit_b") / 1e9 == pytest.approx(1080, rel=0.005)


def test_waiting_by_hand():
    assert wait.waiting(supply=50, need=200) == 0.75
    assert wait.waiting(supply=300, need=200) == 0
    (row,) = wait.table({"clip": 20.0}, 16, [], 0.0, 0.0, step_ms=100, batch=64)
    assert row["need"] == pytest.approx(640) and row["supply"] == 320 and row["waiting"] == pytest.approx(0.5)
    assert row["cores_needed"] == pytest.approx(32)


def test_slope_by_hand():
    assert workers.slope([0, 1, 2, 3], [5, 7, 9, 11]) == pytest.approx(2)
    assert workers.slope([0, 1, 2], [1, 0, 1]) == pytest.approx(0)


def test_workers_that_are_measured():
    assert workers.counts(1) == [(0, 1), (1, 1)]
    assert workers.counts(2) == [(0, 1), (0, 2), (1, 1), (2, 1)]
    assert workers.counts(6) == [(0, 1), (0, 6), (1, 1), (2, 1), (4, 1), (6, 1)]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_and_time_of_a_child_are_counted():
    code = "import sys\nblock = bytearray(b'1' * 100_000_000)\nwhile True:\n  print(sum(range(10**6)), flush=True)"
    before = workers.resident(workers.family(os.getpid()))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        for _ in range(20):
            child.stdout.readline()
        family = workers.family(os.getpid())
        assert child.pid in family
        assert workers.resident(family) - before > 90_000
        assert workers.processor_seconds([child.pid]) > 0
        child.kill()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "a.jsonl"], "--data and --tokenizer: give both"),
        (["--length", "2"], "--length 2: a test file has at least 3.13 s"),
        (["--batches", "2"], "--batches 2: a slope needs"),
        (["--model", "vit_x"], "--model: did you mean 'vit_"),
        (["--scratch", "{tmp}/file/x"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(flags, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    code = main(["bench", "data", *(flag.replace("{tmp}", str(tmp_path)) for flag in flags)])
    error = capsys.readouterr().err
    assert code == 2 and message in error
    assert error.count("\n") == 1 and error.startswith("vmm: error: ")


@pytest.mark.parametrize("flags", [["--utilisation", "40"], ["--seconds", "0"]])
def test_numbers_have_limits(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "data", *flags])
    assert f"{flags[0]}: a number above 0" in capsys.readouterr().err


def test_a_model_that_is_not_known():
    with pytest.raises(UserError, match="known: videomae_b, vit_b, vit_l"):
        wait.clip_flops("resnet")
