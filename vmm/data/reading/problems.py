"""What can be wrong with a medium: errors that end a decode, and remarks on what it had to guess, drop or stretch."""

from collections.abc import Iterable, Mapping

import av


class DecodeError(Exception):
    """A file gave nothing that can be used. `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


REASONS = ("missing", "unreadable", "undecodable", "no streams", "no frames", "too large", "changed", "span outside")

# Every way in which a broken file fails; an IndexError of packets whose stream shows up as late as they do.
BROKEN = (av.FFmpegError, OSError, UnicodeDecodeError, MemoryError, ValueError, EOFError, OverflowError, IndexError)

REMARKS = {
    "errors skipped": "packets that did not decode were passed over",
    "times guessed": "pictures without a time follow the one before",
    "rate assumed": "a raw stream tells no rate: 25 pictures a second",
    "length measured": "the container tells no length that can be believed: its packets do",
    "length corrected": "the container promises more than there is: the window was drawn again",
    "track chosen": "of several tracks the default one was taken",
    "pictures lost": "there are pictures, and none of them could be decoded",
    "sound lost": "there is sound, and none of it could be decoded",
    "pictures end early": "the pictures end before the window begins",
    "sound elsewhere": "the sound does not reach the window",
    "starts late": "moments before the first picture show it",
    "ends early": "the window is longer than the clip: its last picture is held, and silence follows",
    "holes in the stream": "packets of a transport stream are missing, somewhere in the file that a clip was cut from",
    "holes in the sound": "moments without sound between others are silence",
}
"""Remark → what was done. A decode that had to do none of it gives what is in the file."""


def reason_of(error: Exception) -> str:
    """Returns the one of REASONS that stands for one of BROKEN."""
    if isinstance(error, MemoryError):
        return "too large"
    if isinstance(error, av.FFmpegError):  # its classes share names with the errors of files
        return "undecodable"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "missing"
    if isinstance(error, (PermissionError, IsADirectoryError)):
        return "unreadable"
    return "undecodable"


def to_bits(remarks: Iterable[str]) -> int:
    """Returns remarks as bits of one number, in the order of REMARKS."""
    places = {name: place for place, name in enumerate(REMARKS)}
    return sum(1 << places[name] for name in set(remarks))


def from_bits(bits: int) -> list[str]:
    """Returns the remarks of a number of to_bits."""
    return [name for place, name in enumerate(REMARKS) if bits >> place & 1]


def present(remarks: Mapping[str, int]) -> dict[str, int]:
    """Returns the remarks that were made, in the order of REMARKS."""
    return {name: remarks[name] for name in REMARKS if remarks.get(name, 0) > 0}
