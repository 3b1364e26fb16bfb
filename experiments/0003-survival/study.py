"""A run killed, stopped, damaged and starved again and again: what comes out must be what an uninterrupted run gives.

    python experiments/0003-survival/study.py --kills 50 --terms 20 --flips 100 --minutes 30

Goes on where it was stopped: results.jsonl holds one line an event. A run of a tiny model on the synthetic world lasts
for many events; when it ends, its metrics are compared with the straight run's, bit for bit.
"""

import argparse
import collections
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vmm.build import load_config, save_config
from vmm.data import world
from vmm.training.metrics import read_rows

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE = 1000, 50
SPEEDS = ("steps_per_second", "clips_per_second", "input_wait", "mfu", "goodput")
OUT = Path(__file__).with_name("results.jsonl")


def config(folder: Path) -> dict:
    """A video-only masked model of 16 wide: a start takes seconds, a step milliseconds."""
    made = load_config(str(ROOT / "configs" / "demo.py") + ":small")
    made["data"] |= {"train": f"{folder}/train.jsonl", "tokenizer": f"{folder}/tokenizer.json", "workers": 0}
    made["data"]["clip"] = dict(seconds=2.0, frames=4, size=24, sample_rate=16000, text_length=24)
    encoder = dict(kind="video", tubelet=(2, 12, 12), width=16, depth=1, heads=2)
    made["trunk"] = dict(encoders=dict(video=encoder), fusion=dict(kind="late", width=16, depth=0, heads=2))
    made["views"] = dict(masked=dict(video=dict(kind="tube", ratio=0.5)))
    made["objectives"] = dict(
        pixels=dict(kind="masked", view="masked", modalities=("video",), width=16, depth=1, heads=2)
    )
    made["optim"] = dict(learning_rate=1e-3, warmup=5, ema=0.99)
    return made | dict(steps=STEPS, batch=8, save_every=SAVE, log_every=1, evals={})


def environment() -> dict:
    return dict(os.environ) | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def start(folder: Path, workdir: Path, **named) -> subprocess.Popen:
    command = [sys.executable, "-m", "vmm", "train", str(folder / "config.json"), "--workdir", str(workdir)]
    with open(folder / "last.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT, **named)


def curve(workdir: Path) -> list[dict]:
    rows = read_rows(workdir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in SPEEDS} for row in rows]


def last_step(workdir: Path) -> int:
    return max((row["step"] for row in read_rows(workdir / "metrics.jsonl")), default=0)


def newest(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def resumed(folder: Path) -> int:
    """The step that the last start went on from, as it said; it says so only of a checkpoint whose digests are right."""
    found = re.search(r"goes on from step (\d+)", (folder / "last.log").read_text())
    return int(found[1]) if found else 0


def note(**row) -> None:
    with open(OUT, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def interrupt(folder: Path, workdir: Path, number: signal.Signals, rng: random.Random) -> None:
    """One start, hit at a random moment: mostly amid steps and saves, at times before the first step."""
    before, known = last_step(workdir), newest(workdir)
    process = start(folder, workdir)
    early = number == signal.SIGKILL and rng.random() < 0.15
    target = before + rng.randint(1, 3 * SAVE // 2)
    until = time.monotonic() + (rng.uniform(0, 8) if early else 180)
    while process.poll() is None and time.monotonic() < until:
        if not early and last_step(workdir) >= target:
            break
        time.sleep(0.003)
    time.sleep(rng.uniform(0, 0.03))
    if process.poll() is None:
        process.send_signal(number)
    code = process.wait()
    said = resumed(folder)
    right = code == -signal.SIGKILL if number == signal.SIGKILL else code == 42
    if code == 0:
        return  # it was done before it was hit
    row = {"kind": number.name, "code": code, "resumed": said, "reached": last_step(workdir), "saved": newest(workdir)}
    # A start that was hit before it could say anything resumed from nothing.
    whole = known == said or (early and said == 0)
    lost = max(0, row["reached"] - row["saved"])
    # Steps here are so short that a save, in the background, takes as long as many: one that was under way is lost too.
    under_way = any(not path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))
    within = lost < SAVE + 1 or (under_way and lost < 2 * SAVE + 1)
    note(**row, lost=lost, under_way=under_way, fine=bool(right and whole and within))


def rounds(folder: Path, done: collections.Counter, wanted: dict, deadline: float, rng: random.Random) -> None:
    straight = folder / "straight"
    if last_step(straight) < STEPS:
        assert start(folder, straight).wait() == 0, (folder / "last.log").read_text()
    number = sum(1 for path in folder.glob("run-*"))
    while time.monotonic() < deadline and any(done[kind] < wanted[kind] for kind in wanted):
        number += 1
        workdir = folder / f"run-{number}"
        while True:
            open_kinds = [kind for kind in wanted if done[kind] < wanted[kind]]
            if not open_kinds or time.monotonic() > deadline or last_step(workdir) > STEPS - 2 * SAVE:
                break
            kind = rng.choices(open_kinds, [wanted[kind] - done[kind] for kind in open_kinds])[0]
            interrupt(folder, workdir, getattr(signal, kind), rng)
            done = counted()
        code = start(folder, workdir).wait()
        note(kind="run", code=code, events=sum(done.values()), fine=code == 0 and curve(workdir) == curve(straight))


def flips(wanted: int) -> None:
    """Single bits of the bytes of arrays of a checkpoint: told of, or nothing that is read has changed."""
    import jax
    import numpy as np

    from vmm.training.checkpoint import Checkpoints, Damaged
    from vmm.training.step import State

    rng = np.random.default_rng(0)
    parts = {f"layer_{i}": {"kernel": rng.normal(size=(64, 64)).astype(np.float32)} for i in range(8)}
    state = State(*jax.device_put((np.int32(7), parts, {"mu": parts}, (), {})))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save(state, 1, 8)
        checkpoints.wait()
        files = [path for path in sorted(checkpoints.folder.glob("1/**/d/*")) if path.stat().st_size]
        sizes = [path.stat().st_size for path in files]
        draw, counts = random.Random(0), collections.Counter()
        while counts["told"] < wanted:
            path = draw.choices(files, sizes)[0]
            whole = path.read_bytes()
            bit = draw.randrange(8 * len(whole))
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                found = jax.device_get(checkpoints.restore(shapes).state)
                equal = all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(jax.device_get(state))))
                counts["dead byte, state right" if equal else "wrong in silence"] += 1
            except Damaged:
                counts["told"] += 1
            path.write_bytes(whole)
        checkpoints.close()
    note(kind="flips", **counts, fine=counts["wrong in silence"] == 0)


def full_disk(folder: Path) -> None:
    """Room for one checkpoint, not for two: a small tmpfs; and files that may not grow, so that the write itself fails."""
    place = folder / "small"
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        note(kind="tmpfs", skipped=mounted.stderr.decode().strip() or "mount is not permitted", fine=True)
    else:
        try:
            code = start(folder, place / "run").wait()
            said = (folder / "last.log").read_text().strip().splitlines()[-1]
            reached, saved = last_step(place / "run"), newest(place / "run")
            shutil.copytree(place / "run", folder / "starved", dirs_exist_ok=True)
        finally:
            subprocess.run(["umount", str(place)], check=True)
        again = start(folder, folder / "starved").wait()
        fine = code == 5 and saved > 0 and resumed(folder) == saved and again == 0
        note(kind="tmpfs", code=code, reached=reached, saved=saved, said=said, fine=fine)
        shutil.rmtree(folder / "starved")
    workdir = folder / "limited"
    process = start(folder, workdir)
    while newest(workdir) < SAVE and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = newest(workdir)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    code = start(folder, workdir, preexec_fn=limit).wait()
    said = (folder / "last.log").read_text().strip().splitlines()[-1]
    reached = last_step(workdir)
    again = start(folder, workdir).wait()
    fine = code == 5 and resumed(folder) == before and again == 0 and curve(workdir) == curve(folder / "straight")
    note(kind="file limit", code=code, reached=reached, saved=before, said=said, fine=fine)


def counted() -> collections.Counter:
    return collections.Counter(row["kind"] for row in read_rows(OUT))


def summary() -> bool:
    rows = read_rows(OUT)
    print("| what | times | as it should be | most steps lost |\n|---|---:|---:|---:|")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        lost = max((row.get("lost", 0) for row in mine), default=0)
        times = sum(row.get("told", 1) for row in mine)
        right = sum(row.get("told", 1) for row in mine if row["fine"])
        print(f"| {kind} | {times} | {right} | {lost if kind.startswith('SIG') else ''} |")
    return all(row["fine"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="begin no event after so many (default %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/0003-survival"), help="of the runs (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: another each time)")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "world" / "train.jsonl").is_file():
        world.generate(folder / "world", {"train": 48, "validation": 8, "test": 8}, seed=0)
    save_config(config(folder / "world"), folder / "config.json")
    done = counted()
    if not done["flips"] and args.flips:
        flips(args.flips)
    rounds(folder, done, {"SIGKILL": args.kills, "SIGTERM": args.terms}, deadline, random.Random(args.seed))
    if not done["file limit"] and time.monotonic() < deadline:
        full_disk(folder)
    sys.exit(not summary())


if __name__ == "__main__":
    main()
