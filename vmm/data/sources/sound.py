"""Recipes for datasets of sounds, with and without pictures: AudioSet, VGGSound, AVE, ESC-50."""

from collections.abc import Iterator
from pathlib import Path

from vmm.data.sources.entry import Bad, Entry, span_of
from vmm.data.sources.library import Library
from vmm.data.sources.published import beside, checked, entries_of, numbered_split, of_split, table
from vmm.errors import UserError, one_of

_VGGSOUND_SECONDS = 10.0  # of every clip


def audioset(
    path: Path, *, media: Path | None = None, label: str = "class", clips: bool = False
) -> Iterator[Entry]:  # fmt: skip
    """AudioSet: ten seconds of a YouTube video, any of 527 kinds of sound.

    SOURCE is balanced_train_segments.csv, unbalanced_train_segments.csv or eval_segments.csv: lines of comments, then
    the video, the span in seconds, and the sounds by their ids:

        # YTID, start_seconds, end_seconds, positive_labels
        --4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_,/m/0bt9lr,/m/0jbk"

    Beside it: class_labels_indices.csv with the columns index, mid and display_name.
    --media (default: the folder of the CSV file): in any folders, a video or a sound file of the name
        <YTID>_<start>_<end> or <YTID>_<start>   the clip; times in milliseconds, seconds, or seconds of six digits
        Y<YTID>                                  the clip
        <YTID>                                   the whole video, of which the span is taken (with --clips: the clip)

    id: <YTID>_<start in milliseconds>. labels: {class: list of display names}.
    """
    library = Library(media or path.parent)
    file = beside(path, ("class_labels_indices.csv",), "from the download page of AudioSet, with the segments")
    names = {
        row["mid"]: row["display_name"]
        for _, row in table(file, ("index", "mid", "display_name"))
        if isinstance(row, dict)
    }

    def make(row: dict) -> Entry:
        start, end = span_of(row["start_seconds"], row["end_seconds"])
        name = row["YTID"]
        if not name or start is None or end is None:
            raise Bad("bad line", "no YTID, start_seconds or end_seconds")
        sounds = [sound.strip() for sound in row["positive_labels"].split(",")]
        unknown = [sound for sound in sounds if sound not in names]
        if unknown:
            raise Bad("bad line", f"the label {unknown[0]!r} is not in {file.name}")
        entry = Entry(
            f"{name}_{round(start * 1000)}",
            "",
            start=start,
            end=end,
            labels={label: [names[sound] for sound in sounds]},
        )
        stems = [*_clip_names(name, start, end), f"Y{name}"]
        return library.place(entry, (*stems, name) if clips else stems, (name,))

    columns = ("YTID", "start_seconds", "end_seconds", "positive_labels")
    rows = table(path, columns, heading=columns, comment="#")
    yield from checked(entries_of(rows, path, make), path, f"AudioSet segments `{', '.join(columns)}`", library)


def vggsound(
    path: Path, *, media: Path | None = None, split: str | None = None, label: str = "class", clips: bool = False
) -> Iterator[Entry]:
    """VGGSound: ten seconds of a YouTube video in which the source of a sound is seen, one of 309 sounds.

    SOURCE is vggsound.csv, without a heading: the video, the second it starts at, the label, train or test.

        ---g-f_I2yQ,1,people marching,test

    --media (default: the folder of the CSV file): in any folders, a video or a sound file of the name
        <id>_000001     the clip (also <id>_1, <id>_1_11, <id>_1000_11000, <id>_000001_000011)
        <id>            the whole video, of which the span is taken (with --clips: the clip)
    --split: train or test; default: all rows.

    id: <id>_000001. labels: {class: the label}.
    """
    library = Library(media or path.parent)
    columns = ("youtube_id", "start_seconds", "label", "split")

    def make(row: dict) -> Entry:
        name, text = row["youtube_id"], row["label"]
        try:
            start, _ = span_of(row["start_seconds"], None)
        except Bad as error:
            raise Bad("bad line", error.detail) from None
        if start is None or not name or not text:
            raise Bad("bad line", "no youtube_id, start_seconds or label")
        end = start + _VGGSOUND_SECONDS
        stems = _clip_names(name, start, end)
        entry = Entry(f"{name}_{int(start):06d}", "", start=start, end=end, labels={label: text})
        return library.place(entry, (*stems, name) if clips else stems, (name,), folder=text)

    rows = of_split(table(path, columns, heading=columns), split, path)
    yield from checked(entries_of(rows, path, make), path, f"a VGGSound table `{','.join(columns)}`", library)


def ave(path: Path, *, media: Path | None = None, split: str | None = None, label: str = "class") -> Iterator[Entry]:
    """AVE: ten-second clips, and when in them an event is both seen and heard, one of 28.

    SOURCE is the folder of the dataset, or one of its files Annotations.txt (all), trainSet.txt, valSet.txt and
    testSet.txt: the span is in whole seconds of the ten-second clip.

        Category&VideoID&Quality&StartTime&EndTime
        Church bell&RUhOCu3LNXM&good&0&10

    --media (default: the folder): AVE/<VideoID>.mp4, in any folders. A clip is the event, from StartTime to EndTime.
    --split (of a folder): train, val or test; default: Annotations.txt.

    id: <VideoID>@<start>-<end>, for a video may have several events. labels: {class: the category}.
    """
    folder = path if path.is_dir() else path.parent
    if split is not None:
        known = ("train", "val", "test")
        if split not in known or not path.is_dir():
            raise UserError(f"--split {split}: of a folder of AVE, {one_of(split, known)}")
        path = folder / f"{split}Set.txt"
    elif path.is_dir():
        path = folder / "Annotations.txt"
    if not path.is_file():
        raise UserError(f"{path}: no such file; it comes in AVE_Dataset.zip")
    library = Library(media or folder)

    def make(row: dict) -> Entry:
        name, group = row["VideoID"], row["Category"]
        start, end = span_of(row["StartTime"], row["EndTime"])
        if not name or not group or start is None or end is None:
            raise Bad("bad line", "no Category, VideoID, StartTime or EndTime")
        entry = Entry(f"{name}@{start:g}-{end:g}", "", start=start, end=end, labels={label: group})
        return library.place(entry, (), (name,), folder=group)

    columns = ("Category", "VideoID", "Quality", "StartTime", "EndTime")
    rows = table(path, columns, heading=columns, separator="&")
    yield from checked(entries_of(rows, path, make), path, f"an AVE table `{'&'.join(columns)}`", library)


def esc50(path: Path, *, media: Path | None = None, split: str | None = None, label: str = "class") -> Iterator[Entry]:
    """ESC-50: five seconds of sound, one of 50 kinds, in five folds.

    SOURCE is the folder of the dataset, which holds meta/esc50.csv, or that file:

        filename,fold,target,category,esc10,src_file,take
        1-100032-A-0.wav,1,0,dog,True,100032,A

    --media (default: the folder of the dataset): audio/<filename>, in any folders.
    --split: test1 … test5, the fold of that number; train1 … train5, the four others; default: all.

    id: the filename without suffix. labels: {class: the category}.
    """
    fold = numbered_split(split, 5) if split is not None else None
    if path.is_dir():
        folder, path = path, path / "meta" / "esc50.csv"
    else:
        folder = path.parent.parent if path.parent.name == "meta" else path.parent
    if not path.is_file():
        raise UserError(f"{path}: no such file; it comes with the recordings of ESC-50")
    library = Library(media or folder)

    def rows():
        for where, row in table(path, ("filename", "fold", "category")):
            if isinstance(row, dict) and row["fold"] not in ("1", "2", "3", "4", "5"):
                row = Bad("bad line", f"its fold is {row['fold']!r}, not 1 to 5")
            if fold is None or isinstance(row, Bad) or (row["fold"] == str(fold[1])) == (fold[0] == "test"):
                yield where, row

    def make(row: dict) -> Entry:
        if not row["filename"] or not row["category"]:
            raise Bad("bad line", "no filename or category")
        stem = row["filename"].rsplit(".", 1)[0]
        return library.place(Entry(stem, "", labels={label: row["category"]}), (stem,), folder=row["category"])

    yield from checked(entries_of(rows(), path, make), path, "the table of ESC-50", library)


def _clip_names(name: str, start: float, end: float) -> list[str]:
    """Returns the stems under which downloaders store the span of a video."""
    first, last = int(start), int(end)
    early, late = round(start * 1000), round(end * 1000)
    names = [f"{name}_{first:06d}_{last:06d}", f"{name}_{first:06d}", f"{name}_{early}_{late}", f"{name}_{early}"]
    return list(dict.fromkeys([*names, f"{name}_{first}_{last}", f"{name}_{first}"]))
