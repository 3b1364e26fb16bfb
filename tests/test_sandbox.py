"""Calls in child processes: each way to hang, crash or eat memory ends in its reason, and the next call is served."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vmm.data.sandbox import DEATHS, Answer, Died, Limits, Sandbox, run_all

HERE = "tests.test_sandbox"
ROOT = Path(__file__).parent.parent

# ---- what the children are asked to do ---------------------------------------------------------------


def echo(**arguments) -> Answer:
    return Answer({"pid": os.getpid(), **arguments}, [b"", b"one", bytes(range(256)) * 300])


def misbehave(how: str, **more) -> Answer:
    """One function for all, so that a child that survives one call can be seen to serve the next."""
    return HOW[how](**more)


def _spin():
    while True:
        pass


def _stuck_in_c():
    re.match(r"(a+)+$", "a" * 64 + "b")  # never lets other Python threads run


def _raise():
    raise KeyError("what a decoder never raises")


def _eat() -> Answer:
    held = []
    while True:
        held.append(bytearray(1 << 24))


def _eat_at_once() -> Answer:
    return Answer({}, [bytes(1 << 45)])


def _exit():
    os._exit(7)


def _signal(number: int):
    os.kill(os.getpid(), number)
    time.sleep(60)


def _answer(size: int) -> Answer:
    return Answer({}, [bytes(size // 2), bytes(size - size // 2)])


def _half_an_answer():
    """Announces more than it sends, as a child with a broken memory might."""
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\x00\x00\x10\x00half")
    time.sleep(60)


def _nonsense():
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\x00\x00\x00\x04[1,]")
    time.sleep(60)


def _die_once(mark: str) -> Answer:
    if not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return echo()


HOW = {
    "echo": echo,
    "sleep": lambda: time.sleep(600),
    "spin": _spin,
    "stuck in C": _stuck_in_c,
    "raise": _raise,
    "eat": _eat,
    "eat at once": _eat_at_once,
    "segfault": lambda: ctypes.string_at(1),
    "abort": os.abort,
    "exit": _exit,
    "signal": _signal,
    "answer": _answer,
    "half an answer": _half_an_answer,
    "nonsense": _nonsense,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "killed once": _die_once,
}

# ---- tests -------------------------------------------------------------------------------------------

SMALL = Limits(seconds=0.6, memory=1 << 28, bytes=1 << 20)


@pytest.fixture
def sandbox():
    box = Sandbox(f"{HERE}:misbehave", SMALL)
    yield box
    box.close()


def test_an_answer_comes_back_whole(sandbox):
    answer = sandbox({"how": "echo", "number": 3, "text": "ü\n\0", "nested": {"list": [1, None, 2.5]}})
    assert answer.note["number"] == 3
    assert answer.note["text"] == "ü\n\0"
    assert answer.note["nested"] == {"list": [1, None, 2.5]}
    assert answer.parts == [b"", b"one", bytes(range(256)) * 300]
    assert answer.note["pid"] != os.getpid()


def test_a_child_is_used_again(sandbox):
    pids = {sandbox({"how": "echo"}).note["pid"] for _ in range(20)}
    assert len(pids) == 1


DEADLY = {
    "sleep": ({}, "timeout", "waited for over 3 s"),
    "spin": ({}, "timeout", "over 0.6 s"),
    "stuck in C": ({}, "timeout", "over 0.6 s"),
    "half an answer": ({}, "timeout", "waited for over 3 s"),
    "raise": ({}, "crashed", "KeyError"),
    "segfault": ({}, "crashed", "SIGSEGV"),
    "abort": ({}, "crashed", "SIGABRT"),
    "exit": ({}, "crashed", "exit code 7"),
    "nonsense": ({}, "crashed", "makes no sense"),
    "eat": ({}, "out of memory", "MemoryError"),
    "eat at once": ({}, "out of memory", "MemoryError"),
    "answer": ({"size": (1 << 20) + 1}, "answer too large", "1048576"),
    "killed": ({}, "killed", ""),
}


@pytest.mark.parametrize("how", DEADLY)
def test_each_death_has_its_reason_and_the_next_call_is_served(sandbox, how):
    more, reason, detail = DEADLY[how]
    start = time.monotonic()
    with pytest.raises(Died) as died:
        sandbox({"how": how, **more})
    assert died.value.reason == reason
    assert detail in died.value.detail
    assert reason in DEATHS
    assert time.monotonic() - start < 20  # the machine may be loaded; the call itself may take 2 s
    assert sandbox({"how": "echo", "after": how}).note["after"] == how


def test_the_limit_itself_is_allowed(sandbox):
    assert sum(map(len, sandbox({"how": "answer", "size": 1 << 20}).parts)) == 1 << 20


def test_a_signal_that_a_terminal_sends_ends_no_call(sandbox):
    pid = sandbox({"how": "echo"}).note["pid"]
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert sandbox({"how": "echo"}).note["pid"] == pid


def test_a_call_that_waits_for_the_processor_is_not_counted(tmp_path):
    """A suspended machine (Ctrl-Z, a busy node) makes no file bad: only time at work counts against `seconds`."""
    box = Sandbox(f"{HERE}:stop_for", Limits(seconds=0.6))
    try:
        box({"seconds": 0.0})
        pid = box.process.pid
        timer = threading.Timer(1.2, os.kill, [pid, signal.SIGCONT])
        timer.start()
        assert box({"seconds": 0.05}).note["worked"] >= 0.05
    finally:
        box.close()


def stop_for(seconds: float) -> Answer:
    """Works for some seconds; before it, stops until somebody lets it go on."""
    if seconds:
        os.kill(os.getpid(), signal.SIGSTOP)
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    return Answer({"worked": time.process_time() - start}, [])


def test_a_call_can_be_ended_from_another_thread(sandbox):
    sandbox({"how": "echo"})
    threading.Timer(0.3, sandbox.kill).start()
    with pytest.raises(Died) as died:
        sandbox({"how": "sleep"})
    assert died.value.reason == "killed"


def test_a_child_between_calls_may_be_killed(sandbox):
    pid = sandbox({"how": "echo"}).note["pid"]
    os.kill(pid, signal.SIGKILL)
    sandbox.process.join()
    assert sandbox({"how": "echo"}).note["pid"] != pid


def test_a_function_that_cannot_be_imported_is_an_error():
    with pytest.raises(OSError, match="did not start"):
        Sandbox(f"{HERE}:nothing_of_the_kind")({})


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", ["sleep", "spin", "idle"])
def test_a_child_dies_with_its_parent(how):
    program = (
        "import sys, threading\n"
        "from vmm.data.sandbox import Sandbox, Limits\n"
        "if __name__ == '__main__':\n"
        f"    box = Sandbox('{HERE}:misbehave', Limits(seconds=100))\n"
        "    print(box({'how': 'echo'}).note['pid'], flush=True)\n"
        f"    box({{'how': '{how}'}}) if '{how}' != 'idle' else threading.Event().wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    child = int(parent.stdout.readline())
    assert alive(child)
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


# Many at a time.


def job(how: str, **more) -> dict:
    return {"how": how, **more}


def test_every_job_ends_once_also_where_children_die(tmp_path):
    deaths = ["segfault", "raise", "killed", "sleep", "eat at once", "abort"]
    jobs = [(i, job(deaths[i // 5 % 6]) if i % 5 == 3 else job("echo", i=i)) for i in range(40)]
    answers = list(run_all(f"{HERE}:misbehave", jobs, 3, SMALL))
    assert sorted(key for key, _ in answers) == list(range(40))
    for key, answer in answers:
        if key % 5 == 3:
            assert answer.reason == DEADLY[deaths[key // 5 % 6]][1]
        else:
            assert answer.note["i"] == key


def test_a_job_whose_child_somebody_killed_is_done_once_more(tmp_path):
    jobs = [(0, job("killed once", mark=str(tmp_path / "mark"))), (1, job("echo"))]
    answers = dict(run_all(f"{HERE}:misbehave", jobs, 1, SMALL))
    assert answers[0].note["pid"]
    assert answers[1].note["pid"]


def test_jobs_are_read_as_they_are_needed():
    read = []

    def jobs():
        for i in range(100):
            read.append(i)
            yield i, job("echo", i=i)

    answers = run_all(f"{HERE}:misbehave", jobs(), 2, SMALL)
    next(answers)
    assert len(read) <= 4
    answers.close()


def test_leaving_early_ends_the_children(tmp_path):
    jobs = [(0, job("echo")), (1, job("sleep")), (2, job("sleep"))]
    before = set(_children())
    answers = run_all(f"{HERE}:misbehave", jobs, 3, Limits(seconds=100))
    next(answers)
    assert len(set(_children()) - before) >= 3
    start = time.monotonic()
    answers.close()
    assert time.monotonic() - start < 10
    left = [pid for pid in set(_children()) - before if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert left == []


def _children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


def test_a_child_is_started_deaf_to_control_c():
    """A terminal sends it to all processes: one that still imports would end with a traceback of its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    box = Sandbox(f"{HERE}:stop_for")
    try:
        box._start()
        status = Path(f"/proc/{box.process.pid}/status").read_text()
        blocked = int(status.split("SigBlk:")[1].split()[0], 16)
        assert blocked >> (signal.SIGINT - 1) & 1
    finally:
        box.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
