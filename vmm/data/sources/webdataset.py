"""WebDataset tars: members of one key are one clip; media stay in the tar and are read where they lie."""

import json
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path

from vmm.data.sources.entry import MEDIA, Bad, Entry, captions_of
from vmm.errors import UserError


def webdataset(path: Path, label: str = "") -> Iterator[Entry]:
    """Yields the clips of a tar, or of every tar of a folder, in the order of names, then of members.

    A key is a member's name up to the first dot of its last part. .txt: the caption; .json: {"caption": …} and, under
    `label`, the class; .cls: the class under `label`. Links, absolute names and names with .. are refused.
    """
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not tars:
        raise UserError(f"{path}: holds no .tar files")
    for tar in tars:
        yield from _tar(tar, label)


def _tar(path: Path, label: str) -> Iterator[Entry]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    key, group = None, {}
    try:
        with tarfile.open(path, "r:") as tar:  # plain tars only: inside a compressed one nothing can be found again
            while True:
                try:
                    member = tar.next()
                except tarfile.TarError as error:
                    yield from _clip(path, key, group, label)
                    yield Entry(
                        f"{path.name}@{tar.offset}", str(path), reason="bad line", detail=f"the tar breaks: {error}"
                    )
                    return
                if member is None:
                    break
                name = member.name
                if member.isdir():
                    continue
                if not member.isreg() or name.startswith("/") or ".." in name.split("/"):
                    kind = "link" if member.islnk() or member.issym() else "name or kind"
                    yield Entry(
                        f"{path.name}/{name}",
                        str(path),
                        reason="bad path",
                        detail=f"a {kind} that a dataset may not have",
                    )
                    continue
                head, tail = posixpath.split(name)
                stem, _, suffix = tail.partition(".")
                mine = posixpath.join(head, stem)
                if mine != key:
                    yield from _clip(path, key, group, label)
                    key, group = mine, {}
                group["." + suffix.lower()] = (
                    tar.extractfile(member).read(1 << 20) if _is_text(suffix) else b"",
                    member,
                )
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a plain tar ({error}); decompress a .tar.gz first") from None
    yield from _clip(path, key, group, label)


def _is_text(suffix: str) -> bool:
    return suffix.lower() in ("txt", "json", "cls")


def _clip(path: Path, key: str | None, group: dict, label: str) -> Iterator[Entry]:
    """Yields the clip of one key's members: none where there is no medium among them."""
    kind = next((suffix for suffix in group if suffix in MEDIA), None)
    if key is None or kind is None:
        return
    _, member = group[kind]
    entry = Entry(f"{path.stem}/{key}", str(path), member=("bytes", member.offset_data, member.size))
    try:
        captions, labels = (), {}
        if ".json" in group:
            value = json.loads(group[".json"][0].decode())
            if isinstance(value, dict):
                captions = captions_of(value.get("caption", value.get("text")))
                if label and value.get(label) is not None:
                    labels = {label: value[label]}
        if ".txt" in group:
            captions = captions_of(group[".txt"][0].decode())
        if label and ".cls" in group:
            labels = {label: group[".cls"][0].decode().strip()}
        yield entry._replace(captions=captions, labels=labels)
    except (UnicodeDecodeError, ValueError):
        yield entry._replace(reason="bad caption", detail="not UTF-8, or not JSON")
    except Bad as error:
        yield entry._replace(reason=error.reason, detail=error.detail)
