"""Summaries: the knapsack, the scores, and the file that is written."""

import itertools

import av
import numpy as np
import pytest

from vmm.data import media, world
from vmm.data.cut import write_parts
from vmm.errors import StorageError, UserError
from vmm.evals.summary import Summary, agreement, f_score, knapsack, merged, summarise


def test_the_knapsack_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(40):
        count, room = int(rng.integers(1, 8)), int(rng.integers(0, 12))
        values, lengths = rng.uniform(size=count), rng.integers(1, 6, count)
        chosen = knapsack(values, lengths, room)
        best = max(
            values[list(some)].sum()
            for size in range(count + 1)
            for some in itertools.combinations(range(count), size)
            if lengths[list(some)].sum() <= room
        )
        assert lengths[chosen].sum() <= room and values[chosen].sum() == pytest.approx(best)


def test_a_summary_is_of_whole_segments_within_its_share():
    scores = np.array([0, 0, 5, 1, 2, 2, 0, 9, 3, 4.0])
    assert np.flatnonzero(summarise(scores, 2, 0.4)).tolist() == [6, 7, 8, 9]
    assert np.flatnonzero(summarise(scores, 2, 0.39)).tolist() == [6, 7]  # three moments hold one segment
    assert summarise(scores, 3, 1.0).all() and not summarise(scores, 2, 0.1).any()
    assert np.array_equal(summarise(scores - 7, 2, 0.4), summarise(scores, 2, 0.4))  # scores may be below 0


def test_f_score_and_agreement_by_hand():
    a, b = np.array([1, 1, 0, 0, 1], bool), np.array([0, 1, 1, 0, 1], bool)
    assert f_score(a, b) == pytest.approx(2 / 3) and f_score(a, a) == 1 and f_score(a, ~a) == 0
    assert agreement(np.array([1, 2, 3.0]), np.array([10, 20, 15.0])) == pytest.approx((1 / 3, 0.5))
    assert agreement(np.ones(3), np.array([1, 2, 3.0])) == (0.0, 0.0)


def test_windows_are_merged_by_their_time():
    curves = np.array([[1, 2, 3, 4], [5, 6, 7, np.nan]])
    got = merged(np.array([10.0, 11.0]), curves, 0.5)  # the second begins where the third number stands
    assert got[:5].tolist() == [1, 2, 4, 5, 7] and np.isnan(got[5]) and len(got) == 6
    far = merged(np.array([0.0, 3.0]), np.ones((2, 2)), 1.0)
    assert np.isnan(far[2]) and far[[0, 1, 3, 4]].tolist() == [1, 1, 1, 1]


class Told:
    def __init__(self, said, true, windows=2):
        count = len(true) // windows
        self.rows = {
            "moments/importance": said, "target/importance": true, "moments/seconds": np.full(len(true), 4.0),
            "row": np.repeat(np.arange(count), windows), "start": np.tile(2.0 * np.arange(windows), count),
            "present/video": np.ones(len(true), bool),
        }  # fmt: skip

    def ask(self, data, subset):
        return self.rows if subset == "V" else None


def test_summary_of_truth_and_of_noise():
    rng = np.random.default_rng(1)
    # Two windows of 8 numbers over 4 s, which overlap by half: 12 moments a clip.
    whole = rng.uniform(size=(100, 12))
    true = np.stack([whole[:, :8], whole[:, 4:]], 1).reshape(200, 8)
    got = Summary("test", subsets=("V", "A"), share=0.25)(Told(true, true))
    assert [got[f"V/{name}"] for name in ("F", "spearman", "kendall")] == pytest.approx([1, 1, 1]) and "A/F" not in got
    noise = Summary("test", subsets=("V",), share=0.25)(Told(rng.uniform(size=(200, 8)), true))
    assert noise["V/F"] == pytest.approx(noise["chance/V"], abs=0.06) == pytest.approx(0.25, abs=0.06)
    assert noise["V/spearman"] == pytest.approx(0, abs=0.08)
    with pytest.raises(UserError, match=r"no curve 'import' is asked for|no curve 'import' is predicted"):
        Summary("test", curve="import", subsets=("V",))(Told(true, true))


def test_parts_of_a_file_come_with_their_sound(tmp_path):
    """A picture tells its time by its brightness, the sound by its pitch: 300 Hz in the first second, 600 in the second …"""
    time = np.arange(4 * world.RATE) / world.RATE
    wave = (0.4 * np.sin(2 * np.pi * 300 * (np.floor(time) + 1) * time)).astype(np.float32)
    video = np.repeat(np.arange(48, dtype=np.uint8) * 4 + 20, 64 * 64 * 3).reshape(48, 64, 64, 3)
    world.write_media(tmp_path / "in.mp4", video, wave)
    write_parts(tmp_path / "in.mp4", [(3.0, 3.5), (1.0, 2.0)], tmp_path / "out.mp4")
    got = media.decode(tmp_path / "out.mp4", pick=lambda d: 0.0, seconds=1.5, frames=18, size=64, sample_rate=16000)
    seen = (got.video.mean((1, 2, 3)) - 20) / 4
    assert seen == pytest.approx([*range(36, 42), *range(12, 24)], abs=1.0)
    for first, last, pitch in ((0.1, 0.4, 1200), (0.6, 1.4, 600)):
        piece = got.audio[round(first * 16000) : round(last * 16000)]
        spectrum = np.abs(np.fft.rfft(piece))
        assert spectrum.argmax() * 16000 / len(piece) == pytest.approx(pitch, abs=5)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.duration / av.time_base == pytest.approx(1.5, abs=0.1)
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_what_cannot_be_cut_is_one_line(tmp_path):
    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"no\.mp4: cannot be decoded"):
        write_parts(tmp_path / "no.mp4", [(0.0, 1.0)], tmp_path / "out.mp4")
    world.write_media(tmp_path / "in.mp4", np.zeros((12, 64, 64, 3), np.uint8), None)
    with pytest.raises(UserError, match="no part"):
        write_parts(tmp_path / "in.mp4", [], tmp_path / "out.mp4")
    with pytest.raises(StorageError, match="cannot be written"):
        write_parts(tmp_path / "in.mp4", [(0.0, 0.5)], tmp_path / "none" / "out.mp4")
    write_parts(tmp_path / "in.mp4", [(0.0, 0.5)], tmp_path / "out.mp4")  # a file without sound
    assert media.probe_duration(tmp_path / "out.mp4") == pytest.approx(0.5, abs=0.05)
