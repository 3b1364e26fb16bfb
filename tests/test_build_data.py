"""vmm data build as a whole: what is left out and why, the same bytes every time, and going on after any kind of end."""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import ROOT
from test_loader import PLAIN, batches
from test_media import RATE, tone, write
from test_transcode import bars, number_of

from vmm.data import text
from vmm.data.building.build import Settings, build
from vmm.data.building.store import Storage
from vmm.data.inspection.check import check
from vmm.data.loader import Loader
from vmm.data.manifest import read_manifest
from vmm.data.samples import Clip, Data
from vmm.data.sandbox import Limits
from vmm.data.sources import open_source
from vmm.errors import DataBudgetError, StorageError, UserError

GOOD = 63  # files that are good; every ninth line more is bad
PHRASES = ("a picture of bars", "bars that stand still")


def still(path: Path, number: int) -> Path:
    """Half a second of one picture that shows a number, with a sound of its own pitch."""
    return write(path, [bars(number, 32, 64)] * 5, wave=tone(300 + 20 * number, 0.5, RATE), options={"crf": "20"})


def _plant(folder: Path) -> list[tuple[dict, str]]:
    """Writes bad files; returns their lines of the table, each with the reason for which it must be left out."""
    good = (folder / "0.mp4").read_bytes()
    right = hashlib.sha256(good).hexdigest()
    noise = np.random.default_rng(0)
    mkv = write(folder / "long.mkv", list(noise.integers(0, 256, (20, 32, 64, 3), np.uint8)), options={}).read_bytes()
    (folder / "long.mkv").unlink()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 16
    contents = {
        "cut.mp4": good[: len(good) // 2],
        "cut.mkv": mkv[: len(mkv) // 2],
        "empty.mp4": b"",
        "page.mp4": b"<!DOCTYPE html><title>404</title>",
        "flipped.mp4": bytes(flipped),
        "noise.mp4": noise.integers(0, 256, 3000, np.uint8).tobytes(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    reasons = ("undecodable", "truncated", "empty file", "not media", "changed", "undecodable")
    lines = [({"path": name}, reason) for name, reason in zip(contents, reasons)]
    lines[4][0]["sha256"] = right
    return [*lines, ({"path": "nowhere.mp4"}, "missing")]


MORE = [
    ({"path": "http://127.0.0.1:9/a.mp4"}, "bad path"),
    ({"path": "1.mp4", "id": "x1", "start": 3.0, "end": 4.0}, "span outside"),
    ({"path": "2.mp4", "id": "x2", "caption": "x" * 200_000}, "bad caption"),
    ({"path": "3.mp4", "id": "x3", "start": 0.4, "end": 0.1}, "bad span"),
    ({"path": "4.mp4"}, "duplicate id"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """63 good clips and 7 bad files among them: 10 %. Read only."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for number in range(GOOD):
        still(folder / f"{number}.mp4", number)
        lines.append({"path": f"{number}.mp4", "caption": PHRASES[number % 2], "labels": {"number": number}})
    bad = _plant(folder)
    for place, (line, _) in enumerate(bad):
        lines.insert(9 * place + 8, line)
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "reasons.json").write_text(json.dumps({line["path"]: reason for line, reason in bad}))
    good = [line for line in lines if "labels" in line]
    (folder / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in good[:12]))
    text.train_tokenizer(PHRASES, 300).save(str(folder / "tokenizer.json"))
    return folder


def run(source: Path, out: Path, workers: int = 2, shard: int = 16, budget: float = 1.0, **more) -> dict:
    _, entries, words = open_source(source, None, {})
    limits = more.pop("limits", Limits(20.0))
    return build(entries, out, Settings(words, Storage(**more), limits, shard, budget), workers)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory) -> Path:
    """The corpus, built. Read only."""
    out = tmp_path_factory.mktemp("built") / "out"
    run(corpus / "all.jsonl", out)
    return out


# ---- what is in it -----------------------------------------------------------------------------------


def test_the_quarantine_lists_exactly_the_planted_files(corpus, built):
    want = json.loads((corpus / "reasons.json").read_text())
    got = {Path(line["path"]).name: line["reason"] for line in lines_of(built / "quarantine.jsonl")}
    assert got == want
    told = json.loads((built / "build.json").read_text())
    assert told["clips"] == GOOD
    assert sum(told["left_out"].values()) == len(want) == GOOD // 9
    assert check(built).problems == []


def test_every_good_clip_is_there_and_is_the_one_it_says(corpus, built):
    rows = read_manifest(built / "manifest.jsonl")
    assert [row.id for row in rows] == [f"{number}.mp4" for number in range(GOOD)]
    for row, line in zip(rows, lines_of(built / "manifest.jsonl")):
        number = row.labels["number"]
        with av.open(row.read()) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert {number_of(picture) for picture in pictures} == {number}
        assert len(pictures) == line["media"]["frames"] == 5
        assert row.captions == (PHRASES[number % 2],)
        original = (corpus / f"{number}.mp4").read_bytes()
        assert line["source"]["sha256"] == hashlib.sha256(original).hexdigest()
        assert line["source"]["path"] == str(corpus / f"{number}.mp4")


def test_lines_that_the_table_itself_makes_bad(corpus, tmp_path):
    lines = [{"path": f"{number}.mp4"} for number in range(10)] + [line for line, _ in MORE]
    source = corpus / "more.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(source, tmp_path / "out")
    assert [line["reason"] for line in lines_of(tmp_path / "out" / "quarantine.jsonl")] == [
        reason for _, reason in MORE
    ]
    assert len(lines_of(tmp_path / "out" / "manifest.jsonl")) == 10


def test_two_builds_are_the_same_to_the_byte_with_any_number_of_workers(corpus, built, tmp_path):
    for workers in (1, 3):
        run(corpus / "all.jsonl", tmp_path / f"{workers}", workers)
        assert tree(tmp_path / f"{workers}") == tree(built)
    assert len(list((built / "shards").iterdir())) == 5
    assert not (built / ".build").exists()


def test_over_budget_is_an_error_with_all_files_written(corpus, built, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        DataBudgetError, match=r"7 of 70 clips were left out, more than the budget of 9.0%.*undecodable"
    ):
        run(corpus / "all.jsonl", out, budget=0.09)
    assert tree(out).keys() == tree(built).keys()
    assert (out / "manifest.jsonl").read_bytes() == (built / "manifest.jsonl").read_bytes()
    # Asked again, it says the same at once; with a larger budget it is good.
    with pytest.raises(DataBudgetError):
        run(corpus / "all.jsonl", out, budget=0.09)
    assert run(corpus / "all.jsonl", out, budget=0.1)["clips"] == GOOD


def test_pieces_have_numbered_ids_that_are_unique(tmp_path):
    folder = tmp_path / "media"
    (folder / "a").mkdir(parents=True)
    pictures = [bars(i // 10, 32, 64) for i in range(30)]
    write(folder / "a.mp4", pictures)
    still(folder / "b.mp4", 9)
    still(folder / "a" / "0001.mp4", 7)  # called as the second piece of a.mp4 will be
    run(folder, tmp_path / "out", cut="windows", seconds=1.0)
    lines = lines_of(tmp_path / "out" / "manifest.jsonl")
    assert [line["id"] for line in lines] == ["a/0000", "a/0001", "a/0002", "a/0001~2", "b"]
    assert len(read_manifest(tmp_path / "out" / "manifest.jsonl")) == 5
    assert check(tmp_path / "out").problems == []
    last = lines[2]
    assert (last["source"]["start"], last["source"]["end"], last["start"]) == (2.0, pytest.approx(3.0, abs=0.1), None)


def test_class_names_become_indices(corpus, tmp_path):
    source = tmp_path / "a.csv"
    kinds = ["dog", "cat", "dog", "", "10", "9"]
    rows = [f"{corpus}/{i}.mp4,{kind}" for i, kind in enumerate(kinds)]
    source.write_text("\n".join(["path,kind", *rows]) + "\n")
    _, entries, words = open_source(source, None, {"label": "kind", "media": corpus})
    build(entries, tmp_path / "out", Settings(words), 1)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {"kind": ["9", "10", "cat", "dog"]}
    labels = [line["labels"] for line in lines_of(tmp_path / "out" / "manifest.jsonl")]
    assert labels == [{"kind": 3}, {"kind": 2}, {"kind": 3}, {}, {"kind": 1}, {"kind": 0}]


def test_the_original_bytes_are_kept_when_asked(corpus, tmp_path):
    run(corpus / "few.jsonl", tmp_path / "out", keep=True)
    for row in read_manifest(tmp_path / "out" / "manifest.jsonl"):
        assert row.read().getvalue() == (corpus / row.id).read_bytes()


def test_a_source_that_gives_no_clips_or_only_bad_ones(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match="gives no clips"):
        run(tmp_path / "a.jsonl", tmp_path / "none")
    (tmp_path / "b.jsonl").write_text('{"path": "nowhere.mp4"}\n{"path": "http://x/y"}\n')
    told = run(tmp_path / "b.jsonl", tmp_path / "bad")
    assert (told["clips"], told["left_out"]) == (0, {"missing": 1, "bad path": 1})


def test_names_and_captions_in_any_script(tmp_path):
    folder = tmp_path / "média 狗"
    folder.mkdir()
    still(folder / "ünï 🐕.mp4", 1)
    (folder / "ünï 🐕.txt").write_text("ein Hünd\u2028bellt")
    names = ["ünï 🐕"]
    with contextlib.suppress(OSError):
        still(folder / "plain.mp4", 2).rename(folder / os.fsdecode(b"caf\xe9.mp4"))
        names.append("caf\\udce9")
    run(folder, tmp_path / "out")
    rows = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert sorted(row.id for row in rows) == sorted(names)
    assert next(row for row in rows if row.id == "ünï 🐕").captions == ("ein Hünd bellt",)


# ---- near duplicates ---------------------------------------------------------------------------------


def smaller(path: Path, target: Path, scale: float, quality: int) -> None:
    """The same film at another size and quality."""
    with av.open(str(path)) as source, av.open(str(target), "w") as sink:
        stream = None
        for frame in source.decode(video=0):
            if stream is None:
                stream = sink.add_stream("libx264", rate=30)
                stream.width, stream.height = (2 * round(side * scale / 2) for side in (frame.width, frame.height))
                stream.pix_fmt, stream.options = "yuv420p", {"crf": str(quality)}
                stream.time_base = stream.codec_context.time_base = frame.time_base
            small = frame.reformat(stream.width, stream.height, "yuv420p")
            small.pts, small.time_base, small.pict_type = frame.pts, frame.time_base, 0
            sink.mux(stream.encode(small))
        sink.mux(stream.encode(None))


def test_copies_are_found_and_different_clips_of_the_world_are_not(world_folder, tmp_path):
    rows = read_manifest(world_folder / "train.jsonl")[:40]
    folder = tmp_path / "media"
    folder.mkdir()
    for i, row in enumerate(rows):
        shutil.copy(row.path, folder / f"{i:02d}.mp4")
    copies = {}
    for i, (scale, quality) in enumerate(((1, 28), (0.75, 25), (2, 28), (1, 33), (0.5, 23))):
        if any(stream == "video" for stream in _streams(rows[i].path)):
            smaller(Path(rows[i].path), folder / f"copy{i}.mp4", scale, quality)
            copies[f"copy{i}"] = f"{i:02d}"
    run(folder, tmp_path / "out")
    found = {line["id"]: line["like"] for line in lines_of(tmp_path / "out" / "duplicates.jsonl")}
    assert len(copies) >= 3
    assert found == copies


def _streams(path) -> list[str]:
    with av.open(str(path)) as container:
        return [stream.type for stream in container.streams]


# ---- training on it ----------------------------------------------------------------------------------

CLIP = Clip(seconds=0.4, frames=2, size=16, text_length=16)


def data_of(folder: Path, corpus: Path, **more) -> Data:
    settings = dict(labels={"number": GOOD}, workers=0, threads=2, prefetch=2, budget=0.5) | more
    return Data(train=str(folder / "manifest.jsonl"), tokenizer=str(corpus / "tokenizer.json"), **settings)


def test_it_trains(corpus, built):
    seen = {}
    for batch in batches(data_of(built, corpus), CLIP, PLAIN, batch=9, stop=7):
        assert batch.present["video"].all()
        assert batch.present["audio"].all()
        for number, picture in zip(batch.labels["number"].tolist(), batch.inputs["video"]):
            seen[number] = picture[0].mean()
    assert sorted(seen) == list(range(GOOD))


def test_a_flipped_byte_flags_its_sample_and_moves_no_other(corpus, built, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(built, out)
    good = batches(data_of(built, corpus), CLIP, PLAIN, batch=9, stop=7)
    row = read_manifest(out / "manifest.jsonl")[20]
    shard = Path(row.path)
    content = bytearray(shard.read_bytes())
    record = row.read().getvalue()
    content[content.index(record) + len(record) // 2] ^= 4
    shard.write_bytes(content)
    loader = Loader(data_of(out, corpus), CLIP, PLAIN, seed=3, batch=9, start=0, stop=7)
    try:
        ours = list(loader)
    finally:
        loader.close()
    assert [(bad.id, bad.reason) for bad in loader.account.bad.values()] == [("20.mp4", "changed")]
    differ = [
        int(number)
        for one, two in zip(good, ours)
        for number, a, b in zip(one.labels["number"], one.inputs["video"], two.inputs["video"])
        if not np.array_equal(a, b)
    ]
    assert differ == [20]
    assert check(out).problems


# ---- going on ----------------------------------------------------------------------------------------


def test_other_settings_are_an_error(corpus, built, tmp_path):
    for more in ({"short_side": 64}, {"keep": True}, {"gop": 5}):
        with pytest.raises(UserError, match="there → now: .*new folder"):
            run(corpus / "all.jsonl", built, **more)
    with pytest.raises(UserError, match="shard: 16 → 8"):
        run(corpus / "all.jsonl", built, shard=8)
    with pytest.raises(UserError, match="source: "):
        run(corpus / "few.jsonl", built)
    # The same while it is not finished.
    out = tmp_path / "out"
    interrupted(corpus / "few.jsonl", out, 5)
    with pytest.raises(UserError, match="there → now: "):
        run(corpus / "few.jsonl", out, gop=5, shard=4)


def test_clips_that_died_of_limits_are_not_tried_in_silence(corpus, tmp_path):
    out = tmp_path / "out"
    told = run(corpus / "few.jsonl", out, limits=Limits(20.0, bytes=100))
    assert told["left_out"] == {"answer too large": 12}
    with pytest.raises(UserError, match="other limits, and 12 clips died of them"):
        run(corpus / "few.jsonl", out, limits=Limits(20.0))
    assert run(corpus / "few.jsonl", out, limits=Limits(20.0, bytes=100)) == told


def test_a_folder_with_other_files_is_left_alone(corpus, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        run(corpus / "few.jsonl", tmp_path)
    assert tree(tmp_path) == {"thesis.txt": b"mine"}


def test_a_build_that_is_running_is_not_joined(corpus, tmp_path):
    (tmp_path / "out" / ".build").mkdir(parents=True)
    with open(tmp_path / "out" / ".build" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another build is running"):
            run(corpus / "few.jsonl", tmp_path / "out")
    assert run(corpus / "few.jsonl", tmp_path / "out")["clips"] == 12


class Stop(Exception):
    pass


def interrupted(source: Path, out: Path, after: int) -> None:
    """A build with shards of four that an error in this process ends after some clips."""

    def progress(done, _):
        if done >= after:
            raise Stop

    _, entries, words = open_source(source, None, {})
    with pytest.raises(Stop):
        build(entries, out, Settings(words, shard=4, budget=1.0, limits=Limits(20.0)), 2, progress)


def test_nothing_is_done_twice(corpus, tmp_path):
    """After a stop, the files that are done turn into noise: who read them again would leave them out."""
    media = tmp_path / "media"
    media.mkdir()
    for i in range(12):
        shutil.copy(corpus / f"{i}.mp4", media)
    run(media, tmp_path / "straight", shard=4)
    interrupted(media, tmp_path / "out", 7)
    work = tmp_path / "out" / ".build"
    plan = [line for shard in range(3) for line in lines_of(work / "plan" / f"{shard:05d}.jsonl")]
    done = [number for number in range(12) if (work / f"rows-{number // 4:05d}.jsonl").is_file()]
    done += [int(note.stem) for note in work.glob("0*/*.json")]
    assert 7 <= len(set(done)) < 12
    for number in done:
        Path(plan[number]["path"]).write_bytes(b"noise")
    run(media, tmp_path / "out", shard=4)
    ours, straight = tree(tmp_path / "out"), tree(tmp_path / "straight")
    assert ours == straight


def command(source: Path, out: Path, *more: str) -> list[str]:
    words = [source, out, "--workers", 2, "--shard", 4, "--budget", "0.5", "--timeout", 20, *more]
    return [sys.executable, "-m", "vmm", "data", "build", *map(str, words)]


def start(words: list[str], **more) -> subprocess.Popen:
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def test_killed_at_random_moments_it_gives_the_same(corpus, tmp_path):
    source, out = corpus / "all.jsonl", tmp_path / "out"
    straight = start(command(source, tmp_path / "straight"))
    begin = time.monotonic()
    assert straight.wait() == 0, straight.stderr.read()
    length = time.monotonic() - begin
    rng, kills, within = random.Random(0), 0, 0
    for _ in range(3):
        process = start(command(source, out), start_new_session=True)
        try:
            process.wait(rng.uniform(0.3, 0.8) * length)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # not its children: they must end by themselves
            process.wait()
            kills += 1
            within += (out / ".build" / "plan.json").is_file()
    assert kills
    assert within
    process = start(command(source, out))
    assert process.wait() == 0, process.stderr.read()
    assert tree(out) == tree(tmp_path / "straight")


def running(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_control_c_stops_it_and_its_children(corpus, tmp_path):
    # A build that ends before it is stopped is made again.
    for attempt in range(10):
        out = tmp_path / f"out{attempt}"
        process = start(command(corpus / "all.jsonl", out), start_new_session=True)
        deadline = time.monotonic() + 60
        while not (out / ".build" / "plan.json").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the children get it too
        if process.wait(20) != 0:
            break
    assert process.returncode == 130
    assert "stopped" in process.stderr.read()
    deadline = time.monotonic() + 10
    while running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(process.pid)
    assert start(command(corpus / "all.jsonl", out)).wait() == 0


def test_exit_codes_and_the_line_that_sums_up(corpus, built, tmp_path):
    words = command(corpus / "all.jsonl", tmp_path / "out")
    process = start(words)
    assert process.wait() == 0
    out = process.stdout.read()
    assert "63 clips in 18 shards" in out
    assert "2 undecodable" in out
    words[words.index("0.5")] = "0.01"
    process = start(words)
    assert process.wait() == 3
    assert "7 of 70 clips were left out" in process.stderr.read()
    process = start([*words, "--gop", "3"])
    assert process.wait() == 2


@pytest.mark.parametrize("room", [2_000, 100_000])
def test_a_full_disk_is_told_and_the_same_command_goes_on(corpus, built, tmp_path, room):
    """Files may grow to so many bytes: not one stored clip, or the clips but no shard."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    words = command(corpus / "few.jsonl", tmp_path / "out")
    process = start(words, preexec_fn=limit)
    assert process.wait() == 5
    [line] = [line for line in process.stderr.read().splitlines() if line.startswith("vmm: error")]
    assert "run the same command again" in line
    assert not (tmp_path / "out" / "build.json").exists()
    process = start(words)
    assert process.wait() == 0, process.stderr.read()
    run(corpus / "few.jsonl", tmp_path / "straight", shard=4)
    ours, straight = tree(tmp_path / "out"), tree(tmp_path / "straight")
    for files in (ours, straight):
        files.pop("build.json")  # limits differ
    assert ours == straight


def test_a_disk_that_cannot_be_written(corpus, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises((StorageError, UserError)):
        run(corpus / "few.jsonl", blocked / "out")


# ---- real files --------------------------------------------------------------------------------------

CLIPS = ROOT.parent / "shared" / "clips"


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no real clips here")
def test_odd_real_files_end_in_a_clip_or_a_reason(tmp_path):
    """Sixty malformed files; what is left out must be what a plain loop could not read whole either."""
    told = run(CLIPS / "odd", tmp_path / "out", short_side=64)
    total = sum(told["left_out"].values()) + told["clips"]
    assert total == sum(1 for _ in (CLIPS / "odd").iterdir())
    assert told["left_out"].pop("not taken") == 1  # the catalogue
    assert not {"timeout", "crashed", "out of memory", "killed"} & set(told["left_out"])
    kept = {line["id"] for line in lines_of(tmp_path / "out" / "manifest.jsonl")}
    import csv

    with (CLIPS / "odd" / "catalogue.csv").open() as file:
        outcomes = {row["file"].rsplit(".", 1)[0]: row["outcome"] for row in csv.DictReader(file)}
    assert {name for name, outcome in outcomes.items() if outcome == "decodes"} <= kept
    assert {"media__sample_dts_hd_ma", "media__sample_with_dts_x"} <= kept  # these crash a plain loop
    assert not {"decord__corrupted", "media__sample_with_invalid_nalu", "media__invalid-bitstream"} & kept
