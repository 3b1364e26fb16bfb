"""ViViT, model 1 (Arnab et al. 2021): joint space-time, a class token, learned positions; the classifier."""

from collections.abc import Iterable, Mapping

from vmm.weights.families.common import (
    classifier,
    classifier_to,
    margin,
    require,
    square,
    transformer,
    transformer_to,
    video_model,
)
from vmm.weights.families.vit import layers
from vmm.weights.layout import Rule, class_token, linear, norm, patching

PREFIX = "vivit."
LEFT = {r"\.pooler\.": "the pooler"}
_ENCODER = "model.encoder_video"
_DEFAULTS = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act="gelu_fast",
    layer_norm_eps=1e-6, image_size=224, num_frames=32, tubelet_size=(2, 16, 16), qkv_bias=True,
)  # fmt: skip
# Its image processor brings pixels to −1 … 1 and then subtracts and divides by 0.5: −3 … 1.
PROCESSOR = dict(image_processor_type="VivitImageProcessor", offset=True, rescale_factor=1 / 127.5)
_MEAN = (191.25, 191.25, 191.25)
_DEVIATION = (63.75, 63.75, 63.75)


def parts(names: Iterable[str]) -> frozenset[str]:
    return frozenset({"head"}) if "classifier.weight" in names else frozenset()


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    c = _DEFAULTS | dict(config)
    require(c, "vivit", num_channels=3)
    encoder = dict(
        kind="video",
        **transformer(c),
        tubelet=tuple(c["tubelet_size"]),
        positions="learned",
        registers=1,
        mean=_MEAN,
        deviation=_DEVIATION,
    )
    frames, size = c["num_frames"], square(c, "image_size")
    # Its paper takes every second frame of Kinetics' 25 a second; its processor cuts 224 out of 256.
    model = video_model(encoder, frames, size, margin(size), seconds=2 * frames / 25)
    return model | classifier(c) if "head" in parts else model


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    encoder, clip, head = model["trunk"]["encoders"]["video"], model["clip"], model["objectives"].get("classes")
    result = dict(
        model_type="vivit",
        architectures=["VivitForVideoClassification" if head else "VivitModel"],
        **transformer_to(encoder),
        tubelet_size=list(encoder["tubelet"]),
        num_frames=clip["frames"],
        image_size=clip["size"],
        num_channels=3,
        qkv_bias=True,
    )
    return result | (classifier_to(model) if head else {}), frozenset({"head"}) if head else frozenset()


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    c = _DEFAULTS | dict(config)
    patch, size = tuple(c["tubelet_size"]), square(c, "image_size")
    grid = (c["num_frames"] // patch[0], size // patch[1], size // patch[2])
    theirs = f"{PREFIX}embeddings"
    result = [
        *patching(f"{theirs}.patch_embeddings.projection", f"{_ENCODER}.embed", patch),
        class_token(f"{theirs}.cls_token", f"{theirs}.position_embeddings", _ENCODER, grid, c["hidden_size"]),
        *layers(c, f"{PREFIX}encoder.layer", f"{_ENCODER}.stack"),
        *norm(f"{PREFIX}layernorm", f"{_ENCODER}.stack.norm"),
    ]
    return result + (linear("classifier", "objective_classes.video_label") if "head" in parts else [])
