"""`vmm convert` there and back, warm starts, and weights resampled into other shapes."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from conftest import small_config, tiny_config
from flax.traverse_util import flatten_dict, unflatten_dict
from test_layers import parameters

import vmm
from vmm.__main__ import main
from vmm.convert import convert, warm_start
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.model import Trunk
from vmm.run import open_run
from vmm.teachers import open_teachers
from vmm.train import train
from vmm.weights import fit, save_params
from vmm.weights.fit import resize_patches, unstack
from vmm.weights.published import read_published, read_tensors

WIDTH, HEADS = 16, 2


def encoder(**fields) -> dict:
    return dict(kind="video", width=WIDTH, depth=2, heads=HEADS, tubelet=(2, 8, 8)) | fields


def late(depth: int = 0, **fields) -> dict:
    return dict(kind="late", width=WIDTH, depth=depth, heads=HEADS) | fields


def trunk_of(encoders: dict, fusion: dict) -> Trunk:
    return Trunk(encoders, fusion)


def look(trunk: Trunk, video):
    def run(module, video):
        return module(module.patches({"video": video}, {"video": jnp.ones(len(video), bool)}), {})

    return run


def flat_parameters(trunk: Trunk, video, seed: int = 0) -> dict:
    shapes = parameters(trunk, video, method=look(trunk, video), seed=seed)
    return {f"model.{name}": np.asarray(value) for name, value in flatten_dict(shapes, sep=".").items()}


def fused(trunk: Trunk, flat: dict, video) -> np.ndarray:
    params = unflatten_dict({name.removeprefix("model."): value for name, value in flat.items()}, sep=".")
    run = jax.jit(lambda p, v: trunk.apply({"params": p}, v, method=look(trunk, v)).fused["video"].x)
    return np.asarray(run(params, video))


VIDEO = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3)), jnp.uint8)


@pytest.mark.parametrize("scan", [False, True])
def test_last_layers_of_an_encoder_go_on_in_the_fusion(scan: bool):
    """Depth 3 = 1 in the encoder + 2 of fusion: the same function."""
    whole = trunk_of(dict(video=encoder(depth=3)), late())
    split = trunk_of(dict(video=encoder(depth=1, final_norm=False, scan=scan)), late(2, scan=scan))
    source, target = flat_parameters(whole, VIDEO), flat_parameters(split, VIDEO, seed=1)
    got, report = fit(source, target, {})
    assert sorted(report.left) == ["model.encoder_video.stack.norm.bias", "model.encoder_video.stack.norm.scale"]
    for part in ("scale", "bias"):
        got[f"model.fuse.video.norm.{part}"] = source[f"model.encoder_video.stack.norm.{part}"]
    np.testing.assert_allclose(fused(split, got, VIDEO), fused(whole, source, VIDEO), atol=1e-5)
    assert set(report.missing) == {"model.fuse.video.norm.bias", "model.fuse.video.norm.scale"}


def test_an_image_model_inflated_gives_the_same_tokens_of_a_still_clip():
    image = trunk_of(dict(video=encoder(tubelet=(1, 8, 8), positions="learned")), late())
    clip = trunk_of(dict(video=encoder(tubelet=(2, 8, 8), positions="learned")), late())
    still = jnp.repeat(VIDEO[:, :1], 2, axis=1)
    source, target = flat_parameters(image, still[:, :1]), flat_parameters(clip, still, seed=1)
    got, report = fit(source, target, {"video": ((1, 8, 8), (2, 8, 8))})
    assert not report.missing and not report.mismatched and not report.left
    assert [name for name, _ in report.resampled] == ["model.encoder_video.embed.kernel"]
    np.testing.assert_allclose(fused(clip, got, still), fused(image, source, still[:, :1]), atol=1e-5)


def test_positions_of_another_grid_are_resampled():
    table = np.arange(3, dtype=np.float32)[None, None, :, None] * np.ones((1, 2, 3, 4), np.float32)
    name = "model.encoder_video.positions.table"
    got, report = fit({name: table}, {name: np.zeros((4, 2, 6, 4), np.float32)}, {})
    assert [each for each, _ in report.resampled] == [name]
    for frame in got[name]:
        np.testing.assert_allclose(frame, got[name][0])  # one frame's table serves them all
    assert (np.diff(got[name][0, 0, 1:-1, 0]) > 0).all()  # still a slope along the width
    words = "model.encoder_text.positions.table"
    long = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    got, _ = fit({words: long}, {words: np.zeros((5, 4), np.float32)}, {})
    np.testing.assert_array_equal(got[words], long[:5])
    _, report = fit({words: long}, {words: np.zeros((12, 4), np.float32)}, {})
    assert [each for each, _ in report.mismatched] == [words] and report.missing == [words]


def test_resized_patches_see_a_resized_image_alike():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4 * 4 * 3, 5)).astype(np.float32)
    patch = rng.normal(size=(1, 4, 4, 3)).astype(np.float32)
    larger = np.asarray(jax.image.resize(patch, (1, 8, 8, 3), "linear", antialias=False))
    resized = resize_patches(kernel, (1, 4, 4), (1, 8, 8))
    np.testing.assert_allclose(larger.reshape(-1) @ resized, patch.reshape(-1) @ kernel, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(resize_patches(kernel, (1, 4, 4), (1, 4, 4)), kernel)


def test_what_does_not_fit_is_told():
    source = {"a.kernel": np.zeros((2, 3), np.float32), "b.bias": np.zeros(2, np.float32)}
    target = {"a.kernel": np.ones((2, 4), np.float32), "c.bias": np.ones(2, np.float32)}
    got, report = fit(source, target, {})
    assert report.mismatched == [("a.kernel", "[2, 3] → [2, 4]")]
    assert report.left == ["b.bias"] and report.missing == ["a.kernel", "c.bias"] and not report.loaded
    assert all((value == 1).all() for value in got.values())


def test_scanned_layers_are_written_out():
    flat = unstack({"x.blocks.layers.block.kernel": np.arange(6).reshape(3, 2), "x.norm": np.zeros(1)})
    assert sorted(flat) == ["x.blocks.layer_0.block.kernel", "x.blocks.layer_1.block.kernel", "x.blocks.layer_2.block.kernel", "x.norm"]  # fmt: skip
    np.testing.assert_array_equal(flat["x.blocks.layer_2.block.kernel"], [4, 5])


# A folder of `transformers`


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return references.read("videomae").publish(tmp_path_factory.mktemp("published") / "videomae")


def test_convert_there_and_back(published, tmp_path, capsys):
    assert main(["convert", str(published), str(tmp_path / "ours")]) == 0
    assert "loaded" in capsys.readouterr().out
    video = np.asarray(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)), np.uint8)
    once, direct = (vmm.load(folder).embed(video=video)["video"] for folder in (tmp_path / "ours", published))
    np.testing.assert_array_equal(once, direct)
    assert once.shape == (1, 32)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "videomae"]) == 0
    ours, theirs = (read_published(folder).tensors for folder in (tmp_path / "back", published))
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_run_starts_from_published_weights(published, tmp_path, world_folder, capsys):
    config = small_config(world_folder, steps=1)
    config["trunk"]["encoders"] = {"video": dict(read_published(published).model["trunk"]["encoders"]["video"])}
    config["trunk"]["fusion"] = dict(kind="late", width=32, depth=0, heads=2)
    config["views"] = dict(masked=dict(video=dict(kind="tube", ratio=0.75)))
    config["objectives"] = dict(pixels=dict(kind="masked", modalities=("video",), width=16, depth=1, heads=2))
    config["evals"] = {}
    config["data"]["clip"] = config["data"]["clip"] | dict(size=16, frames=4)
    config["optim"] |= dict(learning_rate=0.0, warmup=0, ema=0.0)
    config["init_from"] = dict(video=str(published))
    train(config, tmp_path / "run")
    assert "init_from" in capsys.readouterr().out
    got = flatten_dict(jax.device_get(open_run(tmp_path / "run").state.params), sep=".")
    for name, value in read_published(published).tensors.items():
        if name.startswith("model.encoder_video."):
            np.testing.assert_array_equal(got[name], value, err_msg=name)
    config["init_from"] = dict(audio=str(published))
    with pytest.raises(UserError, match="has no encoder of audio"):
        train(config, tmp_path / "other")


def test_a_teacher_of_images_shows_clips_its_table_resized(tmp_path, world_folder):
    """Its learned positions are over one frame, the student's clips have four."""
    image = trunk_of(dict(video=encoder(tubelet=(1, 12, 12), positions="learned")), late())
    still = jnp.zeros((1, 1, 24, 24, 3), jnp.uint8)
    flat = flat_parameters(image, still)
    folder = tmp_path / "teacher"
    folder.mkdir()
    save_params(unflatten_dict(flat, sep="."), folder / "model.safetensors")
    trunk = dict(encoders=image.encoders, fusion=image.fusion)
    model = dict(trunk=trunk, views={}, objectives={})
    told = dict(library_name="vmm", format=1, model=model, clip=dict(frames=1, size=24), labels={})
    (folder / "config.json").write_text(json.dumps(told))
    config = small_config(world_folder)
    config["views"]["other"] = dict(teacher=str(folder))
    config["objectives"] = dict(follow=dict(kind="distill", view="masked", target="other", of="pooled", width=WIDTH))
    teachers = open_teachers(Experiment(config), None)
    params = teachers.params[0]["other"]
    table = params["encoder_video"]["positions"]["table"]
    assert table.shape == (1, 2, 2, WIDTH)
    # A still clip: every frame's tokens are as the picture's alone, but for who attends to whom.
    look_at = jax.jit(lambda p, v: teachers.trunks["other"].apply({"params": p}, v, method=look(image, v)).encoded)
    once, often = (look_at(params, jnp.repeat(still, n, axis=1))["video"].x for n in (1, 4))
    np.testing.assert_allclose(often, jnp.tile(once, (1, 4, 1)), atol=1e-5)


def test_bad_folders(published, tmp_path, capsys):
    out = tmp_path / "out"

    def copy(name: str, **changes):
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((published / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes((published / "model.safetensors").read_bytes())
        return folder

    unknown = copy("unknown", model_type="videomea")
    wide = copy("wide", hidden_size=48)
    deep = copy("deep", num_hidden_layers=3)
    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    short = copy("short")
    (short / "model.safetensors").write_bytes((published / "model.safetensors").read_bytes()[:3000])
    for folder, message in (
        (unknown, "is no family known here; known: "),
        (wide, "fit"),
        (deep, "no tensor 'videomae.encoder.layer.2"),
        (pickled, "pytorch_model.bin is a pickle"),
        (short, "not a whole safetensors file"),
        (tmp_path / "none", "no such folder"),
    ):
        assert main(["convert", str(folder), str(out)]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and error.count("\n") == 0, error
    assert main(["convert", str(published), str(out), "--to", "clipp"]) == 2
    assert "no such family" in capsys.readouterr().err
    with pytest.raises(UserError, match="source itself"):
        convert(published, published)


def test_what_a_family_cannot_say_is_no_export(tmp_path, published):
    ours = convert(published, tmp_path / "ours")
    config = json.loads((ours / "config.json").read_text())
    model = config["model"]
    blocks = model["trunk"]["encoders"]["video"]["block"], model["objectives"]["pixels"]["block"]
    for block in blocks:
        block["norm"] = "post"
    (ours / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot say"):
        convert(ours, tmp_path / "back", "videomae")
    for block in blocks:
        del block["norm"]
    for key, value in (("positions", "sincos"), ("standardise", "patch"), ("context", ["video"])):
        told = json.loads(json.dumps(config))
        told["model"]["objectives"]["pixels"][key] = value
        (ours / "config.json").write_text(json.dumps(told))
        with pytest.raises(UserError, match=f"objectives.pixels.{key} must be"):
            convert(ours, tmp_path / "back", "videomae")
    # What is not written down is the default.
    del model["trunk"]["encoders"]["video"]["block"], model["objectives"]["pixels"]["block"]
    (ours / "config.json").write_text(json.dumps(config))
    back = json.loads((convert(ours, tmp_path / "back", "videomae") / "config.json").read_text())
    assert (back["hidden_act"], back["layer_norm_eps"]) == ("gelu_pytorch_tanh", 1e-6)


def test_a_warm_start_needs_something_that_fits(published, tmp_path, world_folder):
    experiment = Experiment(tiny_config(world_folder, ("audio", "text"), steps=10))
    mesh = experiment.make_mesh()
    with jax.set_mesh(mesh):
        state = jax.eval_shape(experiment.program(mesh).init, jax.random.key(0))
        state = state._replace(params=jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.params))
        with pytest.raises(UserError, match="nothing of"):
            warm_start(state, experiment, str(published))


def test_the_processor_says_what_pixels_are_divided_by(published, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((published / name).read_bytes())
    told = dict(image_mean=[0.5, 0.25, 0.0], image_std=[0.5, 0.5, 1.0], rescale_factor=1 / 255)
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    encoder = read_published(folder).model["trunk"]["encoders"]["video"]
    assert encoder["mean"] == pytest.approx((127.5, 63.75, 0.0))
    assert encoder["deviation"] == pytest.approx((127.5, 127.5, 255.0))
    ours = convert(folder, tmp_path / "ours")
    back = json.loads((convert(ours, tmp_path / "back", "videomae") / "preprocessor_config.json").read_text())
    assert back["image_mean"] == pytest.approx(told["image_mean"]) and back["image_std"] == pytest.approx([0.5, 0.5, 1])
    (folder / "preprocessor_config.json").write_text(json.dumps(told | dict(image_std=[0.5, 0.0, 1.0])))
    with pytest.raises(UserError, match="image_std none of them 0"):
        read_published(folder)
    # As ViViT's: rescaled by 1 / 127.5, minus 1, then normalised.
    (folder / "preprocessor_config.json").write_text(json.dumps(told | dict(rescale_factor=1 / 127.5, offset=True)))
    encoder = read_published(folder).model["trunk"]["encoders"]["video"]
    assert encoder["mean"] == pytest.approx((191.25, 159.375, 127.5))


@pytest.mark.parametrize(("mask", "rights"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_have_the_rights_of_any_new_file(mask, rights, tmp_path):
    old = os.umask(mask)
    try:
        save_params({"a": {"kernel": np.ones(3, np.float32)}}, tmp_path / "model.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == rights


@pytest.mark.parametrize(
    "index",
    ["[]", "{}", '{"weight_map": ["a.safetensors"]}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b.safetensors"}}',
     '{"weight_map": {"a": "/tmp/b.safetensors"}}', '{"weight_map": {}}', "{"],
)  # fmt: skip
def test_an_index_of_weights_that_is_none_or_leads_out_of_its_folder(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(
        UserError, match="weight_map must be|is no name of a file in its folder|cannot be read"
    ) as error:
        read_tensors(tmp_path)
    assert "\n" not in str(error.value)
