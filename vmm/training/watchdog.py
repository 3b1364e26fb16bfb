"""A step that does not end within its time ends the process, exit code 6: every thread's stack and the line it is stuck at.

Where it waits for a process that gives no sign of life, that one is named instead.
"""

import ctypes
import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from vmm.training import distributed

_PACKAGE = str(Path(__file__).parent.parent)
_FIRST = 10  # times longer for a step that compiles, and for evaluation
_WAITING = 2.0  # seconds that who waits for others gives whom it waits for, to be named first
_HELD = 2.5  # seconds after which the process ends even where C code holds Python's lock


class Watchdog:
    """Watches the main thread: every beat allows the next so many seconds. Use it as a context; 0 seconds: off.

    Where C code holds the interpreter's lock no Python runs: then the C library's timer ends the process, after
    faulthandler's thread has written the stacks. (On systems without such timers the exit code is then 1.)
    """

    def __init__(self, seconds: float):
        """seconds: what a step may take; the first step, and whatever is said to be slow, ten times that."""
        self.seconds = seconds
        self.deadline, self.allowed, self.what = float("inf"), 0.0, ""
        self.ended = threading.Event()

    def __enter__(self):
        if self.seconds:
            self.main = threading.current_thread().ident
            self.timer = _Timer() if sys.platform == "linux" else None
            threading.Thread(target=self._watch, name="vmm-watchdog", daemon=True).start()
        return self

    def beat(self, what: str, slow: bool = False) -> None:
        """Begins to time `what`, as "step 31"; what was timed before has ended."""
        if not self.seconds:
            return
        self.allowed = self.seconds * (_FIRST if slow else 1)
        self.what = what
        self.deadline = time.monotonic() + self.allowed
        late = self.allowed + _WAITING + _HELD
        faulthandler.dump_traceback_later(late - 0.5, exit=self.timer is None, file=2)
        if self.timer is not None:
            self.timer.arm(late)

    def __exit__(self, *_):
        if self.seconds:
            self.ended.set()
            self.deadline = float("inf")
            faulthandler.cancel_dump_traceback_later()
            if self.timer is not None:
                self.timer.arm(0)

    def _watch(self) -> None:
        while not self.ended.wait(min(1.0, self.seconds / 10)):
            if time.monotonic() < self.deadline:
                continue
            place, waits = self._place()
            # For another process, most likely: that one is to speak first, and is named where it cannot.
            silent = distributed.silent(_WAITING) if waits else {}
            if time.monotonic() < self.deadline:
                continue
            faulthandler.cancel_dump_traceback_later()
            line = f"{self.what} did not end within {self.allowed:g} s; "
            if silent:  # where this one waits says nothing
                line += (
                    f"no sign of life from {', '.join(silent.values())}: stopped, or a machine that hangs; see there"
                )
            else:
                faulthandler.dump_traceback(file=2, all_threads=True)
                line += f"it {'waits' if waits else 'is stuck'} at {place}"
            os.write(2, f"vmm: error: {line}\n".encode())
            distributed.hang(line, silent)

    def _place(self) -> tuple[str, bool]:
        """Where the main thread is: the innermost line of vmm, and whether it waits there for a device or a process."""
        frame = sys._current_frames().get(self.main)
        stack = traceback.extract_stack(frame)
        waits = any("/jax/" in entry.filename or entry.filename == distributed.__file__ for entry in stack[-4:])
        mine = [entry for entry in stack if entry.filename.startswith(_PACKAGE)] or stack[-1:]
        if not mine:
            return "an unknown place", waits
        entry = mine[-1]
        name = entry.filename.removeprefix(os.path.dirname(_PACKAGE) + os.sep)
        return f"{name}:{entry.lineno} ({entry.line or entry.name})", waits


class _Event(ctypes.Structure):
    """struct sigevent of glibc, for a timer that calls a function in a thread of its own."""

    _fields_ = [
        ("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("padding", ctypes.c_char * 64),
    ]  # fmt: skip


class _Span(ctypes.Structure):
    _fields_ = [("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2)]  # seconds, nanoseconds each


class _Timer:
    """Ends the process with exit code 6 after a while, without Python: a POSIX timer that calls _exit(6)."""

    _THREAD, _MONOTONIC = 2, 1  # SIGEV_THREAD, CLOCK_MONOTONIC

    def __init__(self):
        self.library = ctypes.CDLL(None)
        function = ctypes.cast(self.library._exit, ctypes.c_void_p).value
        event = _Event(value=distributed.HANG, notify=self._THREAD, function=function)
        self.id = ctypes.c_void_p()
        self.there = self.library.timer_create(self._MONOTONIC, ctypes.byref(event), ctypes.byref(self.id)) == 0

    def arm(self, seconds: float) -> None:
        """seconds: from now; 0: never."""
        if self.there:
            span = _Span(value=(int(seconds), int(seconds % 1 * 1e9)))
            self.library.timer_settime(self.id, 0, ctypes.byref(span), None)
