"""Folders, tables, tars and TFDS datasets → entries: what is good comes through as it is, what is bad has a reason."""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from vmm.data.members import read_member
from vmm.data.sources import open_source
from vmm.data.sources.entry import REASONS, Bad, Entry, captions_of, labels_of, path_in, seconds_of, span_of, unique
from vmm.errors import UserError


def entries(path: Path, kind: str | None = None, **options) -> list[Entry]:
    got = list(unique(open_source(path, kind, options)[1]))
    assert all(entry.reason in (None, *REASONS) for entry in got)
    return got


def reasons(got: list[Entry]) -> list[str | None]:
    return [entry.reason for entry in got]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"media " + name.encode())


# ---- fields ------------------------------------------------------------------------------------------

CAPTIONS = [
    ("a dog", ("a dog",)),
    ("  two\n lines\t\x00 ", ("two lines",)),
    (["one", "two", "", None, float("nan")], ("one", "two")),
    ("", ()),
    ("   ", ()),
    (None, ()),
    (math.nan, ()),
    ("NaN", ()),
    ("ünïcode — 狗 🐕", ("ünïcode — 狗 🐕",)),
    ("x" * 20_000, ("x" * 20_000,)),
]


@pytest.mark.parametrize(("value", "want"), CAPTIONS)
def test_captions(value, want):
    assert captions_of(value) == want


@pytest.mark.parametrize(
    "value", ["x" * 20_001, "x" * 200_000, 3, {"a": 1}, ["good", 3], "caf\ufffd", "half \ud800", True]
)
def test_captions_that_are_none(value):
    with pytest.raises(Bad) as bad:
        captions_of(value)
    assert bad.value.reason == "bad caption"
    assert len(bad.value.detail) < 300


SECONDS = [
    (3, 3.0), (2.5, 2.5), ("2.5", 2.5), (" 7 ", 7.0), ("1:30", 90.0), ("01:02:03.5", 3723.5), ("", None), (None, None),
    ("nan", None), (math.nan, None), (0, 0.0), ("None", None),
]  # fmt: skip


@pytest.mark.parametrize(("value", "want"), SECONDS)
def test_seconds(value, want):
    assert seconds_of(value, "start") == want


@pytest.mark.parametrize(
    "value", [-1, "-0.5", "abc", "1:2:3:4", math.inf, "inf", "1e999", True, [1], {}, "3s", 10**400, "9" * 400]
)
def test_seconds_that_are_none(value):
    with pytest.raises(Bad) as bad:
        seconds_of(value, "start")
    assert bad.value.reason == "bad span"
    assert len(bad.value.detail) < 300


def test_spans():
    assert span_of(1, "2.5") == (1.0, 2.5)
    assert span_of(None, 2) == (None, 2.0)
    for start, end in ((2, 2), (3, 2), (None, 0), (0, 0)):
        with pytest.raises(Bad, match="bad span"):
            span_of(start, end)


PROTOCOLS = (
    "http://a/b.mp4", "https://a/b.mp4", "concat:a.mp4|b.mp4", "subfile,,start,0,end,9,,:a.mp4", "file:a.mp4",
    "data:video/mp4;base64,AAAA", "pipe:0", "rtmp://x", "gs://bucket/a.mp4", "C:\\video.mp4",
)  # fmt: skip


@pytest.mark.parametrize("name", [*PROTOCOLS, "", "  ", None, 3, math.nan, ["a.mp4"], "a\0b.mp4", "caf\ufffd.mp4"])
def test_paths_that_are_none(tmp_path, name):
    with pytest.raises(Bad) as bad:
        path_in(tmp_path, name)
    assert bad.value.reason == "bad path"


def test_paths(tmp_path):
    assert path_in(tmp_path, "a/b.mp4") == f"{tmp_path}/a/b.mp4"
    assert path_in(tmp_path, f"{tmp_path}/b.mp4") == f"{tmp_path}/b.mp4"
    assert path_in(Path("/"), "/media/b.mp4") == "/media/b.mp4"
    assert path_in(tmp_path, "a/../b.mp4") == f"{tmp_path}/a/../b.mp4"
    for outside in ("/etc/passwd", "../b.mp4", "a/../../b.mp4", f"{tmp_path}b/c.mp4"):
        with pytest.raises(Bad, match="is outside of .*--media"):
            path_in(tmp_path, outside)
    assert path_in(tmp_path, "a/10:30.mp4") == f"{tmp_path}/a/10:30.mp4"
    touch(tmp_path, "12:30.mp4")  # is there, so it is a file
    assert path_in(tmp_path, "12:30.mp4") == f"{tmp_path}/12:30.mp4"


def test_labels():
    assert labels_of({"a": "dog", "b": 3, "c": ["x", "y"], "d": [1, 2], "e": 2.0}) == {
        "a": "dog", "b": 3, "c": ["x", "y"], "d": [1, 2], "e": 2,
    }  # fmt: skip
    assert labels_of({"a": None, "b": math.nan, "c": "", "d": [], "e": [None], "f": -1}) == {"d": [], "f": -1}
    for value in ({"x": 1}, [["x"]], -2, 1 << 40, 0.5, "half \ud800", "caf\ufffd", math.inf):
        with pytest.raises(Bad, match="bad label"):
            labels_of({"a": value})


def test_the_first_clip_has_the_id():
    given = [Entry("a", "1"), Entry("b", "2", reason="bad span"), Entry("a", "3"), Entry("b", "4"), Entry("b", "5")]
    assert reasons(list(unique(iter(given)))) == [None, "bad span", "duplicate id", None, "duplicate id"]


# ---- folder ------------------------------------------------------------------------------------------


def test_folder(tmp_path):
    touch(tmp_path, "b/2.mp4", "a/1.mp4", "a/1.wav", "a/x.MOV", "top.webm", "notes.pdf", "a/1.mp4.part")
    (tmp_path / "a" / "x.txt").write_text("a fox\n")
    (tmp_path / "b" / "2.json").write_text('{"caption": ["one", "two"], "more": 1}')
    got = entries(tmp_path, label="kind")
    assert [entry.id for entry in got if entry.reason == "not taken"] == ["a/1.mp4.part", "notes.pdf"]
    got = [entry for entry in got if not entry.reason]
    assert [(entry.id, entry.captions, entry.labels) for entry in got] == [
        ("a/1.mp4", (), {"kind": "a"}),  # two media of one name: the suffix stays in the id
        ("a/1.wav", (), {"kind": "a"}),
        ("a/x", ("a fox",), {"kind": "a"}),
        ("b/2", ("one", "two"), {"kind": "b"}),
        ("top", (), {}),
    ]
    assert [entry.path for entry in got] == [
        f"{tmp_path}/{n}" for n in ("a/1.mp4", "a/1.wav", "a/x.MOV", "b/2.mp4", "top.webm")
    ]
    assert entries(tmp_path)[0].labels == {}


def test_files_that_are_no_clips_are_listed_and_links_lead_nowhere_else(tmp_path):
    root = tmp_path / "root"
    touch(root, "cats/a.mp4", "cats/c.MTS", "cats/._a.mp4", "cats/notes.doc", "cats/a.en.srt")
    touch(tmp_path / "other", "b.mp4")
    (root / "cats" / "a.txt").write_bytes(b"\xef\xbb\xbfa cat")
    (root / "birds").symlink_to(tmp_path / "other")
    (root / "again").symlink_to(root)
    got = entries(root, "folder", label="class")
    assert [(e.id, e.captions, e.labels, e.reason) for e in got] == [
        ("cats/a", ("a cat",), {"class": "cats"}, None),
        ("cats/c", (), {"class": "cats"}, None),
        ("cats/._a.mp4", (), {}, "not taken"),
        ("cats/a.en.srt", (), {}, "not taken"),
        ("cats/notes.doc", (), {}, "not taken"),
        ("birds", (), {}, "bad path"),
    ]
    followed = entries(root, "folder", label="class", links=True)
    assert [e.id for e in followed if not e.reason] == ["birds/b", "cats/a", "cats/c"]
    assert followed[0].labels == {"class": "birds"}


def test_lines_of_one_clip_bring_its_captions_together(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "t.csv").write_text("path,caption\na.mp4,one\nb.mp4,two\na.mp4,three\na.mp4,one\n")
    assert [(e.id, e.captions, e.reason) for e in entries(tmp_path / "t.csv")] == [
        ("a.mp4", ("one", "three"), None), ("b.mp4", ("two",), None),
    ]  # fmt: skip
    (tmp_path / "u.csv").write_text("id,path,caption\n1,a.mp4,one\n1,b.mp4,two\n")
    assert reasons(entries(tmp_path / "u.csv")) == [None, "duplicate id"]  # another clip of the same name


def test_folder_with_bad_captions(tmp_path):
    names = ["latin", "long", "broken", "list", "deep", "empty"]
    touch(tmp_path, *(f"{name}.mp4" for name in names))
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "long.txt").write_text("x" * 200_000)
    (tmp_path / "broken.json").write_text('{"caption": ')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "empty.txt").write_text("")
    got = {entry.id: (entry.reason, entry.captions) for entry in entries(tmp_path)}
    bad = ("bad caption", ())
    assert got == {"latin": bad, "long": bad, "broken": bad, "deep": bad, "list": (None, ()), "empty": (None, ())}


def test_folder_with_a_name_that_is_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.mp4")
    try:
        (tmp_path / name).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system has text for names")
    [entry] = entries(tmp_path)
    assert entry.reason is None
    assert entry.id == "caf\\udce9"
    assert read_member(entry.path) == b"x"


def test_folder_without_media(tmp_path):
    touch(tmp_path, "a.pdf")
    with pytest.raises(UserError, match="holds no media files"):
        entries(tmp_path)


# ---- tables ------------------------------------------------------------------------------------------


def table(path: Path, *rows, separator: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return path


def test_csv(tmp_path):
    path = table(
        tmp_path / "a.csv",
        ("Video_Path", "caption", "start", "end", "kind"),
        ("a.mp4", "a dog, barking", "", "", "dog"),
        ("sub/b.mp4", 'a "cat"', "1:05", "70.5", "cat"),
        ("c.mp4", "", "3", "", ""),
    )
    got = entries(path, label="kind")
    assert got == [
        Entry("a.mp4", f"{tmp_path}/a.mp4", captions=("a dog, barking",), labels={"kind": "dog"}),
        Entry(
            "sub/b.mp4@1:05-70.5",
            f"{tmp_path}/sub/b.mp4",
            start=65.0,
            end=70.5,
            captions=('a "cat"',),
            labels={"kind": "cat"},
        ),
        Entry("c.mp4@3-", f"{tmp_path}/c.mp4", start=3.0),
    ]


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_csv_separators_and_columns_by_other_names(tmp_path, separator):
    path = table(
        tmp_path / "a.tsv", ("wo", "was", "id"), ("a.mp4", "ein Hund", 7), separator=separator, encoding="utf-8-sig"
    )
    [entry] = entries(path, "csv", columns={"path": "wo", "caption": "was"}, media=Path("/media"))
    assert entry == Entry("7", "/media/a.mp4", captions=("ein Hund",))


def test_columns_that_are_not_used_are_told(tmp_path, capsys):
    touch(tmp_path, "a.mp4")
    (tmp_path / "t.csv").write_text("path,emotion,caption,speaker\na.mp4,joy,a laugh,7\n")
    entries(tmp_path / "t.csv")
    assert "t.csv: columns that are not used: emotion, speaker; --label" in capsys.readouterr().err
    entries(tmp_path / "t.csv", label="emotion")
    assert "not used: speaker;" in capsys.readouterr().err
    (tmp_path / "t.jsonl").write_text(
        '{"path": "a.mp4", "values": {"x": 1}}\n{"path": "a.mp4", "id": "b", "mood": 1}\n'
    )
    entries(tmp_path / "t.jsonl")
    assert "not used: mood;" in capsys.readouterr().err


def test_csv_rows_that_give_no_clip(tmp_path):
    path = tmp_path / "a.csv"
    lines = [
        "path,caption,start,end,sha256",
        "a.mp4,good,,,",
        "b.mp4,an unquoted, comma,,,",
        "c.mp4,too few",
        "http://x/d.mp4,an address,,,",
        ",no path,,,",
        "e.mp4,ends before it starts,5,2,",
        "f.mp4,no number,abc,,",
        "g.mp4," + "x" * 200_000 + ",,,",
        "a.mp4,,,,",
        "h.mp4,a hash,,,1234",
        "i.mp4,NaN,nan,nan,",
        "",
    ]
    data = "\n".join(lines).encode() + "j.mp4,caf\u00e9,,,\n".encode("latin-1") + b"k.mp4,good too,,,\n"
    path.write_bytes(data)
    got = entries(path)
    assert reasons(got) == [
        None, "bad line", "bad line", "bad path", "bad path", "bad span", "bad span", "bad caption", "duplicate id",
        "bad line", None, "bad caption", None,
    ]  # fmt: skip
    assert got[-3].captions == ()
    assert "line 3" in got[1].detail
    assert "6 fields" in got[1].detail


def test_csv_with_a_carriage_return_or_zero_byte_in_a_field(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"path,caption\na.mp4,one\rx.mp4,two\nb.mp4,th\0ree\nc.mp4,four\n")
    got = entries(path)
    assert got[-1].id == "c.mp4"
    assert got[-1].captions == ("four",)
    assert {entry.captions for entry in got if entry.id == "b.mp4"} <= {("th ree",), ()}


BAD_TABLES = {
    "empty": (b"", "no column tells"),
    "heading without a path": (b"a,b\n1,2\n", "no column tells.*known: a, b"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00", "no column tells"),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_tables_that_are_none(tmp_path, kind):
    content, message = BAD_TABLES[kind]
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        entries(path)


def test_columns_that_are_not_there(tmp_path):
    path = table(tmp_path / "a.csv", ("path", "caption"), ("a.mp4", "x"))
    with pytest.raises(UserError, match="no column 'kind' for the label; known: caption, path"):
        entries(path, label="kind")
    with pytest.raises(UserError, match="no column 'captoin' for caption; did you mean 'caption'"):
        entries(path, columns={"caption": "captoin"})
    with pytest.raises(UserError, match="--column captoin=…: no such field; did you mean 'caption'"):
        entries(path, columns={"captoin": "caption"})


def lines(path: Path, *values) -> Path:
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path


def test_jsonl(tmp_path):
    path = lines(
        tmp_path / "a.jsonl",
        {"path": "a.mp4", "caption": ["one", "two"], "labels": {"kind": 3, "many": [1, 2]}},
        "",
        {"caption": "later columns count too", "id": 5, "video": "b.mp4", "start": 1, "end": 2.5},
        {"path": "c.mp4", "caption": math.nan, "start": math.nan, "tag": "x"},
        {"path": "d.mp4", "caption": "a line\u2028separator"},
    )
    got = entries(path, label="tag")
    assert got == [
        Entry("a.mp4", f"{tmp_path}/a.mp4", captions=("one", "two"), labels={"kind": 3, "many": [1, 2]}),
        Entry("5", f"{tmp_path}/b.mp4", start=1.0, end=2.5, captions=("later columns count too",)),
        Entry("c.mp4@nan-None", f"{tmp_path}/c.mp4", labels={"tag": "x"}),
        Entry("d.mp4", f"{tmp_path}/d.mp4", captions=("a line separator",)),
    ]


def test_a_list_of_objects_is_a_table_too(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"path": "a.mp4"}, 3, {"path": "b.mp4", "caption": "x"}], indent=2))
    got = entries(path)
    assert reasons(got) == [None, "bad line", None]
    path.write_text('[{"path": "a.mp4"}')
    with pytest.raises(UserError, match="not JSON"):
        entries(path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not JSON"):
        entries(path)


def test_jsonl_lines_that_give_no_clip(tmp_path):
    path = lines(
        tmp_path / "a.jsonl",
        {"path": "a.mp4"},
        "{not json",
        "[" * 100_000,
        '{"path": "b.mp4", "start": ' + "9" * 6000 + "}",
        '{"path": "b.mp4", "start": 1e400}',
        {"caption": "no path"},
        {"path": ["x"]},
        {"path": "c.mp4", "labels": {"kind": {"deep": 1}}},
        {"path": "d.mp4", "caption": {"en": "x"}},
        '{"path": "e.mp4", "caption": "half \\ud800"}',
        {"path": "concat:x|y"},
        {"path": "f.mp4", "sha256": "AB" * 32},
        {"path": "f.mp4"},
    )
    got = entries(path)
    assert reasons(got) == [
        None, "bad line", "bad line", "bad line", "bad span", "bad line", "bad path", "bad label", "bad caption",
        "bad caption", "bad path", None, "duplicate id",
    ]  # fmt: skip
    assert got[-2].sha256 == "ab" * 32
    assert all(len(entry.detail) < 400 for entry in got)


def test_a_manifest_is_a_source(world_folder):
    got = entries(world_folder / "train.jsonl")
    rows = [json.loads(line) for line in (world_folder / "train.jsonl").read_text().splitlines()]
    assert [entry.labels for entry in got] == [row["labels"] for row in rows]
    assert [entry.id for entry in got] == [str(row["id"]) for row in rows]
    assert all(Path(entry.path).is_file() for entry in got)


# ---- WebDataset --------------------------------------------------------------------------------------


def tar(path: Path, *members, **more) -> Path:
    """members: (name, content), or a TarInfo."""
    with tarfile.open(path, "w", **more) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            file.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_webdataset(tmp_path):
    path = tar(
        tmp_path / "shard-0.tar",
        ("one/a.mp4", b"first"),
        ("one/a.json", b'{"caption": "a dog", "kind": "dog"}'),
        ("one/b.txt", "ein Hünd".encode()),
        ("one/b.left.mp4", b"second"),
        ("one/b.cls", b"3\n"),
        special("folder", tarfile.DIRTYPE),
        ("c.wav", b"sound"),
        ("c.mp4", b"with pictures"),
    )
    *got, aside = entries(path, label="kind")
    assert (aside.id, aside.reason) == ("shard-0/c.wav", "not taken")
    assert [(entry.id, entry.captions, entry.labels) for entry in got] == [
        ("shard-0/one/a", ("a dog",), {"kind": "dog"}),
        ("shard-0/one/b", ("ein Hünd",), {"kind": "3"}),
        ("shard-0/c", (), {}),
    ]
    assert [read_member(entry.path, entry.member) for entry in got] == [b"first", b"second", b"with pictures"]
    assert all(entry.member[0] == "bytes" for entry in got)


def test_keys_of_a_tar_that_are_not_used_are_told_once(tmp_path, capsys):
    for name in "ab":
        tar(
            tmp_path / f"{name}.tar", ("1.mp4", b"1"), ("1.json", b'{"caption": "a", "mood": 1, "kind": "x"}'),
            ("2.mp4", b"2"), ("2.json", b'{"text": "b", "license": "c\\nd", "' + name.encode() + b'": 0}'),
        )  # fmt: skip
    assert len(entries(tmp_path, label="kind")) == 4
    told = f"{tmp_path}: columns that are not used: mood, license, a, b; --label NAME takes one for classes\n"
    assert capsys.readouterr().err == told
    path = tar(tmp_path / "c.tar", ("1.mp4", b"1"), ("1.json", b'{"caption": "a", "two\\nlines": 1, "mood": 2}'))
    entries(path, label="mood")
    assert capsys.readouterr().err.startswith(f"{path}: columns that are not used: 'two\\nlines'; ")
    entries(tar(tmp_path / "d.tar", ("1.mp4", b"1"), ("1.json", b'{"caption": "a"}')))
    assert not capsys.readouterr().err


def test_several_media_of_one_key_are_clips_of_their_own(tmp_path):
    names = [f"ep1.{i}.{suffix}" for i in (1, 2, 3) for suffix in ("mp4", "txt")]
    path = tar(tmp_path / "a.tar", *((name, name.encode()) for name in names), ("ep1.json", b'{"kind": "x"}'))
    got = entries(path, label="kind")
    assert [(e.id, e.captions, e.labels, e.reason) for e in got] == [
        (f"a/ep1.{i}", (f"ep1.{i}.txt",), {"kind": "x"}, None) for i in (1, 2, 3)
    ]
    assert [read_member(e.path, e.member) for e in got] == [f"ep1.{i}.mp4".encode() for i in (1, 2, 3)]
    two = tar(tmp_path / "b.tar", ("k.m4a", b"sound"), ("k.mp4", b"film"), ("k.txt", b"\xef\xbb\xbfboth"))
    assert [(e.id, e.captions, e.reason) for e in entries(two)] == [
        ("b/k", ("both",), None),
        ("b/k.m4a", (), "not taken"),
    ]


def test_tars_of_a_folder_come_in_order(tmp_path):
    for name in ("b.tar", "a.tar"):
        tar(tmp_path / name, ("x.mp4", name.encode()))
    assert [entry.id for entry in entries(tmp_path)] == ["a/x", "b/x"]


def test_members_that_a_dataset_may_not_have(tmp_path):
    path = tar(
        tmp_path / "a.tar",
        ("good.mp4", b"1"),
        special("link.mp4", tarfile.SYMTYPE, "/etc/passwd"),
        ("link.txt", b"its caption"),
        special("hard.mp4", tarfile.LNKTYPE, "good.mp4"),
        ("/absolute.mp4", b"2"),
        ("../above.mp4", b"3"),
        ("in/../../above.mp4", b"4"),
        special("device.mp4", tarfile.CHRTYPE),
        special("pipe.mp4", tarfile.FIFOTYPE),
        ("last.mp4", b"5"),
    )
    got = entries(path)
    assert reasons(got) == [None, *["bad path"] * 7, None]
    assert [entry.id for entry in got if not entry.reason] == ["a/good", "a/last"]
    assert "a link" in got[1].detail


def test_keys_without_media_and_bad_captions(tmp_path):
    path = tar(
        tmp_path / "a.tar",
        ("a.txt", b"a caption alone"),
        ("b.mp4", b"1"),
        ("b.txt", "caf\u00e9".encode("latin-1")),
        ("c.mp4", b"1"),
        ("c.json", b"{broken"),
        ("d.mp4", b"1"),
        ("d.txt", b"x" * 200_000),
        ("e.mp4", b"1"),
        ("e.json", b"[" * 100_000),
        ("f.mp4", b"1"),
        ("b.mp4", b"again"),
    )
    got = entries(path)
    assert reasons(got) == ["bad line", *["bad caption"] * 4, None, None]
    assert "no media among .txt" in got[0].detail


def test_a_tar_that_breaks_off(tmp_path):
    path = tar(tmp_path / "a.tar", *((f"{i}.mp4", bytes([i]) * 5000) for i in range(5)))
    content = path.read_bytes()
    path.write_bytes(content[: 2 * 5632 + 512 + 100])  # in the middle of the third medium
    got = entries(path)
    assert reasons(got)[:2] == [None, None]
    assert "bad line" in reasons(got)
    for entry in got[2:]:
        if entry.reason is None:
            with pytest.raises(EOFError):
                read_member(entry.path, entry.member)


def test_a_tar_with_a_damaged_header(tmp_path):
    path = tar(tmp_path / "a.tar", *((f"{i}.mp4", bytes([i]) * 5000) for i in range(5)))
    content = bytearray(path.read_bytes())
    content[2 * 5632 + 20] ^= 0xFF  # the name in the third header: its checksum is wrong
    path.write_bytes(content)
    got = entries(path)
    assert reasons(got) == [None, None, "bad line"]
    assert "the tar breaks" in got[-1].detail
    # A header of zeros looks like the end; so does the end of a tar that has another one behind it.
    content[2 * 5632 : 2 * 5632 + 512] = bytes(512)
    path.write_bytes(content)
    assert reasons(entries(path)) == [None, None, "bad line"]
    one = tar(tmp_path / "b.tar", ("a.mp4", b"1")).read_bytes()
    path.write_bytes(one + one)
    assert reasons(entries(path)) == [None, "bad line"]


def test_noise_in_a_tar_never_escapes(tmp_path):
    path = tar(
        tmp_path / "a.tar", *((f"{'x' * 120}{i}.mp4", b"m" * 700) for i in range(4)), ("a.txt", b"c"),
        format=tarfile.PAX_FORMAT,
    )  # fmt: skip
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(content)
        for _ in range(rng.integers(1, 12)):
            broken[rng.integers(len(broken))] = rng.integers(256)
        path.write_bytes(broken)
        try:
            for entry in entries(path):
                if not entry.reason:
                    with contextlib.suppress(EOFError):
                        assert len(read_member(entry.path, entry.member)) == entry.member[2]
        except UserError:
            pass


def test_what_is_no_tar(tmp_path):
    path = tmp_path / "a.tar"
    for content in (b"", b"<html>", bytes(100_000), b"x" * 5000):
        path.write_bytes(content)
        if content == bytes(100_000):
            assert entries(path) == []  # a tar that ends at once
        else:
            with pytest.raises(UserError, match="not a plain tar"):
                entries(path)
    tar(path, ("a.mp4", b"1"))
    with tarfile.open(tmp_path / "b.tar", "w:gz") as file:
        file.add(path, "a.mp4")
    with pytest.raises(UserError, match="not a plain tar.*decompress"):
        entries(tmp_path / "b.tar")
    # One of many: the others still count.
    assert reasons(entries(tmp_path)) == [None, "bad line"]


# ---- TFDS --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "media": tfds.features.Scalar(np.object_),
                        "caption": tfds.features.Text(),
                        "kind": tfds.features.ClassLabel(names=["dog", "cat", "bird"]),
                        "number": np.int64,
                        "start": np.float32,
                        "end": np.float32,
                        "many": tfds.features.Sequence(tfds.features.ClassLabel(names=["x", "y", "z"])),
                    }
                ),
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples(8), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                yield (
                    i,
                    {
                        "media": f"media {i}".encode(),
                        "caption": f"caption ü {i}" if i else "",
                        "kind": i % 3 if i != 4 else -1,
                        "number": i,
                        "start": 1.0,
                        "end": 0.5 if i == 5 else 2.5,
                        "many": [0, 2][: i % 3],
                    },
                )

    folder = tmp_path_factory.mktemp("tfds")
    builder = Small(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def test_tfds(prepared):
    got = entries(prepared, label="kind")
    assert len(got) == 8
    number = {int(read_member(entry.path, entry.member).split()[1]): entry for entry in got}
    assert sorted(number) == list(range(8))  # TFDS shuffles
    assert number[0].captions == ()
    assert number[3].captions == ("caption ü 3",)
    assert [number[i].labels for i in (0, 1, 2, 4)] == [{"kind": "dog"}, {"kind": "cat"}, {"kind": "bird"}, {}]
    assert (number[1].start, number[1].end) == (1.0, 2.5)
    assert number[5].reason == "bad span"
    assert [entry.id for entry in got] == [f"train/{i:06d}" for i in range(8)]
    assert [entry.id for entry in entries(prepared, split="test")] == ["test/000000", "test/000001"]


def test_tfds_folder_above_lists_and_numbers(prepared):
    got = entries(prepared.parent, "tfds", label="many", columns={"id": "number"})
    many = {entry.id: entry.labels for entry in got}
    assert (many["0"], many["1"], many["2"]) == ({"many": []}, {"many": ["x"]}, {"many": ["x", "z"]})
    assert {entry.labels["number"] for entry in entries(prepared, label="number") if not entry.reason} == set(
        range(8)
    ) - {5}


def test_tfds_that_is_asked_for_what_it_has_not(prepared, tmp_path):
    with pytest.raises(UserError, match="no split 'validation'; known: test, train"):
        entries(prepared, split="validation")
    with pytest.raises(UserError, match="no feature 'knd' for the label; did you mean 'kind'"):
        entries(prepared, label="knd")
    with pytest.raises(UserError, match="which feature holds the media"):
        entries(prepared, columns={"path": "film"})
    with pytest.raises(UserError, match="dataset_info.json"):
        entries(tmp_path, "tfds")


def test_tfds_with_a_broken_file(prepared, tmp_path):
    """Wherever it is broken: an error that names the folder, or lines that name the examples; nothing false."""
    copy = tmp_path / "1.0.0"
    shutil.copytree(prepared, copy)
    [shard] = copy.glob("*train*array_record*")
    content = shard.read_bytes()
    right = {entry.id: (entry.captions, read_member(entry.path, entry.member)) for entry in entries(prepared)}
    lost = 0
    for place in range(0, len(content.rstrip(b"\0")), 400):
        broken = bytearray(content)
        broken[place : place + 4] = bytes(byte ^ 0x5A for byte in broken[place : place + 4])
        shard.write_bytes(broken)
        got, said = [], str(copy)
        try:
            got = entries(copy)
        except UserError as error:
            said = str(error)
            lost += 1
        assert str(copy) in said
        for entry in got:
            if entry.reason in (None, "bad span"):
                assert entry.captions == right[entry.id][0]
        lost += "bad line" in reasons(got)
    assert lost


# ---- which source ------------------------------------------------------------------------------------


def test_the_kind_is_told_by_the_path(tmp_path, prepared):
    touch(tmp_path / "folder", "a.mp4")
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars" / "a.tar", ("a.mp4", b"1"))
    lines(tmp_path / "a.jsonl", {"path": "a.mp4"})
    table(tmp_path / "a.csv", ("path",), ("a.mp4",))
    kinds = {"folder": "folder", "tars": "webdataset", "tars/a.tar": "webdataset", "a.jsonl": "jsonl", "a.csv": "csv"}
    for name, kind in kinds.items():
        assert open_source(tmp_path / name, None, {})[0] == kind
    assert open_source(prepared, None, {})[0] == "tfds"
    assert open_source(prepared.parent, None, {})[0] == "tfds"


def test_the_words_name_source_and_options(tmp_path):
    table(tmp_path / "a.csv", ("path", "kind"), ("a.mp4", "x"))
    words = open_source(tmp_path / "a.csv", None, {"label": "kind", "media": None, "columns": {}})[2]
    assert words == f"csv {tmp_path}/a.csv label=kind"


def test_wrong_options(tmp_path):
    touch(tmp_path, "a.mp4", "b.xyz")
    with pytest.raises(UserError, match="--split: the source folder has no such option; known: label"):
        entries(tmp_path, split="train")
    with pytest.raises(UserError, match="--kind webdatset: did you mean 'webdataset'"):
        entries(tmp_path, "webdatset")
    with pytest.raises(UserError, match="what is it\\?"):
        entries(tmp_path / "b.xyz")
    with pytest.raises(UserError, match="no such file"):
        entries(tmp_path / "none")


# ---- reading where they lie --------------------------------------------------------------------------


def test_members(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(100)))
    assert read_member(path) == bytes(range(100))
    assert read_member(path, (), 10) == bytes(range(10))
    assert read_member(path, ("bytes", 90, 10)) == bytes(range(90, 100))
    assert read_member(path, ("bytes", 90, 10), 3) == bytes(range(90, 93))
    assert read_member(path, ("bytes", 100, 0)) == b""
    with pytest.raises(EOFError):
        read_member(path, ("bytes", 90, 11))
    with pytest.raises(FileNotFoundError):
        read_member(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        read_member(tmp_path / "none", ("record", 0))
    with pytest.raises(OSError, match="record 0"):
        read_member(path, ("record", 0))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(PermissionError):
        read_member(tmp_path / "a.mp4")
