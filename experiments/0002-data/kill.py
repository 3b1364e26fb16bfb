"""`vmm data build` killed again and again: what comes out must be what an uninterrupted build gives, byte for byte.

    python experiments/0002-data/kill.py --kills 20

Clips of the synthetic world are built once straight; then in other folders, where SIGKILL hits the building process at
random moments, and every other time its children with it, before it may end.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vmm.data import world

ROOT = Path(__file__).resolve().parents[2]


def command(source: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "vmm", "data", "build", str(source), str(out), "--workers", "2", "--shard", "16"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def killed(source: Path, out: Path, after: float, together: bool) -> bool:
    """Starts a build and kills it after some seconds of work; returns False where it ended by itself."""
    process = subprocess.Popen(command(source, out), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    # Starting Python takes longer than many a build here: moments count from the plan on.
    while process.poll() is None and not (out / ".build" / "plan.json").is_file():
        time.sleep(0.005)
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        (os.killpg if together else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clips", type=int, default=160, help="of the world (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        world.generate(folder / "world", {"train": args.clips, "validation": 8, "test": 8}, seed=args.seed)
        source, out = folder / "world" / "train.jsonl", folder / "out"
        begin = time.monotonic()
        subprocess.run(command(source, folder / "straight"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        length = time.monotonic() - begin
        rng, kills, rounds, equal = random.Random(args.seed), 0, 0, True
        while kills < args.kills:
            # A round: kills until the build has ended once; then it is compared, and another begins.
            rounds += 1
            out = folder / f"out-{rounds}"
            while kills < args.kills:
                # Some moments lie within the start, some in the work, some in the end.
                hit = killed(source, out, rng.uniform(0.0, 0.5) * length, together=bool(kills % 2))
                kills += hit
                if not hit:
                    break
            subprocess.run(command(source, out), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            same = tree(out) == tree(folder / "straight")
            equal = equal and same
            print(f"after {kills} kills: {'identical' if same else 'DIFFERENT'}", flush=True)
        print(
            f"{kills} kills in {rounds} builds of {args.clips} clips ({length:.1f} s straight): all identical: {equal}"
        )
    sys.exit(not equal)


if __name__ == "__main__":
    main()
