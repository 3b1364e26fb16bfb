"""vmm data show: one page that stands alone, shows what is there, and lets no caption act."""

import base64
import io
import json
import re
import shutil
import wave
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest

from vmm.__main__ import main
from vmm.data.building.build import Settings, build
from vmm.data.inspection import pictures
from vmm.data.inspection.show import show, text
from vmm.data.sources import open_source

EVIL = "<script>alert(1)</script> & \"quoted\" 'too'"


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text between."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def sound(path: Path, values: np.ndarray) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, pictures.RATE, 0, "NONE", ""))
        file.writeframes((values * 32767).astype("<i2").tobytes())
    return path


def coloured(path: Path, colours, height: int, width: int) -> Path:
    """Half a second of each colour, 10 pictures a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for colour in colours:
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), colour, np.uint8), format="rgb24")
            for _ in range(5):
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def folder(world_folder, tmp_path_factory) -> Path:
    """A build of three clips of the world, one with a hostile caption and name, and ten empty or hostile files."""
    source = tmp_path_factory.mktemp("source")
    for number, kind in enumerate(("cat", "<b>dog</b>".replace("/", "∕"), "cat")):
        (source / kind).mkdir(exist_ok=True)
        shutil.copy(world_folder / "test" / f"{number:05d}.mp4", source / kind / f"{number}.mp4")
    (source / "cat" / "0.txt").write_text(EVIL)
    (source / "cat" / "2.txt").write_text("طائر يطير " * 500)
    for number in range(9):
        (source / f"empty{number}.mp4").write_bytes(b"")
    (source / "<img src=x onerror=alert(1)>.mp4").write_text("<html>no such video</html>")
    out = tmp_path_factory.mktemp("shown") / "out"
    _, entries, words = open_source(source, None, {"label": "kind"})
    build(entries, out, Settings(words, budget=1.0), workers=2)
    return out


@pytest.fixture(scope="module")
def page(folder) -> Path:
    out = folder.parent / "page.html"
    told = show(folder, out)
    assert told == (3, 0), read(out).text
    return out


def test_nothing_is_fetched_and_nothing_runs(page):
    seen = read(page)
    assert not seen.named("script") and not seen.named("link") and not seen.named("iframe")
    links = [value for _, attributes in seen.tags for key, value in attributes.items() if key in ("src", "href")]
    assert len(links) >= 6
    assert all(value.startswith("data:") for value in links)
    assert not [key for _, attributes in seen.tags for key in attributes if key.startswith("on")]
    assert [attributes["content"] for attributes in seen.named("meta") if "http-equiv" in attributes] == [
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    ]
    assert "http" not in re.sub(r"data:[^\"]+|http-equiv", "", page.read_text())


def test_captions_and_names_are_shown_as_they_are(page):
    seen = read(page)
    assert EVIL in seen.text
    assert "<script>" not in page.read_text()
    assert "<b>dog<∕b>" in seen.text
    assert "<img src=x onerror=alert(1)>" in seen.text
    assert "(4,999 characters)" in seen.text  # cut, and in its own direction
    assert all(attributes.get("dir") == "auto" for attributes in seen.named("bdi"))


def test_the_quarantine_is_counted_and_cut(page):
    seen = read(page)
    assert "Left out: 10 of 13 clips, 76.9%" in seen.text
    widths = [attributes["style"] for attributes in seen.named("div") if attributes.get("class") == "bar"]
    assert widths == ["width: 100.0%", "width: 11.1%"]  # 9 empty files, 1 page
    assert sum(item.startswith("empty") and item != "empty file" for item in seen.texts) == 8
    assert "and 1 more: " in seen.text


def test_a_clip_is_shown_with_its_bytes(page, folder):
    seen = read(page)
    from vmm.data.shards import read_record

    stored = [read_record(folder / "shards" / "00000.arrayrecord", number) for number in range(3)]
    played = [base64.b64decode(tag["src"].split(",")[1]) for tag in seen.named("video")]
    assert sorted(played) == sorted(stored)
    sheets = [tag["src"] for tag in seen.named("img") if tag["alt"] == "frames over time"]
    assert len(sheets) == 3
    assert "mp4, h264 64×64, 12 fps, " in seen.text


def test_the_same_seed_gives_the_same_page(folder, page, tmp_path):
    show(folder, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == page.read_bytes()
    drawn = set()
    for seed in range(6):
        assert show(folder, tmp_path / "one.html", clips=1, seed=seed) == (1, 0)
        drawn.add(read(tmp_path / "one.html").named("video")[0]["src"][-4000:])
    assert len(drawn) > 1


def test_clips_without_pictures_without_sound_and_broken_ones(tmp_path, capsys):
    sound(tmp_path / "silent.wav", np.zeros(pictures.RATE))
    sound(tmp_path / "half.wav", np.full(pictures.RATE, 0.5))
    coloured(tmp_path / "mute.mp4", [(255, 0, 0)], 32, 64)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    lines = [
        {"path": "silent.wav"}, {"path": "half.wav", "start": 0.25, "end": 0.75}, {"path": "mute.mp4"},
        {"path": "noise.mp4", "caption": EVIL}, {"path": "gone.mp4"}, {"path": "half.wav", "id": "h", "sha256": "0" * 64},
    ]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["data", "show", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert "6 clips, 3 of them could not be decoded" in capsys.readouterr().out
    cards = (tmp_path / "new" / "page.html").read_text().split('<section class="clip">')[1:]
    silent, half, mute, noise, gone, changed = map(Page, cards)
    assert "silent" in silent.texts and "No pictures" in silent.text
    assert [tag["src"][:20] for tag in silent.named("audio")] == ["data:audio/wav;base6"]
    assert "peak -6.0 dB" in half.text and "0.50 s" in half.text
    assert "Plays the whole file; the clip begins at 0.25 s" in half.text
    assert "No audio" in mute.text and "10 fps" in mute.text and "h264 64×32" in mute.text
    assert "Cannot be decoded: undecodable" in noise.text and EVIL in noise.text and not noise.named("img")
    assert "Cannot be decoded: missing" in gone.text
    assert "Cannot be decoded: changed" in changed.text
    assert "Not known: this is a manifest" in changed.text


def image(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


@pytest.mark.parametrize(("height", "width"), [(48, 96), (96, 48)])
def test_contact_sheet_shows_whole_pictures_in_order(tmp_path, height, width):
    """Three colours, two frames of each, in the shape that the clip has."""
    path = coloured(tmp_path / "c.mp4", [(250, 0, 0), (0, 250, 0), (0, 0, 250)], height, width)
    row = dict(id="c", path=str(path), start=None, end=None, captions=[], labels={})
    answer = pictures.draw(row)
    assert answer.note["pictures"] == ["sheet", "play"]
    sheet = image(answer.parts[0])
    frame = (sheet.shape[1] + 4) / 6
    assert (frame - 4) / sheet.shape[0] == pytest.approx(width / height, rel=0.03)
    middles = [sheet[sheet.shape[0] // 2, round((place + 0.5) * frame - 2)].argmax() for place in range(6)]
    assert middles == [0, 0, 1, 1, 2, 2]
    assert answer.parts[1] == path.read_bytes()


def test_log_mel_is_that_of_the_encoder():
    import jax.numpy as jnp

    from vmm.encoders.frontends import log_mel

    sample = np.random.default_rng(0).uniform(-1, 1, 16000).astype(np.float32)
    wanted = log_mel(jnp.asarray(sample[None]), pictures._BINS, pictures._WINDOW, pictures._HOP, pictures.RATE)[0]
    np.testing.assert_allclose(pictures.log_mel(sample), wanted, atol=1e-3)


def test_spectrogram_draws_low_below_high():
    """A tone of 200 Hz is bright at the bottom, one of 6 kHz at the top."""
    time = np.arange(pictures.RATE) / pictures.RATE
    for pitch, low, high in ((200.0, 0.8, 1.0), (6000.0, 0.0, 0.2)):
        brightness = image(pictures.spectrogram(np.sin(2 * np.pi * pitch * time).astype(np.float32))).sum((1, 2))
        assert low <= brightness.argmax() / len(brightness) <= high


def test_text_that_no_page_may_hold():
    assert text("a\0b\ud800c") == "a\ufffdb\ufffdc"
    assert text("x" * 30, longest=10) == "x" * 10 + " … (30 characters)"
    assert text("<&\"'") == "&lt;&amp;&quot;&#x27;"


def test_bad_flags(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"path": "a"}\n')
    with pytest.raises(SystemExit, match="2"):
        main(["data", "show", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "o"), "--clips", "-1"])
    (tmp_path / "file").write_text("")
    assert main(["data", "show", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "file" / "o")]) == 5
