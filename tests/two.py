"""Real processes of one job on this machine: each with CPU devices of its own, joined over loopback."""

import os
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from conftest import FLAGS, ROOT
from support.server import server


class Ended(NamedTuple):
    """code: exit code. seconds: of time.monotonic(), when it ended. log: what it wrote to stderr and stdout."""

    code: int
    at: float
    log: str

    @property
    def last(self) -> str:
        return self.log.strip().splitlines()[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(process: int, processes: int, port: int, devices: int, **more: str) -> dict:
    """The variables of one process of a job."""
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", FLAGS)
    told = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
    }
    mine = {"XLA_FLAGS": flags, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return os.environ | mine | (told if processes > 1 else {}) | more


class Job:
    """`python …` in each of several processes, their output in files."""

    def __init__(self, arguments: list, folder: Path, processes: int = 2, devices: int = 4, **more: str):
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.logs = [folder / f"process{process}.log" for process in range(processes)]
        self.processes = []
        for process, log in enumerate(self.logs):
            with open(log, "w") as file:
                variables = environment(process, processes, port, devices, **more)
                self.processes.append(
                    server.start(arguments, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT)
                )

    def wait(self, seconds: float = 180) -> list[Ended]:
        """Waits for all of them; kills them after so many seconds."""
        deadline, ended = time.monotonic() + seconds, {}
        while len(ended) < len(self.processes):
            for number, process in enumerate(self.processes):
                if number not in ended and process.poll() is not None:
                    ended[number] = time.monotonic()
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"not ended: {[log.read_text()[-3000:] for log in self.logs]}")
            time.sleep(0.02)
        return [
            Ended(process.returncode, ended[number], log.read_text())
            for number, (process, log) in enumerate(zip(self.processes, self.logs))
        ]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
