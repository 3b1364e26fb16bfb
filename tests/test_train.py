"""A run is a function of its config: straight, killed, stopped or moved to another mesh, the numbers are the same."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config
from support.server import server

from vmm.build import save_config
from vmm.data.manifest import Row, changes, identity
from vmm.errors import DataBudgetError, NumericError, Preempted, StorageError, UserError
from vmm.run import open_run
from vmm.train import train
from vmm.training.checkpoint import Checkpoints
from vmm.training.metrics import MetricLog, read_rows

STEPS = 8


def run_config(world: Path) -> dict:
    return tiny_config(world, steps=STEPS, batch=16, save_every=3, log_every=1)


def losses(workdir: Path) -> dict[int, dict]:
    """Step → everything logged that is not a speed."""
    speeds = ("steps_per_second", "clips_per_second", "input_wait", "mfu", "goodput")
    rows = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "steps are contiguous"
    return {row["step"]: {key: value for key, value in row.items() if key not in speeds} for row in rows}


@pytest.fixture(scope="module")
def straight(world_folder, tmp_path_factory) -> Path:
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("straight")
    train(run_config(world_folder), workdir)
    assert len(losses(workdir)) == STEPS
    return workdir


def command(world: Path, workdir: Path, workers: int = 0) -> list[str]:
    workdir.parent.mkdir(parents=True, exist_ok=True)
    config, made = workdir.parent / f"{workdir.name}.json", run_config(world)
    save_config(made | {"data": made["data"] | {"workers": workers}}, config)
    return ["-m", "vmm", "train", str(config), "--workdir", str(workdir)]


def start(world: Path, workdir: Path, until: int, workers: int = 0):
    """Starts a run in a process of its own, and group, and returns it once `until` steps are logged."""
    arguments = command(world, workdir, workers)
    process = server.start(arguments, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, group=True)
    deadline = time.monotonic() + 240
    while len(read_rows(workdir / "metrics.jsonl")) < until and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def assert_same_run(one: Path, two: Path):
    assert losses(one) == losses(two)
    states = [open_run(workdir).state for workdir in (one, two)]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, states))


def test_killed_at_a_random_step_and_started_again(straight, world_folder, tmp_path):
    """On the same mesh with the same numbers; on another one with nearly the same."""
    workdir, moved = tmp_path / "killed", tmp_path / "moved"
    process = start(world_folder, workdir, random.randint(1, STEPS - 2))
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert len(read_rows(workdir / "metrics.jsonl")) < STEPS
    shutil.copytree(workdir, moved)
    train(run_config(world_folder), workdir)
    assert_same_run(straight, workdir)
    train(run_config(world_folder) | {"mesh": dict(data=2, fsdp=2, tensor=2)}, moved)
    for step, row in losses(straight).items():
        assert losses(moved)[step]["loss"] == pytest.approx(row["loss"], rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_42(number, straight, world_folder, tmp_path):
    """A terminal's Ctrl-C comes to the loader's processes too, which leave it to the trainer."""
    workdir, by_hand = tmp_path / "stopped", number == signal.SIGINT
    process = start(world_folder, workdir, 2, workers=int(by_hand))
    if by_hand:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 42, errors
    assert f"{signal.Signals(number).name}: saved step" in errors and "KeyboardInterrupt" not in errors
    saved = Checkpoints(workdir).latest
    assert saved == len(read_rows(workdir / "metrics.jsonl")), "the step it stopped at was saved"
    train(run_config(world_folder), workdir)
    assert_same_run(straight, workdir)


def test_done_run_is_left_alone(straight, world_folder, capsys):
    before = (straight / "metrics.jsonl").read_bytes()
    assert train(run_config(world_folder), straight) == {}
    assert f"all {STEPS} steps are done" in capsys.readouterr().out
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_evaluating_while_training_changes_nothing(straight, world_folder, tmp_path, monkeypatch):
    """And an evaluation that SIGTERM cut off is made up by the attempt that goes on: the curve has no hole."""
    config = run_config(world_folder) | {"eval_every": 3}

    def cut_off(*_):
        raise Preempted("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr("vmm.session.run_evals", cut_off)
        with pytest.raises(Preempted):
            train(config, tmp_path)
    assert not any("eval/retrieval/V→T/R@1" in row for row in read_rows(tmp_path / "metrics.jsonl"))
    train(config, tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/retrieval/V→T/R@1" in row] == [3, 6]
    mine = [row["loss"] for row in rows if "loss" in row]
    assert mine == [row["loss"] for row in losses(straight).values()]


def test_metrics_are_complete(straight):
    row = read_rows(straight / "metrics.jsonl")[-1]
    for key in (
        "loss",
        "contrast",
        "masked",
        "masked/video",
        "contrast/scale",
        "gradient_norm",
        "learning_rate",
        "clips_per_second",
        "input_wait",
    ):
        assert math.isfinite(row[key]), key
    assert list((straight / "tensorboard").glob("events*"))


def test_another_config_in_the_workdir(straight, world_folder):
    config = run_config(world_folder)
    config["optim"] = config["optim"] | {"learning_rate": 0.5}
    with pytest.raises(UserError, match=r"made by another config.*\n.*optim.learning_rate: 0.001 → 0.5"):
        train(config, straight)


def test_two_jobs_in_one_workdir(world_folder, tmp_path):
    workdir = tmp_path / "locked"
    process = start(world_folder, workdir, 1)
    try:
        with pytest.raises(UserError, match="another job is running in it"):
            train(run_config(world_folder), workdir)
    finally:
        process.kill()
        process.wait()


def test_nan_stops_the_run_and_keeps_the_checkpoint(world_folder, tmp_path):
    config = run_config(world_folder)
    config["optim"] = dict(learning_rate=1e30, warmup=4, clip=0.0)
    config["guard"] = dict(patience=1)
    with pytest.raises(NumericError, match="the loss is .*skipped, after 3 rollbacks"):
        train(config, tmp_path)
    for step in [Checkpoints(tmp_path).latest]:
        if step is not None:
            params = open_run(tmp_path).state.params
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(params)))


def test_data_budget_ends_the_run_with_the_list(world_folder, tmp_path):
    lines = (world_folder / "train.jsonl").read_text().splitlines()
    broken = [json.loads(line) for line in lines]
    for line in broken:
        line["path"] = str(world_folder / line["path"])
    broken[3]["path"] = "not-there.mp4"
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(line) for line in broken))
    config = run_config(world_folder)
    config["data"] = config["data"] | {"train": str(tmp_path / "train.jsonl")}
    with pytest.raises(DataBudgetError, match=r"(?s)1 of 48 files.*1 missing.*not-there.mp4 \(missing\)"):
        train(config, tmp_path / "run")
    config["data"] = config["data"] | {"budget": 0.05}
    assert math.isfinite(train(config, tmp_path / "run")["loss"])


def test_full_disk_is_said_and_the_last_checkpoint_stays(straight, world_folder, tmp_path, monkeypatch):
    """A save that finds no room: one line, exit code 5, and the checkpoint before it restores."""
    import shutil

    workdir = tmp_path / "full"
    shutil.copytree(straight, workdir)
    state = open_run(workdir).state
    checkpoints = Checkpoints(workdir)
    usage = shutil.disk_usage(workdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match="MB needed.*checkpoint of step 8 is intact"):
        checkpoints.save(state, STEPS + 1, (STEPS + 1) * 16)
    monkeypatch.undo()
    checkpoints.close()
    assert open_run(workdir).step == STEPS


def test_save_while_stepping_keeps_the_saved_numbers(straight, world_folder, tmp_path):
    """The next step overwrites donated buffers while the save is under way."""
    run = open_run(straight)
    program = run.experiment.program(run.mesh)
    from vmm.data.loader import Loader
    from vmm.sharding import to_device

    loader = Loader(run.experiment.data, run.experiment.clip, run.experiment.augment, seed=0, batch=16, start=0, stop=4)
    expected = jax.tree.map(np.array, jax.device_get(run.state))
    checkpoints = Checkpoints(tmp_path)
    with jax.set_mesh(run.mesh):
        state = run.state
        checkpoints.save(state, 1, 16)
        for batch in loader:
            state, _ = program.step(state, to_device(batch, run.mesh))
        jax.block_until_ready(state)
        checkpoints.wait()
        saved = checkpoints.restore(program.shapes)
    loader.close()
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(saved.state), expected)
    assert (saved.step, saved.samples) == (1, 16)


def _array_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("**/d/*") if path.stat().st_size > 20_000)


def test_changed_bytes_are_noticed(straight, tmp_path):
    """A flipped bit in the stored arrays never loads in silence."""
    import shutil

    for trial in range(3):
        workdir = tmp_path / str(trial)
        shutil.copytree(straight, workdir)
        path = random.Random(trial).choice(_array_files(workdir / "checkpoints" / str(STEPS)))
        data = bytearray(path.read_bytes())
        data[random.Random(trial).randrange(len(data) // 2, len(data))] ^= 0x10
        path.write_bytes(bytes(data))
        with pytest.raises(UserError, match="changed since they were saved|cannot be read"):
            open_run(workdir)


def test_damaged_description_is_noticed(straight, tmp_path):
    import shutil

    shutil.copytree(straight, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / str(STEPS) / "state" / "_METADATA"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoints/8: cannot be read .*remove that folder"):
        open_run(tmp_path / "run")


def test_checkpoint_of_another_model_gives_a_readable_difference(straight, world_folder):
    from vmm.experiment import Experiment

    config = run_config(world_folder)
    config["objectives"]["contrast"] |= {"width": 48}
    other = Experiment(config).program(None)
    checkpoints = Checkpoints(straight)
    with pytest.raises(
        UserError,
        match=r"(?s)does not fit this model.*ema/objective_contrast/project_text_all/kernel: \(\(16, 16\)",
    ):
        checkpoints.restore(other.shapes)
    checkpoints.close()


def test_keeps_the_newest_checkpoints(straight):
    kept = sorted(int(path.name) for path in (straight / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [6, STEPS]


def test_metric_log_cuts_what_a_dead_run_wrote_after_its_checkpoint(tmp_path):
    log = MetricLog(tmp_path, 0)
    for step in range(1, 6):
        log.write(step, {"loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    log = MetricLog(tmp_path, 3)
    log.write(4, {"loss": float("nan")})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, None),
    ]


def test_other_data_is_told_and_asked_for(world_folder, tmp_path, capsys):
    """A run goes on with the clips it began with, in their order: else one line, or the word to do so."""
    manifest, lines = tmp_path / "train.jsonl", (world_folder / "train.jsonl").read_text().splitlines()[:16]

    def write(chosen):
        told = [json.loads(line) for line in chosen]
        manifest.write_text("".join(json.dumps(row | {"path": str(world_folder / row["path"])}) + "\n" for row in told))

    def run(steps, **more):
        config = tiny_config(world_folder, ("video", "text"), steps=steps, batch=8, save_every=1, **more)
        config["data"] |= {"train": str(manifest)}
        config["optim"] |= {"warmup": 0}
        config["evals"] = {}
        return config

    write(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmm.session.claim", lambda *_: None)  # `steps` is part of it, and stands for a kill here
        train(run(1), tmp_path / "run")
        write(lines[::-1])
        with pytest.raises(UserError, match="step 1 of .*the same clips in another order.*other_data=True") as error:
            train(run(2), tmp_path / "run")
        assert "\n" not in str(error.value)
        train(run(2, other_data=True), tmp_path / "run")
        assert "in another order" in capsys.readouterr().out
        write(lines[::-1])  # the newest checkpoint knows of it
        train(run(3), tmp_path / "run")


def test_checkpoints_that_tell_no_data_resume():
    rows = read_rows_of(3)
    assert changes({}, identity(rows)) == "" == changes(identity(rows), identity(list(rows)))
    assert identity(rows)["ordered"] != identity(rows[::-1])["ordered"]


def test_what_changed_of_the_data_is_told():
    rows = read_rows_of(4)
    for other, told in (
        (rows[:2], "2 clips, 4 then"),
        (rows[::-1], "the same clips in another order"),
        ([row._replace(id=f"x{row.id}") for row in rows], "as many, but other clips"),
    ):
        assert told in changes(identity(rows), identity(other))


def read_rows_of(count: int) -> list[Row]:
    return [Row(str(i), f"{i}.mp4", None, None, (), {}) for i in range(count)]
