"""Parts of a media file, one after the other, as a new mp4 file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vmm.data.building.store import Storage, Store
from vmm.data.building.strict import TICK, Sound, opened_bytes, read_sound, strict_frames
from vmm.data.reading.geometry import pixel_ratio
from vmm.data.reading.open import open_regular
from vmm.data.reading.problems import BROKEN, DecodeError, reason_of
from vmm.errors import StorageError, UserError


def write_parts(
    source: str | Path, parts: Sequence[tuple[float, float]], out: str | Path, short_side: int = 720
) -> None:
    """Writes spans (start, end) in seconds of a file, in their order, as H.264 + AAC; pictures and sound stay together.

    short_side: of the pictures, which are never scaled up. The file is read whole into memory.

    Raises:
      UserError: no part, no pictures in the file, or it cannot be decoded. StorageError: out cannot be written.
    """
    if not parts:
        raise UserError(f"{source}: no part to write")
    try:
        with open_regular(source) as file:
            data = file.read()
        store = _cut(data, parts, Storage(short_side=short_side))
    except (DecodeError, *BROKEN) as error:
        raise UserError(
            f"{source}: cannot be decoded ({error.reason if isinstance(error, DecodeError) else reason_of(error)})"
        ) from None
    if not store.count:
        raise UserError(f"{source}: has no pictures")
    temporary = Path(out).with_name(Path(out).name + ".part")
    try:
        temporary.write_bytes(store.bytes())
        temporary.replace(out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror})") from None


def _cut(data: bytes, parts: Sequence[tuple[float, float]], storage: Storage) -> Store:
    with opened_bytes(data) as medium:
        heard = medium.stream("audio") is not None
        if medium.stream("video") is None:
            raise DecodeError("no frames")
        ratio, offset = pixel_ratio(medium.stream("video")), 0.0
    with Store(storage, _sound(data, parts) if heard else None, ratio) as store:
        for first, until in parts:
            last = None
            with opened_bytes(data) as medium:
                for frame, time in strict_frames(medium, first, storage.pixels):
                    if time >= until - TICK:
                        break
                    # What is seen at `first` is the last picture up to it: each replaces the one before.
                    store.picture(frame, offset + max(0.0, time - first), 0.0 if last is None else time - last)
                    last = time
            offset += until - first
        store.end_pictures(offset, more=True)
        store.end_sound()
    return store


def _sound(data: bytes, parts: Sequence[tuple[float, float]]) -> Sound | None:
    """Returns the sound of the parts, each exactly as long as its pictures; what is missing is silence."""
    pieces = [read_sound(data, first, until) for first, until in parts]
    known = [piece for piece in pieces if piece is not None]
    if not known:
        return None
    channels, rate = len(known[0].wave), known[0].rate
    waves = []
    for piece, (first, until) in zip(pieces, parts):
        wave = np.zeros((channels, round((until - first) * rate)), np.float32)
        if piece is not None:
            count = min(wave.shape[1], piece.wave.shape[1])
            wave[:, :count] = piece.wave[:, :count]
        waves.append(wave)
    return Sound(np.concatenate(waves, 1), rate)
