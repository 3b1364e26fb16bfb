"""vmm ablate: a study → every variant × seed trained and evaluated → a table with intervals.

A study is a folder with study.py, whose `get_study(quick)` returns

    config: reference of a config, relative to the project   score: the number that is compared
    variants: name → overrides of the config                 scores: further numbers to show
    seeds: the seeds of each variant                          chance: name → value, for the table
"""

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from vmm.build import digest, load_config, plain, write_text
from vmm.data.loader import train_digests
from vmm.errors import UserError, one_of
from vmm.evaluate import evaluate
from vmm.experiment import Experiment, numbers
from vmm.run import commit
from vmm.sharding import place_batch
from vmm.train import train
from vmm.training.metrics import read_rows
from vmm.training.runtime import use_compilation_cache

_KEYS = ("config", "variants", "seeds", "score", "scores", "chance")


def load_study(folder: Path, quick: bool) -> dict:
    """Reads a study; raises UserError if there is none or it lacks a key."""
    file = folder / "study.py"
    if not file.is_file():
        known = sorted(str(path.parent) for path in Path("experiments").glob("*/study.py"))
        raise UserError(f"study {folder}: holds no study.py; {one_of(folder, known)}")
    spec = importlib.util.spec_from_file_location("vmm_study", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    study = plain(module.get_study(quick))
    if set(study) != set(_KEYS):
        raise UserError(f"study {file}: get_study must return the keys {', '.join(_KEYS)}, got {', '.join(study)}")
    return study


def ablate(folder: str | Path, quick: bool = False, out: Path | None = None) -> list[dict]:
    """Runs what is missing of a study, prints the table and writes it; returns the rows of results.jsonl.

    The same call again goes on where it stopped: finished (variant, seed) pairs are not repeated
    unless their config or data changed, a broken-off training resumes.
    """
    folder = Path(folder)
    study = load_study(folder, quick)
    out = out or Path("runs") / (folder.resolve().name + ("-quick" if quick else ""))
    out.mkdir(parents=True, exist_ok=True)
    use_compilation_cache()
    rows, console = [], Console(stderr=True)
    total = len(study["variants"]) * len(study["seeds"])
    for variant, overrides in study["variants"].items():
        for seed in study["seeds"]:
            reference = study["config"]
            config = load_config(reference, [*overrides, f"seed={seed}"])
            console.print(f"{folder.name}: {variant}, seed {seed} ({len(rows) + 1} of {total})")
            rows.append(_one(out, variant, seed, config))
    table = _table(study, rows)
    _print(table, f"{folder.resolve().name}{' (quick)' if quick else ''}: {study['score']}")
    write_text(out / "table.md", markdown(table) + "\n")
    write_text(out / "table.json", json.dumps(table, indent=1) + "\n")
    print(f"{out / 'table.md'}: written")
    return rows


def _one(out: Path, variant: str, seed: int, config: dict) -> dict:
    """Returns the result of one variant and seed, from results.jsonl or by training it now."""
    path = out / "results.jsonl"
    identity = {
        "variant": variant,
        "seed": seed,
        "config": digest(numbers(config)),
        "data": train_digests(config["data"]["train"]),
    }
    for row in read_rows(path):
        if all(row.get(key) == value for key, value in identity.items()):
            return row
    workdir = out / f"{variant}-{seed}-{identity['config']}"
    row = identity | {"commit": commit()} | costs(config)
    train(config, workdir)
    record = evaluate(workdir)
    speeds = [line["steps_per_second"] for line in read_rows(workdir / "metrics.jsonl") if "steps_per_second" in line]
    row |= {"step_seconds": float(1 / np.median(speeds[1:] or speeds)), "values": record["values"]}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def costs(config: Mapping) -> dict:
    """Returns parameters, forward FLOPs of the trunk a clip, peak bytes of a train step; from XLA, nothing runs."""
    experiment = Experiment(config)
    mesh = experiment.make_mesh()
    program = experiment.program(mesh)
    batch = place_batch(experiment.batch_shapes(), mesh)

    def forward(params, batch):
        return experiment.recipe.apply({"params": params}, batch, method="predict")

    with jax.set_mesh(mesh):
        flops = jax.jit(forward).lower(program.shapes.params, batch).cost_analysis()["flops"]
        memory = program.step.lower(program.shapes, batch).compile().memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return {"parameters": experiment.parameters(), "flops": flops / experiment.config.batch, "peak_bytes": peak}


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean and the half-width of its 95 % interval (Student's t over seeds; nan for one)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, half


def _table(study: dict, rows: list[dict]) -> list[dict]:
    """Returns one dict a variant: column → text."""
    table = []
    for variant in study["variants"]:
        mine = [row for row in rows if row["variant"] == variant]
        line = {
            "variant": variant,
            "parameters": f"{mine[0]['parameters']:,}",
            "forward MFLOPs": f"{mine[0]['flops'] / 1e6:,.1f}",
            "peak MB": f"{mine[0]['peak_bytes'] / 1e6:,.0f}",
            "step ms": f"{1e3 * np.median([row['step_seconds'] for row in mine]):,.0f}",
        }
        for score in (study["score"], *study["scores"]):
            mean, half = interval([row["values"][score] for row in mine])
            around = "" if math.isnan(half) else f" ± {100 * half:.1f}"
            line[score.rpartition("/")[2]] = f"{100 * mean:.1f}{around}"
        table.append(line)
    if study["chance"]:
        last = dict.fromkeys(table[0], "") | {"variant": "chance"}
        last |= {score.rpartition("/")[2]: f"{100 * value:.1f}" for score, value in study["chance"].items()}
        table.append(last)
    return table


def _print(table: list[dict], title: str) -> None:
    # Variants run across: they are few, and a terminal is narrow.
    printed = Table(title=f"{title}, % (mean ± 95 % interval over seeds)")
    printed.add_column("")
    for line in table:
        printed.add_column(line["variant"], justify="right")
    for column in list(table[0])[1:]:
        printed.add_row(column, *(line[column] for line in table))
    Console().print(printed)


def markdown(table: list[dict]) -> str:
    """Returns the table in Markdown."""
    columns = list(table[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" + "---:|" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join(line[column] for column in columns) + " |" for line in table])
