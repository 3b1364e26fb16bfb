"""vmm report: a run → one self-contained HTML file that shows what it learned; no script, nothing fetched."""

import base64
import datetime
import html
import io
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import vmm
from vmm.build import digest, write_text
from vmm.config import numbers
from vmm.data.loader import evaluation_batches, mixture
from vmm.data.manifest import read_manifest
from vmm.data.text import decode_ids, load_tokenizer, padding_id, special_ids
from vmm.encoders.base import Encoder
from vmm.errors import StorageError, UserError
from vmm.evals.pictures import sheet
from vmm.evals.tables import grid, show, show_interval
from vmm.evaluate import Predict
from vmm.model import sample_keys
from vmm.objectives.base import Reconstructs, by_capability
from vmm.progress import progress
from vmm.run import Run, commit, open_run, weights
from vmm.training.metrics import read_rows

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
td, th { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; } td:first-child, th:first-child { text-align: left; }
svg, img { max-width: 100%; height: auto; } .clip { margin: 1.2em 0; } .clip img { display: block; width: 100%; image-rendering: pixelated; }
svg { width: 100%; } .wide { overflow-x: auto; } td.number { white-space: nowrap; } td.words { text-align: left; }
.rows { display: flex; } .rows img { flex: 1; min-width: 0; } .rows div { display: flex; flex-direction: column; justify-content: space-around; flex: 0 0 6.5em; font-size: 80%; color: #666; }
td .note { font-size: 85%; white-space: nowrap; } .wide td .note { display: block; }
.right { color: #186a3b; font-weight: 600; } .note { color: #666; }
"""
_CLIPS = 6  # shown in the report


def report(workdir: str | Path, out: Path | None = None, ablations: list[Path] = ()) -> Path:
    """Writes report.html and prints a summary; returns the file.

    Raises:
      UserError: no run there, or no metrics, or an ablation without results.
    """
    plt.switch_backend("Agg")  # draws files, needs no screen
    run = open_run(workdir)
    out = out or run.workdir / "report.html"
    metrics = [row for row in read_rows(run.workdir / "metrics.jsonl") if row.get("loss") is not None]
    if not metrics:
        raise UserError(f"{run.workdir}/metrics.jsonl: holds no metrics to draw; train first")
    evals = [row for row in read_rows(run.workdir / "evals.jsonl") if row["step"] == run.step]
    with progress(f"drawing {run.workdir}") as tell:
        parts = _parts(run, metrics, evals[-1] if evals else {}, ablations, tell)
    title = html.escape(run.workdir.name)
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    try:
        write_text(out, page)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror})") from None
    _print_summary(run, metrics, _first(run, "compares_streams"), evals[-1]["values"] if evals else {})
    return out


def _parts(
    run: Run, metrics: list[dict], record: Mapping, ablations: Sequence[Path], tell: Callable[..., None]
) -> list[str]:
    """Returns the page's parts in their order. record: of the evaluation of this checkpoint, {}: there is none."""
    values = record.get("values", {})
    # Records of before there were intervals have none.
    ends, suites = record.get("intervals", {}), record.get("suites", {})
    parts = [f"<h1>{html.escape(run.workdir.name)}</h1>", _summary(run, metrics, record)]
    parts += ["<h2>Loss</h2>", _losses(metrics, run.config["objectives"])]
    retrieval = _first(run, "compares_streams")
    if retrieval and values:
        parts += ["<h2>Retrieval against chance</h2>", _retrieval(run, retrieval, values, ends)]
    if not values:
        parts.append(
            '<p class="note">This checkpoint was not evaluated: run <code>vmm eval</code>, then this again.</p>'
        )
    if retrieval:
        parts += _similarity(run, retrieval, tell)
        parts += _reconstructions(run, run.experiment.evals[retrieval].data)
    for name in run.experiment.evals:
        if name != retrieval and values:
            parts += [f"<h2>{html.escape(name)}</h2>", _grid_table(run, name, values, ends)]
        if getattr(run.experiment.evals[name], "scores_pictures", False):
            parts += _made_pictures(run, run.experiment.evals[name])
    if suites.get("robustness"):
        parts += ["<h2>Robustness</h2>", _robustness(suites["robustness"], values)]
    if suites.get("calibration"):
        parts += ["<h2>Calibration</h2>", _calibration(suites["calibration"])]
    for folder in ablations:
        parts += _ablation(folder)
    return parts


def _first(run: Run, what: str) -> str | None:
    """Returns the name of the config's first evaluator that declares something."""
    return next((name for name, evaluator in run.experiment.evals.items() if getattr(evaluator, what, False)), None)


# ---- pictures -------------------------------------------------------------------------------------


def _svg(figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _png(pixels: np.ndarray, alt: str) -> str:
    data = io.BytesIO()
    plt.imsave(data, pixels, format="png")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _labelled(pixels: np.ndarray, names: Sequence[str]) -> str:
    """A picture of as many rows, all of one height, as there are names, each beside its own."""
    labels = "".join(f"<span>{html.escape(name)}</span>" for name in names)
    return f'<div class="rows"><div>{labels}</div>{_png(pixels, ", ".join(names))}</div>'


def _losses(metrics: list[dict], objectives: Mapping) -> str:
    """The whole loss and each objective's; beside it their parts, as of each pair of streams."""
    known = [*objectives, "adversary"]
    total = ["loss", *(name for name in known if isinstance(metrics[-1].get(name), float))]
    other = ("scale", "accuracy", "balance", "found", "psnr", "psnr_blend")
    fine = [key for key in metrics[-1] if key.partition("/")[0] in known and "/" in key and not key.endswith(other)]
    figure, axes = plt.subplots(1, 2 if fine else 1, figsize=(10, 3.4), squeeze=False)
    for axis, keys in zip(axes[0], (total, fine)):
        for key in keys:
            rows = [row for row in metrics if row.get(key) is not None]
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], label=key, linewidth=1.2)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        # The first steps of an untrained model may be far above all that follows.
        rest = [row[key] for row in metrics[len(metrics) // 20 :] for key in keys if row.get(key) is not None]
        axis.set_ylim(0, 1.05 * max(rest) if rest and max(rest) > 0 else None)
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _retrieval(run: Run, name: str, values: dict, ends: dict) -> str:
    mine = {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
    rows, columns, cells, notes = grid(mine)
    chance = notes.get("chance/R@1", 0.0)
    figure, axis = plt.subplots(figsize=(10, 3.2))
    place = np.arange(len(rows))
    for k, (key, shade) in enumerate((("R@10", "#c6dbef"), ("R@5", "#6baed6"), ("R@1", "#08519c"))):
        axis.bar(place, [100 * cells[row, key] for row in rows], color=shade, label=key, width=0.7, zorder=k)
    axis.axhline(
        100 * chance,
        color="#c0392b",
        linewidth=1,
        linestyle="--",
        label=f"R@1 by chance ({100 * chance:.1f} %)",
        zorder=5,
    )
    axis.set_xticks(place, rows)
    axis.set_ylabel("recall, %")
    axis.set_ylim(0, 100)
    axis.legend(fontsize=8, frameon=False, ncols=4, loc="upper left", bbox_to_anchor=(0, 1.16))
    axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure) + _grid_table(run, name, values, ends)


def _robustness(suite: dict, values: dict) -> str:
    """A picture an evaluator: what stays of the clean clips' mean score, by corruption and severity; then its numbers."""
    corruptions = list(dict.fromkeys(key.partition("/")[0] for key in suite))
    severities = sorted({int(key.partition("/")[2]) for key in suite})
    keys = [key for key in next(iter(suite.values()))["intervals"] if not key.endswith(("/R@5", "/R@10", "/top5"))]
    evaluators = list(dict.fromkeys(key.partition("/")[0] for key in keys))
    figure, axes = plt.subplots(1, len(evaluators), figsize=(10, 3.4), squeeze=False, layout="constrained")
    rows = []
    for axis, evaluator in zip(axes[0], evaluators):
        mine = [key for key in keys if key.startswith(f"{evaluator}/")]
        for corruption in corruptions:
            line = [np.mean([values[key] for key in mine])]
            line += [np.mean([suite[f"{corruption}/{s}"]["values"][key] for key in mine]) for s in severities]
            axis.plot([0, *severities], [100 * value for value in line], label=corruption, linewidth=1.2, marker=".")
            cells = "".join(f"<td>{show('', float(value))}</td>" for value in line)
            rows.append(f"<tr><td>{html.escape(f'{evaluator}, {corruption}')}</td>{cells}</tr>")
        axis.set_title(f"{evaluator}, mean of {len(mine)}", fontsize=9)
        axis.set_xlabel("severity")
        axis.set_ylabel("%")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(fontsize=7, frameon=False)
    head = "".join(f"<th>{name}</th>" for name in ("", "clean", *severities))
    return _svg(figure) + f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _calibration(suite: dict) -> str:
    """Reliability diagrams (accuracy against confidence; the diagonal is honest) and the errors with intervals."""
    shown = list(suite.items())[:12]
    figure, axes = plt.subplots(-(-len(shown) // 4), 4, figsize=(10, 2.6 * -(-len(shown) // 4)), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (name, one) in zip(axes.flat, shown):
        bins = [(c, a) for c, a in zip(one["bins"]["confidence"], one["bins"]["accuracy"]) if c is not None]
        axis.plot([0, 1], [0, 1], color="#999", linewidth=1, linestyle="--")
        axis.plot(*zip(*bins), color="#08519c", marker="o", markersize=3, linewidth=1)
        axis.set_title(name, fontsize=8)
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    rows = []
    for name, one in suite.items():
        cells = [
            f"{show(key, one['values'][key])} <span class='note'>{show_interval(key, one['intervals'][key])}</span>"
            for key in ("accuracy", "confidence", "error")
        ]
        cells.append(f"{one['values']['brier']:.3f}")
        rows.append(f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("", "accuracy", "confidence", "calibration error", "Brier"))
    return _svg(figure) + f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _grid_table(run: Run, name: str, values: dict, ends: dict) -> str:
    mine = {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
    rows, columns, cells, notes = grid(mine)
    # By chance, of each column: as the evaluator says, else one of the label's classes.
    chance = {column: 1 / classes for column, classes in run.experiment.data.labels.items() if column in columns}
    chance |= {column: notes.pop(f"chance/{column}") for column in columns if f"chance/{column}" in notes}
    texts = {
        (row, column): _cell(column, cells.get((row, column)), ends.get(f"{name}/{row}/{column}"))
        for row in rows
        for column in columns
    }
    if chance:
        texts |= {("chance", column): _cell(column, chance.get(column), None) for column in columns}
        rows = [*rows, "chance"]
    if len(columns) > len(rows):  # the longer side runs down: a page is narrow
        rows, columns, texts = columns, rows, {(column, row): text for (row, column), text in texts.items()}
    lines = ["<tr><th></th>" + "".join(f"<th>{html.escape(column)}</th>" for column in columns) + "</tr>"]
    for row in rows:
        lines.append(f"<tr><td>{html.escape(row)}</td>" + "".join(texts[row, column] for column in columns) + "</tr>")
    caption = ", ".join(f"{key} {value:g}" for key, value in notes.items())
    small = ("; " if caption else "") + "small: 95 % interval, bootstrap over clips" if ends else ""
    return f'<div class="wide"><table>{"".join(lines)}</table></div><p class="note">{html.escape(caption)}{small}</p>'


def _cell(column: str, value: float | None, ends: Sequence[float] | None) -> str:
    return f'<td class="number">{show(column, value)} <span class="note">{show_interval(column, ends)}</span></td>'


def _similarity(run: Run, name: str, tell: Callable[..., None]) -> list[str]:
    """The similarity matrix of videos and captions, and some clips with their nearest captions."""
    evaluator = run.experiment.evals[name]
    predict = Predict(run.experiment, weights(run.state), run.mesh)
    predict.tell = tell
    predict.asked = {"VAT"}  # what the evaluators ask for besides is not drawn here
    rows = predict(evaluator.data, "VAT")
    tell(doing=f"drawing {run.workdir}")
    keys = [f"{evaluator.objective}/{stream}" for stream in ("video", "audio", "text")]
    if keys[2] not in rows or (keys[0] not in rows and keys[1] not in rows):
        return []
    streams = [key for key in keys[:2] if key in rows]
    complete = np.logical_and.reduce([rows[f"present/{key.rpartition('/')[2]}"] for key in (*streams, keys[2])])
    texts = rows[keys[2]][complete]
    figure, axes = plt.subplots(1, len(streams), figsize=(10, 4.4), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], streams):
        picture = axis.imshow(rows[key][complete][:64] @ texts[:64].T, cmap="magma", vmin=-0.2, vmax=1)
        axis.set_xlabel("caption")
        axis.set_ylabel(key.rpartition("/")[2])
        figure.colorbar(picture, ax=axis, shrink=0.8, label="cosine")
    parts = [
        "<h2>Similarity</h2><p>The first 64 test clips against their captions; the diagonal is the truth.</p>",
        _svg(figure),
    ]
    manifest = read_manifest(evaluator.data, bool(run.experiment.data.remote))
    places = rows["row"][complete]
    query = sum(rows[key][complete] for key in streams)
    scores = query @ texts.T
    batch = _first_clips(run, evaluator.data, places[:_CLIPS])
    parts.append(
        "<h2>Clips and their nearest captions</h2><p>By the sum of the clip's embeddings; its own caption is green.</p>"
    )
    for i, video in enumerate(batch.inputs["video"]):
        lines = []
        for j in np.argsort(-scores[i])[:3]:
            text = html.escape(manifest[places[j]].captions[0])
            lines.append(
                f'<li{" class=right" if j == i else ""}>{text} <span class="note">{scores[i, j] / len(streams):.2f}</span></li>'
            )
        strip = np.concatenate(list(video), axis=1)
        parts.append(f'<div class="clip">{_png(strip, manifest[places[i]].captions[0])}<ol>{"".join(lines)}</ol></div>')
    return parts


def _first_clips(run: Run, manifest: str, wanted: np.ndarray):
    """Returns a Batch of the wanted rows of a manifest."""
    found = {}
    experiment = run.experiment
    batches = evaluation_batches(manifest, experiment.data, experiment.clip, batch=32, modalities=experiment.modalities)
    for batch, rows, _ in batches:
        for place, number in enumerate(rows):
            if number in wanted:
                found[int(number)] = jax.tree.map(lambda leaf, place=place: leaf[place], batch)
        if len(found) == len(wanted):
            break
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(found[int(number)] for number in wanted))


def _made_pictures(run: Run, evaluator) -> list[str]:
    """The frames of a few clips as they are, as the pixel decoder makes them, and as copies would have them."""
    recipe, count = run.experiment.recipe, _CLIPS // 2
    batch = _first_clips(run, evaluator.data, np.arange(count))
    keys = sample_keys(jax.random.key(0), np.arange(count))
    draw = jax.jit(lambda p, b: recipe.apply(p, b, evaluator.objective, keys, method="draw"))
    drawn = jax.device_get(draw({"params": weights(run.state)}, batch))
    words = "Each clip from above: the truth, what the model makes of it, the blend of the shown frames, the nearest of them."
    picture = _labelled(sheet(drawn, range(count)), ("truth", "made", "blend", "nearest") * count)
    return [f"<p>{words}</p>", f'<div class="clip">{picture}</div>']


def _reconstructions(run: Run, manifest: str) -> list[str]:
    """Originals, what the model was shown of them, and what it made of the rest."""
    name = next(iter(by_capability(run.experiment.objectives, Reconstructs)), None)
    if name is None:
        return []
    recipe, objective = run.experiment.recipe, run.experiment.objectives[name]
    view = objective.view
    batch = _first_clips(run, manifest, np.arange(_CLIPS))
    keys = sample_keys(jax.random.key(0), np.arange(_CLIPS))
    params = {"params": weights(run.state)}
    said = jax.device_get(jax.jit(lambda p, b: recipe.apply(p, b, view, keys, method="predict"))(params, batch))
    patches = jax.jit(lambda p, b: {k: (v.values, v.grid) for k, v in recipe.apply(p, b, method="patches").items()})(
        params, batch
    )
    patches = jax.device_get(patches)
    parts = [
        f"<h2>Masked reconstruction</h2><p>Each clip: the original, what view <code>{html.escape(view)}</code> shows, "
        "the reconstruction of what it hides"
        + (" (with the hidden patches' own mean and contrast)" if objective.standardise else "")
        + ".</p>"
    ]
    for stream, draw in (("video", _draw_video), ("audio", _draw_audio)):
        if f"{name}/{stream}" in said:
            values, grid = patches[stream][0], tuple(int(extent) for extent in patches[stream][1])
            pictures = [
                _three(values[i], said[f"hidden/{stream}"][i], said[f"{name}/{stream}"][i], objective)
                for i in range(_CLIPS)
                if batch.present[stream][i]
            ][:3]
            parts += [
                f'<div class="clip">{draw(run.experiment.encoders[stream], grid, three)}</div>' for three in pictures
            ]
    if f"{name}/text" in said:
        tokenizer = load_tokenizer(run.experiment.data.tokenizer)
        padding, special = padding_id(tokenizer), special_ids(tokenizer)
        lines = []
        for i in range(_CLIPS):
            ids = batch.inputs["text"][i]
            if batch.present["text"][i]:
                guess, hidden = ids.copy(), said["hidden/text"][i]
                guess[hidden] = np.where(ids[hidden] != padding, said[f"{name}/text"][i].argmax(-1), padding)
                blank = with_blanks(tokenizer, ids, {int(place) for place in hidden if int(ids[place]) not in special})
                texts = (decode_ids(tokenizer, ids), blank, decode_ids(tokenizer, guess))
                cells = "".join(f'<td class="words">{html.escape(text)}</td>' for text in texts)
                lines.append(f"<tr>{cells}</tr>")
        parts.append(
            f"<table><tr><th>original</th><th>shown (_ hidden)</th><th>reconstruction</th></tr>{''.join(lines)}</table>"
        )
    return parts


def with_blanks(tokenizer: Tokenizer, ids: Sequence[int], hidden: Collection[int]) -> str:
    """Returns the text of ids [L] with a _ for each of the hidden places, whatever the tokenizer makes of a _."""
    parts = []
    for blank, places in itertools.groupby(range(len(ids)), key=lambda place: place in hidden):
        places = list(places)
        parts += ["_"] * len(places) if blank else [decode_ids(tokenizer, [ids[place] for place in places])]
    return " ".join(part for part in parts if part)


def _three(values: np.ndarray, hidden: np.ndarray, guess: np.ndarray, objective: Reconstructs) -> list[np.ndarray]:
    """Returns original, shown and reconstructed patches [N P], as floats (pixels −1 … 1)."""
    original = values.astype(np.float32) / 127.5 - 1.0 if values.dtype == np.uint8 else values
    shown, made = original.copy(), original.copy()
    shown[hidden] = original.min() if values.dtype != np.uint8 else 0.0
    made[hidden] = objective.restored(values[hidden], guess)
    return [original, shown, made]


def _draw_video(encoder: Encoder, grid: tuple, three: list[np.ndarray]) -> str:
    clips = [np.clip(encoder.unpatch(patches, grid) / 2 + 0.5, 0, 1) for patches in three]
    rows = [np.concatenate(list(clip), axis=1) for clip in clips]
    return _labelled(np.concatenate(rows, axis=0), ("original", "shown", "reconstruction"))


def _draw_audio(encoder: Encoder, grid: tuple, three: list[np.ndarray]) -> str:
    figure, axes = plt.subplots(1, 3, figsize=(10, 2), sharey=True)
    low, high = three[0].min(), three[0].max()
    for axis, patches, title in zip(axes, three, ("original", "shown", "reconstruction")):
        mel = encoder.unpatch(patches, grid)
        axis.imshow(
            mel.T,
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=low,
            vmax=high,
            extent=(0, len(mel) * encoder.hop / encoder.sample_rate, 0, mel.shape[1]),
        )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("seconds")
    axes[0].set_ylabel("mel bin")
    return _svg(figure)


def _ablation(folder: Path) -> list[str]:
    path = folder / "table.json"
    if not path.is_file():
        raise UserError(f"ablation {folder}: holds no table.json; run `vmm ablate` first")
    table = json.loads(path.read_text(encoding="utf-8"))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table[0])
    rows = "".join(
        "<tr>" + "".join(f'<td class="number">{html.escape(cell)}</td>' for cell in line.values()) + "</tr>"
        for line in table
    )
    several = any("±" in cell for line in table for cell in line.values())
    note = (
        "mean ± 95 % interval over seeds"
        if several
        else "one seed each: no interval, so that a difference may be chance"
    )
    return [
        f"<h2>Ablation {html.escape(folder.resolve().name)}</h2>",
        f"<div class='wide'><table><tr>{head}</tr>{rows}</table></div><p class='note'>Accuracy in %, {note}.</p>",
    ]


# ---- words ----------------------------------------------------------------------------------------


def _speed(metrics: list[dict], key: str, read: Callable = np.median) -> float:
    values = [row[key] for row in metrics if row.get(key) is not None]
    return float(read(values[1:] or values))


def _summary(run: Run, metrics: list[dict], record: Mapping) -> str:
    """What the run is and where its numbers come from. record: of its evaluation, {} without one."""
    c = run.experiment.config
    manifests = [part.manifest for part in mixture(c.data["train"]).values()]
    facts = {
        "model": f"{' + '.join(c.trunk['encoders'])}, fusion {c.trunk['fusion']['kind']}, {run.experiment.parameters():,} parameters",
        "training": f"step {run.step} of {c.steps}, batch {c.batch}, {_speed(metrics, 'clips_per_second'):.0f} clips/s, "
        f"{100 * _speed(metrics, 'input_wait'):.1f} % of the time waiting for input",
        "loss": f"{metrics[0]['loss']:.3f} → {metrics[-1]['loss']:.3f}",
        "data": ", ".join(manifests),
        "config": f"{digest(numbers(run.config))} (config.json of the run), seed {c.seed}",
        "evaluated": f"commit {record['commit']}" if record.get("commit") else "not yet",
        "drawn": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, vmm {vmm.__version__}, commit {commit()}",
    }
    return (
        "<table>"
        + "".join(
            f"<tr><td>{key}</td><td style='text-align:left'>{html.escape(value)}</td></tr>"
            for key, value in facts.items()
        )
        + "</table>"
    )


def _print_summary(run: Run, metrics: list[dict], retrieval: str | None, values: dict) -> None:
    table = Table(title=f"{run.workdir}: step {run.step}")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("loss, first → last", f"{metrics[0]['loss']:.3f} → {metrics[-1]['loss']:.3f}")
    table.add_row("clips/s (median)", f"{_speed(metrics, 'clips_per_second'):.0f}")
    table.add_row("waiting for input", f"{100 * _speed(metrics, 'input_wait'):.1f} %")
    if retrieval and values:
        chance = values.get(f"{retrieval}/chance/R@1", 0.0)
        for direction in ("V→T", "A→T", "VA→T", "V→A"):
            value = values.get(f"{retrieval}/{direction}/R@1")
            if value is not None:
                clips = int(values[f"{retrieval}/clips"])
                table.add_row(
                    f"{direction} R@1 over {clips} clips (chance {100 * chance:.1f} %)", f"{100 * value:.1f} %"
                )
    Console().print(table)
