"""vmm data show: a dataset as one self-contained HTML page: some clips, and what was left out; no script, nothing fetched."""

import base64
import html
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vmm.data.inspection import pictures
from vmm.data.inspection.dataset import Dataset, about, open_dataset
from vmm.data.manifest import Row
from vmm.data.sandbox import Answer, Died, Limits, run_all
from vmm.errors import StorageError, UserError

_LIMITS = Limits(seconds=60.0, memory=2 << 30, bytes=64 << 20)
_LONGEST = 2000  # characters of a text that are shown
_PHRASINGS = 8  # of a clip that are shown
_PER_REASON = 8  # clips of the quarantine that are shown

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; } h2 { margin-top: 2em; }
h3 { margin: 0; font-size: 1em; overflow-wrap: anywhere; }
.clip { border-top: 1px solid #ddd; padding: 1em 0 1.4em; break-inside: avoid; }
.note { color: #666; margin: .1em 0 .6em; overflow-wrap: anywhere; } .bad { color: #a02c1f; font-weight: 600; }
.sheet { display: block; max-width: 100%; height: auto; }
.below { display: grid; grid-template-columns: minmax(0, 19em) minmax(0, 15em) minmax(0, 1fr); gap: 1.2em; margin-top: .8em; }
.mel { display: block; width: 100%; height: 96px; } video { width: 100%; height: 150px; background: #eee; } audio { width: 100%; }
ol { margin: 0; padding-inline-start: 1.6em; } li div, .caption { overflow-wrap: anywhere; max-height: 9em; overflow-y: auto; }
.labels { margin: .8em 0 0; display: flex; flex-wrap: wrap; gap: .3em; }
.labels span { background: #eef1f5; border-radius: .6em; padding: 0 .6em; max-width: 100%; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; margin: 1em 0; }
td, th { padding: .25em .6em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.bars td:nth-child(1) { width: 11em; } .bars td:nth-child(2) { width: 5em; text-align: right; }
.bar { background: #b5534a; height: .9em; margin-top: .3em; min-width: 2px; }
@media (max-width: 700px) { .below { grid-template-columns: minmax(0, 1fr); } }
"""
# The page can neither run nor fetch anything, whatever a caption holds.
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def show(path: Path, out: Path, clips: int = 24, seed: int = 0, progress: Callable[[int, int], None] = lambda *_: None) -> tuple[int, int]:  # fmt: skip
    """Writes the page of a dataset. The same dataset and seed give the same page.

    Args:
      path: a build's folder, or a manifest. out: the page. clips: drawn at random by `seed`, in order of the manifest.
      progress: called with (clips done, all clips).

    Returns:
      (clips on the page, those of them that could not be decoded).

    Raises:
      UserError: no dataset there. StorageError: the page cannot be written.
    """
    if clips < 0 or seed < 0:
        raise UserError(f"--clips {clips} --seed {seed}: must be 0 or more")
    dataset = open_dataset(path)
    count = min(clips, len(dataset.rows))
    numbers = np.sort(np.random.default_rng(seed).choice(len(dataset.rows), count, replace=False)) if count else []
    rows = [dataset.rows[number] for number in numbers]
    drawn: dict[int, Answer | Died] = {}
    progress(0, count)
    media = [about(dataset.lines[number], "media") for number in numbers]
    jobs = ((place, {"row": row._asdict()}) for place, row in enumerate(rows))
    for place, answer in run_all(
        "vmm.data.inspection.pictures:draw", jobs, min(os.cpu_count() or 1, max(1, count)), _LIMITS
    ):
        drawn[place] = answer
        progress(len(drawn), count)
    cards = [_card(dataset, row, media[place], drawn[place]) for place, row in enumerate(rows)]
    title = text(path.resolve().name)
    page = (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>{_head(dataset)}\n<h2>{count:,} clips drawn with seed {seed}</h2>\n{''.join(cards)}"
        f"{_quarantine(dataset)}</body></html>\n"
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(out.name + ".part")
        temporary.write_bytes(page.encode())
        os.replace(temporary, out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror or error})") from None
    return count, sum(isinstance(answer, Died) or "reason" in answer.note for answer in drawn.values())


def text(value: object, longest: int = _LONGEST) -> str:
    """Returns text as HTML that shows it and does nothing else; what is too long is cut, and says so."""
    value = str(value)
    cut = f" … ({len(value):,} characters)" if len(value) > longest else ""
    # Control characters and halves of surrogate pairs are not allowed in a page.
    value = "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in value[:longest]
    )
    return html.escape(value) + cut


def _apart(value: object) -> str:
    """Returns text within a line; its direction of writing does not turn what stands around it."""
    return f'<bdi dir="auto">{text(value, 300)}</bdi>'


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _head(dataset: Dataset) -> str:
    known = [row.seconds for row in dataset.rows if row.seconds is not None]
    told = [f"{len(dataset.rows):,} clips", f"{_length(sum(known))}" if known else "lengths unknown"]
    if known and len(known) < len(dataset.rows):
        told[-1] += f" (of {len(known):,} clips; the others' lengths are unknown)"
    if dataset.quarantine is not None:
        told.append(f"{len(dataset.quarantine):,} left out")
    if dataset.duplicates is not None:
        told.append(f"{len(dataset.duplicates):,} look like another clip")
    return f'<p class="note">{", ".join(told)}</p>'


def _length(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


# ---- a clip -----------------------------------------------------------------------------------------


def _card(dataset: Dataset, row: Row, media: dict, answer: Answer | Died) -> str:
    words = f"{_captions(row)}{_labels(dataset, row)}"
    if isinstance(answer, Died) or "reason" in answer.note:
        reason, detail = (
            (answer.reason, answer.detail) if isinstance(answer, Died) else map(answer.note.get, ("reason", "detail"))
        )
        seen = f'<p><span class="bad">Cannot be decoded: {text(reason)}</span> <span class="note">{_apart(detail)}</span></p>'
        return f'<section class="clip"><h3>{_apart(row.id)}</h3>{seen}{words}</section>\n'
    facts, parts = answer.note, dict(zip(answer.note["pictures"], answer.parts))
    sheet = (
        f'<img class="sheet" alt="frames over time" src="{_data("image/jpeg", parts["sheet"])}">'
        if "sheet" in parts
        else f'<p class="{"bad" if facts["video_codec"] else "note"}">{"The pictures cannot be decoded" if facts["video_codec"] else "No pictures"}</p>'
    )
    return (
        f'<section class="clip"><h3>{_apart(row.id)}</h3><p class="note">{_facts(facts | _told(media))}</p>{sheet}'
        f'<div class="below"><div>{_sound(facts, parts)}</div><div>{_player(row, facts, parts)}</div><div>{words}</div></div></section>\n'
    )


def _told(media: dict) -> dict:
    """Returns what the manifest tells of a clip, where it is what it should be: a build saw every picture of it."""
    kinds = {"container": str, "video_codec": str, "audio_codec": str, "width": int, "height": int, "fps": (int, float)}
    return {key: media[key] for key, kind in kinds.items() if isinstance(media.get(key), kind)}


def _facts(facts: dict) -> str:
    told = [text(facts["container"])]
    if facts["video_codec"]:
        told.append(f"{text(facts['video_codec'])} {facts['width']}×{facts['height']}")
        told.append("fps unknown" if facts["fps"] is None else f"{facts['fps']:g} fps")
    told.append(text(facts["audio_codec"] or "no audio"))
    told.append("length unknown" if facts["seconds"] is None else f"{facts['seconds']:.2f} s")
    if facts["seconds"] is None or facts["seconds"] > facts["shown"]:
        told.append(f"the first {facts['shown']:g} s shown")
    told.append(f"{facts['bytes'] / 1000:,.1f} kB")
    return ", ".join(told)


def _sound(facts: dict, parts: dict[str, bytes]) -> str:
    if "mel" not in parts:
        return (
            '<p class="bad">The sound cannot be decoded</p>' if facts["audio_codec"] else '<p class="note">No audio</p>'
        )
    quiet = facts["peak"] < pictures.SILENT
    peak = '<span class="bad">silent</span>' if quiet else f"peak {20 * np.log10(facts['peak']):.1f} dB of full scale"
    return (
        f'<img class="mel" alt="log-mel spectrogram" src="{_data("image/png", parts["mel"])}">'
        f'<p class="note">log-mel, 20 Hz to {pictures.RATE // 2000} kHz, 0 to {facts["shown"]:.1f} s; {peak}</p>'
    )


def _player(row: Row, facts: dict, parts: dict[str, bytes]) -> str:
    if "play" not in parts:
        why = "too large to be put into the page" if facts["mime"] else "in a format that browsers do not play"
        return f'<p class="note">Not playable here: {why}</p>'
    kind = "video" if facts["video_codec"] else "audio"
    whole = f'<p class="note">Plays the whole file; the clip begins at {row.start or 0:g} s</p>' if facts["cut"] else ""
    return f'<{kind} controls src="{_data(facts["mime"], parts["play"])}"></{kind}>{whole}'


def _captions(row: Row) -> str:
    if not row.captions:
        return '<p class="note">No caption</p>'
    if len(row.captions) == 1:
        return f'<div class="caption" dir="auto">{text(row.captions[0])}</div>'
    items = "".join(f'<li><div dir="auto">{text(caption)}</div></li>' for caption in row.captions[:_PHRASINGS])
    more = len(row.captions) - _PHRASINGS
    return f"<ol>{items}</ol>" + (f'<p class="note">and {more} more phrasings</p>' if more > 0 else "")


def _labels(dataset: Dataset, row: Row) -> str:
    if not row.labels:
        return '<p class="note">No labels</p>'
    told = []
    for label, value in row.labels.items():
        indices = value if isinstance(value, list) else [value]
        names = [dataset.class_name(label, index) if index >= 0 else "unknown" for index in indices[:20]]
        more = f" and {len(indices) - 20} more" if len(indices) > 20 else ""
        told.append(f"<span>{_apart(label)}: <b>{_apart(', '.join(names) or 'none')}</b>{more}</span>")
    return f'<div class="labels">{"".join(told)}</div>'


# ---- what was left out ------------------------------------------------------------------------------


def _quarantine(dataset: Dataset) -> str:
    if dataset.quarantine is None:
        return '<h2>Left out</h2><p class="note">Not known: this is a manifest, not the folder of a build.</p>'
    if not dataset.quarantine:
        return '<h2>Left out</h2><p class="note">Nothing.</p>'
    reasons: dict[str, list[dict]] = {}
    for line in dataset.quarantine:
        reasons.setdefault(str(line.get("reason")), []).append(line)
    ordered = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    longest = len(ordered[0][1])
    bars = "".join(
        f"<tr><td>{_apart(reason)}</td><td>{len(lines):,}</td>"
        f'<td><div class="bar" style="width: {100 * len(lines) / longest:.1f}%"></div></td></tr>'
        for reason, lines in ordered
    )
    total = len(dataset.quarantine) + len(dataset.rows)
    page = (
        f"<h2>Left out: {len(dataset.quarantine):,} of {total:,} clips, {len(dataset.quarantine) / total:.1%}</h2>"
        f'<table class="bars">{bars}</table><table><tr><th>id</th><th style="width: 9em">reason</th><th>detail</th></tr>\n'
    )
    for reason, lines in ordered:
        for line in lines[:_PER_REASON]:
            page += f"<tr><td>{_apart(line.get('id'))}</td><td>{_apart(reason)}</td><td>{_apart(line.get('detail') or '')}</td></tr>\n"
        if len(lines) > _PER_REASON:
            page += (
                f'<tr><td colspan="3" class="note">and {len(lines) - _PER_REASON:,} more: {_apart(reason)}</td></tr>\n'
            )
    return page + "</table>"
