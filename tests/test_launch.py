"""Launchers: exact commands, and whole stories played by stub programs in place of gcloud, kubectl and SLURM."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TPU = ROOT / "tpu"
PAGES = sorted(TPU.glob("*.md"))
PROGRAMS = ("gcloud", "kubectl", "sbatch", "squeue", "scontrol", "scancel", "srun", "docker", "ssh-add")

# A stub writes its words to calls.jsonl and gives the next answer of the first rule whose text they contain; the last
# answer stays. {"hosts": N}: runs --command of `gcloud … ssh` with bash, once a host.
STUB = """#!{python} -IS
import json, os, subprocess, sys
here = os.path.dirname(os.path.abspath(__file__))
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(here + "/calls.jsonl", "a") as file:
    file.write(json.dumps(words) + "\\n")
with open(here + "/story.json") as file:
    story = json.load(file)
text = " ".join(words)
for rule in story:
    if rule["if"] in text:
        answer = rule["then"][0]
        if len(rule["then"]) > 1:
            rule["then"].pop(0)
            with open(here + "/story.json", "w") as file:
                json.dump(story, file)
        for host in range(answer.get("hosts", 0)):
            command = next(word for word in words if word.startswith("--command="))[len("--command="):]
            home = here + "/host%d" % host
            code = subprocess.run(["bash", "-c", command], env=dict(os.environ, HOME=home, PATH=home + "/bin:" + os.environ["PATH"])).returncode
            if code:
                sys.exit(code)
        sys.stdout.write(answer.get("out", ""))
        sys.stderr.write(answer.get("err", ""))
        sys.exit(answer.get("code", 0))
"""


class Stage:
    """A folder of stub programs, first on the PATH."""

    def __init__(self, folder: Path):
        self.folder = folder
        for program in PROGRAMS:
            (folder / program).write_text(STUB.replace("{python}", sys.executable))
            (folder / program).chmod(0o755)
        self.env = {**os.environ, "PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder)}
        self.env.pop("CLOUDSDK_COMPUTE_ZONE", None)
        self.tell()

    def tell(self, *story) -> None:
        """story: (text, answer, answer, …) in order of precedence."""
        rules = [{"if": words, "then": list(answers)} for words, *answers in story]
        (self.folder / "story.json").write_text(json.dumps(rules))
        (self.folder / "calls.jsonl").write_text("")

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    def run(self, script: str, *words: str, code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, str(TPU / script), *words],
            cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def dry(self, script: str, *words: str) -> list[list[str]]:
        """The commands that a dry run prints, a list of words each; nothing was called or written."""
        before = sorted(self.folder.iterdir())
        done = self.run(script, *words, "--dry-run")
        assert self.calls() == [] and sorted(self.folder.iterdir()) == before
        text = re.sub(r"^# write (\S+):\n.*?^# end of \1\n", "", done.stdout, flags=re.M | re.S)
        lexer = shlex.shlex(text, posix=True, punctuation_chars="\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " ", True, ""
        commands, line = [], []
        for word in lexer:
            if set(word) == {"\n"}:
                commands, line = commands + [line], []
            else:
                line.append(word)
        return [command for command in commands if command and not command[0].startswith("#")]


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def wait_for(true) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


SLICES = ("my-run", "--zone=us-west4-a", "--accelerator=v5e-16", "--workdir=gs://bucket/run", "configs/demo.py")
CLUSTER = ("my-run", "--accelerator=v5e-16", "--image=eu.gcr.io/p/vmm:1", "--workdir=gs://bucket/run", "configs/demo.py")  # fmt: skip
NODES = ("my-run", "--nodes=2", "--time=24:00:00", "--shared=/shared", "--workdir=/shared/run", "configs/demo.py")
QUICK = ("--poll=0", "--backoff=0", "--steady=1e9")
HOSTILE = """note=it's "two words" $HOME `id` ; $(id) \\"""


def shown(words: list[str]) -> str:
    """A command in short: remote shell scripts by what they do."""
    text = shlex.join(words)
    for mark, name in (
        ("vmm supervise", "START"),
        ("requirements.txt", "INSTALL"),
        ("kill -TERM", "STOP"),
        ("tail -n", "LOG"),
    ):
        if "--command=" in text and mark in text:
            return name
    return "STATE" if "--command=" in text else text


# ---- tables -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slices():
    sys.path.insert(0, str(TPU))
    try:
        import slices

        yield slices
    finally:
        sys.path.remove(str(TPU))
        for name in ("slices", "shell"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "chips", "topology", "machines", "hosts", "each", "node", "machine"),
    [
        # Rows of Google's tables of v4, v5e, v5p and v6e configurations; hosts on GKE with 4 chips each, as xpk has them.
        ("v4-8", 4, "2x2x1", 1, 1, 4, "tpu-v4-podslice", "ct4p-hightpu-4t"),
        ("v4-32", 16, "2x2x4", 4, 4, 4, "tpu-v4-podslice", "ct4p-hightpu-4t"),
        ("v5e-1", 1, "1x1", 1, 1, 1, "tpu-v5-lite-podslice", "ct5lp-hightpu-1t"),
        ("v5litepod-8", 8, "2x4", 1, 2, 4, "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
        ("v5e-16", 16, "4x4", 4, 4, 4, "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
        ("v5e-256", 256, "16x16", 64, 64, 4, "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
        ("v5p-8", 4, "2x2x1", 1, 1, 4, "tpu-v5p-slice", "ct5p-hightpu-4t"),
        ("v5p-16", 8, "2x2x2", 2, 2, 4, "tpu-v5p-slice", "ct5p-hightpu-4t"),
        ("v5p-512", 256, "4x8x8", 64, 64, 4, "tpu-v5p-slice", "ct5p-hightpu-4t"),
        ("v5p-12288", 6144, "16x16x24", 1536, 1536, 4, "tpu-v5p-slice", "ct5p-hightpu-4t"),
        ("v6e-8", 8, "2x4", 1, 2, 4, "tpu-v6e-slice", "ct6e-standard-4t"),
        ("v6e-256", 256, "16x16", 64, 64, 4, "tpu-v6e-slice", "ct6e-standard-4t"),
    ],
)
def test_slices_of_googles_tables(slices, name, chips, topology, machines, hosts, each, node, machine):
    tpu = slices.find_slice(name)
    assert (tpu.chips, tpu.topology, tpu.machines, tpu.hosts) == (chips, topology, machines, hosts)
    assert (tpu.chips_per_host, tpu.node, tpu.machine) == (each, node, machine)
    assert tpu.hosts * tpu.chips_per_host == tpu.chips


def test_another_topology_must_have_the_chips(slices):
    assert slices.find_slice("v5p-640", "4x4x20").topology == "4x4x20"
    for topology in ("4x4x4", "16x20", "axbxc"):
        with pytest.raises(Exception, match="topology"):
            slices.find_slice("v5p-640", topology)


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [("v4-8", "tpu-ubuntu2204-base"), ("v5e-8", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")],
)  # fmt: skip
def test_runtime_of_the_generation(stage, accelerator, runtime):
    (command,) = stage.dry("queued_resources.py", "create", "a", "--zone=z", f"--accelerator={accelerator}")
    assert f"--runtime-version={runtime}" in command


# ---- dry runs -----------------------------------------------------------------------------------


def test_queued_resource_commands(stage):
    def commands(*words):
        return [shown(words) for words in stage.dry("queued_resources.py", *words)]

    end = "--zone=us-west4-a --quiet"
    qr = "gcloud compute tpus queued-resources"
    kind = "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"
    look = f"{qr} describe my-run --format=json {end}"
    create = f"{qr} create my-run --node-id=my-run {kind} --spot {end}"
    launch = [look, f"{qr} scp vmm-my-run.tar.gz my-run:vmm-my-run.tar.gz --node=all --worker=all {end}", "INSTALL", "START"]  # fmt: skip
    gone = f"{qr} delete my-run --force {end}"
    node = f"gcloud compute tpus tpu-vm describe my-run '--format=value(state)' {end}"
    assert commands("create", *SLICES, "--spot") == [create]
    assert commands("launch", *SLICES) == launch
    assert commands("resume", *SLICES) == [look, "START"]
    assert commands("watch", *SLICES, "--spot", "--then-delete") == [
        look, create, gone, create, node, "STATE", *launch, "START", gone,
    ]  # fmt: skip
    assert commands("status", *SLICES[:2]) == [look, "STATE"]
    assert commands("logs", *SLICES[:2], "--slice=1", "--host=3", "--follow") == ["LOG"]
    assert commands("stop", *SLICES[:2]) == ["STOP"]
    assert commands("delete", *SLICES[:2]) == [look, "STOP", gone]
    assert commands("delete", *SLICES[:2], "--now") == [gone]


def test_queued_resource_flags(stage):
    words = ("--slices=2", "--reservation=res", "--project=p", "--iap", "--network=n", "--service-account=a@b", "--valid-until-duration=6h")  # fmt: skip
    (command,) = stage.dry("queued_resources.py", "create", *SLICES, *words)
    assert command == shlex.split(
        "gcloud alpha compute tpus queued-resources create my-run --node-count=2 --node-prefix=my-run "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --reservation=res --network=n "
        "--service-account=a@b --valid-until-duration=6h --internal-ips --zone=us-west4-a --project=p --quiet"
    )
    assert "--reserved" in stage.dry("queued_resources.py", "create", *SLICES, "--reserved")[0]
    ssh = stage.dry("queued_resources.py", "resume", *SLICES, "--iap")[-1]
    assert ssh[:8] == shlex.split("gcloud compute tpus queued-resources ssh my-run --node=all --worker=all")
    assert "--tunnel-through-iap" in ssh


def test_gke_commands(stage):
    def commands(*words):
        return [shlex.join(words) for words in stage.dry("gke.py", *words)]

    start = "kubectl create --filename=my-run.jobset.yaml"
    gone = "kubectl delete jobset my-run --ignore-not-found --cascade=foreground"
    pods = "--selector=jobset.sigs.k8s.io/jobset-name=my-run"
    assert commands("create", *CLUSTER, "--slices=2", "--spot", "--cluster=c", "--location=us-west4", "--zone=us-west4-a") == [
        f"gcloud container node-pools create my-run-{i} --cluster=c --location=us-west4 --node-locations=us-west4-a --quiet "
        "--machine-type=ct5lp-hightpu-4t --num-nodes=4 --tpu-topology=4x4 --placement-type=COMPACT "
        "--scopes=https://www.googleapis.com/auth/cloud-platform --spot"
        for i in range(2)
    ]  # fmt: skip
    assert commands("manifest", *CLUSTER) == []
    assert commands("launch", *CLUSTER) == [start]
    assert commands("resume", *CLUSTER) == [gone, start]
    assert commands("watch", *CLUSTER) == [
        "kubectl get jobset my-run --output=json", start, f"kubectl get pods {pods} --output=json", gone, start,
    ]  # fmt: skip
    assert commands("status", "my-run") == ["kubectl get jobset my-run", f"kubectl get pods {pods} --output=wide"]
    assert commands("logs", "my-run", "--host=2", "--follow", "--context=x", "--namespace=n") == [
        f"kubectl --context=x --namespace=n logs {pods},jobset.sigs.k8s.io/job-index=0,"
        "batch.kubernetes.io/job-completion-index=2 --container=jax-tpu --tail=100 --follow"
    ]
    assert commands("delete", "my-run") == [gone]
    assert commands("delete", "my-run", "--pools", "--accelerator=v5e-16", "--cluster=c", "--location=l") == [
        gone, "gcloud container node-pools delete my-run-0 --cluster=c --location=l --quiet",
    ]  # fmt: skip


def test_slurm_commands(stage):
    def commands(*words):
        return [shlex.join(words) for words in stage.dry("slurm.py", *words)]

    queue = "squeue --me --name=my-run --noheader --format=%A"
    submit = f"sbatch {stage.folder}/logs/my-run.sbatch"
    show = "scontrol show job 0 --oneliner"
    assert commands("create", *NODES) == []
    assert commands("launch", *NODES) == [queue, submit]
    assert commands("resume", *NODES) == [queue, submit]
    assert commands("watch", *NODES) == [queue, submit, show, queue, submit]
    assert commands("status", "my-run") == [queue, show]
    assert commands("logs", "my-run") == [queue, f"tail -n 100 {stage.folder}/logs/my-run-0.log"]
    assert commands("delete", "my-run") == [queue, "scontrol update JobId=0 Requeue=0", "scancel 0"]


# ---- what users get wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("queued_resources.py", ("create", *SLICES[:1], "--accelerator=v5e-16"), "--zone is missing"),
        ("queued_resources.py", ("create", *SLICES[:2]), "--accelerator is missing"),
        ("queued_resources.py", ("create", *SLICES[:2], "--accelerator=v9-16"), "'v9-16': unknown; .*v6e"),
        ("queued_resources.py", ("create", *SLICES[:2], "--accelerator=v5e-17"), "no such size; known: 1, 4, 8, 16"),
        ("queued_resources.py", ("create", *SLICES[:2], "--accelerator=tpu7x-8"), "on GKE"),
        ("queued_resources.py", ("create", "My_Run", *SLICES[1:3]), "name 'My_Run'"),
        ("queued_resources.py", ("create", *SLICES, "--spot", "--reserved"), "not allowed with"),
        ("queued_resources.py", ("start", *SLICES), "invalid choice: 'start'"),
        ("queued_resources.py", ("launch", *SLICES[:4]), "which config"),
        ("queued_resources.py", ("launch", *SLICES[:3], *SLICES[4:]), "--workdir is missing"),
        ("queued_resources.py", ("launch", *SLICES, "--workdir=/tmp/run"), "4 hosts .* --shared"),
        ("queued_resources.py", ("launch", *SLICES, "--workdir=/mnt/nfs2/run", "--shared=/mnt/nfs"), "4 hosts"),
        ("queued_resources.py", ("launch", *SLICES, "--workdir=/mnt/../run", "--shared=/mnt"), "4 hosts"),
        ("queued_resources.py", ("launch", *SLICES, "--workdir=gs://"), "4 hosts"),
        ("queued_resources.py", ("launch", *SLICES, "seven"), "override 'seven'"),
        ("queued_resources.py", ("launch", *SLICES, "--env=1A=2"), "--env '1A=2'"),
        ("gke.py", ("launch", *CLUSTER, "--image="), "--image is missing"),
        ("gke.py", ("launch", *CLUSTER, "--workdir=/mnt/run"), "4 hosts .* --volume"),
        ("gke.py", ("launch", *CLUSTER, "--volume=claim"), "--volume 'claim'"),
        ("gke.py", ("launch", *CLUSTER, "--accelerator=v5e-4", "--slices=2"), "several hosts"),
        ("gke.py", ("create", *CLUSTER), "--cluster and --location"),
        ("slurm.py", ("launch", *NODES, "--workdir=/elsewhere/run"), "2 hosts .* --shared"),
        ("slurm.py", ("launch", *NODES, "--time="), "--time is missing"),
        ("slurm.py", ("launch", *NODES, "--nodes=0"), "--nodes 0"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_line_and_code_2(stage, script, words, says):
    done = stage.run(script, *words, "--dry-run", code=2)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"{script}: error: ") and re.search(says, line)
    assert done.stdout == "" and stage.calls() == []


def test_one_host_may_save_on_its_own_disk(stage):
    assert stage.dry("queued_resources.py", "resume", *SLICES, "--accelerator=v5e-8", "--workdir=/tmp/run")
    assert stage.dry("slurm.py", "launch", *NODES, "--nodes=1", "--workdir=/tmp/run")
    assert stage.dry("queued_resources.py", "resume", *SLICES, "--workdir=/mnt/nfs/run", "--shared=/mnt/nfs/")


def test_a_missing_program_is_one_line(stage):
    (stage.folder / "sbatch").unlink()
    stage.env["PATH"] = str(stage.folder)
    assert "sbatch: not found; install it" in stage.run("slurm.py", "launch", *NODES, code=2).stderr


def test_a_failing_program_is_one_line_with_what_it_said(stage):
    stage.tell(("kubectl", {"code": 1, "err": "first\nerror: the server is away\n"}))
    done = stage.run("gke.py", "status", "my-run", code=1)
    assert done.stderr.endswith("gke.py: error: kubectl get jobset my-run: exit code 1: see above\n")
    assert "the server is away" in done.stderr
    stage.tell(("squeue", {"code": 1, "err": "squeue: error: slurmctld is away\n"}))
    done = stage.run("slurm.py", "status", "my-run", code=1)
    assert done.stderr.strip().endswith("--format=%A: exit code 1: squeue: error: slurmctld is away")
    assert len(done.stderr.splitlines()) == 1
    stage.tell(
        (LOOK, state("ACTIVE")), ("requirements.txt", {"code": 1, "err": "uv: no such package\nfailed on worker 2\n"})
    )
    done = stage.run("queued_resources.py", "launch", *SLICES, code=1)
    assert "uv: no such package\n" in done.stderr and done.stderr.endswith("exit code 1: failed on worker 2\n")


# ---- Cloud TPU ----------------------------------------------------------------------------------


def state(name: str, *nodes: str) -> dict:
    specs = [{"nodeId": node} for node in nodes or ("my-run",)]
    return {"out": json.dumps({"state": {"state": name}, "tpu": {"nodeSpec": specs}})}


def hosts(answer: str, count: int = 4) -> dict:
    return {"out": f"vmm-host t1v-n {answer}\n" * count}


GONE = {"code": 1, "err": "ERROR: (gcloud) NOT_FOUND: Resource 'my-run' was not found\n"}
READY = ("tpu-vm describe", {"out": "READY\n"})
LOOK = "queued-resources describe"
STATE_OF_HOSTS = "--command=job"  # install, start and stop begin otherwise or say more: they come first in a story
INSTALL, START = ("requirements.txt", hosts("installed")), ("nohup", hosts("running"))


def story(stage) -> list[str]:
    return [shown(words) for words in stage.calls()]


def verbs(stage) -> list[str]:
    """The commands in short, looks left out."""
    short = [next((verb for verb in ("create", "delete", "scp") if f"resources {verb}" in text), text) for text in story(stage)]  # fmt: skip
    return [text for text in short if "describe" not in text and text != "STATE"]


def test_watch_survives_a_preemption(stage):
    stage.tell(
        INSTALL, START, READY,
        (LOOK, GONE, state("WAITING_FOR_RESOURCES"), state("ACTIVE"), state("ACTIVE"), state("ACTIVE"), state("SUSPENDING"),
         state("SUSPENDED"), GONE, state("PROVISIONING"), state("ACTIVE")),
        (STATE_OF_HOSTS, hosts("absent"), hosts("running"), hosts("absent"), hosts("running"), hosts("exit 0")),
    )  # fmt: skip
    done = stage.run("queued_resources.py", "watch", *SLICES, "--spot", "--then-delete", *QUICK)
    started = ["scp", "INSTALL", "START"]
    # SUSPENDED: deleted and asked for again; then it was gone, and asked for once more.
    assert verbs(stage) == ["create", *started, "delete", "create", "create", *started, "delete"]
    assert "my-run is SUSPENDED (failure 1 of 10); again in 0 s" in done.stdout
    assert "training is done" in done.stdout


def test_watch_sees_one_lost_slice_of_several(stage):
    stage.tell(
        INSTALL, ("nohup", hosts("running", 8)),
        ("tpu-vm describe my-run-1", {"out": "PREEMPTED\n"}, {"out": "READY\n"}), READY,
        (LOOK, state("ACTIVE", "my-run-0", "my-run-1")),
        (STATE_OF_HOSTS, hosts("running", 8), hosts("exit 0", 8)),
    )  # fmt: skip
    done = stage.run("queued_resources.py", "watch", *SLICES, "--slices=2", *QUICK)
    assert verbs(stage) == ["delete", "create"]
    assert "--node-count=2 --node-prefix=my-run" in " ".join(story(stage))
    assert "slice my-run-1 is PREEMPTED" in done.stdout


@pytest.mark.parametrize("code", [2, 3, 4])
def test_watch_stops_at_a_code_that_comes_again(stage, code):
    stage.tell(READY, (LOOK, state("ACTIVE")), (STATE_OF_HOSTS, {"out": hosts("running", 3)["out"] + f"vmm-host a exit {code}\n"}))  # fmt: skip
    stage.run("queued_resources.py", "watch", *SLICES, *QUICK, code=code)
    assert verbs(stage) == []


def test_watch_starts_again_after_a_crash_and_gives_up_without_progress(stage):
    stage.tell(START, READY, (LOOK, state("ACTIVE")), (STATE_OF_HOSTS, hosts("exit 1")))
    done = stage.run("queued_resources.py", "watch", *SLICES, *QUICK, "--attempts=3", code=1)
    assert verbs(stage) == ["START", "START"]
    assert "given up after 3 failures without progress" in done.stderr


def test_progress_is_a_new_count(stage):
    crashes = [hosts("exit 1"), hosts("running")] * 4
    stage.tell(START, READY, (LOOK, state("ACTIVE")), (STATE_OF_HOSTS, *crashes, hosts("exit 0")))
    stage.run("queued_resources.py", "watch", *SLICES, "--poll=0", "--backoff=0", "--steady=0", "--attempts=2")
    assert verbs(stage) == ["START"] * 4


def test_watch_waits_out_a_network_that_is_away(stage):
    away = {"code": 1, "err": "ERROR: unable to connect\n"}
    stage.tell(READY, (LOOK, away, away, state("ACTIVE")), (STATE_OF_HOSTS, away, hosts("running"), hosts("exit 0")))
    stage.run("queued_resources.py", "watch", *SLICES, *QUICK)
    assert verbs(stage) == []


def test_a_launch_needs_every_host(stage):
    stage.tell(INSTALL, ("nohup", hosts("running", 3)), (LOOK, state("ACTIVE")))
    done = stage.run("queued_resources.py", "launch", *SLICES, code=1)
    assert "3 of 4 hosts are running" in done.stderr
    stage.tell((LOOK, state("PROVISIONING")))
    assert "is PROVISIONING, not ACTIVE" in stage.run("queued_resources.py", "launch", *SLICES, code=2).stderr
    stage.tell((LOOK, GONE))
    assert "`create` it" in stage.run("queued_resources.py", "resume", *SLICES, code=2).stderr


def test_the_remote_shell_for_real(stage):
    """Install, start, state, stop and start again, run by bash on two "hosts" (homes); uv and vmm are stubs."""
    for host in range(2):
        home = stage.folder / f"host{host}"
        (home / "bin").mkdir(parents=True)
        (home / ".local/bin").mkdir(parents=True)
        vmm = (
            f"#!{sys.executable} -IS\nimport json, os, signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
            "with open(os.environ['HOME'] + '/words.json', 'w') as file:\n"
            "    json.dump([sys.argv[1:], os.getcwd(), os.environ['MY_FLAGS']], file)\n"
            "print('training', flush=True)\n"
            "if os.path.exists('requirements.txt'): time.sleep(60)\n"
        )
        for path, text in {
            "bin/python3": "#!/bin/sh\nexit 0\n",
            "vmm": vmm,
            ".local/bin/uv": '#!/bin/sh\n[ "$1" = venv ] && mkdir -p .venv/bin && cp "$HOME/vmm" .venv/bin/vmm\nexit 0\n',
        }.items():
            (home / path).write_text(text)
            (home / path).chmod(0o755)
    code = stage.folder / "checkout"
    code.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "new file.py"):
        (code / name).write_text("x\n")
    (code / ".gitignore").write_text("data/\n")
    (code / "data").mkdir()
    (code / "data" / "big").write_text("x")
    subprocess.run(["git", "init", "-q", str(code)], check=True)
    stage.tell((LOOK, state("ACTIVE", "my-run-0", "my-run-1")), ("ssh", {"hosts": 2}))
    # scp keeps a copy for both homes.
    (stage.folder / "gcloud").rename(stage.folder / "gcloud-stub")
    (stage.folder / "gcloud").write_text(
        '#!/bin/sh\nif [ "$4" = scp ]; then for h in host0 host1; do cp "$5" "$(dirname "$0")/$h/"; done; fi\n'
        'exec "$(dirname "$0")/gcloud-stub" "$@"\n'
    )
    (stage.folder / "gcloud").chmod(0o755)
    words = (*SLICES, "--slices=2", "--accelerator=v5e-8", f"--code={code}", "--env=MY_FLAGS=--a 'b'", HOSTILE)

    done = stage.run("queued_resources.py", "launch", *words, "--setup=touch $HOME/mounted")
    assert "2 hosts run configs/demo.py" in done.stdout
    for host in range(2):
        home = stage.folder / f"host{host}"
        with tarfile.open(home / "vmm-my-run.tar.gz") as tar:
            assert sorted(tar.getnames()) == [".gitignore", "new file.py", "pyproject.toml", "requirements.txt"]
        wait_for(lambda home=home: (home / "words.json").exists() and (home / "words.json").read_text())
        told, folder, flags = json.loads((home / "words.json").read_text())
        assert told == ["supervise", "configs/demo.py", "--workdir", "gs://bucket/run", HOSTILE]
        assert folder == f"{home}/vmm-jobs/my-run/code" and flags == "--a 'b'"
        assert (home / "mounted").exists()

    def pids():
        return [int((stage.folder / f"host{host}/vmm-jobs/my-run/pid").read_text()) for host in range(2)]

    first = pids()
    stage.run("queued_resources.py", "resume", *words)  # runs already: nothing is started twice
    assert "training runs on all hosts" in stage.run("queued_resources.py", "launch", *words, code=2).stderr
    assert pids() == first
    assert stage.run("queued_resources.py", "status", *SLICES[:2]).stdout.count(" running\n") == 2
    stage.run("queued_resources.py", "stop", *SLICES[:2])
    assert stage.run("queued_resources.py", "status", *SLICES[:2]).stdout.count(" exit 42\n") == 2
    stage.run("queued_resources.py", "resume", *words)
    assert pids() != first
    for pid in pids():
        os.kill(pid, 9)
    wait_for(lambda: stage.run("queued_resources.py", "status", *SLICES[:2]).stdout.count(" exit 137\n") == 2)
    log = (stage.folder / "host0/vmm-jobs/my-run/log").read_text()
    assert log.count("training\n") == 2


# ---- GKE ----------------------------------------------------------------------------------------


def jobset(stage, *words) -> dict:
    stage.run("gke.py", "manifest", *CLUSTER, *words)
    return yaml.safe_load((stage.folder / "my-run.jobset.yaml").read_text())


def test_jobset(stage):
    made = jobset(stage, "--slices=3", "--spot", "--queue=multislice-queue", "--max-restarts=7", "--env=A=yes", HOSTILE, "b=null")  # fmt: skip
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["metadata"] == {
        "name": "my-run",
        "labels": {"kueue.x-k8s.io/queue-name": "multislice-queue", "xpk.google.com/workload": "my-run"},
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    assert made["spec"]["failurePolicy"] == {
        "maxRestarts": 7,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    (job,) = made["spec"]["replicatedJobs"]
    assert (job["name"], job["replicas"]) == ("slice-job", 3)
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (4, 4, "Indexed")
    assert spec["backoffLimit"] == 0
    (rule,) = spec["podFailurePolicy"]["rules"]
    # 2: wrong input, 3: too many bad files, 4: not finite. Crash (1), storage (5), hang (6), preempted (42) restart.
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3, 4]
    assert rule["onExitCodes"]["operator"] == "In"
    pod = spec["template"]["spec"]
    assert spec["template"]["metadata"]["labels"] == {"xpk.google.com/workload": "my-run"}
    assert pod["restartPolicy"] == "Never" and pod["hostNetwork"] is True
    assert pod["dnsPolicy"] == "ClusterFirstWithHostNet" and pod["terminationGracePeriodSeconds"] == 120
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    (container,) = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"] == "jax-tpu"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["env"] == [{"name": "A", "value": "yes"}]
    told = [word.replace("$$(", "$(") for word in container["command"]]
    assert told == ["vmm", "supervise", "configs/demo.py", "--workdir", "gs://bucket/run", HOSTILE, "b=null"]
    assert "$$(id)" in container["command"][5], "Kubernetes would read $(id) as a variable"
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert "securityContext" not in container


def test_jobset_options(stage):
    made = jobset(stage, "--volume=claim:/mnt/run", "--workdir=/mnt/run/a", "--reservation=res", "--namespace=n",
                  "--service-account=sa", "--priority=high", "--privileged", "--accelerator=v5p-640", "--topology=4x4x20")  # fmt: skip
    spec = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    assert made["metadata"]["namespace"] == "n" and "kueue.x-k8s.io/queue-name" not in made["metadata"]["labels"]
    assert spec["parallelism"] == 80 and pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x20"
    assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "res" and "tolerations" not in pod
    assert (pod["serviceAccountName"], pod["priorityClassName"]) == ("sa", "high")
    assert pod["volumes"][1] == {"name": "v0", "persistentVolumeClaim": {"claimName": "claim"}}
    assert pod["containers"][0]["volumeMounts"][1] == {"name": "v0", "mountPath": "/mnt/run"}
    assert pod["containers"][0]["securityContext"] == {"privileged": True}


def found(kind: str = "", reason: str = "", ready: int = 0, restarts: int = 0) -> dict:
    conditions = [{"type": kind, "status": "True", "reason": reason}] if kind else []
    status = {"conditions": conditions, "restarts": restarts, "replicatedJobsStatus": [{"name": "slice-job", "ready": ready}]}  # fmt: skip
    return {"out": json.dumps({"spec": {"replicatedJobs": [{"replicas": 1}]}, "status": status})}


def pods(*codes: int) -> dict:
    items = [{"status": {"containerStatuses": [{"state": {"terminated": {"exitCode": code}}}]}} for code in codes]
    return {"out": json.dumps({"items": items})}


NO_JOBSET = {"code": 1, "err": 'Error from server (NotFound): jobsets.jobset.x-k8s.io "my-run" not found\n'}


def test_gke_watch_until_done(stage):
    stage.tell(
        ("get jobset", NO_JOBSET, found(), found(ready=1), found(ready=1, restarts=1), found("Failed", "ReachedMaxRestarts"),
         found(ready=1), found("Completed", "AllJobsCompleted")),
        ("get pods", pods(42, 1)),
    )  # fmt: skip
    done = stage.run("gke.py", "watch", *CLUSTER, *QUICK)
    changes = [words[1] for words in stage.calls() if words[1] != "get"]
    assert changes == ["create", "delete", "create"]
    assert "1 of 1 slices run, restarted 1 times" in done.stdout and "Completed (AllJobsCompleted)" in done.stdout


@pytest.mark.parametrize("code", [2, 3, 4])
def test_gke_watch_stops_at_a_code_that_comes_again(stage, code):
    stage.tell(("get jobset", found("Failed", "FailJobSetFailurePolicyAction")), ("get pods", pods(137, code)))
    assert f"ended with code {code}" in stage.run("gke.py", "watch", *CLUSTER, *QUICK, code=code).stdout
    assert all(words[1] == "get" for words in stage.calls())


def test_gke_watch_gives_up(stage):
    stage.tell(("kubectl", {"code": 1, "err": "error: the server is away\n"}))
    done = stage.run("gke.py", "watch", *CLUSTER, *QUICK, "--attempts=4", code=1)
    assert "the server is away: given up after 4 failures" in done.stderr and len(stage.calls()) == 4


# ---- SLURM --------------------------------------------------------------------------------------


def batch(stage, *words) -> tuple[dict[str, str], str]:
    stage.run("slurm.py", "create", *NODES, *words)
    text = (stage.folder / "logs/my-run.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    flags = {flag: value for flag, _, value in re.findall(r"^#SBATCH --([\w-]+)(=(.*))?$", text, re.M)}
    return flags, text


def test_slurm_one_task_a_node(stage):
    flags, text = batch(stage, "--partition=gpu", "--account=a", "--constraint=h100&ib")
    assert flags == {
        "job-name": "my-run", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8", "exclusive": "", "mem": "0",
        "time": "24:00:00", "partition": "gpu", "account": "a", "constraint": "h100&ib", "chdir": str(stage.folder),
        "output": f"{stage.folder}/logs/%x-%j.log", "open-mode": "append", "requeue": "", "signal": "TERM@120",
    }  # fmt: skip
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in text


def test_slurm_one_task_a_gpu(stage):
    flags, text = batch(stage, "--task-per-gpu", "--gpus=4", "--cpus=12", "--mem=200G")
    assert (flags["ntasks-per-node"], flags["gpus-per-node"], flags["cpus-per-task"]) == ("4", "4", "12")
    assert "exclusive" not in flags and flags["mem"] == "200G"
    assert "JAX_LOCAL_DEVICE_IDS" not in text and "--cpus-per-task=12" in text


# The step: says that it runs, answers SIGTERM (the trap's scancel is a stub that passes it on) with 42.
SRUN = """#!{python} -IS
import json, os, signal, sys, time
here = os.path.dirname(os.path.abspath(__file__))
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.5)
    sys.exit(42)
signal.signal(signal.SIGTERM, save)
json.dump([sys.argv[1:], os.environ.get("MY_FLAGS")], open(here + "/words.json", "w"))
open(here + "/srun.pid", "w").write(str(os.getpid()))
if os.environ.get("CODE"):
    sys.exit(int(os.environ["CODE"]))
time.sleep(60)
"""


def act(stage) -> None:
    (stage.folder / "srun").write_text(SRUN.replace("{python}", sys.executable))
    stub = (stage.folder / "scancel").read_text()
    (stage.folder / "scancel").write_text(stub + f'\nos.kill(int(open("{stage.folder}/srun.pid").read()), 15)\n')
    stage.env["SLURM_JOB_ID"] = "123"


@pytest.mark.parametrize("code", [0, 2, 6, 42])
def test_the_batch_script_for_real(stage, code):
    act(stage)
    batch(stage, "--env=MY_FLAGS=a 'b' $HOME", HOSTILE, "--setup=export CODE=" + str(code))
    stage.tell()
    done = subprocess.run(["bash", "logs/my-run.sbatch"], cwd=stage.folder, env=stage.env, timeout=30)
    assert done.returncode == code
    told, flags = json.loads((stage.folder / "words.json").read_text())
    assert told == ["--kill-on-bad-exit=0", "--wait=600", "--cpu-bind=none", "vmm", "supervise", "configs/demo.py",
                    "--workdir", "/shared/run", HOSTILE]  # fmt: skip
    assert flags == "a 'b' $HOME"
    assert stage.calls() == ([["scontrol", "requeue", "123"]] if code == 42 else [])


def test_the_batch_script_saves_on_sigterm(stage):
    act(stage)
    batch(stage)
    stage.tell()
    job = subprocess.Popen(["bash", "logs/my-run.sbatch"], cwd=stage.folder, env=stage.env)
    wait_for(lambda: (stage.folder / "srun.pid").exists() and (stage.folder / "srun.pid").read_text())
    job.terminate()
    time.sleep(0.2)
    job.terminate()  # again, while it saves
    assert job.wait(timeout=20) == 42
    told = ["scancel", "--signal=TERM", "123"]
    assert stage.calls() == [told, told, ["scontrol", "requeue", "123"]]


def test_a_failing_setup_is_wrong_input(stage):
    act(stage)
    batch(stage, "--setup=source no/such/file")
    done = subprocess.run(["bash", "logs/my-run.sbatch"], cwd=stage.folder, env=stage.env, capture_output=True)
    assert done.returncode == 2 and not (stage.folder / "srun.pid").exists()


def shows(name: str, code: str = "0:0") -> dict:
    return {"out": f"JobId=1 JobName=my-run JobState={name} Reason=None ExitCode={code} DerivedExitCode=0:0\n"}


def test_slurm_launch_and_its_number(stage):
    stage.tell(("sbatch", {"out": "Submitted batch job 123\n"}))
    assert "job 123, its log is" in stage.run("slurm.py", "launch", *NODES).stdout
    stage.tell(("squeue", {"out": "123\n"}))
    assert "job 123 is in the queue already" in stage.run("slurm.py", "launch", *NODES, code=2).stderr
    stage.tell(("sbatch", {"out": "what?\n"}))
    assert "no job number" in stage.run("slurm.py", "launch", *NODES, code=1).stderr
    (stage.folder / "logs/my-run-7.log").write_text("seven\n")
    (stage.folder / "logs/my-run-b-8.log").write_text("eight\n")
    stage.tell()
    assert stage.run("slurm.py", "logs", "my-run").stdout == "seven\n"


def test_slurm_watch_submits_again_after_a_failure(stage):
    stage.tell(
        ("squeue", {"out": ""}, {"out": ""}, {"out": ""}),
        ("sbatch", {"out": "Submitted batch job 123\n"}, {"out": "Submitted batch job 124\n"}),
        ("show job 123", shows("PENDING"), shows("RUNNING"), shows("PENDING"), shows("RUNNING"), shows("NODE_FAIL", "1:0")),
        ("show job 124", shows("RUNNING"), shows("COMPLETED")),
    )  # fmt: skip
    done = stage.run("slurm.py", "watch", *NODES, *QUICK)
    assert [words[0] for words in stage.calls()].count("sbatch") == 2
    assert "job 123 is NODE_FAIL, exit code 1 (failure 1 of 10)" in done.stdout


@pytest.mark.parametrize(
    ("answers", "code", "submitted"),
    [([shows("FAILED", "2:0")], 2, 1), ([shows("FAILED", "3:0")], 3, 1), ([shows("CANCELLED", "0:15")], 1, 1),
     ([shows("FAILED", "6:0")], 1, 3), ([{"code": 1, "err": "slurm_load_jobs error: Invalid job id specified\n"}], 1, 3)],
)  # fmt: skip
def test_slurm_watch_ends(stage, answers, code, submitted):
    stage.tell(("squeue", {"out": ""}), ("sbatch", {"out": "Submitted batch job 1\n"}), ("show job", *answers))
    stage.run("slurm.py", "watch", *NODES, *QUICK, "--attempts=3", code=code)
    assert [words[0] for words in stage.calls()].count("sbatch") == submitted


def test_slurm_delete_forbids_the_requeue_first(stage):
    stage.tell(("squeue", {"out": "5\n6\n"}))
    stage.run("slurm.py", "delete", "my-run")
    assert [words for words in stage.calls() if words[0] != "squeue"] == [
        ["scontrol", "update", "JobId=5", "Requeue=0"], ["scancel", "5"],
        ["scontrol", "update", "JobId=6", "Requeue=0"], ["scancel", "6"],
    ]  # fmt: skip


# ---- pages and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_the_pages_parse(stage, page):
    """Every bash block runs, with --dry-run behind each launcher's words; other programs are stubs."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)
    script = "\n".join(blocks)
    assert page.name == "README.md" or len(re.findall(r"^tpu/", script, re.M)) >= 6
    dry = re.sub(r"^(tpu/\w+\.py (?:.*\\\n)*.*?)( *#.*)?$", r"\1 --dry-run", script, flags=re.M)
    done = subprocess.run(
        ["bash", "-eu", "-c", dry], cwd=ROOT, env=stage.env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{page.name}: {done.stderr}\n{dry}"
    assert dry.count("--dry-run") >= len(re.findall(r"^tpu/\w+\.py", script, re.M))


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_scripts_need_nothing_but_python():
    own = {path.stem for path in TPU.glob("*.py")}
    for path in TPU.glob("*.py"):
        text = path.read_text()
        tree = ast.parse(text, feature_version=(3, 9))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert names <= own | set(sys.stdlib_module_names), path
        assert text.startswith("#!/usr/bin/env python3\n") == os.access(path, os.X_OK), path
        # On Python 3.9 an annotation such as `int | None` may be written, but not evaluated.
        assert "from __future__ import annotations" in text, path
        assert not re.findall(r"/(?:work|farm|root)/", text), path


def test_the_image_copies_what_is_there():
    for line in re.findall(r"^COPY (.+)$", (TPU / "Dockerfile").read_text(), re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
