"""One file → stored clips: what a viewer saw and heard in the original is what the stored file shows, or there is a reason.

Pictures carry their number as a pattern of bars and sound its moment as a pitch, so that the truth is read from content.
"""

import hashlib
import io
import math
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from test_media import RATE, click, corners, named, pitch_of, spoil, tone, turn, write

from vmm.data import media
from vmm.data.building.store import Storage, Store
from vmm.data.building.transcode import REASONS, transcode
from vmm.data.sandbox import Limits, Sandbox


def bars(number: int, height: int = 64, width: int = 96, low: int = 40, high: int = 210) -> np.ndarray:
    """A picture that shows a number (0 to 255) as eight bars, the first bit on the left."""
    bits = [(number >> (7 - i)) & 1 for i in range(8)]
    row = np.repeat(np.array([high if bit else low for bit in bits], np.uint8), -(-width // 8))[:width]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def number_of(picture: np.ndarray) -> int:
    width = picture.shape[1] / 8
    middles = picture[:, [int((i + 0.5) * width) for i in range(8)]].mean((0, 2))
    return int("".join("1" if middle > 125 else "0" for middle in middles), 2)


class Stored:
    """What a stored file shows, by the plainest loop: every picture with its time, the whole sound."""

    def __init__(self, data: bytes):
        with av.open(io.BytesIO(data)) as container:
            self.duration = container.duration / av.time_base
            self.pictures, self.times, self.keys, self.wave = [], [], [], None
            seen = next(iter(container.streams.video), None)
            heard = next(iter(container.streams.audio), None)
            if seen:
                self.codec, self.format = seen.codec_context.name, seen.codec_context.pix_fmt
                self.length = float(seen.duration * seen.time_base)
                for frame in container.decode(seen):
                    self.pictures.append(frame.to_ndarray(format="rgb24"))
                    self.times.append(float(frame.time))
                    if frame.key_frame:
                        self.keys.append(len(self.pictures) - 1)
        if heard:  # opened again: a seek may lose a block
            with av.open(io.BytesIO(data)) as container:
                heard = container.streams.audio[0]
                self.rate, self.sound_codec = heard.rate, heard.codec_context.name
                frames = list(container.decode(heard))
                self.late = float(frames[0].time)
                self.wave = np.concatenate([frame.to_ndarray() for frame in frames], 1)

    @property
    def numbers(self) -> list[int]:
        return [number_of(picture) for picture in self.pictures]


def run(path, spans=None, sha256=None, member=(), **storage):
    answer = transcode(str(path), member, sha256, spans, list(Storage()._replace(**storage)))
    for item in (answer.note, *answer.note["clips"]):
        assert item.get("reason", "damaged") in REASONS
    return answer


def one(path, span=None, **storage):
    """Returns (what is told of the only clip, what its stored file shows)."""
    answer = run(path, [span] if span else None, **storage)
    assert answer.note.get("reason") is None, answer.note
    [clip] = answer.note["clips"]
    assert "reason" not in clip, clip
    return clip, Stored(answer.parts[clip["part"]])


def reason(path, span=None, **storage) -> str:
    answer = run(path, [span] if span else None, **storage)
    if "reason" in answer.note:
        assert answer.parts == []
        assert answer.note["clips"] == []
        return answer.note["reason"]
    [clip] = answer.note["clips"]
    return clip.get("reason", "stored")


def avi(path: Path, pictures, **options) -> Path:
    """MPEG-4 at 10 pictures a second; its clock ticks no finer."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"qscale": "2", **options}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def film(path: Path, count: int = 30, rate: float = 10, **more) -> Path:
    """Pictures 0, 1, … at a rate, with a second of sound for each of theirs: 400 Hz, 500 Hz, …"""
    seconds = count / rate
    notes = [tone(400 + 100 * i, 1.0, RATE) for i in range(math.ceil(seconds))]
    wave = np.concatenate(notes, 1)[:, : round(seconds * RATE)]
    return write(path, [bars(i % 256) for i in range(count)], [i / rate for i in range(count)], wave, **more)


# ---- what is stored ----------------------------------------------------------------------------------


def test_every_picture_and_every_second_of_sound(tmp_path):
    clip, stored = one(film(tmp_path / "a.mp4", 60))
    assert stored.numbers == list(range(60))
    assert np.allclose(stored.times, [i / 10 for i in range(60)], atol=1e-4)
    for second in range(6):
        piece = stored.wave[0, round((second + 0.1) * RATE) : round((second + 0.9) * RATE)]
        assert abs(pitch_of(piece) - (400 + 100 * second)) < 3
    assert (clip["frames"], clip["fps"], clip["audio"], clip["silent"]) == (60, 10.0, True, False)
    assert abs(clip["duration"] - 6.0) < 0.07  # the sound ends with a whole AAC frame
    assert (clip["container"], clip["video_codec"], clip["audio_codec"]) == ("mp4", "h264", "aac")
    assert (clip["width"], clip["height"]) == (96, 64)
    assert stored.length == pytest.approx(6.0, abs=1e-3)  # the last picture is shown as long as the others


def test_the_source_is_told(tmp_path):
    path = film(tmp_path / "a.mp4")
    source = run(path).note["source"]
    assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source["bytes"] == path.stat().st_size
    told = (source["container"], source["video_codec"], source["audio_codec"], source["width"], source["height"])
    assert told == ("mov", "h264", "aac", 96, 64)
    assert abs(source["duration"] - 3.0) < 0.1


def test_the_same_file_gives_the_same_bytes(tmp_path):
    path = film(tmp_path / "a.mp4")
    assert run(path).parts == run(path).parts


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_keeps_its_times(tmp_path, suffix):
    times = [0, 0.04, 0.08, 0.5, 0.51, 1.7, 1.8, 3.0]
    path = write(tmp_path / f"a.{suffix}", [bars(i) for i in range(len(times))], times)
    clip, stored = one(path)
    assert stored.numbers == list(range(len(times)))
    assert np.allclose(stored.times, times, atol=2e-3)  # mkv counts milliseconds
    assert clip["frames"] == len(times)


def test_a_thousand_ticks_a_second_are_no_frame_rate(tmp_path):
    path = write(tmp_path / "a.flv", [bars(i) for i in range(20)], wave=tone(440, 2.0, 44100), rate=44100)
    clip, stored = one(path)
    assert stored.numbers == list(range(20))
    assert clip["fps"] == pytest.approx(10, rel=0.02)


def test_first_timestamp_far_from_zero(tmp_path):
    times = [100 + i / 10 for i in range(20)]
    clip, stored = one(write(tmp_path / "a.mkv", [bars(i) for i in range(20)], times))
    assert stored.numbers == list(range(20))
    assert stored.times[0] == 0


def test_pictures_that_begin_after_the_sound(tmp_path):
    path = write(
        tmp_path / "a.mkv", [bars(i) for i in range(20)], [0.6 + i / 10 for i in range(20)], click([0.6], 2.5, RATE)
    )
    clip, stored = one(path)
    assert stored.numbers == list(range(20))
    assert abs(stored.times[0] - 0.6) < 2e-3
    heard = np.flatnonzero(np.abs(stored.wave[0]) > 0.2)[0] / RATE + stored.late
    assert abs(heard - 0.6) < 0.02


def test_avi_pictures_stored_out_of_order_come_in_order(tmp_path):
    """AVI tells no presentation times, and FFmpeg's guesses swap every B picture with the next P picture."""
    path = avi(tmp_path / "a.avi", [bars(i) for i in range(40)], bf="2", g="12")
    with av.open(str(path)) as container:
        kinds = [frame.pict_type for frame in container.decode(video=0)]
    assert 3 in kinds  # the file has what the test is about
    clip, stored = one(path)
    assert stored.numbers == list(range(40))
    assert np.allclose(np.diff(stored.times), np.diff(stored.times).mean(), atol=1e-3)
    late, cut = one(path, [2.0, 3.0])
    assert (
        cut.numbers
        == stored.numbers[[i for i, t in enumerate(stored.times) if t <= 2.0 + 1e-6][-1] :][: len(cut.numbers)]
    )


# Sound.


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_late_sound_stays_late(tmp_path, suffix):
    path = write(
        tmp_path / f"a.{suffix}", [bars(i) for i in range(20)], wave=click([0.0, 0.5], 1.0, RATE), audio_start=0.7
    )
    clip, stored = one(path)
    loud = np.flatnonzero(np.abs(stored.wave[0]) > 0.3) / RATE + stored.late
    assert abs(loud[0] - 0.7) < 0.03
    assert abs(loud[-1] - 1.2) < 0.03
    later, cut = one(path, [1.0, 2.0])
    assert abs(np.flatnonzero(np.abs(cut.wave[0]) > 0.3)[0] / RATE + cut.late - 0.2) < 0.03


def test_shorter_sound_ends_where_it_ended(tmp_path):
    path = write(tmp_path / "a.mp4", [bars(i) for i in range(30)], wave=tone(440, 1.0, RATE))
    clip, stored = one(path)
    assert abs(stored.wave.shape[1] / RATE - 1.0) < 0.1
    assert clip["audio"]
    assert clip["duration"] == pytest.approx(3.0, abs=0.1)
    # A piece that lies behind its end has no sound, and says so.
    late, cut = one(path, [2.0, 3.0])
    assert cut.wave is None
    assert (late["audio"], late["silent"]) == (False, False)


def gap(path: Path, begin: float, seconds: float) -> Path:
    """Copies a file; from `begin` on its packets come so much later."""
    target = path.with_name(f"gap-{path.name}")
    with av.open(str(path)) as source, av.open(str(target), "w") as sink:
        stream = sink.add_stream_from_template(source.streams[0])
        for packet in source.demux():
            if packet.dts is not None:
                if packet.pts * packet.time_base >= begin:
                    packet.pts = packet.dts = packet.pts + round(seconds / packet.time_base)
                packet.stream = stream
                sink.mux(packet)
    return target


def test_a_hole_in_the_sound_stays_a_hole(tmp_path):
    path = write(tmp_path / "a.mka", wave=tone(500, 4.0, 48000), rate=48000, sound="libopus")
    clip, stored = one(gap(path, 2.0, 0.3))
    loud = np.abs(stored.wave[0]) > 0.05
    assert loud[48000 : round(1.97 * 48000)].any()
    assert not loud[round(2.05 * 48000) : round(2.25 * 48000)].any()
    assert loud[round(2.35 * 48000) : round(2.4 * 48000)].any()
    assert clip["duration"] == pytest.approx(4.3, abs=0.03)
    # A third of it is a hole: no sound to learn from.
    assert reason(gap(path, 2.0, 2.0)) == "damaged"


def test_time_that_runs_backwards(tmp_path):
    """One transport stream behind another begins anew at an earlier time: refused, not mixed up."""
    for name, more in (
        ("pictures", {"pictures": [bars(i) for i in range(20)]}),
        ("sound", {"wave": tone(500, 2.0, 48000), "rate": 48000, "sound": "mp2"}),
    ):
        content = write(tmp_path / f"{name}.ts", **more).read_bytes()
        (tmp_path / "both.ts").write_bytes(content + content)
        assert reason(tmp_path / f"{name}.ts") == "stored"
        assert reason(tmp_path / "both.ts") == "damaged"


def test_silence_is_told(tmp_path):
    path = write(tmp_path / "a.mp4", [bars(i) for i in range(10)], wave=np.zeros((1, RATE), np.float32))
    assert one(path)[0]["silent"] is True


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000])
def test_rates_and_channels(tmp_path, rate, channels):
    path = write(tmp_path / "a.mkv", wave=tone(600, 1.0, rate, channels), rate=rate, sound="pcm_s16le")
    clip, stored = one(path)
    assert stored.rate == min(rate, 48000)
    assert stored.wave.shape[0] == channels
    assert abs(pitch_of(stored.wave[0], stored.rate) - 600) <= 3
    assert 0.4 < np.abs(stored.wave).max() < 0.6


def test_sound_alone(tmp_path):
    clip, stored = one(write(tmp_path / "a.wav", wave=tone(440, 2.0, RATE), sound="pcm_s16le"))
    assert stored.pictures == []
    assert (clip["frames"], clip["fps"], clip["video_codec"], clip["audio_codec"], clip["width"]) == (
        0, None, None, "aac", None,
    )  # fmt: skip
    assert clip["duration"] == pytest.approx(2.0)
    assert clip["hashes"] == []


def test_pictures_alone(tmp_path):
    clip, stored = one(write(tmp_path / "a.mp4", [bars(i) for i in range(10)]))
    assert stored.wave is None
    assert (clip["audio"], clip["silent"], clip["audio_codec"]) == (False, False, None)


def test_sound_that_is_not_finite(tmp_path):
    wave = tone(440, 1.0, RATE)
    wave[0, 5000] = np.nan
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave, format="flt", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(stream.encode(frame))
    assert reason(path) == "damaged"


# Shape and colour.


def test_the_short_side_becomes_what_is_asked_and_is_never_scaled_up(tmp_path):
    path = write(tmp_path / "a.mp4", [bars(i, 120, 200) for i in range(5)])
    clip, stored = one(path, short_side=60)
    assert (clip["height"], clip["width"]) == (60, 100)
    assert stored.pictures[0].shape == (60, 100, 3)
    assert stored.numbers == list(range(5))
    clip, _ = one(path, short_side=256)
    assert (clip["height"], clip["width"]) == (120, 200)


@pytest.mark.parametrize(
    ("height", "width", "want"), [(121, 161, (120, 160)), (243, 100, (244, 100)), (2, 512, (2, 512))]
)
def test_odd_sizes_become_even(tmp_path, height, width, want):
    path = write(tmp_path / "a.mkv", [bars(i, height, width) for i in range(3)], codec="libvpx-vp9", options={})
    clip, stored = one(path)
    assert abs(clip["height"] - want[0]) <= 2
    assert abs(clip["width"] - want[1]) <= 2
    assert clip["height"] % 2 == clip["width"] % 2 == 0
    assert stored.numbers == [0, 1, 2]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation(tmp_path, degrees):
    path = write(tmp_path / "a.mp4", [corners(64, 96)] * 3)
    if degrees:
        turn(path, degrees)
    clip, stored = one(path)
    assert stored.pictures[0].shape[:2] == ((64, 96) if degrees % 180 == 0 else (96, 64))
    assert (clip["height"], clip["width"]) == stored.pictures[0].shape[:2]
    want = np.rot90(corners(64, 96), -degrees // 90)
    assert named(stored.pictures[0]) == named(want)


MIRRORS = {
    "left and right": ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
    "top and bottom": ((1, 0, 0, -1), lambda picture: picture[::-1]),
    "the diagonal": ((0, 1, 1, 0), lambda picture: picture.transpose(1, 0, 2)),
    "the other diagonal": ((0, -1, -1, 0), lambda picture: picture[::-1, ::-1].transpose(1, 0, 2)),
}


@pytest.mark.parametrize("kind", MIRRORS)
def test_reflection(tmp_path, kind):
    (a, b, c, d), mirror = MIRRORS[kind]
    path = write(tmp_path / "a.mp4", [corners(64, 96)] * 3)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    content[place : place + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    _, stored = one(path)
    assert named(stored.pictures[0]) == named(mirror(corners(64, 96)))


def test_pixels_that_are_not_square(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for i in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bars(i), format="rgb24")))
        container.mux(stream.encode(None))
    clip, stored = one(path)
    assert (clip["height"], clip["width"]) == (64, 128)
    assert stored.numbers == list(range(5))


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_ten_bits(tmp_path, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"no {codec} here")
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p10le"
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(bars(i), format="rgb24").reformat(format="yuv420p10le")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    _, stored = one(path)
    assert stored.numbers == list(range(10))
    assert stored.format == "yuv420p"
    assert abs(stored.pictures[0].max() - bars(0).max()) < 12


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 5, 9])  # BT.709, BT.601, BT.2020
def test_colours_are_those_of_the_original(tmp_path, matrix, full):
    path = tmp_path / "a.mp4"
    planes = [np.full((64, 64), 120, np.uint8), np.full((32, 32), 60, np.uint8), np.full((32, 32), 200, np.uint8)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.options = 64, 64, "yuv420p", {"crf": "1"}
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        frame = av.VideoFrame.from_ndarray(
            np.concatenate([p.ravel() for p in planes]).reshape(96, 64), format="yuv420p"
        )
        for i in range(3):
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    original = Stored(path.read_bytes()).pictures[0][32, 32].astype(int)
    _, stored = one(path)
    assert np.abs(stored.pictures[0][32, 32] - original).max() <= 4
    assert original[0] > 200  # not grey: a forgotten matrix would show


def test_alpha_is_dropped(tmp_path):
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "rgba"
        for i in range(5):
            picture = np.concatenate([bars(i), np.full((64, 96, 1), 255, np.uint8)], 2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        container.mux(stream.encode(None))
    _, stored = one(path)
    assert stored.numbers == list(range(5))


def test_a_size_that_changes_on_the_way():
    with Store(Storage(), None, 1.0) as store:
        for number, size in enumerate((64, 64, 96, 48)):
            store.picture(av.VideoFrame.from_ndarray(bars(number, size, size), format="rgb24"), number / 10, 0.1)
        store.end_pictures(0.4, True)
    stored = Stored(store.bytes())
    assert stored.numbers == [0, 1, 2, 3]
    assert {picture.shape for picture in stored.pictures} == {(64, 64, 3)}


# Quick to decode.


def test_key_frames_at_most_gop_pictures_apart(tmp_path):
    path = film(tmp_path / "a.mp4", 100, options={"g": "250", "sc_threshold": "0"})
    assert len(Stored(path.read_bytes()).keys) == 1
    _, stored = one(path)
    assert max(np.diff([*stored.keys, 100])) <= 30
    _, stored = one(path, gop=5)
    assert max(np.diff([*stored.keys, 100])) <= 5


# ---- spans -------------------------------------------------------------------------------------------


def shown(times: list[float], start: float, end: float) -> list[int]:
    """Numbers of the pictures that a viewer sees from start to end."""
    first = max((i for i, time in enumerate(times) if time <= start + 1e-6), default=0)
    return [i for i in range(first, len(times)) if times[i] < end - 1e-6]


SPANS = [(0.0, 1.0), (0.95, 2.05), (2.0, 2.1), (2.01, 2.02), (3.33, 5.5), (5.9, 6.0), (1.0, 6.0)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_spans_are_exact_to_the_picture(tmp_path, suffix):
    pictures = [bars(i) for i in range(60)]
    if suffix == "avi":
        path = avi(tmp_path / "a.avi", pictures, g="12")
    else:
        wave = tone(440, 6.0, 48000) if suffix != "ts" else None
        path = write(tmp_path / f"a.{suffix}", pictures, wave=wave, rate=48000, options={"bf": "2", "g": "12"})
    whole, all_of_it = one(path)
    assert all_of_it.numbers == list(range(60))
    times = all_of_it.times
    for start, end in SPANS:
        clip, stored = one(path, [start, end])
        assert stored.numbers == shown(times, start, end), (start, end)
        assert stored.times[0] == pytest.approx(max(0.0, times[stored.numbers[0]] - start), abs=2e-3)
        assert clip["duration"] == pytest.approx(end - start, abs=0.045)
        if stored.wave is not None:
            assert abs(stored.wave.shape[1] / stored.rate - (end - start)) < 0.05
        for number, time in list(zip(stored.numbers, stored.times))[1:]:
            assert time == pytest.approx(times[number] - start, abs=2e-3)


def test_the_sound_of_a_span_is_of_the_same_moment(tmp_path):
    moments = [0.5, 1.5, 2.5, 3.5]
    path = write(tmp_path / "a.mp4", [bars(i) for i in range(40)], wave=click(moments, 4.0, RATE))
    for start in (0.0, 0.4, 1.05, 2.2):
        _, stored = one(path, [start, start + 1.3])
        loud = np.flatnonzero(np.abs(stored.wave[0]) > 0.3) / RATE
        want = [moment - start for moment in moments if start <= moment < start + 1.3]
        assert abs(loud[0] - want[0]) < 0.005
        assert abs(loud[-1] - want[-1]) < 0.007


def test_sound_behind_a_seek_is_as_in_the_whole(tmp_path):
    """A codec with overlapping blocks gives a wrong first block where nothing before it is decoded."""
    path = write(tmp_path / "a.mp4", [bars(i) for i in range(40)], wave=tone(440, 4.0, RATE))
    _, whole = one(path)
    _, stored = one(path, [2.0, 3.0])
    strength = [np.abs(stored.wave[0, i : i + 400]).max() for i in range(0, RATE - 400, 400)]
    assert min(strength[1:]) > 0.4
    assert max(strength) < 0.6


def test_several_spans_come_in_order_and_bad_ones_are_named(tmp_path):
    answer = run(film(tmp_path / "a.mp4", 40), [[0.0, 1.0], [50.0, 60.0], [2.0, None], [None, 0.5]])
    assert [clip.get("reason") for clip in answer.note["clips"]] == [None, "span outside", None, None]
    numbers = [Stored(answer.parts[clip["part"]]).numbers for clip in answer.note["clips"] if "part" in clip]
    assert numbers == [list(range(10)), list(range(20, 40)), list(range(5))]
    assert [(clip["start"], clip["end"]) for clip in answer.note["clips"]] == [(0, 1), (50, 60), (2, None), (None, 0.5)]


def test_a_span_that_goes_on_behind_the_end_is_cut_there(tmp_path):
    clip, stored = one(film(tmp_path / "a.mp4", 30), [2.0, 10.0])
    assert stored.numbers == list(range(20, 30))
    assert clip["duration"] == pytest.approx(1.0, abs=0.1)


def test_one_picture(tmp_path):
    clip, stored = one(write(tmp_path / "a.mp4", [bars(7)]))
    assert stored.numbers == [7]
    assert clip["frames"] == 1
    assert 0 < clip["duration"] < 1


def test_a_picture_that_is_held_to_the_end_of_its_span(tmp_path):
    path = write(tmp_path / "a.mkv", [bars(1), bars(2), bars(3)], [0.0, 1.0, 5.0])
    clip, stored = one(path, [0.5, 4.0])
    assert stored.numbers == [1, 2]
    assert clip["duration"] == pytest.approx(3.5)
    assert stored.length == pytest.approx(3.5, abs=0.01)


def test_an_edit_list(tmp_path):
    """The file's first half second is edited away: it is no part of the clip, and the sound keeps its place."""
    path = write(tmp_path / "a.mp4", [bars(i) for i in range(30)], options={"bf": "0", "g": "5"})
    content = bytearray(path.read_bytes())
    place = content.index(b"elst")
    version, count = content[place + 4], struct.unpack(">I", content[place + 8 : place + 12])[0]
    assert (version, count) == (0, 1)
    mvhd = content.index(b"mvhd")
    scale, length = struct.unpack(">II", content[mvhd + 16 : mvhd + 24])
    mdhd = content.index(b"mdhd")
    ticks = struct.unpack(">I", content[mdhd + 16 : mdhd + 20])[0]
    content[place + 12 : place + 20] = struct.pack(">II", length - scale // 2, ticks // 2)
    path.write_bytes(content)
    clip, stored = one(path)
    assert stored.numbers == list(range(5, 30))
    assert stored.times[0] == 0
    assert clip["duration"] == pytest.approx(2.5, abs=0.02)


# Cutting.


def spans_of(answer) -> list[tuple]:
    return [(clip["start"], clip["end"]) for clip in answer.note["clips"]]


def test_windows(tmp_path):
    answer = run(film(tmp_path / "a.mp4", 64), cut="windows", seconds=2.0)
    assert spans_of(answer) == [(0, 2), (2, 4), (4, pytest.approx(6.4, abs=0.05))]
    stored = [Stored(part) for part in answer.parts]
    # No picture is lost, and none is in two windows.
    assert [number for window in stored for number in window.numbers] == list(range(64))
    for window, pitch in zip(stored, (400, 600, 800)):
        assert abs(pitch_of(window.wave[0, RATE // 10 : RATE * 9 // 10]) - pitch) < 3


def test_the_rest_is_a_window_of_its_own_when_it_is_long_enough(tmp_path):
    answer = run(film(tmp_path / "a.mp4", 28), cut="windows", seconds=1.0, shortest=0.5)
    assert [round(start) for start, _ in spans_of(answer)] == [0, 1, 2]
    answer = run(film(tmp_path / "b.mp4", 22), cut="windows", seconds=1.0, shortest=0.5)
    assert [round(start) for start, _ in spans_of(answer)] == [0, 1]


def test_windows_at_times_that_are_no_round_numbers(tmp_path):
    times = [i * 1001 / 30000 for i in range(100)]
    path = write(tmp_path / "a.mp4", [bars(i) for i in range(100)], times)
    answer = run(path, cut="windows", seconds=0.7, shortest=0.1)
    numbers = [number for part in answer.parts for number in Stored(part).numbers]
    # The picture seen as a window begins was also seen as the one before it ended.
    assert list(dict.fromkeys(numbers)) == list(range(100))
    assert len(numbers) <= 100 + len(answer.parts)


def test_too_short_for_a_window(tmp_path):
    assert reason(film(tmp_path / "a.mp4", 3), cut="windows") == "too short"


def test_shots(tmp_path):
    def scene(picture: int) -> np.ndarray:
        colour = [(200, 30, 30), (30, 160, 40), (20, 40, 200)][0 if picture < 12 else 1 if picture < 31 else 2]
        frame = np.empty((64, 96, 3), np.uint8)
        frame[:] = colour
        frame[20:40, picture : picture + 20] = 255  # moves within the shot
        return frame

    path = write(tmp_path / "a.mp4", [scene(i) for i in range(50)], wave=tone(440, 5.0, RATE))
    answer = run(path, cut="shots", seconds=10.0)
    assert spans_of(answer) == [(0, 1.2), (1.2, 3.1), (3.1, pytest.approx(5.0, abs=0.05))]
    means = [np.mean(Stored(part).pictures, (0, 1, 2)) for part in answer.parts]
    assert [int(np.argmax(mean)) for mean in means] == [0, 1, 2]
    assert [clip["frames"] for clip in answer.note["clips"]] == [12, 19, 19]
    # Long shots are cut again.
    answer = run(path, cut="shots", seconds=1.0)
    assert spans_of(answer)[:4] == [(0, 1.2), (1.2, 2.2), (2.2, 3.1), (3.1, 4.1)]


def test_a_flash_is_no_shot_of_its_own(tmp_path):
    pictures = [np.full((64, 96, 3), 255 if i == 20 else 20, np.uint8) for i in range(40)]
    answer = run(write(tmp_path / "a.mp4", pictures), cut="shots")
    assert sum(clip["frames"] for clip in answer.note["clips"]) == 40
    assert all(clip["end"] - clip["start"] >= 0.5 for clip in answer.note["clips"])


def test_a_file_that_promises_more_keeps_its_windows_and_names_the_rest(tmp_path):
    noise = np.random.default_rng(0).integers(0, 60, (60, 64, 96, 3), np.uint8)
    path = write(tmp_path / "a.mkv", [bars(i) + noise[i] // 2 for i in range(60)], options={"g": "5", "crf": "20"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    clips = run(path, cut="windows", seconds=1.0).note["clips"]
    assert clips[0].get("reason") is None
    assert clips[-1]["reason"] == "truncated"
    assert clips[-1]["end"] == pytest.approx(6.0, abs=0.1)


# ---- the original bytes ------------------------------------------------------------------------------


def test_keep_gives_the_very_bytes(tmp_path):
    path = film(tmp_path / "a.mp4")
    answer = run(path, keep=True)
    [clip] = answer.note["clips"]
    assert answer.parts == [path.read_bytes()]
    assert (clip["frames"], clip["container"], clip["width"], clip["height"]) == (30, "mov", 96, 64)
    # One copy for all spans.
    answer = run(path, [[0.0, 1.0], [1.0, 2.0], [70.0, 80.0]], keep=True)
    assert len(answer.parts) == 1
    assert [clip.get("part") for clip in answer.note["clips"]] == [0, 0, None]
    assert [clip.get("frames") for clip in answer.note["clips"]] == [10, 10, None]


def test_keep_is_as_strict(tmp_path):
    path = film(tmp_path / "a.mkv")
    assert reason(spoil(path, "video"), keep=True) in ("undecodable", "damaged", "truncated")
    answer = run(path, [[90.0, 91.0]], keep=True)
    assert answer.parts == []


# ---- what is left out --------------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    assert reason(tmp_path / "none.mp4") == "missing"
    assert reason(tmp_path) == "unreadable"
    assert reason("a\0b") == "undecodable"
    for name in ("http://127.0.0.1:9/a.mp4", "concat:a.mp4|b.mp4", "subfile,,start,0,end,9,,:a.mp4", "file:a.mp4", "-"):
        assert reason(name) == "missing"


CONTENTS = {
    "empty": (b"", "empty file"),
    "zeros": (bytes(5000), "empty file"),
    "html": (b"\n <!DOCTYPE html><html><body>404 \xc3\xa9</body></html>" * 20, "not media"),
    "text": (b"Access denied\r\n" * 100, "not media"),
    "playlist": (b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\nhttp://a/b.ts\n#EXT-X-ENDLIST\n" * 9, "not media"),
    "noise": (np.random.default_rng(0).integers(0, 256, 20000, np.uint8).tobytes(), "undecodable"),
    "picture": (None, "undecodable"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_is_no_media(tmp_path, kind):
    content, want = CONTENTS[kind]
    path = tmp_path / "a.mp4"
    if content is None:
        with av.open(str(tmp_path / "a.png"), "w") as container:
            stream = container.add_stream("png", rate=1)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bars(1), format="rgb24")))
        content = (tmp_path / "a.png").read_bytes()
    path.write_bytes(content)
    assert reason(path) == want


def test_a_hash_that_differs(tmp_path):
    path = film(tmp_path / "a.mp4")
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert "reason" not in run(path, sha256=right).note
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run(path, sha256=right).note["reason"] == "changed"


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "flv", "ts"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 80, (40, 64, 96, 3), np.uint8)
    pictures = [bars(i) // 2 + noise[i] for i in range(40)]
    if suffix == "avi":
        path = avi(tmp_path / "a.avi", pictures)
    else:
        codec = "libvpx-vp9" if suffix == "webm" else "libx264"
        path = write(tmp_path / f"a.{suffix}", pictures, codec=codec, options={})
    content = path.read_bytes()
    path.write_bytes(content[: round(len(content) * share)])
    got = reason(path)
    # A transport stream does not tell how long it is: what is left is a whole, shorter one.
    assert got in ("truncated", "damaged", "undecodable", "no frames") or (suffix == "ts" and got == "stored")


def test_pictures_that_end_long_before_the_sound(tmp_path):
    """The sound alone is as long as the file: half of the pictures are missing all the same."""
    path = film(tmp_path / "a.mp4", 60)
    content = bytearray(path.read_bytes())
    stsz = content.index(b"stsz")
    assert struct.unpack(">I", content[stsz + 12 : stsz + 16])[0] == 60
    content[stsz + 12 : stsz + 16] = struct.pack(">I", 20)
    path.write_bytes(content)
    assert reason(path) in ("truncated", "damaged", "undecodable")


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_noise_in_one_stream(tmp_path, kind):
    path = spoil(film(tmp_path / "a.mp4"), kind)
    assert reason(path) in ("undecodable", "damaged", "truncated", "no frames")


def test_a_stream_that_no_decoder_knows(tmp_path):
    path = film(tmp_path / "a.mp4")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"avc1", b"zzz1"))
    assert reason(path) == "undecodable"
    path = write(tmp_path / "a.wav", wave=tone(440, 1.0, RATE), sound="pcm_s16le")
    content = bytearray(path.read_bytes())
    assert content[20:22] == b"\1\0"
    content[20:22] = b"\x34\x12"
    path.write_bytes(content)
    assert reason(path) == "no sound"


def test_no_streams(tmp_path):
    path = write(tmp_path / "a.mp4", [bars(i) for i in range(5)])
    content = path.read_bytes()
    assert content.count(b"trak") == 1
    path.write_bytes(content.replace(b"trak", b"free"))  # its only track is room to be filled
    assert reason(path) == "no streams"


def test_a_span_outside(tmp_path):
    path = film(tmp_path / "a.mp4", 30)
    assert reason(path, [3.5, 4.0]) == "span outside"
    assert reason(path, [1e300, None]) == "span outside"
    assert reason(path, [2.95, 3.0]) == "stored"


def test_a_stream_that_shows_up_in_the_middle(tmp_path):
    """FLV may bring a new stream at any time; PyAV 18 has no place for its packets."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 160, 240, 3), np.uint8)
    path = write(tmp_path / "a.flv", [noise[i % 20] for i in range(120)], options={"crf": "1", "preset": "ultrafast"})
    content = path.read_bytes()
    assert len(content) > 7_000_000  # more than is read to find the streams
    tag = b"\x08" + (40).to_bytes(3, "big") + (15000).to_bytes(3, "big") + bytes(4) + b"\x2f" + bytes(39)
    place, tags = 13, []
    while place < len(content):
        tags.append(place)
        place += 11 + int.from_bytes(content[place + 1 : place + 4], "big") + 4
    middle = tags[115]
    path.write_bytes(content[:middle] + tag + len(tag).to_bytes(4, "big") + content[middle:])
    assert one(path)[0]["frames"] == 120
    got = media.decode(str(path), pick=lambda _: 0.0, seconds=2.0, frames=4, size=32, sample_rate=RATE)
    assert got.video is not None


# Limits.


def patched(path: Path, width: int, height: int) -> Path:
    """The same file, whose headers claim another size."""
    content = bytearray(path.read_bytes())
    tkhd = content.index(b"tkhd") + 4
    content[tkhd + 76 : tkhd + 84] = struct.pack(">II", width << 16 & 0xFFFFFFFF, height << 16 & 0xFFFFFFFF)
    entry = content.index(b"avc1")
    content[entry + 28 : entry + 32] = struct.pack(">HH", width, height)
    path.write_bytes(content)
    return path


def test_gigantic_header_values_take_no_memory(tmp_path):
    path = patched(film(tmp_path / "a.mp4"), 60000, 60000)
    sandbox = Sandbox("vmm.data.building.transcode:transcode", Limits(seconds=20, memory=1 << 29))
    try:
        note = sandbox({"path": str(path)}).note
        outcome = note.get("reason") or note["clips"][0].get("reason", "stored")
        # H.264 carries its true size: either is right, eating memory is not.
        assert outcome in ("too large", "stored")
        if outcome == "stored":
            assert note["clips"][0]["height"] == 64
        # A length of years in the header.
        path = film(tmp_path / "b.mp4")
        content = bytearray(path.read_bytes())
        mvhd = content.index(b"mvhd")
        content[mvhd + 20 : mvhd + 24] = b"\x7f\xff\xff\xff"
        mdhd = content.index(b"mdhd")
        content[mdhd + 20 : mdhd + 24] = b"\x7f\xff\xff\xff"
        path.write_bytes(content)
        for storage in (Storage(), Storage(cut="windows"), Storage(cut="shots")):
            note = sandbox({"path": str(path), "storage": list(storage)}).note
            outcomes = [clip.get("reason", "stored") for clip in note["clips"]] or [note["reason"]]
            assert len(outcomes) <= 8
            assert outcomes[-1] in ("truncated", "stored")
    finally:
        sandbox.close()


def test_a_decompression_bomb(tmp_path):
    """A megapixel file of a few bytes a frame is no bomb; one of 200 megapixels is, before it takes memory."""
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.height, stream.width, stream.pix_fmt = 12000, 16000, "gray"
        frame = av.VideoFrame(16000, 12000, "gray")
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert path.stat().st_size < 1 << 21
    sandbox = Sandbox("vmm.data.building.transcode:transcode", Limits(seconds=20, memory=1 << 29))
    try:
        assert sandbox({"path": str(path)}).note["reason"] == "too large"
    finally:
        sandbox.close()


def test_limits_of_size(tmp_path):
    path = film(tmp_path / "a.mp4", 30)
    assert reason(path, bytes=path.stat().st_size) == "stored"
    assert reason(path, bytes=path.stat().st_size - 1) == "too large"
    assert reason(path, frames=30) == "stored"
    assert reason(path, frames=29) == "too large"
    assert reason(path, pixels=96 * 64) == "stored"
    assert reason(path, pixels=96 * 64 - 1) == "too large"


def test_twenty_thousand_pictures_behind_one_key_frame(tmp_path):
    """A span at the end of a GOP of 4,000 small pictures is found, and exact."""
    count = 4000
    path = write(
        tmp_path / "a.mp4", [bars(i % 256, 16, 32) for i in range(count)], [i / 100 for i in range(count)],
        options={"g": "100000", "sc_threshold": "0", "preset": "ultrafast"},
    )  # fmt: skip
    _, stored = one(path, [39.0, 39.2])
    assert stored.numbers == [i % 256 for i in range(3900, 3920)]


# A part of a larger file.


def test_a_part_of_a_file(tmp_path):
    content = film(tmp_path / "a.mp4").read_bytes()
    path = tmp_path / "bundle"
    path.write_bytes(b"before" + content + b"behind")
    answer = run(path, member=("bytes", 6, len(content)))
    assert Stored(answer.parts[0]).numbers == list(range(30))
    assert answer.note["source"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert run(path, member=("bytes", 6, len(content) + 7)).note["reason"] == "truncated"
    assert run(path, member=("bytes", 1 << 40, 1 << 62)).note["reason"] == "truncated"


# Real files.

CLIPS = Path(__file__).parent.parent.parent / "shared" / "clips"
KEPT_WHOLE = (
    "media__sample.avi", "mmaction2__test.avi", "media__edit_list_positive_shift.mp4", "media__sample_shorter_audio.mp4",
    "decord__video_90.mov", "torchcodec__nasa_13013.mp4", "media__bear-vp9-odd-dimensions.webm", "media__sample.flv",
    "media__hlg10-color-test.mp4", "torchcodec__h265_10bits.mp4", "media__sample_vvc.mp4", "moviepy__fire2.mp4",
)  # fmt: skip


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no real clips here")
@pytest.mark.parametrize("name", KEPT_WHOLE)
def test_real_files_keep_all_their_pictures(name):
    with av.open(str(CLIPS / name)) as container:
        count = sum(1 for _ in container.decode(video=0))
    answer = run(CLIPS / name, short_side=64)
    [clip] = answer.note["clips"]
    assert "reason" not in clip, clip
    assert clip["frames"] == count
    stored = Stored(answer.parts[0])
    assert len(stored.pictures) == count
    assert (np.diff(stored.times) > 0).all()


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no real clips here")
def test_a_real_file_most_of_whose_sound_does_not_decode_is_left_out():
    assert reason(CLIPS / "media__sample_eac3.mp4") == "damaged"
