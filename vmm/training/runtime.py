"""The process around a run: one job per workdir, signals that save first, a cache of compiled programs."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import signal
import socket
import threading
import time
from pathlib import Path

import jax

from vmm.build import write_text
from vmm.errors import StorageError, UserError
from vmm.paths import is_remote
from vmm.training import distributed


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/vmm/jax; nowhere if that cannot be."""
    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmm" / "jax"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # no home, or none that can be written
            return
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Small programs too: JAX leaves out what compiles within a second, and a start compiles dozens of these.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def open_workdir(workdir: Path) -> None:
    """Makes the folder of a run.

    Raises:
      StorageError: it cannot be made or written to.
    """
    probe = workdir / f".write-{socket.gethostname()}-{os.getpid()}"  # processes of a job do this all at once
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"workdir {workdir}: cannot be written ({error.strerror or error}); choose another or free space"
        ) from None


class RunLock:
    """Holds a workdir for one job; released when process 0 ends, however it ends.

    A lock of the file system where it has them; elsewhere (buckets) a file that names the holder and is written again
    every `beat` seconds: one that is not is a dead job's. Only process 0 takes the lock, and the others look whether
    they see its file: a workdir is one folder for all processes.
    """

    def __init__(self, workdir: Path, beat: float = 30.0):
        self.path, self.beat = workdir / "lock", beat
        self.file, self.ended = None, threading.Event()
        self.me = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}

    def __enter__(self):
        """Raises UserError where another job holds the workdir, or this process sees another folder than process 0."""
        if not distributed.first_process():
            self._check_shared(str(distributed.said("lock")))
        elif not self._lock_file():
            self._take_by_beats()
        if distributed.first_process():
            distributed.said("lock", self.me["token"])
        return self

    def _lock_file(self) -> bool:
        """Takes the file system's lock; False: it has none."""
        if is_remote(self.path):
            return False
        self.file = open(self.path, "a", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise self._held(self._holder()) from None
            return False
        self.file.truncate(0)
        self.file.write(self._text())
        self.file.flush()
        return True

    def _take_by_beats(self) -> None:
        holder = self._holder()
        if holder and not self._dead(holder):
            print(
                f"workdir {self.path.parent}: {_who(holder)} held it; waiting {2.5 * self.beat:.0f} s for a sign of life"
            )
            deadline = time.monotonic() + 2.5 * self.beat
            while time.monotonic() < deadline:
                time.sleep(self.beat / 10)
                now = self._holder()
                if now is None:
                    break
                if now != holder:
                    raise self._held(now)
        write_text(self.path, self._text())
        time.sleep(min(1.0, self.beat / 10))  # of two that come at once the last writer has it
        winner = self._holder()
        if winner is None or winner["token"] != self.me["token"]:
            raise self._held(winner)
        threading.Thread(target=self._keep_beating, name="vmm-lock", daemon=True).start()

    def _keep_beating(self) -> None:
        while not self.ended.wait(self.beat):
            with contextlib.suppress(OSError):  # a bucket that answers late; the next beat comes
                write_text(self.path, self._text())

    def _text(self) -> str:
        return json.dumps(self.me | {"time": time.time()}) + "\n"

    def _holder(self) -> dict | None:
        """What the file says of its holder; None: nothing."""
        try:
            holder = json.loads(self.path.read_text())
            return holder if {"host", "pid", "token", "time"} <= set(holder) else None
        except (OSError, ValueError, TypeError):
            return None

    def _dead(self, holder: dict) -> bool:
        if holder["host"] != self.me["host"]:
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return holder["pid"] == self.me["pid"]  # an earlier life of this container

    def _held(self, holder: dict | None) -> UserError:
        by = f" ({_who(holder)})" if holder else ""
        return UserError(
            f"workdir {self.path.parent}: another job is running in it{by}; wait for it, end it or choose another workdir"
        )

    def _check_shared(self, token: str) -> None:
        deadline = time.monotonic() + 60  # a network's file system may show files late
        while (self._holder() or {}).get("token") != token:
            if time.monotonic() > deadline:
                raise UserError(
                    f"workdir {self.path.parent}: this process does not see what process 0 wrote there; give all processes "
                    "one folder that they share"
                )
            time.sleep(0.5)

    def __exit__(self, *_):
        self.ended.set()
        if self.file is not None and not self.file.closed:
            self.file.close()
        elif distributed.first_process():
            self.path.unlink(missing_ok=True)


def _who(holder: dict) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["time"]))
    return f"process {holder['pid']} on {holder['host']}, {since}"


class StopSignal:
    """SIGTERM and Ctrl-C ask for a stop at the end of the step; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.asked: str | None = None
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number, frame):
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
