"""The model card: every number in it is read from the run's own records, and what they do not tell is said to be unknown."""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from huggingface_hub import ModelCard, ModelCardData

import vmm
from vmm.build import digest
from vmm.config import numbers
from vmm.data.loader import mixture, train_digests
from vmm.data.manifest import read_manifest
from vmm.errors import UserError
from vmm.evals.tables import grid, show, show_interval
from vmm.plugins import modules
from vmm.publishing import example
from vmm.publishing.cost import describe
from vmm.publishing.results import of_evaluator, results
from vmm.run import Run, commit
from vmm.training.metrics import read_rows

# Licences that the Hub knows by name and that weights often have; another is "other" there, with its name.
_LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "openrail", "openrail++", "unknown",
)  # fmt: skip


def model_card(run: Run, adapters: bool = False) -> ModelCard:
    """Returns the card. adapters: the folder holds these alone, and not the model."""
    evals = [row for row in read_rows(run.workdir / "evals.jsonl") if row["step"] == run.step]
    record, c, told = evals[-1] if evals else None, run.experiment.config, run.experiment.card
    parts = sorted(c.trunk["encoders"])
    how = "fine-tuned" if c.init_from else "pretrained"
    lines = [
        f"# {run.workdir.name}",
        "",
        f"A {' + '.join(parts)} model, fused by `{c.trunk['fusion']['kind']}`, {how} with vmm.",
        "",
        "```python",
        example.code(tuple(parts), adapters, told.base_model, modules((run.config["trunk"], run.config["objectives"]))),
        "```",
        "",
        "Run it in this folder; elsewhere, load the folder by its path or by its name on the Hub. `vmm publish --check` runs "
        "it in a clean process and compares what it gives with what it gave when this card was written.",
        "",
        "## Intended use",
        "",
        told.intended_use or "Unknown: who published it did not say.",
        "",
        "### Out of scope",
        "",
        told.out_of_scope
        or "Unknown: who published it did not say. It was measured for nothing that is not under Evaluation.",
        "",
        "## How it was made",
        "",
        *_table(("", ""), _facts(run, adapters)),
        "",
        "## Training data",
        "",
        *_table(("manifest", "clips", "with a caption", "with labels", "SHA-256"), _data(run)),
        "",
        f"Licence of the data: {told.data_licence or 'unknown'}.",
        "",
        "## Evaluation",
        "",
        *_evaluation(run, record),
        "",
        "## Limits",
        "",
        *([told.limits, ""] if told.limits else []),
        *_limits(run),
        "",
        "## Time and energy",
        "",
        *_table(("", ""), describe(read_rows(run.workdir / "goodput.jsonl"))),
    ]
    return ModelCard(f"---\n{_metadata(run, adapters, record).to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def _metadata(run: Run, adapters: bool, record: Mapping | None) -> ModelCardData:
    told, c = run.experiment.card, run.experiment.config
    known = told.licence in _LICENCES
    data = ModelCardData(
        library_name="vmm",
        license=told.licence if known else "other",
        license_name=None if known else told.licence,
        tags=["video", "audio", "text", "jax"],
        model_name=run.workdir.name,
        eval_results=(results(record, c.evals) or None) if record else None,
    )
    if told.base_model:
        data["base_model"] = told.base_model
        data["base_model_relation"] = "adapter" if adapters else "finetune"
    if not data.eval_results:
        data.pop("model_name")
    return data


def _facts(run: Run, adapters: bool) -> list[tuple[str, str]]:
    """Returns the lines of how it was made."""
    clip, c, told = run.experiment.clip, run.experiment.config, run.experiment.card
    objectives = ", ".join(f"{name} ({spec['kind']})" for name, spec in c.objectives.items())
    metrics = [row for row in read_rows(run.workdir / "metrics.jsonl") if "loss" in row and row["step"] <= run.step]
    facts = [
        ("licence of the weights", told.licence),
        ("parameters", f"{run.experiment.parameters():,}, trained {run.experiment.trained():,}"),
        ("steps × batch", f"{run.step} of {c.steps} × {c.batch} clips"),
        (
            "clip",
            f"{clip.seconds} s, {clip.frames} frames of {clip.size} × {clip.size}; audio at {clip.sample_rate} Hz",
        ),
        ("objectives", objectives),
        ("config", f"`{digest(numbers(run.config))}`, seed {c.seed}"),
        ("code", f"vmm {vmm.__version__}, commit `{commit()}`"),
    ]
    if c.init_from:
        bases = [c.init_from] if isinstance(c.init_from, str) else [f"{k}: {public(v)}" for k, v in c.init_from.items()]
        hub = f" (on the Hub: {told.base_model})" if told.base_model else ""
        facts.append(("base model", ", ".join(f"`{public(base)}`" for base in bases) + hub))
    if c.adapt:
        kinds = ", ".join(f"`{rule}` ({spec['kind']})" for rule, spec in c.adapt)
        facts.append(
            ("adapters", kinds + ("; this folder holds these and the heads alone" if adapters else ", merged"))
        )
    if (run.workdir / "average.json").is_file():
        average = json.loads((run.workdir / "average.json").read_text())
        members = ", ".join(f"{public(one['run'])} at step {one['step']}" for one in average["members"])
        facts.append(("weights", f"mean of {len(average['members'])}: {members}"))
    if metrics:
        first, last = metrics[0], metrics[-1]
        facts.append(
            ("loss", f"{first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at step {last['step']}")
        )
    return facts


def public(path: str) -> str:
    """Returns a path as all may read it: of one from the root, which names a machine's users, its last two parts alone."""
    return "/".join(PurePath(path).parts[-2:]) if PurePath(path).is_absolute() else path


def _data(run: Run) -> list[tuple]:
    """Returns the lines of the table of training data."""
    data, lines = run.experiment.data, []
    weights = {part.manifest: part.weight for part in mixture(data.train).values()}
    for manifest, found in train_digests(data.train).items():
        name = f"`{public(manifest)}`" + (f" (weight {weights[manifest]:g})" if len(weights) > 1 else "")
        try:
            rows = read_manifest(manifest, bool(data.remote)) if found else None
        except UserError:
            rows = None
        if rows is None:
            lines.append((name, *["unknown"] * 3, f"`{found or 'unknown (the file is gone)'}`"))
        else:
            captions, labels = sum(bool(row.captions) for row in rows), sum(bool(row.labels) for row in rows)
            lines.append((name, f"{len(rows):,}", f"{captions:,}", f"{labels:,}", f"`{found}`"))
    return lines


def _evaluation(run: Run, record: Mapping | None) -> list[str]:
    if record is None:
        return ["This checkpoint was not evaluated: run `vmm eval` on the run, then publish again."]
    told = ", ".join(f"`{public(name)}` (SHA-256 `{value[:12]}`)" for name, value in record["data"].items())
    lines = [f"Data: {told}. In brackets: 95 % intervals, bootstrap over clips."]
    for name in run.experiment.evals:
        rows, columns, cells, notes = grid(of_evaluator(record["values"], name))
        ends = of_evaluator(record.get("intervals", {}), name)
        body = [
            (row, *(_cell(column, cells.get((row, column)), ends.get(f"{row}/{column}")) for column in columns))
            for row in rows
        ]
        lines += ["", f"### {name}", "", *_table(("", *columns), body)]
        if notes:
            lines += ["", ", ".join(f"{key}: {value:g}" for key, value in notes.items())]
    suites = record.get("suites", {})
    return [*lines, *_robustness(suites.get("robustness", {}), record), *_calibration(suites.get("calibration", {}))]


def _robustness(found: Mapping, record: Mapping) -> list[str]:
    """Returns the numbers under noise, those that the noise changes; `found`: corruption/severity → values, intervals."""
    severities = list(dict.fromkeys(key.partition("/")[2] for key in found))
    lines = []
    for corruption in dict.fromkeys(key.partition("/")[0] for key in found):
        of = [found[f"{corruption}/{severity}"] for severity in severities]
        for key in of[0]["values"]:
            clean = record["values"].get(key)
            if any(one["values"].get(key) != clean for one in of):
                cells = [_cell(key, one["values"].get(key), one["intervals"].get(key)) for one in of]
                lines.append((key, corruption, _cell(key, clean, None), *cells))
    if not lines:
        return []
    head = ("", "noise", "clean", *(f"severity {severity}" for severity in severities))
    return ["", "### Under noise", "", *_table(head, lines)]


def _calibration(found: Mapping) -> list[str]:
    names = ("accuracy", "confidence", "error", "brier", "log_loss")
    lines = []
    for key, one in found.items():
        cells = []
        for name in names:
            value, ends = one["values"][name], one["intervals"][name]
            share = name in ("accuracy", "confidence", "error")
            cells.append(_cell(name, value, ends) if share else f"{value:.3f} ({ends[0]:.3f}–{ends[1]:.3f})")
        lines.append((key, *cells))
    return ["", "### Calibration", "", *_table(("", *names), lines), "", "error: ECE"] if lines else []


def _limits(run: Run) -> list[str]:
    """Returns what the model cannot do by its make."""
    clip, parts = run.experiment.clip, run.experiment.modalities
    lines = [
        f"- A clip is seen as one window of {clip.seconds} s; of a longer file, its middle."
        if {"video", "audio"} & set(parts)
        else f"- A text is cut at {clip.text_length} tokens.",
        "- Whom and what the training data show, and leave out, was not examined here: biases are unknown.",
    ]
    if not run.experiment.evals:
        lines.append("- Nothing was measured: its config names no evaluator.")
    return lines


def _cell(column: str, value: float | None, ends: Sequence[float] | None) -> str:
    around = show_interval(column, ends)
    return show(column, value) + (f" ({around})" if around else "")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Returns a Markdown table; the first column to the left, numbers to the right where there are more than two."""
    sides = "|---|" + ("---|" if len(head) == 2 else "---:|" * (len(head) - 1))
    cells = ("|".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return [f"|{'|'.join(head)}|", sides, *(f"|{line}|" for line in cells)]
