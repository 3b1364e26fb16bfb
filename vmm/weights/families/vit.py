"""ViT (Dosovitskiy et al. 2021): an image is a clip of one frame; the class token is a register; the classifier."""

from collections.abc import Iterable, Mapping

from vmm.weights.families.common import (
    HALF,
    agree,
    classifier,
    classifier_to,
    require,
    square,
    transformer,
    transformer_to,
    video_model,
)
from vmm.weights.layout import Rule, block, class_token, linear, norm, patching

PREFIX = "vit."
LEFT = {r"\.pooler\.": "the pooler", r"mask_token$": "of masked pretraining"}
PROCESSOR = dict(image_processor_type="ViTImageProcessor")
ENCODER = "model.encoder_video"
_DEFAULTS = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act="gelu",
    layer_norm_eps=1e-12, image_size=224, patch_size=16, qkv_bias=True,
)  # fmt: skip


def parts(names: Iterable[str]) -> frozenset[str]:
    return frozenset({"head"}) if "classifier.weight" in names else frozenset()


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    c = _DEFAULTS | dict(config)
    require(c, "vit", num_channels=3)
    encoder = image_encoder(c, HALF, HALF)
    model = video_model(encoder, 1, size_of(c), crop=0.0)  # its processor squeezes the whole image
    return model | classifier(c) if "head" in parts else model


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    head = model["objectives"].get("classes")
    if head:
        agree(head, "objectives.classes", "vit", pooling="first")
    result = dict(
        model_type="vit",
        architectures=["ViTForImageClassification" if head else "ViTModel"],
        **image_to(model),
        qkv_bias=True,
    )
    if head:
        result |= classifier_to(model)
    return result, frozenset({"head"}) if head else frozenset()


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    c = _DEFAULTS | dict(config)
    result = image_rules(c, PREFIX)
    if "head" in parts:
        result += linear("classifier", "objective_classes.video_label")
    return result


# What ViT, ViT-MAE and AST share


def image_encoder(c: Mapping, mean: tuple, deviation: tuple) -> dict:
    """Returns the encoder of images in patches with a class token, of the usual keys."""
    patch = square(c, "patch_size")
    return dict(
        kind="video",
        **transformer(c),
        tubelet=(1, patch, patch),
        positions="learned",
        registers=1,
        mean=mean,
        deviation=deviation,
    )


def image_to(model: Mapping) -> dict:
    """Returns the keys that image_encoder is made of."""
    encoder = model["trunk"]["encoders"]["video"]
    return dict(
        **transformer_to(encoder), image_size=model["clip"]["size"], patch_size=encoder["tubelet"][1], num_channels=3
    )


def grid_of(c: Mapping) -> tuple[int, int, int]:
    """Returns the grid of an image's patches, of one frame."""
    side = square(c, "image_size") // square(c, "patch_size")
    return 1, side, side


def size_of(c: Mapping) -> int:
    """Returns the pixels of an image's side that patches cover: what is beyond the last whole one is not seen."""
    return grid_of(c)[1] * square(c, "patch_size")


def image_rules(c: Mapping, prefix: str) -> list[Rule]:
    """Returns the rules of the encoder of ViT."""
    patch, width = square(c, "patch_size"), c["hidden_size"]
    theirs = f"{prefix}embeddings"
    return [
        *patching(f"{theirs}.patch_embeddings.projection", f"{ENCODER}.embed", (patch, patch)),
        class_token(f"{theirs}.cls_token", f"{theirs}.position_embeddings", ENCODER, grid_of(c), width),
        *layers(c, f"{prefix}encoder.layer", f"{ENCODER}.stack"),
        *norm(f"{prefix}layernorm", f"{ENCODER}.stack.norm"),
    ]


def layers(c: Mapping, theirs: str, ours: str) -> list[Rule]:
    """Returns the rules of the blocks: c has hidden_size, num_hidden_layers, num_attention_heads, qkv_bias."""
    result = []
    for i in range(c["num_hidden_layers"]):
        layer = f"{theirs}.{i}"
        names = dict(
            norm_attention=f"{layer}.layernorm_before",
            query=f"{layer}.attention.attention.query",
            key=f"{layer}.attention.attention.key",
            value=f"{layer}.attention.attention.value",
            out=f"{layer}.attention.output.dense",
            norm_mlp=f"{layer}.layernorm_after",
            up=f"{layer}.intermediate.dense",
            down=f"{layer}.output.dense",
        )
        biases = "query key value" if c["qkv_bias"] else ""
        result += block(names, f"{ours}.blocks.layer_{i}.block", c["hidden_size"], c["num_attention_heads"], biases)
    return result
