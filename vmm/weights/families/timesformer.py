"""TimeSformer (Bertasius et al. 2021): divided attention, a class token, positions of frames and of places; the classifier.

Its tokens lie place by place, each over time; ours frame by frame. Its own frames are resized to another number of
them, or another size, by the nearest; ours by cubic interpolation.
"""

from collections.abc import Iterable, Mapping

from vmm.errors import UserError, one_of
from vmm.weights.families.common import (
    classifier,
    classifier_to,
    require,
    square,
    transformer,
    transformer_to,
    video_model,
)
from vmm.weights.layout import Rule, class_token, fused_attention, linear, norm, patching, reshaped

PREFIX = "timesformer."
_ENCODER = "model.encoder_video"
_DEFAULTS = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act="gelu",
    layer_norm_eps=1e-6, image_size=224, patch_size=16, num_frames=8, attention_type="divided_space_time",
)  # fmt: skip
_KINDS = {"divided_space_time": "divided", "joint_space_time": "joint"}
PROCESSOR = dict(image_processor_type="VideoMAEImageProcessor")
# Its published models' own, not those of ImageNet.
_MEAN = (0.45 * 255,) * 3
_DEVIATION = (0.225 * 255,) * 3


def parts(names: Iterable[str]) -> frozenset[str]:
    return frozenset({"head"}) if "classifier.weight" in names else frozenset()


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    c = _DEFAULTS | dict(config)
    require(c, "timesformer", qkv_bias=True, num_channels=3)
    kind, patch = c["attention_type"], square(c, "patch_size")
    if kind not in _KINDS:
        raise UserError(f"config.json attention_type: {kind!r} is not known here; {one_of(kind, _KINDS)}")
    encoder = dict(
        kind="video",
        **transformer(c),
        tubelet=(1, patch, patch),
        attention=_KINDS[kind],
        positions="factorised",
        registers=1,
        mean=_MEAN,
        deviation=_DEVIATION,
    )
    frames = c["num_frames"]  # of 8 every 32nd of 30 a second, of 16 every 16th, of 96 every fourth
    model = video_model(encoder, frames, square(c, "image_size"), seconds=(384 if frames >= 96 else 256) / 30)
    return model | classifier(c) if "head" in parts else model


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    encoder, clip, head = model["trunk"]["encoders"]["video"], model["clip"], model["objectives"].get("classes")
    names = {ours: theirs for theirs, ours in _KINDS.items()}
    result = dict(
        model_type="timesformer",
        architectures=["TimesformerForVideoClassification" if head else "TimesformerModel"],
        **transformer_to(encoder),
        patch_size=encoder["tubelet"][1],
        attention_type=names[encoder["attention"]],
        num_frames=clip["frames"],
        image_size=clip["size"],
        num_channels=3,
        qkv_bias=True,
    )
    return result | (classifier_to(model) if head else {}), frozenset({"head"}) if head else frozenset()


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    c = _DEFAULTS | dict(config)
    width, heads, patch, frames = c["hidden_size"], c["num_attention_heads"], square(c, "patch_size"), c["num_frames"]
    side, theirs = square(c, "image_size") // patch, f"{PREFIX}embeddings"
    result = [
        *patching(f"{theirs}.patch_embeddings.projection", f"{_ENCODER}.embed", (patch, patch)),
        class_token(
            f"{theirs}.cls_token",
            f"{theirs}.position_embeddings",
            _ENCODER,
            (side, side),
            width,
            table="rest",
        ),
        reshaped(f"{theirs}.time_embeddings", f"{_ENCODER}.positions.first", (1, frames, width), (frames, width)),
    ]
    for i in range(c["num_hidden_layers"]):
        layer, ours = f"{PREFIX}encoder.layer.{i}", f"{_ENCODER}.stack.blocks.layer_{i}.block"
        if c["attention_type"] == "divided_space_time":
            result += norm(f"{layer}.temporal_layernorm", f"{ours}.norm_temporal")
            result += _attention(f"{layer}.temporal_attention", f"{ours}.attention_temporal", heads)
            result += linear(f"{layer}.temporal_dense", f"{ours}.temporal_out")
        result += norm(f"{layer}.layernorm_before", f"{ours}.norm_attention")
        result += _attention(f"{layer}.attention", f"{ours}.attention", heads)
        result += norm(f"{layer}.layernorm_after", f"{ours}.norm_mlp")
        result += linear(f"{layer}.intermediate.dense", f"{ours}.mlp.up")
        result += linear(f"{layer}.output.dense", f"{ours}.mlp.down")
    result += norm(f"{PREFIX}layernorm", f"{_ENCODER}.stack.norm")
    return result + (linear("classifier", "objective_classes.video_label") if "head" in parts else [])


def _attention(theirs: str, ours: str, heads: int) -> list[Rule]:
    return fused_attention(f"{theirs}.attention.qkv", f"{theirs}.output.dense", ours, heads)
