"""Puts classic bugs into a checkout, one at a time, and runs the tests that should notice.

python experiments/0010-seeded-bugs/seeds.py CHECKOUT [NAME …] [--python PYTHON] [--out rows.json]

CHECKOUT: a clean clone or worktree to spoil; each file is put back as it was. A bug counts as caught where a test that passes
without it fails with it; the table names the first.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Bug(NamedTuple):
    """files: where it may stand, the first that exists and holds `old` is taken. tests: files that should turn red."""

    what: str
    files: tuple[str, ...]
    old: str
    new: str
    tests: tuple[str, ...]


BUGS = {
    "negatives-stopped": Bug(
        "no gradient through the other side's embeddings of a softmax contrast",
        ("vmm/losses.py",),
        "    logits = scale * first @ second.T\n",
        "    logits = scale * first @ jax.lax.stop_gradient(second).T\n",
        ("tests/test_losses.py", "tests/test_objective_numbers.py"),
    ),
    "epoch-order": Bug(
        "every epoch in the same order",
        ("vmm/data/order.py",),
        "return epoch, shuffled(place, size, seed, epoch)",
        "return epoch, shuffled(place, size, seed, 0)",
        ("tests/test_order.py", "tests/test_loader.py"),
    ),
    "same-crops": Bug(
        "the same random window and crop of a clip in every epoch",
        ("vmm/data/samples.py",),
        "rng = np.random.default_rng([self.seed, epoch, row, attempt])",
        "rng = np.random.default_rng([self.seed, 0, row, attempt])",
        ("tests/test_loader.py", "tests/test_clips.py", "tests/test_media.py"),
    ),
    "rotation": Bug(
        "a phone's rotation ignored",
        ("vmm/data/reading/geometry.py", "vmm/data/media.py"),
        "turns = round(frame.rotation / 90) % 4",
        "turns = 0",
        ("tests/test_media.py", "tests/test_clips.py", "tests/test_transcode.py"),
    ),
    "same-masks": Bug(
        "the same masks in every step",
        ("vmm/training/step.py",),
        "key = jax.random.fold_in(jax.random.key(seed), state.step)",
        "key = jax.random.key(seed)",
        ("tests/test_train.py", "tests/test_sharding.py"),
    ),
    "rule-of-nothing": Bug(
        "sharding rules that match nothing: every parameter whole on every device",
        ("vmm/sharding.py",),
        "        rule = RULES[name] if name is not None else None\n        parts =",
        "        rule = None\n        parts =",
        ("tests/test_sharding.py",),
    ),
    "schedule-late": Bug(
        "the learning rate is that of the step before",
        ("vmm/training/optim.py",),
        "optax.scale_by_learning_rate(schedule(optim, steps))",
        "optax.scale_by_learning_rate(lambda count: schedule(optim, steps)(jnp.maximum(count - 1, 0)))",
        ("tests/test_optim.py", "tests/test_train.py"),
    ),
    "decay-of-all": Bug(
        "weight decay on biases, norms and the temperature",
        ("vmm/training/optim.py",),
        '((".*/kernel", 1.0), (".*", 0.0))',
        '((".*", 1.0),)',
        ("tests/test_optim.py",),
    ),
    "scale-unclamped": Bug(
        "the temperature may grow without limit",
        ("vmm/objectives/contrastive.py",),
        "log_scale = self.log_scale - jax.lax.stop_gradient(jnp.maximum(self.log_scale - math.log(self.max_scale), 0.0))",
        "log_scale = self.log_scale",
        ("tests/test_objectives.py", "tests/test_objective_numbers.py"),
    ),
    "nan-applied": Bug(
        "a step whose loss is not a number is applied",
        ("vmm/training/guard.py",),
        "good = jnp.isfinite(loss) & jnp.isfinite(norm)",
        "good = jnp.isfinite(loss) | True",
        ("tests/test_guard.py",),
    ),
    "student-teaches": Bug(
        "the teacher is the student itself, not its running average",
        ("vmm/training/step.py",),
        "state.ema if optim.ema else params",
        "params",
        ("tests/test_optim.py", "tests/test_latent.py"),
    ),
    "average-stuck": Bug(
        "the running average hardly moves",
        ("vmm/training/optim.py",),
        "e + (1.0 - d) * (p - e)",
        "(e.astype(jnp.bfloat16) + ((1.0 - d) * (p - e)).astype(jnp.bfloat16)).astype(e.dtype)",
        ("tests/test_optim.py", "tests/test_average.py"),
    ),
    "bit-rot": Bug(
        "bytes of a checkpoint that changed are loaded",
        ("vmm/training/checkpoint.py",),
        "        if wrong:\n            raise Damaged(",
        "        if False:\n            raise Damaged(",
        ("tests/test_checkpoint.py",),
    ),
    "padding-counts": Bug(
        "the rows that fill up the last batch are scored",
        ("vmm/evaluate.py",),
        "value[keep] for key, value in values.items()",
        "value for key, value in values.items()",
        ("tests/test_evals.py",),
    ),
    "ties-hit": Bug(
        "equal similarities count as hits",
        ("vmm/evals/retrieval.py",),
        "return np.clip((k - above) / (level + 1.0), 0.0, 1.0)",
        "return np.clip((k - above) / (0 * level + 1.0), 0.0, 1.0)",
        ("tests/test_evals.py",),
    ),
    "typo-ignored": Bug(
        "a key that no one knows is ignored",
        ("vmm/build.py",),
        "        if key not in known:\n            raise",
        "        if key not in known:\n            spec = {name: spec[name] for name in spec if name != key}\n            continue\n            raise",
        ("tests/test_build.py",),
    ),
}


def failing(checkout: Path, python: str, tests: list[str]) -> str:
    """Returns the name of the first failing test; "" where all pass. Raises SystemExit where the tests cannot run."""
    command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no", *tests]
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or (done.returncode and not found):
        raise SystemExit(f"tests do not run: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-500:]}")
    return found.group(1) if found else ""


def seed(checkout: Path, python: str, bug: Bug) -> dict:
    """Returns whether a bug was caught, and by which test."""
    places = [checkout / name for name in bug.files if (checkout / name).is_file()]
    place = next((path for path in places if bug.old in path.read_text()), None)
    if place is None:
        raise SystemExit(f"{bug.what}: its place is not in {checkout}: the code has changed, and so must the seed")
    kept = place.read_text()
    try:
        place.write_text(kept.replace(bug.old, bug.new, 1))
        test = ""
        for file in bug.tests:
            if (checkout / file).is_file():
                test = test or failing(checkout, python, [file])
    finally:
        place.write_text(kept)
    # A test that is red anyway catches nothing.
    real = bool(test) and not failing(checkout, python, [test])
    return {"caught": real, "test": test.removeprefix("tests/") if real else ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BUGS)}; default: all")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in BUGS]
    if unknown:
        parser.error(f"no bug {unknown[0]!r}; known: {', '.join(BUGS)}")
    rows = {}
    print("| bug | caught by |\n|---|---|")
    for name in given.names or BUGS:
        rows[name] = seed(given.checkout.resolve(), given.python, BUGS[name])
        print(f"| {BUGS[name].what} | {rows[name]['test'] or 'NOT CAUGHT'} |", flush=True)
        if given.out:
            given.out.write_text(json.dumps(rows, indent=1) + "\n")
    missed = [name for name, row in rows.items() if not row["caught"]]
    print(f"{len(rows) - len(missed)} of {len(rows)} caught" + (f"; not: {', '.join(missed)}" if missed else ""))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
