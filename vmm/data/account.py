"""What became of a dataset's files as they were read: which failed, and of which something had to be guessed or dropped."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vmm.data import media
from vmm.data.manifest import Row
from vmm.data.reading.problems import REMARKS, from_bits


class Bad(NamedTuple):
    """A file that gave nothing: its row in the manifest, and why."""

    id: str
    path: str
    reason: str


class Account:
    """Counts of what samples tell, each row once however often it is read.

    rows: of the manifest, None: not read yet. bad: row → Bad of every file that failed so far.
    remarks: remark → rows of the files of which decoding had to guess, drop or stretch something so far.
    """

    def __init__(self, rows: Sequence[Row] | None = None):
        self.rows, self.bad, self.remarks = rows, {}, {}

    def add(self, sample: Mapping) -> None:
        """Takes in a stacked sample: its failed, reason, row and remarks [n]."""
        for row, why in zip(sample["failed"].tolist(), sample["reason"].tolist()):
            if row >= 0:
                self.bad[row] = Bad(self.rows[row].id, self.rows[row].path, media.REASONS[why])
        for place in np.flatnonzero(sample["remarks"]).tolist():
            for name in from_bits(int(sample["remarks"][place])):
                self.remarks.setdefault(name, set()).add(int(sample["row"][place]))

    def lines(self, of: str = "") -> list[str]:
        """Returns what there is to say at the end, [] where all was as in the files. of: words that name the dataset."""
        told = []
        if self.bad:
            told.append(
                f"{of}{len(self.bad)} files could not be decoded ({bad_summary(self.bad)}):\n{bad_list(self.bad)}"
            )
        if self.remarks:
            told.append(f"{of}files that were not decoded just as they are: {remark_summary(self.remarks)}")
        return told


def bad_summary(bad: Mapping) -> str:
    """Returns the counts by reason, as "3 undecodable, 1 missing"."""
    counts = {}
    for item in bad.values():
        counts[item.reason] = counts.get(item.reason, 0) + 1
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items(), key=lambda pair: -pair[1]))


def bad_list(bad: Mapping) -> str:
    """Returns one line per bad file."""
    return "\n".join(f"  {item.path} ({item.reason})" for item in bad.values())


def remark_summary(remarks: Mapping[str, Collection[int]]) -> str:
    """Returns the counts of files by remark, as "3 ends early, 1 errors skipped"; empty where there are none."""
    counts = {name: len(remarks[name]) for name in REMARKS if remarks.get(name)}
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))
