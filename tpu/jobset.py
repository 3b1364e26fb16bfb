"""A JobSet of TPU slices on GKE, as `kubectl create -f` reads it and xpk lists it.

API: jobset.x-k8s.io/v1alpha2 (kubernetes-sigs/jobset) and batch/v1. One Job a slice, one pod a host. A pod that fails
fails its Job, a failed Job restarts the JobSet: all hosts together, as training needs it. The labels and the name of
the Jobs are xpk's, so that `xpk workload list` finds the job and Kueue, where the cluster has it, queues it.
"""

from __future__ import annotations

import json

from job import FINAL, Job
from slices import Slice

CONTAINER = "jax-tpu"
SLICES = "slice-job"


def build(job: Job, tpu: Slice, slices: int, image: str, volumes: dict[str, str], args) -> dict:
    """Returns the JobSet.

    volumes: persistent volume claim → folder where every host sees it. args: namespace, spot, reservation, queue,
    priority, service_account, max_restarts, grace (seconds between SIGTERM and the end) and privileged.
    """
    labels = {"xpk.google.com/workload": job.name}
    queue = {"kueue.x-k8s.io/queue-name": args.queue} if args.queue else {}
    pod = {
        "restartPolicy": "Never",  # podFailurePolicy needs it; the JobSet restarts
        "nodeSelector": _nodes(tpu, args),
        "hostNetwork": True,  # full bandwidth between slices
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": args.grace,
        "containers": [_container(job, tpu, image, volumes, args)],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # the loader's workers pass clips through it
            *({"name": f"v{i}", "persistentVolumeClaim": {"claimName": claim}} for i, claim in enumerate(volumes)),
        ],
    }
    if args.spot:
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    if args.service_account:
        pod["serviceAccountName"] = args.service_account
    if args.priority:
        pod["priorityClassName"] = args.priority
    slice_job = {
        "parallelism": tpu.hosts,
        "completions": tpu.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": sorted(FINAL)},
                }
            ]
        },
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            **({"namespace": args.namespace} if args.namespace else {}),
            "labels": {**queue, **labels},
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": args.max_restarts,
                # A podFailurePolicy that matched: an exit code that comes again; anything else restarts.
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": SLICES, "replicas": slices, "template": {"spec": slice_job}}],
        },
    }


def _nodes(tpu: Slice, args) -> dict:
    nodes = {"cloud.google.com/gke-tpu-accelerator": tpu.node, "cloud.google.com/gke-tpu-topology": tpu.topology}
    if args.spot:
        nodes["cloud.google.com/gke-spot"] = "true"
    if args.reservation:
        nodes["cloud.google.com/reservation-name"] = args.reservation
    return nodes


def _container(job: Job, tpu: Slice, image: str, volumes: dict[str, str], args) -> dict:
    def plain(text: str) -> str:
        return text.replace("$(", "$$(")  # Kubernetes would read $(NAME) as a variable

    container = {
        "name": CONTAINER,
        "image": image,
        # No shell: the words reach vmm as they are, and SIGTERM reaches the supervisor.
        "command": [plain(word) for word in job.words()],
        "env": [{"name": key, "value": plain(value)} for key, value in job.env.items()],
        # 8471: between the hosts of a slice; 8080: between slices; 8482: JAX's coordinator.
        "ports": [{"containerPort": port} for port in (8471, 8080, 8482)],
        "resources": {"limits": {"google.com/tpu": tpu.chips_per_host}},
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": f"v{i}", "mountPath": folder} for i, folder in enumerate(volumes.values())),
        ],
    }
    if args.privileged:
        container["securityContext"] = {"privileged": True}
    return container


def yaml(value, indent: str = "") -> str:
    """Returns YAML of dicts, lists, strings, numbers and booleans; texts are in JSON's quotes where they need any."""
    if isinstance(value, dict) and value:
        return "".join(f"{indent}{_scalar(key)}:{_under(item, indent)}" for key, item in value.items())
    if isinstance(value, list) and value:
        return "".join(f"{indent}- {yaml(item, indent + '  ').lstrip(' ')}" for item in value)
    return f"{indent}{_scalar(value)}\n"


def _under(value, indent: str) -> str:
    nested = isinstance(value, (dict, list)) and value
    return f"\n{yaml(value, indent + '  ')}" if nested else f" {_scalar(value)}\n"


def _scalar(value) -> str:
    bare = (
        isinstance(value, str)
        and value[:1].isalpha()
        and value.replace("-", "").replace("/", "").replace(".", "").isalnum()
    )
    return value if bare and value.lower() not in _WORDS else json.dumps(value, ensure_ascii=False)


_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
