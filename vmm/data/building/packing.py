"""What a build keeps on its way: notes of what came of each entry, then, a shard at a time, its file and its rows."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from vmm.data.asked import cut
from vmm.data.sandbox import Answer, Died
from vmm.data.shards import write_shard
from vmm.data.sources.entry import Entry


def note_of(work: Path, shard: int, number: int) -> Path:
    """Returns where stands what came of an entry; its parts lie beside it, as .bin."""
    return work / f"{shard:05d}" / f"{number:08d}.json"


def keep(path: Path, answer: Answer | Died) -> None:
    """Writes what came of an entry: its parts, then its note, which makes it done."""
    path.parent.mkdir(exist_ok=True)
    if isinstance(answer, Died):
        note = {"reason": answer.reason, "detail": answer.detail, "clips": [], "sizes": []}
    else:
        note = answer.note | {"sizes": [len(part) for part in answer.parts]}
        write_whole(path.with_suffix(".bin"), b"".join(answer.parts))
    write_whole(path, json.dumps(note).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file; it appears whole or not at all. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # a cluster may do one shard's work twice
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def json_lines(values: Iterable[dict]) -> bytes:
    """Returns JSON lines in UTF-8; a file name that is none stays what it is, in escapes."""
    lines = []
    for value in values:
        try:
            lines.append(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        except UnicodeEncodeError:
            lines.append(json.dumps(value).encode() + b"\n")
    return b"".join(lines)


def read_json_lines(path: Path) -> list[dict]:
    """Returns the values of a file of json_lines."""
    # Not splitlines(): a caption may hold U+2028 or U+0085.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def rows_of(work: Path, shard: int) -> Path:
    """Returns where stand the rows of a finished shard."""
    return work / f"rows-{shard:05d}.jsonl"


def pack(plan: Mapping[int, Entry], shard: int, per_shard: int, out: Path, original: bool) -> None:
    """Turns the finished entries of a shard into its file and its rows.

    Args:
      plan: number → entry, with at least this shard's. per_shard: entries a shard. original: the clips are original bytes.
    """
    work = out / ".build"
    rows_path = rows_of(work, shard)
    if rows_path.is_file():
        return
    rows, name = [], f"shards/{shard:05d}.arrayrecord"

    def records() -> Iterator[bytes]:
        count = 0
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            if number not in plan:
                break
            entry = plan[number]
            if entry.reason:
                rows.append(_left_out(entry, entry.id, entry.reason, entry.detail))
                continue
            note = json.loads(note_of(work, shard, number).read_text())
            if "reason" in note:
                rows.append(_left_out(entry, entry.id, note["reason"], note["detail"]))
                continue
            data = note_of(work, shard, number).with_suffix(".bin").read_bytes()
            places, start, used = [], 0, {}
            for size in note["sizes"]:
                places.append(data[start : start + size])
                start += size
            for i, clip in enumerate(note["clips"]):
                identity = entry.id if len(note["clips"]) == 1 else f"{entry.id}/{i:04d}"
                if "reason" in clip:
                    rows.append(_left_out(entry, identity, clip["reason"], clip["detail"], clip["start"], clip["end"]))
                    continue
                part = clip.pop("part")
                if part not in used:
                    yield places[part]
                    used[part] = count, hashlib.sha256(places[part]).hexdigest()
                    count += 1
                rows.append(_row(entry, identity, name, *used[part], note["source"], clip, original))

    write_shard(out / name, records())
    write_whole(rows_path, json_lines(rows))
    shutil.rmtree(work / f"{shard:05d}", ignore_errors=True)


def _left_out(entry: Entry, identity: str, reason: str, detail: str, start=None, end=None) -> dict:
    return {
        "id": identity, "path": entry.path, "member": entry.member, "reason": reason, "detail": detail,
        "start": entry.start if start is None else start, "end": entry.end if end is None else end,
    }  # fmt: skip


def _row(
    entry: Entry, identity: str, path: str, record: int, sha256: str, source: dict, clip: dict, original: bool
) -> dict:
    """Returns a line of the manifest; labels are still names."""
    start, end = clip.pop("start"), clip.pop("end")
    where = {"path": entry.path, "member": entry.member, "start": start, "end": end}
    span = (entry.start, entry.end if entry.end is not None else source.get("duration"))
    asked = entry.asked if original else cut(entry.asked, start, end if end is not None else span[1], span)
    return {
        "id": identity, "path": path, "record": record,
        # A stored piece begins at 0; kept originals hold more than the clip.
        "start": start if original else None, "end": end if original else None,
        "caption": list(entry.captions), "labels": entry.labels, **asked, "sha256": sha256, "media": clip,
        "source": where | source,
    }  # fmt: skip
