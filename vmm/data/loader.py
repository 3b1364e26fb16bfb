"""Manifest → Grain → batches: the order and the randomness are a pure function of (seed, step).

Place i of step s is what vmm/data/order.py says; each host takes its contiguous slice of a step's places.
Nothing else is state: to resume, start at another step, with any number of workers or hosts.
"""

import dataclasses
import gc
import logging
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import grain
import numpy as np
from absl import flags

from vmm.build import make
from vmm.data import media
from vmm.data.account import Account, bad_list, bad_summary
from vmm.data.manifest import Row, manifest_digest, read_manifest
from vmm.data.order import Order, Part, split_buckets
from vmm.data.samples import Augment, Clip, Data, EvaluationViews, Samples, bucket_clips, stack
from vmm.data.targets import check_texts, make_targets
from vmm.errors import DataBudgetError, UserError
from vmm.types import MODALITIES, Batch


def _copied(sample: dict) -> dict:
    return {key: _copied(value) if isinstance(value, dict) else np.array(value) for key, value in sample.items()}


def to_batch(sample: Mapping, valid: np.ndarray | None = None) -> Batch:
    """Returns the stacked samples as a Batch, all rows valid unless told otherwise."""
    rows = len(sample["index"])
    return Batch(
        inputs={name: sample[name] for name in ("video", "audio", "text")},
        present=dict(sample["present"]),
        labels=dict(sample["labels"]),
        index=sample["index"],
        targets=dict(sample["targets"]),
        valid=np.ones(rows, bool) if valid is None else valid,
    )


class _Place:
    """Number of a sample of this host → the sample (picklable, for Grain's worker processes)."""

    def __init__(self, samples: Samples, order: Order, local: slice, start: int):
        self.samples, self.order, self.local, self.start = samples, order, local, start

    def __call__(self, number: int) -> dict:
        step, offset = divmod(number, self.local.stop - self.local.start)
        step, place = self.start + step, self.local.start + offset
        bucket, epoch, row, peers = self.order(step, place)
        return self.samples(step * self.order.batch + place, epoch, row, peers, bucket)


def _start_worker(worker: int, workers: int) -> None:
    """In a worker process: a terminal's Ctrl-C comes to all of them, and is for the trainer to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.NOTSET)  # see _lighten_children of __main__.py


class Loader:
    """Batches of this host from `start` on. Iterate it; close() stops its threads and processes.

    account: what became of the files so far.
    """

    def __init__(
        self, data: Data, clip: Clip, augment: Augment, *, seed: int, batch: int, start: int, stop: int,
        host: int = 0, hosts: int = 1, modalities: tuple[str, ...] = MODALITIES,
    ):  # fmt: skip
        """Args: batch: clips of the global batch; start, stop: steps; host of hosts: the slice to read; modalities: see
        Samples.

        Raises:
          UserError: the dataset or tokenizer is missing or empty, or labels do not fit.
        """
        rows, parts = load_mixture(data)
        if batch % hosts:
            raise UserError(f"batch: {batch} clips do not divide over {hosts} hosts")
        self.rows, self.budget, self.workers, self.account = rows, data.budget, data.workers, Account(rows)
        local = batch // hosts
        samples = Samples(rows, data, clip, augment, seed, modalities)
        buckets = [parts]
        if data.buckets:
            seconds = [clip.seconds for clip in bucket_clips(data, clip)]
            buckets = split_buckets([row.seconds for row in rows], parts, seconds)
            # A bucket that no clip fills has no batches.
            samples.clips = [clip for clip, parts in zip(samples.clips, buckets) if parts]
            buckets = [parts for parts in buckets if parts]
        order = Order(buckets, batch, seed)
        self.order = order
        place = _Place(samples, order, slice(host * local, (host + 1) * local), start)
        count = max(0, stop - start)
        dataset = grain.MapDataset.range(count * local).map(place).batch(local, batch_fn=stack)
        # Grain keeps `prefetch` batches ready, each decoded by one thread; clips of a batch are
        # decoded in turn, so threads beyond the batches kept ready would idle.
        options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=max(data.prefetch, data.threads))
        iterable = dataset.to_iter_dataset(options)
        if data.workers and count:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads absl flags when it starts processes
            iterable = iterable.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2), _start_worker
            )
        self.iterator = iter(iterable)

    def __iter__(self) -> Iterator[Batch]:
        # Not `for`, which would hold Grain's iterator for as long as this generator lives: close() must end it.
        while (sample := next(self.iterator, None)) is not None:
            self.account.add(sample)
            self._check_budget()
            # What a worker process gives lies in shared memory, which must be free when it ends: also while
            # whoever iterates holds this generator.
            batch = to_batch(_copied(sample) if self.workers else sample)
            del sample
            yield batch

    def _check_budget(self) -> None:
        bad = self.account.bad
        if len(bad) > self.budget * len(self.rows):
            raise DataBudgetError(
                f"{len(bad)} of {len(self.rows)} files could not be decoded, more than the budget of "
                f"{self.budget:.1%} (data.budget); {bad_summary(bad)}\n{bad_list(bad)}"
            )

    def planned(self, step: int) -> list[dict]:
        """Returns index, clip and epoch of each sample of a step's global batch, in its order; the first step is 0."""
        places = [self.order(step, place) for place in range(self.order.batch)]
        first = step * self.order.batch
        return [{"index": first + i, "id": self.rows[p.row].id, "epoch": int(p.epoch)} for i, p in enumerate(places)]

    def close(self) -> None:
        """Stops reading ahead; the loader cannot be iterated after it."""
        if hasattr(self.iterator, "close"):
            self.iterator.close()
        self.iterator = iter(())
        gc.collect()  # Grain's iterator is a cycle that holds the last batches' shared memory


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A dataset of a mixture. manifest: its path. weight: relative to the others'."""

    manifest: str
    weight: float


def mixture(train: str | Mapping) -> dict[str, Mixed]:
    """Returns name → Mixed of data.train; a single manifest is a mixture of one.

    Raises:
      UserError: an entry has other keys, or a weight that is not above 0.
    """
    if isinstance(train, str):
        return {"train": Mixed(train, 1.0)}
    result = {name: make(Mixed, spec, f"data.train.{name}") for name, spec in train.items()}
    for name, part in result.items():
        if not part.weight > 0:
            raise UserError(f"data.train.{name}.weight: must be above 0, got {part.weight}; take the dataset out")
    if not result:
        raise UserError("data.train: names no dataset")
    return result


def train_digests(train: str | Mapping) -> dict[str, str | None]:
    """Returns manifest → its SHA-256 for every dataset of data.train; None where the file is gone."""
    manifests = [part.manifest for part in mixture(train).values()]
    return {path: manifest_digest(path) if Path(path).is_file() else None for path in manifests}


def load_mixture(data: Data) -> tuple[list[Row], list[Part]]:
    """Returns the rows of all datasets of data.train, one after the other, and which are whose.

    Raises:
      UserError: as read_manifest, a label out of range, or one that no clip carries.
    """
    rows, parts = [], []
    for part in mixture(data.train).values():
        mine = read_manifest(part.manifest, bool(data.remote))
        parts.append(Part(np.arange(len(rows), len(rows) + len(mine)), part.weight))
        rows += mine
    _check_labels(rows, data)
    return rows, parts


def _check_labels(rows: list[Row], data: Data, where: str | Path | None = None) -> None:
    where = where or ", ".join(part.manifest for part in mixture(data.train).values())
    both = sorted(set(data.labels) & set(data.tags))
    if both:
        raise UserError(
            f"data.tags.{both[0]}: stands in data.labels too; a clip has one class of a label, any number of tags"
        )
    for key, group in (("labels", data.labels), ("tags", data.tags)):
        for name, classes in group.items():
            values = [row.labels[name] for row in rows if name in row.labels]
            if not values:
                raise UserError(f"data.{key}.{name}: no clip of {where} has this label")
            if key == "labels" and any(isinstance(value, list) for value in values):
                raise UserError(
                    f"data.labels.{name}: lists of classes in {where}; name it in data.tags: a clip has any number of them"
                )
            largest = max(max(value, default=-1) if isinstance(value, list) else value for value in values)
            if largest >= classes:
                raise UserError(f"data.{key}.{name}: {classes} classes, but {where} has class {largest}")
    check_texts(data.text, rows, "data.text")
    for name, target in make_targets(data.targets).items():
        try:
            target.check(rows, f"data.targets.{name}")
        except UserError as error:
            raise UserError(f"{error} ({where})") from None


def evaluation_batches(
    manifest: str | Path, data: Data, clip: Clip, *, batch: int, host: int = 0, hosts: int = 1,
    views: EvaluationViews = EvaluationViews(), modalities: tuple[str, ...] = MODALITIES, strict: bool = True,
    account: Account | None = None,
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:  # fmt: skip
    """Yields (Batch, row numbers, starts) over every view of every clip of a manifest once, without randomness.

    starts: float32, seconds of the file at which the view's window begins. strict: whether the manifest must have the labels
    and targets that data asks for. account: is told what becomes of the files, and gets their rows.

    Views of a clip follow one another. Every host yields the same number of batches of batch // hosts
    rows; rows that only fill up are not valid. A clip that cannot be decoded is left out (not valid): a
    score is of clips that exist.
    """
    rows = read_manifest(manifest, bool(data.remote))
    account = Account() if account is None else account
    account.rows = rows
    if strict:
        _check_labels(rows, data, manifest)
    if batch % hosts:
        raise UserError(f"batch: {batch} clips do not divide over {hosts} hosts")
    samples = Samples(rows, data, clip, None, 0, modalities)
    samples.clips = [clip]
    local = batch // hosts
    exam = _Exam(
        samples, [(row, *place) for row in range(len(rows)) for place in views.places(rows[row], clip.seconds)]
    )
    steps = -(-len(exam.places) // batch)
    places = [step * batch + host * local + offset for step in range(steps) for offset in range(local)]
    dataset = grain.MapDataset.source(places).map(exam).batch(local, batch_fn=stack)
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=max(data.prefetch, data.threads))
    for sample in dataset.to_iter_dataset(options):
        account.add(sample)
        yield to_batch(sample, valid=sample["valid"]), sample["row"], sample["start"]


class _Exam:
    """Number of a view → its sample for evaluation; past the end, or undecodable: an empty, invalid one.

    places: of each view, (row, window, square), see EvaluationViews.places.
    """

    def __init__(self, samples: Samples, places: list[tuple[int, float, float]]):
        self.samples, self.places = samples, places

    def __call__(self, number: int) -> dict:
        clip = self.samples.clips[0]
        past = number >= len(self.places)
        row, *place = (len(self.samples.rows),) if past else self.places[number]
        extra = {"index": np.int32(row), "failed": np.int32(-1), "reason": np.int32(-1)}
        if not past:
            try:
                return self.samples.view(row, *place) | extra | {"valid": np.bool_(True)}
            except media.DecodeError as error:
                extra |= {"failed": np.int32(row), "reason": np.int32(media.REASONS.index(error.reason))}
        return extra | {
            "video": np.zeros((clip.frames, clip.size, clip.size, 3), np.uint8),
            "audio": np.zeros(clip.samples, np.float32),
            "text": np.zeros(clip.text_length, np.int32),
            "present": dict.fromkeys(("video", "audio", "text"), np.bool_(False)),
            **self.samples.told(None, 0.0, clip.seconds),
            "row": np.int32(row),
            "remarks": np.int32(0),
            "valid": np.bool_(False),
        }
