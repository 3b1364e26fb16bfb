"""WebDataset tars: members of one key are one clip; media stay in the tar and are read where they lie."""

import json
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path

from vmm.data.sources.entry import MEDIA, VIDEO, Bad, Entry, captions_of, labels_of, tell_unused
from vmm.errors import UserError

_TEXTS = (".txt", ".json", ".cls")
_LONGEST = 1 << 20  # bytes of a text member
# What a header can break with, besides what is a tar error.
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError)


def webdataset(path: Path, label: str = "") -> Iterator[Entry]:
    """Yields the clips of a tar, or of every tar of a folder, in the order of names, then of members.

    A key is a member's name up to the first dot of its last part; where several media have one key, what stands between it
    and their last dot tells them apart (`a.1.mp4` and `a.1.txt`, `a.2.mp4`). .txt: the caption; .json: {"caption": …} and, under
    `label`, the class; .cls: the class under `label`. Links, absolute names and names with .. are refused. What other keys
    the .json have is told once.
    """
    keys: dict[str, None] = {}
    if path.is_file():
        try:
            with tarfile.open(path, "r:"):
                pass
        except _BROKEN as error:
            raise UserError(f"{path}: not a plain tar ({error}); decompress a .tar.gz first") from None
        yield from _tar(path, label, keys)
        _tell_rest(path, keys, label)
        return
    tars = sorted(path.glob("*.tar"))
    if not tars:
        raise UserError(f"{path}: holds no .tar files")
    for tar in tars:
        yield from _tar(tar, label, keys)
    _tell_rest(path, keys, label)


def _tell_rest(path: Path, keys: dict[str, None], label: str) -> None:
    names = [name for name in keys if name not in ("caption", "text", label)]
    tell_unused(path, names, "--label NAME takes one for classes")


def _tar(path: Path, label: str, keys: dict[str, None]) -> Iterator[Entry]:
    """Yields the entries of one tar. keys: those of its .json are added."""
    group = _Group(path, None, keys)
    try:
        tar = tarfile.open(path, "r:")  # plain tars only: inside a compressed one nothing can be found again
    except _BROKEN as error:
        yield Entry(path.name, str(path), reason="bad line", detail=f"not a plain tar: {error}")
        return
    with tar:
        while True:
            try:
                member = tar.next()
                if member is None:
                    _check_end(path, tar.offset)
                    break
                tar.members.clear()  # a tar may have millions
                if member.isdir():
                    continue
                head, tail = posixpath.split(member.name)
                stem, _, suffix = tail.partition(".")
                key, suffix = posixpath.join(head, stem), "." + suffix.lower()
                text = tar.extractfile(member).read(_LONGEST) if member.isreg() and suffix.endswith(_TEXTS) else b""
            except _BROKEN as error:
                yield from group.clip(label)
                yield Entry(
                    f"{path.name}@{tar.offset}", str(path), reason="bad line", detail=f"the tar breaks: {error}"
                )
                return
            if key != group.key:
                yield from group.clip(label)
                group = _Group(path, key, keys)
            kind = _refused(member)
            if kind:
                group.refused = True
                yield Entry(
                    f"{path.name}/{member.name}", str(path), reason="bad path", detail=f"{kind}, refused in a dataset"
                )
            else:
                group.members[suffix] = text, member
    yield from group.clip(label)


def _check_end(path: Path, offset: int) -> None:
    """Raises EOFError where a tar goes on behind its end: tarfile stops at a damaged header without a word."""
    with open(path, "rb") as file:
        file.seek(offset)
        while block := file.read(1 << 16):
            if block.strip(b"\0"):
                raise EOFError("a damaged header, or another tar behind this one")


def _refused(member: tarfile.TarInfo) -> str:
    """Returns what a member is that no dataset may have; empty for a good one."""
    if member.islnk() or member.issym():
        return "a link"
    if not member.isreg() or member.issparse():
        return "not a plain file"
    return "a name that leaves the tar" if member.name.startswith("/") or ".." in member.name.split("/") else ""


class _Group:
    """Members of one key, which follow one another."""

    def __init__(self, path: Path, key: str | None, keys: dict[str, None]):
        self.path, self.key, self.members, self.refused, self.keys = path, key, {}, False, keys

    def clip(self, label: str) -> Iterator[Entry]:
        """Yields the entry of the group: none where its medium was refused."""
        if self.key is None or not self.members:
            return
        entry = Entry(f"{self.path.stem}/{self.key}", str(self.path))
        # The longest suffix that is one: of "a.left.mp4" the last part.
        kinds = {suffix: "." + suffix.rsplit(".", 1)[1] for suffix in self.members}
        media = sorted((kind not in VIDEO, suffix) for suffix, kind in kinds.items() if kind in MEDIA)
        if not media:
            if not self.refused:
                yield entry._replace(reason="bad line", detail=f"no media among {', '.join(sorted(self.members))}")
            return
        parts = sorted({suffix.rsplit(".", 1)[0] for _, suffix in media})
        for part in parts:
            found = [suffix for _, suffix in media if suffix.rsplit(".", 1)[0] == part]
            yield self._one(entry if len(parts) == 1 else entry._replace(id=entry.id + part), found[0], part, label)
            for suffix in found[1:]:
                yield Entry(
                    f"{entry.id}{suffix}",
                    str(self.path),
                    reason="not taken",
                    detail=f"the clip is {self.key}{found[0]}",
                )

    def _one(self, entry: Entry, suffix: str, part: str, label: str) -> Entry:
        """Returns the entry of one medium. part: what stands before its last suffix, behind the key."""
        _, member = self.members[suffix]
        entry = entry._replace(member=("bytes", member.offset_data, member.size))
        try:
            captions, labels = self._words(label, part)
            return entry._replace(captions=captions_of(captions), labels=labels_of(labels))
        except (ValueError, RecursionError):
            return entry._replace(reason="bad caption", detail="not UTF-8, or not JSON")
        except Bad as error:
            return entry._replace(reason=error.reason, detail=error.detail)

    def _words(self, label: str, part: str) -> tuple:
        """Returns captions and labels: of the part, else of the whole key."""
        captions, labels = None, {}

        def text(suffix: str) -> str | None:
            found = self.members.get(part + suffix, self.members.get(suffix))
            return None if found is None else found[0].decode("utf-8-sig")

        if (data := text(".json")) is not None:
            value = json.loads(data)
            if isinstance(value, dict):
                self.keys |= dict.fromkeys(value)
                captions = value.get("caption", value.get("text"))
                labels = {label: value.get(label)} if label else {}
        if (data := text(".txt")) is not None:
            captions = data
        if label and (data := text(".cls")) is not None:
            labels = {label: data.strip()}
        return captions, labels
