#!/usr/bin/env python3
"""Training on Cloud TPU slices, asked for as queued resources: create, launch, watch, resume, delete.

Page: tpu/queued-resources.md. Flags checked against Google Cloud CLI 528 (`gcloud compute tpus queued-resources`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import remote
from job import DONE, FINAL, add_job_flags, check_name, read_job
from shell import CommandError, LaunchError, Parser, Patience, Shell, add_log_flags, add_watch_flags, main
from slices import find_slice

ROOT = Path(__file__).resolve().parent.parent
ACTIONS = {
    "create": "ask for the slices",
    "launch": "install the code on all hosts and start training",
    "watch": "all of it, again after every preemption, until training is done",
    "resume": "start training again on slices that have the code",
    "status": "state of the slices and of training on each host",
    "logs": "the end of one host's log",
    "stop": "save and stop training; the slices stay",
    "delete": "save, stop and give the slices back",
}
# States of a queued resource after which it never comes to be active, and of a slice that is lost.
ENDED = ("FAILED", "SUSPENDED")
LOST = ("PREEMPTED", "TERMINATED", "STOPPED", "DELETING", "HIDDEN", "UNKNOWN")


class Slices:
    """The slices of one job and what runs on them."""

    def __init__(self, args, shell: Shell):
        check_name(args.name)
        if not args.zone:
            raise LaunchError("--zone is missing: where the slices are, as us-west4-a")
        self.args, self.shell, self.name = args, shell, args.name
        self.job = self.slice = None
        if args.action in ("create", "launch", "watch", "resume"):
            if not args.accelerator:
                raise LaunchError(f"{args.action}: --accelerator is missing, as v5e-16")
            self.slice = find_slice(args.accelerator)
            if not self.slice.runtime:
                raise LaunchError(
                    f"accelerator {self.slice.name}: Cloud TPU has none; on GKE there are: see tpu/gke.md"
                )
            if args.slices < 1:
                raise LaunchError(f"--slices {args.slices}: at least 1")
        if args.action in ("launch", "watch", "resume"):
            self.job = read_job(args, self.hosts, tuple(args.shared), "--shared FOLDER")

    @property
    def hosts(self) -> int:
        return self.slice.machines * self.args.slices

    # ---- gcloud ---------------------------------------------------------------------------------
    def gcloud(self, *words: str, alpha: bool = False, pretend: str = "", show: bool = False) -> str:
        place = [f"--zone={self.args.zone}", *([f"--project={self.args.project}"] if self.args.project else [])]
        track = ["alpha"] if alpha else []
        return self.shell.run(
            "gcloud", *track, "compute", "tpus", *words, *place, "--quiet", pretend=pretend, show=show
        )

    def ssh(self, command: str, node: str = "all", worker: str = "all", pretend: str = "", show: bool = False) -> str:
        words = (f"--node={node}", f"--worker={worker}", *self.route(), f"--command={command}")
        return self.gcloud("queued-resources", "ssh", self.name, *words, pretend=pretend, show=show)

    def route(self) -> list[str]:
        return ["--tunnel-through-iap"] if self.args.iap else ["--internal-ip"] if self.args.internal_ip else []

    def look(self) -> tuple[str, list[str]]:
        """State of the queued resource ("" where there is none) and the names of its slices."""
        names = [self.name] if self.args.slices == 1 else [f"{self.name}-{i}" for i in range(self.args.slices)]
        dry = {"state": {"state": "ACTIVE"}, "tpu": {"nodeSpec": [{"nodeId": name} for name in names]}}
        found = json.loads(self._ask("queued-resources", "describe", "--format=json", json.dumps(dry)) or "{}")
        nodes = [spec.get("nodeId", "") for spec in found.get("tpu", {}).get("nodeSpec", [])]
        return found.get("state", {}).get("state", ""), nodes

    def lost(self, nodes: list[str]) -> str:
        """What happened to the first slice that is lost, although the queued resource is active; "" if none is."""
        for node in nodes:
            state = self._ask("tpu-vm", "describe", "--format=value(state)", name=node, pretend="READY").strip()
            if not state or state in LOST:
                return f"slice {node} is {state or 'gone'}"
        return ""

    def _ask(self, group: str, verb: str, form: str, pretend: str, name: str = "") -> str:
        try:
            return self.gcloud(group, verb, name or self.name, form, pretend=pretend)
        except CommandError as error:
            if "NOT_FOUND" in error.said:
                return ""
            raise

    # ---- actions --------------------------------------------------------------------------------
    def create(self) -> None:
        args = self.args
        count = args.slices
        words = [f"--node-id={self.name}"] if count == 1 else [f"--node-count={count}", f"--node-prefix={self.name}"]
        words += [f"--accelerator-type={self.slice.name}", f"--runtime-version={args.runtime or self.slice.runtime}"]
        words += ["--spot"] if args.spot else ["--reserved"] if args.reserved else []
        words += [f"--reservation={args.reservation}"] if args.reservation else []
        for flag in ("network", "subnetwork", "service_account", "valid_until_duration"):
            value = getattr(args, flag)
            words += [f"--{flag.replace('_', '-')}={value}"] if value else []
        words += ["--internal-ips"] if args.internal_ip or args.iap else []
        self.gcloud("queued-resources", "create", self.name, *words, alpha=bool(args.reservation))
        self.shell.say(f"{self.name}: asked for {count} × {self.slice.name} ({self.hosts} hosts) in {args.zone}")

    def launch(self) -> None:
        args = self.args
        self.need_active()
        with tempfile.TemporaryDirectory() as folder:
            packed = Path(folder) / remote.archive(self.name)
            if self.shell.dry:
                packed = Path(remote.archive(self.name))
                self.shell.say(f"write {packed}: the files that git lists in {args.code}, your changes included")
            else:
                pack(Path(args.code), packed)
            target = f"{self.name}:{packed.name}"
            words = ("--node=all", "--worker=all", *self.route())
            self.gcloud("queued-resources", "scp", str(packed), target, *words, show=True)
        install = remote.install(self.name, args.python, args.setup)
        answers = self.expect("installed", self.ssh(install, pretend=self.pretended("installed")))
        if "installed" not in answers:
            raise LaunchError(f"{self.name}: training runs on all hosts: `stop` it first, or leave it")
        self.start()

    def resume(self) -> None:
        self.need_active()
        self.start()

    def start(self) -> None:
        answers = self.expect("running", self.ssh(remote.start(self.job), pretend=self.pretended("running")))
        self.shell.say(
            f"{self.name}: {len(answers)} hosts run {self.job.config}, the log is ~/vmm-jobs/{self.name}/log"
        )

    def need_active(self) -> None:
        state, _ = self.look()
        if state != "ACTIVE":
            raise LaunchError(
                f"{self.name}: "
                + (f"is {state}, not ACTIVE: `watch` waits for it" if state else "is not there: `create` it")
            )

    def pretended(self, answer: str) -> str:
        return f"vmm-host dry {answer}\n" * self.hosts

    def expect(self, wanted: str, printed: str) -> list[str]:
        """Returns the hosts' answers. gcloud only warns of a slice that it cannot reach, so they are counted."""
        answers = remote.read_answers(printed)
        good = [answer for answer in answers if answer in (wanted, "running", "exit 0")]
        if len(good) != self.hosts:
            other = ", ".join(sorted({answer for answer in answers if answer not in good})) or "no answer"
            raise LaunchError(f"{self.name}: {len(good)} of {self.hosts} hosts are {wanted}; others: {other}", code=1)
        return answers

    def status(self) -> None:
        state, _ = self.look()
        self.shell.say(f"{self.name}: {state or 'is not there'}")
        if state == "ACTIVE":
            self.ssh(remote.state(self.name), show=True)

    def logs(self) -> None:
        args = self.args
        self.ssh(remote.log(self.name, args.lines, args.follow), str(args.slice), str(args.host), show=True)

    def stop(self) -> None:
        self.shell.say(f"{self.name}: training is asked to save")
        self.ssh(remote.stop(self.name), show=True)

    def delete(self) -> None:
        if not self.args.now and self.look()[0] == "ACTIVE":
            try:
                self.stop()
            except CommandError as error:
                self.shell.say(f"could not be asked: {error}")
        self.remove()

    def remove(self) -> None:
        self.gcloud("queued-resources", "delete", self.name, "--force", show=True)

    # ---- watching -------------------------------------------------------------------------------
    def watch(self) -> int:
        args, seen = self.args, None
        if self.shell.dry:
            return self.explain()
        patience = Patience(self.shell, args.attempts, args.backoff, args.steady)
        while True:
            try:
                state, nodes = self.look()
                if state != seen:
                    self.shell.say(f"{self.name}: {state or 'is not there'}")
                seen = state
                trouble = f"{self.name} is {state}" if state in ENDED else self.lost(nodes) if state == "ACTIVE" else ""
                if trouble:
                    patience.failed(trouble)
                    self.remove()
                    self.create()
                elif not state:
                    self.create()
                elif state == "ACTIVE":
                    code = self.attend(patience)
                    if code is not None:
                        if args.then_delete:
                            self.remove()
                        return code
            except CommandError as error:
                patience.failed(error)
            self.shell.sleep(args.poll)

    def attend(self, patience: Patience) -> int | None:
        """Looks after training on slices that are there; returns its exit code once it has ended for good."""
        answers = remote.read_answers(self.ssh(remote.state(self.name)))
        codes = [int(answer.split()[1]) for answer in answers if answer.startswith("exit ")]
        final = [code for code in codes if code in FINAL]
        if final:
            self.shell.say(f"{self.name}: ended with code {final[0]}, {FINAL[final[0]]}; see `logs`")
            return final[0]
        if DONE in codes and "running" not in answers:
            self.shell.say(f"{self.name}: training is done")
            return DONE
        try:
            if len(answers) < self.hosts:
                patience.failed(f"{len(answers)} of {self.hosts} hosts answered")
            elif "absent" in answers:
                self.launch()
            elif any(answer != "running" for answer in answers) and DONE not in codes:
                if codes:
                    patience.failed(f"training ended with code {codes[0]} on {len(codes)} of {self.hosts} hosts")
                self.start()
            else:
                patience.running()
        except LaunchError as error:
            if patience.failures >= patience.limit:
                raise
            patience.failed(error)
        return None

    def explain(self) -> int:
        """What `watch` would do, in the order of a job with one preemption."""
        say, every = self.shell.say, f"every {self.args.poll:g} s"
        say(f"{every}:")
        _, nodes = self.look()
        say("where there is none:")
        self.create()
        say(f"after {' or '.join(ENDED)}:")
        self.remove()
        self.create()
        say(f"{every} while it is ACTIVE (a slice that is {', '.join(LOST)}: as after SUSPENDED):")
        self.lost(nodes)
        self.ssh(remote.state(self.name))
        say("where the code is absent:")
        self.launch()
        say("where training has ended, but for the codes 0, 2, 3 and 4:")
        self.start()
        if self.args.then_delete:
            say("at the end:")
            self.remove()
        return DONE


def pack(code: Path, target: Path) -> None:
    """Packs the files that git lists, changed and new ones included, ignored ones not.

    Raises:
      LaunchError: not a git checkout of vmm.
    """
    listed = subprocess.run(
        ["git", "-C", str(code), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True,
    )  # fmt: skip
    names = [name for name in listed.stdout.split("\0") if name and (code / name).is_file()]
    if listed.returncode or "pyproject.toml" not in names:
        raise LaunchError(f"--code {code}: not a git checkout of vmm")
    with tarfile.open(target, "w:gz") as tar:
        for name in names:
            tar.add(code / name, arcname=name)


def parser() -> Parser:
    words = Parser(prog="queued_resources.py", description="Train on Cloud TPU slices (queued resources).")
    add_job_flags(words, ACTIONS)
    slices = words.add_argument_group("slices")
    slices.add_argument("--zone", default=os.environ.get("CLOUDSDK_COMPUTE_ZONE", ""), help="as us-west4-a")
    slices.add_argument("--project", default="", help="default: that of gcloud")
    slices.add_argument("--accelerator", default="", help="as v4-32, v5e-16, v5p-128, v6e-256")
    slices.add_argument("--slices", type=int, default=1, help="how many of them (1)")
    kind = slices.add_mutually_exclusive_group()
    kind.add_argument("--spot", action="store_true", help="cheaper, and taken away at any time")
    kind.add_argument("--reserved", action="store_true", help="from any reservation of the project")
    kind.add_argument("--reservation", default="", metavar="NAME", help="from this reservation (gcloud alpha)")
    slices.add_argument("--runtime", default="", help="software version (default: by accelerator)")
    slices.add_argument("--network", default="")
    slices.add_argument("--subnetwork", default="")
    slices.add_argument("--service-account", default="", help="that reads the data and writes the workdir")
    slices.add_argument("--valid-until-duration", default="", help="wait in the queue no longer, as 6h")
    access = slices.add_mutually_exclusive_group()
    access.add_argument("--iap", action="store_true", help="no outer addresses: connect through IAP")
    access.add_argument("--internal-ip", action="store_true", help="no outer addresses: connect within the network")
    code = words.add_argument_group("code and data")
    code.add_argument("--code", default=str(ROOT), help="checkout to install (default: this one)")
    code.add_argument("--python", default="3.12", help="that uv brings (3.12)")
    code.add_argument("--setup", default="", metavar="COMMAND", help="run on every host first, as a mount")
    code.add_argument("--shared", action="append", default=[], metavar="FOLDER", help="that all hosts share")
    add_watch_flags(words)
    words.add_argument("--then-delete", action="store_true", help="watch: give the slices back when training ends")
    words.add_argument("--now", action="store_true", help="delete: do not wait for a save")
    add_log_flags(words)
    return words


def run(args) -> int | None:
    slices = Slices(args, Shell(args.dry_run))
    return getattr(slices, args.action)()


if __name__ == "__main__":
    sys.exit(main(run, parser()))
