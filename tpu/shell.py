"""Running other programs: for real, or printed only (`--dry-run`); one line and an exit code for what goes wrong."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class LaunchError(Exception):
    """What a person can mend (code 2), or what ended the watch: the message is one line."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


class CommandError(LaunchError):
    """A program ended with an error. said: what it wrote to its error output."""

    def __init__(self, words: tuple[str, ...], code: int, said: str):
        self.said = said.strip()
        last = self.said.splitlines()[-1] if self.said else "it said nothing"
        super().__init__(f"{shlex.join(words)}: exit code {code}: {last}", code=1)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; --help lists the words\n")


class Shell:
    """Runs programs and writes files; with `dry` it prints both and does neither."""

    def __init__(self, dry: bool):
        self.dry = dry

    def run(self, *words: str, pretend: str = "", show: bool = False) -> str:
        """Runs a program to its end and returns what it printed; a dry one prints it and returns `pretend`.

        show: its output goes to the terminal as it comes, and "" is returned.

        Raises:
          LaunchError: there is no such program.
          CommandError: it ended with an error.
        """
        if self.dry:
            print(shlex.join(words))
            return pretend
        sys.stdout.flush()
        pipe = None if show else subprocess.PIPE
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
        except FileNotFoundError:
            raise LaunchError(f"{words[0]}: not found; install it, or add its folder to PATH") from None
        if done.returncode:
            raise CommandError(words, done.returncode, "see above" if show else done.stderr)
        return "" if show else done.stdout

    def write(self, path: Path, text: str) -> None:
        """Writes a file whole or not at all; a dry one prints it."""
        if self.dry:
            print(f"# write {path}:\n{text.rstrip()}\n# end of {path}")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)

    def say(self, text: str) -> None:
        """Prints a line for people: with the time, or as a comment between the commands of a dry run."""
        print(f"# {text}" if self.dry else f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)

    def sleep(self, seconds: float) -> None:
        """Waits; a dry one does not."""
        if not self.dry:
            time.sleep(seconds)


class Patience:
    """Counts failures since the last progress, waits longer after each, and gives up.

    limit: so many failures in a row are the end. first: seconds waited after the second failure (none
    after the first: most are preemptions), doubled each time up to half an hour. steady: training that was
    seen running for so many seconds is progress.
    """

    longest = 1800.0

    def __init__(self, shell: Shell, limit: int, first: float, steady: float):
        self.shell, self.limit, self.first, self.steady = shell, limit, first, steady
        self.failures, self.since = 0, None

    def running(self) -> None:
        """To be called at every look that finds training running."""
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        if now - self.since >= self.steady:
            self.failures = 0

    def failed(self, what: str | LaunchError) -> None:
        """Counts a failure and waits; of a program that said more than a line, prints all.

        Raises:
          LaunchError: it is one too many.
        """
        self.failures, self.since = self.failures + 1, None
        show_said(what)
        if self.failures >= self.limit:
            raise LaunchError(f"{what}: given up after {self.failures} failures without progress", code=1)
        wait = min(self.first * 2 ** (self.failures - 2), self.longest) if self.failures > 1 else 0.0
        self.shell.say(f"{what} (failure {self.failures} of {self.limit}); again in {wait:.0f} s")
        self.shell.sleep(wait)


def show_said(error: object) -> None:
    """Prints what a failed program said, where it is more than the line that its error shows."""
    said = error.said if isinstance(error, CommandError) else ""
    if "\n" in said:
        print(said, file=sys.stderr, flush=True)


def add_watch_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `watch`: how often it looks, and when it gives up."""
    group = parser.add_argument_group("watch")
    group.add_argument("--poll", type=float, default=60, metavar="SECONDS", help="between two looks (60)")
    group.add_argument("--attempts", type=int, default=10, help="failures without progress before giving up (10)")
    group.add_argument("--backoff", type=float, default=60, metavar="SECONDS", help="first wait, then doubled (60)")
    group.add_argument("--steady", type=float, default=900, metavar="SECONDS", help="running so long is progress (900)")


def add_log_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `logs` where a job has slices: whose, and how much of them."""
    parser.add_argument("--slice", type=int, default=0, help="logs: of this slice (0)")
    parser.add_argument("--host", type=int, default=0, help="logs: of this host of it (0)")
    parser.add_argument("--lines", type=int, default=100, help="logs: so many (100)")
    parser.add_argument("--follow", action="store_true", help="logs: and what comes")


def main(run, parser: Parser) -> int:
    """Reads the words, runs the action and returns the exit code; errors become one line."""
    args = parser.parse_intermixed_args()
    try:
        return run(args) or 0
    except LaunchError as error:
        show_said(error)
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; what it started goes on", file=sys.stderr)
        return 130
