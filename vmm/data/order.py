"""The order of a run: step and place → which clip. A pure function; nothing is state.

    step → bucket → its n-th batch → position → dataset of the mixture → its m-th clip → epoch, row

Each arrow is arithmetic, so any step can be computed by any host or worker without those before it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

_CYCLE = 10_000  # places in which a mixture holds its weights exactly


def shuffled(place: int, size: int, *seed: int) -> int:
    """Returns where a place goes in a permutation of `size` places that the seed draws."""
    if size == 1:
        return 0
    key = np.random.SeedSequence(list(seed)).generate_state(1)[0]
    return grain.experimental.index_shuffle(place, max_index=size - 1, seed=int(key), rounds=4)


def position_to_sample(position: int, size: int, seed: int) -> tuple[int, int]:
    """Returns (epoch, row) of a place in the order of one dataset; every epoch holds each row once."""
    epoch, place = divmod(position, size)
    return epoch, shuffled(place, size, seed, epoch)


class Shares:
    """Splits the numbers 0, 1, 2, … among parts by weight: every 10,000 in a row hold the weights, in random order."""

    def __init__(self, weights: Sequence[float], seed: int):
        """weights: positive, any sum; a part that would get none of a cycle still gets one."""
        self.seed, total = seed, sum(weights)
        exact = [weight / total * _CYCLE for weight in weights]
        counts = [max(1, int(value)) for value in exact]
        # Largest remainders first; where many tiny parts were lifted to one, the largest part pays.
        for i in sorted(range(len(exact)), key=lambda i: int(exact[i]) - exact[i])[: max(0, _CYCLE - sum(counts))]:
            counts[i] += 1
        counts[int(np.argmax(counts))] += _CYCLE - sum(counts)
        self.counts, self.ends = counts, np.cumsum(counts)

    def __call__(self, number: int) -> tuple[int, int]:
        """Returns (part, how many of that part came before)."""
        if len(self.counts) == 1:
            return 0, number
        cycle, place = divmod(number, _CYCLE)
        place = shuffled(place, _CYCLE, self.seed, cycle, 1)
        part = int(np.searchsorted(self.ends, place, side="right"))
        return part, cycle * self.counts[part] + place - int(self.ends[part] - self.counts[part])


class Part(NamedTuple):
    """One dataset of a mixture: its rows' numbers, and its weight."""

    rows: np.ndarray
    weight: float


class Place(NamedTuple):
    """One sample of the run: bucket, epoch of its dataset, row, and the rows that may stand in for it."""

    bucket: int
    epoch: int
    row: int
    peers: np.ndarray


class Order:
    """(step, place in the global batch) → Place, for a mixture of datasets in buckets of equal length.

    A batch holds one bucket's clips, so that its arrays have one shape. Each dataset of each bucket runs through
    all of its rows before it repeats one, in an order of its own each epoch.
    """

    def __init__(self, buckets: Sequence[Sequence[Part]], batch: int, seed: int):
        """buckets: each a list of its Parts, none empty. batch: clips of the global batch."""
        self.parts, self.batch, self.seed = [list(parts) for parts in buckets], batch, seed
        self.bucket = Shares([sum(part.weight for part in parts) for parts in self.parts], seed)
        self.mixture = [Shares([part.weight for part in parts], seed + 1 + i) for i, parts in enumerate(self.parts)]

    def __call__(self, step: int, place: int) -> Place:
        bucket, number = self.bucket(step)
        part, position = self.mixture[bucket](number * self.batch + place)
        rows = self.parts[bucket][part].rows
        epoch, row = position_to_sample(position, len(rows), self.seed)
        return Place(bucket, epoch, int(rows[row]), rows)


def split_buckets(lengths: Sequence[float | None], parts: Sequence[Part], seconds: Sequence[float]) -> list[list[Part]]:
    """Returns one list of parts a bucket: a row is in the longest bucket that its clip fills, else in the shortest.

    Args:
      lengths: of every row, in seconds; None: unknown, goes to the shortest.
      parts: datasets; each one's weight is split over the buckets as its rows are.
      seconds: of each bucket, ascending. Empty buckets stay, without parts.
    """
    of_row = [
        max((i for i, bucket in enumerate(seconds) if length is not None and length >= bucket - 1e-3), default=0)
        for length in lengths
    ]
    of_row = np.asarray(of_row)
    result = []
    for bucket in range(len(seconds)):
        mine = [(part.rows[of_row[part.rows] == bucket], part) for part in parts]
        result.append([Part(rows, part.weight * len(rows) / len(part.rows)) for rows, part in mine if len(rows)])
    return result
