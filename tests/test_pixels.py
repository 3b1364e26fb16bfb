"""The pixel decoder: what it starts from, what it may see, its noise, its critic's two gradients; numbers by hand."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from contracts import HEADS, D
from test_layers import parameters

from vmm.augment import add_noise
from vmm.build import load_config
from vmm.data.loader import evaluation_batches
from vmm.errors import UserError
from vmm.evaluate import Predict, measure
from vmm.experiment import Experiment
from vmm.model import Recipe, sample_keys
from vmm.objectives.adversary import Adversary, Critic
from vmm.objectives.pixels import neighbours
from vmm.types import Batch, Patches

FRAMES, SIZE, ROWS = 5, 12, 3
TUBELET = (1, 4, 4)
VIEWS = dict(
    between=dict(video=dict(kind="frames", ratio=0.4, hide=(1, 3))),
    future=dict(video=dict(kind="frames", ratio=0.4, hide=(-2, -1))),
    noisy=dict(video=dict(noise=0.1)),
    both=dict(video=dict(kind="frames", ratio=0.4, hide=(1, 3), noise=0.1)),
)


def neighbours_reference(x: np.ndarray, seen: np.ndarray):
    """Frame by frame: x [T …], seen bool [T]."""
    before, after, share = np.zeros_like(x), np.zeros_like(x), np.zeros(len(x))
    places = np.flatnonzero(seen)
    for t in range(len(x)) if len(places) else ():
        earlier, later = places[places <= t], places[places >= t]
        first = earlier[-1] if len(earlier) else later[0]
        last = later[0] if len(later) else earlier[-1]
        before[t], after[t] = x[first], x[last]
        share[t] = (t - first) / (last - first) if last > first else 0
    return before, after, share


@pytest.mark.parametrize("frames", [1, 2])
def test_neighbours_are_those_of_a_loop(frames: int):
    rng = np.random.default_rng(0)
    steps, places, size = 7, 3, 4 * frames
    values = rng.normal(size=(4, steps * places, size)).astype(np.float32)
    seen = rng.uniform(size=(4, steps * places)) < 0.4
    seen[0, ::places] = False  # a place that is never seen
    seen[1] = True
    before, after, share = map(np.asarray, neighbours(jnp.asarray(values), jnp.asarray(seen), steps, frames))
    for row in range(4):
        for place in range(places):
            mine = slice(place, None, places)
            x = values[row, mine].reshape(steps * frames, 4)
            expected = neighbours_reference(x, np.repeat(seen[row, mine], frames))
            np.testing.assert_array_equal(before[row, mine].reshape(-1, 4), expected[0])
            np.testing.assert_array_equal(after[row, mine].reshape(-1, 4), expected[1])
            np.testing.assert_allclose(
                share[row, mine].reshape(-1, 4), np.repeat(expected[2][:, None], 4, 1), rtol=1e-6
            )


def video(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (ROWS, FRAMES, SIZE, SIZE, 3)).astype(np.uint8)


def batch_of(pixels: np.ndarray, present=(True, True, False)) -> Batch:
    rows = len(pixels)
    return Batch(
        {"video": jnp.asarray(pixels)},
        {"video": jnp.asarray(present[:rows])},
        {},
        jnp.arange(rows, dtype=jnp.int32),
        jnp.ones(rows, bool),
    )


KEYS = sample_keys(jax.random.key(3), jnp.arange(ROWS))


@functools.cache
def recipe_of(view: str):
    """(recipe, parameters with none at a special value, (params, batch) → ((loss, metrics), predictions, pictures))."""
    recipe = Recipe(
        dict(
            encoders=dict(video=dict(kind="video", width=D, depth=1, heads=HEADS, tubelet=TUBELET, registers=2)),
            fusion=dict(kind="late", width=D, depth=0, heads=HEADS),
        ),
        VIEWS,
        dict(frames=dict(kind="pixels", view=view, tubelet=TUBELET, width=D, depth=1, heads=HEADS)),
    )
    params = parameters(recipe, batch_of(video()), KEYS)

    @jax.jit
    def everything(params, batch):
        variables = {"params": params}
        return (
            recipe.apply(variables, batch, KEYS),
            recipe.apply(variables, batch, view, KEYS, method="predict"),
            recipe.apply(variables, batch, "frames", KEYS, method="draw"),
        )

    return recipe, params, everything


def untrained(params):
    """The parameters with the head's as they are at first."""
    head = params["objective_frames"]["head"]
    return params | {"objective_frames": params["objective_frames"] | {"head": jax.tree.map(jnp.zeros_like, head)}}


def test_an_untrained_model_is_the_blend():
    _, params, everything = recipe_of("between")
    pixels = video()
    (_, metrics), said, drawn = everything(untrained(params), batch_of(pixels))
    truth = pixels.astype(np.float64)
    blend, nearest = truth.copy(), truth.copy()
    for t in (1, 3):
        blend[:, t] = (truth[:, t - 1] + truth[:, t + 1]) / 2
        nearest[:, t] = truth[:, t - 1]  # of two as near, the earlier
    there = slice(0, 2)
    np.testing.assert_array_equal(drawn["truth"], truth)
    assert np.abs(drawn["blend"][there] - blend[there]).max() <= 0.5
    np.testing.assert_array_equal(drawn["made"], drawn["blend"])
    np.testing.assert_array_equal(drawn["nearest"][there], nearest[there])
    # Scores are of the frames as they are drawn; of the hidden ones only is there anything to say.
    np.testing.assert_array_equal(said["frames/share"], np.array([[0, 1, 0, 1, 0]] * 2 + [[0] * 5]))
    for who, made in (("blend", np.asarray(drawn["blend"], np.float64)), ("nearest", nearest)):
        squared = ((made - truth)[there][:, [1, 3]] ** 2).mean((-3, -2, -1))
        np.testing.assert_allclose(
            said[f"frames/psnr/{who}"][there][:, [1, 3]], 10 * np.log10(255**2 / squared), rtol=1e-4
        )
    np.testing.assert_array_equal(said["frames/psnr/made"], said["frames/psnr/blend"])
    np.testing.assert_array_equal(np.asarray(said["frames/psnr/made"])[:, ::2], 100)
    # The loss and its metrics: errors of hidden pixels in −1 … 1, of the samples that have a video.
    d = ((blend - truth) / 127.5)[there][:, [1, 3]]
    assert float(metrics["frames/error"]) == pytest.approx(np.sqrt(d**2 + 1e-6).mean(), rel=1e-5)
    assert float(metrics["frames/psnr"]) == pytest.approx(10 * math.log10(4 / (d**2).mean()), rel=1e-5)
    assert float(metrics["frames/psnr_blend"]) == pytest.approx(float(metrics["frames/psnr"]), rel=1e-6)


def test_the_head_starts_at_zero():
    recipe, _, _ = recipe_of("between")
    init = jax.jit(lambda key: nn.unbox(recipe.init(key, batch_of(video()), KEYS))["params"]["objective_frames"])
    params = init(jax.random.key(0))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(params["head"]))
    assert np.asarray(params["known"]["kernel"]).any()


def test_what_is_hidden_is_not_seen():
    """Other pixels in the hidden frames change no picture that is made, and other shown pixels do."""
    _, params, everything = recipe_of("between")
    pixels, other = video(), video()
    other[:, [1, 3]] = video(9)[:, [1, 3]]
    _, _, drawn = everything(params, batch_of(pixels))
    _, _, again = everything(params, batch_of(other))
    for name in ("made", "blend", "nearest"):
        np.testing.assert_array_equal(drawn[name][:2, [1, 3]], again[name][:2, [1, 3]])
    assert np.abs(np.asarray(drawn["made"] - drawn["blend"])[:2, [1, 3]]).mean() > 10  # these parameters say something
    moved = pixels.copy()
    moved[:, 2] = video(9)[:, 2]
    assert (np.asarray(everything(params, batch_of(moved))[2]["made"])[:2, 1] != drawn["made"][:2, 1]).any()


def test_the_future_is_the_last_frame_at_first():
    _, params, everything = recipe_of("future")
    pixels = video()
    _, said, drawn = everything(untrained(params), batch_of(pixels))
    for name in ("made", "blend", "nearest"):
        np.testing.assert_array_equal(drawn[name][:2, 3:], np.repeat(pixels[:2, 2:3], 2, axis=1))
        np.testing.assert_array_equal(drawn[name][:2, :3], pixels[:2, :3])
    np.testing.assert_array_equal(said["frames/share"][0], [0, 0, 0, 1, 1])


def test_noise_is_taken_away_from_every_frame():
    _, params, everything = recipe_of("noisy")
    pixels = np.full((ROWS, FRAMES, SIZE, SIZE, 3), 100, np.uint8)
    (_, metrics), said, drawn = everything(untrained(params), batch_of(pixels))
    np.testing.assert_array_equal(said["frames/share"], [[1] * 5, [1] * 5, [0] * 5])
    np.testing.assert_array_equal(drawn["truth"][:2], pixels[:2])
    # The decoder starts from the noisy frame, a deviation of a tenth of the range off.
    np.testing.assert_array_equal(drawn["made"], drawn["nearest"])
    difference = np.asarray(drawn["nearest"])[:2] - 100.0
    assert difference.std() == pytest.approx(25.5, rel=0.05)
    assert abs(difference.mean()) < 1.5
    assert float(metrics["frames/psnr"]) == pytest.approx(20.0, abs=0.3)
    # Each sample has its own noise, the same whatever the batch.
    assert (np.asarray(drawn["nearest"])[0] != np.asarray(drawn["nearest"])[1]).any()
    recipe = recipe_of("noisy")[0]
    alone = jax.jit(lambda p, b, k: recipe.apply({"params": p}, b, "frames", k, method="draw"))(
        untrained(params), batch_of(pixels[1:2], (True,)), KEYS[1:2]
    )
    np.testing.assert_array_equal(alone["nearest"][0], drawn["nearest"][1])


def test_noise_and_hidden_frames_together():
    _, params, everything = recipe_of("both")
    pixels = np.full((ROWS, FRAMES, SIZE, SIZE, 3), 100, np.uint8)
    _, said, drawn = everything(untrained(params), batch_of(pixels))
    assert (said["frames/share"][:2] == 1).all()
    made = np.asarray(drawn["made"])[:2] - 100.0
    # The mean of two noisy frames, and noisy frames.
    assert made[:, 1].std() == pytest.approx(25.5 / math.sqrt(2), rel=0.1)
    assert made[:, 2].std() == pytest.approx(25.5, rel=0.1)


def test_noise_of_pixels_and_of_sound():
    rng = np.random.default_rng(0)
    pixels = Patches(jnp.asarray(rng.integers(0, 256, (3, 50, 48)), jnp.uint8), jnp.ones((3, 50), bool), (50,), 0)
    noisy = add_noise(pixels, KEYS, 0.2).values
    assert noisy.dtype == jnp.uint8
    middle = np.abs(np.asarray(pixels.values, float) - 127.5) < 20  # where nothing is clipped
    assert (np.asarray(noisy, float) - np.asarray(pixels.values, float))[middle].std() == pytest.approx(51, rel=0.05)
    sound = Patches(jnp.zeros((3, 50, 48)), jnp.ones((3, 50), bool), (50,), 0)
    assert float(add_noise(sound, KEYS, 0.5).values.std()) == pytest.approx(0.5, rel=0.05)
    jax.tree.map(np.testing.assert_array_equal, add_noise(sound, KEYS, 0.0).values, sound.values)


def windows_reference(x: np.ndarray) -> np.ndarray:
    """[H W C] → [⌈H/2⌉ ⌈W/2⌉ 4 4 C]: the window of place (i, j) begins at (2 i − 1, 2 j − 1); zeros around."""
    height, width, colours = x.shape
    padded = np.zeros((height + 6, width + 6, colours), x.dtype)
    padded[1 : 1 + height, 1 : 1 + width] = x
    rows, columns = -(-height // 2), -(-width // 2)
    found = [[padded[2 * i : 2 * i + 4, 2 * j : 2 * j + 4] for j in range(columns)] for i in range(rows)]
    return np.array(found)


@pytest.mark.parametrize("shape", [(6, 8), (5, 7)], ids=str)
def test_the_critic_is_a_strided_convolution(shape: tuple):
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(2, 3, *shape, 3)).astype(np.float32)
    critic = Critic(width=4, depth=1)
    params = parameters(critic, jnp.asarray(pictures))
    found = jax.jit(lambda p, x: critic.apply({"params": p}, x))(params, pictures)
    # The kernel's rows: which 2 × 2 block of the window, the place in it, the colour.
    kernel = np.asarray(params["layer_0"]["kernel"]).reshape(2, 2, 2, 2, 3, 4).transpose(0, 2, 1, 3, 4, 5)
    kernel = kernel.reshape(4, 4, 3, 4)
    for clip in range(2):
        for frame in range(3):
            x = np.einsum("hwqrc,qrcd->hwd", windows_reference(pictures[clip, frame]), kernel)
            x = x + np.asarray(params["layer_0"]["bias"])
            x = np.where(x > 0, x, 0.2 * x) @ np.asarray(params["head"]["kernel"])
            np.testing.assert_allclose(found[clip, frame], x[..., 0], atol=1e-4)


def test_the_two_hinge_losses_and_their_gradients_by_hand():
    """A critic without layers scores a place by a weighted sum of its colours: all is known in closed form."""
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(2, 2, 1, 3, 4, 3)).astype(np.float32)
    module = Adversary(weight=0.5, depth=0)
    kernel = np.array([[0.5], [-1.0], [0.8]], np.float32)
    params = {"critic": {"head": {"kernel": jnp.asarray(kernel)}}}
    real_score, made_score = (real @ kernel)[..., 0], (made @ kernel)[..., 0]

    def terms(params, made):
        return module.apply({"params": params}, jnp.asarray(real), made)

    its, ours = terms(params, jnp.asarray(made))
    np.testing.assert_allclose(
        its, (np.maximum(0, 1 - real_score) + np.maximum(0, 1 + made_score)).mean((2, 3)), rtol=1e-5
    )
    np.testing.assert_allclose(ours, -made_score.mean((2, 3)), rtol=1e-5)
    assert 0 < (made_score > -1).mean() < 1  # both branches of the hinge are tried
    assert 0 < (real_score < 1).mean() < 1

    def total(params, made, its_weight, our_weight):
        its, ours = terms(params, made)
        return its_weight * its.sum() + our_weight * ours.sum()

    gradient = jax.grad(total, (0, 1))
    # The critic's loss: nothing for the pictures, and for the critic the hinge's slopes.
    of_critic, of_made = gradient(params, jnp.asarray(made), 1.0, 0.0)
    assert not np.asarray(of_made).any()
    slopes = (made * (made_score > -1)[..., None] - real * (real_score < 1)[..., None]).sum((0, 1, 2, 3)) / 12
    np.testing.assert_allclose(of_critic["critic"]["head"]["kernel"][:, 0], slopes, rtol=1e-4)
    # The pictures' loss: nothing for the critic, and for the pictures minus the critic's own weights.
    of_critic, of_made = gradient(params, jnp.asarray(made), 0.0, 1.0)
    assert not np.asarray(of_critic["critic"]["head"]["kernel"]).any()
    np.testing.assert_allclose(of_made, np.broadcast_to(-kernel[:, 0] / 12, made.shape), rtol=1e-5)


def test_each_half_of_the_objective_learns_from_its_own_loss():
    """In the whole loss: the critic's gradient is that of its loss, the decoder's that of the rest, `weight` included."""
    recipe, _, _ = recipe_of("between")
    spec = dict(recipe.objectives["frames"]) | dict(adversary=dict(weight=0.5, depth=1, width=4))
    recipe = Recipe(recipe.trunk, recipe.views, dict(frames=spec))
    params = parameters(recipe, batch_of(video()), KEYS)

    @jax.jit
    def gradients(params):
        def part(params, name):
            value, metrics = recipe.apply({"params": params}, batch_of(video()), KEYS)
            return value if name == "all" else metrics[f"frames/{name}"]

        return {name: jax.grad(part)(params, name) for name in ("all", "error", "critic", "fooled")}

    found = gradients(params)
    of_critic = {name: tree["objective_frames"].pop("adversary") for name, tree in found.items()}
    for name, expected in (("all", of_critic["critic"]), ("critic", of_critic["critic"])):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), of_critic[name], expected)
    for name in ("error", "fooled"):
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(of_critic[name]))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_critic["critic"]))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found["critic"]))
    rest = jax.tree.map(lambda error, fooled: error + 0.5 * fooled, found["error"], found["fooled"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), found["all"], rest)
    assert any(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(found["fooled"]))


@pytest.mark.parametrize(
    ("view", "objective", "line"),
    [
        (dict(), dict(), r"the view 'shown' shows the whole video as it is; give views.shown.video a mask"),
        (dict(video=dict(noise=0.0)), dict(), "shows the whole video as it is"),
        (dict(video=dict(noise=-1.0)), dict(), r"views.shown.video.noise: a standard deviation of at least 0"),
        (dict(video=dict(kind="frames")), dict(), "a mask is a group of a kind and a ratio, with `noise`"),
        (
            dict(video=dict(noise=0.1)),
            dict(tubelet=(2, 4, 4)),
            "tubelet .2, 4, 4. has 96 values, but a video token has 48",
        ),
        (dict(video=dict(noise=0.1)), dict(error="l3"), "pixels: unknown error 'l3'; .*l1"),
        (dict(video=dict(noise=0.1)), dict(context=("audio",)), "context names 'audio', but the trunk has"),
        (dict(video=dict(noise=0.1)), dict(adversary=dict(wide=1)), "pixels: adversary.wide: no such key"),
    ],
)
def test_bad_input_is_one_line(view: dict, objective: dict, line: str):
    recipe = recipe_of("between")[0]
    spec = dict(kind="pixels", view="shown", tubelet=TUBELET, width=D, depth=1, heads=HEADS) | objective
    wrong = Recipe(recipe.trunk, dict(shown=view), dict(frames=spec))
    with pytest.raises(UserError, match=line):
        jax.eval_shape(lambda: wrong.init(jax.random.key(0), batch_of(video()), KEYS))


def test_the_recipe_untrained_scores_as_the_blend_on_real_files(world_folder):
    """From mp4 files to the table: the copies' scores are those of the decoded frames, the model's those of the blend."""
    config = load_config(str(ROOT / "configs" / "world_frames.py") + ":small")
    test = f"{world_folder}/test.jsonl"
    config["data"] |= dict(train=test, tokenizer=f"{world_folder}/tokenizer.json", workers=0)
    config["evals"]["pictures"]["data"] = test
    experiment = Experiment(config)
    mesh = experiment.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = nn.unbox(experiment.initialise(jax.random.key(0)))
    found = measure(experiment, Predict(experiment, params, mesh))
    clips = []
    for batch, rows, _ in evaluation_batches(test, experiment.data, experiment.clip, batch=6, modalities=("video",)):
        clips += list(batch.inputs["video"][batch.valid][: len(rows)])
    truth = np.stack(clips).astype(np.float64)
    assert truth.shape == (18, 9, 24, 24, 3)
    hidden = truth[:, 1::2]
    for who, made in (("nearest", truth[:, :-1:2]), ("blend", np.round((truth[:, :-1:2] + truth[:, 2::2]) / 2))):
        ratios = 10 * np.log10(255**2 / np.square(made - hidden).mean((-3, -2, -1)))
        assert found.values[f"pictures/{who}/PSNR"] == pytest.approx(ratios.mean(), rel=1e-3)
    assert found.values["pictures/clips"] == 18
    assert found.values["pictures/frames"] == 72
    assert found.values["pictures/model/PSNR"] == found.values["pictures/blend/PSNR"]
    assert found.values["pictures/over blend/SSIM"] == 0.0
    low, high = found.intervals()["pictures/over nearest/PSNR"]
    assert low < found.values["pictures/over nearest/PSNR"] < high
