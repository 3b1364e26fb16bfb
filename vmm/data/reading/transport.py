"""MPEG transport streams count their packets: whether some are missing can be told without decoding."""

import numpy as np

_SYNC = 0x47
_NULL = 0x1FFF  # stuffing
_LOOK = 1 << 16  # bytes in which the first packet is looked for


def missing_packets(data: bytes, streams: set[int]) -> int:
    """Returns how often the counters of some streams (packet identifiers) jump; 0 too where no packets are found.

    A packet may come twice, and a marked discontinuity is none.
    """
    packets = _packets(np.frombuffer(data, np.uint8))
    if packets is None:
        return 0
    numbers = (packets[:, 1] & 0x1F).astype(np.int32) << 8 | packets[:, 2]
    payload = (packets[:, 3] & 0x10) > 0
    adapted = ((packets[:, 3] & 0x20) > 0) & (packets[:, 4] > 0)
    marked = adapted & ((packets[:, 5] & 0x80) > 0)
    jumps = 0
    for number in streams - {_NULL}:
        here = (numbers == number) & payload
        counts = (packets[here, 3] & 0x0F).astype(int)
        steps = np.diff(counts) % 16
        jumps += int(((steps > 1) & ~marked[here][1:]).sum())
    return jumps


def _packets(data: np.ndarray) -> np.ndarray | None:
    """Returns the packets, uint8 [n 188], of the longest row of them from the first one on."""
    for size in (188, 192, 204):
        for start in np.flatnonzero(data[: min(_LOOK, len(data))] == _SYNC)[:512]:
            count = (len(data) - int(start)) // size
            if count < 8 or not (data[start : start + 8 * size : size] == _SYNC).all():
                continue
            packets = data[start : start + count * size].reshape(count, size)[:, :188]
            whole = packets[:, 0] == _SYNC
            return packets[whole] if whole.mean() > 0.5 else None
    return None
