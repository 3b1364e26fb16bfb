"""Faults on demand, so that a cluster's recovery can be tried before it is needed.

    VMM_FAULT=kill:1@13,nan@20,stuck:0@30,diskfull@40 vmm train …

Each is kind[:process]@step, and happens just before that step; without a process it happens on all. Once a run: what
happened is written to the workdir first, so that a restart does not meet it again.

kill: SIGKILL. term: SIGTERM. raise: an exception. stuck: sleeps for ever. nan: the step's loss is not a number, everywhere.
diskfull: the next save fails. flip: one bit of the newest checkpoint changes.
"""

import json
import os
import random
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from vmm.errors import UserError, one_of
from vmm.paths import is_remote
from vmm.training.checkpoint import Checkpoints

VARIABLE = "VMM_FAULT"
KINDS = ("diskfull", "flip", "kill", "nan", "raise", "stuck", "term")


class Fault(NamedTuple):
    """process: None: all. text: as it was written."""

    kind: str
    process: int | None
    step: int
    text: str


class InjectedFault(Exception):
    """What the fault `raise` raises."""


def parse_faults(text: str) -> list[Fault]:
    """Returns the faults of a VMM_FAULT, in its order.

    Raises:
      UserError: it cannot be read.
    """
    faults = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(\w+)(?::(\d+))?@(\d+)", item)
        if not found or int(found[3]) < 1:
            raise UserError(f"{VARIABLE}: {item!r} is not kind[:process]@step, as in kill:1@13; steps begin at 1")
        if found[1] not in KINDS:
            raise UserError(f"{VARIABLE}: unknown kind {found[1]!r} in {item!r}; {one_of(found[1], KINDS)}")
        faults.append(Fault(found[1], int(found[2]) if found[2] else None, int(found[3]), item))
    return faults


class Faults:
    """The faults of this process that have not happened yet."""

    def __init__(self, workdir: Path, environment: Mapping[str, str] | None = None):
        """Raises UserError: as parse_faults."""
        environment = os.environ if environment is None else environment
        self.path, self.process = workdir / "faults.json", jax.process_index()
        self.left = parse_faults(environment.get(VARIABLE, ""))
        if self.left:
            lines = self.path.read_text().splitlines() if self.path.is_file() else []
            gone = {(record["fault"], record["process"]) for record in map(json.loads, lines)}
            # A not-a-number is part of the program, which must be the same everywhere: gone for one is gone for all.
            mine = np.array([(fault.text, self.process) in gone for fault in self.left])
            everywhere = _any(mine)
            self.left = [
                fault
                for fault, here, there in zip(self.left, mine, everywhere)
                if not (there if fault.kind == "nan" else here)
            ]

    @property
    def poison(self) -> tuple[int, ...]:
        """Steps whose loss the program makes not-a-number."""
        return tuple(sorted({fault.step for fault in self.left if fault.kind == "nan"}))

    def before(self, step: int, checkpoints: Checkpoints) -> None:
        """Lets happen what is to happen before this step."""
        due = [fault for fault in self.left if fault.step == step]
        for fault in due:
            self.left.remove(fault)
            if fault.process in (None, self.process) or fault.kind == "nan":
                self._note(fault)
                self._happen(fault, checkpoints)

    def _note(self, fault: Fault) -> None:
        record = json.dumps({"fault": fault.text, "process": self.process}) + "\n"
        if is_remote(self.path):  # one process at a time there
            self.path.write_text((self.path.read_text() if self.path.is_file() else "") + record)
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(record)
            file.flush()
            os.fsync(file.fileno())

    def _happen(self, fault: Fault, checkpoints: Checkpoints) -> None:
        if fault.kind != "nan":
            print(f"{VARIABLE}: {fault.text} on process {self.process}", flush=True)
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault.kind == "raise":
            raise InjectedFault(f"{VARIABLE}: {fault.text}")
        elif fault.kind == "stuck":
            while True:
                time.sleep(60)
        elif fault.kind == "diskfull":
            checkpoints.fail_next = True
        elif fault.kind == "flip":
            checkpoints.wait()
            if checkpoints.latest is not None:
                flip_bit(checkpoints.folder / str(checkpoints.latest), random.Random(fault.step))


def flip_bit(folder: Path, rng: random.Random) -> tuple[Path, int]:
    """Flips one bit of the arrays of a checkpoint; returns the file and the bit's number.

    It is of the first half of the largest file: behind them come nodes of Orbax's tree that nothing reads any more.
    """
    path = max(sorted(folder.glob("**/d/*")), key=lambda path: path.stat().st_size)
    bit = rng.randrange(4 * path.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))
    return path, bit


def _any(mine: np.ndarray) -> np.ndarray:
    """Elementwise: whether it is so on any process."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(mine)).any(0)
