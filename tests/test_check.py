"""vmm data check and compare: what is broken is named, and what is counted was counted by hand."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest

from vmm.__main__ import main
from vmm.data.building.build import Settings, build
from vmm.data.inspection.check import check
from vmm.data.inspection.compare import compare, write_common
from vmm.data.inspection.dataset import open_dataset
from vmm.data.inspection.survey import survey
from vmm.data.manifest import read_manifest
from vmm.data.sources import open_source
from vmm.errors import UserError


@pytest.fixture(scope="session")
def built(world_folder, tmp_path_factory) -> Path:
    """Six clips of the world in two shards of four and two records, and an empty file left out. Read only."""
    source = tmp_path_factory.mktemp("source")
    for number in range(6):
        shutil.copy(world_folder / "test" / f"{number:05d}.mp4", source / f"{number}.mp4")
        (source / f"{number}.txt").write_text(["one", "two words", "two words", "now three words"][min(number, 3)])
    (source / "6.mp4").write_bytes(b"")
    out = tmp_path_factory.mktemp("built") / "out"
    _, entries, words = open_source(source, None, {})
    build(entries, out, Settings(words, shard=4, budget=1.0), workers=2)
    return out


@pytest.fixture
def dataset(built, tmp_path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(built, tmp_path / "out"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit(path: Path, change) -> None:
    """Rewrites a JSON Lines file with what `change` makes of its list of objects."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


def rehash(folder: Path, name: str) -> None:
    """Makes build.json agree with a file again, so that only the other checks can see the change."""
    told = json.loads((folder / "build.json").read_text())
    told["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "build.json").write_text(json.dumps(told))


# ---- check ------------------------------------------------------------------------------------------


def test_a_good_build_has_no_problems(built):
    found = check(built)
    assert (found.problems, found.files, found.clips) == (
        [],
        6,
        6,
    )  # two shards, manifest, quarantine, duplicates, classes
    assert check(built / "manifest.jsonl").files == 6
    assert check(built, sample=2).clips == 2


def test_one_changed_byte_of_a_shard_names_shard_and_clip(dataset, built):
    stored = json.loads((built / "manifest.jsonl").read_text().splitlines()[1])
    data = (dataset / "shards" / "00000.arrayrecord").read_bytes()
    from vmm.data.shards import read_record

    clip = read_record(built / "shards" / "00000.arrayrecord", 1)
    flip(dataset / "shards" / "00000.arrayrecord", data.index(clip[:4096]) + 2000)
    problems = check(dataset).problems
    assert len(problems) == 2
    assert problems[0].startswith("shards/00000.arrayrecord: changed, its sha256 is ")
    assert problems[1].startswith(f"clip {stored['id']}: ")


def test_a_deleted_line_names_manifest_count_and_record(dataset):
    edit(dataset / "manifest.jsonl", lambda lines: lines[:2] + lines[3:])
    problems = check(dataset).problems
    assert problems[0].startswith("manifest.jsonl: changed")
    assert problems[1:] == [
        "manifest.jsonl: 5 clips, build.json tells of 6",
        "shards/00000.arrayrecord: holds 4 records, the manifest names 3",
        "shards/00000.arrayrecord: record 2 is in no line of the manifest",
    ]


def test_swapped_hashes_name_both_clips(dataset):
    def swap(lines):
        lines[4]["sha256"], lines[5]["sha256"] = lines[5]["sha256"], lines[4]["sha256"]
        return lines

    edit(dataset / "manifest.jsonl", swap)
    rehash(dataset, "manifest.jsonl")
    problems = check(dataset).problems
    assert [problem.split(": sha256")[0] for problem in problems] == ["clip 4: changed", "clip 5: changed"]


def test_missing_and_extra_files_are_named(dataset):
    (dataset / "shards" / "00001.arrayrecord").unlink()
    (dataset / "shards" / "00002.arrayrecord.part").write_bytes(b"half")
    (dataset / "duplicates.jsonl").unlink()
    problems = check(dataset).problems
    assert problems[:3] == [
        "duplicates.jsonl: No such file or directory, build.json tells of it",
        "shards/00001.arrayrecord: No such file or directory, build.json tells of it",
        "shards/00002.arrayrecord.part: build.json does not tell of this file",
    ]
    assert [problem.split(": ")[:2] for problem in problems[3:]] == [["clip 4", "missing"], ["clip 5", "missing"]]


def test_quarantine_that_lost_a_line(dataset):
    (dataset / "quarantine.jsonl").write_text("")
    rehash(dataset, "quarantine.jsonl")
    assert check(dataset).problems == ["quarantine.jsonl: 0 empty file, build.json tells of 1"]


def test_a_record_that_is_not_there_and_a_class_without_name(dataset):
    def change(lines):
        lines[5] |= {"record": 9, "labels": {"kind": [0, 2]}}
        return lines

    edit(dataset / "manifest.jsonl", change)
    (dataset / "classes.json").write_text('{"kind": ["a", "b"]}')
    rehash(dataset, "manifest.jsonl")
    rehash(dataset, "classes.json")
    problems = check(dataset).problems
    assert "shards/00001.arrayrecord: record 1 is in no line of the manifest" in problems
    assert "shards/00001.arrayrecord: record 9 is named by the manifest, but not there" in problems
    assert "clip 5: class 2 of kind, which has names for 2" in problems
    assert problems[-1].startswith("clip 5: changed: ")


def test_a_file_that_cannot_be_read_as_a_manifest_is_a_problem(dataset):
    (dataset / "manifest.jsonl").write_text('{"id": "0"}\n')
    found = check(dataset)
    assert found.dataset is None
    assert found.problems == [f"dataset {dataset}/manifest.jsonl, line 1: a clip needs a `path`"]


def test_a_plain_manifest_is_checked_for_presence_and_given_hashes(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "empty").write_bytes(b"")
    lines = [
        {"path": "a"},
        {"path": "b", "sha256": hashlib.sha256(b"b").hexdigest()},
        {"path": "c", "sha256": hashlib.sha256(b"b").hexdigest()},
        {"path": "gone", "id": "two\nlines"},
        {"path": "empty"},
        {"path": "."},
        {"path": "zero\0byte", "id": "zero"},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = check(tmp_path / "mine.jsonl")
    assert found.clips == 2
    assert [problem.split(": ")[0] for problem in found.problems] == [
        "clip c", "clip two\\nlines", "clip empty", "clip .", "clip zero",
    ]  # fmt: skip
    assert "No such file" in found.problems[1]


def test_the_command_shows_twenty_problems_and_exits_2(tmp_path, capsys):
    lines = [{"path": f"gone{number}.mp4", "caption": "[red]x[/nothing]"} for number in range(23)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["data", "check", str(tmp_path / "m.jsonl"), "--json", str(tmp_path / "told.json")]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("clip gone") for line in shown) == 20
    assert shown[20] == "… and 3 more problems"
    assert shown[21].startswith(f"vmm: error: {tmp_path}/m.jsonl: 23 problems; ")
    told = json.loads((tmp_path / "told.json").read_text())
    assert len(told["problems"]) == 23
    assert told["containers"] == {"unknown": 23}


def test_the_command_says_so_when_all_is_well(built, capsys):
    assert main(["data", "check", str(built)]) == 0
    assert "no problems; hashes of 6 files and 6 clips verified" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "message"), [("none", "no such file"), ("", "holds no manifest.jsonl")])
def test_no_dataset_there(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        check(tmp_path / name)
    (tmp_path / ".build").mkdir()
    with pytest.raises(UserError, match="not finished"):
        check(tmp_path)


def test_survey_counts_by_hand(built):
    told = survey(open_dataset(built))
    assert (told["clips"], told["near_duplicates"] is not None, told["quarantine"]) == (6, True, {"empty file": 1})
    assert told["captions"] == {
        "phrasings": 6, "clips": 6, "words": {"min": 1, "median": 2.5, "max": 3}, "duplicates": 3,
    }  # fmt: skip
    assert told["video_codecs"] == {"h264": 6}
    assert told["sizes"] == {"64×64": 6}
    assert told["missing"]["unknown"] == 0


def test_survey_of_a_hand_made_manifest(tmp_path):
    lines = [
        {"path": "a", "start": 1, "end": 3, "labels": {"kind": 0}, "media": {"video_codec": None, "audio": True, "silent": True}},
        {"path": "b", "end": 4, "labels": {"kind": [0, 1]}, "caption": "x y", "media": {"fps": "fast", "width": 4, "height": 2}},
        {"path": "c", "labels": {"kind": -1}, "media": "nothing"},
        {"path": "d", "labels": {"kind": 0}, "media": {"video_codec": "vp9", "audio": False, "fps": 29.97002}},
    ]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "labels.json").write_text('{"kind": ["cat", "dog", "owl"]}')
    told = survey(open_dataset(tmp_path / "m.jsonl"))
    assert told["hours"] == pytest.approx(6 / 3600)
    assert (told["seconds"]["median"], told["seconds"]["unknown"]) == (3.0, 2)
    assert told["sizes"] == {"unknown": 3, "4×2": 1}
    assert told["fps"] == {"unknown": 3, "29.97": 1}
    assert told["video_codecs"] == {"unknown": 2, "none": 1, "vp9": 1}
    assert told["missing"] == {"no video": 1, "no audio": 1, "silent audio": 1, "no caption": 3, "unknown": 2}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(3)  # cat 3, dog 1, owl never
    assert told["labels"]["kind"]["evenness"] == pytest.approx(entropy, abs=1e-4)
    assert told["labels"]["kind"]["counts"] == {"cat": 3, "dog": 1, "owl": 0}
    assert told["labels"]["kind"]["clips"] == 3
    assert told["quarantine"] is told["near_duplicates"] is None


# ---- compare ----------------------------------------------------------------------------------------


def sha(letter: str) -> str:
    return hashlib.sha256(letter.encode()).hexdigest()


def line(key: str, source: str | None, start=None, end=None, **more) -> dict:
    """A row of a build: its stored bytes differ from lab to lab, its source does not."""
    row = {"id": key, "path": f"{key}.mp4", "sha256": sha(f"{key} {source} {start} {end} {more}"), **more}
    return row | ({"source": {"sha256": sha(source), "start": start, "end": end, "duration": 9.0}} if source else {})


def write_lines(path: Path, lines: list[dict], classes: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if classes:
        (path.parent / "labels.json").write_text(json.dumps(classes))
    return path


@pytest.fixture
def labs(tmp_path) -> tuple[Path, Path]:
    """Two labs' manifests of one corpus: what stands in both was decided by hand."""
    a = [
        line("only-a", "A"),
        line("same", "S", caption=["x", "y"], labels={"kind": 0}),
        line("span", "P", 0.0, 4.0),
        line("changed", "C"),
        line("mine", "M", caption="m", labels={"kind": 1}),
        line("whole", "W", 0.0, 9.0, labels={"kind": 1}),
        {"id": "hand", "path": "hand.mp4"},
    ]
    b = [
        line("whole", "W", labels={"kind": 1}),
        line("theirs", "M", labels={"kind": 1}, caption="other"),
        line("changed", "D"),
        line("span", "P", 4.0, 8.0),
        line("same", "S", caption=["y", "x"], labels={"kind": 1}),
        line("hand", "H"),
        line("only-b", "B"),
    ]
    # The same classes in another order: kind 0 of A is kind 1 of B.
    return (
        write_lines(tmp_path / "a" / "manifest.jsonl", a, {"kind": ["cat", "dog"]}),
        write_lines(tmp_path / "b" / "manifest.jsonl", b, {"kind": ["dog", "cat"]}),
    )


def test_intersection_by_hand(labs):
    a, b = map(open_dataset, labs)
    found = compare(a, b)
    assert found.same == ["same", "whole"]
    assert found.unknown == ["hand"]
    assert found.other_content == ["span", "changed"]
    assert found.other_id == [("mine", "theirs")]
    assert (found.only_a, found.only_b) == (["only-a"], ["only-b"])
    assert found.pairs == [(1, 4), (4, 1), (5, 0), (6, 5)]
    assert found.captions == ["mine"]
    assert found.labels == {"kind": ["mine", "whole"]}  # dog here is cat there
    assert found.renumbered == ["kind"]
    back = compare(b, a)
    assert back.digest == found.digest
    assert (back.only_a, back.only_b, len(back.pairs)) == (["only-b"], ["only-a"], 4)


def test_exchanged_ids_are_paired_by_content(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", [line("1", "X"), line("2", "Y"), line("3", "X")])
    b = write_lines(tmp_path / "b.jsonl", [line("1", "Y"), line("2", "X")])
    found = compare(open_dataset(a), open_dataset(b))
    assert found.other_content == ["1", "2"]
    assert found.other_id == [("1", "2"), ("2", "1")]
    assert (found.only_a, found.only_b) == (["3"], [])  # X was given away already


def test_a_clip_is_given_away_once(tmp_path):
    """Both clips of A are cut from X; the first is B's only clip, byte for byte, and by that taken."""
    stored = {"sha256": sha("stored")}
    a = write_lines(tmp_path / "a.jsonl", [line("1", "X") | stored, line("2", "X")])
    b = write_lines(tmp_path / "b.jsonl", [line("3", "X") | stored])
    found = compare(open_dataset(a), open_dataset(b))
    assert (found.pairs, found.only_a) == ([(0, 0)], ["2"])


def test_paths_through_links_resolve(tmp_path):
    """A folder behind a link names a file beside it: `..` is then that of the folder, not of the link."""
    (tmp_path / "deep" / "clips").mkdir(parents=True)
    (tmp_path / "deep" / "clips" / "x.mp4").write_bytes(b"x")
    write_lines(tmp_path / "deep" / "lists" / "m.jsonl", [{"path": "../clips/x.mp4"}])
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "lists")
    a = open_dataset(tmp_path / "link" / "m.jsonl")
    for path in write_common(a, a, compare(a, a), tmp_path / "out" / "c"):
        assert check(path).problems == []


def test_digest_is_of_ids_and_contents(tmp_path, labs):
    a, b = map(open_dataset, labs)
    rows = [
        [["hand"], None],
        [["mine", "theirs"], [sha("M"), 0.0, None]],
        [["same"], [sha("S"), 0.0, None]],
        [["whole"], [sha("W"), 0.0, None]],
    ]
    wanted = hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()
    assert compare(a, b).digest == wanted


def test_common_manifests_resolve_and_keep_order(built, world_folder, tmp_path, capsys):
    """A build against a part of it elsewhere, behind a link: written files are read and checked where they lie."""
    part = tmp_path / "deep" / "part"
    shutil.copytree(built, part)
    edit(part / "manifest.jsonl", lambda lines: lines[:0:-2])
    (tmp_path / "elsewhere" / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "far" / "away")
    prefix = tmp_path / "link" / "new" / "common"
    assert main(["data", "compare", str(built), str(part / "manifest.jsonl"), "--out", str(prefix)]) == 0
    rows = [read_manifest(f"{prefix}-{side}.jsonl") for side in "ab"]
    assert [[row.id for row in mine] for mine in rows] == [["1", "3", "5"]] * 2
    assert [Path(row.path).resolve() for row in rows[1]] == [part / f"shards/0000{k}.arrayrecord" for k in (0, 0, 1)]
    for side in "ab":
        found = check(Path(f"{prefix}-{side}.jsonl"))
        assert (found.problems, found.clips) == ([], 3)
    first = capsys.readouterr().out
    assert main(["data", "compare", f"{prefix}-a.jsonl", f"{prefix}-b.jsonl"]) == 0
    again = capsys.readouterr().out
    digests = [text.split("sha256:")[1].split()[0] for text in (first, again)]
    assert digests[0] == digests[1]


def test_nothing_common_and_overwriting_are_refused(tmp_path):
    a = open_dataset(write_lines(tmp_path / "x-a.jsonl", [{"path": "1.mp4"}, {"path": "2.mp4", "caption": "\ud800"}]))
    b = open_dataset(write_lines(tmp_path / "b.jsonl", [{"path": "3.mp4"}]))
    with pytest.raises(UserError, match="no clip is in both"):
        write_common(a, b, compare(a, b), tmp_path / "y")
    with pytest.raises(UserError, match="one of the manifests"):
        write_common(a, a, compare(a, a), tmp_path / "x")
    (tmp_path / "sub").mkdir()
    out = write_common(a, a, compare(a, a), tmp_path / "sub" / "z")
    # An id that was the path stays what it was; a caption that is no UTF-8 stays the same JSON, and is read as U+FFFD.
    rows = read_manifest(out[0])
    assert [row.id for row in rows] == ["1.mp4", "2.mp4"]
    assert json.loads(out[0].read_text().splitlines()[1])["path"] == "../2.mp4"
    assert rows[1].captions == ("\ufffd",)
