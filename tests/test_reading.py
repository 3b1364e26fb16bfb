"""One decoding core: containers × codecs × odd properties, through training, embedding and building, against how the file
was made.
"""

import errno
import json
import math
import os
import shutil
import subprocess
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import av
import numpy as np
import pytest

from vmm.data import media
from vmm.data.building.store import Storage
from vmm.data.building.transcode import transcode
from vmm.data.media import Crop, DecodeError
from vmm.data.reading.problems import REMARKS, from_bits, to_bits
from vmm.data.reading.sound import Tape, mix_weights

RATE = 16000
SECONDS, STEP = 3.0, 0.1  # of a file; between its pictures
WINDOWS = (0.0, 0.7, 1.6)


class Made(NamedTuple):
    """How a file is made. size: height, width. channels: each louder than the next. lag: seconds by which the codec is
    known to delay sound where the container has no place to say so."""

    suffix: str
    picture: str | None = None
    sound: str | None = None
    size: tuple[int, int] = (64, 96)
    options: dict = {}
    rate: int = RATE
    channels: int = 1
    pixels: str = "yuv420p"
    lag: float = 0.0
    ratio: int = 1
    offset: float = 0.0


def bits(number: int, height: int, width: int) -> np.ndarray:
    """A picture that is its number: five bars from top to bottom, dark and light."""
    places = np.arange(height) * 5 // height
    lit = (number >> places) & 1
    return np.repeat(np.where(lit, 200, 50).astype(np.uint8)[:, None, None], width, 1).repeat(3, 2)


def number_of(picture: np.ndarray) -> int:
    bands = [float(band.mean()) for band in np.array_split(picture, 5)]
    return sum((level > 125) << place for place, level in enumerate(bands))


def chirp(moments: np.ndarray) -> np.ndarray:
    """Sound of which no two moments are alike, from 150 to 450 Hz."""
    return 0.5 * np.sin(2 * np.pi * (150 * moments + 50 * moments**2))


def write(path: Path, made: Made, seconds: float = SECONDS) -> Path:
    """Writes a file with PyAV; with the ffmpeg command where PyAV lacks the encoder and there is one. Skips the test else."""
    try:
        return encode(path, made, seconds)
    except (ValueError, av.FFmpegError) as error:
        if shutil.which("ffmpeg") is None:
            pytest.skip(f"nothing here writes it: {error}")
    plain = encode(path.with_suffix(".nut"), made._replace(
        picture=made.picture and "ffv1", sound=made.sound and "pcm_f32le", options={}, offset=0.0, pixels="yuv420p"
    ), seconds)  # fmt: skip
    options = [item for key, value in made.options.items() for item in (f"-{ {'b': 'b:v'}.get(key, key) }", value)]
    codecs = ["-c:v", made.picture] if made.picture else []
    codecs += ["-c:a", made.sound, "-b:a", "128k"] if made.sound else []
    done = subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", plain, *codecs, *options, path], capture_output=True)
    if done.returncode:
        pytest.skip(f"nothing here writes it: {done.stderr.decode()[-200:]}")
    return path


def encode(path: Path, made: Made, seconds: float) -> Path:
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[made.channels]
    count = round(seconds / STEP)
    with av.open(str(path), "w") as container:
        seen = heard = None
        if made.picture:
            seen = container.add_stream(made.picture, rate=round(1 / STEP), options=made.options)
            seen.height, seen.width = made.size
            seen.pix_fmt = made.pixels
            if made.ratio != 1:
                seen.codec_context.sample_aspect_ratio = Fraction(made.ratio, 1)
        if made.sound:
            heard = container.add_stream(made.sound, rate=made.rate, layout=layout)
        packets = []
        for i in range(count if seen else 0):
            picture = bits(i, *made.size)
            if made.pixels == "pal8":
                palette = np.repeat(np.arange(256, dtype=np.uint8)[::-1, None], 4, 1)  # dark and light change places
                palette[:, 0] = 255
                frame = av.VideoFrame.from_ndarray((255 - picture[..., 0].copy(), palette), "pal8")
            else:
                frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=made.pixels)
            frame.pts, frame.time_base = i + round(made.offset / STEP), Fraction(1, round(1 / STEP))
            packets += seen.encode(frame)
        packets += seen.encode(None) if seen else []
        if heard:
            wave = chirp(np.arange(round(seconds * made.rate)) / made.rate)
            wave = np.stack([wave * 0.9**place for place in range(made.channels)]).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(wave.T.reshape(1, -1).copy(), "flt", layout)
            frame.sample_rate, frame.pts, frame.time_base = (
                made.rate,
                round(made.offset * made.rate),
                Fraction(1, made.rate),
            )
            packets += [*heard.encode(frame), *heard.encode(None)]
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            container.mux(packet)
    return path


def loudness(made: Made) -> float:
    return float(np.mean([0.9**place for place in range(made.channels)]))


def shift_of(path: Path) -> float:
    """When the first picture is shown, after the container's first timestamp: primers of codecs come before it."""
    with av.open(str(path)) as container:
        if not container.streams.video or container.start_time is None or container.format.name == "avi":
            return 0.0
        stream = container.streams.video[0]
        first = min(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        return float(first * stream.time_base) - container.start_time / av.time_base


def expected(start: float, shift: float) -> list[int]:
    """The picture that is shown at the middle of each tenth of a second."""
    middles = [start + STEP * (i + 0.5) - shift for i in range(10)]
    return [min(max(0, math.floor(middle / STEP + 1e-6)), round(SECONDS / STEP) - 1) for middle in middles]


def lag_of(wave: np.ndarray, start: float, level: float) -> tuple[float, float, float]:
    """Returns (seconds by which a sound is late, its correlation there, its level in dB) against the chirp."""
    reach = round(0.1 * RATE)
    moments = np.arange(-reach, len(wave) + reach) / RATE + start
    truth = np.where((moments >= 0) & (moments < SECONDS), level * chirp(moments), 0.0)
    begin, end = round(0.1 * RATE), len(wave) - round(max(0.0, start + 1.15 - SECONDS) * RATE)  # edges are the codec's
    found = np.where((np.arange(len(wave)) >= begin) & (np.arange(len(wave)) < end), wave, 0.0)
    size = 1 << (len(truth) + len(found)).bit_length()
    cross = np.fft.irfft(np.fft.rfft(truth, size) * np.conj(np.fft.rfft(found, size)), size)[: 2 * reach + 1]
    place = int(np.argmax(cross))
    part = truth[place + begin : place + end]
    power, other = float(np.square(found).sum()), float(np.square(part).sum())
    return (reach - place) / RATE, float(cross[place]) / math.sqrt(power * other), 10 * math.log10(power / other)


def ways(path: Path, made: Made):
    """Yields (name, function of a start → Media): as training, as embedding, and of what a build stores."""
    from vmm.data.manifest import Row
    from vmm.data.samples import Clip, Samples

    window = {"seconds": 1.0, "frames": 10, "size": 32, "sample_rate": RATE}
    yield "training", lambda start: media.decode(path, pick=lambda _: start, **window)

    def embedded(start: float) -> media.Media:
        samples = Samples.__new__(Samples)
        samples.modalities, samples.remote, samples.tracks = ("video", "audio"), "", {}
        row = Row(id="a", path=str(path), start=start, end=start + 1.0, captions=(), labels={})
        from vmm.data.samples import _Window

        return samples._decode(row, _Window(row, 1.0, 0.5), Clip(1.0, 10, 32, RATE), Crop())

    yield "embedding", embedded
    answer = transcode(str(path), (), None, None, list(Storage()._replace(short_side=64)))
    [clip] = answer.note["clips"]
    assert "reason" not in clip, clip
    stored = path.with_suffix(".stored.mp4")
    stored.write_bytes(answer.parts[0])
    yield "building", lambda start: media.decode(stored, pick=lambda _: start, **window)


X264 = {"crf": "12", "preset": "veryfast", "g": "12"}
LOSSY = {"b": "4000000", "g": "12"}
MATRIX = {
    "mp4, B frames, AAC": Made("mp4", "libx264", "aac", options=X264 | {"bf": "3"}, channels=2, rate=44100),
    "mp4, one key frame, odd sides": Made("mp4", "libx264", "aac", (65, 97), X264 | {"g": "250"}, pixels="yuv444p"),
    "mp4, wide pixels, ALAC": Made("mp4", "libx264", "alac", (64, 48), X264, ratio=2),
    "mov, run lengths, ADPCM": Made("mov", "qtrle", "adpcm_ima_qt", pixels="rgb24", options={"g": "12"}),
    "mkv, begins at 100 s, FLAC in 5.1": Made("mkv", "libx264", "flac", options=X264, channels=6, offset=100.0),
    "webm, VP9, odd sides, Opus": Made("webm", "libvpx-vp9", "libopus", (63, 95), LOSSY | {"cpu-used": "8"}, 48000, 2),
    "webm, VP8, Vorbis": Made("webm", "libvpx", "libvorbis", options=LOSSY | {"cpu-used": "8"}, rate=44100, channels=2),
    "avi, B frames, MP3": Made(
        "avi", "mpeg4", "libmp3lame", options=LOSSY | {"bf": "2"}, rate=44100, channels=2, lag=1105 / 44100
    ),
    "avi, palette, ADPCM": Made("avi", "rawvideo", "adpcm_ima_wav", (32, 48), pixels="pal8", rate=22050),
    "flv, MP3": Made("flv", "flv", "libmp3lame", options=LOSSY, rate=44100, channels=2),
    "ts, MPEG-2, MP2": Made("ts", "mpeg2video", "mp2", options=LOSSY, rate=48000, channels=2),
    "ts, H.264, AAC": Made("ts", "libx264", "aac", options=X264, rate=48000),
    "mpg, AC-3": Made("mpg", "mpeg2video", "ac3", options=LOSSY, rate=48000, channels=6),
    "wmv, WMA": Made("wmv", "wmv2", "wmav2", options=LOSSY, rate=44100, channels=2),
    "ogv, Theora, Vorbis": Made("ogv", "libtheora", "libvorbis", options={"b": "2000000", "g": "12"}, rate=44100),
    "3gp, H.263": Made("3gp", "h263", None, (144, 176), LOSSY),
    "gif": Made("gif", "gif", None, pixels="rgb8"),
    "raw H.264": Made("h264", "libx264", None, options=X264 | {"bf": "3"}),
    "nut, FFV1, WavPack": Made("nut", "ffv1", "wavpack", rate=44100, channels=2),
    "wav, Microsoft's ADPCM": Made("wav", None, "adpcm_ms", rate=44100, channels=2),
    "wav, IMA ADPCM": Made("wav", None, "adpcm_ima_wav", rate=22050),
    "wav, Yamaha's ADPCM": Made("wav", None, "adpcm_yamaha", rate=22050),
    "wav, eight bits, 5.1": Made("wav", None, "pcm_u8", channels=6, rate=48000),
    "bare MP3": Made("mp3", None, "libmp3lame", rate=44100, channels=2),
    "bare AAC": Made("aac", None, "aac", rate=44100, lag=1024 / 44100),
    "caf, PCM": Made("caf", None, "pcm_s16be", rate=32000, channels=2),
    "ogg, Opus": Made("ogg", None, "libopus", rate=48000, channels=2),
    "flac, 5.1": Made("flac", None, "flac", rate=44100, channels=6),
}


@pytest.mark.parametrize("name", MATRIX)
def test_what_is_in_the_file_comes_out_whatever_reads_it(tmp_path, name):
    made = MATRIX[name]
    path = write(tmp_path / f"a.{made.suffix}", made)
    shift = shift_of(path)
    for way, read in ways(path, made):
        for start in WINDOWS:
            got = read(start)
            if made.picture:
                assert [number_of(picture) for picture in got.video] == expected(start, shift), (way, start)
            if made.sound:
                late, alike, level = lag_of(got.audio, start, loudness(made))
                assert alike > 0.99, (way, start, late, alike)
                assert abs(late - shift - made.lag) <= 0.01, (way, start, late, shift)
                assert abs(level) < 0.5, (way, start, level)
            assert (got.video is not None, got.audio is not None) == (bool(made.picture), bool(made.sound))


# Rows that a matrix does not hold.


def read(path, start: float = 0.0, seconds: float = 1.0, frames: int = 10, **more) -> media.Media:
    return media.decode(path, pick=lambda _: start, seconds=seconds, frames=frames, size=32, sample_rate=RATE, **more)


def built(path) -> dict:
    """What a build says of a file."""
    note = transcode(str(path), (), None, None, list(Storage()._replace(short_side=64))).note
    return (note["clips"] or [note])[0]


def packets(path: Path, sounds: list[tuple[float, np.ndarray]], codec: str = "pcm_s16le") -> Path:
    """Writes pieces of sound [S] at times of their own, one packet each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        for start, piece in sounds:
            frame = av.AudioFrame.from_ndarray((piece * 32767).astype(np.int16)[None], "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, round(start * RATE), Fraction(1, RATE)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def pieces(seconds: float, length: float = 0.02) -> list[tuple[float, np.ndarray]]:
    count = round(seconds / length)
    return [(i * length, chirp(np.arange(round(length * RATE)) / RATE + i * length)) for i in range(count)]


def test_sound_after_a_hole_comes_when_it_came(tmp_path):
    sounds = [(start + (1.0 if start >= 1.0 else 0.0), piece) for start, piece in pieces(2.0, 0.1)]
    path = packets(tmp_path / "a.mkv", sounds)
    got = read(path, 0.0, 3.0)
    assert np.abs(got.audio[round(1.01 * RATE) : round(1.99 * RATE)]).max() < 1e-3
    later = np.arange(round(2.1 * RATE), round(2.9 * RATE))
    assert np.abs(got.audio[later] - chirp(later / RATE - 1.0)).max() < 0.01
    assert got.remarks == {"holes in the sound": 1}
    assert np.array_equal(read(path, 2.2, 0.5).audio, got.audio[round(2.2 * RATE) : round(2.7 * RATE)])


@pytest.mark.parametrize("jitter", [lambda i: 0.019 * (i % 2), lambda i: 0.019 * (i % 29 == 7), lambda i: 0.0])
def test_jitter_of_timestamps_moves_no_sound(tmp_path, jitter):
    path = packets(tmp_path / "a.mkv", [(start + jitter(i), piece) for i, (start, piece) in enumerate(pieces(3.0))])
    mean = float(np.mean([jitter(i) for i in range(150)]))
    found = [lag_of(read(path, start).audio, start, 1.0) for start in (0.3, 0.95, 1.62)]
    assert all(alike > 0.999 for _, alike, _ in found)
    lags = [late for late, _, _ in found]
    assert max(lags) - min(lags) < 0.002 and abs(lags[0] - mean) < 0.002


def test_a_clock_that_runs_away_is_followed(tmp_path):
    """A recorder that ticks by 1 % too slowly: its timestamps are right, and the sound is kept to them."""
    moments = np.arange(20) + 0.5
    wave = np.zeros(20 * RATE, np.float32)
    for moment in moments:
        wave[round(moment * RATE) : round((moment + 0.005) * RATE)] = 0.8
    sounds = [(i / 50 * 1.01, wave[i * RATE // 50 : (i + 1) * RATE // 50]) for i in range(1000)]
    path = packets(tmp_path / "a.mkv", sounds)
    whole = Tape(1, RATE)
    with media.Medium(path) as medium:
        for frame, time in media.frames_from(medium, "audio", 0.0, pixels=0):
            whole.put(frame, time)
    assert whole.holes == 0
    windows = {start: read(path, start, 1.9).audio for start in (0.0, 9.0, 18.0)}
    for start, found in {0.0: whole.wave(20.3)[0], **windows}.items():
        for moment in moments * 1.01 - start:
            if 0.05 < moment < len(found) / RATE - 0.05:
                near = slice(round((moment - 0.05) * RATE), round((moment + 0.05) * RATE))
                late = (np.flatnonzero(np.abs(found[near]) > 0.2)[0] / RATE) - 0.05
                assert abs(late) < 0.015, (start, moment)


@pytest.mark.parametrize("layout", ["mono", "stereo", "2.1", "quad", "5.0", "5.1", "6.1", "7.1"])
@pytest.mark.parametrize("form", ["flt", "s16", "s32", "u8"])
def test_the_same_sound_in_every_channel_keeps_its_level(layout, form):
    channels = av.AudioLayout(layout).nb_channels
    wave = 0.8 * np.sin(2 * np.pi * 400 * np.arange(RATE) / RATE)
    scaled = {"flt": wave, "s16": wave * 32767, "s32": wave * (2**31 - 1), "u8": wave * 127 + 128}[form]
    kind = {"flt": np.float32, "s16": np.int16, "s32": np.int32, "u8": np.uint8}[form]
    for outs in (1, 2):
        tape = Tape(outs, RATE)
        for i in range(0, RATE, 1000):
            values = np.repeat(scaled[i : i + 1000].astype(kind)[:, None], channels, 1).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(values, form, layout)
            frame.sample_rate = RATE
            tape.put(frame, i / RATE)
        found = tape.wave(1.0)
        assert np.abs(found - wave).max() < 0.02, outs


def test_two_channels_mix_to_the_mean_of_all():
    for layout in ("2.1", "3.0", "quad", "5.1", "7.1"):
        names = [channel.name for channel in av.AudioLayout(layout).channels]
        both = np.array(mix_weights(names, 2))
        assert np.allclose(both.mean(0), 1 / len(names)), layout
        assert np.allclose(both.sum(1), 1.0), layout
        left = [place for place, name in enumerate(names) if name in ("FL", "BL", "SL")]
        assert (both[1, left] == 0).all() and (both[0, left] > 0).all()


def disc(height: int, width: int, ratio: float = 1.0) -> np.ndarray:
    """A disc in the middle that is 0.7 of the short side wide, once pixels of a ratio are shown."""
    y, x = np.mgrid[:height, :width]
    inside = (x - (width - 1) / 2) ** 2 * ratio**2 + (y - (height - 1) / 2) ** 2 < (
        0.35 * min(height, width * ratio)
    ) ** 2
    return np.where(inside, 230, 20).astype(np.uint8)[..., None].repeat(3, 2)


def boxed(picture: np.ndarray) -> tuple[int, int]:
    ys, xs = np.where(picture.mean(-1) > 125)
    return int(np.ptp(ys)) + 1, int(np.ptp(xs)) + 1


def still(path: Path, picture: np.ndarray, codec: str, pixels: str = "yuv420p", ratio: int = 1) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], pixels
        if ratio != 1:
            stream.codec_context.sample_aspect_ratio = Fraction(ratio, 1)
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=pixels)
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


SHAPES = {
    "odd height": ("webm", "libvpx-vp9", "yuv420p", 91, 160, 1),
    "odd sides": ("mkv", "ffv1", "yuv420p", 91, 161, 1),
    "odd sides, ten bits": ("mkv", "ffv1", "yuv420p10le", 91, 161, 1),
    "odd sides, 4:1:1": ("mkv", "ffv1", "yuv411p", 91, 161, 1),
    "odd sides, RGB": ("mkv", "ffv1", "bgr0", 91, 161, 1),
    "high": ("mp4", "mpeg4", "yuv420p", 160, 90, 1),
    "wide pixels": ("mp4", "libx264", "yuv420p", 90, 80, 2),
    "wide pixels, odd": ("mkv", "libx264", "yuv444p", 91, 81, 2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_disc_is_round(tmp_path, name):
    suffix, codec, pixels, height, width, ratio = SHAPES[name]
    path = still(tmp_path / f"a.{suffix}", disc(height, width, ratio), codec, pixels, ratio)
    wide_side, round_side = width * ratio, 0.7 * min(height, width * ratio)
    for crop in (Crop(), Crop(area=1.0, aspect=width * ratio / height), Crop(0.5, 0.5, 0.5)):
        got = media.decode(path, pick=lambda _: 0.0, seconds=0.5, frames=1, size=64, sample_rate=RATE, crop=crop)
        tall, wide = boxed(got.video[0])
        if crop.area is None:
            assert abs(tall - 0.7 * 64) <= 2 and abs(wide - 0.7 * 64) <= 2
        elif crop.area == 1.0:  # the whole picture, squeezed
            assert abs(tall - round_side * 64 / height) <= 1.5 and abs(wide - round_side * 64 / wide_side) <= 1.5
        else:
            assert abs(tall - wide) <= 2
    clip = built(path)
    assert abs(clip["width"] / clip["height"] - width * ratio / height) < 0.06


@pytest.mark.parametrize("side", [90, 91])
def test_crops_at_the_edges_hold_the_edges(tmp_path, side):
    picture = np.full((side, 2 * side + 1, 3), 128, np.uint8)
    picture[:, :2], picture[:, -2:] = 255, 0
    path = still(tmp_path / "a.mkv", picture, "ffv1", "yuv444p")
    left, right = (read(path, frames=1, seconds=0.4, crop=Crop(x=x)).video[0] for x in (0.0, 1.0))
    assert left[:, 0].mean() > 180 and abs(left[:, -1].mean() - 128) < 4
    assert right[:, -1].mean() < 70 and abs(right[:, 0].mean() - 128) < 4


def test_an_error_in_the_middle_ends_nothing(tmp_path):
    path = write(tmp_path / "a.mkv", Made("mkv", "mpeg4", "mp2", options=LOSSY | {"g": "5"}, rate=48000))
    spoilt = tmp_path / "b.mkv"
    rng = np.random.default_rng(0)
    with av.open(str(path)) as source, av.open(str(spoilt), "w") as sink:
        streams = {stream.index: sink.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is None:
                continue
            if 1.0 <= packet.pts * packet.time_base < 1.1:
                noise = av.Packet(rng.integers(0, 256, packet.size, np.uint8).tobytes())
                noise.pts, noise.dts, noise.time_base = packet.pts, packet.dts, packet.time_base
                noise.stream, packet = packet.stream, noise
            packet.stream = streams[packet.stream.index]
            sink.mux(packet)
    got = read(spoilt, 0.5, 2.0, 20)
    assert [number_of(picture) for picture in got.video[12:]] == list(range(17, 25))
    late, alike, _ = lag_of(got.audio[round(0.9 * RATE) :], 1.4, 1.0)
    assert abs(late) < 0.01 and alike > 0.99
    assert got.remarks["errors skipped"] >= 1
    assert built(spoilt)["reason"] in ("damaged", "truncated", "undecodable")


def test_a_stream_that_begins_between_key_frames(tmp_path):
    path = write(tmp_path / "whole.ts", Made("ts", "libx264", None, options=X264 | {"g": "10", "sc_threshold": "0"}))
    content = path.read_bytes()
    cut = tmp_path / "a.ts"
    cut.write_bytes(content[len(content) // 10 // 188 * 188 :])
    with av.open(str(cut)) as container:
        stamps = [
            (packet.pts * packet.time_base, packet.is_keyframe) for packet in container.demux(video=0) if packet.pts
        ]
        origin = container.start_time / av.time_base
    keys = [float(time) - origin for time, key in stamps if key]
    assert keys[0] > 0.3  # the file has what the test is about
    got = read(cut, 0.0)
    place = math.ceil(keys[0] * 10 - 0.5)
    assert [number_of(picture) for picture in got.video] == [10] * (place + 1) + list(range(11, 20 - place))
    assert got.remarks["starts late"]
    clip = built(cut)
    assert clip["frames"] == 20 and clip["remarks"]["starts late"]


def test_a_packet_that_is_missing_from_a_transport_stream(tmp_path):
    path = write(tmp_path / "a.ts", MATRIX["ts, H.264, AAC"])
    content = path.read_bytes()
    assert built(path).get("reason") is None
    numbers = [int.from_bytes(content[i + 1 : i + 3], "big") & 0x1FFF for i in range(0, len(content), 188)]
    for stream in (256, 257):  # pictures, sound
        places = [i for i, number in enumerate(numbers) if number == stream]
        place = places[len(places) // 2]
        hole = tmp_path / f"{stream}.ts"
        hole.write_bytes(content[: place * 188] + content[(place + 1) * 188 :])
        assert built(hole)["reason"] == "damaged"
    span = transcode(str(hole), (), None, [[0.0, 0.5]], list(Storage())).note["clips"][0]
    assert span["remarks"]["holes in the stream"] == 1
    table = numbers.index(0, 20)  # a table that comes again and again
    path.write_bytes(content[: table * 188] + content[(table + 1) * 188 :])
    assert built(path).get("reason") is None


def test_a_bare_file_that_is_cut_off_and_says_so(tmp_path):
    path = write(tmp_path / "a.mp3", MATRIX["bare MP3"])
    assert built(path)["duration"] == pytest.approx(SECONDS, abs=0.1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 8 // 10])
    assert built(path)["reason"] == "truncated"
    assert read(path, 0.5).audio is not None  # what is there is good enough to train on


def test_the_same_picture_again(tmp_path):
    """A packet of no bytes says it; to a decoder it would mean the end."""
    path = tmp_path / "a.nut"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(bits(i // 2 * 2, 64, 96), "rgb24").reformat(format="yuvj420p")
            frame.pts = i
            for packet in stream.encode(frame):
                if packet.pts % 2:
                    empty = av.Packet(b"")
                    empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
                    empty.stream, packet = stream, empty
                container.mux(packet)
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        sizes = [packet.size for packet in container.demux(video=0) if packet.pts is not None]
    assert sizes.count(0) >= 9  # the file has what the test is about
    assert [number_of(picture) for picture in read(path, 0.4).video] == [4, 4, 6, 6, 8, 8, 10, 10, 12, 12]
    assert built(path)["frames"] == 20


class Pipe:
    """What cannot be sought: a program's output."""

    def __init__(self, path):
        self.file = open(path, "wb")

    def write(self, data):
        return self.file.write(data)


@pytest.mark.parametrize("form", ["matroska", "flac", "adts", "mp3"])
def test_a_length_that_is_not_told_is_measured(tmp_path, form):
    path, pipe = tmp_path / "a.bin", Pipe(tmp_path / "a.bin")
    codec = {"matroska": "flac", "flac": "flac", "adts": "aac", "mp3": "libmp3lame"}[form]
    wave = np.concatenate([np.zeros(2 * RATE), np.random.default_rng(0).uniform(-0.5, 0.5, 6 * RATE)]).astype(
        np.float32
    )
    options = {"write_xing": "0"} if form == "mp3" else {}
    with av.open(pipe, "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None], "flt", "mono")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    pipe.file.close()
    lengths = []

    def end(length):
        lengths.append(length)
        return length - 1.2

    got = media.decode(path, pick=end, seconds=1.0, frames=1, size=8, sample_rate=RATE)
    assert lengths == [pytest.approx(8.0, abs=0.2)]
    assert np.sqrt(np.mean(got.audio**2)) > 0.1
    assert media.probe_duration(path) == lengths[0]
    assert got.remarks["length measured"]
    assert built(path)["duration"] == pytest.approx(8.0, abs=0.2)


def tracks(path: Path, pitches: list[int], default: int, comment: int | None = None) -> Path:
    with av.open(str(path), "w") as container:
        streams = []
        for place in range(len(pitches)):
            stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
            marks = av.stream.Disposition.default if place == default else av.stream.Disposition(0)
            stream.disposition = marks | (
                av.stream.Disposition.comment if place == comment else av.stream.Disposition(0)
            )
            streams.append(stream)
        for pitch, stream in zip(pitches, streams):
            wave = 0.5 * np.sin(2 * np.pi * pitch * np.arange(2 * RATE) / RATE)
            frame = av.AudioFrame.from_ndarray((wave * 32767).astype(np.int16)[None], "s16", "mono")
            frame.sample_rate, frame.pts = RATE, 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def pitch(wave: np.ndarray) -> int:
    return round((np.diff(np.signbit(wave)) != 0).sum() / 2 * RATE / len(wave), -1)


def test_the_track_that_players_take(tmp_path):
    path = tracks(tmp_path / "a.mkv", [300, 1000, 2000], default=1)
    got = read(path)
    assert pitch(got.audio) == 1000 and got.remarks == {"track chosen": 1}
    named = read(path, tracks={"audio": 2})
    assert pitch(named.audio) == 2000 and named.remarks == {}
    with pytest.raises(DecodeError):
        read(path, tracks={"audio": 3})
    assert built(path)["remarks"] == {"track chosen": 1}
    aside = tracks(tmp_path / "b.mkv", [300, 1000], default=0, comment=0)
    assert pitch(read(aside).audio) == 1000


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    path = tmp_path / "a.mp4"
    os.mkfifo(path)
    found = []

    def attempt():
        for read_it in (read, media.probe_duration):
            try:
                read_it(path)
            except (DecodeError, OSError) as error:
                found.append(getattr(error, "reason", None) or errno.errorcode[error.errno])
        found.append(built(path)["reason"])

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20)
    assert found == ["unreadable", "EACCES", "unreadable"]


def test_pictures_that_end_before_the_window_are_absent(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        seen = container.add_stream("ffv1", rate=10)
        seen.height, seen.width, seen.pix_fmt = 64, 96, "yuv420p"
        heard = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(bits(i, 64, 96), "rgb24").reformat(format="yuv420p")
            frame.pts = i
            container.mux(seen.encode(frame))
        container.mux(seen.encode(None))
        frame = av.AudioFrame.from_ndarray(
            (chirp(np.arange(5 * RATE) / RATE) * 32767).astype(np.int16)[None], "s16", "mono"
        )
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(heard.encode(frame))
    held = read(path, 0.6)
    assert [number_of(picture) for picture in held.video] == [6, 7, 8, 9, 9, 9, 9, 9, 9, 9]
    gone = read(path, 3.0)
    assert gone.video is None and gone.audio is not None
    assert gone.remarks == {"pictures end early": 1}
    with pytest.raises(DecodeError) as error:
        read(path, 3.0, want=("video",))
    assert error.value.reason == "span outside"


def test_remarks_travel_as_bits():
    for names in ([], ["errors skipped"], list(REMARKS)):
        assert from_bits(to_bits(names)) == names
    assert to_bits(Counter(REMARKS)) < 1 << 31  # they travel as int32


# Through a manifest.


def test_rows_that_go_on_behind_their_file_stay_within_it_and_are_found(tmp_path):
    from vmm.data.inspection.check import check
    from vmm.data.manifest import read_manifest
    from vmm.data.samples import Clip, Samples, _Window

    write(tmp_path / "a.mkv", Made("mkv", "ffv1", "pcm_s16le"))
    rows = [{"id": "long", "start": 1, "end": 20}, {"id": "outside", "start": 10, "end": 12}, {"id": "good", "end": 2}]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps({"path": "a.mkv", **row}) + "\n" for row in rows))
    long, outside, good = read_manifest(manifest)
    samples = Samples.__new__(Samples)
    samples.modalities, samples.remote, samples.tracks = ("video", "audio"), "", {}
    clip = Clip(1.0, 10, 32, RATE)
    for place, begin in ((0.0, 1.0), (0.5, 1.5), (1.0, 2.0)):
        window = _Window(long, 1.0, place)
        got = samples._decode(long, window, clip, Crop())
        assert window.start == pytest.approx(begin, abs=0.01)
        assert number_of(got.video[0]) in (round(begin * 10), round(begin * 10) - 1)
        assert "ends early" not in got.remarks
    with pytest.raises(DecodeError) as error:
        samples._decode(outside, _Window(outside, 1.0, 0.5), clip, Crop())
    assert error.value.reason == "span outside"
    assert check(manifest).problems == [
        "clip long: ends at 20 s, the file has 3", "clip outside: starts at 10 s, the file has 3",
    ]  # fmt: skip


def test_a_pipe_in_a_manifest_is_a_bad_file(tmp_path):
    from vmm.data.inspection.check import check

    os.mkfifo(tmp_path / "a.mp4")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"path": "a.mp4"}\n')
    found = []
    thread = threading.Thread(target=lambda: found.extend(check(manifest).problems), daemon=True)
    thread.start()
    thread.join(20)
    assert len(found) == 1 and "a pipe" in found[0]


@pytest.mark.parametrize("name", ["mp4, B frames, AAC", "flv, MP3"])
def test_a_published_model_is_given_the_same(tmp_path, name):
    from vmm.data.samples import Clip
    from vmm.publish import Model

    path = write(tmp_path / f"a.{MATRIX[name].suffix}", MATRIX[name])
    model = SimpleNamespace(experiment=SimpleNamespace(clip=Clip(1.0, 10, 32, RATE)))
    middle = (media.probe_duration(path) - 1.0) / 2
    both = read(path, middle)
    for kind in ("video", "audio"):
        assert np.abs(Model._decode(model, path, kind) - getattr(both, kind).astype(float)).max() < 1e-6
