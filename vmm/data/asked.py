"""What a manifest tells of a clip for tasks (values, texts, events, curves), kept while the clip is cut and stored anew."""

import math

from vmm.data.manifest import check_asked

KEYS = ("values", "texts", "events", "curves")
_LEAST = 0.5  # share of an event or a subtitle that a piece must hold to have it


def asked_of(row: dict) -> dict:
    """Returns these keys of a line; raises UserError where a line has them in another form."""
    found = {key: row[key] for key in KEYS if isinstance(row.get(key), (dict, list))}
    check_asked(found, "line")
    return found


def cut(asked: dict, start: float | None, end: float | None, span: tuple[float | None, float | None]) -> dict:
    """Returns them for a piece that begins at `start` seconds of the file and is stored by itself: its time begins at 0.

    end: of the piece, None: the file's. span: (start, end) that the whole had in the file, None where unknown. Events and
    subtitles (texts.subtitles, "START END words") are cut to the piece and dropped where less than half of them is in
    it; curves are cut where the whole's end is known, else dropped.
    """
    first, last = start or 0.0, math.inf if end is None else end
    result = dict(asked)

    def inside(a: float, b: float) -> tuple[float, float] | None:
        low, high = max(a, first), min(b, last)
        return (round(low - first, 4), round(high - first, 4)) if high - low >= _LEAST * (b - a) > 0 else None

    if asked.get("events") is not None:
        times = [inside(event["start"], event["end"]) for event in asked["events"]]
        result["events"] = [
            event | {"start": time[0], "end": time[1]} for event, time in zip(asked["events"], times) if time
        ]
    if isinstance(asked.get("texts", {}).get("subtitles"), list):
        lines = []
        for line in asked["texts"]["subtitles"]:
            a, b, words = line.split(" ", 2)
            if time := inside(float(a), float(b)):
                lines.append(f"{time[0]:.2f} {time[1]:.2f} {words}")
        result["texts"] = asked["texts"] | {"subtitles": lines}
    whole = (span[0] or 0.0, span[1])
    if asked.get("curves") and (first, end) != whole:
        result["curves"] = {}
        if whole[1] is not None:
            for name, values in asked["curves"].items():
                step = (whole[1] - whole[0]) / len(values)
                moments = (whole[0] + (i + 0.5) * step for i in range(len(values)))
                kept = [value for value, moment in zip(values, moments) if first <= moment < last]
                result["curves"] |= {name: kept} if kept else {}
    return result
