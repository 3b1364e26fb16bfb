"""Media → window, by presentation time: files written here, in which every frame and moment can be read back."""

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vmm.data import media
from vmm.data.media import Crop, DecodeError

RATE = 16000
TICKS = 90000


def level(number: int) -> int:
    """The grey that stands for a frame's number (0 to 31)."""
    return 20 + 7 * number


def numbers(video: np.ndarray) -> list[int]:
    """Reads the frames' numbers from their brightness."""
    return [round((float(picture.mean()) - 20) / 7) for picture in video]


def grey(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), level(number), np.uint8)


def click(moments, seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """Silence with a pulse of 2 ms at each moment: float32 [channels S]."""
    wave = np.zeros(round(seconds * rate), np.float32)
    for moment in moments:
        wave[round(moment * rate) : round((moment + 0.002) * rate)] = 0.8
    return np.repeat(wave[None], channels, 0)


def tone(pitch: float, seconds: float, rate: int, channels: int = 1, loud: float = 0.5) -> np.ndarray:
    wave = loud * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[None].astype(np.float32), channels, 0)


def pitch_of(wave: np.ndarray, rate: int = RATE) -> float:
    """The strongest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(np.fft.rfftfreq(len(wave), 1 / rate)[spectrum.argmax()])


def write(
    path: Path, pictures=(), times=None, wave=None, rate: int = RATE, codec: str = "libx264",
    sound: str = "aac", audio_start: float = 0.0, options=None,
) -> Path:  # fmt: skip
    """Writes pictures [H W 3] at presentation times (seconds) and sound [channels S] with PyAV."""
    times = [i / 10 for i in range(len(pictures))] if times is None else times
    with av.open(str(path), "w") as container:
        seen = heard = None
        if len(pictures):
            seen = container.add_stream(codec, rate=30)
            seen.height, seen.width = pictures[0].shape[:2]
            seen.pix_fmt = "yuv420p"
            seen.codec_context.time_base = Fraction(1, TICKS)
            seen.options = {"crf": "8", "preset": "veryfast", "g": "6"} if options is None else options
        if wave is not None:
            heard = container.add_stream(sound, rate=rate, layout="stereo" if len(wave) == 2 else "mono")
        if seen:
            for picture, time in zip(pictures, times):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = round(time * TICKS), Fraction(1, TICKS)
                container.mux(seen.encode(frame))
            container.mux(seen.encode(None))
        if heard:
            layout = "stereo" if len(wave) == 2 else "mono"
            if sound.startswith("pcm"):
                values = (wave.T.reshape(1, -1) * 32767).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(values, format="s16", layout=layout)
            else:
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, round(audio_start * rate), Fraction(1, rate)
            container.mux(heard.encode(frame))
            container.mux(heard.encode(None))
    return path


def read(path, start: float = 0.0, seconds: float = 1.0, frames: int = 4, size: int = 32, **more) -> media.Media:
    return media.decode(
        str(path), pick=lambda _: start, seconds=seconds, frames=frames, size=size, sample_rate=RATE, **more
    )


def expected(times, start: float, seconds: float, frames: int) -> list[int]:
    """What a viewer sees at the middle of each part: the last frame shown by then, the first before any."""
    middles = [start + (i + 0.5) * seconds / frames for i in range(frames)]
    return [max((i for i, time in enumerate(times) if time <= middle + 1e-6), default=0) for middle in middles]


# Sampling in time.


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("start", [0.0, 0.55, 1.4])
def test_variable_frame_rate_is_sampled_by_time(tmp_path, suffix, start):
    # 20 frames in the first second, 4 in the next two: an index in place of a time would be far off.
    times = [i / 20 for i in range(20)] + [1.0, 1.5, 2.0, 2.5]
    path = write(tmp_path / f"a.{suffix}", [grey(i) for i in range(len(times))], times)
    video = read(path, start, 1.3, 7).video
    assert numbers(video) == expected(times, start, 1.3, 7)


def test_ntsc_rate_at_four_frames_a_second(tmp_path):
    times = [i * 1001 / 30000 for i in range(61)]
    pictures = [grey(i % 31) for i in range(61)]
    path = write(tmp_path / "a.mp4", pictures, times)
    # Middles of quarter seconds: 0.125 s is frame 3 (0.100 to 0.133), 1.875 s is frame 56.
    assert numbers(read(path, 0.0, 2.0, 8).video) == [i % 31 for i in (3, 11, 18, 26, 33, 41, 48, 56)]


def test_b_frames_come_in_order_of_presentation(tmp_path):
    times = [i / 10 for i in range(24)]
    options = {"crf": "8", "preset": "medium", "bf": "3", "g": "24"}
    path = write(tmp_path / "a.mp4", [grey(i) for i in range(24)], times, options=options)
    with av.open(str(path)) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert stamps != sorted(stamps)  # the file has what the test is about
    assert numbers(read(path, 0.0, 2.4, 24).video) == list(range(24))


def test_pick_is_told_the_length_and_names_the_start(tmp_path):
    times = [i / 10 for i in range(30)]
    path = write(tmp_path / "a.mp4", [grey(i) for i in range(30)], times, click([2.0], 3.0, RATE))
    told = []

    def middle(duration):
        told.append(duration)
        return (duration - 1.0) / 2

    got = media.decode(str(path), pick=middle, seconds=1.0, frames=5, size=32, sample_rate=RATE)
    assert abs(told[0] - 3.0) < 0.15
    assert media.probe_duration(path) == told[0]
    start = (told[0] - 1.0) / 2
    assert numbers(got.video) == expected(times, start, 1.0, 5)
    assert abs(np.abs(got.audio).argmax() / RATE - (2.0 - start)) < 0.006


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
def test_first_timestamp_far_from_zero(tmp_path, suffix):
    times = [i / 10 for i in range(20)]
    path = write(tmp_path / f"a.{suffix}", [grey(i) for i in range(20)], [time + 100 for time in times])
    with av.open(str(path)) as container:
        assert container.start_time > 90 * av.time_base  # the file has what the test is about
    for start in (0.0, 0.9):
        assert numbers(read(path, start, 1.0, 4).video) == expected(times, start, 1.0, 4)


def test_first_timestamp_far_from_zero_with_sound(tmp_path):
    times = [i / 10 for i in range(20)]
    path = write(
        tmp_path / "a.mkv", [grey(i) for i in range(20)], [time + 100 for time in times],
        click([1.2], 2.0, RATE), audio_start=100.0, sound="pcm_s16le",
    )  # fmt: skip
    for start in (0.0, 0.9):
        got = read(path, start, 1.1 if start else 2.0, 4)
        assert numbers(got.video) == expected(times, start, 1.1 if start else 2.0, 4)
        assert abs(start + np.abs(got.audio).argmax() / RATE - 1.201) < 0.004


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_every_start_reads_the_same_frames_as_the_whole(tmp_path, suffix):
    # Key frames every 6 frames: a seek that lands late would show a frame of the future.
    times = [i / 10 for i in range(24)]
    codec, options = ("mpeg4", {"b": "4000000", "g": "6"}) if suffix == "avi" else ("libx264", None)
    path = tmp_path / f"a.{suffix}"
    if suffix == "avi":  # AVI has a fixed rate
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv420p", options
            for i in range(24):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(i), format="rgb24")))
            container.mux(stream.encode(None))
    else:
        write(path, [grey(i) for i in range(24)], times)
    for k in range(0, 22, 3):
        start = k / 10 + 0.02
        assert numbers(read(path, start, 0.4, 2).video) == expected(times, start, 0.4, 2), start


def test_longer_than_the_file_holds_the_last_frame(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(i) for i in range(10)], wave=tone(440, 1.0, RATE))
    got = read(path, 0.0, 4.0, 8)
    assert numbers(got.video) == [2, 7, 9, 9, 9, 9, 9, 9]
    assert np.abs(got.audio[: RATE // 2]).max() > 0.3
    assert np.abs(got.audio[round(1.1 * RATE) :]).max() < 0.02


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv"])
def test_a_start_past_the_end_is_outside(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", [grey(i) for i in range(10)])
    with pytest.raises(DecodeError) as error:
        read(path, 50.0)
    assert error.value.reason == "span outside"


def test_a_negative_start_is_the_beginning(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(i) for i in range(10)])
    assert np.array_equal(read(path, -3.0).video, read(path, 0.0).video)


def test_one_frame(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(9)])
    assert numbers(read(path, 0.0, 2.0, 8).video) == [9] * 8


def test_the_same_file_twice_gives_the_same_bytes(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(i) for i in range(10)], wave=tone(440, 1.0, RATE))
    one, two = read(path, 0.3, 0.5), read(path, 0.3, 0.5)
    assert np.array_equal(one.video, two.video)
    assert np.array_equal(one.audio, two.audio)


# Pictures.


def corners(height: int = 48, width: int = 48) -> np.ndarray:
    """Red, green / blue, yellow: a picture of which every turn and mirror image differs."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (220, 30, 30)
    picture[: height // 2, width // 2 :] = (30, 200, 30)
    picture[height // 2 :, : width // 2] = (30, 30, 220)
    picture[height // 2 :, width // 2 :] = (220, 220, 30)
    return picture


def named(picture: np.ndarray) -> str:
    """The colours of the four quarters: top left, top right, bottom left, bottom right."""
    known = {"r": (220, 30, 30), "g": (30, 200, 30), "b": (30, 30, 220), "y": (220, 220, 30)}
    h, w = picture.shape[:2]
    found = ""
    for y in (h // 4, 3 * h // 4):
        for x in (w // 4, 3 * w // 4):
            spot = picture[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
            found += min(known, key=lambda name: np.abs(spot - known[name]).sum())
    return found


def test_colours_are_red_green_blue(tmp_path):
    path = write(tmp_path / "a.mp4", [corners()] * 4)
    video = read(path, size=48).video
    assert video.dtype == np.uint8
    assert video.shape == (4, 48, 48, 3)
    assert named(video[0]) == "rgby"
    assert np.abs(video[0, 12, 12].astype(int) - (220, 30, 30)).max() < 25


def turn(path: Path, degrees: int) -> None:
    """Rewrites the mp4's display matrix: the picture is shown turned clockwise by the degrees."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    one, minus = (1 << 16).to_bytes(4, "big"), ((1 << 32) - (1 << 16)).to_bytes(4, "big")
    zero, last = bytes(4), (1 << 30).to_bytes(4, "big")
    a, b, c, d = {90: (zero, one, minus, zero), 180: (minus, zero, zero, minus), 270: (zero, minus, one, zero)}[degrees]
    content[place : place + 36] = a + b + zero + c + d + zero + zero + zero + last
    path.write_bytes(content)


@pytest.mark.parametrize(("degrees", "seen"), [(90, "bryg"), (180, "ybgr"), (270, "gyrb")])
def test_rotation_is_applied(tmp_path, degrees, seen):
    path = write(tmp_path / "a.mp4", [corners()] * 4)
    turn(path, degrees)
    assert named(read(path, size=48).video[0]) == seen


def test_rotation_comes_before_the_crop(tmp_path):
    # 96 wide, 48 high, turned: 48 wide, 96 high. The crop's y then runs along the long side.
    path = write(tmp_path / "a.mp4", [np.concatenate([corners(), grey(30, 48, 48)], 1)] * 4)
    turn(path, 90)
    assert named(read(path, size=48, crop=Crop(y=0.0, x=0.5)).video[0]) == "bryg"
    assert numbers(read(path, size=48, crop=Crop(y=1.0, x=0.5)).video)[0] == 30


def test_flip_mirrors_left_and_right(tmp_path):
    path = write(tmp_path / "a.mp4", [corners()] * 4)
    plain, flipped = read(path).video, read(path, crop=Crop(flip=True)).video
    assert named(flipped[0]) == "gryb"
    assert np.array_equal(flipped[:, :, ::-1], plain)


def test_crop_keeps_the_part_it_names(tmp_path):
    path = write(tmp_path / "a.mp4", [corners(64, 64)] * 4)
    for y, x, colour in ((0.0, 0.0, "r"), (0.0, 1.0, "g"), (1.0, 0.0, "b"), (1.0, 1.0, "y")):
        assert named(read(path, size=24, crop=Crop(y=y, x=x, area=0.45**2)).video[0]) == colour * 4
    assert named(read(path, size=24, crop=Crop(y=0.5, x=0.5, area=0.25)).video[0]) == "rgby"


def test_wide_picture_is_cut_to_the_middle_square_and_not_squeezed(tmp_path):
    wide = np.concatenate([grey(0, 48, 24), corners(), grey(0, 48, 24)], 1)
    path = write(tmp_path / "a.mp4", [wide] * 4)
    picture = read(path, size=48).video[0]
    assert named(picture) == "rgby"
    assert picture[4:20, 2:6].mean() > 60  # no margin is left
    assert numbers(read(path, size=48, crop=Crop(x=0.0)).video[:, :, :20])[0] == 0


@pytest.mark.parametrize("size", [1, 7, 33, 200])
@pytest.mark.parametrize("shape", [(50, 86), (86, 50), (16, 320)])
def test_any_shape_gives_the_square_asked_for(tmp_path, shape, size):
    path = write(tmp_path / "a.mp4", [grey(5, *shape)] * 2)
    for crop in (Crop(), Crop(1.0, 1.0, 0.2), Crop(0.3, 1.0, 0.5, 2.0), Crop(0.0, 1.0, 0.9, 0.7, True)):
        video = read(path, frames=2, size=size, crop=crop).video
        assert video.shape == (2, size, size, 3)
        assert numbers(video) == [5, 5]


# Sound.


@pytest.mark.parametrize(("suffix", "sound"), [("mp4", "aac"), ("mkv", "aac"), ("mkv", "pcm_s16le")])
@pytest.mark.parametrize("start", [0.0, 0.7, 1.31])
def test_sound_is_of_the_same_window_as_the_pictures(tmp_path, suffix, sound, start):
    # White exactly when it clicks: at 1.5 s.
    times = [i / 20 for i in range(60)]
    pictures = [grey(31 if i == 30 else 0) for i in range(60)]
    path = write(tmp_path / f"a.{suffix}", pictures, times, click([1.5], 3.0, 48000, 2), rate=48000, sound=sound)
    got = read(path, start, 1.0, 20)
    assert got.audio.shape == (RATE,)
    assert got.audio.dtype == np.float32
    heard = start + np.abs(got.audio).argmax() / RATE
    seen = start + numbers(got.video).index(31) / 20 if 31 in numbers(got.video) else None
    if start == 0.0:  # the window ends before
        assert np.abs(got.audio).max() < 0.1
        assert seen is None
    else:
        assert abs(heard - 1.501) < 0.004
        assert abs(seen - 1.5) < 0.05


def test_stereo_at_44100_becomes_mono_at_16000(tmp_path):
    wave = np.concatenate([tone(440, 2.0, 44100), tone(1000, 2.0, 44100, loud=0.2)])
    path = write(tmp_path / "a.wav", wave=wave, rate=44100, sound="pcm_s16le")
    audio = read(path, 0.5, 1.0).audio
    assert audio.shape == (RATE,)
    assert abs(pitch_of(audio) - 440) <= 1
    spectrum = np.abs(np.fft.rfft(audio))
    assert spectrum[1000] > 0.2 * spectrum[440]  # the other channel is in the mix
    assert np.abs(audio).max() <= 1.0


def test_resampling_does_not_shift_or_stretch(tmp_path):
    moments = [0.25, 1.75, 3.5, 4.75]
    path = write(tmp_path / "a.wav", wave=click(moments, 5.0, 44100, 2), rate=44100, sound="pcm_s16le")
    audio = np.abs(read(path, 0.0, 5.0).audio)
    for moment in moments:
        near = slice(round((moment - 0.1) * RATE), round((moment + 0.1) * RATE))
        loud = np.flatnonzero(audio[near] > 0.25)
        assert abs((near.start + loud[0]) / RATE - moment) < 0.002
        assert abs((near.start + loud[-1]) / RATE - moment - 0.002) < 0.002


def test_other_sample_rates_can_be_asked_for(tmp_path):
    path = write(tmp_path / "a.wav", wave=tone(440, 1.0, 16000), sound="pcm_s16le")
    got = media.decode(str(path), pick=lambda _: 0.0, seconds=1.0, frames=1, size=8, sample_rate=22050)
    assert got.audio.shape == (22050,)
    assert abs(pitch_of(got.audio, 22050) - 440) <= 1


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_sound_that_starts_late_is_silent_before(tmp_path, suffix):
    pictures = [grey(i) for i in range(20)]
    path = write(tmp_path / f"a.{suffix}", pictures, wave=tone(500, 1.0, RATE), audio_start=0.7)
    audio = np.abs(read(path, 0.0, 2.0).audio)
    assert audio[: round(0.66 * RATE)].max() < 0.02
    assert audio[round(0.74 * RATE) : round(1.6 * RATE)].max() > 0.4
    first = np.flatnonzero(audio > 0.2)[0] / RATE
    assert abs(first - 0.7) < 0.03
    # The same moment in a window that starts later.
    later = np.abs(read(path, 0.4, 1.0).audio)
    assert abs(np.flatnonzero(later > 0.2)[0] / RATE - 0.3) < 0.03


def test_sound_that_ends_early_is_silent_after(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(i) for i in range(20)], wave=tone(500, 0.8, RATE))
    audio = np.abs(read(path, 0.4, 1.5).audio)
    assert audio[: round(0.35 * RATE)].max() > 0.4
    assert audio[round(0.5 * RATE) :].max() < 0.02


def test_loud_sound_stays_within_one(tmp_path):
    square = np.sign(tone(300, 1.0, 44100, 2)) * 0.99
    path = write(tmp_path / "a.mp4", [grey(3)] * 10, wave=square, rate=44100)
    assert 0.8 < np.abs(read(path).audio).max() <= 1.0


# One stream only.


def test_video_only(tmp_path):
    got = read(write(tmp_path / "a.mp4", [grey(i) for i in range(10)]))
    assert got.audio is None
    assert got.video.shape == (4, 32, 32, 3)


def test_audio_only(tmp_path):
    got = read(write(tmp_path / "a.wav", wave=tone(440, 1.0, RATE), sound="pcm_s16le"))
    assert got.video is None
    assert abs(pitch_of(got.audio) - 440) <= 1


def test_only_what_is_wanted_is_decoded(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(i) for i in range(10)], wave=tone(440, 1.0, RATE))
    assert read(path, want=("video",)).audio is None
    assert read(path, want=("audio",)).video is None
    with pytest.raises(DecodeError) as error:
        read(write(tmp_path / "b.mp4", [grey(1)] * 3), want=("audio",))
    assert error.value.reason in media.REASONS


def test_an_open_file_is_read_and_left_open(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(i) for i in range(10)])
    with path.open("rb") as file:
        got = media.decode(file, pick=lambda _: 0.0, seconds=1.0, frames=4, size=32, sample_rate=RATE)
        assert not file.closed
    assert np.array_equal(got.video, read(path).video)


def spoil(path: Path, kind: str) -> Path:
    """Copies an mp4 with the packets of one stream replaced by noise."""
    target = path.with_name(f"{kind}-spoilt.mkv")
    rng = np.random.default_rng(0)
    with av.open(str(path)) as source, av.open(str(target), "w") as sink:
        streams = {stream.index: sink.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is None:
                continue
            copy = packet
            if packet.stream.type == kind:
                copy = av.Packet(rng.integers(0, 256, packet.size, np.uint8).tobytes())
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe = packet.is_keyframe
            copy.stream = streams[packet.stream.index]
            sink.mux(copy)
    return target


def test_sound_survives_pictures_that_cannot_be_decoded(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(i) for i in range(10)], wave=tone(440, 1.0, RATE))
    got = read(spoil(path, "video"))
    assert got.video is None
    assert abs(pitch_of(got.audio) - 440) <= 2


def test_pictures_survive_sound_that_cannot_be_decoded(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(i) for i in range(10)], wave=tone(440, 1.0, RATE))
    got = read(spoil(path, "audio"))
    assert np.abs(np.subtract(numbers(got.video), [1, 3, 6, 8])).max() <= 1  # the copy moves the zero a little


def test_a_stream_that_no_decoder_knows(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(i) for i in range(10)])
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    assert reason(path) == "undecodable"
    path = write(tmp_path / "b.mp4", [grey(i) for i in range(10)], wave=tone(440, 1.0, RATE))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    got = read(path)
    assert got.video is None
    assert abs(pitch_of(got.audio) - 440) <= 2


def test_sound_that_changes_its_format_on_the_way(tmp_path):
    one = write(tmp_path / "a.aac", wave=tone(440, 1.0, 44100, 2), rate=44100)
    two = write(tmp_path / "b.aac", wave=tone(880, 1.0, 32000), rate=32000)
    path = tmp_path / "c.aac"
    path.write_bytes(one.read_bytes() + two.read_bytes())
    audio = read(path, 0.0, 2.0).audio
    assert abs(pitch_of(audio[: round(0.9 * RATE)]) - 440) <= 2
    assert abs(pitch_of(audio[round(1.2 * RATE) : round(1.9 * RATE)]) - 880) <= 3


# Files that are broken, or are something else.


def test_a_truncated_file_keeps_what_decoded(tmp_path):
    noise = np.random.default_rng(0)
    times = [i / 10 for i in range(30)]
    # Grain over the grey makes packets large: the cut then falls among them.
    pictures = [np.clip(grey(i) + noise.integers(-3, 4, (48, 64, 3)), 0, 255).astype(np.uint8) for i in range(30)]
    path = write(tmp_path / "a.mkv", pictures, times)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    seen = numbers(read(path, 0.0, 3.0, 30).video)
    assert seen[:10] == list(range(10))
    assert 10 <= seen[-1] < 25
    assert seen == sorted(seen)
    # A window past what is left is drawn again within it; a fixed one lies outside.
    lengths = []

    def late(length):
        lengths.append(length)
        return length - 0.4

    got = media.decode(str(path), pick=late, seconds=0.3, frames=2, size=32, sample_rate=RATE)
    assert lengths[0] == pytest.approx(3.0, abs=0.15) and lengths[1] < 2.0
    assert 8 <= numbers(got.video)[-1] < 25
    assert got.remarks["length corrected"]
    with pytest.raises(DecodeError) as error:
        read(path, 2.6, 0.3, 2)
    assert error.value.reason == "span outside"


def test_an_mp4_without_its_index_is_undecodable(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(i) for i in range(30)], wave=tone(440, 3.0, RATE))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # the index stands at the end
    assert reason(path) == "undecodable"


def reason(path) -> str:
    """Why the path gives nothing; one of the known reasons."""
    with pytest.raises(DecodeError) as error:
        read(path)
    assert error.value.reason in media.REASONS
    assert str(error.value).startswith(error.value.reason)
    return error.value.reason


def test_a_missing_file(tmp_path):
    assert reason(tmp_path / "none.mp4") == "missing"
    assert reason(tmp_path / "no" / "folder" / "none.mp4") == "missing"


def test_a_directory(tmp_path):
    assert reason(tmp_path) == "unreadable"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 4096,
        b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>gone</body></html>\n",
        bytes(np.random.default_rng(1).integers(0, 256, 20000, np.uint8)),
    ],
    ids=["empty", "zeros", "html", "noise"],
)
def test_what_is_no_media(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    assert reason(path) in ("undecodable", "no streams", "no frames")


def test_noise_cut_into_a_good_file_never_escapes(tmp_path):
    source = write(tmp_path / "a.mp4", [grey(i) for i in range(20)], wave=tone(440, 2.0, RATE)).read_bytes()
    rng = np.random.default_rng(2)
    outcomes = set()
    for trial in range(40):
        content = bytearray(source)
        for _ in range(rng.integers(1, 40)):
            content[rng.integers(len(content))] = rng.integers(256)
        path = tmp_path / f"{trial}.mp4"
        path.write_bytes(content[: len(content) if trial % 2 else rng.integers(len(content))])
        try:
            got = read(path, float(rng.uniform(0, 2)))
            assert got.video is None or got.video.shape == (4, 32, 32, 3)
            assert got.audio is None or (got.audio.shape == (RATE,) and np.isfinite(got.audio).all())
            outcomes.add("decoded")
        except DecodeError as error:
            outcomes.add(error.reason)
    assert {"decoded"} < outcomes <= {"decoded", *media.REASONS}


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile '{path}'\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\n{path}\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT3S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{path}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "ffconcat"])
def test_a_playlist_opens_nothing(tmp_path, kind, suffix):
    inner = write(tmp_path / "inner.mp4", [grey(9)] * 10)
    path = tmp_path / f"list.{suffix}"
    path.write_text(PLAYLISTS[kind].format(path=inner))
    assert reason(path) == "undecodable"
    path.write_text(PLAYLISTS[kind].format(path=inner.name))
    assert reason(path) == "undecodable"


NAMES = (
    "http://127.0.0.1:9/a.mp4", "https://127.0.0.1:9/a.mp4", "concat:inner.mp4|inner.mp4", "file:inner.mp4",
    "subfile,,start,0,end,0,,:inner.mp4", "data:video/mp4;base64,AAAA", "pipe:0", "cache:inner.mp4", "tcp://127.0.0.1:9",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_never_taken_for_a_protocol(tmp_path, monkeypatch, name):
    write(tmp_path / "inner.mp4", [grey(9)] * 10)
    monkeypatch.chdir(tmp_path)
    assert reason(name) == "missing"


def test_a_file_with_such_a_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "inner.mp4", [grey(9)] * 10).rename(tmp_path / "concat:a|b.mp4")
    assert numbers(read("concat:a|b.mp4").video) == [9] * 4


def test_a_picture_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", [grey(3, 96, 128)] * 3)
    assert read(path).video is not None
    monkeypatch.setattr(media, "_MAX_PIXELS", 64 * 64)
    assert reason(path) in ("too large", "undecodable")


@pytest.mark.parametrize("start", [math.nan, math.inf, 1e300])
def test_a_start_that_is_no_time_is_an_error_of_the_file(tmp_path, start):
    path = write(tmp_path / "a.mp4", [grey(3)] * 3)
    try:
        outcome = numbers(read(path, start).video)
    except DecodeError as error:
        outcome = error.reason
    assert outcome in ([3] * 4, *media.REASONS)


def test_no_file_stays_open(tmp_path):
    good = write(tmp_path / "a.mp4", [grey(i) for i in range(5)])
    bad = tmp_path / "b.mp4"
    bad.write_bytes(b"<html>" * 100)
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here to count open files")
    read(good)
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        read(good)
        reason(bad)
    assert len(list(descriptors.iterdir())) <= before


@pytest.mark.parametrize("codec", ["flac", "libspeex", "libvorbis", "libopus"])
def test_a_window_of_ogg_is_where_it_is_in_the_whole(codec: str, tmp_path):
    """Pages of Ogg tell their end: behind a seek, FLAC and Speex were up to a second off, without a word."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg writes no {codec}")
    rate, seconds = (48000 if codec == "libopus" else 16000), 4
    time = np.arange(rate * seconds) / rate
    wave = (0.4 * np.sin(2 * np.pi * (200 * time + 150 * time**2))).astype(np.float32)  # never twice the same pitch
    path = tmp_path / "sweep.ogg"
    with av.open(str(path), "w", format="ogg") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        stream.codec_context.open()
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(stream.format, "mono", rate, size)
        for place in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(
                (wave[place : place + 1024] * 32767).astype(np.int16)[None], "s16", "mono"
            )
            frame.sample_rate, frame.pts, frame.time_base = rate, place, Fraction(1, rate)
            for part in resampler.resample(frame):
                container.mux(stream.encode(part))
        container.mux(stream.encode())

    def sound(start: float, length: float) -> np.ndarray:
        return media.decode(
            path, pick=lambda _: start, seconds=length, frames=1, size=8, sample_rate=16000, want=("audio",)
        ).audio  # fmt: skip

    whole = sound(0.0, float(seconds))
    for start in (0.4, 1.1, 1.7, 2.3, 2.9, 3.3):
        part = whole[int(start * 16000) :][:8000]
        assert np.corrcoef(sound(start, 0.5), part)[0, 1] > 0.99, start
