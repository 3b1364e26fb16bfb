"""Row and randomness → one sample: the window of the clip, its crop, its caption, what is present.

What needs arithmetic on pixels and sound (colour, gain, SpecAugment, MixUp) is done on the device (vmm/augment.py).
"""

import dataclasses
import math
import threading
from collections.abc import Collection, Mapping

import numpy as np

from vmm.data import media, text
from vmm.data.manifest import Row
from vmm.data.reading.problems import to_bits
from vmm.data.targets import TARGETS, fields_of, fill, make_targets
from vmm.errors import DataBudgetError, UserError, one_of
from vmm.settings import setting
from vmm.types import MODALITIES

_ATTEMPTS = 16  # substitutes tried for a bad file before the loader gives up
_BLOCK = 1 << 31


@dataclasses.dataclass(frozen=True)
class Clip:
    """The window of a clip that one sample shows; the same for training and for a published model."""

    seconds: float = setting(2.0, "Length of the window.")
    frames: int = setting(8, "Frames T in it.")
    size: int = setting(64, "Height and width, pixels.")
    sample_rate: int = setting(16000, "Of sound, Hz.")
    text_length: int = setting(32, "Tokens L of a caption, with its start and end.")
    crop: float = setting(
        1.0,
        "Share of the picture's shorter side that the square covers, as 224/256 where published models cut their margin "
        "off; 0: the whole picture is squeezed into a square.",
    )

    def __post_init__(self):
        if not 0 <= self.crop <= 1:
            raise UserError(f"data.clip.crop: a share in [0, 1], 0: the whole picture; got {self.crop}")

    @property
    def samples(self) -> int:
        """S, audio samples in the window."""
        return round(self.seconds * self.sample_rate)


@dataclasses.dataclass(frozen=True)
class Augment:
    """Randomness of training samples. All off: the middle window, the middle square, the first caption.

    colour, gain, spectrogram, mixup and cutmix happen on the device: see vmm/augment.py.
    """

    window: bool = setting(True, "Draw the window's place in a longer clip.")
    area: tuple[float, float] = setting(
        (1.0, 1.0),
        "Random resized crop (Szegedy et al. 2015), the same in all frames: range of the share of the picture "
        "kept, uniform; (1, 1): the largest square, in the middle.",
    )
    aspect: tuple[float, float] = setting((3 / 4, 4 / 3), "Range of the crop's width to its height, log-uniform.")
    flip: bool = setting(False, "Mirror half of the clips.")
    caption: bool = setting(True, "Draw among the phrasings.")
    drop: float | Mapping = setting(
        0.0,
        "Probability with which each stream is withheld (never the last one): one for all, or modality to its own.",
    )
    colour: float = setting(0.0, "Strength of the change of colour; 0: none.")
    gain: float = setting(0.0, "Sound is made louder or softer by up to so many decibels.")
    spectrogram: Mapping = setting(
        {},
        "Bands of the spectrogram that are hidden.",
        group="vmm.augment:SpecAugment",
        optional=True,
    )
    mixup: Mapping = setting({}, "Samples mixed with others.", group="vmm.augment:MixUp", optional=True)
    cutmix: Mapping = setting({}, "Boxes of other samples.", group="vmm.augment:CutMix", optional=True)

    def __post_init__(self):
        for name in ("area", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "area" and high > 1):
                raise UserError(f"data.augment.{name}: a range (low, high) above 0, got {(low, high)}")
        rates = self.drop if isinstance(self.drop, Mapping) else {"video": self.drop}
        for name, rate in rates.items():
            if name not in MODALITIES:
                raise UserError(f"data.augment.drop.{name}: no such modality; {one_of(name, MODALITIES)}")
            if not 0 <= rate <= 1:
                raise UserError(f"data.augment.drop: a probability, or modality → probability, got {self.drop!r}")


@dataclasses.dataclass(frozen=True)
class EvaluationViews:
    """Views of each clip whose predictions an evaluation averages (Feichtenhofer et al. 2019)."""

    clips: int = setting(1, "Windows, evenly over the clip's length.")
    crops: int = setting(1, "Squares, evenly along the longer side.")
    stride: float = setting(
        0.0,
        "Seconds from one window to the next, in place of `clips`: as many as a long video has, the last one "
        "at its end.",
    )

    def __post_init__(self):
        if self.clips < 1 or self.crops < 1:
            raise UserError(f"data.evaluation: clips and crops are at least 1, got {self.clips} and {self.crops}")
        if self.stride < 0 or (self.stride and self.clips != 1):
            raise UserError(
                f"data.evaluation: stride is above 0, and stands in place of clips; got {self.stride} and {self.clips}"
            )

    def places(self, row: Row, seconds: float) -> list[tuple[float, float]]:
        """Returns where the views of a row lie: (window in the clip, square along the longer side), both in [0, 1].

        seconds: length of a window.

        Raises:
          UserError: a stride, and a row that does not tell its length.
        """
        if not self.stride:
            windows = [(clip + 0.5) / self.clips for clip in range(self.clips)]
        elif row.seconds is None:
            raise UserError(
                f"data.evaluation.stride: {row.path} does not tell how long it is; give its row an `end`, or "
                "build the dataset with `vmm data build`"
            )
        else:
            room = max(0.0, row.seconds - seconds)
            windows = (
                [min(1.0, k * self.stride / room) for k in range(math.ceil(room / self.stride - 1e-6) + 1)]
                if room
                else [0.5]
            )
        middle = self.crops == 1
        squares = [0.5 if middle else crop / (self.crops - 1) for crop in range(self.crops)]
        return [(window, square) for window in windows for square in squares]


@dataclasses.dataclass(frozen=True)
class Data:
    """Where samples come from and how they are read."""

    train: str | Mapping = setting(
        text='Manifest of the training clips; or a mixture, name to {"manifest": …, "weight": …}.'
    )
    tokenizer: str = setting("", "A tokenizer.json; not read where neither a stream of text nor a target needs one.")
    clip: Mapping = setting({}, "The window of a clip that one sample shows.", group=Clip)
    buckets: tuple[Mapping, ...] = setting(
        (),
        'Lengths between which batches alternate, each {"seconds": …, "frames": …} in place of the clip\'s, ascending; '
        "a clip is read in the longest that it fills.",
    )
    augment: Mapping = setting({}, "Randomness of training samples.", group=Augment)
    evaluation: Mapping = setting(
        {}, "Views of each clip whose predictions an evaluation averages.", group=EvaluationViews, numerics=False
    )
    labels: Mapping = setting({}, "Label to number of classes that a batch carries.")
    tags: Mapping = setting({}, "The same for labels of which a clip has any number.")
    text: str = setting(
        "{caption}",
        'Template of the stream of text, as "{history} {question}" of the row\'s texts; a clip that lacks one of them has '
        "no text.",
    )
    targets: Mapping = setting({}, "Name to what else is asked for: see data/targets.py.", table=TARGETS, each=True)
    tracks: Mapping = setting(
        {},
        "video or audio to the stream of its kind that is decoded of every file, from 0; default: the one that players take.",
    )
    workers: int = setting(2, "Decoding processes; 0 decodes in threads of this one.", numerics=False)
    threads: int = setting(4, "Decoding threads of a process.", numerics=False)
    prefetch: int = setting(4, "Batches kept ready.", numerics=False)
    cache: int = setting(
        0, "Bytes of decoded clips kept by each process, for datasets that fit in memory.", numerics=False
    )
    budget: float = setting(0.01, "Share of the dataset's files that may fail.", numerics=False)
    remote: str = setting(
        "",
        "Folder in which shards fetched from addresses (gs://, s3://, https://) are kept; empty: manifests may hold none.",
        numerics=False,
    )


def bucket_clips(data: Data, clip: Clip) -> list[Clip]:
    """Returns the Clip of each bucket; the clip alone where there are none.

    Raises:
      UserError: a bucket has other keys, or they are not ascending.
    """
    for bucket in data.buckets:
        if set(bucket) != {"seconds", "frames"}:
            raise UserError(f"data.buckets: a bucket has seconds and frames, got {sorted(bucket)}")
    clips = [dataclasses.replace(clip, **bucket) for bucket in data.buckets] or [clip]
    if any(a.seconds >= b.seconds for a, b in zip(clips, clips[1:])):
        raise UserError(f"data.buckets: seconds must ascend, got {[clip.seconds for clip in clips]}")
    return clips


def reads_text(data: Data, modalities: Collection[str]) -> bool:
    """Returns whether samples for a model of these streams need the tokenizer: for its text, or for a target that is one."""
    return "text" in modalities or any(target.spells for target in make_targets(data.targets).values())


class _Cache:
    """Decoded windows of this process, up to a number of bytes; first come, first kept."""

    def __init__(self, limit: int):
        self.limit, self.used, self.kept, self.lock = limit, 0, {}, threading.Lock()

    def get(self, key):
        return self.kept.get(key)

    def put(self, key, value: media.Media) -> None:
        size = sum(array.nbytes for array in (value.video, value.audio) if array is not None)
        with self.lock:
            if key not in self.kept and self.used + size <= self.limit:
                self.used += size
                self.kept[key] = value

    def __reduce__(self):  # a worker process starts with its own, empty
        return _Cache, (self.limit,)


class Samples:
    """Row and randomness → one sample, as a dict of NumPy arrays. Shared by training and evaluation.

    modalities: those a model takes; others are not decoded, and are absent.
    """

    def __init__(
        self, rows: list[Row], data: Data, clip: Clip, augment: Augment | None, seed: int,
        modalities: tuple[str, ...] = MODALITIES,
    ):  # fmt: skip
        self.modalities = modalities
        self.rows, self.clips, self.augment, self.seed = rows, bucket_clips(data, clip), augment, seed
        self.labels, self.tags = dict(data.labels), dict(data.tags)
        self.text, self.targets = data.text, make_targets(data.targets)
        fields_of(self.text, "data.text")
        self.remote, self.tracks = data.remote, dict(data.tracks)
        for name, number in self.tracks.items():
            if name not in ("video", "audio") or type(number) is not int or number < 0:
                raise UserError(f'data.tracks: "video" or "audio" → a number from 0, got {name!r} → {number!r}')
        self.tokenizer = text.load_tokenizer(data.tokenizer) if reads_text(data, modalities) else None
        self.cache = _Cache(data.cache)

    def __setstate__(self, state: dict):  # in a worker process
        self.__dict__.update(state)
        if self.tokenizer:
            self.tokenizer.encode_special_tokens = True  # pickling forgets it

    def __call__(self, position: int, epoch: int, row: int, peers: np.ndarray | None = None, bucket: int = 0) -> dict:
        """Returns the sample; a row that cannot be decoded is replaced by one of its peers, and flagged.

        `failed` and `reason` name the row and why, -1 where all is well: the number and order of
        samples never depend on bad files. `remarks`: bits of what decoding the row that is shown had to guess or
        drop (vmm/data/reading/problems.py). peers: row numbers to choose from, None: all.
        """
        failed, reason = -1, -1
        count = len(self.rows) if peers is None else len(peers)
        for attempt in range(_ATTEMPTS):
            rng = np.random.default_rng([self.seed, epoch, row, attempt])
            try:
                sample = self._sample(row, rng, self.clips[bucket])
                break
            except media.DecodeError as error:
                if attempt == 0:
                    failed, reason = row, media.REASONS.index(error.reason)
                if attempt == _ATTEMPTS - 1:
                    raise DataBudgetError(
                        f"{_ATTEMPTS} files in a row could not be decoded, the last {self.rows[row].path} ({error}); "
                        "check the paths in the manifest"
                    ) from None
                place = int(np.random.default_rng([self.seed, epoch, row, attempt, 1]).integers(count))
                row = place if peers is None else int(peers[place])
        return sample | {
            "index": np.int32(position % _BLOCK),
            "failed": np.int32(failed),
            "reason": np.int32(reason),
        }

    def view(self, row: int, window: float, along: float) -> dict:
        """Returns one view of a row without randomness; raises DecodeError. Arguments: see EvaluationViews.places."""
        return self._sample(row, np.random.default_rng(0), self.clips[0], window, along)

    def _sample(
        self, number: int, rng: np.random.Generator, clip: Clip, place: float = 0.5, along: float = 0.5
    ) -> dict:
        row, augment = self.rows[number], self.augment
        draw = rng.uniform(size=5)  # drawn whole, so that one option never moves another's numbers
        crop, drawn = media.Crop(along, along, share=clip.crop), along != 0.5
        if augment:
            cut = augment.area[0] < 1
            drawn = cut or augment.flip
            if cut:
                area = augment.area[0] + draw[2] * (augment.area[1] - augment.area[0])
                low, high = np.log(augment.aspect)
                stretch = np.exp(rng.spawn(1)[0].uniform(low, high))
                crop = media.Crop(draw[0], draw[1], area, float(stretch))
            crop = crop._replace(flip=bool(augment.flip and draw[3] < 0.5))
            place = draw[4] if augment.window else 0.5
        window = _Window(row, clip.seconds, place)
        key = None if drawn else (number, clip.seconds)
        decoded = self.cache.get(key) if key is not None else None
        if decoded is not None:
            pass  # only clips without room are kept: the window begins where the clip does
        else:
            decoded = self._decode(row, window, clip, crop)
            if key is not None and window.only:
                self.cache.put(key, decoded)
        caption = ""
        if row.captions:
            caption = row.captions[int(rng.integers(len(row.captions))) if augment and augment.caption else 0]
        caption = fill(self.text, row, caption)
        present = {
            "video": decoded.video is not None,
            "audio": decoded.audio is not None,
            "text": bool(caption),
        }
        present = {name: there and name in self.modalities for name, there in present.items()}
        if augment and augment.drop:
            present = _withhold(present, augment.drop, rng)
        ids = np.full(clip.text_length, text.padding_id(self.tokenizer) if self.tokenizer else 0, np.int32)
        if present["text"]:
            ids = text.encode(self.tokenizer, caption, clip.text_length)
        shape = (clip.frames, clip.size, clip.size, 3)
        return {
            "video": decoded.video if present["video"] else np.zeros(shape, np.uint8),
            "audio": decoded.audio if present["audio"] else np.zeros(clip.samples, np.float32),
            "text": ids,
            "present": {name: np.bool_(value) for name, value in present.items()},
            **self.told(row, window.start, clip.seconds),
            "row": np.int32(number),
            "remarks": np.int32(to_bits(decoded.remarks)),
        }

    def told(self, row: Row | None, start: float, seconds: float) -> dict:
        """Returns labels, targets and start of a window of a row, None: of one that is not there."""
        labels = row.labels if row else {}
        return {
            "labels": {name: np.int32(labels.get(name, -1)) for name in self.labels}
            | {name: _tags(labels.get(name), classes) for name, classes in self.tags.items()},
            "targets": {
                name: target.read(row, start, seconds, self.tokenizer) if row else target.blank()
                for name, target in self.targets.items()
            },
            "start": np.float32(start),
        }

    def _decode(self, row: Row, window: "_Window", clip: Clip, crop: media.Crop) -> media.Media:
        want = tuple(name for name in ("video", "audio") if name in self.modalities)
        if not want:
            return media.Media(None, None)
        try:
            return media.decode(
                row.read(self.remote), pick=window, seconds=clip.seconds, frames=clip.frames, size=clip.size,
                sample_rate=clip.sample_rate, crop=crop, want=want,
                known=row.duration if row.start is None and row.end is None else None, tracks=self.tracks,
            )  # fmt: skip
        except media.DecodeError as error:
            if error.reason == "no frames" and len(want) == 1:
                return media.Media(None, None)  # the file has no such stream: absent, not bad
            raise


class _Window:
    """Picks the window's start in a clip; `only` tells whether another draw could differ."""

    def __init__(self, row: Row, seconds: float, place: float):
        self.row, self.seconds, self.place, self.only, self.start = row, seconds, place, False, row.start or 0.0

    def __call__(self, duration: float | None) -> float:
        """Returns the window's start. duration: the file's length in seconds, whatever the row's end says."""
        start = self.row.start or 0.0
        ends = [end for end in (self.row.end, duration) if end is not None]
        room = max(0.0, min(ends, default=start) - start - self.seconds)
        self.only = room == 0.0
        self.start = start + self.place * room
        return self.start


def _tags(value: int | list[int] | None, classes: int) -> np.ndarray:
    """Returns int32 [Y]: 1 where the clip has the tag, else 0; -1 everywhere where its tags are unknown."""
    if value is None or value in (-1, [-1]):
        return np.full(classes, -1, np.int32)
    return np.isin(np.arange(classes), value).astype(np.int32)


def _withhold(present: dict, drop: float | Mapping, rng: np.random.Generator) -> dict:
    """Returns presence with streams dropped at random, never all of them. drop: of Augment."""
    rates = drop if isinstance(drop, Mapping) else dict.fromkeys(present, drop)
    keep = {name: there and rng.uniform() >= rates.get(name, 0.0) for name, there in present.items()}
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
