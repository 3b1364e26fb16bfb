"""What people have → entries for a build: a table of sources, each one function in one file."""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

from vmm.data.sources.action import charades, hmdb51, kinetics, something_something_v2, ucf101
from vmm.data.sources.captioned import activitynet_captions, msrvtt, youcook2
from vmm.data.sources.entry import Entry
from vmm.data.sources.folder import folder
from vmm.data.sources.sound import audioset, ave, esc50, vggsound
from vmm.data.sources.tables import read_csv, read_jsonl
from vmm.data.sources.tfds import tfds
from vmm.data.sources.webdataset import webdataset
from vmm.errors import UserError, one_of
from vmm.plugins import Kinds

SOURCES = Kinds(
    "sources",
    {
        "folder": folder,
        "csv": read_csv,
        "jsonl": read_jsonl,
        "webdataset": webdataset,
        "tfds": tfds,
        # Published datasets, as they are distributed.
        "activitynet_captions": activitynet_captions,
        "audioset": audioset,
        "ave": ave,
        "charades": charades,
        "esc50": esc50,
        "hmdb51": hmdb51,
        "kinetics": kinetics,
        "msrvtt": msrvtt,
        "something_something_v2": something_something_v2,
        "ucf101": ucf101,
        "vggsound": vggsound,
        "youcook2": youcook2,
    },
)


def open_source(path: Path, kind: str | None, options: Mapping) -> tuple[str, Iterator[Entry], str]:
    """Returns (kind, entries, the words that name source and options in build.json).

    Args:
      kind: a key of SOURCES; None: told by the path. options: option → value; None or empty: not given.

    Raises:
      UserError: the kind is unknown or cannot be told, or does not know an option.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    kind = kind or _told(path)
    source = SOURCES.find(kind)
    if source is None:
        raise UserError(f"--kind {kind}: {one_of(kind, SOURCES.names())}")
    given = {name: value for name, value in options.items() if value}
    known = set(inspect.signature(source).parameters) - {"path"}
    if set(given) - known:
        raise UserError(f"--{sorted(set(given) - known)[0]}: the source {kind} has no such option; {one_of('', known)}")
    words = " ".join([kind, str(path), *(f"{name}={value}" for name, value in sorted(given.items()))])
    return kind, source(path, **given), words


def _told(path: Path) -> str:
    if path.is_dir():
        if any(path.glob("dataset_info.json")) or any(path.glob("*/dataset_info.json")):
            return "tfds"
        return "webdataset" if any(path.glob("*.tar")) else "folder"
    suffix = path.suffix.lower()
    kinds = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".tar": "webdataset"}
    if suffix not in kinds:
        raise UserError(f"{path}: what is it? name it with --kind; {one_of(suffix, SOURCES.names())}")
    return kinds[suffix]
