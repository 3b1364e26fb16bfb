"""vmm summarise: a run with a `moments` objective and a media file → its summary as mp4."""

import json
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from vmm.data import media
from vmm.data.cut import write_parts
from vmm.data.samples import EvaluationViews
from vmm.errors import UserError, one_of
from vmm.evals.summary import merged, summarise
from vmm.evaluate import Predict
from vmm.run import open_run, weights


def curve_of(run, file: str | Path, objective: str = "moments", curve: str = "") -> tuple[np.ndarray, float]:
    """Returns how much each moment of a file is worth, float [n], and the seconds of one. run: from open_run.

    A file longer than the model's window is seen in windows that overlap by half. curve: which of the objective's, where it tells
    several.

    Raises:
      UserError: the file cannot be read, or the run tells no such curve.
    """
    experiment = run.experiment
    try:
        seconds = media.probe_duration(file)
    except (media.DecodeError, *media.BROKEN) as error:
        raise UserError(f"{file}: cannot be decoded ({media.reason_of(error)})") from None
    if seconds is None:
        raise UserError(f"{file}: does not tell how long it is; store it anew with `vmm data build`")
    window = experiment.clip.seconds
    experiment.evaluation = EvaluationViews(stride=window / 2)
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "file.jsonl"
        manifest.write_text(json.dumps({"path": str(Path(file).resolve()), "start": 0.0, "end": seconds}) + "\n")
        # The file has no labels, and nothing that is asked for.
        rows = Predict(experiment, weights(run.state), run.mesh, strict=False).ask(str(manifest), "VAT")
    known = [key.partition("/")[2] for key in rows if key.startswith(f"{objective}/") and not key.endswith("/seconds")]
    if not known:
        kinds = [name for name, one in experiment.objectives.items() if one.over_time]
        raise UserError(f"run {run.workdir}: no objective {objective!r} tells of moments; {one_of(objective, kinds)}")
    name = curve or known[0]
    if name not in known:
        raise UserError(f"run {run.workdir}: {objective!r} tells no curve {curve!r}; {one_of(curve, known)}")
    values = rows[f"{objective}/{name}"].astype(np.float64)
    step = window / values.shape[1]
    whole = merged(rows["start"], values, step, np.arange(max(1, round(seconds / step))) * step)
    return np.nan_to_num(whole, nan=float(np.nanmin(whole))), step  # where nothing decodes, there is nothing to see


def summarise_file(
    workdir: str | Path, file: str | Path, out: str | Path, share: float = 0.15, segment: float = 0.5,
    objective: str = "moments", curve: str = "",
) -> list[tuple[float, float]]:  # fmt: skip
    """Writes the summary of a file, prints its parts, and returns these, (start, end) in seconds.

    share: of the file's length, at most. segment: seconds that are taken or left whole. The rest: see curve_of.

    Raises:
      UserError: as curve_of, or nothing of the file fits into the share.
    """
    if not 0 < share <= 1 or segment <= 0:
        raise UserError(f"summarise: share is in (0, 1] and segment above 0 seconds, got {share} and {segment}")
    scores, step = curve_of(open_run(workdir, alone=True), file, objective, curve)
    chosen = summarise(scores, max(1, round(segment / step)), share)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]])))
    parts = [(float(a * step), float(b * step)) for a, b in edges.reshape(-1, 2)]
    if not parts:
        raise UserError(
            f"{file}: {len(scores) * step:.1f} s, of which {share:.0%} hold no segment of {segment} s; raise --share"
        )
    write_parts(file, parts, out)
    table = Table(title=f"{out}: {sum(b - a for a, b in parts):.1f} of {len(scores) * step:.1f} s")
    for column in ("from", "to", "worth", "best moment"):
        table.add_column(column, justify="right")
    for (first, until), (a, b) in zip(parts, edges.reshape(-1, 2)):
        best = (a + scores[a:b].argmax() + 0.5) * step
        table.add_row(f"{first:.2f}", f"{until:.2f}", f"{scores[a:b].mean():.3f}", f"{best:.2f}")
    Console().print(table)
    return parts
