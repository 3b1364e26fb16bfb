"""What the environment says of a job of several processes: how many, which one this is, where process 0 listens.

Told by hand (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), by SLURM's srun, by GKE or by the metadata of a
Cloud TPU VM. JAX itself reads only the first of the three by hand, and gives a SLURM task the GPU of its number alone.
"""

import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from vmm.errors import UserError

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_PORT = 8482  # the one that JAX uses on TPU


class Place(NamedTuple):
    """A process of a job. coordinator: host:port of process 0. devices: numbers of this process's GPUs, None: all."""

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Returns this process's place in its job; None: it is alone.

    Raises:
      UserError: what is told by hand is not whole or contradicts itself.
    """
    told = {name: environment[name] for name in _BY_HAND if environment.get(name)}
    place = _slurm(environment) or _tpu(environment, _metadata(environment))
    if place is not None:
        place = place._replace(coordinator=told.get(_BY_HAND[0], place.coordinator))
    elif not told:
        return None
    if "JAX_NUM_PROCESSES" in told or "JAX_PROCESS_ID" in told or place is None:
        missing = [name for name in _BY_HAND if name not in told]
        if missing:
            raise UserError(f"{', '.join(told)}: given without {', '.join(missing)}; give all three, or none of them")
        numbers = [told[name] for name in _BY_HAND[1:]]
        if not all(number.isdigit() for number in numbers):
            raise UserError(f"JAX_NUM_PROCESSES, JAX_PROCESS_ID: expected two whole numbers, got {', '.join(numbers)}")
        place = Place(told[_BY_HAND[0]], int(numbers[0]), int(numbers[1]), place.devices if place else None)
    if place.processes == 1:
        return None
    if not 0 <= place.process < place.processes:
        raise UserError(f"JAX_PROCESS_ID: {place.process} is not one of 0 … {place.processes - 1} (JAX_NUM_PROCESSES)")
    if not re.fullmatch(r".+:\d+", place.coordinator):
        raise UserError(f"JAX_COORDINATOR_ADDRESS: expected host:port, got {place.coordinator}")
    return place


def _slurm(environment: Mapping) -> Place | None:
    """A task that srun started; a batch script before its srun is alone."""
    wanted = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(environment.get(name) for name in wanted):
        return None
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)
    # A port of the job, so that two jobs on a node do not meet: above those that Linux gives to clients.
    port = environment.get("JAX_COORDINATOR_PORT") or 61440 + int(environment["SLURM_JOB_ID"]) % 4096
    here = _tasks_here(environment, tasks)
    devices = _gpus(int(environment["SLURM_LOCALID"]), here, environment.get("CUDA_VISIBLE_DEVICES"))
    host = first_host(environment["SLURM_STEP_NODELIST"])
    return Place(f"{host}:{port}", tasks, int(environment["SLURM_PROCID"]), devices)


def first_host(nodes: str) -> str:
    """Returns the first host of SLURM's list, as a07 of "a[07-09,12],b3"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\](\S*?)(?:,|$))?", nodes)
    return match[1] + (match[2] or "") + (match[3] or "")


def _tasks_here(environment: Mapping, tasks: int) -> int:
    """Tasks on this node, from "4(x2),1"."""
    counts = []
    for part in (environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or "").split(
        ","
    ):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        counts += [int(match[1])] * int(match[2] or 1) if match else []
    node = int(environment.get("SLURM_NODEID") or 0)
    return counts[node] if node < len(counts) else tasks


def _gpus(task: int, tasks: int, visible: str | None) -> tuple[int, ...] | None:
    """This task's share of the GPUs that its node's tasks see; None: all that it sees."""
    count = len([number for number in visible.split(",") if number.strip()]) if visible else None
    if tasks == 1 or (count is not None and count < tasks):  # alone, or SLURM has shared them out already
        return None
    each = 1 if count is None else count // tasks
    return tuple(range(task * each, (task + 1) * each))


def _tpu(environment: Mapping, metadata: Callable[[str], str | None] | None) -> Place | None:
    """A worker of one or several TPU slices: GKE says it in variables, a Cloud TPU VM in its metadata."""
    platforms = environment.get("JAX_PLATFORMS")
    if platforms and "tpu" not in platforms:
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    worker = environment.get("TPU_WORKER_ID")
    more = {}
    if not (hosts and worker):
        if metadata is None or not (worker := metadata("agent-worker-number")):
            return None
        # Entries are hosts, or name:id:address.
        hosts = ",".join(entry.split(":")[-1] for entry in (metadata("worker-network-endpoints") or "").split(","))
        lines = (metadata("tpu-env") or "").splitlines()
        more = {key.strip(): value.strip().strip("'") for key, _, value in (line.partition(":") for line in lines)}
    names = [name.strip().split(":")[0] for name in hosts.split(",")]

    def slices(name: str) -> str | None:
        return environment.get(name) or more.get(name)

    count, mine = int(slices("MEGASCALE_NUM_SLICES") or 1), int(slices("MEGASCALE_SLICE_ID") or 0)
    host = (slices("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).split(":")[0]
    port = environment.get("JAX_COORDINATOR_PORT") or _PORT
    return Place(f"{host}:{port}", len(names) * count, mine * len(names) + int(worker))


def _metadata(environment: Mapping) -> Callable[[str], str | None] | None:
    """How to ask the machine's metadata; None where there is no TPU."""
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if "GCE_METADATA_IP" not in environment and not (chips and find_spec("libtpu")):
        return None
    host = environment.get("GCE_METADATA_IP", "metadata.google.internal")

    def ask(key: str) -> str | None:
        address = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
        request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, OSError):
            return None

    return ask


def listening_host(host: str) -> str:
    """Returns the address of this machine at which others reach it as `host`: not every interface.

    "::" (every interface) only where `host` is no address of this machine, as behind a service's address.
    """
    try:
        found = [info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        found = []
    loopback = host == "localhost" or host == "::1" or host.startswith("127.")
    for address in found:
        # Many hosts' files give the machine's own name as 127.0.1.1, where nobody else could reach it.
        if _mine(address) and (loopback or not (address.startswith("127.") or address == "::1")):
            return address
    return _outward() if found and all(address.startswith("127.") for address in found) else "::"


def _mine(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
        return True
    except OSError:
        return False


def _outward() -> str:
    """This machine's address towards its private network; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 9))
            return probe.getsockname()[0]
        except OSError:
            return "::"
