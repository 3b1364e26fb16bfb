"""vmm verify-resume: does a run that was killed come out as one that was not? On this machine, with this config.

Children train a short version of it: straight; killed at a random step and started again; and once more, started again
with another number of devices. What each was given, its losses and its final parameters are compared.
"""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from vmm.build import load_config, plain, save_config
from vmm.data.loader import Loader
from vmm.errors import UserError
from vmm.training.metrics import read_rows

LOSS, PARAMETERS = 1e-5, 1e-3  # largest relative differences between numbers of devices, in float32
_ROUNDING = {"float32": 1.0, "bfloat16": 2.0**16}  # how much coarser a type is
_DEVICES = re.compile(r"--xla_force_host_platform_device_count=\d+")


def verify_resume(config: Mapping, steps: int = 12, folder: Path | None = None, seed: int | None = None) -> bool:
    """Prints a table; returns whether all is as it should be.

    Args:
      steps: of the short run. folder: where the runs go; None: a temporary one. seed: of the step that is killed.

    Raises:
      UserError: a child could not train for another reason than the one it was given.
    """
    config = short(config, steps)
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return verify_resume(config, steps, Path(temporary), seed)
    folder.mkdir(parents=True, exist_ok=True)
    killed = random.Random(seed).randint(2, steps)
    one, other, said = places(config)
    table = Table("", "samples", "loss, largest difference", "parameters, difference", "")
    straight = _train(folder / "straight", config, one)
    fine = True
    for name, place in (("same devices", one), (said, other)):
        workdir = folder / name.replace(" ", "-")
        _train(workdir, config, one, f"kill@{killed}")
        mine = _train(workdir, config, place)
        exact = place == one
        loss, parameters = _loss_difference(straight, mine), _difference(straight, mine)
        samples = straight["samples"] == mine["samples"]
        coarse = _ROUNDING[config.get("dtype", "float32")]
        near = loss == parameters == 0 if exact else loss <= LOSS * coarse and parameters <= PARAMETERS * coarse
        fine = fine and samples and near
        verdict = "as straight" if samples and near else "DIFFERENT"
        row = ("the same" if samples else "others", f"{loss:.1e}", f"{parameters:.1e}", verdict)
        table.add_row(f"killed before step {killed} of {steps}, resumed: {name}", *row)
    Console(width=140).print(table)
    return fine


def short(config: Mapping, steps: int) -> dict:
    """Returns the config of a run of so many steps that saves four times, and does nothing else on the way."""
    config = plain(config)
    optim = dict(config.get("optim", {}))
    optim["warmup"] = min(optim.get("warmup", 0), steps // 4)
    data = {**config["data"], "cache": 0}
    changes = dict(
        steps=steps, save_every=max(1, steps // 4), log_every=1, eval_every=0, health=0, evals={}, early={}, keep=2
    )
    return config | changes | {"optim": optim, "data": data}


def places(config: Mapping) -> tuple[dict, dict, str]:
    """Returns two places to train at, {"devices": …, "mesh": …}, and in words what the second is.

    On a CPU two numbers of virtual devices that the batch divides over; on accelerators all of them, in another mesh.
    """
    code = "import jax; print(jax.default_backend(), jax.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"verify-resume: JAX does not start: {done.stderr.strip().splitlines()[-1]}")
    backend, count = done.stdout.split()[-2:]
    mesh = config.get("mesh", {})
    if backend == "cpu":
        unit = config.get("optim", {}).get("accumulate", 1)
        sizes = mesh if isinstance(mesh, Mapping) else {}
        needed = int(np.prod([size for size in sizes.values() if size > 0]))
        free = [n for n in (2, 4, 1, 8) if config["batch"] % (n * unit) == 0]
        first = needed if needed > 1 else free[0]
        second = next((n for n in free if n != first), first)
        return {"devices": first, "mesh": mesh}, {"devices": second, "mesh": {}}, f"{second} devices for {first}"
    # What splits the parameters where the config does not, and the other way round.
    split = isinstance(mesh, Mapping) and mesh.get("fsdp", 1) != 1
    another = dict(data=-1) if split else dict(data=1, fsdp=-1)
    said = f"{count} {backend} devices as {another}" if count != "1" else f"the one {backend} device again"
    return {"devices": None, "mesh": mesh}, {"devices": None, "mesh": another}, said


def _train(workdir: Path, config: Mapping, place: Mapping, fault: str = "") -> dict:
    """Trains in a child until it is done, or killed as `fault` says; returns what is known of the run."""
    workdir.mkdir(exist_ok=True)
    save_config(dict(config) | {"mesh": place["mesh"]}, workdir / "asked.json")
    environment = dict(os.environ) | {"VMM_FAULT": fault}
    if place["devices"]:
        flags = _DEVICES.sub("", environment.get("XLA_FLAGS", ""))
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={place['devices']}".strip()
    done = subprocess.run(
        [sys.executable, "-m", "vmm.verify", str(workdir)], env=environment, capture_output=True, text=True
    )
    if fault and done.returncode == -signal.SIGKILL:
        return {}
    if done.returncode:
        last = (done.stderr.strip() or "no word").splitlines()[-1]
        raise UserError(f"verify-resume: a child ended with exit code {done.returncode}: {last}")
    samples = {row["step"]: (row["ids"], row["bytes"]) for row in read_rows(workdir / "samples.jsonl")}
    losses = [row["loss"] for row in read_rows(workdir / "metrics.jsonl")]
    return {"samples": samples, "losses": losses, "parameters": workdir / "parameters.npz"}


def _loss_difference(one: Mapping, two: Mapping) -> float:
    if len(one["losses"]) != len(two["losses"]) or None in one["losses"] + two["losses"]:
        return float("inf")
    a, b = np.array(one["losses"]), np.array(two["losses"])
    return float((np.abs(a - b) / np.maximum(np.abs(a), 1e-12)).max())


def _difference(one: Mapping, two: Mapping) -> float:
    """‖a − b‖ / ‖a‖ over all parameters."""
    with np.load(one["parameters"]) as a, np.load(two["parameters"]) as b:
        if sorted(a) != sorted(b):
            return float("inf")
        apart = sum(np.square(a[name].astype(np.float64) - b[name]).sum() for name in a)
        size = sum(np.square(a[name].astype(np.float64)).sum() for name in a)
    return float(np.sqrt(apart / max(size, 1e-30)))


def _child(workdir: Path) -> None:
    """Trains asked.json, writes down what the model was given at each step, and the parameters at the end."""
    import jax
    from flax.traverse_util import flatten_dict

    from vmm.run import open_run
    from vmm.train import train

    class Recording(Loader):
        def __init__(self, *args, start: int, **named):
            super().__init__(*args, start=start, **named)
            self.step = start

        def __iter__(self):
            for batch in super().__iter__():
                self.step += 1
                given = hashlib.sha256()
                for leaf in jax.tree.leaves(batch):
                    given.update(np.ascontiguousarray(leaf).tobytes())
                row = {"step": self.step, "ids": batch.index.tolist(), "bytes": given.hexdigest()}
                with open(workdir / "samples.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                yield batch

    train(load_config(str(workdir / "asked.json")), workdir, loader=Recording)
    params = jax.device_get(open_run(workdir).state.params)
    np.savez(workdir / "parameters.npz", **flatten_dict(params, sep="/"))


def main(arguments: Sequence[str]) -> int:
    """A child of verify_resume."""
    try:
        _child(Path(arguments[0]))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
