"""What runs on every host: `vmm supervise` with the words of `vmm train`, checked before anything costs money."""

from __future__ import annotations

import argparse
import re
from typing import NamedTuple

from shell import LaunchError

# vmm's exit codes: `vmm supervise` starts again after all others, so no launcher does after these.
DONE, FINAL, PREEMPTED = 0, {2: "wrong input", 3: "too many bad files", 4: "loss not finite"}, 42


class Job(NamedTuple):
    """One run. env: variables of the training process."""

    name: str
    config: str
    workdir: str
    overrides: tuple[str, ...]
    env: dict[str, str]

    def words(self, program: str = "vmm") -> list[str]:
        """Returns the command of one host, a word each."""
        return [program, "supervise", self.config, "--workdir", self.workdir, *self.overrides]


def add_job_flags(parser: argparse.ArgumentParser, actions: dict[str, str]) -> None:
    """Adds the action, the name, the words of `vmm train`, and --dry-run."""
    listed = "; ".join(f"{action}: {what}" for action, what in actions.items())
    parser.add_argument("action", choices=actions, help=listed)
    parser.add_argument("name", help="of the job: small letters, digits, dashes")
    parser.add_argument("config", nargs="?", default="", help="as for `vmm train`: configs/NAME.py[:VARIANT]")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for `vmm train`")
    parser.add_argument("--workdir", default="", help="of the run: gs://… or a folder that all hosts share")
    parser.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="a variable of the training")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run and written; do nothing")


def check_name(name: str) -> None:
    """Raises LaunchError where a name would not be accepted as part of a pod's or a node's name."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise LaunchError(f"name {name!r}: use small letters, digits and dashes, a letter first, at most 40 characters")


def read_job(args: argparse.Namespace, hosts: int, shared: tuple[str, ...], declare: str) -> Job:
    """Returns the job of the words given.

    hosts: how many will run it. shared: folders that all of them see. declare: the flag that says so.

    Raises:
      LaunchError: something is missing, or several hosts have no workdir in common.
    """
    if not args.config:
        raise LaunchError(f"{args.action}: which config? give it as for `vmm train`: configs/NAME.py [KEY=VALUE …]")
    if not args.workdir:
        raise LaunchError(f"{args.action}: --workdir is missing: gs://BUCKET/FOLDER, or a folder that all hosts share")
    for word in args.overrides:
        if "=" not in word:
            raise LaunchError(f"override {word!r}: write it as key=value")
    env = {}
    for word in args.env:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", key):
            raise LaunchError(f"--env {word!r}: write it as KEY=VALUE")
        env[key] = value
    if hosts > 1 and not is_shared(args.workdir, shared):
        raise LaunchError(
            f"workdir {args.workdir}: {hosts} hosts save into it, so it must be gs://BUCKET/FOLDER "
            f"or lie in a folder that they all share: declare that one with {declare}"
        )
    return Job(args.name, args.config, args.workdir, tuple(args.overrides), env)


def is_shared(workdir: str, shared: tuple[str, ...]) -> bool:
    """Whether all hosts see a workdir: an address, or inside one of the shared folders."""
    if re.match(r"gs://[^/]+/.", workdir):
        return True
    folders = [folder.rstrip("/") + "/" for folder in shared]
    return ".." not in workdir.split("/") and any((workdir.rstrip("/") + "/").startswith(folder) for folder in folders)
