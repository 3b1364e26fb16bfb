"""What is in a dataset: lengths, codecs, sizes, missing modalities, captions, balance of labels; numbers and tables."""

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.table import Table

from vmm.data.inspection.dataset import Dataset, about, printable
from vmm.data.manifest import manifest_digest

UNKNOWN = "unknown"
_PERCENTILES = {"min": 0, "5 %": 5, "25 %": 25, "median": 50, "75 %": 75, "95 %": 95, "max": 100}
_SHOWN = 6  # values of a column named in a table; JSON has all


def survey(dataset: Dataset) -> dict:
    """Returns the numbers, fit for JSON. What the manifest does not tell is counted under "unknown", or None."""
    media = [about(line, "media") for line in dataset.lines]
    lengths = [row.seconds for row in dataset.rows if row.seconds is not None]
    return {
        "manifest_sha256": manifest_digest(dataset.manifest),
        "clips": len(dataset.rows),
        "hours": sum(lengths) / 3600 if lengths else None,
        "seconds": _percentiles(lengths) | {UNKNOWN: len(dataset.rows) - len(lengths)},
        "containers": _counted(_value(one, "container") for one in media),
        "video_codecs": _counted(_value(one, "video_codec") for one in media),
        "audio_codecs": _counted(_value(one, "audio_codec") for one in media),
        "sizes": _counted(_size(one) for one in media),
        "fps": _counted(_fps(one) for one in media),
        "missing": {
            "no video": sum("video_codec" in one and one["video_codec"] is None for one in media),
            "no audio": sum(one.get("audio") is False for one in media),
            "silent audio": sum(one.get("silent") is True for one in media),
            "no caption": sum(not row.captions for row in dataset.rows),
            UNKNOWN: sum("video_codec" not in one or "audio" not in one for one in media),
        },
        "remarks": _counted(str(name) for one in media for name in one.get("remarks") or ()),
        "captions": _captions(dataset),
        "labels": {name: _balance(dataset, name) for name in sorted({key for row in dataset.rows for key in row.labels})},
        "near_duplicates": None if dataset.duplicates is None else len(dataset.duplicates),
        "quarantine": None
        if dataset.quarantine is None
        else _counted(str(line.get("reason")) for line in dataset.quarantine),
    }  # fmt: skip


def _counted(values: Iterable[str]) -> dict[str, int]:
    """Returns value → count, most frequent first, then by name."""
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def _value(media: dict, key: str) -> str:
    return UNKNOWN if key not in media else "none" if media[key] is None else str(media[key])


def _size(media: dict) -> str:
    if "width" not in media or "height" not in media:
        return UNKNOWN
    return "none" if media["width"] is None else f"{media['width']}×{media['height']}"


def _fps(media: dict) -> str:
    value = media.get("fps")
    if isinstance(value, (int, float)) and math.isfinite(value):
        return f"{round(value, 2):g}"
    return "none" if "fps" in media and value is None else UNKNOWN


def _percentiles(values: list[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(_PERCENTILES)
    found = np.percentile(values, list(_PERCENTILES.values())).tolist()
    return {name: round(value, 4) for name, value in zip(_PERCENTILES, found)}


def _captions(dataset: Dataset) -> dict:
    """Words are what stands between blanks. duplicates: phrasings beyond the first that say the very same."""
    texts = [text for row in dataset.rows for text in row.captions]
    words = [len(text.split()) for text in texts]
    return {
        "phrasings": len(texts),
        "clips": sum(bool(row.captions) for row in dataset.rows),
        "words": {"min": min(words), "median": float(np.median(words)), "max": max(words)} if words else None,
        "duplicates": len(texts) - len(set(texts)),
    }


def _balance(dataset: Dataset, label: str) -> dict:
    """Returns how often each class of a label occurs.

    evenness: entropy of the classes over the logarithm of their number (Pielou 1966): 1 where all occur equally
    often, None for fewer than two. Classes that have a name but never occur count; without names, those that occur.
    """
    values = [row.labels.get(label, -1) for row in dataset.rows]
    indices = [[index for index in (value if isinstance(value, list) else [value]) if index >= 0] for value in values]
    found = Counter(index for some in indices for index in some)
    for index in range(len(dataset.classes.get(label, ()))):
        found.setdefault(index, 0)
    counts = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    share = np.array([count for _, count in counts if count]) / max(1, found.total())
    entropy = float(-(share * np.log(share)).sum())
    return {
        "clips": sum(map(bool, indices)),
        "classes": len(found),
        "evenness": round(entropy / math.log(len(found)), 4) if len(found) > 1 else None,
        "counts": {dataset.class_name(label, index): count for index, count in counts},
    }


# ---- tables -----------------------------------------------------------------------------------------


def print_survey(title: str, numbers: dict) -> None:
    """Prints what `survey` returned."""
    console = Console(markup=False, emoji=False, highlight=False)  # names of classes may look like markup
    seconds, captions, missing = numbers["seconds"], numbers["captions"], numbers["missing"]
    table = _table(title, ("", ""))
    table.add_row("clips", f"{numbers['clips']:,}")
    table.add_row("hours", UNKNOWN if numbers["hours"] is None else f"{numbers['hours']:,.3f}")
    if numbers["hours"] is not None:
        table.add_row("seconds a clip", ", ".join(f"{name} {seconds[name]:g}" for name in _PERCENTILES))
    for key in ("containers", "video_codecs", "audio_codecs", "sizes", "fps"):
        table.add_row(key.replace("_", " "), _some(numbers[key]))
    for name in ("no video", "no audio", "silent audio"):
        told = numbers["clips"] - missing[UNKNOWN]
        note = f" of {told:,}; {UNKNOWN} of {missing[UNKNOWN]:,}" if missing[UNKNOWN] else ""
        table.add_row(name, f"{missing[name]:,}{note}" if told else UNKNOWN)
    if numbers["remarks"]:
        table.add_row("not just as in its file", _some(numbers["remarks"], 20))
    table.add_row("no caption", f"{missing['no caption']:,}")
    words = captions["words"]
    if words:
        table.add_row(
            "captions",
            f"{captions['phrasings']:,} of {captions['clips']:,} clips; {captions['duplicates']:,} said before; "
            f"words: min {words['min']}, median {words['median']:g}, max {words['max']}",
        )
    table.add_row(
        "near-duplicates", UNKNOWN if numbers["near_duplicates"] is None else f"{numbers['near_duplicates']:,}"
    )
    if numbers["quarantine"] is not None:
        table.add_row("left out", _some(numbers["quarantine"], 20) or "none")
    console.print(table)
    if numbers["labels"]:
        table = _table("", ("label", "clips", "classes", "most frequent", "least frequent", "evenness"))
        for name, told in numbers["labels"].items():
            counts = list(told["counts"].items())
            table.add_row(
                printable(name), f"{told['clips']:,}", f"{told['classes']:,}", _some(dict(counts[:2])),
                _some(dict(counts[:-3:-1])), "–" if told["evenness"] is None else f"{told['evenness']:.3f}",
            )  # fmt: skip
        console.print(table)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=printable(title) or None, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _some(counts: dict[str, int], shown: int = _SHOWN) -> str:
    if set(counts) == {UNKNOWN}:
        return UNKNOWN
    text = ", ".join(f"{printable(name)}: {count:,}" for name, count in list(counts.items())[:shown])
    return text + (f", and {len(counts) - shown} more" if len(counts) > shown else "")
