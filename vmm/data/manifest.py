"""The manifest: one JSON line per clip, the only thing the loader knows of a dataset.

    {"id": "0001", "path": "0001.mp4", "start": 0.0, "end": 2.0, "caption": "…", "labels": {"shape": 3}}

`path` is relative to the manifest's folder; `start` and `end` are seconds, null for the whole
file; `caption` is a string, a list of alternative phrasings, or null; `labels` are class indices, or
lists of them. Only `path` is required. What `vmm data build` writes has more: `record`, the place in
an ArrayRecord shard that `path` then names; `sha256` of the clip's bytes, checked whenever they are
read; `media` and `source`, what is known of the clip and of the file that it was cut from.
"""

import errno
import hashlib
import json
import math
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vmm.data.media import DecodeError, reason_of
from vmm.data.members import read_member
from vmm.data.remote import fetch, is_address, open_address
from vmm.errors import UserError, one_of

_KEYS = ("id", "path", "record", "start", "end", "caption", "labels", "sha256", "media", "source")


class Row(NamedTuple):
    """One clip. start, end: seconds or None; captions: alternative phrasings, may be empty.

    record: its place in the shard that path names, None: path is the clip. sha256: of its bytes, where known.
    duration: of the stored clip in seconds, where a build told it.
    """

    id: str
    path: str
    start: float | None
    end: float | None
    captions: tuple[str, ...]
    labels: dict[str, int | list[int]]
    record: int | None = None
    sha256: str | None = None
    duration: float | None = None

    @property
    def seconds(self) -> float | None:
        """The clip's length, None where neither the span nor the build tells it."""
        return self.duration if self.end is None else self.end - (self.start or 0.0)

    def read(self, remote: str = "") -> str | BytesIO | BinaryIO:
        """Returns what the decoder opens: the path, or the bytes where they lie in a shard or must be checked.

        Args:
          remote: folder that keeps shards fetched from addresses; needed where the path is one.

        Raises:
          DecodeError: "missing", "unreadable", or "changed": the bytes are not those that the manifest tells of.
        """
        try:
            path = self.path
            if is_address(path):
                if self.record is None and self.sha256 is None:
                    return open_address(path)
                path = fetch(path, remote)
            elif self.record is None and self.sha256 is None:
                return path
            data = read_member(path, () if self.record is None else ("record", self.record))
        except (OSError, EOFError) as error:
            # A record that cannot be read back is not what the build wrote.
            broken = getattr(error, "errno", None) == errno.EIO
            raise DecodeError("changed" if broken else reason_of(error), str(error)) from None
        if self.sha256 is not None and hashlib.sha256(data).hexdigest() != self.sha256:
            raise DecodeError("changed", f"sha256 is not the manifest's {self.sha256}")
        return BytesIO(data)


def read_manifest(path: str | Path, remote: bool = False) -> list[Row]:
    """Reads and checks a manifest.

    Args:
      path: the file; with `remote`, also an address (gs://…), whose clips lie beside it.
      remote: clips may be named by addresses.

    Raises:
      UserError: the file is missing, empty, or has a line that is no clip; names file and line.
    """
    content = _content(path, remote)
    folder = str(path).rpartition("/")[0] if is_address(path) else str(Path(path).parent)
    rows, seen = [], {}
    try:
        content = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"dataset {path}: not UTF-8 text ({error})") from None
    # Not splitlines(): a caption may hold U+2028 or U+0085.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            row = _row(line, f"dataset {path}, line {number}", folder, remote)
            if row.id in seen:
                raise UserError(
                    f"dataset {path}, line {number}: id {row.id!r} stands already in line {seen[row.id]}; ids must differ"
                )
            seen[row.id] = number
            rows.append(row)
    if not rows:
        raise UserError(f"dataset {path}: holds no clips; add one JSON line per clip")
    return rows


def _content(path: str | Path, remote: bool) -> bytes:
    if is_address(path):
        if not remote:
            raise UserError(
                f"dataset {path}: an address; set data.remote to a folder for what is fetched, or download it"
            )
        try:
            with open_address(str(path)) as file:
                return file.read()
        except OSError as error:
            raise UserError(f"dataset {path}: {error}") from None
    if not Path(path).is_file():
        raise UserError(
            f"dataset {path}: no such file; write a manifest (one JSON line per clip with a `path`), "
            "or make the synthetic world with `vmm data world`"
        )
    return Path(path).read_bytes()


def _row(line: str, where: str, folder: str, remote: bool) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get("path"), str):
        raise UserError(f"{where}: a clip needs a `path`")
    for key in value:
        if key not in _KEYS:
            raise UserError(f"{where}: no such key {key!r}; {one_of(key, _KEYS)}")
    for key in ("start", "end"):
        bound = value.get(key)
        if bound is not None and (
            isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 <= bound < math.inf
        ):
            raise UserError(f"{where}: {key} must be seconds, got {bound!r}")
    start, end = value.get("start"), value.get("end")
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{where}: end {end} is not after start {start or 0.0}")
    caption = value.get("caption")
    captions = caption if isinstance(caption, list) else [caption] if caption else []
    if not all(isinstance(text, str) for text in captions):
        raise UserError(f"{where}: caption must be a string, a list of strings or null")
    labels = value.get("labels") or {}
    if not isinstance(labels, dict) or not all(
        type(item) is int and item >= -1
        for entry in labels.values()
        for item in (entry if isinstance(entry, list) else [entry])
    ):
        raise UserError(f"{where}: labels must be name → class index (-1: unknown) or a list of them, got {labels!r}")
    name = value["path"]
    if is_address(name) and not remote:
        raise UserError(
            f"{where}: {name} is an address; set data.remote to a folder for what is fetched, or download it"
        )
    about = value.get("media") if isinstance(value.get("media"), dict) else {}
    duration = about.get("duration")
    if duration is not None and (not isinstance(duration, (int, float)) or not 0 <= duration < math.inf):
        raise UserError(f"{where}: media.duration must be seconds, got {duration!r}")
    record, sha256 = value.get("record"), value.get("sha256")
    if record is not None and (type(record) is not int or record < 0):
        raise UserError(f"{where}: record must be a place in a shard, got {record!r}")
    if sha256 is not None and not (isinstance(sha256, str) and len(sha256) == 64):
        raise UserError(f"{where}: sha256 must be 64 hex digits, got {sha256!r}")
    return Row(
        id=str(value["path"] if value.get("id") is None else value["id"]),
        path=name if is_address(name) else f"{folder}/{name}" if is_address(folder) else str(Path(folder) / name),
        start=start,
        end=end,
        captions=tuple(text for text in captions if text.strip()),
        labels=labels,
        record=record,
        sha256=sha256,
        duration=duration,
    )


def manifest_digest(path: str | Path) -> str:
    """Returns the SHA-256 of the manifest, the name under which results quote a dataset."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
