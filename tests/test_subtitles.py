"""Subtitles: files read and written, texts with times, windows made one, scores by hand."""

import numpy as np
import pytest

from vmm.data import subtitles, text
from vmm.data.manifest import Row
from vmm.data.subtitles import Segment, Window, line_of, merge, of_window, parse, read, segment_of, spell, write
from vmm.data.targets import make_targets
from vmm.errors import UserError
from vmm.evals.captions import Cider
from vmm.evals.subtitles import Subtitles, pair

SEGMENTS = [
    Segment(0.5, 2.125, "a red circle crosses"),
    Segment(3661.0, 3662.0005, "1 < 2 & 3 > 2\nand --> on"),
]


@pytest.mark.parametrize("ending", [".vtt", ".srt"])
def test_files_give_back_what_was_written(ending: str, tmp_path):
    path = tmp_path / f"a{ending}"
    write(path, SEGMENTS)
    back = read(path)
    assert [(round(one.start, 3), round(one.end, 3)) for one in back] == [(0.5, 2.125), (3661.0, 3662.0)]
    assert [one.words for one in back] == ["a red circle crosses", "1 < 2 & 3 > 2 and -> on"]


def test_files_are_as_the_formats_say(tmp_path):
    write(tmp_path / "a.vtt", SEGMENTS)
    assert (tmp_path / "a.vtt").read_text() == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:02.125\na red circle crosses\n\n"
        "01:01:01.000 --> 01:01:02.000\n1 &lt; 2 &amp; 3 &gt; 2\nand -&gt; on\n"
    )
    write(tmp_path / "a.srt", SEGMENTS[:1])
    assert (tmp_path / "a.srt").read_text() == "1\n00:00:00,500 --> 00:00:02,125\na red circle crosses\n"
    write(tmp_path / "none.vtt", [])
    assert (tmp_path / "none.vtt").read_text() == "WEBVTT\n"


def test_files_of_others_are_read(tmp_path):
    (tmp_path / "a.vtt").write_bytes(
        "\ufeffWEBVTT - a title\r\n\r\nNOTE 00:01.000 --> 00:02.000\r\nno cue\r\n\r\nSTYLE\r\n::cue { color: red }\r\n\r\n"
        "intro\r\n00:03.5 --> 00:04.000 align:start line:0%\r\n<v Speaker><i>Hello</i>,\r\nyou\r\n\r\n"
        "01:00:00.000 --> 01:00:01.000\r\n\r\n00:01.000 --> 00:02.000\r\nfirst".encode()
    )
    assert read(tmp_path / "a.vtt") == [Segment(1.0, 2.0, "first"), Segment(3.5, 4.0, "Hello, you")]
    (tmp_path / "b.srt").write_text(
        "7\n1:00:01,25 --> 1:00:02,000\n{\\an8}Grüße\n\n\n8\n0:00:01,000 --> 0:00:00,500\nback\n"
    )
    assert read(tmp_path / "b.srt") == [Segment(3601.25, 3602.0, "Grüße")]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.txt", b"", "the ending must be .vtt or .srt"),
        ("a.vtt", b"hello", "first line is not WEBVTT"),
        ("a.vtt", b"WEBVTT\n\nhello", "holds no cue"),
        ("a.srt", b"\xff\xfe1", "not UTF-8"),
        ("a.srt", None, "no such file"),
    ],
)
def test_a_file_that_is_none_is_one_line(name: str, content, line: str, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=line):
        read(tmp_path / name)


def test_lines_of_a_manifest():
    assert segment_of("0.5 2.1 a red circle crosses") == Segment(0.5, 2.1, "a red circle crosses")
    assert segment_of(line_of(SEGMENTS[0])) == SEGMENTS[0]
    for wrong in ("", "0.5", "0.5 2.1", "2.1 0.5 back", "a b c", "nan 1 x", "-1 1 x", "0 inf x"):
        assert segment_of(wrong) is None, wrong


def test_a_window_shows_its_part():
    whole = [Segment(0.5, 2.5, "a"), Segment(2.0, 6.0, "b"), Segment(5.8, 7.0, "c")]
    assert of_window(whole, 2.0, 4.0) == [Segment(0.0, 4.0, "b")]  # a and c: 0.25 and 0.17 of them
    assert of_window(whole, 1.5, 4.0) == [Segment(0.0, 1.0, "a"), Segment(0.5, 4.0, "b")]
    assert of_window(whole, 2.0, 4.0, least=0.0) == [
        Segment(0.0, 0.5, "a"), Segment(0.0, 4.0, "b"), Segment(pytest.approx(3.8), 4.0, "c"),
    ]  # fmt: skip
    assert of_window([Segment(2.0, 2.0, "now")], 2.0, 1.0) == [Segment(0.0, 0.0, "now")]
    assert of_window([Segment(2.0, 2.0, "then")], 3.0, 1.0) == []


def test_times_are_spelled_and_read_back():
    shown = [Segment(0.46, 2.14, "a  red\ncircle <3"), Segment(3.8, 6.0, "it grows")]
    said = spell(shown)
    assert said == "<5 21> a red circle 3 <38 60> it grows"
    assert parse(said, 8.0) == [
        Segment(pytest.approx(0.5), pytest.approx(2.1), "a red circle 3"),
        Segment(pytest.approx(3.8), pytest.approx(6.0), "it grows"),
    ]
    assert spell(shown, 0.5) == "<1 4> a red circle 3 <8 12> it grows"
    assert spell([]) == "" and parse("", 8.0) == []


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_any_tokenizer_spells_times(kind: str):
    words = "<12 30> a red circle crosses <38 60> it grows"
    tokenizer = text.train_tokenizer([words, "0 1 2 3 4 5 6 7 8 9 < >"], 120, kind)
    if kind == "bpe":
        text._ready(tokenizer, "<pad>", "<s>", "</s>")
    said = text.decode_ids(tokenizer, text.encode(tokenizer, words, 64))
    assert spell(parse(said, 8.0)) == words


def test_what_is_badly_written_is_read_as_far_as_it_goes():
    assert parse("nothing < 5 21 > a <x 3> b <30 20> back <90 95> late <70 999999999999> long <1 2>", 8.0) == [
        Segment(pytest.approx(0.5), pytest.approx(2.1), "a"), Segment(pytest.approx(7.0), 8.0, "long"),
    ]  # fmt: skip
    assert parse("<5 21", 8.0) == [] and parse("5 21> a", 8.0) == []


def test_windows_are_made_one():
    first = Window(0.0, 4.0, [Segment(1.0, 1.9, "a"), Segment(3.0, 4.0, "b is cut")])
    second = Window(2.0, 6.0, [Segment(3.1, 5.0, "another"), Segment(5.5, 6.0, "c"), Segment(2.0, 2.1, "d")])
    third = Window(4.0, 8.0, [Segment(4.0, 5.1, "b  IS cut"), Segment(5.6, 7.2, "another"), Segment(7.5, 7.6, "e")])
    # b: seen whole by the second, but the first is surer of its words and start; c: the third saw its end.
    assert merge([first, second, third]) == [
        Segment(1.0, 1.9, "a"), Segment(2.0, 2.1, "d"), Segment(3.0, 5.0, "b is cut"), Segment(5.5, 7.2, "c"),
        Segment(7.5, 7.6, "e"),
    ]  # fmt: skip
    # The other way round the third's times of b are of its first edge.
    assert merge([third, first])[1:3] == [Segment(3.0, 5.1, "b  IS cut"), Segment(5.6, 7.2, "another")]
    # What one window says twice, it means twice; words that go on over three windows are one.
    assert merge([Window(0, 2, [Segment(0, 1, "a"), Segment(1.1, 2, "a")])]) == [
        Segment(0, 1, "a"),
        Segment(1.1, 2, "a"),
    ]
    long = [Window(4, 8, [Segment(4, 8, "l")]), Window(0, 4, [Segment(1, 4, "l")]), Window(8, 12, [Segment(8, 9, "l")])]
    assert merge(long) == [Segment(1, 9, "l")]
    assert merge([Window(0, 4, [Segment(1, 2, "a")]), Window(2, 6, [Segment(2.5, 3, "a")])]) == [
        Segment(1, 2, "a"), Segment(2.5, 3, "a"),
    ]  # fmt: skip


def row(number: int, *lines: str, known: bool = True) -> Row:
    texts = {"subtitles": list(lines)} if known else {}
    return Row(f"clips/{number}", "", None, None, (), {}, texts=texts)


@pytest.fixture(scope="module")
def tokenizer():
    found = text.train_tokenizer(["a red circle crosses <0 1 2 3 4 5 6 7 8 9>"], 300)
    text._ready(found, "<pad>", "<s>", "</s>")
    return found


def test_the_target_is_the_windows_text(tokenizer):
    target = make_targets({"said": dict(kind="subtitles", length=40)})["said"]
    one = row(0, "4.0 5.0 a circle", "1.0 2.5 a red circle crosses")
    for start, expected in ((0.0, "<10 25> a red circle crosses"), (2.0, "<20 30> a circle"), (6.0, "")):
        ids = target.read(one, start, 4.0, tokenizer)
        assert ids.shape == (40,) and ids.dtype == np.int32
        assert text.decode_ids(tokenizer, ids) == expected
    assert ids[:2].tolist() == [2, 3]  # nothing is said, which is known
    assert (target.read(row(1, known=False), 0.0, 4.0, tokenizer) == 0).all() and (target.blank() == 0).all()
    target.check([one, row(1, known=False)], "data.targets.said")
    with pytest.raises(UserError, match=r"targets\.said: clip 'clips/2'.*got '5 a'"):
        target.check([one, row(2, "5 a")], "data.targets.said")
    with pytest.raises(UserError, match="no clip has texts.subtitles"):
        target.check([row(1, known=False)], "data.targets.said")
    with pytest.raises(UserError, match="step: seconds above 0"):
        make_targets({"said": dict(kind="subtitles", step=0.0)})["said"].check([one], "data.targets.said")


def test_pairs_have_the_largest_overlap():
    """Greed would pair the first two, tIoU 0.6, and leave the others alone."""
    found = [Segment(0, 10, ""), Segment(6, 16, "")]
    true = [Segment(4, 12, ""), Segment(11, 18, ""), Segment(30, 31, "")]
    pairs = pair(found, true)
    assert [*zip(pairs.found, pairs.true)] == [(0, 0), (1, 1)]
    np.testing.assert_allclose(pairs.overlap, [6 / 12, 5 / 12])
    assert len(pair(found, []).overlap) == len(pair([], true).overlap) == len(pair([], []).overlap) == 0


TRUE = [
    row(0, "0.5 1.5 a red circle crosses", "2.0 4.0 a blue star grows", "5.0 7.0 a red ring blinks"),
    row(1),
    row(2, "1.0 3.0 a green circle crosses"),
    row(3, known=False),
]


class Said:
    """A model that writes given texts for windows of 4 s of TRUE: (clip, start, text)."""

    seconds, writes = 4.0, True

    def __init__(self, windows: list[tuple]):
        self.tokenizer = text.train_tokenizer(
            [" ".join(line for one in TRUE for line in one.texts.get("subtitles", ()))], 400
        )
        text._ready(self.tokenizer, "<pad>", "<s>", "</s>")
        self.windows = windows

    def rows(self, manifest):
        return TRUE

    def ask(self, manifest, subset, method, objective, end, **options):
        ids = [text.encode(self.tokenizer, words, 60) for _, _, words in self.windows]
        number, start = (np.array(column) for column in list(zip(*self.windows))[:2])
        return {"words/ids": np.array(ids), "words/likelihood": -np.arange(len(ids)), "row": number, "start": start}


def windows_of(one: Row, number: int, starts) -> list[tuple]:
    """What a perfect model writes."""
    segments = [segment_of(line) for line in one.texts.get("subtitles", ())]
    return [(number, start, spell(of_window(segments, start, 4.0))) for start in starts]


def evaluated(windows: list[tuple], **fields) -> dict:
    return Subtitles("m", "words", subsets=("V",), **fields)(Said(windows))


def test_truth_is_perfect_in_windows_and_files(tmp_path):
    windows = [entry for number, one in enumerate(TRUE) for entry in windows_of(one, number, (0.0, 2.0, 4.0))]
    found = evaluated(windows, folder=str(tmp_path / "made"))
    assert found["V/tIoU"] == found["V/f1"] == found["V/rouge_l"] == pytest.approx(1.0)
    assert found["V/seconds"] == pytest.approx(0.0, abs=1e-6) and found["clips"] == 3
    assert found["V/cider"] == pytest.approx(10.0)
    # One of the next clip's segments overlaps: nothing with three, one with nothing, three with one (2 to 3 s of 2 to 4).
    assert found["chance/tIoU"] == pytest.approx((0 + 0 + max(1 / 3, 0.5 / 2.5) / 3) / 3)
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        f"clips_{number}{ending}" for number in range(4) for ending in (".vtt", ".srt")
    }
    assert [one.words for one in read(tmp_path / "made" / "clips_0.srt")] == [
        "a red circle crosses", "a blue star grows", "a red ring blinks",
    ]  # fmt: skip


def test_scores_by_hand():
    found = evaluated(
        [
            (0, 0.0, "<5 15> a red circle crosses <30 40> a red star grows"),  # of three; the second half as long
            (1, 0.0, "<0 10> a star"),  # where nothing is said
            (2, 0.0, "<10 20> a green circle crosses <20 30> a green circle crosses"),  # one too many
            (3, 0.0, "<0 10> a star"),  # not known
        ]
    )
    assert found["V/tIoU"] == pytest.approx(((1 + 0.5) / 3 + 0 + 0.5 / 2) / 3)
    assert found["V/f1"] == pytest.approx((2 * 2 / (2 + 3) + 0 + 2 * 1 / (2 + 1)) / 3)
    assert found["V/seconds"] == pytest.approx((0 + 0 + 1 + 0 + (0 + 1)) / 6)
    assert found["V/rouge_l"] == pytest.approx(((1 + 3 / 4) / 3 + 0 + 1 / 2) / 3)
    words = [segment_of(line).words.split() for one in TRUE for line in one.texts.get("subtitles", ())]
    cider = Cider([[one] for one in words])
    second = cider(["a", "red", "star", "grows"], [words[1]])
    assert 0 < second < 10
    assert found["V/cider"] == pytest.approx(((10 + second) / 3 + 0 + 10 / 2) / 3)


def test_nothing_written_is_nothing():
    found = evaluated([(number, 0.0, "") for number in range(4)])
    assert found["V/tIoU"] == found["V/f1"] == found["V/rouge_l"] == pytest.approx(1 / 3)  # only the silent clip
    assert np.isnan(found["V/seconds"]) and subtitles.STEP == 0.1
    with pytest.raises(UserError, match=r"no row has texts\.subtitles"):
        evaluated([(3, 0.0, "")])
