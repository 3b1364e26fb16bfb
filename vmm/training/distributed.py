"""A job of several processes: they find each other, fail together with the first error last, and stop after the same step.

One process alone: nothing here does anything.
"""

import contextlib
import functools
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Collection, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from vmm.errors import PeerError, Preempted, UserError
from vmm.training.cluster import find_place
from vmm.training.link import Link, abort_late, bind_address

HANG = 6  # the exit code of a step that did not end
# Seconds. The link knows of a killed process at once and of a silent machine after 10; one that is stopped or slow is for
# step_timeout to judge, not for JAX's service, which aborts the healthy processes without a word of ours.
_HEARTBEAT = 86400
_TELLING = 4.0  # seconds within which the link knows why a connection between devices broke
_CLEANING = 10  # seconds that a failing process may take to end itself


class _Job:
    """This process's part in the job. `first`: the first failure, as it is told to all."""

    def __init__(self, link: Link):
        self.link, self.process, self.processes = link, link.place.process, link.place.processes
        self.first: dict | None = None
        self.leaving: set[int] = set()
        self.said: dict[str, object] = {}
        self.heard = threading.Condition()
        self.signs: set[int] = set()  # who has answered since a sign of life was asked for
        # Where the main thread is, and after which step all stop.
        self.steps = threading.Condition()  # its lock may be taken twice by one thread
        self.step, self.holding, self.until, self.reason = -1, False, None, None
        self.places: dict[int, int] = {}
        self.requested = False
        link.start(self._receive, self._gone)

    def name(self, process: int) -> str:
        host = self.link.hosts.get(process)
        return f"process {process} ({host})" if host else f"process {process}"

    # ---- what others tell, in the link's thread ---------------------------------------------------

    def _receive(self, process: int, message: Mapping) -> None:
        if "failed" in message:
            self._failed(dict(message), process)
        elif "bye" in message:
            self.leaving.add(process)
        elif "said" in message:
            with self.heard:
                self.said[message["said"]] = message["value"]
                self.heard.notify_all()
        elif "sign" in message:
            self._sign(process, int(message["sign"]))
        elif "alive" in message:
            self._alive(process, int(message["alive"]))
        elif "stop" in message and self.process == 0:
            self._hold(str(message["stop"]))
        elif "hold" in message:
            with self.steps:
                self.holding = True
                self.link.send({"at": self.step})
        elif "at" in message:
            self._collect(process, int(message["at"]))
        elif "until" in message:
            self._decide(int(message["until"]), str(message["reason"]))

    def _gone(self, process: int) -> None:
        if process not in self.leaving:
            time.sleep(0.2)  # its own last word may be on its way through process 0
            line = f"{self.name(process)} is gone without a word: killed, or its machine is; see its own log"
            self._failed({"failed": process, "line": line, "code": PeerError.code, "gone": True}, None)

    def _failed(self, failure: dict, sender: int | None) -> None:
        """Another process failed: this one ends with its line last, and its exit code."""
        if self.first is not None:
            return
        self.first = failure
        if self.process == 0:
            self.link.send(failure, besides=sender)
        line = failure["line"]
        first = line if failure.get("gone") else f"{self.name(failure['failed'])} failed first: {line}"
        _say(f"vmm: {first}")
        # In a thread of its own: this one sees the others close their lines.
        threading.Thread(target=self.end, args=(int(failure["code"]),), daemon=True).start()

    # ---- who is silent -----------------------------------------------------------------------------

    def silent(self, seconds: float) -> list[int]:
        """Returns the processes that give no sign of life within so many seconds: stopped, or their machines hang."""
        self.signs.clear()
        self.link.send({"sign": self.process})
        time.sleep(seconds)
        if self.process and 0 not in self.signs:
            return [0]  # through which the others would answer
        return [process for process in range(self.processes) if process not in (self.process, *self.signs)]

    def _sign(self, sender: int, asks: int) -> None:
        if self.process == 0:
            self.link.send({"sign": asks}, besides=sender)
        self.link.send({"alive": self.process})

    def _alive(self, sender: int, process: int) -> None:
        self.signs.add(process)
        if self.process == 0:
            self.link.send({"alive": process}, besides=sender)

    # ---- one step after which all stop -------------------------------------------------------------

    def agreed(self, step: int, asked: str | None) -> str | None:
        with self.steps:
            if asked and not self.requested and self.until is None:
                self.requested = True
                reason = f"{asked} on {self.name(self.process)}"
                if self.process == 0:
                    self._hold(reason)
                else:
                    self.link.send({"stop": reason})
            while self.holding and self.until is None:  # all tell where they are: the highest decides
                self.steps.wait()
            self.step = step
            return self.reason if self.until is not None and step >= self.until else None

    def _hold(self, reason: str) -> None:
        with self.steps:
            if self.reason is not None:
                return
            self.reason, self.holding, self.places = reason, True, {0: self.step}
            self.link.send({"hold": reason})

    def _collect(self, process: int, step: int) -> None:
        with self.steps:
            self.places[process] = step
            if len(self.places) < self.processes:
                return
            until, reason = max(self.places.values()) + 1, self.reason
        self.link.send({"until": until, "reason": reason})
        self._decide(until, reason)

    def _decide(self, until: int, reason: str) -> None:
        with self.steps:
            self.until, self.reason, self.holding = until, reason, False
            self.steps.notify_all()

    # ---- the end -----------------------------------------------------------------------------------

    def fail(self, line: str, code: int) -> bool:
        """Tells all of a failure here; False where another was first."""
        if self.first is not None:
            return self.first["failed"] == self.process
        self.first = {"failed": self.process, "line": line, "code": code}
        self.link.send(self.first)
        return True

    def end(self, code: int) -> None:
        """Ends the process, and its children, whatever its other threads do."""
        for child in multiprocessing.active_children():
            child.kill()
        if self.process == 0:  # the others' link and JAX's service live here
            self.link.drain(_CLEANING + 1)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


_job: _Job | None = None


def join(timeout: float = 300) -> None:
    """Joins this process to its job, if the environment shows one; before anything touches a device.

    timeout: seconds to wait for the others, VMM_JOIN_TIMEOUT where that is set.

    Raises:
      UserError: what the environment says is not whole. PeerError: others are missing; the line says which.
    """
    global _job
    place = find_place()
    if place is None or jax.distributed.is_initialized():
        return
    timeout = float(os.environ.get("VMM_JOIN_TIMEOUT", timeout))
    bind = bind_address(place, os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")) if place.process == 0 else ""
    link = Link(place, bind, timeout)
    abort_late()
    port = place.coordinator.rsplit(":", 1)[1]
    # Its handler of SIGTERM would be replaced by StopSignal's in silence, or replace it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(min(timeout, 300)),
        coordinator_bind_address=f"[{bind}]:{port}" if ":" in bind else f"{bind}:{port}",
        heartbeat_timeout_seconds=_HEARTBEAT,
        shutdown_timeout_seconds=60,
    )
    _job = _Job(link)


@contextlib.contextmanager
def joined():
    """Joins, and ends together: an error inside ends all processes within 15 s, the first error printed last.

    After an error in a job the process ends here, with the error's exit code; alone, the error goes on.
    """
    join()
    try:
        yield
    except Preempted:
        _leave()
        raise
    except BaseException as error:
        if _job is None:
            raise
        tell(error)
        _last_words(_told or error)
    else:
        _leave()


_told: BaseException | None = None


def tell(error: BaseException) -> None:
    """Tells the other processes of an error at once, before any cleaning up that may wait for them.

    From here this process has 10 s to clean up and end. Alone, or asked to stop: nothing.
    """
    global _told
    if _job is None or _told is not None or isinstance(error, Preempted):
        return
    _told = error
    if isinstance(error, jax.errors.JaxRuntimeError):
        end = time.monotonic() + _TELLING  # most likely the connection to a process whose failure is about to be told
        while _job.first is None and time.monotonic() < end:
            time.sleep(0.05)
    if not _job.fail(_line(error), _code(error)):
        time.sleep(_CLEANING)  # the first failure is said already, and ends this process
    timer = threading.Timer(_CLEANING, _last_words, (error,))
    timer.daemon = True
    timer.start()


def silent(seconds: float) -> dict[int, str]:
    """Waits so long, and returns the processes that gave no sign of life meanwhile, with their names; alone: none."""
    if _job is None:
        time.sleep(seconds)
        return {}
    return {process: _job.name(process) for process in _job.silent(seconds)}


def hang(line: str, silent: Collection[int] = ()) -> None:
    """Ends all processes as stuck; the caller has said why on this one. silent: who will not hear of it."""
    if _job is not None:
        _job.fail(line, HANG)
        for process in silent:
            _job.link.lines.pop(process, None)
        _job.end(HANG)
    os._exit(HANG)


def agreed(step: int, asked: str | None) -> str | None:
    """Returns why all processes stop after this step, None: they go on. Call it once a step.

    asked: what asked this process to stop. No device is used and nobody waits while nobody is asked.
    """
    if _job is not None:
        return _job.agreed(step, asked)
    if jax.process_count() == 1:
        return asked
    # Joined by other means than join().
    return "asked" if multihost_utils.process_allgather(np.asarray(asked is not None)).any() else None


def said(name: str, value: object = None, timeout: float = 300) -> object:
    """Returns what process 0 says under a name, once for a name; there `value` itself.

    Raises:
      PeerError: it says nothing within `timeout` seconds.
    """
    if _job is None:
        return value
    if _job.process == 0:
        _job.link.send({"said": name, "value": value})
        return value
    with _job.heard:
        if not _job.heard.wait_for(functools.partial(_job.said.__contains__, name), timeout):
            raise PeerError(f"process 0 said nothing of {name} within {timeout:.0f} s")
        return _job.said[name]


def check_same(name: str, value: str) -> None:
    """Raises UserError where process 0 was given another value, as of the config."""
    if said(f"same {name}", value) != value:
        raise UserError(
            f"{name}: another on this process than on process 0; give all processes the same words and code"
        )


def first_process() -> bool:
    """Whether this process writes what is written once."""
    return _job is None or _job.process == 0


def _leave() -> None:
    """Ends the job in peace: all wait for each other, so that the last save of each is whole."""
    global _job
    if _job is None:
        return
    _job.link.send({"bye": _job.process})
    _job.leaving |= set(range(_job.processes))
    jax.distributed.shutdown()
    _job = None


_saying = threading.Lock()


def _last_words(error: BaseException) -> None:
    """Prints the error, and after it the first one if that was another's; ends the process."""
    _saying.acquire()  # and never released: the main thread or the timer, whichever is first
    if isinstance(error, UserError):
        _say(f"vmm: error: {error}")
    elif isinstance(error, KeyboardInterrupt):
        _say("vmm: stopped")
    else:
        _say("".join(traceback.format_exception(error)).rstrip())
    first = _job.first
    if first["failed"] != _job.process:
        _say(f"vmm: {_job.name(first['failed'])} failed first: {first['line']}")
    _job.end(int(first["code"]))


def _line(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _say(line: str) -> None:
    # One write: lines of several threads stay whole.
    with contextlib.suppress(OSError):
        os.write(2, (line + "\n").encode())
