"""Subtitles: what is said or seen when. WebVTT and SRT files, and the text that a model reads and writes for them.

As a text, times are in whole steps since the window's first moment, which any tokenizer can spell:

    <5 21> a red circle crosses <38 60> a blue star grows
"""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vmm.errors import UserError

STEP = 0.1  # seconds

_STAMP = r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})"
_TIMES = re.compile(rf"^\s*{_STAMP}\s*-->\s*{_STAMP}(?:\s|$)")
_WRITTEN = re.compile(r"<\s*(\d+)\s+(\d+)\s*>([^<]*)")


class Segment(NamedTuple):
    """Words and when they hold. start, end: seconds."""

    start: float
    end: float
    words: str


def segment_of(line: str) -> Segment | None:
    """Returns the segment of a manifest's line "START END words", None: it is no such line."""
    parts = line.split(None, 2)
    try:
        start, end = float(parts[0]), float(parts[1])
    except (IndexError, ValueError):
        return None
    fine = len(parts) == 3 and math.isfinite(start) and math.isfinite(end) and 0 <= start <= end
    return Segment(start, end, parts[2].strip()) if fine else None


def line_of(segment: Segment) -> str:
    """Returns the manifest's line of a segment, "START END words", in milliseconds."""
    return f"{segment.start:.3f} {segment.end:.3f} {segment.words}"


def of_window(segments: Iterable[Segment], start: float, seconds: float, least: float = 0.5) -> list[Segment]:
    """Returns the segments of a window, in seconds since it began, cut to it, in order of time.

    least: share of a segment that must be in the window; one without length must lie in it.
    """
    result = []
    for one in segments:
        first, last = max(one.start - start, 0.0), min(one.end - start, seconds)
        moment = one.start == one.end and 0 <= one.start - start < seconds
        if moment or last - first > 0 and last - first >= least * (one.end - one.start):
            result.append(Segment(first, last, one.words))
    return sorted(result)


def spell(segments: Iterable[Segment], step: float = STEP) -> str:
    """Returns segments of a window as a text. "<" and ">" of their words are left out."""
    words = ((one, " ".join(re.sub(r"[<>]", " ", one.words).split())) for one in segments)
    return " ".join(f"<{round(one.start / step)} {round(one.end / step)}> {text}".rstrip() for one, text in words)


def parse(text: str, seconds: float, step: float = STEP) -> list[Segment]:
    """Returns the segments that a text spells, whatever else stands there; those that have no words, end before they
    begin or begin after the window are left out, and others are cut to it. seconds: length of the window.
    """
    result = []
    for first, last, words in _WRITTEN.findall(text):
        # A model may write any number of digits.
        start, end = (int(digits[:9]) * step for digits in (first, last))
        if words.strip() and start < seconds and start <= end:
            result.append(Segment(start, min(end, seconds), " ".join(words.split())))
    return sorted(result)


def same_words(one: str, two: str) -> bool:
    """Whether two texts are the same but for case and space."""
    return one.lower().split() == two.lower().split()


class Window(NamedTuple):
    """What one window of a file says. start, end: seconds of the file that it shows; segments: in seconds of the file too."""

    start: float
    end: float
    segments: Sequence[Segment]


def merge(windows: Sequence[Window], near: float = 0.25, overlap: float = 0.5) -> list[Segment]:
    """Returns the segments of one file, in order of time, from those of its windows, the surest window first.

    Segments of two windows are one where, each cut to what both windows show, their times agree (intersection over union
    of `overlap` or more), or where the words are the same and they overlap, or lie less than `near` seconds apart. The
    surer window's words and times stay, but for an end that lies within `near` of that window's edge, which may have cut
    it: then the outer one of the two. So a segment may be longer than a window.
    """
    kept: list[tuple[Segment, list[Window]]] = []
    for window in windows:
        for one in window.segments:
            for place, (own, told) in enumerate(kept):
                if window not in told and any(_same(own, other, one, window, near, overlap) for other in told):
                    first, last = min(w.start for w in told), max(w.end for w in told)
                    start = min(own.start, one.start) if own.start <= first + near else own.start
                    end = max(own.end, one.end) if own.end >= last - near else own.end
                    kept[place] = (Segment(start, end, own.words), [*told, window])
                    break
            else:
                kept.append((one, [window]))
    return sorted(segment for segment, _ in kept)


def _same(own: Segment, mine: Window, one: Segment, window: Window, near: float, overlap: float) -> bool:
    """Whether a segment that window `mine` told of and one of another are the same."""
    if same_words(own.words, one.words) and min(own.end, one.end) - max(own.start, one.start) > -near:
        return True
    first, last = max(mine.start, window.start), min(mine.end, window.end)
    cuts = [(max(x.start, first), min(x.end, last)) for x in (own, one)]
    if min(end - start for start, end in cuts) <= 0:
        return False
    inside = min(end for _, end in cuts) - max(start for start, _ in cuts)
    return inside >= overlap * (max(end for _, end in cuts) - min(start for start, _ in cuts))


def _stamp(seconds: float, mark: str) -> str:
    total = round(seconds * 1000)
    hours, rest = divmod(total, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{mark}{rest % 1000:03d}"


def write(path: str | Path, segments: Sequence[Segment]) -> None:
    """Writes a file as its ending says, .vtt or .srt.

    Raises:
      UserError: another ending.
    """
    kind = _kind(path)
    mark = "." if kind == ".vtt" else ","
    blocks = ["WEBVTT"] if kind == ".vtt" else []
    for number, one in enumerate(segments, 1):
        # An empty line would end the words, and an arrow would be read as times; WebVTT reads <, > and & as marks.
        words = "\n".join(line for line in one.words.replace("-->", "->").splitlines() if line.strip())
        if kind == ".vtt":
            words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        head = [f"{number}"] if kind == ".srt" else []
        blocks.append("\n".join([*head, f"{_stamp(one.start, mark)} --> {_stamp(one.end, mark)}", words]))
    Path(path).write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def read(path: str | Path) -> list[Segment]:
    """Reads a .vtt or .srt file: its cues in order of time, without marks (<i>, {\\an8}), notes, styles and positions.

    Raises:
      UserError: no such file, another ending, not UTF-8, or a file without any cue.
    """
    kind = _kind(path)
    if not Path(path).is_file():
        raise UserError(f"subtitles {path}: no such file")
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"subtitles {path}: not UTF-8 text ({error}); convert it") from None
    if kind == ".vtt" and not content.startswith("WEBVTT"):
        raise UserError(f"subtitles {path}: no WebVTT, its first line is not WEBVTT")
    found = []
    for block in re.split(r"\n[ \t]*\n", content.replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.strip("\n").split("\n")
        for place, line in enumerate(lines[:2]):  # a cue may have a number or a name before its times
            times = _TIMES.match(line)
            if times and not lines[0].startswith("NOTE"):
                start, end = _seconds(times.groups()[:4]), _seconds(times.groups()[4:])
                words = _plain("\n".join(lines[place + 1 :]))
                if words and end >= start:
                    found.append(Segment(start, end, words))
                break
    if not found:
        raise UserError(f"subtitles {path}: holds no cue (00:00:01.000 --> 00:00:02.000, and words below)")
    return sorted(found)


def _kind(path: str | Path) -> str:
    kind = Path(path).suffix.lower()
    if kind not in (".vtt", ".srt"):
        raise UserError(f"subtitles {path}: the ending must be .vtt or .srt")
    return kind


def _seconds(parts: tuple) -> float:
    hours, minutes, seconds, fraction = parts
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000


def _plain(words: str) -> str:
    words = re.sub(r"</?[a-zA-Z\d][^<>]*>|\{\\[^{}]*\}", "", words)
    for mark, letter in (("&lt;", "<"), ("&gt;", ">"), ("&nbsp;", " "), ("&amp;", "&")):
        words = words.replace(mark, letter)
    return " ".join(words.split())
