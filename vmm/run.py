"""A finished or unfinished run on disk: its config, its newest weights, its records."""

import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax

from vmm.build import load_config
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.paths import to_path
from vmm.sharding import MeshShape, make_mesh
from vmm.training.checkpoint import Checkpoints
from vmm.training.early import Watch
from vmm.training.runtime import use_compilation_cache
from vmm.training.step import State


class Run(NamedTuple):
    """What a workdir holds. params: the weights that are evaluated and published."""

    workdir: Path
    config: dict
    experiment: Experiment
    mesh: Any
    state: State
    step: int


def open_run(workdir: str | Path, alone: bool = False, plugins: Collection[str] | None = None) -> Run:
    """Reads the newest checkpoint of a run; with early stopping, the best one so far.

    alone: onto this process's first device, whatever devices the run is for; else onto its mesh. plugins: as of load_config;
    None: the run is one's own.

    Raises:
      UserError: no run in the workdir, or nothing saved yet.
    """
    workdir = to_path(workdir)
    use_compilation_cache()  # evaluation, publishing and report share what they compile
    if not (workdir / "config.json").is_file():
        raise UserError(f"run {workdir}: holds no config.json; give the workdir of a `vmm train`")
    config = load_config(str(workdir / "config.json"), plugins=plugins)
    experiment = Experiment(config)
    mesh = make_mesh(MeshShape(), jax.local_devices()[:1]) if alone else experiment.make_mesh()
    program = experiment.program(mesh)
    checkpoints = Checkpoints(workdir, experiment.config.keep)
    best = Watch(workdir, experiment.early).best
    if best is not None and best not in checkpoints.steps:
        print(
            f"{workdir}: the best checkpoint, of step {best}, is gone; this is the newest, of step {checkpoints.latest}"
        )
        best = None
    with jax.set_mesh(mesh):
        saved = checkpoints.restore(program.shapes, best)
    checkpoints.close()
    return Run(workdir, config, experiment, mesh, saved.state, saved.step)


def from_where(config: dict) -> str:
    """Returns the tail of an error line on a file that a run's config names and that is not here."""
    if Path(config["data"].get("tokenizer") or "/").is_absolute():
        return "; put it back, or correct config.json"
    return f": relative paths of a run begin in the folder where it was trained, not in {Path.cwd()}; run this there"


def weights(state: State):
    """Returns the parameters that are evaluated and published: the running average where there is one."""
    return state.ema if jax.tree.leaves(state.ema) else state.params


def commit() -> str:
    """Returns the git commit of the code, "+" behind it where it was changed; "unknown" outside a checkout."""
    here = Path(__file__).parent

    def git(*args):
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD")[:12] + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
