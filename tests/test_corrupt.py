"""Noise of an evaluation: what each corruption does, and that it depends on the clip alone."""

import numpy as np
import pytest

from vmm.corrupt import CORRUPTIONS, SEVERITIES, Captions, corrupt
from vmm.errors import UserError
from vmm.types import Batch

CLIPS, RATE = 24, 1000
TEXTS = [f"caption {i // 2}" if i else "" for i in range(CLIPS)]  # two clips each, the first without
IDS = np.repeat([[int(text.rpartition(" ")[2] or 99)] for text in TEXTS], 3, axis=1).astype(np.int32)
CAPTIONS = Captions(TEXTS, IDS)


def batch(rows=np.arange(CLIPS)) -> Batch:
    rng = np.random.default_rng(0)
    video = rng.integers(60, 196, (CLIPS, 6, 28, 28, 3)).astype(np.uint8)
    audio = np.sin(np.arange(1500) / 3 * rng.uniform(0.5, 1, (CLIPS, 1))).astype(np.float32)
    present = {name: np.ones(CLIPS, bool) for name in ("video", "audio", "text")}
    present["audio"][3] = present["text"][0] = False
    audio[3] = 0
    one = Batch(
        {"video": video, "audio": audio, "text": IDS}, present, {"kind": np.arange(CLIPS)}, np.arange(CLIPS),
        np.ones(CLIPS, bool),
    )  # fmt: skip
    return one._replace(
        inputs={key: value[rows] for key, value in one.inputs.items()},
        present={key: value[rows] for key, value in one.present.items()},
        labels={}, index=rows, valid=one.valid[rows],
    )  # fmt: skip


def run(name: str, severity: int, rows=np.arange(CLIPS), **options) -> Batch:
    return corrupt(batch(rows), rows, name, severity, RATE, CAPTIONS, **options)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_clip_suffers_the_same_in_any_batch(name):
    whole, rows = run(name, 3), np.array([17, 2, 0, 3, 5])
    part = run(name, 3, rows)
    other = run(name, 3, seed=1)
    stream = CORRUPTIONS[name].stream
    assert np.array_equal(part.inputs[stream], whole.inputs[stream][rows])
    assert np.array_equal(part.present[stream], whole.present[stream][rows])
    if name != "blur":
        moved = [
            not np.array_equal(getattr(whole, f)[stream], getattr(other, f)[stream]) for f in ("inputs", "present")
        ]
        assert any(moved), "another seed, other noise"
    for field in ("inputs", "present"):
        for key, value in getattr(batch(), field).items():
            got = getattr(whole, field)[key]
            assert got.dtype == value.dtype and got.shape == value.shape
            if key != stream:
                assert np.array_equal(got, value), f"{name} leaves {key} alone"
    assert not whole.present["audio"][3] and not whole.present["text"][0], "nothing appears"
    before = batch()
    corrupt(before, np.arange(CLIPS), name, 5, RATE, CAPTIONS)
    assert all(np.array_equal(value, batch().inputs[key]) for key, value in before.inputs.items()), "not in place"


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_grows(name):
    """The mean distance from the clean batch rises with every severity."""
    clean, stream = batch(), CORRUPTIONS[name].stream
    distances = []
    for severity in SEVERITIES:
        made = run(name, severity)
        moved = (made.inputs[stream].astype(float) - clean.inputs[stream]) ** 2
        changed = (made.inputs[stream] != clean.inputs[stream]).reshape(CLIPS, -1).any(1)
        distances.append(changed.mean() if stream == "text" else moved.mean())
    # The weakest blur is less than a picture of 28 pixels can show.
    assert distances[0] > 0 or name == "blur"
    assert all(a <= b for a, b in zip(distances, distances[1:])) and distances[0] < distances[-1]


def test_frozen_frames_repeat_the_one_before():
    clean, made = batch().inputs["video"], run("frame_drop", 5).inputs["video"]
    frozen = 0
    for i in range(CLIPS):
        assert np.array_equal(made[i, 0], clean[i, 0])
        for t in range(1, 6):
            again = np.array_equal(made[i, t], made[i, t - 1])
            assert again or np.array_equal(made[i, t], clean[i, t])
            frozen += again
    assert frozen / (CLIPS * 5) == pytest.approx(0.7, abs=0.12)


def test_blur_keeps_the_mean_and_pixels_get_the_told_noise():
    clean = batch().inputs["video"].astype(float)
    blurred = run("blur", 5).inputs["video"].astype(float)
    assert blurred.mean() == pytest.approx(clean.mean(), abs=0.5)
    for t in range(1, 6):  # frames do not run into one another
        assert np.abs(np.corrcoef(blurred[:, t].ravel(), clean[:, t - 1].ravel())[0, 1]) < 0.05
    noisy = run("pixel_noise", 1).inputs["video"] - clean
    assert noisy.std() == pytest.approx(0.08 * 255, rel=0.03)


@pytest.mark.parametrize(("severity", "decibels"), [(1, 20), (3, 10), (5, 0)])
def test_hiss_has_the_told_ratio(severity, decibels):
    clean, made = batch().inputs["audio"], run("audio_noise", severity).inputs["audio"]
    for i in range(CLIPS):
        noise = (made[i] - clean[i]).astype(float)
        if i == 3:
            assert not noise.any(), "a clip without sound gets none"
        else:
            assert 10 * np.log10((clean[i] ** 2).mean() / (noise**2).mean()) == pytest.approx(decibels, abs=0.01)


def test_dropouts_are_tenths_of_a_second():
    clean, made = batch().inputs["audio"], run("audio_dropout", 4).inputs["audio"]
    gone = (made != clean).reshape(CLIPS, 15, 100).any(2)
    silent = (made.reshape(CLIPS, 15, 100) == 0).all(2)
    assert (gone <= silent).all() and gone[[i for i in range(CLIPS) if i != 3]].mean() == pytest.approx(0.5, abs=0.1)


def test_missing_and_wrong_hit_more_clips_each_time():
    for name, field in (("missing_video", "present"), ("wrong_caption", "inputs")):
        stream, before = CORRUPTIONS[name].stream, np.zeros(CLIPS, bool)
        for severity, share in zip(SEVERITIES, CORRUPTIONS[name].levels):
            made = getattr(run(name, severity), field)[stream]
            clean = getattr(batch(), field)[stream]
            hit = (made != clean).reshape(CLIPS, -1).any(1)
            assert (before <= hit).all() and hit.mean() == pytest.approx(share, abs=0.25)
            before = hit
        assert hit[batch().present[stream]].all(), "severity 5: every clip"


def test_a_wrong_caption_is_another_clips_and_says_something_else():
    made = run("wrong_caption", 5).inputs["text"]
    for i in range(1, CLIPS):
        assert made[i, 0] in IDS[1:, 0] and made[i, 0] != IDS[i, 0] and made[i, 0] != 99
    with pytest.raises(UserError, match="one and the same caption"):
        corrupt(batch(), np.arange(CLIPS), "wrong_caption", 5, RATE, Captions(["a"] * CLIPS, IDS))


def test_unknown_noise():
    with pytest.raises(UserError, match="did you mean 'blur'"):
        run("blurr", 1)
    with pytest.raises(UserError, match="severity is 1 to 5"):
        run("blur", 6)
