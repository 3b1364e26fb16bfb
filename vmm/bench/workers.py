"""The real loader: clips a second by worker processes, and the memory that it takes as batches go by."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vmm.data.loader import Loader
from vmm.data.samples import Augment, Clip, Data
from vmm.errors import UserError

_ROUNDS = 3
_FOREVER = 1 << 20  # steps
_PROC = Path("/proc/self/status")


def counts(cores: int) -> list[tuple[int, int]]:
    """Returns (worker processes, threads each) to measure: none with 1 and all threads, then 1, 2, 4 … all cores."""
    powers = [2**i for i in range(cores.bit_length()) if 2**i < cores]
    return [(0, 1), *([(0, cores)] if cores > 1 else []), *((count, 1) for count in (*powers, cores))]


def scaling(
    manifest: Path,
    tokenizer: Path,
    clip: Clip,
    cores: int,
    batch: int,
    seconds: float,
    told: Callable[[str], None] = lambda name: None,
) -> list[dict]:
    """Returns one row for each of `counts`: workers, threads, clips_per_second, efficiency and core_ms.

    All loaders are open together and take turns: while one is measured the others wait with their buffers
    full, so that a change of the machine's load meets all of them. Efficiency is the speed of n workers over
    n times that of one worker, the median over rounds; of threads in this process, over that of one thread.
    core_ms is the processor time of a clip, workers and this process together, None where /proc is not there.

    Args: batch: clips of a batch. seconds: of measuring, each. told: called with what is measured next.
    """
    loaders, rates, costs = {}, {}, {}
    try:
        for workers, threads in counts(cores):
            told(f"starting {_name(workers, threads)}")
            data = Data(str(manifest), str(tokenizer), workers=workers, threads=threads, prefetch=2)
            loader = Loader(data, clip, Augment(flip=True), seed=0, batch=batch, start=0, stop=_FOREVER)
            loaders[workers, threads] = loader, iter(loader)
            rates[workers, threads], costs[workers, threads] = [], []
        for turn in range(_ROUNDS):
            for (workers, threads), (_, batches) in loaders.items():
                told(f"{_name(workers, threads)}, round {turn + 1} of {_ROUNDS}")
                # What was decoded while others were measured is not counted.
                for _ in range(max(2, threads) + 1 + max(1, workers) * 5):
                    next(batches)
                begin, busy, done = time.perf_counter(), processor_seconds(family(os.getpid())), 0
                while done < 2 or time.perf_counter() - begin < seconds / _ROUNDS:
                    next(batches)
                    done += 1
                rates[workers, threads].append(done * batch / (time.perf_counter() - begin))
                busy = processor_seconds(family(os.getpid())) - busy
                costs[workers, threads].append(busy * 1e3 / (done * batch))
    finally:
        for loader, batches in loaders.values():
            batches.close()  # it holds the last batch's shared memory
            loader.close()
    rows = []
    for (workers, threads), measured in rates.items():
        base = rates[1, 1] if workers else rates[0, 1]
        ratio = statistics.median(rate / one for rate, one in zip(measured, base, strict=True))
        rows.append(
            {
                "workers": workers, "threads": threads, "clips_per_second": statistics.median(measured),
                "efficiency": ratio / (max(1, workers) * threads),
                "core_ms": statistics.median(costs[workers, threads]) if _PROC.exists() else None,
            }
        )  # fmt: skip
    return rows


def _name(workers: int, threads: int) -> str:
    return f"{workers} workers" if workers else f"{threads} threads"


def memory(
    manifest: Path,
    tokenizer: Path,
    clip: Clip,
    workers: int,
    batch: int,
    batches: int,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Returns how the resident memory of this process and its workers grows while batches are read.

    A quarter as many batches again go first, in which buffers and allocators fill.

    Returns: batches, clips, mebibytes (at the end) and slope (KiB for 1,000 clips, least squares).

    Raises:
      UserError: this system does not tell a process's memory in /proc.
    """
    if not _PROC.exists():
        raise UserError("--only memory: needs /proc, which this system does not have")
    warm = batches // 4
    data = Data(str(manifest), str(tokenizer), workers=workers)
    loader = Loader(data, clip, Augment(flip=True), seed=0, batch=batch, start=0, stop=warm + batches)
    clips, sizes = [], []
    try:
        for number, _ in enumerate(loader):
            told(number + 1, warm + batches)
            if number >= warm:
                clips.append((number - warm) * batch)
                sizes.append(resident(family(os.getpid())))
    finally:
        loader.close()
    return {
        "workers": workers, "batches": batches, "clips": batches * batch,
        "mebibytes": sizes[-1] / 1024, "slope": slope(clips, sizes) * 1000,
    }  # fmt: skip


def slope(x: list[float], y: list[float]) -> float:
    """Returns the slope of the line of least squares."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def family(root: int) -> list[int]:
    """Returns a process and all below it."""
    children = {}
    for entry in Path("/proc").iterdir() if _PROC.exists() else ():
        if entry.name.isdigit():
            try:  # "pid (name with any sign) state parent …"
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def processor_seconds(processes: list[int]) -> float:
    """Returns the processor time that the processes have taken, 0 where /proc is not there."""
    ticks = 0
    for process in processes:
        try:
            fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])  # as a user, and in the kernel
    return ticks / os.sysconf("SC_CLK_TCK")


def resident(processes: list[int]) -> int:
    """Returns the KiB of memory that the processes hold, pages that they share counted in each."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/status").read_text(errors="replace").splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return total
