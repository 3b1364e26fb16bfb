"""Whatever happens to a run, what comes out is what would have: faults, rollbacks, other devices; and where time went."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, small_config

from vmm.build import save_config
from vmm.data.loader import Loader
from vmm.errors import NumericError, StorageError, UserError
from vmm.run import open_run
from vmm.train import train
from vmm.training.checkpoint import Checkpoints
from vmm.training.faults import InjectedFault, parse_faults
from vmm.training.ledger import ACCOUNTS, Ledger, line, totals
from vmm.training.metrics import read_rows

STEPS = 12
SPEEDS = ("steps_per_second", "clips_per_second", "input_wait", "mfu", "goodput", "skipped")


def config(world: Path, **changes) -> dict:
    """A model so small that a run takes seconds."""
    made = small_config(world, steps=STEPS, batch=16, save_every=3, log_every=1, evals={})
    encoder = dict(kind="video", tubelet=(2, 12, 12), width=16, depth=1, heads=2)
    made["trunk"] = dict(encoders=dict(video=encoder), fusion=dict(kind="late", width=16, depth=0, heads=2))
    made["views"] = dict(masked=dict(video=dict(kind="tube", ratio=0.5)))
    made["objectives"] = dict(
        pixels=dict(kind="masked", view="masked", modalities=("video",), width=16, depth=1, heads=2)
    )
    made["optim"] = dict(learning_rate=1e-3, warmup=2, ema=0.9)
    return made | {"mesh": dict(fsdp=2)} | changes


def rows(workdir: Path) -> dict[int, dict]:
    found = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, len(found) + 1)), "steps are contiguous"
    return {row["step"]: {k: v for k, v in row.items() if k not in SPEEDS} for row in found}


def final(workdir: Path):
    return jax.device_get(open_run(workdir).state)


def same_state(one, two):
    jax.tree.map(np.testing.assert_array_equal, one._replace(guard=()), two._replace(guard=()))


@pytest.fixture(scope="module")
def straight(world_folder, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("straight")
    train(config(world_folder), workdir)
    return workdir


def faulty(monkeypatch, text: str):
    monkeypatch.setenv("VMM_FAULT", text)


class Recording(Loader):
    """Writes down what it gives."""

    seen: list = []

    def __iter__(self):
        for batch in super().__iter__():
            Recording.seen.append(np.asarray(batch.index).tolist())
            yield batch


@pytest.mark.exhaustive("the run that goes back skips steps too; test_guard.py has the numbers")
def test_one_nan_is_one_skipped_step(straight, world_folder, tmp_path, monkeypatch, capsys):
    faulty(monkeypatch, "nan@5")
    Recording.seen = []
    train(config(world_folder), tmp_path, loader=Recording)
    mine, theirs = rows(tmp_path), rows(straight)
    assert [step for step, row in mine.items() if row["skipped/row"]] == [5]
    for step in range(1, 5):  # a poisoned step is another program: to rounding
        assert mine[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)
    assert mine[5]["loss"] is None and mine[6]["loss"] != theirs[6]["loss"]
    assert [row["learning_rate"] for row in mine.values()] == [row["learning_rate"] for row in theirs.values()]
    state = final(tmp_path)
    assert (int(state.step), int(state.guard.skipped), int(state.guard.row)) == (STEPS, 1, 0)
    record = json.loads((tmp_path / "evidence" / "step_5.json").read_text())
    assert [sample["index"] for sample in record["samples"]] == Recording.seen[4]
    assert set(record["layers"]) >= {"model/encoder_video/stack/blocks/layer_0", "objective_pixels/video"}
    assert "step 5: the loss is nan" in capsys.readouterr().out
    # The fault has happened: the same command again does not meet it, and finds the run done.
    assert train(config(world_folder), tmp_path) == {}


def test_trouble_goes_back_passes_over_and_goes_on(straight, world_folder, tmp_path, monkeypatch, capsys):
    """Steps 7 and 8 are bad, the guard's patience is 2: back to 6, and on without them."""
    faulty(monkeypatch, "nan@7,nan@8")
    made = config(world_folder, guard=dict(patience=2), save_every=2)
    train(made, tmp_path / "run")
    assert "back to step 6, steps 7 to 8 are passed over" in capsys.readouterr().out
    mine, theirs = rows(tmp_path / "run"), rows(straight)
    for step in range(1, 7):  # two poisoned steps are another program: to rounding
        assert mine[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)
    assert [step for step, row in mine.items() if "passed_over" in row] == [7, 8]
    record = json.loads((tmp_path / "run" / "rollbacks.json").read_text())
    assert [(r["first"], r["last"], r["restored"], r["done"]) for r in record] == [(7, 8, 6, True)]
    # A restart that finds the rollback written down passes over the same steps.
    faulty(monkeypatch, "nan@98,nan@99")  # which are never reached: the same program, so bit for bit
    again = tmp_path / "again"
    again.mkdir()
    (again / "rollbacks.json").write_text(json.dumps(record))
    train(made, again)
    same_state(final(again), final(tmp_path / "run"))


def test_later_checkpoints_are_put_away(straight, world_folder, tmp_path, monkeypatch):
    """A rollback that was written down, not done: checkpoints after the trouble began are moved, and training goes on."""
    import shutil

    shutil.copytree(straight, tmp_path / "run")
    trouble = {"first": 10, "last": 11, "restored": 9, "why": "", "done": False}
    (tmp_path / "run" / "rollbacks.json").write_text(json.dumps([trouble]))
    train(config(world_folder), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints-quarantined").iterdir()] == ["12"]
    assert json.loads((tmp_path / "run" / "rollbacks.json").read_text())[0]["done"]
    state = final(tmp_path / "run")
    assert int(state.step) == STEPS and int(state.guard.skipped) == 2


def test_a_run_that_cannot_be_helped_stops(world_folder, tmp_path):
    made = config(world_folder, guard=dict(patience=2, rollbacks=1))
    made["optim"] = dict(learning_rate=1e30, warmup=4, clip=0.0)
    with pytest.raises(NumericError, match=r"the loss is (nan|inf).*after 1 rollbacks") as caught:
        train(made, tmp_path)
    assert caught.value.code == 4
    assert len(json.loads((tmp_path / "rollbacks.json").read_text())) == 1


def test_full_disk_exception_and_sigterm_on_demand(straight, world_folder, tmp_path, monkeypatch):
    """Each happens once: the same command again goes on, and what comes out is the straight run."""
    from vmm.errors import Preempted

    faulty(monkeypatch, "diskfull@5, raise:0@8,term@10,kill:3@2")
    with pytest.raises(StorageError, match="No space left.*checkpoint of step 3 is intact"):
        train(config(world_folder), tmp_path)
    assert len(rows(tmp_path)) == 6, "told by the save itself"
    with pytest.raises(InjectedFault, match="raise:0@8"):
        train(config(world_folder), tmp_path)
    with pytest.raises(Preempted, match="SIGTERM: saved step 10"):
        train(config(world_folder), tmp_path)
    train(config(world_folder), tmp_path)
    assert rows(tmp_path) == rows(straight)
    same_state(final(tmp_path), final(straight))
    # Where the time went: what attempts say adds up to the wall clock.
    told = read_rows(tmp_path / "goodput.jsonl")
    assert [row["attempt"] for row in told] == [1, 2, 3, 4]
    seconds = totals(told)
    assert sum(seconds.values()) == pytest.approx(told[-1]["at"] - told[0]["began"], rel=0.01)
    assert seconds["again"] > 0 and seconds["restore"] > 0 and seconds["saving"] > 0 and seconds["compile"] > 0
    assert "4 starts" in line(seconds, 4)


def test_damaged_newest_checkpoint_is_passed_by(straight, world_folder, tmp_path, monkeypatch, capsys):
    """A bit flips, then SIGKILL: the restart goes on from the checkpoint before, in a process with other devices too."""
    workdir = tmp_path / "run"
    save_config(config(world_folder), tmp_path / "config.json")
    command = [sys.executable, "-m", "vmm", "train", str(tmp_path / "config.json"), "--workdir", str(workdir)]
    began = time.time()
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"VMM_FAULT": "flip@11,kill@11"}, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    train(config(world_folder, mesh=dict(data=1, fsdp=-1)), workdir)
    assert "step 6 is next" in capsys.readouterr().out
    for step, row in rows(straight).items():
        assert rows(workdir)[step]["loss"] == pytest.approx(row["loss"], rel=1e-5)
    # The ledger counts from the first start, over both processes.
    told = read_rows(workdir / "goodput.jsonl")
    assert told[0]["began"] - began < 5
    wall = time.time() - told[0]["began"]
    assert sum(totals(told).values()) == pytest.approx(told[-1]["at"] - told[0]["began"], rel=0.01)
    assert told[-1]["at"] - told[0]["began"] <= wall


def test_wrong_faults():
    assert [(f.kind, f.process, f.step) for f in parse_faults("kill:1@13, nan@20")] == [
        ("kill", 1, 13),
        ("nan", None, 20),
    ]
    for text in ("kill", "kill@", "kill:x@3", "explode@3", "kill@0"):
        with pytest.raises(UserError, match="VMM_FAULT"):
            parse_faults(text)


def test_wrong_first_config_can_be_mended(world_folder, tmp_path):
    made = config(world_folder, steps=3)
    with pytest.raises(UserError):
        train(made | {"init_from": str(tmp_path / "not-there")}, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").exists()
    train(made, tmp_path / "run")
    with pytest.raises(UserError, match="made by another config"):
        train(made | {"seed": 5}, tmp_path / "run")


def test_ledger_adds_up(tmp_path):
    """Two attempts: every account, the time between, and what is done again."""
    rng = random.Random(0)

    def attempt(first: int, last: int, began: float):
        with Ledger(tmp_path, began, True) as ledger:
            for step in range(first, last + 1):
                ledger.stepping(step)
                with ledger.during("input"):
                    time.sleep(rng.uniform(0, 0.004))
                time.sleep(0.01)
            ledger.write(last)
            return ledger

    begin = time.time()
    attempt(1, 6, begin)
    time.sleep(0.2)
    ledger = attempt(4, 9, time.time())
    seconds, wall = ledger.total(), time.time() - begin
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01)
    assert set(seconds) == set(ACCOUNTS) and 0.2 <= seconds["down"] < wall
    # Three steps again, nine for the first time; a busy machine makes each longer.
    assert 0.03 <= seconds["again"] < seconds["steps"] and seconds["steps"] >= 0.09
    assert ledger.share() == pytest.approx(seconds["steps"] / wall, rel=0.1)
    assert Checkpoints(tmp_path).latest is None


def test_verify_resume_compares(tmp_path, monkeypatch, capsys):
    """The table of `vmm verify-resume` for children that answer as they are told."""
    from vmm import verify

    answers = []

    def child(workdir, config, place, fault=""):
        workdir.mkdir(exist_ok=True)
        if fault:
            return {}
        losses, samples, shift = answers.pop(0)
        np.savez(workdir / "parameters.npz", w=np.array([3.0, 4.0]) + shift)
        return {"samples": samples, "losses": losses, "parameters": workdir / "parameters.npz"}

    monkeypatch.setattr(verify, "_train", child)
    monkeypatch.setattr(verify, "places", lambda config: ({"mesh": {}}, {"mesh": {"fsdp": 2}}, "others"))
    given, other = {1: ([0], "a")}, {1: ([1], "a")}
    good = ([1.0, 0.5], given, 0.0)
    made = dict(data={}, optim=dict(warmup=100))
    for second, third, fine in (
        (good, ([1.0, 0.5 + 4e-6], given, 1e-4), True),
        (([1.0, 0.5 + 1e-9], given, 0.0), good, False),  # the same devices: bit for bit
        (good, ([1.0, 0.51], given, 0.0), False),
        (good, ([1.0, 0.5], given, 0.1), False),
        (good, ([1.0, 0.5], other, 0.0), False),
        (good, ([1.0], given, 0.0), False),
    ):
        answers[:] = [good, second, third]
        assert verify.verify_resume(made, 8, tmp_path, seed=0) is fine
    assert "DIFFERENT" in capsys.readouterr().out
    assert verify.short(made, 8)["optim"]["warmup"] == 2
