"""Published families of video models: outputs equal the originals' with the same weights, and written back the same."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import references
from families import (
    alike,
    assert_exported,
    assert_initialised,
    batch_of,
    close,
    encode,
    predictions,
    read,
    relative,
    run,
)
from safetensors.numpy import save_file

from vmm.encoders.frontends import FRONTENDS
from vmm.errors import UserError
from vmm.layers import gather
from vmm.types import Mask, Outputs, Tokens
from vmm.weights.families import FAMILIES
from vmm.weights.families.vivit import _DEVIATION, _MEAN
from vmm.weights.published import read_published, write_published

CLASS_TOKEN = ("cls_token", "embeddings.position_embeddings")


def check_classifier(imported, reference) -> dict:
    """Tokens and logits are those of the reference; returns the tokens."""
    batch = batch_of(video=reference.inputs["video"])
    assert_initialised(imported, batch)
    encoded = encode(imported, **batch.inputs)
    close("tokens", encoded["video"].x, reference.outputs["tokens"])
    close("logits", run(imported, predictions, encoded, batch)["classes"]["label"], reference.outputs["logits"])
    return encoded["video"]


def test_vivit(tmp_path):
    reference, imported = read("vivit", tmp_path / "theirs")
    assert imported.left == []
    tokens = check_classifier(imported, reference)
    assert (np.asarray(tokens.at)[:, 0] == -1).all()
    changed = dict(hidden_act=("gelu_fast", "gelu_pytorch_tanh"))  # two names of one function
    assert_exported(imported, reference, tmp_path / "ours", CLASS_TOKEN, changed)


def test_vivit_without_its_classifier(tmp_path):
    reference, imported = read("vivit_base", tmp_path / "theirs")
    assert imported.left == ["vivit.pooler.dense.bias", "vivit.pooler.dense.weight"]
    video = reference.inputs["video"]
    close("tokens", encode(imported, video=video)["video"].x, reference.outputs["tokens"])
    changed = dict(hidden_act=("gelu_fast", "gelu_pytorch_tanh"), qkv_bias=(False, True))
    assert_exported(imported, reference, tmp_path / "ours", CLASS_TOKEN, changed)


def test_vivit_sees_pixels_as_its_processor_gives_them():
    reference = references.read("vivit_pixels")
    ours = (reference.inputs["video"] - np.asarray(_MEAN)) / np.asarray(_DEVIATION)
    np.testing.assert_allclose(ours.transpose(0, 1, 4, 2, 3), reference.outputs["values"], atol=1e-6)


def predict_latent(recipe, whole: Tokens, mask: Mask, batch):
    """What the predictor says of hidden tokens. Theirs is shown a whole clip's tokens and takes out the kept ones."""
    shown = Tokens(gather(whole.x, mask.keep), gather(whole.valid, mask.keep), mask.keep)
    patches = recipe.patches(batch)
    outputs = Outputs({"video": shown}, {"video": shown}, patches, {"video": mask})
    return recipe.objective["latent"].predict(outputs, batch)["video"]


def test_vjepa2(tmp_path):
    reference, imported = read("vjepa2", tmp_path / "theirs")
    assert imported.left == []
    batch = batch_of(video=reference.inputs["video"])
    assert_initialised(imported, batch)
    tokens = encode(imported, **batch.inputs)["video"]
    close("vjepa2", tokens.x, reference.outputs["tokens"])
    mask = Mask(*(jnp.asarray(reference.inputs[key], jnp.int32) for key in ("keep", "hidden")))
    ours = run(imported, predict_latent, tokens, mask, batch)
    close("its predictor", ours, reference.outputs["predicted"])
    # Of the mask tokens one is read; written back, all ten are that one.
    tensors = dict(reference.tensors)
    tensors["predictor.embeddings.mask_tokens"] = np.tile(tensors["predictor.embeddings.mask_tokens"][1], (10, 1, 1, 1))
    changed = dict(pred_num_mask_tokens=(3, 10))
    assert_exported(imported, reference._replace(tensors=tensors), tmp_path / "ours", changed=changed)


@pytest.mark.parametrize("attention", ["divided", "joint"])
def test_timesformer(tmp_path, attention: str):
    reference, imported = read(f"timesformer_{attention}", tmp_path / "theirs")
    assert imported.left == []
    check_classifier(imported, reference)
    assert_exported(imported, reference, tmp_path / "ours", CLASS_TOKEN)


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("vivit", dict(num_channels=4)),
        ("vjepa2", dict(pred_mlp_ratio=4.5)),
        ("timesformer", dict(qkv_bias=False)),
        ("timesformer", dict(attention_type="space_only")),
    ],
)
def test_a_setting_that_no_model_of_ours_has_is_refused(tmp_path, family: str, setting: dict):
    config = references.read("defaults").config[family]
    (key,) = setting
    assert key in config
    (tmp_path / "config.json").write_text(json.dumps(config | setting))
    save_file({"x": np.zeros(1, np.float32)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=key):
        read_published(tmp_path)


def fuse(recipe, batch) -> dict:
    return recipe.model(recipe.patches(batch), {}).fused


def spectrogram(recipe, audio):
    return recipe.model.encoder["audio"].spectrogram(audio)


def test_cav_mae(tmp_path, monkeypatch):
    reference, imported = read("cav_mae", tmp_path / "theirs")
    state = reference.tensors
    assert imported.left == sorted(
        name for name in state if "decoder" in name or name.split(".")[-2].endswith(("_a", "_v"))
    )
    video, audio = reference.inputs["video"], references.waves(reference.inputs["seconds"])
    assert_initialised(imported, batch_of(video=video, audio=audio))
    config, mel = reference.config, reference.outputs["mel"]
    standardised = (mel - config["audio_mean"]) / config["audio_std"]
    assert relative(run(imported, spectrogram, audio), standardised) < 1e-4

    # From here on, of the same spectrogram.
    given = (lambda wave, bins, *_: wave.reshape(len(wave), -1, bins), 0.0, 1.0)
    monkeypatch.setitem(FRONTENDS, "kaldi", given)
    batch = batch_of(video=video, audio=mel.reshape(len(mel), -1))
    fused = run(imported, fuse, batch)
    sound = np.asarray(fused["audio"].x).reshape(2, 4, 2, -1).swapaxes(1, 2).reshape(2, 8, -1)  # rows are mel bins
    close("cav_mae", fused["video"].x, reference.outputs["picture"])
    close("cav_mae", sound, reference.outputs["sound"])

    merged = ("patch_embed_a.proj.bias", "patch_embed_v.proj.bias", "modality_a", "modality_v")
    assert_exported(imported, reference, tmp_path / "back", merged, dict(hidden_act=(None, "gelu")))

    # A modality's vector of ours, trained away from zero, and again.
    moved = dict(imported.tensors)
    moved["model.fuse.enter.modality_video"] = np.random.default_rng(0).normal(0, 0.5, 24).astype(np.float32)
    write_published(tmp_path / "ours", "cav_mae", imported.model, moved)
    again = read_published(tmp_path / "ours")
    assert alike(again.model, imported.model)
    one, two = (run(imported._replace(tensors=tensors), fuse, batch)["video"].x for tensors in (moved, again.tensors))
    assert relative(two, one) < 1e-6 < relative(fused["video"].x, one)


def in_the_original_layout(state: dict, heads: int) -> dict:
    """VideoPrism's tensors as its authors publish them: flattened Flax names, layers stacked."""
    width = state["layernorm1.weight"].size
    conv = state["spatial_embeddings.patch_embeddings.projection.weight"]
    arrays = {
        "patch_projection/linear/kernel": conv.transpose(2, 3, 4, 1, 0).reshape(-1, width),
        "patch_projection/linear/bias": state["spatial_embeddings.patch_embeddings.projection.bias"],
        "spatial_pos_emb/emb_var": state["spatial_embeddings.position_embeddings"][0],
        "temporal_pos_emb/emb_var": state["temporal_embeddings.position_embeddings"][0],
    }
    for kind, norm in (("spatial", "layernorm1"), ("temporal", "layernorm2")):
        arrays[f"{kind}_ln/scale"], arrays[f"{kind}_ln/bias"] = state[f"{norm}.weight"], state[f"{norm}.bias"]
        layers = [f"{kind}_layers.{i}" for i in range(2)]
        to = f"{kind}_encoder/transformers_stack/x_layers"

        def put(name, own, change=lambda x: x, to=to, layers=layers):
            arrays[f"{to}/{name}"] = np.stack([change(state[f"{layer}.{own}"]) for layer in layers])

        for theirs, own in (("layer_norm", "layernorm_before"), ("ff_layer/layer_norm", "layernorm_after")):
            put(f"{theirs}/scale", f"{own}.weight")
            put(f"{theirs}/bias", f"{own}.bias")
        for part in ("query", "key", "value"):
            put(f"self_attention/{part}/w", f"attention.{part[0]}_proj.weight", lambda w: w.T.reshape(width, heads, -1))
            put(f"self_attention/{part}/b", f"attention.{part[0]}_proj.bias", lambda b: b.reshape(heads, -1))
        put("self_attention/post/w", "attention.o_proj.weight", lambda w: w.reshape(width, heads, -1))
        put("self_attention/post/b", "attention.o_proj.bias")
        for theirs, own in (("ffn_layer1", "fc1"), ("ffn_layer2", "fc2")):
            put(f"ff_layer/{theirs}/linear/kernel", f"mlp.{own}.weight", lambda w: w.T)
            put(f"ff_layer/{theirs}/linear/bias", f"mlp.{own}.bias")
    return arrays


def test_videoprism(tmp_path):
    reference, imported = read("videoprism", tmp_path / "theirs")
    assert imported.left == []
    video = reference.inputs["video"]
    assert_initialised(imported, batch_of(video=video))
    close("videoprism", encode(imported, video=video)["video"].x, reference.outputs["tokens"])
    assert_exported(imported, reference, tmp_path / "ours")


@pytest.mark.parametrize("inside", ["", "vision_encoder/"])
def test_videoprism_as_its_authors_publish_it(tmp_path, inside: str):
    """The same tensors in the original's layout, without a config, are the same model of ours."""
    reference, imported = read("videoprism", tmp_path / "theirs")
    arrays = in_the_original_layout(reference.tensors, heads=2)
    arrays = {f"params/{inside}{name}": value for name, value in arrays.items()}
    if inside:
        arrays["params/text_encoder/token_emb/emb_var"] = np.zeros((4, 24), np.float32)
    (tmp_path / "original").mkdir()
    np.savez(tmp_path / "original" / "flax_base_f16r288_repeated.npz", **arrays)
    original = read_published(tmp_path / "original")
    assert original.left == (["params/text_encoder/token_emb/emb_var"] if inside else [])
    # The cap is no array: the release's own.
    assert original.model["trunk"]["encoders"]["video"]["block"].pop("cap") == 50.0
    assert imported.model["trunk"]["encoders"]["video"]["block"].pop("cap") == 2.0
    assert original.model == imported.model
    assert set(original.tensors) == set(imported.tensors)
    for name, value in imported.tensors.items():
        np.testing.assert_array_equal(original.tensors[name], value, err_msg=name)


@pytest.mark.parametrize("name", ["videoprism_video", "videoprism_clip"])
def test_videoprism_in_a_larger_model(tmp_path, name: str):
    """Its video encoder is read, and written alone."""
    reference, imported = read(name, tmp_path / "theirs")
    assert imported.left
    video = reference.inputs["video"]
    close(name, encode(imported, video=video)["video"].x, reference.outputs["tokens"])
    # Its own tensors have longer names than those of the encoder alone.
    alone = references.read("videoprism")
    assert_exported(imported._replace(left=[]), alone, tmp_path / "ours")


def test_an_npz_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", **{"params/embed/kernel": np.zeros(3)})
    with pytest.raises(UserError, match="VideoPrism"):
        read_published(tmp_path)


@pytest.mark.parametrize("family", ["vivit", "vjepa2", "timesformer", "videoprism_vision_model", "cav_mae"])
def test_a_model_described_is_the_model_that_its_config_describes(family: str):
    """What `convert` asks of an export: the family's words, read back, say the same."""
    module = FAMILIES[family]
    for parts in ({"": frozenset({""})}.get(module.PREFIX, frozenset()), frozenset({"head", "predictor"})):
        model = module.describe(references.read("cav_mae").config if family == "cav_mae" else {}, parts)
        config, found = module.config(model)
        assert module.describe(config, found) == model
