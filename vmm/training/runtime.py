"""The process around a run: one job per workdir, signals that save first, a cache of compiled programs."""

import fcntl
import os
import signal
from pathlib import Path

import jax

from vmm.errors import StorageError, UserError


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/vmm/jax."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vmm" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def open_workdir(workdir: Path) -> None:
    """Makes the folder of a run.

    Raises:
      StorageError: it cannot be made or written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / ".write").touch()
        (workdir / ".write").unlink()
    except OSError as error:
        raise StorageError(
            f"workdir {workdir}: cannot be written ({error.strerror}); choose another or free space"
        ) from None


class RunLock:
    """Holds a workdir for one job on this machine; released when the process ends, however it ends."""

    def __init__(self, workdir: Path):
        self.path = workdir / "lock"

    def __enter__(self):
        self.file = open(self.path, "w", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise UserError(
                f"workdir {self.path.parent}: another job is running in it; wait for it or choose another"
            ) from None
        return self

    def __exit__(self, *_):
        self.file.close()


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
