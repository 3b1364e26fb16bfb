"""vmm bench data: what the data plane gives, measured on this machine, as tables and as JSON."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import av
from rich.console import Console
from rich.table import Table

from vmm.bench import clips, decode, wait, workers
from vmm.build import write_text
from vmm.data.samples import Clip
from vmm.errors import StorageError, UserError
from vmm.progress import progress


class Settings(NamedTuple):
    """What is measured: the flags of the command, in its words (vmm/bench/commands.py)."""

    scratch: Path
    seconds: float
    parts: tuple[str, ...]
    json: Path | None
    data: Path | None
    tokenizer: Path | None
    length: float
    cores: int
    batch: int
    batches: int
    models: tuple[str, ...]
    step_ms: float | None
    step_clips: int
    device_tflops: float
    utilisation: float
    device_cores: int


def bench_data(settings: Settings) -> dict:
    """Measures, prints and returns {"machine", "decode", "workers", "wait", "memory"}, as far as asked for.

    Raises:
      UserError: a setting is out of range, or a dataset or folder is not what it should be.
      StorageError: the JSON file cannot be written.
    """
    _check(settings)
    told = {"machine": {"cores": os.cpu_count(), "python": platform.python_version(), "av": av.__version__}}
    window = decode.Window()
    console = Console()
    with progress("starting") as tell:

        def say(words: str) -> None:
            tell(doing=words)

        parts = set(settings.parts)
        samples = []
        if parts & {"decode", "wait"} or not settings.data:
            samples = clips.make(settings.scratch, settings.length, lambda name: say(f"writing {name}"))
        if parts & {"decode", "wait"}:
            rows = decode.measure(samples, window, settings.seconds, lambda name: say(f"decoding {name}"))
            if "decode" in parts:
                told["decode"] = rows
                console.print(_decode_table(rows, window, settings))
        if parts & {"workers", "memory"}:
            manifest, tokenizer = settings.data, settings.tokenizer
            if manifest is None:
                stored = next(sample for sample in samples if sample.gop == 30)
                manifest, tokenizer = clips.dataset(settings.scratch, stored.path, settings.length, window.seconds)
            clip = Clip(window.seconds, window.frames, window.size, window.sample_rate)
            if "workers" in parts:
                told["workers"] = workers.scaling(
                    manifest, tokenizer, clip, settings.cores, settings.batch, settings.seconds, say
                )
                console.print(_workers_table(told["workers"], settings))
        if "wait" in parts:
            per_core = {row["clip"]: row["vmm"] for row in rows}
            told["wait"] = wait.table(
                per_core, settings.device_cores, settings.models, settings.device_tflops, settings.utilisation,
                settings.step_ms, settings.step_clips,
            )  # fmt: skip
            console.print(_wait_table(told["wait"], settings))
        if "memory" in parts:
            told["memory"] = workers.memory(
                manifest, tokenizer, clip, min(2, settings.cores), settings.batch, settings.batches,
                lambda done, total: say(f"memory: batch {done} of {total}"),
            )  # fmt: skip
            console.print(_memory_line(told["memory"]))
    if settings.json:
        try:
            settings.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(settings.json, json.dumps(told, indent=1) + "\n")
        except OSError as error:
            raise StorageError(f"--json {settings.json}: cannot be written ({error.strerror})") from None
        console.print(f"{settings.json}: written", soft_wrap=True)
    return told


def _check(settings: Settings) -> None:
    if (settings.data is None) != (settings.tokenizer is None):
        raise UserError("--data and --tokenizer: give both, or neither to use test clips")
    shortest = decode.Window().seconds + 1
    if settings.length < shortest:
        raise UserError(f"--length {settings.length:g}: a test file has at least {shortest:.2f} s")
    for name in ("seconds", "cores", "batch", "step_ms", "step_clips", "device_tflops", "device_cores"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be above 0")
    if settings.batches < 8:
        raise UserError(f"--batches {settings.batches}: a slope needs at least 8")
    if not 0 < settings.utilisation <= 1:
        raise UserError(f"--utilisation {settings.utilisation:g}: a share of the peak, above 0 and at most 1")
    for model in settings.models:
        wait.clip_flops(model)  # raises if there is no such model


def _table(title: str, words: Sequence[str], numbers: Sequence[str], rows: list, caption: str) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _decode_table(rows: list[dict], window: decode.Window, settings: Settings) -> Table:
    return _table(
        f"One core: {window.frames} frames at {window.size}² and the sound of {window.seconds:.2f} s, "
        f"from {settings.length:g} s",
        ("clip",),
        ("GOP", "clips/s", "plain loop", "ratio"),
        [
            (
                row["clip"], str(row["gop"]), f"{row['vmm']:.1f}", f"{row['loop']:.1f}",
                f"{row['ratio']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})",
            )
            for row in rows
        ],
        "Processor time, both ways in turn on the same windows. Ratio: median and\n"
        "middle half of pairs; above 1 is quicker than a plain PyAV loop.",
    )  # fmt: skip


def _workers_table(rows: list[dict], settings: Settings) -> Table:
    return _table(
        f"The loader: batches of {settings.batch}, {os.cpu_count()} cores",
        (),
        ("worker processes", "threads each", "clips/s", "efficiency", "core ms a clip"),
        [
            (
                str(row["workers"]), str(row["threads"]), f"{row['clips_per_second']:.1f}",
                f"{row['efficiency']:.2f}", "–" if row["core_ms"] is None else f"{row['core_ms']:.1f}",
            )
            for row in rows
        ],
        "Efficiency: n workers against n times one; of 0 workers, threads against one\n"
        "thread. Core ms a clip: processor time, of workers and this process.",
    )  # fmt: skip


def _wait_table(rows: list[dict], settings: Settings) -> Table:
    if settings.step_ms is None:
        device = f"{settings.device_tflops:g} TFLOP/s × {settings.utilisation:.0%} ÷ operations of a clip"
    else:
        device = "the step's time as given"
    return _table(
        f"Waiting for input, by arithmetic: one device, {settings.device_cores} cores like one of these",
        ("training", "clip"),
        ("needs clips/s", "gets clips/s", "waits", "cores needed"),
        [
            (
                row["model"], row["clip"], f"{row['need']:.0f}", f"{row['supply']:.0f}", f"{row['waiting']:.0%}",
                f"{row['cores_needed']:.0f}",
            )
            for row in rows
        ],
        f"Needs: {device}.\nGets: one core's clips/s × cores. Waits: 1 − gets ÷ needs. Nothing ran on a\n"
        "device; a clip is decoded each time it is shown.",
    )  # fmt: skip


def _memory_line(row: dict) -> str:
    return (
        f"Memory over {row['batches']} batches ({row['clips']} clips), {row['workers']} workers: "
        f"{row['slope']:+.0f} KiB for 1,000 clips; {row['mebibytes']:.0f} MiB at the end, workers included."
    )
