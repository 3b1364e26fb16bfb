"""vmm data build: a source → shards, a manifest, and the list of what was left out and why.

    OUT/shards/00000.arrayrecord …   one stored clip a record
    OUT/manifest.jsonl               one line a clip (vmm/data/manifest.py), in the source's order
    OUT/quarantine.jsonl             one line a clip that was left out: id, path, reason, detail
    OUT/duplicates.jsonl             clips that look like an earlier one
    OUT/classes.json                 label → the names of its classes, in order of index
    OUT/build.json                   how it was built, counts, and a hash of every file; written last

Work in progress lies in OUT/.build: the plan, what came of each entry, and the rows of each finished
shard. Every step writes aside and renames, so a killed build goes on where it was, and what it gives
is a function of the source and the settings alone.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from vmm.build import differences
from vmm.data.building.classes import class_index, number_classes
from vmm.data.building.duplicates import near_duplicates
from vmm.data.building.packing import json_lines, keep, note_of, pack, read_json_lines, rows_of, write_whole
from vmm.data.building.transcode import Storage
from vmm.data.sandbox import DEATHS, Limits, run_all
from vmm.data.sources.entry import Entry, unique
from vmm.errors import DataBudgetError, StorageError, UserError

_TRANSCODE = "vmm.data.building.transcode:transcode"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a build depends on besides its source.

    source: words that name the source, kept in build.json. storage: how clips are stored. limits: of the work on
    one file. shard: entries whose clips share a file. budget: share of clips that may be left out. classes: label →
    names of its classes in order of index, as of another split's classes.json; labels that it lacks are found here.
    """

    source: str
    storage: Storage = Storage()
    limits: Limits = Limits()
    shard: int = 512
    budget: float = 0.01
    classes: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def build(
    entries: Iterable[Entry], out: Path, settings: Settings, workers: int,
    progress: Callable[[int, int], None] = lambda *_: None, spread: Callable[[list[int]], None] | None = None,
) -> dict:  # fmt: skip
    """Builds a dataset, or goes on with one. Returns what build.json holds.

    Args:
      entries: what a source gives; the same again when a build goes on. workers: processes that decode.
      progress: called with (entries done, all entries).
      spread: calls build_shard(out, shard) for every shard it is given, wherever; None: on this machine's cores.

    Raises:
      UserError: the folder holds something else, or the source gives nothing.
      DataBudgetError: more clips than settings.budget were left out; all files are written.
      StorageError: the disk is full; the same command goes on.
    """
    work = out / ".build"
    if told := _built(out, settings):
        return _within_budget(told, out, settings)
    if out.exists() and any(out.iterdir()) and not work.is_dir():
        raise UserError(f"{out}: holds other files; give a new folder")
    try:
        (work).mkdir(parents=True, exist_ok=True)
        (out / "shards").mkdir(exist_ok=True)
        with open(work / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{out}: another build is running in it") from None
            if told := _built(out, settings):  # by another build, meanwhile
                return _within_budget(told, out, settings)
            plan = _plan(work, entries, settings, out)
            shards = range(-(-len(plan) // settings.shard))
            if spread:
                spread([shard for shard in shards if not rows_of(work, shard).is_file()])
            _work(dict(enumerate(plan)), shards, out, settings, workers, progress)
            told = _finish(shards, out, work, settings)
    except OSError as error:
        raise StorageError(f"{out}: {error}; mend it and run the same command again") from None
    return _within_budget(told, out, settings)


def _built(out: Path, settings: Settings) -> dict | None:
    """Returns what build.json holds, None where nothing is built yet."""
    if not (out / "build.json").is_file():
        return None
    try:
        told = json.loads((out / "build.json").read_text())
        _same(told["settings"], settings, out)
        died = sum(told["left_out"].get(reason, 0) for reason in DEATHS)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{out}/build.json: not what a build writes ({error}); give a new folder") from None
    if died and told["settings"]["limits"] != settings.limits._asdict():
        raise UserError(f"{out}: was built with other limits, and {died} clips died of them; give a new folder")
    shutil.rmtree(out / ".build", ignore_errors=True)  # of a build that was killed as it ended
    return told


def _plan(work: Path, entries: Iterable[Entry], settings: Settings, out: Path) -> list[Entry]:
    """Returns all entries, written down before the first is worked on."""
    if (work / "plan.json").is_file():
        told = json.loads((work / "plan.json").read_text())
        _same(told["settings"], settings, out)
        return [entry for shard in range(told["shards"]) for entry in _planned(work, shard)]
    plan = unique(iter(entries))
    if all(entry.reason == "not taken" for entry in plan):
        raise UserError(f"{settings.source}: gives no clips")
    _check_classes(plan, settings)
    (work / "plan").mkdir(exist_ok=True)
    shards = -(-len(plan) // settings.shard)
    for shard in range(shards):
        lines = [entry._asdict() for entry in plan[shard * settings.shard : (shard + 1) * settings.shard]]
        write_whole(_plan_of(work, shard), json_lines(lines))
    write_whole(work / "plan.json", json.dumps({"settings": _plain(settings), "shards": shards}).encode())
    return plan


def _check_classes(plan: list[Entry], settings: Settings) -> None:
    for name, known in settings.classes.items():
        known = set(known)
        for entry in plan:
            value = entry.labels.get(name, [])
            for item in value if isinstance(value, list) else [value]:
                if str(item) not in known:
                    raise UserError(f"{entry.id}: its {name}, {item!r}, is not in --classes; give a list that has it")


def _plan_of(work: Path, shard: int) -> Path:
    return work / "plan" / f"{shard:05d}.jsonl"


def _planned(work: Path, shard: int) -> list[Entry]:
    return [Entry(**_untuple(fields)) for fields in read_json_lines(_plan_of(work, shard))]


def build_shard(out: str, shard: int) -> int:
    """Does the work of one shard of a build whose plan is written, in one sandbox; returns its number.

    Runs wherever OUT can be written: a worker of a cluster with a shared file system.
    """
    work = Path(out) / ".build"
    told = json.loads((work / "plan.json").read_text())["settings"]
    settings = Settings(**told | {"storage": Storage(**told["storage"]), "limits": Limits(**told["limits"])})
    plan = dict(enumerate(_planned(work, shard), shard * settings.shard))
    _work(plan, [shard], Path(out), settings, 1, lambda *_: None)
    return shard


def _plain(settings: Settings) -> dict:
    return dataclasses.asdict(settings) | {"storage": settings.storage._asdict(), "limits": settings.limits._asdict()}


def _untuple(fields: dict) -> dict:
    return fields | {"member": tuple(fields["member"]), "captions": tuple(fields["captions"])}


def _same(told: dict, settings: Settings, out: Path) -> None:
    # The budget and the limits do not change what a good clip looks like.
    there, mine = (
        {key: value for key, value in settings.items() if key not in ("budget", "limits")}
        for settings in (told, json.loads(json.dumps(_plain(settings))))
    )
    if other := [line.removeprefix("storage.") for line in differences(mine, there)]:
        told = "; ".join(line if len(line) < 200 else f"{line[:200]}…" for line in other)
        raise UserError(
            f"{out}: was built with other settings (there → now: {told}); give a new folder, or the same settings"
        )


# ---- work -------------------------------------------------------------------------------------------


def _work(
    plan: Mapping[int, Entry], shards: Iterable[int], out: Path, settings: Settings, workers: int, progress
) -> None:
    """Works on every entry that is not done, and packs each shard when its last entry is."""
    work = out / ".build"
    left: Counter = Counter()
    pending = []
    for number, entry in plan.items():
        shard = number // settings.shard
        if rows_of(work, shard).is_file():
            shutil.rmtree(work / f"{shard:05d}", ignore_errors=True)
        elif not entry.reason and not note_of(work, shard, number).is_file():
            left[shard] += 1
            pending.append(number)
    for shard in shards:
        if not left[shard]:
            pack(plan, shard, settings.shard, out, settings.storage.keep)
    done = len(plan) - len(pending)
    progress(done, len(plan))
    storage = list(settings.storage)

    def jobs() -> Iterator[tuple[int, dict]]:
        for number in pending:
            entry = plan[number]
            span = entry.start is not None or entry.end is not None
            yield number, {
                "path": entry.path, "member": entry.member, "sha256": entry.sha256, "storage": storage,
                "spans": [[entry.start, entry.end]] if span else None,
            }  # fmt: skip

    with contextlib.closing(run_all(_TRANSCODE, jobs(), workers, settings.limits)) as answers:
        for number, answer in answers:
            shard = number // settings.shard
            keep(note_of(work, shard, number), answer)
            left[shard] -= 1
            if not left[shard]:
                pack(plan, shard, settings.shard, out, settings.storage.keep)
            done += 1
            progress(done, len(plan))


# ---- the end ----------------------------------------------------------------------------------------


def _finish(shards: Iterable[int], out: Path, work: Path, settings: Settings) -> dict:
    rows, lost, seen = [], [], set()
    for shard in shards:
        for row in read_json_lines(rows_of(work, shard)):
            if "reason" in row:
                lost.append(row)
                continue
            # "a/0000" may be a piece of "a", and a clip of its own.
            row["id"] = next(name for name in _names(row["id"]) if name not in seen)
            rows.append(row)
            seen.add(row["id"])
    classes = number_classes([row["labels"] for row in rows]) | {
        name: list(names) for name, names in settings.classes.items()
    }
    places = {name: {item: place for place, item in enumerate(names)} for name, names in classes.items()}
    for row in rows:
        row["labels"] = {name: class_index(value, places.get(name)) for name, value in row["labels"].items()}
    alike = near_duplicates({row["id"]: row["media"].pop("hashes") for row in rows})
    duplicates = [{"id": key, "like": other, "apart": round(apart, 3)} for key, other, apart in alike]
    for name, lines in (("manifest", rows), ("quarantine", lost), ("duplicates", duplicates)):
        write_whole(out / f"{name}.jsonl", json_lines(lines))
    for stray in (*out.glob("*.part"), *(out / "shards").glob("*.part")):  # of builds that were killed
        stray.unlink()
    write_whole(out / "classes.json", json.dumps(classes, indent=1, ensure_ascii=False).encode())
    names = ("manifest.jsonl", "quarantine.jsonl", "duplicates.jsonl", "classes.json")
    files = [*(out / name for name in names), *sorted((out / "shards").glob("*.arrayrecord"))]
    told = {
        "settings": json.loads(json.dumps(_plain(settings))),
        "clips": len(rows),
        "left_out": dict(Counter(row["reason"] for row in lost).most_common()),
        "remarks": dict(Counter(name for row in rows for name in row["media"].get("remarks", ())).most_common()),
        "duplicates": len(duplicates),
        "files": {str(file.relative_to(out)): _sha256(file) for file in files},
    }
    write_whole(out / "build.json", json.dumps(told, indent=1).encode())
    shutil.rmtree(work)
    return told


def _names(identity: str) -> Iterator[str]:
    """Yields a clip's id and, should it be taken, others."""
    yield identity
    yield from (f"{identity}~{number}" for number in itertools.count(2))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _within_budget(told: dict, out: Path, settings: Settings) -> dict:
    lost = sum(count for reason, count in told["left_out"].items() if reason != "not taken")
    total = lost + told["clips"]
    if lost > settings.budget * total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in told["left_out"].items() if reason != "not taken")
        raise DataBudgetError(
            f"{out}: {lost} of {total} clips were left out, more than the budget of {settings.budget:.1%} ({reasons}); "
            f"see {out}/quarantine.jsonl, then mend the source or raise --budget"
        )
    return told
