"""Dense bfloat16 peaks of devices as JAX counts them, FLOP/s, from the vendors' data sheets. No JAX here."""

# Part of a device's kind → peak; the longest that fits counts. TPU v2, v3 and 7x are two devices a chip, v4 and v5p one.
PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
}


def peak_of(kind: str) -> float | None:
    """Returns the peak of one device of a kind, None where it is not known."""
    names = [name for name in PEAKS if name in kind]
    return PEAKS[max(names, key=len)] if names else None
