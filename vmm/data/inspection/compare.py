"""vmm data compare: the clips that two manifests share, so that two labs can score on what both still have."""

import hashlib
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from vmm.data.inspection.dataset import Dataset, about, printable
from vmm.data.manifest import Row
from vmm.errors import StorageError, UserError


class Content(NamedTuple):
    """What a clip is, whatever its id. Each is (sha256, start, end), None where no hash is known.

    clip: of the stored bytes and the span in them. source: of the file it was cut from and the span in that; of a
    row that names no source, its own bytes.
    """

    clip: tuple | None
    source: tuple | None

    def same(self, other: "Content") -> bool | None:
        """Whether both are the same clip; None: not known, because a side has no hash."""
        if (self.clip and self.clip == other.clip) or (self.source and self.source == other.source):
            return True
        return False if self.source and other.source else None


class Compared(NamedTuple):
    """Two datasets side by side. Each list holds ids, of `a` unless said otherwise, in order of `a`.

    pairs: rows of a and of b that are the same clip, as (place in a, place in b). same: of equal id and content.
    unknown: of equal id, a side without a hash: taken for the same. other_content: of equal id, but another clip.
    other_id: (id in a, id in b) of equal content. only_a, only_b: neither id nor content is in the other.
    captions: pairs whose phrasings differ. labels: label → pairs whose classes differ. renumbered: labels whose
    classes have other names, or another order. digest: SHA-256 of the common clips, see `_digest`.
    """

    pairs: list[tuple[int, int]]
    same: list[str]
    unknown: list[str]
    other_content: list[str]
    other_id: list[tuple[str, str]]
    only_a: list[str]
    only_b: list[str]
    captions: list[str]
    labels: dict[str, list[str]]
    renumbered: list[str]
    digest: str


def content(row: Row, line: dict) -> Content:
    """Returns what is known of a clip's content. line: its row of the manifest as it stands."""
    clip = _spanned(row.sha256, row.start, row.end, None)
    source = about(line, "source")
    if not isinstance(source.get("sha256"), str):
        return Content(clip, clip)
    return Content(clip, _spanned(source["sha256"], source.get("start"), source.get("end"), source.get("duration")))


def _spanned(sha256: str | None, start, end, length) -> tuple | None:
    if sha256 is None:
        return None
    start, end, length = (value if isinstance(value, (int, float)) else None for value in (start, end, length))
    # One lab gives no span, the other the whole length: the same clip.
    end = None if end is None or (length is not None and end >= length - 0.001) else round(end, 3)
    return sha256, round(start or 0.0, 3), end


def compare(a: Dataset, b: Dataset) -> Compared:
    """Matches two datasets by id, and by content where hashes are known; a clip is matched once at most."""
    mine, theirs = (
        [content(row, line) for row, line in zip(dataset.rows, dataset.lines)] for dataset in (a, b)
    )  # fmt: skip
    places = {row.id: place for place, row in enumerate(b.rows)}
    matched: dict[int, int] = {}
    same, unknown, other_content = [], [], []
    for i, row in enumerate(a.rows):
        if (j := places.get(row.id)) is not None:
            alike = mine[i].same(theirs[j])
            {True: same, None: unknown, False: other_content}[alike].append(row.id)
            if alike is not False:
                matched[i] = j
    free = defaultdict(list)
    for j in sorted(set(range(len(b.rows))) - set(matched.values()), reverse=True):
        for key in set(theirs[j]) - {None}:
            free[key].append(j)
    taken, other_id = set(matched.values()), []
    for i, row in enumerate(a.rows):
        for key in () if i in matched else mine[i]:
            there = free.get(key, []) if key else []
            while there and there[-1] in taken:
                there.pop()
            if there:
                matched[i] = there.pop()
                taken.add(matched[i])
                other_id.append((row.id, b.rows[matched[i]].id))
                break
    pairs = sorted(matched.items())
    changed = set(other_content)
    captions = [a.rows[i].id for i, j in pairs if set(a.rows[i].captions) != set(b.rows[j].captions)]
    labels, renumbered = _labels(a, b, pairs)
    return Compared(
        pairs, same, unknown, other_content, other_id,
        [row.id for i, row in enumerate(a.rows) if i not in matched and row.id not in changed],
        [row.id for j, row in enumerate(b.rows) if j not in taken and row.id not in changed],
        captions, labels, renumbered, _digest(a, b, mine, theirs, pairs),
    )  # fmt: skip


def _labels(a: Dataset, b: Dataset, pairs: list[tuple[int, int]]) -> tuple[dict[str, list[str]], list[str]]:
    """Compares labels by the names of classes where both know them, else by index; an absent label is class −1."""
    named = {name for name in a.classes if name in b.classes}

    def classes(dataset: Dataset, row: Row, label: str) -> list[str]:
        value = row.labels.get(label, -1)
        value = sorted(value if isinstance(value, list) else [value])
        return sorted(dataset.class_name(label, index) for index in value) if label in named else value

    differ = defaultdict(list)
    for i, j in pairs:
        for label in sorted({*a.rows[i].labels, *b.rows[j].labels}):
            if classes(a, a.rows[i], label) != classes(b, b.rows[j], label):
                differ[label].append(a.rows[i].id)
    return dict(differ), sorted(name for name in named if a.classes[name] != b.classes[name])


def _digest(a: Dataset, b: Dataset, mine: list[Content], theirs: list[Content], pairs: list[tuple[int, int]]) -> str:
    """Returns the SHA-256 over one JSON line a pair, sorted: its id (both, sorted, where they differ), and the content
    that both know (source before clip). The same whichever dataset comes first."""
    lines = []
    for i, j in pairs:
        known = [x for x, y in zip(reversed(mine[i]), reversed(theirs[j])) if x and x == y]
        lines.append(json.dumps([sorted({a.rows[i].id, b.rows[j].id}), known[0] if known else None]))
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest()


# ---- what is written and said -----------------------------------------------------------------------


def write_common(a: Dataset, b: Dataset, compared: Compared, prefix: Path) -> tuple[Path, Path]:
    """Writes PREFIX-a.jsonl and PREFIX-b.jsonl: the common clips as each has them, in order of `a`.

    Raises:
      UserError: nothing is common, or a file of that name is one of the two datasets.
      StorageError: the disk is full or the folder cannot be written.
    """
    if not compared.pairs:
        raise UserError(f"{a.path} and {b.path}: no clip is in both, so there is nothing to write to {prefix}-a.jsonl")
    out = tuple(prefix.with_name(f"{prefix.name}-{letter}.jsonl") for letter in "ab")
    for path in out:
        if path.resolve() in (a.manifest.resolve(), b.manifest.resolve()):
            raise UserError(f"{path}: is one of the manifests that are compared; give another --out")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        for path, dataset, side in zip(out, (a, b), (0, 1)):
            lines = (_moved(dataset, pair[side], path.parent) for pair in compared.pairs)
            temporary = path.with_name(path.name + ".part")
            # A lone half of a surrogate pair is no UTF-8; written as \udXXX it is the same JSON.
            temporary.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
            os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"{prefix}: cannot be written ({error.strerror or error})") from None
    return out


def _moved(dataset: Dataset, place: int, folder: Path) -> str:
    """Returns a line of the manifest as it must stand in another folder."""
    row, line = dataset.rows[place], dataset.lines[place]
    path = Path(line["path"])
    if not path.is_absolute():
        # Links are followed first: a folder's `..` is not that of the link to it.
        path = Path(os.path.relpath(Path(row.path).parent.resolve() / path.name, folder.resolve()))
    return json.dumps(line | {"id": row.id, "path": str(path)}, ensure_ascii=False)


def print_compared(a: Dataset, b: Dataset, compared: Compared) -> None:
    """Prints the counts, with some ids of each, and the digest."""
    console = Console(markup=False, emoji=False, highlight=False)
    table = Table(title=printable(f"A {a.path}, B {b.path}"), title_justify="left")
    for column in ("", "clips", "for example"):
        table.add_column(column, overflow="fold", justify="right" if column == "clips" else "left")

    def line(name: str, ids: list, note: str = "") -> None:
        some = ", ".join(printable(item if isinstance(item, str) else " = ".join(item)) for item in ids[:3])
        table.add_row(name, f"{len(ids):,}", some + (", …" if len(ids) > 3 else "") + note)

    table.add_row("in A", f"{len(a.rows):,}", "")
    table.add_row("in B", f"{len(b.rows):,}", "")
    table.add_row("in both", f"{len(compared.pairs):,}", "", style="bold")
    line("  same id and content", compared.same)
    line("  same id, content not known", compared.unknown)
    line("  same content, another id", compared.other_id)
    line("same id, other content", compared.other_content)
    line("only in A", compared.only_a, _lost(b, compared.only_a))
    line("only in B", compared.only_b, _lost(a, compared.only_b))
    line("in both, captions differ", compared.captions)
    if not compared.labels:
        line("in both, labels differ", [])
    for label, ids in compared.labels.items():
        line(f"in both, label {printable(label)} differs", ids)
    console.print(table)
    for label in compared.renumbered:
        print(f"label {printable(label)}: the classes of A and B have other names or another order; compared by name")
    print(f"digest of the clips in both: sha256:{compared.digest}")


def _lost(other: Dataset, ids: list[str]) -> str:
    """Says how many of the clips that a side lacks are in its quarantine."""
    reasons = {str(line.get("id")): str(line.get("reason")) for line in other.quarantine or ()}
    found = defaultdict(int)
    for identity in ids:
        if identity in reasons:
            found[reasons[identity]] += 1
    text = ", ".join(f"{count} {printable(reason)}" for reason, count in sorted(found.items()))
    return f" ({other.path.name}'s quarantine: {text})" if text else ""
