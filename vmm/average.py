"""vmm average: the mean of several checkpoints' parameters → a run with that one checkpoint."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vmm.build import differences, digest, load_config, save_config, write_text
from vmm.config import numbers
from vmm.errors import UserError, one_of
from vmm.evaluate import Predict, measure
from vmm.experiment import Experiment
from vmm.paths import to_path
from vmm.progress import progress
from vmm.run import weights
from vmm.sharding import MeshShape, make_mesh
from vmm.source import asked_of
from vmm.training.checkpoint import Checkpoints
from vmm.training.step import State

# Parts of the trunk that change how it is trained, and not what it computes of its parameters.
_FREE = ("dropout", "drop_path", "remat")


class Member(NamedTuple):
    """A checkpoint's weights, as `weights` gives them. values: parameter path with dots → array."""

    run: str
    step: int
    config: str
    values: dict


def average(
    workdirs: Sequence[str | Path],
    out: str | Path,
    last: int = 1,
    steps: Sequence[int] = (),
    greedy: str = "",
) -> list[dict]:
    """Writes a run whose weights are the mean of checkpoints': `vmm eval`, `vmm publish` and `init_from` take it as any run.

    The mean is of the running averages where the runs keep them, else of the parameters; of equal weights, summed in
    float64. With the last checkpoints of one run this is what Izmailov et al. 2018 average (SWA); with runs that were
    fine-tuned from one start, a uniform soup (Wortsman et al. 2022). Config and optimizer are those of the first run.

    Args:
      last: how many of each run's newest checkpoints. steps: these instead, of each run.
      greedy: "NAME:max" or "NAME:min", a number of the first run's evaluators: the best checkpoint alone, and then, from
        good to bad, each with which that number of the mean gets better (Wortsman et al. 2022, recipe 1, which also takes
        those with which it stays). Choose on clips that nothing is reported of: evals.*.data must not be the test split.

    Returns:
      The members: run, step, config, and with `greedy` score (alone) and taken.

    Raises:
      UserError: no such run or checkpoint, the models differ, no such number, or `out` holds a run.
    """
    out = to_path(out)
    if (out / "checkpoints").exists() or (out / "config.json").exists():
        raise UserError(f"{out}: holds a run already; choose another folder")
    name, better = _goal(greedy) if greedy else ("", 0)
    names = [str(to_path(workdir)) for workdir in workdirs]  # one spelling of each
    configs = {workdir: _config(to_path(workdir)) for workdir in names}
    first = names[0]
    experiments = {workdir: Experiment(config) for workdir, config in configs.items()}
    for workdir in configs:
        _same_model(experiments[first], experiments[workdir], first, workdir)
    _tell_starts(configs)
    members, state, samples = [], None, 0
    with progress("reading checkpoints") as tell:
        for number, (workdir, experiment) in enumerate(experiments.items()):
            tell(number, len(experiments))
            config = digest(numbers(configs[workdir]))
            found, newest, count = _members(to_path(workdir), experiment, config, last, steps)
            members += found
            if state is None:
                state, samples = newest, count
    if len(members) < 2:
        raise UserError(f"{first}: one checkpoint alone has no mean; give --last, --steps or further runs")
    told = [{"run": one.run, "step": one.step, "config": one.config} for one in members]
    taken = list(range(len(members)))
    if greedy:
        with progress("scoring means") as tell:
            taken, scores = _greedy(members, scorer(experiments[first], name), better, tell)
        told = [one | {"score": value, "taken": i in taken} for i, (one, value) in enumerate(zip(told, scores))]
    values = mean([members[i].values for i in taken])
    step = max(one.step for one in members if one.run == first)
    _write(out, configs[first], state, values, step, samples)
    kept = [one for one in told if one.get("taken", True)]
    write_text(
        out / "average.json", json.dumps({"members": kept, "greedy": greedy, "candidates": told}, indent=1) + "\n"
    )
    save_config(configs[first], out / "config.json")  # last: only with it the folder is a run
    return told


def mean(trees: Sequence[dict]) -> dict:
    """Returns path → the mean over trees of path → array, summed in float64, in the arrays' own dtype."""
    return {
        name: (sum(np.asarray(tree[name], np.float64) for tree in trees) / len(trees)).astype(value.dtype)
        for name, value in trees[0].items()
    }


def _config(workdir: Path) -> dict:
    if not (workdir / "config.json").is_file() or not (workdir / "checkpoints").is_dir():
        raise UserError(f"run {workdir}: holds no config.json and checkpoints; give the workdir of a `vmm train`")
    return load_config(str(workdir / "config.json"))


def _same_model(ours: Experiment, theirs: Experiment, our: str, their: str) -> None:
    """Raises UserError where two runs' parameters do not mean the same."""
    sizes = [{k: v.shape for k, v in flatten_dict(nn.unbox(e.shapes), sep=".").items()} for e in (ours, theirs)]
    for key in sorted(set(sizes[0]) | set(sizes[1])):
        one, two = (each.get(key, "lacks it") for each in sizes)
        if one != two:
            raise UserError(
                f"{their}: has other parameters than {our}, the first {key}: {two}, there {one}; no mean of both"
            )
    parts = [
        {"trunk": e.config.trunk, "adapt": dict(e.config.adapt), "clip": vars(e.clip), "data": asked_of(e.config.data)}
        for e in (ours, theirs)
    ]
    other = [line for line in differences(*parts) if line.partition(":")[0].rpartition(".")[2] not in _FREE]
    if other:
        raise UserError(f"{their}: is another model than {our} (there → here: {other[0]}); no mean of both")
    if _digest(ours.data.tokenizer) != _digest(theirs.data.tokenizer) and "text" in ours.modalities:
        raise UserError(f"{their}: has another tokenizer than {our}; no mean of both")


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else "gone"


def _tell_starts(configs: dict) -> None:
    starts = {json.dumps([c.get("init_from") or {"seed": c.get("seed", 0)}], sort_keys=True) for c in configs.values()}
    if len(starts) > 1:
        print("these runs began from different parameters: a mean is good only of runs that are near each other")


def _members(
    workdir: Path, experiment: Experiment, config: str, last: int, steps: Sequence[int]
) -> tuple[list[Member], State, int]:
    """Returns a run's members, oldest first, and the newest's whole state and samples."""
    mesh = make_mesh(MeshShape(), jax.local_devices()[:1])
    checkpoints = Checkpoints(workdir, experiment.config.keep)
    try:
        known = checkpoints.steps
        wanted = sorted(steps) or known[-last:]
        missing = [step for step in wanted if step not in known]
        if missing or (not steps and len(known) < last):
            raise UserError(
                f"run {workdir}: has checkpoints of steps {', '.join(map(str, known)) or 'none'}, not "
                f"{f'of step {missing[0]}' if missing else f'{last}'}; `keep` ({experiment.config.keep}) says how many stay"
            )
        program, found = experiment.program(mesh), []
        for step in wanted:
            with jax.set_mesh(mesh):
                saved = checkpoints.restore(program.shapes, step)
            flat = flatten_dict(jax.device_get(weights(saved.state)), sep=".")
            found.append(Member(str(workdir), step, config, {name: np.asarray(x) for name, x in flat.items()}))
        return found, saved.state, saved.samples
    finally:
        checkpoints.close()


def _write(out: Path, config: dict, state: State, values: dict, step: int, samples: int) -> None:
    """Saves a state whose parameters, and running average where it has one, are the values."""
    tree = unflatten_dict(values, sep=".")

    def placed(old):
        return jax.tree.map(lambda x, new: jax.device_put(new, x.sharding), old, tree)

    state = state._replace(
        params=placed(state.params), ema=placed(state.ema) if jax.tree.leaves(state.ema) else state.ema
    )
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(out, config.get("keep", 2))
    checkpoints.save(state, step, samples)
    checkpoints.close()


def _goal(text: str) -> tuple[str, int]:
    """Returns (name, 1: the highest is best, −1: the lowest) of "NAME:max" or "NAME:min"; raises UserError."""
    name, _, goal = text.rpartition(":")
    if not name or goal not in ("min", "max"):
        raise UserError(f"--greedy {text}: say which way, as labels/VA/shape:max")
    return name, 1 if goal == "max" else -1


def scorer(experiment: Experiment, name: str) -> Callable[[dict], float]:
    """Returns path → array to the number of the experiment's evaluators; the data's predictions are compiled once."""
    predict = Predict(experiment, None, experiment.make_mesh())

    def score(values: dict) -> float:
        predict.params = jax.tree.map(jnp.asarray, unflatten_dict(values, sep="."))
        predict.memory.clear()
        found = measure(experiment, predict).values
        if name not in found:
            raise UserError(f"--greedy {name}: the evaluators tell no such number; {one_of(name, found)}")
        return found[name]

    return score


def _greedy(
    members: Sequence[Member], score: Callable[[dict], float], better: int, tell: Callable[..., None]
) -> tuple[list[int], list[float]]:
    """Returns the places of the members that are taken, in their order, and each member's own score."""
    scores, total = [], 2 * len(members) - 1
    for one in members:
        tell(len(scores), total)
        scores.append(score(one.values))
    order = sorted(range(len(members)), key=lambda i: (np.isnan(scores[i]), -better * scores[i]))
    taken, best = [order[0]], scores[order[0]]
    for number, i in enumerate(order[1:]):
        tell(len(members) + number, total)
        reached = score(mean([members[k].values for k in (*taken, i)]))
        if better * (reached - best) > 0:
            taken, best = [*taken, i], reached
    return sorted(taken), scores
