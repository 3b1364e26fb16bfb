"""How far a long command is: a bar on a terminal, a line every ten seconds elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

_EVERY = 10.0  # seconds between lines


@contextlib.contextmanager
def progress(doing: str) -> Iterator[Callable[..., None]]:
    """Yields tell(done, total, doing): what is shown until the block ends, on stderr.

    done, total: how many of how many; total None: not known. doing: other words from now on, None: as before. `tell`
    costs nothing worth counting and may be called from any thread; a line comes also while nothing calls it.
    """
    from rich.console import Console  # a command that shows nothing does without
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        with _lines(doing) as tell:
            yield tell
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # What is printed meanwhile stands above the bar; where stdout is a file it belongs there, not on this console.
    same = sys.stdout.isatty()
    with Progress(*columns, transient=True, console=console, redirect_stdout=same) as bar:
        task = bar.add_task(doing, total=None)

        def show(done: int = 0, total: int | None = None, doing: str | None = None) -> None:
            bar.update(task, completed=done, total=total, description=doing)

        yield show


@contextlib.contextmanager
def _lines(doing: str) -> Iterator[Callable[..., None]]:
    state, end = [0, None, doing, time.monotonic(), 0], threading.Event()

    def tell(done: int = 0, total: int | None = None, doing: str | None = None) -> None:
        new = doing is not None and doing != state[2]
        first = state[1] is None or new  # what was done before is not of this pace
        state[:] = done, total, doing or state[2], time.monotonic() if first else state[3], done if first else state[4]

    def run() -> None:
        while not end.wait(_EVERY):
            print(line(*state, time.monotonic()), file=sys.stderr, flush=True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        end.set()
        thread.join()


def line(done: int, total: int | None, doing: str, began: float, before: int, now: float) -> str:
    """Returns how far it is in words. began: the second at which `before` were done; now: this second."""
    if total is None:
        return f"{doing} …"
    pace = (done - before) / max(now - began, 1e-9)
    left = f", about {(total - done) / pace:.0f} s left" if pace > 0 and done < total else ""
    return f"{doing}: {done} of {total}{left}"
