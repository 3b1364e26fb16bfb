"""From the media file on, pictures and sound are what the published families' own processors make of them."""

import json

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from safetensors.numpy import load_file, save_file

from vmm.convert import convert
from vmm.data import media
from vmm.data.reading.sound import filled_up
from vmm.data.text import load_tokenizer, padding_id, train_tokenizer
from vmm.encoders.frontends import FRONTENDS
from vmm.errors import UserError
from vmm.objectives import OBJECTIVES
from vmm.weights.families import FAMILIES
from vmm.weights.published import read_processor, read_published, write_processor

REFERENCE = references.read("processors")
SIZE = 56
# What the default of a family's config.json says beside its processor's file: keys for `describe`, of a tiny model.
_TINY = dict(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, image_size=SIZE, patch_size=8
)
_SIDES = {key: value for key, value in _TINY.items() if not key.startswith(("image", "patch"))}
CONFIGS = {
    "clip": dict(vision_config=_TINY, text_config=_SIDES),
    "siglip": dict(vision_config=_TINY, text_config=_SIDES),
    "timesformer": _TINY,
    "videomae": _TINY
    | dict(hidden_act="gelu", layer_norm_eps=1e-12, num_frames=16, tubelet_size=2, norm_pix_loss=True),
    "vit": _TINY,
    "vit_mae": _TINY,
    "vivit": _TINY,
    "vjepa2": dict(crop_size=SIZE, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, patch_size=8),
}
# Mean difference of pixels, 0 … 255, that the scaling leaves: ours is FFmpeg's, theirs PIL's or PyTorch's.
CLOSE = 1.2


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The picture of the references as a lossless video of two seconds."""
    path = tmp_path_factory.mktemp("scene") / "scene.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 168, 84, "bgr0"
        for _ in range(16):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(references.scene(), "rgb24").reformat(format="bgr0"))
            )
        container.mux(stream.encode())
    return path


def shown(path, crop: float) -> np.ndarray:
    found = media.decode(
        path, pick=lambda _: 0.5, seconds=1.0, frames=1, size=SIZE, sample_rate=16000, crop=media.Crop(share=crop)
    )
    return found.video[0].astype(np.float64)


@pytest.mark.parametrize("family", REFERENCE.config)
def test_pictures_are_those_of_the_processor(family: str, clip):
    model = FAMILIES[family].describe(CONFIGS[family], frozenset())
    encoder = model["trunk"]["encoders"]["video"]
    deviation = np.asarray(encoder["deviation"])
    ours = (shown(clip, model["clip"]["crop"]) - np.asarray(encoder["mean"])) / deviation
    difference = np.abs(ours - REFERENCE.outputs[family]) * deviation
    print(f"{family}: mean difference {difference.mean():.2f} of 255, largest {difference.max():.1f}")
    assert difference.mean() < CLOSE
    for other in {0.0, 1.0, 56 / 64} - {model["clip"]["crop"]}:  # and no other geometry is
        wrong = (shown(clip, other) - np.asarray(encoder["mean"])) / deviation
        assert (np.abs(wrong - REFERENCE.outputs[family]) * deviation).mean() > 4 * CLOSE


@pytest.mark.parametrize("family", REFERENCE.config)
def test_a_processors_file_is_written_as_it_was_read(family: str, tmp_path):
    told, model = REFERENCE.config[family], FAMILIES[family].describe(CONFIGS[family], frozenset())
    name = "video_preprocessor_config.json" if "video_processor_type" in told else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps(told))
    pixels, clip = read_processor(tmp_path / name)
    encoder = model["trunk"]["encoders"]["video"]
    for key, value in pixels.items():
        np.testing.assert_allclose(value, encoder[key], rtol=1e-6)
    assert clip["crop"] == pytest.approx(model["clip"]["crop"], abs=1e-9)
    (tmp_path / name).unlink()
    write_processor(tmp_path, family, encoder | pixels, model["clip"] | clip)
    written = json.loads((tmp_path / name).read_text())
    assert written.pop("do_center_crop") == told.get("do_center_crop", False)
    for key, value in written.items():
        if key.endswith("_type"):
            assert value.removesuffix("Fast") == told[key].removesuffix("Fast")
        elif key.startswith("image_") or key == "rescale_factor":
            np.testing.assert_allclose(value, told[key], rtol=1e-6)
        else:
            assert value == told[key], key


def test_old_files_of_processors_are_read(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    for told, crop in (
        (dict(size=224, do_resize=True), {"crop": 0.0}),
        (dict(size=224, crop_size=224, do_center_crop=True), {"crop": 1.0}),
        (dict(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}), {"crop": 0.875}),
        (dict(size={"shortest_edge": 224}, do_center_crop=False, crop_size=224), {"crop": 1.0}),
        (dict(do_resize=False, size=224), {}),
        (dict(), {}),
    ):
        path.write_text(json.dumps(told))
        assert read_processor(path) == ({}, crop), told


@pytest.mark.parametrize(
    ("family", "seconds"), [("videomae", 64 / 30), ("vivit", 2.56), ("vjepa2", 16), ("timesformer", 256 / 30)]
)
def test_windows_are_the_familys(family: str, seconds: float):
    assert FAMILIES[family].describe(CONFIGS[family], frozenset())["clip"]["seconds"] == pytest.approx(seconds)


def test_sound_is_filled_up_before_it_is_normalized(tmp_path):
    """AST's extractor: what is beyond the sound is 0 in the logarithm, 0.467 normalized; silence that is heard is not."""
    path, rate = tmp_path / "short.wav", 16000
    tone = (0.3 * np.sin(2 * np.pi * 500 * np.arange(rate) / rate) * 32767).astype(np.int16)
    tone[rate // 2 :] = 0  # half a second of it is silence
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None], "s16", "mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    wave = media.decode(
        path, pick=lambda _: 0.0, seconds=2.0, frames=1, size=8, sample_rate=rate, want=("audio",)
    ).audio  # fmt: skip
    function, mean, deviation = FRONTENDS["kaldi"]
    given = [wave, filled_up(tone / np.float32(32768), 2 * rate), np.pad(tone / np.float32(32768), (0, rate))]
    mel = np.asarray(jax.jit(lambda x: function(x, 32, 400, 160, rate, 0))(np.stack(given).astype(np.float32)))
    normal = (mel - mean) / deviation
    heard = 1 + (rate - 400) // 160  # whole frames of one second
    np.testing.assert_allclose(normal[0], normal[1], atol=1e-3)
    np.testing.assert_allclose(normal[0, heard:], 0.467, atol=1e-3)
    np.testing.assert_allclose(normal[0, heard // 2 + 3 : heard], -1.277, atol=1e-3)
    np.testing.assert_allclose(normal[2, heard + 3 :], -1.277, atol=1e-3)  # zeros that somebody gave are silence


def test_names_and_processor_of_a_classifier_make_the_round_trip(tmp_path):
    theirs = references.read("vivit").publish(tmp_path / "theirs")
    config = json.loads((theirs / "config.json").read_text())
    count = len(config.get("id2label") or range(config.get("num_labels", 2)))
    names = {str(i): f"class {i}, or so" for i in range(count)}
    config |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    (theirs / "config.json").write_text(json.dumps(config))
    tokenizer = train_tokenizer(["a dog barks", "rain falls"], 60, "unigram")
    tokenizer.no_padding()  # the file itself tells none, its neighbor does
    tokenizer.save(str(theirs / "tokenizer.json"))
    (theirs / "tokenizer_config.json").write_text(json.dumps({"pad_token": "</s>"}))
    convert(theirs, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["classes"] == {"label": list(names.values())}
    convert(tmp_path / "ours", tmp_path / "again", to="vivit")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["id2label"] == names and written["label2id"] == config["label2id"]
    processor = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert processor["offset"] is True and processor["image_mean"] == pytest.approx([0.5] * 3)
    for folder in ("ours", "again"):
        assert padding_id(load_tokenizer(tmp_path / folder / "tokenizer.json")) == tokenizer.token_to_id("</s>") == 3
    again = read_published(tmp_path / "again")
    assert again.model["trunk"]["encoders"]["video"]["mean"] == pytest.approx([191.25] * 3)


def test_targets_of_pixels_are_the_familys():
    """VideoMAE without norm_pix_loss predicts pixels 0 … 1; MAE patches of standardized colours, unbiased."""
    values = references.pixels(2, 3, 12)
    models = [
        FAMILIES[family].describe(CONFIGS[family] | {"norm_pix_loss": norm} | decoder, frozenset({"decoder"}))
        for family, norm, decoder in (
            ("videomae", False, {f"decoder_{key}": value for key, value in _SIDES.items()}),
            ("vit_mae", True, {}),
            ("vit_mae", False, {}),
        )
    ]
    plain, normed, standard = (
        OBJECTIVES["masked"](**{k: v for k, v in model["objectives"]["pixels"].items() if k != "kind"})
        for model in models
    )
    np.testing.assert_allclose(plain._target(jnp.asarray(values)), values / 255, rtol=1e-5, atol=1e-6)
    colours = (values.reshape(2, 3, 4, 3) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    want = colours.reshape(values.shape)
    np.testing.assert_allclose(standard._target(jnp.asarray(values)), want, rtol=1e-4, atol=1e-5)
    normal = (want - want.mean(-1, keepdims=True)) / np.sqrt(want.var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normed._target(jnp.asarray(values)), normal, rtol=1e-4, atol=1e-5)
    for objective, prediction in ((plain, values[0] / 255), (standard, want[0])):
        np.testing.assert_allclose(objective.restored(values[0], prediction), values[0] / 127.5 - 1, atol=1e-5)


def spoil(folder, change) -> None:
    """Changes a published folder's config and tensors: change(config, tensors)."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _quantize(config, tensors):
    name = next(name for name in tensors if name.endswith("query.weight"))
    tensors[name] = (tensors[name] * 10).astype(np.int8)


def _not_a_number(config, tensors):
    next(value for name, value in tensors.items() if name.endswith("query.weight")).flat[3] = np.nan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_quantize, "query.weight is of int8: quantized weights are not read"),
        (_not_a_number, "query.weight holds values that are not finite"),
        (lambda config, _: config.update(num_hidden_layers=1), "tells of fewer layers than the weights"),
        (lambda config, _: config.update(num_hidden_layers=-1), "num_hidden_layers: expected a whole number of at least 0"),
        (lambda config, _: config.update(num_hidden_layers=9), "has no tensor"),
        (lambda config, _: config.update(hidden_size="32"), "hidden_size: expected a whole number of at least 1, got '32'"),
        (lambda config, _: config.update(num_attention_heads=0), "num_attention_heads: expected a whole number"),
        (lambda config, _: config.update(tubelet_size=["2", 8, 8]), "tubelet_size: expected a whole number"),
        (lambda config, _: config.update(hidden_act=3), "config.json"),
        (lambda config, _: config.update(layer_norm_eps="small"), "layer_norm_eps: expected a number, got 'small'"),
        (lambda config, _: config.update(model_type="clap"), "'clap' is no family known here; known: audio-spec"),
        (lambda config, _: config.update(id2label=["a"]), "id2label: expected number → name"),
    ],
)  # fmt: skip
def test_broken_weights_are_one_line_and_leave_nothing(tmp_path, change, said: str):
    theirs = references.read("vivit").publish(tmp_path / "theirs")
    spoil(theirs, change)
    with pytest.raises(UserError) as error:
        convert(theirs, tmp_path / "out")
    assert said in str(error.value) and "\n" not in str(error.value) and "did you mean" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_failed_export_takes_its_empty_folder_away(tmp_path):
    theirs = references.read("vivit").publish(tmp_path / "theirs")
    with pytest.raises(UserError, match="--to vit"):
        convert(theirs, tmp_path / "out", to="vit")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="--to vit"):
        convert(theirs, tmp_path / "mine", to="vit")
    assert (tmp_path / "mine").is_dir()  # one that was there stays
    with pytest.raises(UserError, match="--to clap: no such family; known: audio"):
        convert(theirs, tmp_path / "out", to="clap")
