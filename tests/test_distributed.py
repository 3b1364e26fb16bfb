"""Two real processes over loopback: the numbers of one, checkpoints for any mesh, and an end for all of them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config
from two import Job, free_port

from vmm.build import save_config
from vmm.errors import PeerError, UserError
from vmm.run import open_run
from vmm.train import train
from vmm.training import distributed
from vmm.training.cluster import Place, find_place, first_host, listening_host
from vmm.training.link import Link
from vmm.training.metrics import read_rows
from vmm.training.runtime import RunLock
from vmm.training.watchdog import Watchdog

STEPS, BATCH = 10, 16
WORKER = ROOT / "tests" / "worker.py"


def contrast_config(world: Path, **changes) -> dict:
    """One objective, whose negatives are those of all processes."""
    config = tiny_config(world, steps=STEPS, batch=BATCH, save_every=5, log_every=1, eval_every=4, views={"clean": {}})
    del config["objectives"]["masked"]
    config["optim"] = dict(learning_rate=1e-3, warmup=5)
    return config | changes


def saved_config(config: dict, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_config(config, path)
    return path


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(workdir / "metrics.jsonl") if "loss" in row}


def evaluations(workdir: Path) -> dict[int, dict]:
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "loss" not in row]
    return {row["step"]: {key: value for key, value in row.items() if key.startswith("eval/")} for row in rows}


def ids(folder: Path, process: int) -> list[list[int]]:
    return [json.loads(line) for line in (folder / f"{process}.jsonl").read_text().splitlines()]


# ---- numbers: two processes and one ------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(world_folder, tmp_path_factory) -> Path:
    """One process, eight devices, never interrupted."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train(contrast_config(world_folder, mesh=dict(data=1, fsdp=8), save_every=1, keep=20), workdir)
    return workdir


@pytest.fixture(scope="module")
def two(world_folder, tmp_path_factory):
    """Two processes of two devices, mesh 2 × 2, process 1 asked to stop before step 7. → (folder, how they ended)."""
    folder = tmp_path_factory.mktemp("two")
    config = saved_config(contrast_config(world_folder, mesh=dict(data=2, fsdp=2)), folder / "config.json")
    job = Job(
        [WORKER, config, folder / "run", folder / "ids" / "PROCESS.jsonl"], folder, devices=2, VMM_FAULT="term:1@7"
    )
    return folder, job.wait()


def test_signal_to_one_stops_all_after_the_same_step(two):
    folder, ended = two
    assert [end.code for end in ended] == [42, 42], [end.log[-2000:] for end in ended]
    stopped = {re.search(r"SIGTERM on process 1 .*saved step (\d+) of", end.log)[1] for end in ended}
    assert len(stopped) == 1
    assert max(int(path.name) for path in (folder / "run" / "checkpoints").iterdir()) == int(stopped.pop())


def test_two_processes_give_the_numbers_of_one(two, straight):
    folder, _ = two
    mine, theirs = losses(folder / "run"), losses(straight)
    assert 7 <= len(mine) <= STEPS
    np.testing.assert_allclose(list(mine.values()), [theirs[step] for step in mine], rtol=1e-5)
    rows = [{row["step"]: row["gradient_norm"] for row in read_rows(path / "metrics.jsonl") if "loss" in row} for path in (folder / "run", straight)]  # fmt: skip
    np.testing.assert_allclose(list(rows[0].values()), [rows[1][step] for step in mine], rtol=1e-4)
    steps = [row["step"] for row in read_rows(folder / "run" / "metrics.jsonl") if "loss" in row]
    assert steps == sorted(set(steps)), "logged once"
    for step, values in evaluations(folder / "run").items():
        assert values == evaluations(straight)[step], "every clip once, in one order"


def test_gradients_and_parameters_of_two_processes_are_those_of_one(two, straight, tmp_path):
    folder, _ = two
    shutil.copytree(folder / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    save_config(config | {"mesh": {}}, tmp_path / "run" / "config.json")
    mine = open_run(tmp_path / "run")
    shutil.copytree(straight, tmp_path / "straight")
    for path in (tmp_path / "straight" / "checkpoints").iterdir():
        if int(path.name) > mine.step:
            shutil.rmtree(path)
    theirs = open_run(tmp_path / "straight")
    assert theirs.step == mine.step
    # Adam's moments are averages of the gradient and of its square.
    moments, others = ([leaf for leaf in jax.tree.leaves(run.state.optimizer) if leaf.ndim] for run in (mine, theirs))
    for one, other in zip(moments, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    # Where a gradient is but rounding (keys' biases), Adam makes steps of it.
    for one, other in zip(jax.tree.leaves(mine.state.params), jax.tree.leaves(theirs.state.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 if np.abs(one).max() > 0.02 else 1e-3)


def test_samples_are_shared_out_and_go_on_where_they_stopped(two, world_folder, straight, tmp_path):
    """Saved on 2 × 2 by two processes, resumed on 4 × 1 and on 1 × 8 by one: the same samples and losses."""
    folder, _ = two
    first, second = ids(folder / "ids", 0), ids(folder / "ids", 1)
    stopped = len(losses(folder / "run"))
    saved = open_step(folder / "run")
    assert saved == stopped
    whole = [one + other for one, other in zip(first[:saved], second[:saved], strict=True)]
    assert all(len(batch) == len(set(batch)) == BATCH for batch in whole), "disjoint"

    config = saved_config(contrast_config(world_folder, mesh=dict(data=4, fsdp=1)), tmp_path / "4x1.json")
    shutil.copytree(folder / "run", tmp_path / "4x1")
    job = Job([WORKER, config, tmp_path / "4x1", tmp_path / "ids" / "PROCESS.jsonl"], tmp_path, processes=1, devices=4)
    assert job.wait()[0].code == 0, job.logs[0].read_text()[-2000:]
    whole += ids(tmp_path / "ids", 0)
    assert len(whole) == STEPS
    seen = sorted(sum(whole[:3], []))
    assert seen == list(range(48)), "three batches of 16 are the 48 clips"

    shutil.copytree(folder / "run", tmp_path / "1x8")
    train(contrast_config(world_folder, mesh=dict(data=1, fsdp=8)), tmp_path / "1x8")
    for name in ("4x1", "1x8"):
        resumed = losses(tmp_path / name)
        assert list(resumed) == list(range(1, STEPS + 1))
        np.testing.assert_allclose(list(resumed.values()), list(losses(straight).values()), rtol=1e-5, err_msg=name)


def open_step(workdir: Path) -> int:
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_warm_start_teacher_and_bad_files_with_two_processes(world_folder, straight, tmp_path):
    """Parameters of other models go onto arrays that no process holds whole; hosts meet different numbers of bad files."""
    lines = [json.loads(line) for line in (world_folder / "train.jsonl").read_text().splitlines()]
    for line in lines:
        line["path"] = str(world_folder / line["path"])
    for number in (3, 11, 12):
        lines[number]["path"] = "not-there.mp4"
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = contrast_config(world_folder, steps=3, eval_every=0, evals={}, init_from=str(straight))
    config["optim"] = dict(learning_rate=1e-3, warmup=1)
    config["data"] |= {"train": str(tmp_path / "train.jsonl"), "budget": 0.5}
    config["views"]["target"] = dict(teacher=str(straight))
    config["objectives"]["distill"] = dict(kind="distill", view="clean", target="target", width=16)
    path = saved_config(config | {"mesh": dict(data=1, fsdp=2)}, tmp_path / "config.json")
    ended = Job([WORKER, path, tmp_path / "two", tmp_path / "ids" / "PROCESS.jsonl"], tmp_path, devices=1).wait()
    assert [end.code for end in ended] == [0, 0], [end.log[-3000:] for end in ended]
    train(config | {"mesh": dict(data=4, fsdp=2)}, tmp_path / "one")
    assert list(losses(tmp_path / "two")) == [1, 2, 3]
    np.testing.assert_allclose(*(list(losses(tmp_path / name).values()) for name in ("two", "one")), rtol=1e-5)


# ---- the end ------------------------------------------------------------------------------------------


def since_fault(world, folder, fault, **changes):
    config = saved_config(contrast_config(world, eval_every=0, save_every=100) | changes, folder / "config.json")
    job = Job(["-m", "vmm", "train", config, "--workdir", folder / "run"], folder, devices=1, VMM_FAULT=fault)
    deadline = time.monotonic() + 200
    log = job.logs[int(fault.partition(":")[2][0])]
    while "VMM_FAULT" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.02)
    began = time.monotonic()
    ended = job.wait(60)
    return ended, max(end.at for end in ended) - began


def test_exception_in_one_process_ends_all_with_it_last(world_folder, tmp_path):
    ended, seconds = since_fault(world_folder, tmp_path, "raise:1@4")
    assert [end.code for end in ended] == [1, 1], [end.log[-2000:] for end in ended]
    assert seconds < 15
    assert re.fullmatch(r"vmm: process 1 \(.*\) failed first: InjectedFault: .*raise:1@4.*", ended[0].last)
    assert ended[1].last.startswith("vmm.training.faults.InjectedFault: ")


@pytest.mark.parametrize(
    "killed", [1, pytest.param(0, marks=pytest.mark.exhaustive("the abort of JAX's client is tried by itself"))]
)
def test_killed_process_ends_the_other(world_folder, tmp_path, killed):
    """Nothing is logged at the step: it is the comparison of copies that meets the broken connection."""
    ended, seconds = since_fault(world_folder, tmp_path, f"kill:{killed}@4", check_replicas=1, log_every=10)
    other = ended[1 - killed]
    assert (other.code, ended[killed].code) == (1, -9), [end.log[-2000:] for end in ended]
    assert seconds < 15
    assert re.fullmatch(
        rf"vmm: process {killed} \(.*\) is gone without a word: killed, or its machine is.*", other.last
    )
    assert "Traceback" not in other.log


@pytest.mark.parametrize(("said", "code"), [("the line", 1), ("", -signal.SIGABRT)])
def test_an_abort_waits_for_what_the_link_has_to_say(said, code):
    """JAX's client aborts where process 0 is gone. Without a word to come, an abort is one, 6 s later."""
    program = (
        "import ctypes, os, threading\nfrom vmm.training.link import abort_late\nabort_late()\n"
        f"if {said!r}: threading.Timer(0.2, lambda: (print({said!r}, flush=True), os._exit(1))).start()\n"
        "ctypes.CDLL(None).abort()\n"  # as native code does, without Python's lock
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (code, said)


def test_stuck_process_ends_all_within_the_time_of_a_step(world_folder, tmp_path):
    ended, seconds = since_fault(world_folder, tmp_path, "stuck:1@4", step_timeout=6.0)
    assert [end.code for end in ended] == [6, 6], [end.log[-2000:] for end in ended]
    assert seconds < 6 + 5
    for end in ended:
        assert re.search(
            r"step 4 did not end within 6 s; it is stuck at vmm/training/faults.py:\d+ \(.*sleep", end.last
        )
    assert "most recent call first" in ended[1].log and "faults.py" in ended[1].log


@pytest.mark.exhaustive("waits for half a minute")
@pytest.mark.parametrize(("timeout", "codes"), [(60.0, [0, 0]), (6.0, [6, None])])
def test_a_process_that_is_stopped_is_slow_until_the_time_of_a_step(world_folder, tmp_path, timeout, codes):
    """18 s without a heartbeat: JAX's own service would abort the healthy process after 15."""
    config = contrast_config(world_folder, steps=30, eval_every=0, save_every=100, step_timeout=timeout)
    config = saved_config(config, tmp_path / "config.json")
    job = Job(["-m", "vmm", "train", config, "--workdir", tmp_path / "run"], tmp_path, devices=1)
    rows = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not rows.is_file() or rows.read_text().count("\n") < 2:
        assert time.monotonic() < deadline, job.logs[0].read_text()[-2000:]
        time.sleep(0.02)
    os.kill(job.processes[1].pid, signal.SIGSTOP)
    time.sleep(18)
    os.kill(job.processes[1].pid, signal.SIGCONT)
    ended = job.wait(100)
    assert ended[0].code == codes[0], ended[0].log[-2000:]
    assert codes[1] in (None, ended[1].code), ended[1].log[-2000:]
    if codes[0]:
        assert re.fullmatch(
            r"vmm: error: step \d+ did not end within 6 s; no sign of life from process 1 \(.*\): .*", ended[0].last
        )
        assert "most recent call first" not in ended[0].log


# ---- finding each other -------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "gpu[007-009,12],big1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
HAND = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
TPU = {"TPU_WORKER_HOSTNAMES": "a-0.svc,a-1.svc", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "s-0:8080"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (HAND, Place("10.0.0.1:99", 4, 3)),
        (HAND | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, Place(f"gpu007:{61440 + 5000 % 4096}", 8, 5, (1,))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, Place("gpu007:62344", 8, 5, (2, 3))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "6"}, Place("gpu007:62344", 8, 5)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, Place("gpu007:62344", 8, 5)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "gpu007:7"}, Place("gpu007:7", 8, 5, (1,))),
        ({key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"}, None),  # a batch script
        (TPU, Place("a-0.svc:8482", 2, 1)),
        (TPU | SLICES, Place("s-0:8482", 6, 5)),
        (TPU | {"JAX_PLATFORMS": "cpu"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
)
def test_the_environment_says_who_is_where(environment, place):
    assert find_place(environment) == place


def test_first_host_of_slurms_lists():
    lists = ["n1", "n1,n2", "n[3-5]", "n[03,07-9],m1", "rack2-n[11]-ib,x"]
    assert [first_host(nodes) for nodes in lists] == ["n1", "n1", "n3", "n03", "rack2-n11-ib"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "given without JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "4"}, "4 is not one of 0 … 3"),
        ({"JAX_NUM_PROCESSES": "four"}, "expected two whole numbers"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "expected host:port"),
    ],
)
def test_what_is_told_by_hand_must_be_whole(change, message):
    with pytest.raises(UserError, match=message):
        find_place(HAND | change)


def test_metadata_of_a_tpu_machine(monkeypatch):
    """As a Cloud TPU VM tells it: who is here, who else, and of which slice."""
    import http.server

    answers = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "w:8470:10.1.0.2,w:8470:10.1.0.3",
        "tpu-env": "ACCELERATOR_TYPE: 'v5e-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.2'",
    }

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = answers.get(self.path.rsplit("/", 1)[1])
            self.send_response(200 if text and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    assert find_place(told) == Place("10.0.0.2:8482", 4, 3)
    answers["tpu-env"] = ""
    assert find_place(told) == Place("10.1.0.2:8482", 2, 1)
    del answers["agent-worker-number"]
    assert find_place(told) is None
    server.shutdown()
    server.server_close()


def test_listens_at_one_interface(monkeypatch):
    assert listening_host("127.0.0.1") == listening_host("localhost") == "127.0.0.1"
    info = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: info)
    assert not listening_host("this-machine").startswith("127."), "a name that the hosts file gives as loopback"
    info[0] = (*info[0][:4], ("203.0.113.7", 0))
    assert listening_host("a-service") == "::"


# ---- the line between processes -------------------------------------------------------------------------


def linked(count: int, timeout: float = 20.0, come: tuple | None = None) -> list:
    """Links of all processes of a job (or those that come), made at once; errors in their places."""
    port, links = free_port(), [None] * count

    def make(process):
        try:
            links[process] = Link(Place(f"127.0.0.1:{port}", count, process), "127.0.0.1", timeout)
        except PeerError as error:
            links[process] = error

    threads = [threading.Thread(target=make, args=(process,)) for process in come or range(count)]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join()
    return links


def test_who_is_missing_is_said():
    zero, one, _, _ = linked(4, 1.5, come=(0, 1))
    assert str(zero).startswith("process 2, 3 of 4 did not come to 127.0.0.1:") and str(one) == str(zero)
    _, alone = linked(2, 1.5, come=(1,))
    assert re.match(r"process 1 of 2: process 0 is not at 127.0.0.1:\d+ after 2 s \(Connection refused\)", str(alone))


def test_messages_reach_all_and_a_death_is_noticed():
    links = linked(3)
    heard, gone = [[] for _ in links], [[] for _ in links]
    for number, link in enumerate(links):
        link.start(lambda *what, number=number: heard[number].append(what), gone[number].append)
    links[0].send({"go": 1})
    links[2].send({"here": 2})
    links[2].send({"here": 3})
    wait_until(lambda: len(heard[0]) == 2 and heard[1] and heard[2])
    assert heard == [[(2, {"here": 2}), (2, {"here": 3})], [(0, {"go": 1})], [(0, {"go": 1})]]
    links[1].lines[0].shutdown(socket.SHUT_RDWR)
    wait_until(lambda: gone[0] == [1])
    for link in links:
        for line in list(link.lines.values()):
            line.close()


@pytest.mark.parametrize(("stopped", "told"), [(2, {0: [2], 1: [2]}), (0, {1: [0], 2: [0]}), (None, {0: [], 1: []})])
def test_who_gives_no_sign_of_life_is_known_to_all(stopped, told):
    """Process 1 hears of process 2 through process 0. A process that is stopped reads nothing, and its line stays open."""
    links = linked(3)
    jobs = {number: distributed._Job(link) for number, link in enumerate(links) if number != stopped}
    assert {number: jobs[number].silent(0.3) for number in told} == told
    for job in jobs.values():
        job.leaving |= {0, 1, 2}  # or a closed line would end this very process
    for link in links:
        for line in list(link.lines.values()):
            line.close()


@pytest.mark.parametrize("silent", [{}, {1: "process 1 (a-host)"}])
def test_a_step_that_waits_for_a_silent_process_names_it(monkeypatch, capfd, silent):
    said, ended = [], threading.Event()

    def hang(line, processes):
        said.append((line, list(processes)))
        ended.set()
        watchdog.deadline = float("inf")

    monkeypatch.setattr(distributed, "silent", lambda seconds: silent)
    monkeypatch.setattr(distributed, "hang", hang)
    monkeypatch.setattr(Watchdog, "_place", lambda self: ("vmm/train.py:1 (step)", True))
    with Watchdog(0.2) as watchdog:
        watchdog.beat("step 4")
        assert ended.wait(5)
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == f"vmm: error: {said[0][0]}" and said[0][1] == list(silent)
    if silent:
        assert said[0][0].startswith("step 4 did not end within 0.2 s; no sign of life from process 1 (a-host): ")
        assert len(lines) == 1
    else:
        assert said[0][0] == "step 4 did not end within 0.2 s; it waits at vmm/train.py:1 (step)"
        assert any("most recent call first" in line for line in lines)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- one job in a workdir -------------------------------------------------------------------------------


def test_lock_names_its_holder(tmp_path):
    with (
        RunLock(tmp_path),
        pytest.raises(UserError, match=rf"another job is running in it \(process \d+ on {socket.gethostname()}"),
    ):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_lock_by_beats_where_the_file_system_has_none(tmp_path, monkeypatch):
    """A bucket: a holder that beats keeps it, one that stopped loses it, and it is given back at the end."""
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first = RunLock(tmp_path, beat=0.2)
    first.me["pid"] = 1  # not this process, and alive
    with first:
        with pytest.raises(UserError, match="another job is running in it"):
            RunLock(tmp_path, beat=0.2).__enter__()
        first.ended.set()
        time.sleep(0.5)
        first.me["host"] = "elsewhere"
        (tmp_path / "lock").write_text(first._text())
        with RunLock(tmp_path, beat=0.2) as second:
            assert second._holder()["token"] == second.me["token"]
    assert not (tmp_path / "lock").exists()
