#!/usr/bin/env python3
"""Training on TPU slices of a GKE cluster, as a JobSet: create, launch, watch, resume, delete.

Page: tpu/gke.md. Flags checked against Google Cloud CLI 528 (`gcloud container node-pools create`) and the JobSet API.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from job import DONE, FINAL, add_job_flags, check_name, read_job
from jobset import CONTAINER, SLICES, build, yaml
from shell import CommandError, LaunchError, Parser, Patience, Shell, add_log_flags, add_watch_flags, main
from slices import find_slice

ACTIONS = {
    "create": "make a node pool for each slice (an xpk or autoprovisioning cluster has them)",
    "manifest": "write the JobSet and nothing else",
    "launch": "write the JobSet and start it",
    "watch": "start it where it is not there, and again after it failed, until training is done",
    "resume": "start it again, from its newest checkpoint",
    "status": "state of the JobSet and its pods",
    "logs": "the end of one host's log",
    "delete": "save, stop and remove the JobSet",
}


class Cluster:
    """The JobSet of one job, through kubectl; its node pools, through gcloud."""

    def __init__(self, args: argparse.Namespace, shell: Shell):
        check_name(args.name)
        self.args, self.shell, self.name = args, shell, args.name
        self.tpu = self.job = None
        if args.action in ("create", "manifest", "launch", "watch", "resume") or args.pools:
            if not args.accelerator:
                raise LaunchError(f"{args.action}: --accelerator is missing, as v5e-16")
            self.tpu = find_slice(args.accelerator, args.topology)
            if args.slices < 1:
                raise LaunchError(f"--slices {args.slices}: at least 1")
            if args.slices > 1 and self.tpu.hosts == 1:
                raise LaunchError(
                    f"accelerator {self.tpu.name}: GKE joins only slices of several hosts; take larger ones"
                )
        if args.action in ("manifest", "launch", "watch", "resume"):
            self.volumes = read_volumes(args.volume)
            self.job = read_job(
                args, self.tpu.hosts * args.slices, tuple(self.volumes.values()), "--volume CLAIM:FOLDER"
            )
            if not args.image:
                raise LaunchError("--image is missing: a container image with vmm in it, see tpu/gke.md")
            self.file = Path(args.manifest or f"{self.name}.jobset.yaml")

    def kubectl(self, *words: str, pretend: str = "", show: bool = False) -> str:
        args = self.args
        where = [f"--context={args.context}"] if args.context else []
        where += [f"--namespace={args.namespace}"] if args.namespace else []
        return self.shell.run("kubectl", *where, *words, pretend=pretend, show=show)

    # ---- actions --------------------------------------------------------------------------------
    def create(self) -> None:
        args, tpu = self.args, self.tpu
        if tpu.name.startswith("tpu7x"):
            raise LaunchError("create: tpu7x node pools need a placement policy: make them with xpk or gcloud")
        words = [f"--machine-type={tpu.machine}", f"--num-nodes={tpu.hosts}"]
        # GKE takes a shape for slices of several hosts only.
        words += [f"--tpu-topology={tpu.topology}", "--placement-type=COMPACT"] if tpu.hosts > 1 else []
        words += ["--scopes=https://www.googleapis.com/auth/cloud-platform"]  # the default cannot write to gs://
        words += ["--spot"] if args.spot else []
        words += ["--reservation-affinity=specific", f"--reservation={args.reservation}"] if args.reservation else []
        for pool in self.pools():
            self.shell.run("gcloud", "container", "node-pools", "create", pool, *self.place(), *words, show=True)

    def pools(self) -> list[str]:
        return [f"{self.name}-{i}" for i in range(self.args.slices)]

    def place(self, zone: bool = True) -> list[str]:
        args = self.args
        if not args.cluster or not args.location:
            raise LaunchError(f"{args.action}: --cluster and --location are missing: the GKE cluster and where it is")
        nodes = [f"--node-locations={args.zone}"] if zone and args.zone else []
        project = [f"--project={args.project}"] if args.project else []
        return [f"--cluster={args.cluster}", f"--location={args.location}", *nodes, *project, "--quiet"]

    def manifest(self) -> None:
        args = self.args
        self.shell.write(self.file, yaml(build(self.job, self.tpu, args.slices, args.image, self.volumes, args)))

    def launch(self) -> None:
        self.manifest()
        self.kubectl("create", f"--filename={self.file}", show=True)

    def resume(self) -> None:
        self.remove()
        self.launch()

    def remove(self) -> None:
        self.kubectl("delete", "jobset", self.name, "--ignore-not-found", "--cascade=foreground", show=True)

    def status(self) -> None:
        self.kubectl("get", "jobset", self.name, show=True)
        self.kubectl("get", "pods", f"--selector={self.pods()}", "--output=wide", show=True)

    def logs(self) -> None:
        args = self.args
        one = f"jobset.sigs.k8s.io/job-index={args.slice},batch.kubernetes.io/job-completion-index={args.host}"
        words = (f"--selector={self.pods()},{one}", f"--container={CONTAINER}", f"--tail={args.lines}")
        self.kubectl("logs", *words, *(["--follow"] if args.follow else []), show=True)

    def pods(self) -> str:
        return f"jobset.sigs.k8s.io/jobset-name={self.name}"

    def delete(self) -> None:
        self.remove()
        if self.args.pools:
            for pool in self.pools():
                self.shell.run("gcloud", "container", "node-pools", "delete", pool, *self.place(False), show=True)

    # ---- watching -------------------------------------------------------------------------------
    def watch(self) -> int:
        args, seen = self.args, None
        if self.shell.dry:
            return self.explain()
        patience = Patience(self.shell, args.attempts, args.backoff, args.steady)
        while True:
            try:
                found = self.look()
                state, text = read_state(found)
                if text != seen:
                    self.shell.say(f"{self.name}: {text}")
                seen = text
                if state == "Completed":
                    return DONE
                if state == "absent":
                    self.launch()
                elif state == "Failed":
                    code = self.exit_code()
                    if code in FINAL or "FailJobSet" in text:
                        why = FINAL.get(code, "a code that comes again")
                        self.shell.say(f"{self.name}: ended with code {code or 'unknown'}, {why}; see `logs`")
                        return code or 1
                    patience.failed(f"{self.name} failed")
                    self.resume()
                elif state == "Running":
                    patience.running()
            except CommandError as error:
                patience.failed(error)
            self.shell.sleep(args.poll)

    def look(self) -> dict | None:
        try:
            return json.loads(self.kubectl("get", "jobset", self.name, "--output=json", pretend="{}"))
        except CommandError as error:
            if "NotFound" in error.said:
                return None
            raise

    def exit_code(self) -> int:
        """Exit code of the pods: one that comes again where there is one, else any that is not 0, else 0."""
        listed = json.loads(self.kubectl("get", "pods", f"--selector={self.pods()}", "--output=json", pretend="{}"))
        states = [
            status.get("state", {}).get("terminated", {})
            for pod in listed.get("items", [])
            for status in pod.get("status", {}).get("containerStatuses", [])
        ]
        codes = [state["exitCode"] for state in states if state.get("exitCode")]
        return next((code for code in codes if code in FINAL), codes[0] if codes else 0)

    def explain(self) -> int:
        """What `watch` would do, in the order of a job with one failure."""
        self.shell.say(f"every {self.args.poll:g} s:")
        self.look()
        self.shell.say("where there is none:")
        self.launch()
        self.shell.say("where it failed for good (the cluster itself restarts it --max-restarts times):")
        self.exit_code()
        self.shell.say(f"and, but for the codes {', '.join(map(str, FINAL))}:")
        self.resume()
        return DONE


def read_state(found: dict | None) -> tuple[str, str]:
    """Returns absent, Waiting, Running, Completed or Failed, and a line about it, of a JobSet's JSON."""
    if found is None:
        return "absent", "is not there"
    status = found.get("status", {})
    for condition in status.get("conditions", []):
        if condition.get("type") in ("Completed", "Failed") and condition.get("status") == "True":
            return condition["type"], f"{condition['type']} ({condition.get('reason', '')})"
    ready = sum(job.get("ready", 0) for job in status.get("replicatedJobsStatus", []) if job.get("name") == SLICES)
    wanted = sum(job.get("replicas", 1) for job in found.get("spec", {}).get("replicatedJobs", []))
    state = "Running" if ready and ready >= wanted else "Waiting"
    return state, f"{ready} of {wanted} slices run, restarted {status.get('restarts', 0)} times"


def read_volumes(words: list[str]) -> dict[str, str]:
    volumes = {}
    for word in words:
        claim, _, folder = word.partition(":")
        if not claim or not folder.startswith("/"):
            raise LaunchError(f"--volume {word!r}: write it as CLAIM:/FOLDER")
        volumes[claim] = folder
    return volumes


def parser() -> Parser:
    words = Parser(prog="gke.py", description="Train on TPU slices of a GKE cluster (JobSet).")
    add_job_flags(words, ACTIONS)
    slices = words.add_argument_group("slices")
    slices.add_argument("--accelerator", default="", help="as v4-32, v5e-16, v5p-128, v6e-256, tpu7x-32")
    slices.add_argument("--topology", default="", help="another shape of as many chips, as 4x4x20")
    slices.add_argument("--slices", type=int, default=1, help="how many of them (1)")
    kind = slices.add_mutually_exclusive_group()
    kind.add_argument("--spot", action="store_true", help="cheaper, and taken away at any time")
    kind.add_argument("--reservation", default="", metavar="NAME", help="from this reservation")
    pod = words.add_argument_group("JobSet")
    pod.add_argument("--image", default="", help="container image with vmm in it")
    pod.add_argument("--volume", action="append", default=[], metavar="CLAIM:FOLDER", help="that all hosts share")
    pod.add_argument("--service-account", default="", help="Kubernetes one, that may read and write the buckets")
    pod.add_argument("--queue", default="", help="Kueue's local queue: multislice-queue on a cluster of xpk")
    pod.add_argument("--priority", default="", help="priority class: very-low to very-high on a cluster of xpk")
    pod.add_argument("--max-restarts", type=int, default=100, help="by the cluster itself, preemptions too (100)")
    pod.add_argument("--grace", type=int, default=120, metavar="SECONDS", help="to save after SIGTERM (120)")
    pod.add_argument("--privileged", action="store_true", help="needed before GKE 1.28")
    pod.add_argument("--manifest", default="", metavar="FILE", help="written (NAME.jobset.yaml)")
    cluster = words.add_argument_group("cluster")
    cluster.add_argument("--context", default="", help="of kubectl (default: the current one)")
    cluster.add_argument("--namespace", default="", help="of Kubernetes (default: that of the context)")
    cluster.add_argument("--cluster", default="", help="create, delete --pools: the GKE cluster")
    cluster.add_argument("--location", default="", help="create, delete --pools: its region or zone")
    cluster.add_argument("--zone", default="", help="create: of the TPUs")
    cluster.add_argument("--project", default="", help="create, delete --pools: default: that of gcloud")
    add_watch_flags(words)
    words.add_argument("--pools", action="store_true", help="delete: the node pools of `create` too")
    add_log_flags(words)
    return words


def run(args) -> int | None:
    return getattr(Cluster(args, Shell(args.dry_run)), args.action)()


if __name__ == "__main__":
    sys.exit(main(run, parser()))
