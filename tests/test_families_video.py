"""Published families of video models: outputs equal the originals' with the same random weights, and there again.

Every comparison prints our relative error beside the original's own: of float32 against float64.
"""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import (
    assert_same_state,
    batch_of,
    encode,
    export_and_load,
    randomise,
    recipe_of,
    relative,
    save_and_read,
    torch,
)
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file
from test_families import normalised, pixels

from vmm.errors import UserError
from vmm.layers import gather
from vmm.types import Mask, Outputs, Tokens
from vmm.weights.families import FAMILIES, reason
from vmm.weights.families.common import IMAGENET_DEVIATION, IMAGENET_MEAN
from vmm.weights.families.vivit import _DEVIATION, _MEAN
from vmm.weights.published import read_published, write_published

transformers = pytest.importorskip("transformers")


def compare(name: str, ours, model, call) -> None:
    """Our output against call(model), beside the model's own noise; at most 1e-5."""
    with torch.no_grad():
        expected = call(model, torch.float32)
        exact = call(copy.deepcopy(model).double(), torch.float64)
    error, noise = relative(ours, expected), relative(expected, exact.float())
    print(f"{name}: relative error {error:.1e}, of {name} in float32 to itself in float64 {noise:.1e}")
    assert error < 1e-5


def predictions(imported, **inputs) -> dict:
    """What the imported model's objectives say of the inputs."""
    recipe, params = recipe_of(imported)
    batch = batch_of(**inputs)
    return jax.jit(lambda params: recipe.apply({"params": params}, batch, method="predict"))(params)


SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


def test_vivit(tmp_path):
    size = dict(image_size=32, num_frames=4, tubelet_size=[2, 16, 8], num_labels=5)
    cls = transformers.VivitForVideoClassification
    model = randomise(cls(transformers.VivitConfig(**SMALL, **size)))
    imported = save_and_read(model, tmp_path / "theirs")
    video = pixels(2, 4, 32, 32, 3)

    def call(model, dtype):
        return model.vivit(normalised(video, _MEAN, _DEVIATION).to(dtype)).last_hidden_state

    def logits(model, dtype):
        return model(normalised(video, _MEAN, _DEVIATION).to(dtype)).logits

    tokens = encode(imported, video=video)["video"]
    assert (np.asarray(tokens.at)[:, 0] == -1).all()
    compare("vivit", tokens.x, model, call)
    compare("vivit's classifier", predictions(imported, video=video)["classes/label"], model, logits)
    again = export_and_load(imported, cls, tmp_path / "ours")
    with torch.no_grad():
        assert relative(logits(again, torch.float32), logits(model, torch.float32)) < 1e-6


def test_vivit_without_its_classifier(tmp_path):
    size = dict(image_size=32, num_frames=4, qkv_bias=False)
    model = randomise(transformers.VivitModel(transformers.VivitConfig(**SMALL, **size)))
    model.save_pretrained(tmp_path / "theirs")
    imported = read_published(tmp_path / "theirs")
    assert imported.left == ["vivit.pooler.dense.bias", "vivit.pooler.dense.weight"]
    assert all(reason("vivit", name) for name in imported.left)
    write_published(tmp_path / "ours", "vivit", imported.model, imported.tensors)
    again = transformers.VivitModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False)
    values = normalised(pixels(2, 4, 32, 32, 3), _MEAN, _DEVIATION)
    with torch.no_grad():
        assert relative(again(values).last_hidden_state, model(values).last_hidden_state) < 1e-6


def test_vivit_sees_pixels_as_its_processor_gives_them():
    frame = pixels(1, 1, 224, 224, 3)
    processor = transformers.VivitImageProcessor(do_resize=False, do_center_crop=False)
    theirs = processor([list(frame[0])], return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(normalised(frame, _MEAN, _DEVIATION).numpy(), theirs.numpy(), atol=1e-6)


def test_vjepa2(tmp_path):
    size = dict(crop_size=48, frames_per_clip=4, mlp_ratio=2.25)
    predictor = dict(pred_hidden_size=32, pred_num_attention_heads=2, pred_num_hidden_layers=1, pred_num_mask_tokens=3)
    small = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    model = randomise(transformers.VJEPA2Model(transformers.VJEPA2Config(**small, **size, **predictor)))
    imported = save_and_read(model, tmp_path / "theirs")
    video = pixels(2, 4, 48, 48, 3)
    values = normalised(video, IMAGENET_MEAN, IMAGENET_DEVIATION)
    order = np.random.default_rng(1).permuted(np.tile(np.arange(18), (2, 1)), axis=1)
    keep, hidden = np.sort(order[:, :6]), np.sort(order[:, 6:])

    def call(model, dtype):
        return model(values.to(dtype), skip_predictor=True).last_hidden_state

    def predicted(model, dtype):
        masks = dict(context_mask=[torch.tensor(keep)], target_mask=[torch.tensor(hidden)])
        return model(values.to(dtype), **masks).predictor_output.last_hidden_state

    tokens = encode(imported, video=video)["video"]
    compare("vjepa2", tokens.x, model, call)

    # Theirs is shown a whole clip's tokens and takes out the kept ones.
    def predict(recipe, batch):
        patches, mask = recipe.patches(batch), Mask(jnp.asarray(keep, jnp.int32), jnp.asarray(hidden, jnp.int32))
        whole = recipe.model.encode("video", patches["video"])
        shown = Tokens(gather(whole.x, mask.keep), gather(whole.valid, mask.keep), mask.keep)
        outputs = Outputs({"video": shown}, {"video": shown}, patches, {"video": mask})
        return recipe.objective["latent"].predict(outputs, batch)["video"]

    recipe, params = recipe_of(imported)
    batch = batch_of(video=video)
    ours = jax.jit(lambda params: recipe.apply({"params": params}, batch, method=predict))(params)
    compare("vjepa2's predictor", ours, model, predicted)
    again = export_and_load(imported, transformers.VJEPA2Model, tmp_path / "ours")
    with torch.no_grad():
        assert relative(predicted(again, torch.float32), predicted(model, torch.float32)) < 1e-6
    assert_same_state(again.encoder, model.encoder)


@pytest.mark.parametrize("attention", ["divided_space_time", "joint_space_time"])
def test_timesformer(tmp_path, attention: str):
    size = dict(image_size=48, num_frames=4, attention_type=attention, num_labels=5)
    cls = transformers.TimesformerForVideoClassification
    model = randomise(cls(transformers.TimesformerConfig(**SMALL, **size)))
    imported = save_and_read(model, tmp_path / "theirs")
    video = pixels(2, 4, 48, 48, 3)
    mean, deviation = (imported.model["trunk"]["encoders"]["video"][key] for key in ("mean", "deviation"))

    def call(model, dtype):
        x = model.timesformer(normalised(video, mean, deviation).to(dtype)).last_hidden_state
        tokens = x[:, 1:].unflatten(1, (9, 4)).transpose(1, 2).flatten(1, 2)  # place by place → frame by frame
        return torch.cat([x[:, :1], tokens], dim=1)

    def logits(model, dtype):
        return model(normalised(video, mean, deviation).to(dtype)).logits

    compare(attention, encode(imported, video=video)["video"].x, model, call)
    compare(f"{attention}'s classifier", predictions(imported, video=video)["classes/label"], model, logits)
    again = export_and_load(imported, cls, tmp_path / "ours")
    with torch.no_grad():
        assert relative(logits(again, torch.float32), logits(model, torch.float32)) < 1e-6


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("Vivit", "num_channels=4"),
        ("VJEPA2", "pred_mlp_ratio=4.5"),
        ("Timesformer", "qkv_bias=False"),
        ("Timesformer", "attention_type=space_only"),
    ],
)
def test_a_setting_that_no_model_of_ours_has_is_refused(tmp_path, kind: str, setting: str):
    key, value = setting.split("=")
    config = getattr(transformers, f"{kind}Config")(**{key: {"False": False, "4": 4, "4.5": 4.5}.get(value, value)})
    config.save_pretrained(tmp_path)
    save_file({"x": np.zeros(1, np.float32)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=key):
        read_published(tmp_path)


class CavMaeBlock(torch.nn.Module):
    """A block of CAV-MAE, written from the paper: norms for both streams, and for each of them alone."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        for name in ("norm1", "norm1_a", "norm1_v", "norm2", "norm2_a", "norm2_v"):
            setattr(self, name, torch.nn.LayerNorm(width))
        self.heads = heads
        self.attn = torch.nn.ModuleDict(dict(qkv=torch.nn.Linear(width, 3 * width), proj=torch.nn.Linear(width, width)))
        self.mlp = torch.nn.ModuleDict(dict(fc1=torch.nn.Linear(width, hidden), fc2=torch.nn.Linear(hidden, width)))

    def forward(self, x):
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attn.qkv(self.norm1(x)).chunk(3, -1)
        )
        weights = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1)
        x = x + self.attn.proj((weights @ value).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(torch.nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class CavMae(torch.nn.Module):
    """CAV-MAE's encoder: sound [B F M] and a picture [B 3 H W] → fused tokens of both, the sound's first."""

    def __init__(self, c: dict):
        super().__init__()
        width, patch = c["hidden_size"], c["patch_size"]
        counts = dict(a=c["num_mel_bins"] // patch * (c["audio_length"] // patch), v=(c["image_size"] // patch) ** 2)
        for stream, channels in (("a", 1), ("v", 3)):
            conv = torch.nn.Conv2d(channels, width, patch, patch)
            setattr(self, f"patch_embed_{stream}", torch.nn.ModuleDict(dict(proj=conv)))
            setattr(self, f"modality_{stream}", torch.nn.Parameter(torch.zeros(1, 1, width)))
            setattr(self, f"pos_embed_{stream}", torch.nn.Parameter(torch.zeros(1, counts[stream], width)))

        def make(depth):
            blocks = [CavMaeBlock(width, c["num_attention_heads"], c["intermediate_size"]) for _ in range(depth)]
            return torch.nn.ModuleList(blocks)

        self.blocks_a, self.blocks_v = make(c["modality_specific_depth"]), make(c["modality_specific_depth"])
        self.blocks_u = make(c["joint_depth"])
        self.norm, self.norm_a, self.norm_v = (torch.nn.LayerNorm(width) for _ in range(3))
        self.decoder_embed = torch.nn.Linear(width, 8)

    def forward(self, sound, picture):
        streams = []
        for stream, x in (("a", sound.transpose(1, 2)[:, None]), ("v", picture)):
            x = getattr(self, f"patch_embed_{stream}").proj(x).flatten(2).transpose(1, 2)
            x = x + getattr(self, f"pos_embed_{stream}") + getattr(self, f"modality_{stream}")
            for block in getattr(self, f"blocks_{stream}"):
                x = block(x)
            streams.append(x)
        x = torch.cat(streams, dim=1)
        for block in self.blocks_u:
            x = block(x)
        return self.norm(x)


CAV_MAE = dict(
    model_type="cav_mae", hidden_size=24, intermediate_size=48, num_attention_heads=2, layer_norm_eps=1e-5,
    modality_specific_depth=2, joint_depth=1, patch_size=16, image_size=32, audio_length=64, num_mel_bins=32,
    audio_mean=-5.081, audio_std=4.4849,
)  # fmt: skip


def test_cav_mae(tmp_path):
    model = randomise(CavMae(CAV_MAE))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(CAV_MAE))
    state = {f"module.{name}": value.contiguous().numpy() for name, value in model.state_dict().items()}
    save_file(state, str(tmp_path / "theirs" / "model.safetensors"))
    imported = read_published(tmp_path / "theirs")
    alone = [name for name in state if "decoder" in name or name.split(".")[-2].endswith(("_a", "_v"))]
    assert imported.left == sorted(alone)
    assert all(reason("cav_mae", name) for name in alone)

    rng = np.random.default_rng(0)
    video, audio = pixels(2, 1, 32, 32, 3), rng.normal(0, 0.1, (2, 64 * 160)).astype(np.float32)
    recipe, params = recipe_of(imported)
    batch = batch_of(video=video, audio=audio)

    def fuse(recipe, batch):
        patches = recipe.patches(batch)
        return recipe.model.encoder["audio"].spectrogram(batch.inputs["audio"]), recipe.model(patches, {}).fused

    spectrogram, fused = jax.jit(lambda params: recipe.apply({"params": params}, batch, method=fuse))(params)

    def call(model, dtype):
        picture = normalised(video, IMAGENET_MEAN, IMAGENET_DEVIATION)[:, 0]
        return model(torch.tensor(np.asarray(spectrogram)).to(dtype), picture.to(dtype))

    sound = np.asarray(fused["audio"].x).reshape(2, 4, 2, -1).swapaxes(1, 2).reshape(2, 8, -1)  # rows are mel bins
    compare("cav_mae", np.concatenate([sound, fused["video"].x], axis=1), model, call)

    # A modality's vector of ours, trained away from zero, and again.
    moved = dict(imported.tensors)
    moved["model.fuse.enter.modality_video"] = rng.normal(0, 0.5, 24).astype(np.float32)
    write_published(tmp_path / "ours", "cav_mae", imported.model, moved)
    again = read_published(tmp_path / "ours")
    run = jax.jit(lambda params: recipe.apply({"params": params}, batch, method=fuse)[1]["video"].x)
    one, two = (run(unflatten_dict(tensors, sep=".")) for tensors in (moved, again.tensors))
    assert relative(two, one) < 1e-6 < relative(fused["video"].x, one)


VIDEOPRISM = dict(
    hidden_size=24, num_attention_heads=2, intermediate_size=48, image_size=36, num_frames=3, tubelet_size=[1, 12, 12],
    num_spatial_layers=2, num_temporal_layers=2, attn_logit_softcapping=2.0,
)  # fmt: skip


def in_the_original_layout(model, heads: int) -> dict:
    """VideoPrism's tensors as its authors publish them: flattened Flax names, layers stacked."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
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
    cls = transformers.VideoPrismVisionModel
    model = randomise(cls(transformers.VideoPrismVisionConfig(**VIDEOPRISM)))
    imported = save_and_read(model, tmp_path / "theirs")
    video = pixels(2, 3, 36, 36, 3)

    def call(model, dtype):
        return model(normalised(video, (0, 0, 0), (255, 255, 255)).to(dtype)).last_hidden_state

    compare("videoprism", encode(imported, video=video)["video"].x, model, call)
    assert_same_state(export_and_load(imported, cls, tmp_path / "ours"), model)


@pytest.mark.parametrize("inside", ["", "vision_encoder/"])
def test_videoprism_as_its_authors_publish_it(tmp_path, inside: str):
    """The same tensors in the original's layout, without a config, are the same model of ours."""
    model = randomise(transformers.VideoPrismVisionModel(transformers.VideoPrismVisionConfig(**VIDEOPRISM)))
    imported = save_and_read(model, tmp_path / "theirs")
    arrays = {f"params/{inside}{name}": value for name, value in in_the_original_layout(model, heads=2).items()}
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


@pytest.mark.parametrize("kind", ["VideoModel", "ClipModel"])
def test_videoprism_in_a_larger_model(tmp_path, kind: str):
    vision = transformers.VideoPrismVisionConfig(**VIDEOPRISM, num_auxiliary_layers=1)
    text = dict(vocab_size=8, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.VideoPrismConfig(vision_config=vision.to_dict(), text_config=text)
    larger = getattr(transformers, f"VideoPrism{kind}")
    model = randomise(larger(config if kind == "ClipModel" else vision))
    model.save_pretrained(tmp_path / "theirs")
    imported = read_published(tmp_path / "theirs")
    assert imported.left
    assert all(reason(imported.family, name) for name in imported.left)
    again = export_and_load(imported, transformers.VideoPrismVisionModel, tmp_path / "ours")
    assert_same_state(again, (model.video_model if kind == "ClipModel" else model).vision_model)


def test_an_npz_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", **{"params/embed/kernel": np.zeros(3)})
    with pytest.raises(UserError, match="VideoPrism"):
        read_published(tmp_path)


@pytest.mark.parametrize("family", ["vivit", "vjepa2", "timesformer", "videoprism_vision_model", "cav_mae"])
def test_a_model_described_is_the_model_that_its_config_describes(family: str):
    """What `convert` asks of an export: the family's words, read back, say the same."""
    module = FAMILIES[family]
    for parts in ({"": frozenset({""})}.get(module.PREFIX, frozenset()), frozenset({"head", "predictor"})):
        model = module.describe(CAV_MAE if family == "cav_mae" else {}, parts)
        config, found = module.config(model)
        assert module.describe(config, found) == model
