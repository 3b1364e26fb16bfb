"""vmm supervise: runs `vmm train` as a child and starts it again after what a new start may mend.

Every host of a job runs one: since all processes of a job end together, all are started again together.
"""

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from vmm.paths import to_path

PREEMPTED = 42
# Exit code → what it means, for those after which a new start may do better.
AGAIN = {1: "it crashed, or another process did", 5: "a result could not be written", 6: "a step did not end",
         7: "devices held different bytes"}  # fmt: skip
FIRST, LONGEST = 1.0, 300.0  # seconds of waiting before a start: doubled each time without progress


class _Stop:
    """SIGTERM and Ctrl-C are passed on to the child; after them nothing is started again."""

    def __init__(self):
        self.child: subprocess.Popen | None = None
        self.asked: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number, frame):
        self.asked = number
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    def sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.asked is None and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


def supervise(
    words: Sequence[str], workdir: str, restarts: int = 8, command: Sequence[str] | None = None, say: Callable = print
) -> int:
    """Runs `vmm train WORDS` until it is done, cannot be mended, or was asked to stop; returns its last exit code.

    Again at once after 42 (a signal came from elsewhere, as from a machine that is taken away), with growing pauses after
    crashes, hangs and kills; never after 0, 2, 3 and 4.

    Args:
      words: what follows `vmm train`. workdir: whose checkpoints are the progress.
      restarts: so many in a row without a new checkpoint are the end. command: what is run, for tests.
    """
    command = [sys.executable, "-m", "vmm", "train", *words] if command is None else command
    stop, failures, started, saved = _Stop(), 0, 0, newest(workdir)
    while True:
        # A group of its own: a terminal's Ctrl-C comes once, from here.
        stop.child = subprocess.Popen(command, preexec_fn=end_with_parent, process_group=0)
        if stop.asked is not None:  # it came in between
            stop.child.send_signal(stop.asked)
        code = stop.child.wait()
        started += 1
        why = _why(code)
        if why is None or stop.asked is not None:
            return _exit_code(code)
        before, saved = saved, newest(workdir)
        failures = 0 if saved != before else failures + 1
        if failures > restarts:
            say(f"vmm supervise: {why}; {failures} times in a row without a new checkpoint: given up")
            return _exit_code(code)
        pause = 0.0 if code == PREEMPTED and failures <= 1 else wait_before(failures)
        at = "from the beginning" if saved is None else f"from step {saved}"
        say(f"vmm supervise: {why}; restart {started} in {pause:.1f} s, {at}")
        stop.sleep(pause)
        if stop.asked is not None:
            return _exit_code(code)


def wait_before(failures: int) -> float:
    """Returns seconds to wait before a start: doubled with each failure, a random part of it so that hosts spread."""
    return min(LONGEST, FIRST * 2.0 ** max(0, failures - 1)) * random.uniform(0.75, 1.25)


def newest(workdir: str) -> int | None:
    """Returns the step of the newest checkpoint in a workdir, None without one."""
    folder = to_path(workdir) / "checkpoints"
    try:
        return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=None)
    except OSError:
        return None


def _why(code: int) -> str | None:
    """Returns what to say of an end after which to start again; None: not again."""
    if code == PREEMPTED:
        return "exit code 42 (stopped by a signal, saved)"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    if code in AGAIN:
        return f"exit code {code} ({AGAIN[code]})"
    # 128 + n: a shell's or a container's word for a signal; those of Ctrl-C and SIGTERM were meant.
    return f"exit code {code}" if code > 128 and code not in (130, 143) else None


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def end_with_parent() -> None:
    """In the child: a SIGTERM when the supervisor dies, so that no run goes on that nobody watches."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() == 1 and os.getpid() != 1:  # it died before
        os.kill(os.getpid(), signal.SIGTERM)
