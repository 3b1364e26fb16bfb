"""Recipes for datasets of captioned video: MSR-VTT, ActivityNet Captions, YouCook2."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from vmm.data.sources.entry import Bad, Entry, captions_of, span_of
from vmm.data.sources.library import Library
from vmm.data.sources.published import Row, beside, checked, entries_of, lines_of, of_split, read_json
from vmm.errors import UserError

# MSR-VTT gives the index; the names stand in the category.txt of its archive, which copies of the dataset leave out.
_MSRVTT_CATEGORIES = (
    "music", "people", "gaming", "sports/actions", "news/events/politics", "education", "tv shows", "movie/comedy",
    "animation", "vehicles/autos", "howto", "travel", "science/technology", "animals/pets", "kids/family",
    "documentary", "food/drink", "cooking", "beauty/fashion", "advertisement",
)  # fmt: skip


def msrvtt(path: Path, *, media: Path | None = None, split: str | None = None, label: str = "class") -> Iterator[Entry]:
    """MSR-VTT: 10,000 clips of YouTube videos in 20 categories, each with 20 captions.

    SOURCE is train_val_videodatainfo.json, test_videodatainfo.json or MSRVTT_data.json:

        {"videos": [{"video_id": "video0", "category": 9, "url": "https://www.youtube.com/watch?v=9lZi22qLlEo",
                     "start time": 137.72, "end time": 149.44, "split": "train", "id": 0}],
         "sentences": [{"sen_id": 0, "video_id": "video0", "caption": "a car is shown"}]}

    --media (default: the folder of the JSON file): in any folders (TrainValVideo/, TestVideo/, videos/all/),
        video0.mp4        the clip, as published, or
        9lZi22qLlEo.mp4   the YouTube video of the url, of which the span is taken
    --split: train, validate or test; default: all.

    id: the video_id. captions: all sentences of the video. labels: {class: the category's name}.
    """
    data = read_json(path)
    for field in ("videos", "sentences"):
        if not isinstance(data, dict) or not isinstance(data.get(field), list):
            raise UserError(f"{path}: not the JSON of MSR-VTT: it has no list {field!r}")
    library = Library(media or path.parent)
    sentences: dict[str, list] = {
        row["video_id"]: [] for row in data["videos"] if isinstance(row, dict) and isinstance(row.get("video_id"), str)
    }
    strays: list[Row] = []
    for number, row in enumerate(data["sentences"]):
        name = row.get("video_id") if isinstance(row, dict) else None
        if not isinstance(name, str) or name not in sentences or "caption" not in row:
            strays.append((f"sentence {number}", Bad("bad line", f"no caption, or no such video: {str(row)[:200]}")))
        else:
            sentences[name].append(row["caption"])

    def make(row: dict) -> Entry:
        name, category = row.get("video_id"), row.get("category")
        if not isinstance(name, str) or not name:
            raise Bad("bad line", "no 'video_id'")
        if type(category) is not int or not 0 <= category < len(_MSRVTT_CATEGORIES):
            raise Bad("bad line", f"its category is {category!r}, not 0 to {len(_MSRVTT_CATEGORIES) - 1}")
        start, end = span_of(row.get("start time"), row.get("end time"))
        labels = {label: _MSRVTT_CATEGORIES[category]}
        entry = Entry(name, "", start=start, end=end, captions=captions_of(sentences[name]), labels=labels)
        # Without its span, a clip cannot be found in the whole video.
        return library.place(entry, (name,), () if start is None or end is None else _youtube_id(row.get("url")))

    def rows() -> Iterator[Row]:
        yield from of_split(_objects(data["videos"], "video"), split, path)
        yield from strays

    yield from checked(entries_of(rows(), path, make), path, "the JSON of MSR-VTT", library)


def activitynet_captions(path: Path, *, media: Path | None = None) -> Iterator[Entry]:
    """ActivityNet Captions: what happens in two minutes of a YouTube video, as sentences with their spans.

    SOURCE is train.json, val_1.json or val_2.json (two annotations of the same videos): spans in seconds.

        {"v_QOlSCBRmfWY": {"duration": 82.73, "timestamps": [[0.83, 19.86], [17.37, 60.81]],
                           "sentences": ["A young woman is seen standing in a room.", "She dances."]}}

    --media (default: the folder of the JSON file): in any folders, v_<id>.mp4 or <id>.mp4, the whole video.

    id: v_<id>/<place of the sentence, from 0>; one clip a sentence. captions: the sentence.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a table of videos with the fields duration, timestamps and sentences")
    library = Library(media or path.parent)

    def rows() -> Iterator[Row]:
        for name, video in data.items():
            spans, texts = (video.get(key) if isinstance(video, dict) else None for key in ("timestamps", "sentences"))
            if not isinstance(spans, list) or not isinstance(texts, list) or len(spans) != len(texts):
                yield name, Bad("bad line", "its timestamps and sentences are not lists of one length")
                continue
            for place, (span, text) in enumerate(zip(spans, texts)):
                yield f"{name}/{place}", {"video": name, "place": place, "span": span, "text": text}

    def make(row: dict) -> Entry:
        name = row["video"]
        start, end = _pair(row["span"])
        entry = Entry(f"{name}/{row['place']}", "", start=start, end=end, captions=captions_of(row["text"]))
        return library.place(entry, (), (name, name.removeprefix("v_")))

    yield from checked(entries_of(rows(), path, make), path, "the JSON of ActivityNet Captions", library)


def youcook2(
    path: Path, *, media: Path | None = None, split: str | None = None, label: str = "class"
) -> Iterator[Entry]:  # fmt: skip
    """YouCook2: the steps of a recipe in a YouTube video, one of 89 dishes, as sentences with their spans.

    SOURCE is youcookii_annotations_trainval.json: spans in seconds.

        {"database": {"GLd3aX16zBg": {"duration": 241.62, "subset": "training", "recipe_type": "113",
            "annotations": [{"segment": [90, 102], "id": 0, "sentence": "spread margarine on two slices of bread"}]}}}

    Beside it, or in the folder above: label_foodtype.csv with lines `113,grilled cheese`, the names of recipe_type.
    --media (default: the folder of the JSON file): in any folders, as raw_videos/training/113/, <id>.mp4 or .mkv or
        .webm, the whole video.
    --split: training or validation, the values of subset; default: all.

    id: <video>/<id of the step>; one clip a step. captions: the sentence. labels: {class: the dish}.
    """
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("database"), dict):
        raise UserError(f"{path}: not the JSON of YouCook2: it has no table 'database'")
    library = Library(media or path.parent)
    file = beside(path, ("label_foodtype.csv",), "from the download page of YouCook2")
    dishes = dict(line.strip().strip(",").partition(",")[::2] for _, line in lines_of(file))

    def steps() -> Iterator[Row]:
        videos = (
            (name, video | {"video": name} if isinstance(video, dict) else Bad("bad line", "not an object"))
            for name, video in data["database"].items()
        )
        for name, video in of_split(videos, split, path, "subset"):
            if isinstance(video, Bad):
                yield name, video
            elif not isinstance(video.get("annotations"), list):
                yield name, Bad("bad line", "no list 'annotations'")
            else:
                for place, step in enumerate(video["annotations"]):
                    row = step | {"video": name, "dish": video.get("recipe_type")} if isinstance(step, dict) else None
                    yield f"{name} annotation {place}", row or Bad("bad line", "not an object")

    def make(row: dict) -> Entry:
        lacking = [field for field in ("segment", "id", "sentence") if field not in row]
        if lacking:
            raise Bad("bad line", f"no {lacking[0]!r}")
        dish = str(row["dish"])
        if dish not in dishes:
            raise Bad("bad line", f"the recipe_type {dish!r} is not in {file.name}")
        start, end = _pair(row["segment"])
        entry = Entry(
            f"{row['video']}/{row['id']}", "", start=start, end=end, captions=captions_of(row["sentence"]),
            labels={label: dishes[dish].strip()},
        )  # fmt: skip
        return library.place(entry, (), (row["video"],), folder=dish)

    yield from checked(entries_of(steps(), path, make), path, "the JSON of YouCook2", library)


def _pair(span) -> tuple[float, float]:
    if not isinstance(span, list) or len(span) != 2:
        raise Bad("bad span", f"{span!r} is not a start and an end")
    start, end = span_of(*span)
    if start is None or end is None:
        raise Bad("bad span", f"{span!r} is not a start and an end")
    return start, end


def _youtube_id(url) -> tuple[str, ...]:
    if not isinstance(url, str):
        return ()
    try:
        return tuple(parse_qs(urlsplit(url).query).get("v", ()))
    except ValueError:
        return ()


def _objects(items: list, name: str) -> Iterator[Row]:
    for number, item in enumerate(items):
        yield f"{name} {number}", item if isinstance(item, dict) else Bad("bad line", "not an object")
