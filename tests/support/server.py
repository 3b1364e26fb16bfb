"""Starts Python programs quickly: a server that has imported vmm forks one for each, as `python ARGUMENTS` would be.

The server imports and does nothing else: no JAX backend, no thread of its own. A program gets its own
environment, folder, process group and output, and ends as any interpreter does. What it cost counts for the test.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent
IMPORTED = (
    "jax", "flax.linen", "optax", "orbax.checkpoint", "grain", "tokenizers", "vmm.__main__", "vmm.train", "vmm.evaluate",
    "vmm.verify",
)  # fmt: skip


class Program:
    """A started program, with the part of subprocess.Popen's interface that tests use.

    Attributes:
      pid: the process, which is no child of this one.
      returncode: its exit code, minus the signal that ended it; None while it runs.
    """

    def __init__(self, line: socket.socket, stderr: int | None = None):
        self._line, self._file = line, line.makefile("r")
        self.pid = json.loads(self._file.readline())["pid"]
        self.returncode: int | None = None
        self.stderr = os.fdopen(stderr) if stderr is not None else None

    def poll(self) -> int | None:
        """Returns the exit code, None while it runs."""
        if self.returncode is None and select.select([self._line], [], [], 0)[0]:
            self._end()
        return self.returncode

    def _end(self) -> None:
        from support import budget

        answer = self._file.readline()
        assert answer, "the fork server is gone"
        told = json.loads(answer)
        self.returncode = told["code"]
        budget.add_foreign(told["seconds"])
        self._line.close()

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self._end()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Returns (None, what it wrote to stderr) at its end. Only of one started with `stderr=subprocess.PIPE`."""
        text = self.stderr.read()
        self.wait(timeout)
        return None, text

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Server:
    """One fork server, for as long as this object lives; started at the first program."""

    def __init__(self):
        self.process = None

    def _start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="forks")
        self.path = os.path.join(self.folder.name, "socket")
        environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.server", self.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=TESTS.parent,
        )  # fmt: skip
        assert self.process.stdout.readline() == b"ready\n", "the fork server did not start"

    def start(self, arguments: list, *, cwd: Path, env: dict, stdout=None, stderr=None, group: bool = False) -> Program:
        """Starts `python ARGUMENTS`: `-m MODULE …`, `-c CODE …` or `FILE …`. stdout, stderr: as of subprocess.Popen."""
        if self.process is None:
            self._start()
        line = socket.socket(socket.AF_UNIX)
        line.connect(self.path)
        read, pipe = os.pipe() if stderr == subprocess.PIPE else (None, None)
        out = stdout.fileno() if hasattr(stdout, "fileno") else 1
        if stderr == subprocess.STDOUT:
            error = out
        elif pipe is not None:
            error = pipe
        else:
            error = stderr.fileno() if hasattr(stderr, "fileno") else 2
        job = dict(arguments=[str(item) for item in arguments], cwd=str(cwd), env=dict(env), group=group)
        message = json.dumps(job).encode() + b"\n"
        socket.send_fds(line, [message[:1]], [out, error])
        line.sendall(message[1:])
        if pipe is not None:
            os.close(pipe)
        return Program(line, read)

    def close(self) -> None:
        """Ends the server, not the programs."""
        if self.process is not None:
            from support import budget

            self.process.stdin.close()
            self.process.wait(30)
            budget.add_foreign(-budget.foreign())  # from here on they count as what the server waited for
            self.process.stdout.close()
            self.folder.cleanup()
            self.process = None


server = Server()


def serve(path: str) -> dict:
    """Forks a process for every job that comes; returns only in such a process, with its job."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    print("ready", flush=True)
    lines: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listening, woken, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        if woken in ready:
            os.read(woken, 4096)
            _tell_ends(lines)
        if listening in ready:
            line, _ = listening.accept()
            first, handles, _, _ = socket.recv_fds(line, 1, 2)
            job = json.loads(first + line.makefile("rb").readline())
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (listening, line, *lines.values()):
                    other.close()
                os.close(woken), os.close(waker)
                return job | {"handles": handles}
            for handle in handles:
                os.close(handle)
            lines[pid] = line
            line.sendall(json.dumps({"pid": pid}).encode() + b"\n")


def _tell_ends(lines: dict) -> None:
    while lines:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == 0:
            return
        told = {"code": os.waitstatus_to_exitcode(status), "seconds": usage.ru_utime + usage.ru_stime}
        line = lines.pop(pid)
        with contextlib.suppress(OSError):  # whoever started it is gone
            line.sendall(json.dumps(told).encode() + b"\n")
        line.close()


def run(job: dict) -> None:
    """Becomes the program of a job."""
    if job["group"]:
        os.setpgid(0, 0)
    silence = os.open(os.devnull, os.O_RDONLY)
    for handle, number in zip((silence, *job["handles"]), (0, 1, 2)):
        os.dup2(handle, number)
        os.close(handle)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    kind, *rest = job["arguments"]
    sys.path[:] = [entry for entry in job["env"].get("PYTHONPATH", "").split(":") if entry] + sys.path
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    began = time.monotonic()
    for name in IMPORTED:
        __import__(name)
    run(serve(sys.argv[1]))
