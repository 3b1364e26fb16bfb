"""What a config's data gives to a model: all that encoders and objectives may ask of it."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vmm.data import text
from vmm.data.samples import Clip, Data, bucket_clips


class TokenizerSpec(NamedTuple):
    """What a model has to know of a tokenizer. vocabulary: its largest id and 1. empty: ids of a text of no words."""

    path: str
    vocabulary: int
    padding: int
    empty: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Labels, targets, windows and tokenizer of the data.

    Attributes:
      data: the config's group. clip: its window.
      moves_pixels: whether augmentation changes where in a picture something is seen.
    """

    data: Data
    clip: Clip
    moves_pixels: bool = False

    @property
    def labels(self) -> Mapping[str, int]:
        """Label or tag → number of classes."""
        return {**self.data.labels, **self.data.tags}

    @property
    def targets(self) -> Mapping[str, Mapping]:
        """Name → spec of what else is asked for."""
        return self.data.targets

    @property
    def seconds(self) -> tuple[float, ...]:
        """Lengths of windows, ascending."""
        return tuple(clip.seconds for clip in bucket_clips(self.data, self.clip))

    @functools.cached_property
    def tokenizer(self) -> TokenizerSpec | None:
        """None where its file is not there yet."""
        path = self.data.tokenizer
        if not Path(path).is_file():
            return None
        tokenizer = text.load_tokenizer(path)
        largest = max(tokenizer.get_vocab().values())
        return TokenizerSpec(path, largest + 1, text.padding_id(tokenizer), tuple(text.encode(tokenizer, "", 8)))
