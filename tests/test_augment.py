"""Augmentation on the device, against hand-made truth; the same on any mesh, in any batch."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config, tiny_config
from jax.sharding import NamedSharding, PartitionSpec
from test_layers import parameters

from vmm.augment import CutMix, MixUp, SpecAugment, augment, colour_factors, cut, draw, jitter_colour, mix, spec_augment
from vmm.data.samples import Augment, _withhold
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.model import sample_keys
from vmm.objectives.classify import Classify
from vmm.sharding import MeshShape, make_mesh
from vmm.types import Batch, Outputs, Patches, Tokens

SIZE = 8


def keys(seed: int = 0, index=range(SIZE)):
    return sample_keys(jax.random.key(seed), jnp.asarray(list(index)))


def make_batch(present=None, labels=None) -> Batch:
    rng = np.random.default_rng(0)
    there = {name: jnp.ones(SIZE, bool) for name in ("video", "audio", "text")} | (present or {})
    return Batch(
        inputs={
            "video": jnp.asarray(rng.integers(0, 256, (SIZE, 2, 6, 5, 3)), jnp.uint8),
            "audio": jnp.asarray(rng.uniform(-1, 1, (SIZE, 50)), jnp.float32),
            "text": jnp.asarray(rng.integers(1, 9, (SIZE, 4)), jnp.int32),
        },
        present=there,
        labels=labels or {"kind": jnp.arange(SIZE, dtype=jnp.int32)},
        index=jnp.arange(SIZE, dtype=jnp.int32),
        valid=jnp.ones(SIZE, bool),
    )


def by_hand(pixels: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """The same changes one after the other, in the words of the docstring."""
    grey = np.array([0.299, 0.587, 0.114])
    pixels = pixels.astype(np.float64) * brightness
    mean = (pixels @ grey).mean()
    pixels = mean + contrast * (pixels - mean)
    own = (pixels @ grey)[..., None]
    return own + saturation * (pixels - own)


@pytest.mark.parametrize("factors", [(1, 1, 1), (0.6, 1, 1), (1, 0.3, 1), (1, 1, 0), (0.7, 0.5, 0.4), (1.1, 1.6, 1.7)])
def test_colour_is_brightness_then_contrast_then_saturation(factors):
    video = make_batch().inputs["video"]
    each = [jnp.full(SIZE, value, jnp.float32) for value in (*factors, 0.0)]
    got = jitter_colour(video, *each)
    for sample in range(SIZE):
        want = np.clip(by_hand(np.asarray(video[sample]), *factors), 0, 255)
        assert np.abs(np.asarray(got[sample], np.float64) - want).max() <= 0.51
    assert got.dtype == jnp.uint8


def test_hue_turns_the_colour_and_keeps_the_brightness():
    red = jnp.broadcast_to(jnp.asarray([120, 60, 60], jnp.uint8), (3, 1, 2, 2, 3))
    one = jnp.ones(3)
    got = np.asarray(jitter_colour(red, one, one, one, jnp.asarray([0.0, 1 / 3, 2 / 3])))[:, 0, 0, 0]
    assert got[0].tolist() == [120, 60, 60]
    hues = [colorsys.rgb_to_hsv(*(value / 255))[0] for value in got.astype(float)]
    turned = sorted((hue - hues[0]) % 1 for hue in hues[1:])
    assert turned == pytest.approx([1 / 3, 2 / 3], abs=0.06)  # YIQ is not HSV, but thirds are near thirds
    grey = got.astype(float) @ [0.299, 0.587, 0.114]
    assert grey == pytest.approx(grey[0], abs=1.0)


def test_colour_factors_are_of_the_range_and_differ_by_sample():
    many = keys(0, range(2000))
    brightness, contrast, saturation, hue = (np.asarray(value) for value in colour_factors(many, 0.5))
    for factor in (brightness, contrast, saturation):
        assert 0.6 <= factor.min() < 0.61
        assert 1.39 < factor.max() <= 1.4
    assert -0.1 <= hue.min() < -0.098
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 0.1


def test_gain_is_in_decibels_and_never_beyond_full_scale():
    batch = make_batch()
    quiet = batch._replace(inputs=batch.inputs | {"audio": batch.inputs["audio"] * 0.1})
    louder = augment(quiet, keys(), 0.0, 6.0, None).inputs["audio"]
    ratio = np.asarray(louder / quiet.inputs["audio"])
    assert np.allclose(ratio, ratio[:, :1], rtol=1e-4)
    decibels = 20 * np.log10(ratio[:, 0])
    assert np.allclose(decibels, draw(keys(), 2, (), -6.0, 6.0), atol=1e-3)
    assert decibels.min() < -1 < 1 < decibels.max()
    assert np.abs(augment(batch, keys(), 0.0, 40.0, None).inputs["audio"]).max() == 1.0


def test_without_options_nothing_changes():
    batch = make_batch()
    got = augment(batch, keys(), 0.0, 0.0, None)
    assert all(np.array_equal(got.inputs[name], batch.inputs[name]) for name in batch.inputs)
    assert got.mixed is None


def test_one_option_does_not_move_another():
    batch = make_batch()
    both = augment(batch, keys(), 0.5, 6.0, None)
    assert np.array_equal(both.inputs["video"], augment(batch, keys(), 0.5, 0.0, None).inputs["video"])
    assert np.array_equal(both.inputs["audio"], augment(batch, keys(), 0.0, 6.0, None).inputs["audio"])


def test_a_sample_does_not_depend_on_its_batch_or_mesh():
    batch = make_batch()
    whole = augment(batch, keys(7), 0.8, 6.0, None)
    part = jax.tree.map(lambda x: x[3:5], batch)
    alone = augment(part, keys(7, [3, 4]), 0.8, 6.0, None)
    assert np.array_equal(alone.inputs["video"], whole.inputs["video"][3:5])
    assert np.allclose(alone.inputs["audio"], whole.inputs["audio"][3:5], atol=1e-6)
    mesh = make_mesh(MeshShape(data=8))
    split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    for mixup in (None, MixUp()):
        straight = augment(batch, keys(7), 0.8, 6.0, mixup)
        sharded = jax.jit(lambda b, mixup=mixup: augment(b, sample_keys(jax.random.key(7), b.index), 0.8, 6.0, mixup))(
            split
        )
        pixels = np.asarray(sharded.inputs["video"], int) - np.asarray(straight.inputs["video"], int)
        assert np.abs(pixels).max() <= 1  # a half may round either way
        assert np.allclose(sharded.inputs["audio"], straight.inputs["audio"], atol=1e-5)


# SpecAugment.


def spectrogram(batch: int, frames: int, bins: int, patch) -> Patches:
    """Each value of the spectrogram is 1 + its frame + its bin / 1000."""
    values = 1 + np.arange(frames)[:, None] + np.arange(bins) / 1000
    f, m = frames // patch[0], bins // patch[1]
    cut = values.reshape(f, patch[0], m, patch[1]).transpose(0, 2, 1, 3).reshape(1, f * m, -1)
    return Patches(jnp.asarray(np.repeat(cut, batch, 0), jnp.float32), jnp.ones((batch, f * m), bool), (f, m), 0)


def whole(patches: Patches, patch) -> np.ndarray:
    f, m = patches.grid
    values = np.asarray(patches.values).reshape(-1, f, m, *patch).transpose(0, 1, 3, 2, 4)
    return values.reshape(-1, f * patch[0], m * patch[1])


def test_spec_augment_zeroes_whole_bands_and_nothing_else():
    patch, spec = (4, 8), SpecAugment(time_masks=1, time_width=10, mel_masks=1, mel_width=7)
    before = spectrogram(64, 32, 24, patch)
    got, told = whole(spec_augment(before, patch, keys(1, range(64)), spec), patch), whole(before, patch)
    widths = []
    for sample, truth in zip(got, told):
        rows, columns = (sample == 0).all(1), (sample == 0).all(0)
        assert np.array_equal(sample, np.where(rows[:, None] | columns, 0, truth))
        for band in (rows, columns):
            inside = np.flatnonzero(band)
            assert len(inside) == 0 or inside[-1] - inside[0] + 1 == len(inside)  # one band, in one piece
        widths.append((rows.sum(), columns.sum()))
    times, mels = zip(*widths)
    assert (min(times), max(times)) == (0, 10)
    assert (min(mels), max(mels)) == (0, 7)
    assert np.mean(times) == pytest.approx(5, abs=1.2)


def test_spec_augment_is_of_training_only(world_folder):
    plain, noisy = (tiny_config(world_folder, ("audio", "text")) for _ in range(2))
    noisy["data"]["augment"] = dict(spectrogram=dict(time_masks=4, time_width=200))
    plain, noisy = Experiment(plain), Experiment(noisy)
    shapes = plain.batch_shapes(4)
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0, 2, leaf.shape)).astype(leaf.dtype), shapes)
    params = parameters(plain.recipe, batch, keys(0, range(4)))

    def both(experiment):
        said = experiment.recipe.apply({"params": params}, batch, method="predict")
        return said, experiment.loss()(params, params, batch, jax.random.key(1))[0]

    (one, first), (two, second) = (jax.jit(lambda e=e: both(e))() for e in (plain, noisy))
    assert all(np.array_equal(one[key], two[key]) for key in one)
    losses = [first, second]
    assert losses[0] != losses[1]


# MixUp.


def test_mixup_together_mixes_all_with_one_partner_and_tells_the_share():
    batch = make_batch()
    got = mix(batch, keys(2), MixUp(alpha=1.0))
    share = np.asarray(got.mixed.share.sum(1))
    assert 0 <= share.min() < share.max() <= 1
    assert len(set(share.tolist())) == SIZE
    for name in ("video", "audio"):
        x = np.asarray(batch.inputs[name], np.float64)
        part = share.reshape(-1, *(1,) * (x.ndim - 1))
        want = (1 - part) * x + part * x[::-1]
        assert np.abs(np.asarray(got.inputs[name], np.float64) - want).max() < (0.51 if name == "video" else 1e-6)
    assert got.inputs["video"].dtype == jnp.uint8
    assert np.array_equal(got.inputs["text"], batch.inputs["text"])
    assert np.asarray(got.mixed.labels["kind"])[:, 0].tolist() == list(range(SIZE))[::-1]
    assert np.array_equal(got.labels["kind"], batch.labels["kind"])


def test_mixup_within_gives_each_modality_its_own_partner():
    batch = make_batch()
    got = mix(batch, keys(2), MixUp(alpha=1.0, together=False))
    mirrored = np.arange(SIZE)[::-1]
    partners = np.asarray(got.mixed.labels["kind"])
    assert partners[:, 0].tolist() == mirrored.tolist()
    assert partners[:, 1].tolist() == np.roll(mirrored, SIZE // 2).tolist()
    for number, name in enumerate(("video", "audio")):
        x = np.asarray(batch.inputs[name], np.float64)
        part = 2 * np.asarray(got.mixed.share[:, number]).reshape(
            -1, *(1,) * (x.ndim - 1)
        )  # half of the label is each's
        want = (1 - part) * x + part * x[partners[:, number]]
        assert np.abs(np.asarray(got.inputs[name], np.float64) - want).max() < 0.51
    assert not np.allclose(got.mixed.share[:, 0], got.mixed.share[:, 1])


def test_a_stream_that_either_lacks_is_not_mixed():
    there = jnp.arange(SIZE) != 1
    batch = make_batch(present={"audio": there})
    got = mix(batch, keys(2), MixUp(alpha=1.0))
    alone = [1, SIZE - 2]
    assert np.array_equal(got.inputs["audio"][jnp.asarray(alone)], batch.inputs["audio"][jnp.asarray(alone)])
    shares = np.asarray(got.mixed.share)
    assert (shares[alone, 1] == 0).all()
    # Sample 1 has video alone: its label share is that of its video. Sample 6 has both, one of them unmixed.
    full = mix(make_batch(), keys(2), MixUp(alpha=1.0)).mixed.share
    assert shares[1, 0] == pytest.approx(2 * float(full[1, 0]))
    assert shares[6, 0] == pytest.approx(float(full[6, 0]))


def test_classify_weighs_each_source_by_its_share():
    objective = Classify(labels={"kind": SIZE})
    rng = np.random.default_rng(3)
    tokens = Tokens(
        jnp.asarray(rng.normal(size=(SIZE, 2, 4)), jnp.float32), jnp.ones((SIZE, 2), bool), jnp.zeros((SIZE, 2), int)
    )
    outputs = Outputs({}, {"video": tokens}, {}, {})
    labels = jnp.asarray([0, 1, -1, 3, 4, 5, 6, 7], jnp.int32)
    batch = mix(make_batch(labels={"kind": labels}), keys(4), MixUp(alpha=1.0, together=False))
    params = objective.init(jax.random.key(0), outputs, batch)
    got = objective.apply(params, outputs, batch, method="features")["kind"]
    logits = np.asarray(objective.apply(params, outputs, batch, method="predict")["kind"], np.float64)
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    partners, share = np.asarray(batch.mixed.labels["kind"]), np.asarray(batch.mixed.share, np.float64)
    for i in range(SIZE):
        sources = [(int(labels[i]), 1 - share[i].sum()), *zip(partners[i], share[i])]
        if any(label < 0 for label, _ in sources):
            assert got["weight"][i] == 0
        else:
            assert got["weight"][i] == 1
            assert float(got["error"][i]) == pytest.approx(
                -sum(part * log[i, label] for label, part in sources), rel=1e-4
            )
    assert 4 <= float(got["weight"].sum()) < SIZE


@pytest.mark.parametrize("time", [False, True])
def test_cutmix_puts_a_box_of_the_partner(time):
    """Every pixel is the own or the partner's; the partner's are one box, and their share is the label's."""
    count, shape = 400, (4, 8, 10)
    own = np.zeros((count, *shape, 3), np.uint8) + (np.arange(count) % 2)[:, None, None, None, None].astype(np.uint8)
    there = jnp.ones(count, bool)
    batch = make_batch()._replace(
        inputs={"video": jnp.asarray(own), "audio": jnp.ones((count, 3))},
        present={"video": there, "audio": there},
        labels={"kind": jnp.arange(count, dtype=jnp.int32)},
        index=jnp.arange(count),
    )
    got = jax.jit(lambda batch, keys: cut(batch, keys, CutMix(alpha=1.0, time=time)))(batch, keys(3, range(count)))
    assert np.array_equal(got.inputs["audio"], batch.inputs["audio"])
    assert np.asarray(got.mixed.labels["kind"])[:, 0].tolist() == list(range(count))[::-1]
    taken = np.asarray(got.inputs["video"]) != own  # an even clip's partner is odd
    assert (taken == taken[..., :1]).all()
    taken, shares = taken[..., 0], np.asarray(got.mixed.share)[:, 0]
    assert shares == pytest.approx(taken.mean((1, 2, 3)), abs=1e-7)
    if not time:
        assert (taken == taken[:, :1]).all()
    for sample in taken:
        box = np.argwhere(sample)
        if len(box):
            low, high = box.min(0), box.max(0) + 1
            assert sample[tuple(map(slice, low, high))].all() and np.prod(high - low) == len(box)
    # Unclipped shares are uniform for alpha = 1: boxes of all sizes, smaller by what the edges cut off.
    assert shares.min() < 0.02 and shares.max() > 0.6 and 0.2 < shares.mean() < 0.45
    if time:
        assert 0.02 < (taken.any((2, 3)).all(1)).mean() < 0.9  # some boxes last, others do not


def test_cutmix_leaves_those_without_video():
    batch = make_batch(present={"video": jnp.arange(SIZE) != 1})
    got, full = (cut(b, keys(2), CutMix()) for b in (batch, make_batch()))
    alone = np.isin(np.arange(SIZE), [1, SIZE - 2])
    assert (np.asarray(got.mixed.share)[alone] == 0).all()
    assert np.array_equal(got.inputs["video"][alone], batch.inputs["video"][alone])
    assert np.array_equal(got.inputs["video"][~alone], full.inputs["video"][~alone])


def test_with_both_each_sample_has_one_of_them():
    count = 600
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * (count // SIZE)), make_batch())
    batch = batch._replace(index=jnp.arange(count))
    many, mixup, cutmix = keys(5, range(count)), MixUp(alpha=1.0), CutMix(alpha=1.0)
    got = augment(batch, many, 0.0, 0.0, mixup, cutmix)
    mixed, boxed = mix(batch, many, mixup), cut(batch, many, cutmix)
    share = np.asarray(got.mixed.share)
    assert share.shape == (count, 3) and (share.sum(1) <= 1).all()
    first = share[:, :2].any(1)
    assert first.mean() == pytest.approx(0.5, abs=0.08)
    assert not (first & (share[:, 2] > 0)).any()
    for name in ("video", "audio"):
        want = np.where(
            first.reshape(-1, *(1,) * (batch.inputs[name].ndim - 1)), mixed.inputs[name], boxed.inputs[name]
        )
        assert np.array_equal(got.inputs[name], want)
    assert np.array_equal(share[first, :2], mixed.mixed.share[first])
    assert np.array_equal(share[~first, 2:], boxed.mixed.share[~first])
    # Which one is the sample's own matter.
    again = augment(jax.tree.map(lambda x: x[::-1], batch), many[::-1], 0.0, 0.0, mixup, cutmix)
    assert np.array_equal(np.asarray(again.mixed.share)[::-1, :2].any(1), first)


def test_streams_are_withheld_at_their_own_rates():
    """And never the last one: of a clip with sound alone, the sound stays."""
    rng, count = np.random.default_rng(0), 4000
    there = dict(video=True, audio=True, text=True)
    drawn = [_withhold(there, dict(video=0.1, audio=0.5), rng) for _ in range(count)]
    rates = {name: 1 - np.mean([keep[name] for keep in drawn]) for name in there}
    assert rates == pytest.approx(dict(video=0.1, audio=0.5, text=0.0), abs=4 * 0.5 / count**0.5)
    assert all(_withhold(dict(video=False, audio=True), dict(audio=1.0), rng)["audio"] for _ in range(20))
    pairs = [_withhold(dict(video=True, audio=True), dict(video=0.5, audio=0.8), rng) for _ in range(count)]
    assert all(any(keep.values()) for keep in pairs)
    # Both would go with 0.4; then one, evenly drawn, stays.
    alone = np.mean([keep["audio"] and not keep["video"] for keep in pairs])
    assert alone == pytest.approx(0.5 * 0.2 + 0.4 / 2, abs=0.03)
    # One number for all draws as it always did.
    one, two = (np.random.default_rng(1) for _ in range(2))
    assert [_withhold(there, 0.3, one) for _ in range(50)] == [
        _withhold(there, dict.fromkeys(there, 0.3), two) for _ in range(50)
    ]


@pytest.mark.parametrize(
    ("drop", "words"), [(dict(sound=0.1), "drop.sound"), (dict(audio=2), "probability"), (-1, "probability")]
)
def test_wrong_rates_are_errors(drop, words):
    with pytest.raises(UserError, match=words):
        Augment(drop=drop)


@pytest.mark.parametrize(
    ("cutmix", "words"),
    [(dict(), None), (dict(alpha=1.0), "contrast"), (dict(alpha=0.0), "alpha"), (dict(beta=1), "beta")],
)
def test_cutmix_where_it_cannot_be(world_folder, cutmix, words):
    config = small_config(world_folder)
    config["data"]["augment"] = dict(cutmix=cutmix)
    if words is None:
        assert Experiment(config).cutmix is None
        return
    with pytest.raises(UserError, match=r"data\.augment\.cutmix") as error:
        Experiment(config)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("mixup", "words"),
    [
        (dict(alpha=0.4), "contrast"),
        (dict(modalities=("text",)), "text cannot"),
        (dict(share=1), "share"),
        (dict(alpha=0.0), "alpha"),
    ],
)
def test_mixup_where_it_cannot_be(world_folder, mixup, words):
    config = small_config(world_folder)
    config["data"]["augment"] = dict(mixup=mixup)
    with pytest.raises(UserError, match=r"data\.augment\.mixup") as error:
        Experiment(config)
    assert words in str(error.value)


@pytest.mark.exhaustive("each augmentation is tested by itself")
def test_a_run_trains_with_everything_on(world_folder, tmp_path):
    from vmm.train import train

    config = tiny_config(world_folder, ("video", "audio"))
    config["objectives"] = {"labels": dict(kind="classify", labels={"shape": 6, "pitch": 8})}
    config["views"] = {"clean": {}}
    config["evals"] = {}
    config["data"] |= {
        "labels": {"shape": 6, "pitch": 8},
        "augment": dict(
            area=(0.4, 1.0),
            flip=True,
            colour=0.5,
            gain=6.0,
            spectrogram=dict(time_width=20),
            mixup=dict(alpha=0.4),
            cutmix=dict(alpha=1.0),
            drop=dict(audio=0.3),
        ),
    }
    config["optim"] |= {"accumulate": 2, "warmup": 1}
    last = train(config | {"steps": 3}, tmp_path / "run")
    assert np.isfinite(last["loss"])
