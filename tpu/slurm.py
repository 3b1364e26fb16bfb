#!/usr/bin/env python3
"""Training on the GPU nodes of a SLURM cluster: create, launch, watch, resume, delete. Page: tpu/slurm.md."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from batch import script
from job import DONE, FINAL, add_job_flags, check_name, read_job
from shell import CommandError, LaunchError, Parser, Patience, Shell, add_watch_flags, main

ACTIONS = {
    "create": "write the batch script and nothing else",
    "launch": "write the batch script and submit it",
    "watch": "submit it where it is not there, and again after it failed, until training is done",
    "resume": "submit it again, from its newest checkpoint",
    "status": "state of the job",
    "logs": "the end of its log",
    "delete": "save, stop and take the job out of the queue",
}
GOING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED",
         "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD")  # fmt: skip


class Queue:
    """The batch job of one name."""

    def __init__(self, args: argparse.Namespace, shell: Shell):
        check_name(args.name)
        self.args, self.shell, self.name = args, shell, args.name
        self.logs_folder = Path(args.logs)
        self.job = None
        if args.action in ("create", "launch", "watch", "resume"):
            for flag in ("nodes", "gpus"):
                if getattr(args, flag) < 1:
                    raise LaunchError(f"--{flag} {getattr(args, flag)}: at least 1")
            if not args.time:
                raise LaunchError("--time is missing: the job's time limit, as 24:00:00; it goes on in a new one")
            self.job = read_job(args, args.nodes, tuple(args.shared), "--shared FOLDER")

    # ---- actions --------------------------------------------------------------------------------
    def create(self) -> None:
        self.shell.write(self.file(), script(self.job, self.args))

    def file(self) -> Path:
        return self.logs_folder / f"{self.name}.sbatch"

    def launch(self) -> str:
        queued = self.queued()
        if queued:
            raise LaunchError(f"{self.name}: job {queued[0]} is in the queue already: `watch` it, or `delete` it first")
        self.create()
        said = self.shell.run("sbatch", str(self.file()), pretend="Submitted batch job 0")
        match = re.search(r"Submitted batch job (\d+)", said)
        if not match:
            raise LaunchError(f"sbatch: no job number in what it said: {said.strip()!r}", code=1)
        self.shell.say(f"{self.name}: job {match[1]}, its log is {self.log(match[1])}")
        return match[1]

    resume = launch

    def log(self, number: str) -> Path:
        return self.logs_folder / f"{self.name}-{number}.log"

    def queued(self, pretend: str = "") -> list[str]:
        """Numbers of the jobs of this name that are in the queue or run."""
        listed = self.shell.run("squeue", "--me", f"--name={self.name}", "--noheader", "--format=%A", pretend=pretend)
        return listed.split()

    def newest(self) -> str:
        """Number of the newest job: in the queue, or else the one that has the newest log."""
        queued = self.queued(pretend="0")
        if queued:
            return queued[-1]
        found = self.logs_folder.glob(f"{self.name}-*.log")
        logs = [path for path in found if re.fullmatch(rf"{self.name}-\d+", path.stem)]
        if not logs:
            raise LaunchError(f"{self.name}: no job in the queue and no log in {self.logs_folder}: `launch` it")
        return max(logs, key=lambda path: path.stat().st_mtime).stem.rpartition("-")[2]

    def status(self) -> None:
        number = self.newest()
        state, code = self.look(number)
        self.shell.say(f"{self.name}: job {number} is {state}" + (f", exit code {code}" if state not in GOING else ""))

    def logs(self) -> None:
        args = self.args
        follow = ["-F"] if args.follow else []
        self.shell.run("tail", "-n", str(args.lines), *follow, str(self.log(self.newest())), show=True)

    def delete(self) -> None:
        for number in self.queued(pretend="0"):
            # Else the job, saved and ended with 42, would be requeued.
            self.shell.run("scontrol", "update", f"JobId={number}", "Requeue=0")
            self.shell.run("scancel", number)
            self.shell.say(f"{self.name}: job {number} is asked to save and end")

    # ---- watching -------------------------------------------------------------------------------
    def look(self, number: str) -> tuple[str, int]:
        """State and exit code of a job; gone where SLURM has forgotten it (five minutes after its end)."""
        try:
            said = self.shell.run(
                "scontrol", "show", "job", number, "--oneliner", pretend="JobState=RUNNING ExitCode=0:0"
            )
        except CommandError as error:
            if "Invalid job id" in error.said:
                return "gone", 0
            raise
        state = re.search(r"\bJobState=(\w+)", said)
        code = re.search(r"\bExitCode=(\d+):(\d+)", said)
        return (state[1] if state else "gone"), (
            int(code[1]) or (128 + int(code[2]) if int(code[2]) else 0)
        ) if code else 0

    def watch(self) -> int:
        args, seen, number = self.args, None, None
        if self.shell.dry:
            return self.explain()
        patience = Patience(self.shell, args.attempts, args.backoff, args.steady)
        while True:
            try:
                if number is None:
                    queued = self.queued()
                    number = queued[-1] if queued else self.launch()
                state, code = self.look(number)
                if (number, state) != seen:
                    self.shell.say(f"{self.name}: job {number} is {state}")
                seen = (number, state)
                if state == "COMPLETED":
                    return DONE
                if state == "CANCELLED":
                    raise LaunchError(f"{self.name}: job {number} was cancelled; `watch` again submits it", code=1)
                if code in FINAL and state not in GOING:
                    self.shell.say(f"{self.name}: ended with code {code}, {FINAL[code]}; see {self.log(number)}")
                    return code
                if state == "RUNNING":
                    patience.running()
                elif state not in GOING:
                    patience.failed(f"job {number} is {state}, exit code {code}")
                    number = None
                    continue
            except CommandError as error:
                patience.failed(error)
            self.shell.sleep(args.poll)

    def explain(self) -> int:
        """What `watch` would do, in the order of a job with one failure."""
        self.shell.say("where there is none:")
        number = self.launch()
        self.shell.say(f"every {self.args.poll:g} s:")
        self.look(number or "0")
        self.shell.say(f"where it ended otherwise than COMPLETED, CANCELLED or with {', '.join(map(str, FINAL))}:")
        self.launch()
        return DONE


def parser() -> Parser:
    words = Parser(prog="slurm.py", description="Train on the GPU nodes of a SLURM cluster.")
    add_job_flags(words, ACTIONS)
    nodes = words.add_argument_group("nodes")
    nodes.add_argument("--nodes", type=int, default=1, help="how many (1)")
    nodes.add_argument("--gpus", type=int, default=8, help="a node (8)")
    nodes.add_argument("--task-per-gpu", action="store_true", help="one process a GPU (default: one a node)")
    nodes.add_argument("--cpus", type=int, default=0, help="a task (default: whole nodes, and all of theirs)")
    nodes.add_argument("--mem", default="", help="a node, as 500G (default: all of it)")
    nodes.add_argument("--time", default="", help="limit of one job, as 24:00:00; training goes on in a new one")
    nodes.add_argument("--partition", default="")
    nodes.add_argument("--account", default="")
    nodes.add_argument("--qos", default="")
    nodes.add_argument("--constraint", default="", help="features of the nodes, as h100")
    nodes.add_argument("--grace", type=int, default=120, metavar="SECONDS", help="to save before the limit (120)")
    code = words.add_argument_group("code and data")
    code.add_argument("--directory", default=".", help="checkout, that all nodes see (default: this folder)")
    code.add_argument("--setup", default="", metavar="COMMANDS", help="before training, as: source .venv/bin/activate")
    code.add_argument("--shared", action="append", default=[], metavar="FOLDER", help="that all nodes share")
    code.add_argument("--logs", default="logs", metavar="FOLDER", help="for the batch script and the logs (logs)")
    add_watch_flags(words)
    words.add_argument("--lines", type=int, default=100, help="logs: so many (100)")
    words.add_argument("--follow", action="store_true", help="logs: and what comes")
    return words


def run(args) -> int | None:
    args.directory, args.logs = str(Path(args.directory).resolve()), str(Path(args.logs).resolve())
    done = getattr(Queue(args, Shell(args.dry_run)), args.action)()
    return done if isinstance(done, int) else None


if __name__ == "__main__":
    sys.exit(main(run, parser()))
