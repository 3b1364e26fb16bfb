"""How fast a run is, and how long it has left."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

from vmm.training.metrics import peak_flops

_LAPS = 20  # of which the time left is told: a run changes its pace with its machine's other work


class Clock:
    """Clips per second, share of time that waits for input and model FLOPs utilization since the last lap."""

    def __init__(self, batch: int, flops: int):
        """flops: of a step."""
        self.batch, self.flops, self.peak = batch, flops, peak_flops()
        self.since, self.step, self.waited = time.perf_counter(), None, 0.0
        self.laps: deque[tuple[int, float]] = deque(maxlen=_LAPS)  # (steps, seconds)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for input."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start

    def lap(self, step: int) -> dict[str, float]:
        """Returns the speed since the last lap, which ends here."""
        now = time.perf_counter()
        steps = 1 if self.step is None else step - self.step
        elapsed = max(now - self.since, 1e-9)
        rate = steps / elapsed
        speed = {"steps_per_second": rate, "clips_per_second": rate * self.batch, "input_wait": self.waited / elapsed}
        if self.peak:
            speed["mfu"] = rate * self.flops / self.peak
        if self.step is not None:  # the first lap is mostly compilation
            self.laps.append((steps, elapsed))
        self.since, self.step, self.waited = now, step, 0.0
        return speed

    def left(self, steps: int) -> float | None:
        """Returns the seconds that so many steps take at the pace of the last laps; None before it is known."""
        if not self.laps:
            return None
        done, seconds = (sum(column) for column in zip(*self.laps))
        return steps * seconds / done
