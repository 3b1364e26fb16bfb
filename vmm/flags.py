"""What the command line takes: numbers within limits, and mistakes told in one line."""

import argparse
import math
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line: the usage of a command with twenty flags would bury it."""

    def error(self, message: str):
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Returns text → a whole number from low to high, None: without an upper limit, for `type` of add_argument."""
    return _within(int, "a whole number", low, high, False)


def number(low: float, high: float | None = None, above: bool = False) -> Callable[[str], float]:
    """Returns text → a finite number from low to high, None: without an upper limit. above: low itself is none of them."""
    return _within(float, "a number", low, high, above)


def _within(read: Callable, kind: str, low: float, high: float | None, above: bool) -> Callable:
    limits = f"above {low:g}" if above else f"of at least {low:g}"
    limits += "" if high is None else f", at most {high:g}"

    def check(text: str):
        try:
            value = read(text)
        except ValueError:
            value = math.nan
        small = value <= low if above else value < low
        if not math.isfinite(value) or small or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{kind} {limits}, got {text!r}")
        return value

    return check
