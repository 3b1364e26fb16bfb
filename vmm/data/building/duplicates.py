"""Near-duplicate clips, by perceptual fingerprints of their pictures, one a second."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_STEP = 3  # of 255: smaller steps of brightness are noise of the codec, and a flat background is all noise
_HASH = 32  # hex digits of the hash; the thumbnail follows
_PICTURES = 16  # a clip is known by its first seconds
_CROWD = 64  # clips looked at for one part of a hash: a title card that thousands share must not cost their square
_CONTRAST = 4.0  # of 255: a clip whose thumbnails vary less (black, a blank wall) is like every other such clip


def picture_hash(frame) -> str:
    """Returns a fingerprint: 32 hex digits of a hash, then those of a thumbnail, 8 × 8 × RGB.

    The hash has one bit a step to the right, one a step down, of a 9 × 9 grey thumbnail: whether it brightens (dHash
    in two directions, with a dead zone). It finds candidates; the thumbnails decide.
    """
    grey = frame.reformat(9, 9, "gray", interpolation="AREA", threads=1).to_ndarray()[:9, :9].astype(np.int16)
    steps = np.concatenate([(grey[:8, 1:] - grey[:8, :-1]).ravel(), (grey[1:, :8] - grey[:-1, :8]).ravel()])
    small = frame.reformat(8, 8, "rgb24", interpolation="AREA", threads=1).to_ndarray()
    return np.packbits(steps > _STEP).tobytes().hex() + np.ascontiguousarray(small).tobytes().hex()


def near_duplicates(hashes: Mapping[str, Sequence[str]], apart: float = 0.12) -> Iterator[tuple[str, str, float]]:
    """Yields (id, earlier id, how far apart) of clips that look alike from first to last second.

    Args:
      hashes: clip id → the fingerprints of its pictures, in order; clips without pictures are left out.
      apart: root mean square difference of the thumbnails, as a share of their contrast (its standard deviation over
        the picture): 0 is the same picture, and about 1.4 are unrelated ones.

    Clips are compared when, at the same second, 16 bits of their hashes in the same place are equal (and not all 0).
    Copies at a quarter of the size and poor quality are under 0.1 apart, different clips of one film over 0.3.
    """
    seen: dict[tuple, list[str]] = {}
    kept: dict[str, np.ndarray] = {}
    for key, mine in hashes.items():
        if not mine:
            continue
        mine = mine[:_PICTURES]
        kept[key] = np.frombuffer(bytes.fromhex("".join(code[_HASH:] for code in mine)), np.uint8).reshape(
            len(mine), -1
        )
        buckets = [
            (second, place, code[place : place + 4])
            for second, code in enumerate(mine)
            for place in range(0, _HASH, 4)
            if code[place : place + 4] != "0000"
        ]
        candidates = dict.fromkeys(other for bucket in buckets for other in seen.get(bucket, ()))
        for other in candidates:
            distance = _distance(kept[key], kept[other])
            if distance <= apart:
                yield key, other, distance
                break
        for bucket in buckets:
            there = seen.setdefault(bucket, [])
            if len(there) < _CROWD:
                there.append(key)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns how far apart two rows of thumbnails are, infinity for other lengths or without contrast."""
    if abs(len(a) - len(b)) > 1:
        return np.inf
    short = min(len(a), len(b))
    a, b = (side[:short].reshape(short, -1, 3).astype(np.float32) for side in (a, b))
    contrast = np.mean([np.sqrt(side.var(1).mean(1)) for side in (a, b)])
    difference = np.sqrt(np.square(a - b).mean((1, 2))).mean()
    return float(difference / contrast) if contrast >= _CONTRAST else np.inf
