"""vmm data check: are the bytes of a dataset those that its manifest and its build.json tell of?"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vmm.data.inspection.dataset import Dataset, open_dataset, printable
from vmm.data.manifest import Row
from vmm.data.media import BROKEN, DecodeError, probe_duration
from vmm.data.reading.open import open_regular
from vmm.data.shards import count_records
from vmm.errors import UserError

_TOGETHER = 64  # clips a thread takes at once
_LATE = 0.5  # seconds by which a span may go on behind the end of its file: tables round

Progress = Callable[[str, int, int], None]


class Checked(NamedTuple):
    """What a check found. dataset: None where it could not even be read. files, clips: how many were read and
    compared with a hash. problems: one line each."""

    dataset: Dataset | None
    files: int
    clips: int
    problems: list[str]


def check(path: Path, sample: int | None = None, threads: int | None = None, progress: Progress = lambda *_: None) -> Checked:  # fmt: skip
    """Compares a dataset with what it tells of itself; reads every byte unless told otherwise.

    Args:
      path: a build's folder, or a manifest.
      sample: clips whose hash is checked, drawn evenly and the same each time; None: all. Files are always hashed.
      threads: that read and hash; default: one a core.
      progress: called with ("files" or "clips", done, all).

    Raises:
      UserError: there is no dataset at path. One that is there and broken gives problems instead.
    """
    if sample is not None and sample < 0:
        raise UserError(f"--sample {sample}: must be 0 or more")
    try:
        dataset, problems = open_dataset(path), []
    except UserError as error:
        if not (path / "build.json").is_file():
            raise
        return Checked(None, 0, 0, [str(error)])
    files = clips = 0
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        if dataset.built is not None:
            files, found = _files(dataset, pool, progress)
            problems += found
            problems += _counts(dataset)
            problems += _records(dataset)
        problems += _labels(dataset)
        clips, found = _clips(dataset, sample, pool, progress)
        problems += found
    return Checked(dataset, files, clips, [printable(problem) for problem in problems])


def _files(dataset: Dataset, pool: ThreadPoolExecutor, progress: Progress) -> tuple[int, list[str]]:
    """Compares every file with the hash in build.json."""
    folder, told = dataset.manifest.parent, dataset.built["files"]
    problems = []

    def one(item: tuple[str, str]) -> str | None:
        name, wanted = item
        try:
            with open(folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name}: {error.strerror or error}, build.json tells of it"
        return None if found == wanted else f"{name}: changed, its sha256 is {found}, build.json has {wanted}"

    progress("files", 0, len(told))
    for number, problem in enumerate(pool.map(one, told.items()), 1):
        problems += [problem] if problem else []
        progress("files", number, len(told))
    there = {f"shards/{file.relative_to(folder / 'shards')}" for file in (folder / "shards").rglob("*")}
    problems += [f"{name}: build.json does not tell of this file" for name in sorted(there - set(told))]
    return len(told), problems


def _counts(dataset: Dataset) -> Iterator[str]:
    """Compares the lines of the files with the numbers in build.json."""
    told = dataset.built
    if told["clips"] != len(dataset.rows):
        yield f"manifest.jsonl: {len(dataset.rows)} clips, build.json tells of {told['clips']}"
    if dataset.quarantine is not None:  # a missing file is named by its hash
        found = Counter(str(line.get("reason")) for line in dataset.quarantine)
        for reason in sorted({*found, *told["left_out"]}):
            if found[reason] != told["left_out"].get(reason, 0):
                yield f"quarantine.jsonl: {found[reason]} {reason}, build.json tells of {told['left_out'].get(reason, 0)}"
    if dataset.duplicates is not None and told["duplicates"] != len(dataset.duplicates):
        yield f"duplicates.jsonl: {len(dataset.duplicates)} pairs, build.json tells of {told['duplicates']}"


def _records(dataset: Dataset) -> Iterator[str]:
    """Checks that the manifest names every record of the shards, and no others."""
    folder, named = dataset.manifest.parent, defaultdict(set)
    shards = [name for name in dataset.built["files"] if name.startswith("shards/")]
    for row in dataset.rows:
        name = os.path.relpath(row.path, folder)
        if row.record is None or name not in dataset.built["files"]:
            yield f"clip {row.id}: lies in {name}, which is no shard of this build"
        else:
            named[name].add(row.record)
    for name in shards:
        if not (folder / name).is_file():
            continue
        try:
            count = count_records(folder / name)
        except UserError as error:
            yield f"{name}: {str(error).partition(': ')[2]}"
            continue
        mine = named[name]
        if mine != set(range(count)):
            yield f"{name}: holds {count} records, the manifest names {len(mine)}"
        yield from (f"{name}: record {k} is in no line of the manifest" for k in range(count) if k not in mine)
        yield from (f"{name}: record {k} is named by the manifest, but not there" for k in sorted(mine) if k >= count)


def _labels(dataset: Dataset) -> Iterator[str]:
    """Checks that every class has its name, where classes have names."""
    for row in dataset.rows:
        for label, value in row.labels.items():
            names = dataset.classes.get(label)
            highest = max(value, default=-1) if isinstance(value, list) else value
            if names is not None and highest >= len(names):
                yield f"clip {row.id}: class {highest} of {label}, which has names for {len(names)}"


def _clips(dataset: Dataset, sample: int | None, pool: ThreadPoolExecutor, progress: Progress) -> tuple[int, list[str]]:
    """Reads clips and compares them with their hashes; a clip without one must be there."""
    rows, numbers = dataset.rows, range(len(dataset.rows))
    if sample is not None and sample < len(rows):
        numbers = sorted(np.random.default_rng(0).choice(len(rows), sample, replace=False).tolist())
    # Spans of one kept original share its bytes: they are read once.
    same = defaultdict(list)
    for number in numbers:
        same[rows[number].path, rows[number].record, rows[number].sha256].append(rows[number])
    groups = list(same.values())
    batches = [groups[start : start + _TOGETHER] for start in range(0, len(groups), _TOGETHER)]

    def some(batch: list[list[Row]]) -> tuple[int, list[str]]:
        problems = []
        for group in batch:
            problem = _clip(group[0])
            problems += [f"clip {row.id}: {problem}" for row in group] if problem else _spans(group)
        return sum(map(len, batch)), problems

    done, problems = 0, []
    progress("clips", 0, len(numbers))
    for count, found in pool.map(some, batches):
        done, problems = done + count, problems + found
        progress("clips", done, len(numbers))
    return sum(rows[number].sha256 is not None for number in numbers), problems


def _clip(row: Row) -> str | None:
    try:
        row.read()
        if row.record is None and row.sha256 is None:
            with open_regular(row.path) as file:  # a folder, or a file that may not be read, is no clip
                if not file.read(1):
                    return f"{row.path} is empty"
    except DecodeError as error:
        return f"{error.reason}: {error.detail or row.path}"
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        return f"{row.path}: {getattr(error, 'strerror', None) or error}"
    return None


def _spans(rows: list[Row]) -> list[str]:
    """Compares the spans of clips that lie in one file with its length. A file that does not open tells none."""
    spans = [row for row in rows if row.start is not None or row.end is not None]
    if not spans:
        return []
    try:
        length = probe_duration(spans[0].read())
    except (DecodeError, *BROKEN):
        return []
    problems = []
    for row in spans:
        if length is not None and (row.start or 0.0) >= length:
            problems.append(f"clip {row.id}: starts at {row.start:g} s, the file has {length:.4g}")
        elif length is not None and row.end is not None and row.end > length + _LATE:
            problems.append(f"clip {row.id}: ends at {row.end:g} s, the file has {length:.4g}")
    return problems
