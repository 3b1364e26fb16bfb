"""vmm ablate: a study → every variant × seed trained and evaluated → tables with intervals, paired tests, pictures.

A study is a folder with study.py, whose `get_study(quick)` returns

    config: reference of a config, relative to the project   score: the number that is compared
    variants: name → overrides of the config                 scores: further numbers to show
    seeds: the seeds of each variant                          chance: name → value, for the table

and, if it likes,

    match: "flops", "parameters" or the fields of ablation.match.Match: each variant's width or depth is solved for, so
           that all cost the same
    against: the variant that the others are compared with; without it all pairs of up to five, else the first
"""

import html
import importlib.util
import json
import math
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from vmm.ablation import pareto
from vmm.ablation.compare import Comparison, clip_scores, compare, compared_table, pairs
from vmm.ablation.match import cost, forward_flops, make_match, match_variant
from vmm.ablation.tables import html_table, latex, markdown, page
from vmm.build import digest, load_config, plain, write_text
from vmm.config import numbers
from vmm.data.loader import train_digests
from vmm.errors import UserError, one_of
from vmm.evaluate import evaluate
from vmm.experiment import Experiment
from vmm.run import commit
from vmm.sharding import place_batch
from vmm.train import train
from vmm.training.metrics import read_rows
from vmm.training.runtime import use_compilation_cache

_KEYS = ("config", "variants", "seeds", "score", "scores", "chance")
_MORE = ("match", "against")


def load_study(folder: Path, quick: bool) -> dict:
    """Reads a study; raises UserError if there is none or it lacks a key."""
    file = folder / "study.py"
    if not file.is_file():
        known = sorted(str(path.parent) for path in Path("experiments").glob("*/study.py"))
        raise UserError(f"study {folder}: holds no study.py; {one_of(folder, known)}")
    spec = importlib.util.spec_from_file_location("vmm_study", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_study"):
        raise UserError(f"study {file}: defines no get_study(quick); run it by itself, as its README says")
    study = plain(module.get_study(quick))
    if set(study) - set(_MORE) != set(_KEYS):
        raise UserError(f"study {file}: get_study must return the keys {', '.join(_KEYS)}, got {', '.join(study)}")
    for key in ("variants", "seeds"):
        if not study[key]:
            raise UserError(f"study {file}: {key}: none given")
    if study.get("against") and study["against"] not in study["variants"]:
        raise UserError(f"study {file}: against: {one_of(study['against'], study['variants'])}")
    return study


def ablate(folder: str | Path, quick: bool = False, out: Path | None = None) -> list[dict]:
    """Runs what is missing of a study, prints the tables and writes them; returns the rows of results.jsonl.

    The same call again goes on where it stopped: finished (variant, seed) pairs are not repeated
    unless their config or data changed, a broken-off training resumes.

    Raises:
      UserError: no study there, or no width or depth at which its variants match.
    """
    folder = Path(folder)
    study = load_study(folder, quick)
    out = out or Path("runs") / (folder.resolve().name + ("-quick" if quick else ""))
    out.mkdir(parents=True, exist_ok=True)
    use_compilation_cache()
    rows, console = [], Console(stderr=True)
    variants = matched(study, console)
    total = len(variants) * len(study["seeds"])
    for variant, overrides in variants.items():
        for seed in study["seeds"]:
            config = load_config(study["config"], [*overrides, f"seed={seed}"])
            console.print(f"{folder.name}: {variant}, seed {seed} ({len(rows) + 1} of {total})")
            rows.append(_one(out, variant, seed, config))
            for score in (study["score"], *study["scores"]):
                if score not in rows[-1]["values"]:
                    raise UserError(
                        f"study {folder}: score {score}: not among what is evaluated; {one_of(score, rows[-1]['values'])}"
                    )
    title = f"{folder.resolve().name}{' (quick)' if quick else ''}"
    _write(out, title, study, variants, rows)
    return rows


def matched(study: Mapping, console: Console | None = None) -> dict[str, tuple[str, ...]]:
    """Returns variant → overrides, with those that make all cost the same where the study asks for it; tells them.

    Raises:
      UserError: as match_variant.
    """
    variants = {name: tuple(overrides) for name, overrides in study["variants"].items()}
    if not study.get("match"):
        return variants
    match = make_match(study["match"], variants)
    target = cost(load_config(study["config"], variants[match.reference]), match.what)
    result = {}
    for name, overrides in variants.items():
        if name == match.reference:
            result[name] = overrides
            continue

        def load(more: tuple[str, ...], overrides=overrides) -> dict:
            return load_config(study["config"], [*overrides, *more])

        found = match_variant(load, match, target, name)
        result[name] = (*overrides, *found.overrides)
        if console:
            console.print(
                f"{name}: {found.cost:,.0f} {match.what}, {found.cost / target - 1:+.1%} of {match.reference}'s, with "
                f"{', '.join(found.overrides) or 'no change'}"
            )
    return result


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
    folder = re.sub(r"[^\w.]+", "_", variant)
    workdir = out / f"{folder}-{seed}-{identity['config']}"
    row = identity | {"commit": commit(), "host": socket.gethostname(), "workdir": workdir.name} | costs(config)
    train(config, workdir)
    record = evaluate(workdir, predictions="")
    speeds = [line["steps_per_second"] for line in read_rows(workdir / "metrics.jsonl") if "steps_per_second" in line]
    row |= {"step_seconds": float(1 / np.median(speeds[1:] or speeds)), "values": record["values"]}
    row |= {"tested": record["data"]}
    # What a kill left of a line would swallow this one.
    write_text(path, "".join(json.dumps(line) + "\n" for line in [*read_rows(path), row]))
    return row


def costs(config: Mapping) -> dict:
    """Returns parameters, forward FLOPs a clip (of matrix products), peak bytes of a train step; nothing runs."""
    experiment = Experiment(config)
    mesh = experiment.make_mesh()
    program = experiment.program(mesh)
    batch = place_batch(experiment.batch_shapes(), mesh)

    with jax.set_mesh(mesh):
        memory = program.step.lower(program.shapes, batch).compile().memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return {"parameters": experiment.parameters(), "flops": forward_flops(experiment), "peak_bytes": peak}


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean and the half-width of its 95 % interval (Student's t over seeds; nan for one)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, half


def _names(study: Mapping) -> dict[str, str]:
    """Returns score → its column: the last part of the name, all of it where two scores share that."""
    scores = (study["score"], *study["scores"])
    last = [score.rpartition("/")[2] for score in scores]
    return {score: short if last.count(short) == 1 else score for score, short in zip(scores, last)}


def _table(study: dict, rows: list[dict]) -> list[dict]:
    """Returns one dict a variant: column → text."""
    table, names = [], _names(study)
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
            line[names[score]] = f"{100 * mean:.1f}{around}"
        table.append(line)
    if study["chance"]:
        last = dict.fromkeys(table[0], "") | {"variant": "chance"}
        last |= {names[score]: f"{100 * value:.1f}" for score, value in study["chance"].items() if score in names}
        table.append(last)
    return table


def _print(table: list[dict], title: str) -> None:
    # Variants run across where they are few: a terminal is narrow.
    columns, across = list(table[0]), len(table) <= 6
    printed = Table(title=title)
    if across:
        printed.add_column("")
        for line in table:
            printed.add_column(line[columns[0]], justify="right")
        for column in columns[1:]:
            printed.add_row(column, *(line[column] for line in table))
    else:
        for column in columns:
            printed.add_column(column, justify="left" if column == columns[0] else "right")
        for line in table:
            printed.add_row(*line.values())
    Console().print(printed)


def comparisons(out: Path, study: Mapping, rows: list[dict]) -> list[Comparison]:
    """Returns the paired tests of the study's score; over clips where the runs' predictions are still there."""
    score = study["score"]
    values: dict = {name: {} for name in study["variants"]}
    clips: dict = {name: {} for name in study["variants"]}
    for row in rows:
        values[row["variant"]][row["seed"]] = row["values"][score]
        # A row of another version of this code names no workdir.
        if "workdir" in row:
            path = out / row["workdir"] / "predictions.jsonl"
            clips[row["variant"]][row["seed"]] = clip_scores(path, score)
    return compare(values, clips, pairs(tuple(study["variants"]), study.get("against", "")))


def _sources(study: Mapping, rows: list[dict]) -> list[dict]:
    """Returns one dict a run: what its numbers were made from."""
    return [
        {
            "variant": row["variant"],
            "seed": str(row["seed"]),
            _names(study)[study["score"]]: f"{100 * row['values'][study['score']]:.2f}",
            "config": row["config"],
            "data": " ".join((found or "–")[:12] for found in row["data"].values()),
            "tested on": " ".join(found[:12] for found in row.get("tested", {}).values()),
            "commit": row["commit"],
            "host": row.get("host", "–"),
            "workdir": row.get("workdir", "–"),
        }
        for row in rows
    ]


def _write(out: Path, title: str, study: Mapping, variants: Mapping, rows: list[dict]) -> None:
    """Prints the tables; writes table.md, .tex, .html, .json, comparisons.json and the picture."""
    score = study["score"]
    table, found, sources = _table(study, rows), comparisons(out, study, rows), _sources(study, rows)
    note = f"{score}: % (mean ± 95 % interval over seeds)"
    tests = compared_table(found)
    why = (
        "Paired: over clips (sign flips, all seeds of a clip together; the interval is BCa over clips) and over seeds (t). "
        "Adjusted: the larger of both, by Holm for so many pairs."
    )
    _print(table, f"{title}: {note}")
    if found:
        _print_tests(tests, f"{title}: differences of {score}, %")
    points = [interval([row["values"][score] for row in rows if row["variant"] == name]) for name in variants]
    first = {name: next(row for row in rows if row["variant"] == name) for name in variants}
    seconds = {name: np.median([row["step_seconds"] for row in rows if row["variant"] == name]) for name in variants}
    pareto.draw(
        {
            "forward MFLOPs": [first[name]["flops"] / 1e6 for name in variants],
            "peak MB of a step": [first[name]["peak_bytes"] / 1e6 for name in variants],
            "step, ms": [1e3 * seconds[name] for name in variants],
        },
        list(variants), [mean for mean, _ in points], [half for _, half in points], score,
        [out / "pareto.svg", out / "pareto.png"],
    )  # fmt: skip
    settings = [{"variant": name, "overrides": " ".join(overrides)} for name, overrides in variants.items()]
    parts = [("", table, note + "."), ("Differences", tests, why), ("Variants", settings, "Changes of the config."),
             ("Runs", sources, "Rows of results.jsonl that the numbers come from.")]  # fmt: skip
    parts = [(head, lines, text) for head, lines, text in parts if lines]
    text = [f"{f'## {head}{chr(10) * 2}' if head else ''}{markdown(lines)}\n\n{text}\n" for head, lines, text in parts]
    write_text(out / "table.md", "\n".join(text))
    write_text(out / "table.tex", "\n\n".join(latex(lines, f"{title}: {text}") for _, lines, text in parts[:2]) + "\n")
    picture = (out / "pareto.svg").read_text(encoding="utf-8")
    shown = [f"<h2>{head}</h2>" * bool(head) + html_table(lines, "small" * (head == "Runs")) + f"<p class='note'>{html.escape(text)}</p>"
             for head, lines, text in parts]  # fmt: skip
    write_text(out / "table.html", page(title, [shown[0], picture[picture.index("<svg") :], *shown[1:]]))
    write_text(out / "table.json", json.dumps(table, indent=1) + "\n")
    plain_tests = [{k: None if v != v else v for k, v in item._asdict().items()} for item in found]
    write_text(out / "comparisons.json", json.dumps(plain_tests, indent=1) + "\n")
    print(f"{out / 'table.md'}: written; also .html, .tex, .json, and {out / 'pareto.png'}")


def _print_tests(tests: list[dict], title: str) -> None:
    printed = Table(title=title)
    for column in tests[0]:
        printed.add_column(column, justify="left" if column == "pair" else "right")
    for line in tests:
        printed.add_row(*line.values())
    Console().print(printed)
