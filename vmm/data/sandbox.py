"""Calls in child processes that may hang, crash or eat memory without harm: each has limits, each ends in a result or a reason.

A child is started once and used for call after call; one that dies or is stopped is replaced. What
a call gives is a list of bytes objects with a small dict: nothing a broken child could send is run.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import struct
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import NamedTuple

_PATIENCE = 5  # clock seconds a call may take for one allowed second of processor time
_START = 120.0  # seconds for a child to import what it calls


class Limits(NamedTuple):
    """What one call may use.

    seconds: of processor time, so that a busy or suspended machine fails no good file; a call that waits instead
    of working ends after 5 times as long by the clock. memory: bytes of address space beyond what the
    child starts with. bytes: of the answer, all parts together.
    """

    seconds: float = 120.0
    memory: int = 2 << 30
    bytes: int = 1 << 30


class Died(Exception):
    """A call did not return. `reason` is one of DEATHS."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


DEATHS = ("timeout", "crashed", "out of memory", "answer too large", "killed")
"""killed: by somebody else, or by the system for want of memory on the whole machine."""


class Answer(NamedTuple):
    """What a call gave. note: JSON data. parts: bytes objects."""

    note: dict
    parts: list[bytes]


class Sandbox:
    """One child process that calls one function, again and again.

    function: "package.module:name" of a function (**JSON arguments) → Answer. It must turn what it
    expects to go wrong into its note; an exception that leaves it counts as a crash.
    """

    def __init__(self, function: str, limits: Limits = Limits()):
        self.function, self.limits, self.process = function, limits, None
        self.expired = self.ended = False

    def __call__(self, arguments: dict) -> Answer:
        """Raises Died where the child hung, crashed, or went over a limit; OSError where no child can be started."""
        if self.process is None or not self.process.is_alive():
            self._start()
        self.expired = False
        alarm = threading.Timer(_PATIENCE * self.limits.seconds, self._expire, [self.process])
        alarm.daemon = True
        alarm.start()
        whole = False
        try:
            self.pipe.send_bytes(json.dumps(arguments).encode())
            answer = self._receive()
            whole = True
            return answer
        except (EOFError, OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise self._died(error) from None
        finally:
            alarm.cancel()
            alarm.join()
            # A child that was stopped, or whose answer was not read to its end, is of no more use.
            if self.expired or not whole:
                self.close()

    def _start(self) -> None:
        self.close()
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        process = context.Process(target=_child, args=(theirs, self.function, self.limits), daemon=True)
        # Ctrl-C comes to the children too, and would end one that still imports with a traceback of its own: they
        # inherit that this thread does not hear it. (The tracker, if it had to be started in between, would undo that.)
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.process, self.pipe = process, pipe
        theirs.close()
        if self.ended:  # kill() came while there was nothing to kill
            self.close()
            raise Died("killed", "the sandbox was ended")
        # Importing is not part of the first call's time.
        with contextlib.suppress(EOFError):
            if pipe.poll(_START) and pipe.recv_bytes() == b"ready":
                return
        self.close()
        raise OSError(f"a child process for {self.function} did not start (its error stands above)")

    def _receive(self) -> Answer:
        note = json.loads(self.pipe.recv_bytes(1 << 28))
        if "crash" in note:
            raise Died("out of memory" if note["memory"] else "crashed", note["crash"])
        if sum(note["sizes"]) > self.limits.bytes:
            raise Died("answer too large", f"over {self.limits.bytes} bytes")
        parts = [self.pipe.recv_bytes(size) for size in note["sizes"]]
        if [len(part) for part in parts] != note["sizes"]:
            raise ValueError("parts of other sizes than announced")
        return Answer(note["note"], parts)

    def _expire(self, process) -> None:
        self.expired = True
        process.kill()

    def _died(self, error: Exception) -> Died:
        if isinstance(error, (EOFError, ConnectionError)):
            self.process.join(5)
        code = self.process.exitcode
        if code == -signal.SIGPROF:
            return Died("timeout", f"over {self.limits.seconds:g} s")
        if self.expired or code == -signal.SIGALRM:
            return Died("timeout", f"waited for over {_PATIENCE * self.limits.seconds:g} s")
        if code == -signal.SIGKILL:
            return Died("killed", "by the system or somebody else")
        if code is not None and code < 0:
            names = {int(number): number.name for number in signal.Signals}
            return Died("crashed", names.get(-code, f"signal {-code}"))
        if code is None:
            return Died("crashed", f"its answer makes no sense ({type(error).__name__})")
        return Died("crashed", f"exit code {code}")

    def kill(self) -> None:
        """Ends the child for good, also in the middle of a call, from any thread; that call raises Died."""
        self.ended = True
        process = self.process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Ends the child; the next call starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


def _child(pipe: Connection, function: str, limits: Limits) -> None:
    """Runs in the child: answers calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to act on
    # One child a core is the caller's choice: a library's pool of threads in each would spin on cores that others use, and
    # count as this call's processor time.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, name = function.split(":")
    call = getattr(importlib.import_module(module), name)
    with open("/proc/self/statm") if os.path.exists("/proc/self/statm") else contextlib.nullcontext() as file:
        now = int(file.read().split()[0]) * resource.getpagesize() if file else 0
    # macOS has no working limit of address space; the time limit holds there.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (now + limits.memory, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send_bytes(b"ready")
    while True:
        try:
            arguments = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        # Both end the process without Python's help: a loop in C may never let go of it, and the parent may be gone.
        signal.setitimer(signal.ITIMER_PROF, limits.seconds)
        signal.setitimer(signal.ITIMER_REAL, 2 * _PATIENCE * limits.seconds)
        try:
            answer = call(**arguments)
            head = {"note": answer.note, "sizes": [len(part) for part in answer.parts]}
        except MemoryError:
            answer, head = Answer({}, []), {"crash": "MemoryError", "memory": True}
        except Exception as error:
            answer, head = Answer({}, []), {"crash": f"{type(error).__name__}: {error}"[:300], "memory": False}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(json.dumps(head).encode())
        for part in answer.parts:
            pipe.send_bytes(part)
        del answer


def _end_with_parent() -> None:
    """A child in the middle of a call does not see its pipe close: it must not outlive a killed parent."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_all(
    function: str, jobs: Iterable[tuple[object, dict]], workers: int, limits: Limits = Limits()
) -> Iterator[tuple[object, Answer | Died]]:
    """Yields (key, what came of it) for every (key, arguments), as they end; `workers` children at a time.

    A bounded number of jobs is read ahead and of answers held, so neither need fit in memory. A call that died
    is not tried again (the same file would do it again) unless somebody else killed it; then once.
    Close the iterator where it is left early: that ends the children.
    """
    sandboxes = [Sandbox(function, limits) for _ in range(workers)]
    free, jobs = list(sandboxes), iter(jobs)

    def one(sandbox: Sandbox, key, arguments: dict):
        try:
            return sandbox, key, sandbox(arguments)
        except Died as died:
            if died.reason != "killed" or sandbox.ended:
                return sandbox, key, died
        try:
            return sandbox, key, sandbox(arguments)
        except Died as died:
            return sandbox, key, died

    pool = ThreadPoolExecutor(workers)
    running: set = set()
    try:
        while True:
            while free and (job := next(jobs, None)) is not None:
                running.add(pool.submit(one, free.pop(), *job))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                sandbox, key, answer = future.result()
                free.append(sandbox)
                yield key, answer
    finally:
        for sandbox in sandboxes:
            sandbox.kill()  # ends the calls that still run
        pool.shutdown(wait=True, cancel_futures=True)
        for sandbox in sandboxes:
            sandbox.close()
