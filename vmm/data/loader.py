"""Manifest → Grain → batches: the order and the randomness are a pure function of (seed, step).

Position p of the run is sample (p mod n) of epoch (p div n) in that epoch's own shuffle. A batch is
the positions [step * B, (step + 1) * B); each host takes its contiguous slice. Nothing else is
state: to resume, start at another step, with any number of workers or hosts.
"""

import dataclasses
import gc
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from vmm.data import media, text
from vmm.data.manifest import Row, read_manifest
from vmm.errors import DataBudgetError, UserError
from vmm.types import Batch

_ATTEMPTS = 16  # substitutes tried for a bad file before the loader gives up
_BLOCK = 1 << 31


@dataclasses.dataclass(frozen=True)
class Clip:
    """The window of a clip that one sample shows; the same for training and for a published model.

    seconds: length of the window. frames: T. size: H = W, pixels. sample_rate: Hz.
    text_length: L, tokens of a caption with its start and end.
    """

    seconds: float = 2.0
    frames: int = 8
    size: int = 64
    sample_rate: int = 16000
    text_length: int = 32

    @property
    def samples(self) -> int:
        """S, audio samples in the window."""
        return round(self.seconds * self.sample_rate)


@dataclasses.dataclass(frozen=True)
class Augment:
    """Randomness of training samples. All off: the middle window, the middle square, the first caption.

    window: draw the window's place in a longer clip. crop: smallest share of the short side that a
    random square keeps (1.0: the largest square, in the middle). flip: mirror half of the clips.
    caption: draw among the phrasings. drop: probability with which each stream is withheld
    (never the last one).
    """

    window: bool = True
    crop: float = 1.0
    flip: bool = False
    caption: bool = True
    drop: float = 0.0


@dataclasses.dataclass(frozen=True)
class Data:
    """Where samples come from and how they are read.

    train: manifest of the training clips. tokenizer: a tokenizer.json. clip: see Clip.
    augment: see Augment. labels: label → number of classes that a batch carries.
    workers: decoding processes; 0 decodes in threads of this one. threads: per process.
    prefetch: batches kept ready. cache: bytes of decoded clips kept (per process), for datasets
    that fit in memory. budget: share of the dataset's files that may fail.
    """

    train: str
    tokenizer: str
    clip: Mapping = dataclasses.field(default_factory=dict)
    augment: Mapping = dataclasses.field(default_factory=dict)
    labels: Mapping = dataclasses.field(default_factory=dict)
    workers: int = 2
    threads: int = 4
    prefetch: int = 4
    cache: int = 0
    budget: float = 0.01


class Bad(NamedTuple):
    """A file that gave nothing: its row in the manifest, and why."""

    id: str
    path: str
    reason: str


def position_to_sample(position: int, size: int, seed: int) -> tuple[int, int]:
    """Returns (epoch, row) of a place in the order of the run; every epoch holds each row once."""
    epoch, place = divmod(position, size)
    if size == 1:
        return epoch, 0
    key = np.random.SeedSequence([seed, epoch]).generate_state(1)[0]
    return epoch, grain.experimental.index_shuffle(place, max_index=size - 1, seed=int(key), rounds=4)


class _Cache:
    """Decoded windows of this process, up to a number of bytes; first come, first kept."""

    def __init__(self, limit: int):
        self.limit, self.used, self.kept, self.lock = limit, 0, {}, threading.Lock()

    def get(self, key):
        return self.kept.get(key)

    def put(self, key, value: media.Media) -> None:
        size = sum(array.nbytes for array in value if array is not None)
        with self.lock:
            if key not in self.kept and self.used + size <= self.limit:
                self.used += size
                self.kept[key] = value

    def __reduce__(self):  # a worker process starts with its own, empty
        return _Cache, (self.limit,)


class Samples:
    """Row and randomness → one sample, as a dict of NumPy arrays. Shared by training and evaluation."""

    def __init__(self, rows: list[Row], data: Data, clip: Clip, augment: Augment | None, seed: int):
        self.rows, self.clip, self.augment, self.seed = rows, clip, augment, seed
        self.labels = dict(data.labels)
        self.tokenizer = text.load_tokenizer(data.tokenizer)
        self.cache = _Cache(data.cache)

    def __setstate__(self, state: dict):  # in a worker process
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True  # pickling forgets it

    def __call__(self, position: int, epoch: int, row: int) -> dict:
        """Returns the sample; a row that cannot be decoded is replaced by another, and flagged.

        `failed` and `reason` name the row and why, -1 where all is well: the number and order of
        samples never depend on bad files.
        """
        failed, reason = -1, -1
        for attempt in range(_ATTEMPTS):
            rng = np.random.default_rng([self.seed, epoch, row, attempt])
            try:
                sample = self._sample(self.rows[row], row, rng)
                break
            except media.DecodeError as error:
                if attempt == 0:
                    failed, reason = row, media.REASONS.index(error.reason)
                if attempt == _ATTEMPTS - 1:
                    raise DataBudgetError(
                        f"{_ATTEMPTS} files in a row could not be decoded, the last {self.rows[row].path} ({error}); "
                        "check the paths in the manifest"
                    ) from None
                row = int(np.random.default_rng([self.seed, epoch, row, attempt, 1]).integers(len(self.rows)))
        return sample | {
            "index": np.int32(position % _BLOCK),
            "failed": np.int32(failed),
            "reason": np.int32(reason),
        }

    def _sample(self, row: Row, number: int, rng: np.random.Generator) -> dict:
        clip, augment = self.clip, self.augment
        draw = rng.uniform(size=5)  # drawn whole, so that one option never moves another's numbers
        crop, place, drawn = media.Crop(), 0.5, False
        if augment:
            drawn = augment.crop < 1 or augment.flip
            if augment.crop < 1:
                crop = media.Crop(draw[0], draw[1], augment.crop + draw[2] * (1 - augment.crop))
            crop = crop._replace(flip=bool(augment.flip and draw[3] < 0.5))
            place = draw[4] if augment.window else 0.5
        window = _Window(row, clip.seconds, place)
        key = None if drawn else number
        decoded = self.cache.get(key) if key is not None else None
        if decoded is None:
            decoded = media.decode(
                row.path,
                pick=window,
                seconds=clip.seconds,
                frames=clip.frames,
                size=clip.size,
                sample_rate=clip.sample_rate,
                crop=crop,
            )
            if key is not None and window.only:
                self.cache.put(key, decoded)
        caption = ""
        if row.captions:
            caption = row.captions[int(rng.integers(len(row.captions))) if augment and augment.caption else 0]
        present = {
            "video": decoded.video is not None,
            "audio": decoded.audio is not None,
            "text": bool(caption),
        }
        if augment and augment.drop:
            present = _withhold(present, augment.drop, rng)
        ids = np.zeros(clip.text_length, np.int32)
        if present["text"]:
            ids = text.encode(self.tokenizer, caption, clip.text_length)
        shape = (clip.frames, clip.size, clip.size, 3)
        return {
            "video": decoded.video if present["video"] else np.zeros(shape, np.uint8),
            "audio": decoded.audio if present["audio"] else np.zeros(clip.samples, np.float32),
            "text": ids,
            "present": {name: np.bool_(value) for name, value in present.items()},
            "labels": {name: np.int32(row.labels.get(name, -1)) for name in self.labels},
            "row": np.int32(number),
        }


class _Window:
    """Picks the window's start in a clip; `only` tells whether another draw could differ."""

    def __init__(self, row: Row, seconds: float, place: float):
        self.row, self.seconds, self.place, self.only = row, seconds, place, False

    def __call__(self, duration: float | None) -> float:
        start = self.row.start or 0.0
        end = self.row.end if self.row.end is not None else duration
        room = max(0.0, (end if end is not None else start) - start - self.seconds)
        self.only = room == 0.0
        return start + self.place * room


def _withhold(present: dict, probability: float, rng: np.random.Generator) -> dict:
    """Returns presence with streams dropped at random, never all of them."""
    keep = {name: there and rng.uniform() >= probability for name, there in present.items()}
    if any(keep.values()) or not any(present.values()):
        return keep
    there = [name for name, value in present.items() if value]
    return keep | {there[int(rng.integers(len(there)))]: True}


def stack(samples: list[dict]) -> dict:
    """Stacks samples (nested dicts of arrays) along a new batch axis."""
    first = samples[0]
    return {
        key: stack([sample[key] for sample in samples])
        if isinstance(first[key], dict)
        else np.stack([sample[key] for sample in samples])
        for key in first
    }


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
        valid=np.ones(rows, bool) if valid is None else valid,
    )


class _Place:
    """Position of the run → its sample (picklable, for Grain's worker processes)."""

    def __init__(self, samples: Samples, seed: int, batch: int, local: slice, start: int):
        self.samples, self.seed, self.batch, self.local, self.start = samples, seed, batch, local, start

    def __call__(self, place: int) -> dict:
        local = self.local.stop - self.local.start
        step, offset = divmod(place, local)
        position = (self.start + step) * self.batch + self.local.start + offset
        return self.samples(position, *position_to_sample(position, len(self.samples.rows), self.seed))


class Loader:
    """Batches of this host from `start` on. Iterate it; close() stops its threads and processes.

    bad: row → Bad of every file that failed so far.
    """

    def __init__(
        self, data: Data, clip: Clip, augment: Augment, *, seed: int, batch: int, start: int, stop: int,
        host: int = 0, hosts: int = 1,
    ):  # fmt: skip
        """Args: batch: clips of the global batch; start, stop: steps; host of hosts: the slice to read.

        Raises:
          UserError: the dataset or tokenizer is missing or empty, or labels do not fit.
        """
        rows = load_rows(data.train, data.labels)
        if batch % hosts:
            raise UserError(f"batch: {batch} clips do not divide over {hosts} hosts")
        self.rows, self.budget, self.bad, self.workers = rows, data.budget, {}, data.workers
        local = batch // hosts
        samples = Samples(rows, data, clip, augment, seed)
        place = _Place(samples, seed, batch, slice(host * local, (host + 1) * local), start)
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
                grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2)
            )
        self.iterator = iter(iterable)

    def __iter__(self) -> Iterator[Batch]:
        for sample in self.iterator:
            self._account(sample["failed"], sample["reason"])
            # What a worker process gives lies in shared memory, which must be free when it ends.
            yield to_batch(_copied(sample) if self.workers else sample)

    def _account(self, failed: np.ndarray, reason: np.ndarray) -> None:
        for row, why in zip(failed.tolist(), reason.tolist()):
            if row >= 0:
                self.bad[row] = Bad(self.rows[row].id, self.rows[row].path, media.REASONS[why])
        if len(self.bad) > self.budget * len(self.rows):
            raise DataBudgetError(
                f"{len(self.bad)} of {len(self.rows)} files could not be decoded, more than the budget of "
                f"{self.budget:.1%} (data.budget); {bad_summary(self.bad)}\n{bad_list(self.bad)}"
            )

    def close(self) -> None:
        """Stops reading ahead; the loader cannot be iterated after it."""
        if hasattr(self.iterator, "close"):
            self.iterator.close()
        self.iterator = iter(())
        gc.collect()  # Grain's iterator is a cycle that holds the last batches' shared memory


def load_rows(manifest: str | Path, labels: Mapping) -> list[Row]:
    """Reads a manifest and checks its labels against the class counts.

    Raises:
      UserError: as read_manifest, or a label out of range, or a label that no clip carries.
    """
    rows = read_manifest(manifest)
    for name, classes in labels.items():
        values = [row.labels[name] for row in rows if name in row.labels]
        if not values:
            raise UserError(f"data.labels.{name}: no clip of {manifest} has this label")
        if max(values) >= classes:
            raise UserError(f"data.labels.{name}: {classes} classes, but {manifest} has class {max(values)}")
    return rows


def bad_summary(bad: Mapping) -> str:
    """Returns the counts by reason, as "3 undecodable, 1 missing"."""
    counts = {}
    for item in bad.values():
        counts[item.reason] = counts.get(item.reason, 0) + 1
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items(), key=lambda pair: -pair[1]))


def bad_list(bad: Mapping) -> str:
    """Returns one line per bad file."""
    return "\n".join(f"  {item.path} ({item.reason})" for item in bad.values())


def evaluation_batches(
    manifest: str | Path, data: Data, clip: Clip, *, batch: int, host: int = 0, hosts: int = 1
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields (Batch, row numbers) over every clip of a manifest once, without randomness.

    Every host yields the same number of batches of batch // hosts rows; rows that only fill up
    are not valid. A clip that cannot be decoded is left out (not valid): a score is of clips
    that exist.
    """
    rows = load_rows(manifest, data.labels)
    if batch % hosts:
        raise UserError(f"batch: {batch} clips do not divide over {hosts} hosts")
    samples = Samples(rows, data, clip, None, 0)
    local = batch // hosts
    steps = -(-len(rows) // batch)
    places = [step * batch + host * local + offset for step in range(steps) for offset in range(local)]
    dataset = grain.MapDataset.source(places).map(_Exam(samples)).batch(local, batch_fn=stack)
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=max(data.prefetch, data.threads))
    for sample in dataset.to_iter_dataset(options):
        yield to_batch(sample, valid=sample["valid"]), sample["row"]


class _Exam:
    """Row number → its sample for evaluation; past the end, or undecodable: an empty, invalid one."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __call__(self, row: int) -> dict:
        rows, clip = self.samples.rows, self.samples.clip
        extra = {"index": np.int32(row), "failed": np.int32(-1), "reason": np.int32(-1)}
        if row < len(rows):
            try:
                return (
                    self.samples._sample(rows[row], row, np.random.default_rng(0)) | extra | {"valid": np.bool_(True)}
                )
            except media.DecodeError as error:
                extra |= {"failed": np.int32(row), "reason": np.int32(media.REASONS.index(error.reason))}
        return extra | {
            "video": np.zeros((clip.frames, clip.size, clip.size, 3), np.uint8),
            "audio": np.zeros(clip.samples, np.float32),
            "text": np.zeros(clip.text_length, np.int32),
            "present": dict.fromkeys(("video", "audio", "text"), np.bool_(False)),
            "labels": dict.fromkeys(self.samples.labels, np.int32(-1)),
            "row": np.int32(row),
            "valid": np.bool_(False),
        }
