"""Recipes for datasets of actions: Kinetics, Something-Something v2, UCF101, HMDB51, Charades."""

from collections.abc import Iterator
from pathlib import Path

from vmm.data.sources.entry import Bad, Entry, captions_of, span_of
from vmm.data.sources.library import Library
from vmm.data.sources.published import (
    Row,
    beside,
    checked,
    entries_of,
    lines_of,
    numbered_split,
    of_split,
    read_json,
    table,
)  # fmt: skip
from vmm.errors import UserError


def kinetics(
    path: Path, *, media: Path | None = None, split: str | None = None, label: str = "class", clips: bool = False
) -> Iterator[Entry]:
    """Kinetics-400, -600, -700 and -700-2020: ten seconds of a YouTube video, one of 400 to 700 actions.

    SOURCE is a CSV file with the columns label, youtube_id, time_start, time_end (whole seconds) and split, in any
    order; more columns (is_cc of Kinetics-400) do no harm, and the test sets lack the label.

        label,youtube_id,time_start,time_end,split
        testifying,---QUuC4vJs,84,94,validate

    --media (default: the folder of the CSV file): in any folders, as <label>/ or the label with _ for spaces,
        <youtube_id>_000084_000094.mp4   the clip, or
        <youtube_id>.mp4                 the whole video, of which the span is taken (with --clips: the clip)
    --split: a value of the column split, as train, val, validate, test; default: all rows.

    id: <youtube_id>_000084_000094. labels: {class: the label}.
    """
    library = Library(media or path.parent)

    def make(row: dict) -> Entry:
        start, end = span_of(row["time_start"], row["time_end"])
        name = row["youtube_id"]
        if not name or start is None or end is None:
            raise Bad("bad line", "no youtube_id, time_start or time_end")
        clip, text = f"{name}_{int(start):06d}_{int(end):06d}", row.get("label", "")
        entry = Entry(clip, "", start=start, end=end, labels={label: text} if text else {})
        return library.place(entry, (clip, name) if clips else (clip,), (name,), folder=text)

    rows = of_split(table(path, ("youtube_id", "time_start", "time_end", *(("split",) if split else ()))), split, path)
    yield from checked(entries_of(rows, path, make), path, "a Kinetics table", library)


def something_something_v2(path: Path, *, media: Path | None = None, label: str = "class") -> Iterator[Entry]:
    """Something-Something v2: two to six seconds of a hand doing one of 174 things with objects.

    SOURCE is train.json, validation.json or test.json of the labels archive (something-something-v2-train.json … of
    the first distribution): a list of clips.

        [{"id": "78687", "label": "holding potato next to vicks vaporub bottle",
          "template": "Holding [something] next to [something]", "placeholders": ["potato", "vicks vaporub bottle"]}]

    Beside it: labels.json (something-something-v2-labels.json), whose keys are the templates without brackets; and for
    test.json, which has only the ids, test-answers.csv with lines `id;template without brackets`.
    --media (default: the folder of the JSON file): <id>.webm, as in 20bn-something-something-v2/.

    id: the id. captions: the label. labels: {class: the template without its brackets}.
    """
    library = Library(media or path.parent)
    items = read_json(path)
    if not isinstance(items, list):
        raise UserError(f"{path}: not a list of Something-Something clips with the fields id, label and template")
    archive = "in the labels archive of Something-Something v2"
    classes = read_json(beside(path, ("labels.json", "something-something-v2-labels.json"), archive))
    if not isinstance(classes, dict):
        raise UserError(f"{path.parent / 'labels.json'}: not a table of templates and their indices")
    answers: dict[str, str] = {}
    if not any(isinstance(item, dict) and "template" in item for item in items):
        file = beside(path, ("test-answers.csv", "something-something-v2-test-answers.csv"), archive)
        rows = table(file, ("id", "template"), heading=("id", "template"), separator=";")
        answers = {row["id"]: row["template"] for _, row in rows if isinstance(row, dict)}

    def make(row: dict) -> Entry:
        name = row.get("id")
        if not isinstance(name, str) or not name:
            raise Bad("bad line", "no 'id'")
        text = row.get("template", answers.get(name))
        if not isinstance(text, str):
            raise Bad("bad line", "no 'template'" if not answers else "no answer in test-answers.csv")
        text = text.replace("[", "").replace("]", "")
        if text not in classes:
            raise Bad("bad line", f"its template {text!r} is not in labels.json")
        return library.place(Entry(name, "", captions=captions_of(row.get("label")), labels={label: text}), (name,))

    yield from checked(entries_of(_objects(items), path, make), path, "a list of Something-Something clips", library)


def ucf101(
    path: Path, *, media: Path | None = None, split: str | None = None, label: str = "class"
) -> Iterator[Entry]:  # fmt: skip
    """UCF101: clips of YouTube videos, one of 101 actions; three divisions into train and test.

    SOURCE is the folder of the dataset, or ucfTrainTestlist in it, with
        classInd.txt       a line a class: `1 ApplyEyeMakeup`
        trainlist01.txt    `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`, 02 and 03 likewise
        testlist01.txt     `ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi`, no index
    --media (default: SOURCE): UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi, in any folders.
    --split (needed): train1, test1, train2, test2, train3 or test3.

    id: the file's name without suffix. labels: {class: the folder in the list}.
    """
    kind, number = numbered_split(split, 3)
    inside = path / "ucfTrainTestlist"
    folder = inside if inside.is_dir() else path
    source = folder / f"{kind}list{number:02d}.txt"
    for file in (folder / "classInd.txt", source):
        if not file.is_file():
            raise UserError(
                f"{file}: no such file; it comes in UCF101TrainTestSplits-RecognitionTask.zip, folder ucfTrainTestlist"
            )
    parts = (line.split() for _, line in lines_of(folder / "classInd.txt"))
    classes = {part[1]: part[0] for part in parts if len(part) == 2}
    library = Library(media or path)

    def make(row: dict) -> Entry:
        name, index = row["name"], row["index"]
        group, _, file = name.partition("/")
        if group not in classes or not file:
            raise Bad("bad line", f"{group!r} is not in classInd.txt")
        if kind == "train" and index != classes[group]:
            raise Bad("bad line", f"{index!r} is not the index of {group} in classInd.txt")
        stem = file.rsplit(".", 1)[0]
        # The lists write some names of one class in another case than the files have.
        stems = (stem, stem.replace("HandStand", "Handstand"), stem.replace("Handstand", "HandStand"))
        return library.place(Entry(stem, "", labels={label: group}), stems, folder=group)

    rows = ((f"{source.name} line {line}", _listed(text)) for line, text in lines_of(source))
    yield from checked(entries_of(rows, source, make), source, "a UCF101 list `class/file.avi index`", library)


def hmdb51(
    path: Path, *, media: Path | None = None, split: str | None = None, label: str = "class"
) -> Iterator[Entry]:  # fmt: skip
    """HMDB51: clips of films and YouTube videos, one of 51 actions; three divisions into train and test.

    SOURCE is the folder of the dataset, or testTrainMulti_7030_splits in it, with a file for each class and division:
        brush_hair_test_split1.txt    `April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1`, where 1: train, 2: test, 0: neither
    --media (default: SOURCE): brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi, in any folders.
    --split (needed): train1, test1, train2, test2, train3 or test3.

    id: <class>/<the file's name without suffix>. labels: {class: the class}.
    """
    kind, number = numbered_split(split, 3)
    inside = path / "testTrainMulti_7030_splits"
    folder = inside if inside.is_dir() else path
    tail = f"_test_split{number}.txt"
    lists = sorted(folder.glob(f"*{tail}"))
    if not lists:
        raise UserError(
            f"{folder}/brush_hair{tail}: no such file, nor of another class; it comes in test_train_splits.rar"
        )
    library = Library(media or path)
    chosen = {"train": "1", "test": "2"}[kind]

    def rows() -> Iterator[Row]:
        for file in lists:
            for line, text in lines_of(file):
                row, where = _listed(text), f"{file.name} line {line}"
                if row["index"] not in ("0", "1", "2"):
                    yield where, Bad("bad line", f"{text[:200]!r} does not end with 0, 1 or 2")
                elif row["index"] == chosen:
                    yield where, row | {"class": file.name.removesuffix(tail)}

    def make(row: dict) -> Entry:
        stem, group = row["name"].rsplit(".", 1)[0], row["class"]
        return library.place(Entry(f"{group}/{stem}", "", labels={label: group}), (stem,), folder=group)

    yield from checked(entries_of(rows(), folder, make), folder, "HMDB51 lists `file.avi 0|1|2`", library)


def charades(path: Path, *, media: Path | None = None, label: str = "class") -> Iterator[Entry]:
    """Charades: thirty seconds of an acted scene at home, any of 157 actions, described in sentences.

    SOURCE is Charades_v1_train.csv or Charades_v1_test.csv, with the columns id, script, descriptions (sentences
    parted by ;) and actions (class, start and end in seconds, parted by ;), among others:

        id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length
        46GP8,HR43,Kitchen,6,7,Yes,A person cooks.,food;stove,A person stirs.,c092 11.90 21.20;c147 0.00 12.60,24.83

    Beside it: Charades_v1_classes.txt with lines `c092 Watching/looking outside of a window`.
    --media (default: the folder of the CSV file): <id>.mp4, as in Charades_v1/ or Charades_v1_480/.

    id: the id; a clip is a whole video. captions: its descriptions, then the script. labels: {class: the names of its
    actions, each once, in order}.
    """
    library = Library(media or path.parent)
    file = beside(path, ("Charades_v1_classes.txt",), "in Charades.zip, with the annotations")
    classes = dict(line.strip().partition(" ")[::2] for _, line in lines_of(file))

    def make(row: dict) -> Entry:
        names = []
        for action in filter(None, row["actions"].split(";")):
            parts = action.split()
            if len(parts) != 3:
                raise Bad("bad line", f"the action {action!r} is not a class with start and end")
            if parts[0] not in classes:
                raise Bad("bad line", f"the action {parts[0]!r} is not in {file.name}")
            names.append(classes[parts[0]])  # its span is not looked at: the clip is the whole video
        if not row["id"]:
            raise Bad("bad line", "no 'id'")
        captions = captions_of([*row["descriptions"].split(";"), row["script"]])
        entry = Entry(row["id"], "", captions=captions, labels={label: list(dict.fromkeys(names))})
        return library.place(entry, (row["id"],))

    rows = table(path, ("id", "script", "descriptions", "actions"))
    yield from checked(entries_of(rows, path, make), path, "a Charades table", library)


def _listed(line: str) -> dict:
    """Returns {"name", "index"} of a line `name.avi index`; the index may be missing."""
    head, _, last = line.strip().rpartition(" ")
    return {"name": head.strip(), "index": last} if head and last.isdigit() else {"name": line.strip(), "index": ""}


def _objects(items: list) -> Iterator[Row]:
    for number, item in enumerate(items, 1):
        yield f"item {number}", item if isinstance(item, dict) else Bad("bad line", "not an object")
