"""The supervisor starts again after what a new start may mend, and after nothing else."""

import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from vmm import supervise as module

# A child that ends with the next code of a list, after making the next checkpoint of another; "wait": until a signal.
CHILD = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
count = len(list(folder.glob("start*")))
(folder / f"start{count}").touch()
code, saved = [item.split(":") for item in sys.argv[2:]][count]
if saved:
    (folder / "checkpoints" / saved).mkdir(parents=True)
if code == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
    (folder / "waits").touch()
    time.sleep(60)
if code.startswith("-"):
    import os
    os.kill(os.getpid(), -int(code))
sys.exit(int(code))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(codes and checkpoints, restarts) → (exit code, starts, what was said, the pauses)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    pauses, said = [], []
    monkeypatch.setattr(module._Stop, "sleep", lambda self, seconds: pauses.append(seconds))

    def run(ends: list[str], restarts: int = 8):
        command = [sys.executable, "-c", CHILD, str(tmp_path), *ends]
        code = module.supervise([], str(tmp_path), restarts, command, said.append)
        return code, len(list(tmp_path.glob("start*"))), said, pauses

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_done_or_hopeless_is_not_started_again(code, run):
    assert run([f"{code}:"])[:3] == (code, 1, [])


def test_started_again_until_done(run):
    code, starts, said, pauses = run(["1:", "6:3", "-9:", "42:6", "42:6b", "5:9", "0:"])
    assert (code, starts) == (0, 7)
    reasons = [
        "exit code 1",
        "exit code 6 (a step did not end)",
        "SIGKILL",
        "42 (stopped",
        "42 (stopped",
        "exit code 5",
    ]
    assert all(reason in line for reason, line in zip(reasons, said, strict=True)), said
    assert said[0].endswith("from the beginning") and said[1].endswith("from step 3")
    assert pauses[3] == pauses[4] == 0.0, "at once after a preemption"
    assert 0 < pauses[0] <= 1.25 and 0 < pauses[2] <= 1.25


def test_gives_up_without_progress(run):
    code, starts, said, _ = run(["1:2", "1:", "1:", "-6:", "0:"], restarts=2)
    assert (code, starts) == (134, 4), "the first brought a checkpoint; three in a row did not"
    assert "ended by SIGABRT; 3 times in a row without a new checkpoint: given up" in said[-1]


def test_pauses_grow_up_to_five_minutes():
    bounds = [(module.wait_before(failures), min(300.0, 2.0 ** (failures - 1))) for failures in range(1, 15)]
    assert all(0.75 * middle <= pause <= 1.25 * middle for pause, middle in bounds)


@pytest.mark.parametrize("again", [False, True])
def test_asked_to_stop(again, tmp_path):
    """SIGTERM reaches the child, whose code is the last word; in a pause it ends the supervisor."""
    ends = ["6:", "6:", "6:", "6:", "6:", "6:"] if again else ["wait:"]
    code = (
        "import sys; from vmm import supervise as m; m.FIRST = 60.0 if sys.argv[1] == 'True' else 1.0; "
        "sys.exit(m.supervise([], sys.argv[2], 8, sys.argv[3:]))"
    )
    child = [sys.executable, "-c", CHILD, str(tmp_path), *ends]
    process = subprocess.Popen([sys.executable, "-c", code, str(again), str(tmp_path), *child], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / ("start0" if again else "waits")).exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    if again:
        time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == (6 if again else 42)
    assert len(list(tmp_path.glob("start*"))) == 1


def test_child_ends_when_the_supervisor_is_killed(tmp_path):
    code = "import sys; from vmm import supervise as m; sys.exit(m.supervise([], sys.argv[1], 8, sys.argv[2:]))"
    child = [sys.executable, "-c", CHILD.replace("sys.exit(42)", "(folder / 'ended').touch() or sys.exit(42)")]
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *child, str(tmp_path), "wait:"], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "waits").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    while not (tmp_path / "ended").exists():
        assert time.monotonic() < deadline, "the child goes on unwatched"
        time.sleep(0.02)
