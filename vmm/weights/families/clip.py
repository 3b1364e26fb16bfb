"""CLIP (Radford et al. 2021): both encoders, the projections and the logit scale; an image is a clip of one frame.

The norm after the image encoder is over all tokens here, over the class token alone there: its output is the same.
"""

from collections.abc import Iterable, Mapping

from vmm.errors import UserError
from vmm.weights.families.common import (
    CLIP_DEVIATION,
    CLIP_MEAN,
    agree,
    late,
    require,
    square,
    transformer,
    transformer_to,
)
from vmm.weights.families.vit import grid_of, image_encoder, image_to, size_of
from vmm.weights.layout import Rule, block, class_token, linear, norm, patching, same, scaled, zeros

PREFIX = ""
LEFT = {r"position_ids$": "0, 1, 2, …"}
VIDEO, TEXT = "model.encoder_video", "model.encoder_text"
PROCESSOR = dict(image_processor_type="CLIPImageProcessor")
_CONTRAST = "objective_contrast"
_STYLE = dict(hidden_act="quick_gelu", layer_norm_eps=1e-5, num_hidden_layers=12)
_HEADS = dict(variant="softmax", pooling=dict(video="first", text="last"), project="linear", separate=False)
_VISION = dict(**_STYLE, hidden_size=768, num_attention_heads=12, intermediate_size=3072, image_size=224, patch_size=32)
_TEXT = dict(
    **_STYLE, hidden_size=512, num_attention_heads=8, intermediate_size=2048, vocab_size=49408,
    max_position_embeddings=77, eos_token_id=49407,
)  # fmt: skip


def parts(names: Iterable[str]) -> frozenset[str]:
    return frozenset()


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    vision, text = _sides(config)
    require(vision, "clip", num_channels=3)
    end = text["eos_token_id"]
    if not isinstance(end, int):
        raise UserError(f"config.json eos_token_id: clip is read with one number only, got {end!r}")
    encoders = dict(
        video=image_encoder(vision, CLIP_MEAN, CLIP_DEVIATION) | dict(norm_embedding=True),
        text=dict(
            kind="text",
            vocabulary=text["vocab_size"],
            **transformer(text),
            causal=True,
            padding=-1,
            # 2 stands in files from before the id was written down right: then it is the last of the vocabulary.
            end=text["vocab_size"] - 1 if end == 2 else end,
            positions="learned",
        ),
    )
    contrast = dict(
        kind="contrastive",
        width=config.get("projection_dim") or 512,
        pairs=(("video", "text"),),
        **_HEADS,
    )
    return dict(
        trunk=dict(encoders=encoders, fusion=late(encoders["video"]) | dict(width=0)),
        views=dict(clean={}),
        objectives=dict(contrast=contrast),
        clip=dict(frames=1, size=size_of(vision), crop=1.0, text_length=text["max_position_embeddings"]),
    )


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    encoder, contrast = model["trunk"]["encoders"]["text"], model["objectives"]["contrast"]
    agree(contrast, "objectives.contrast", "clip", **_HEADS)
    text = dict(
        model_type="clip_text_model",
        vocab_size=encoder["vocabulary"],
        **transformer_to(encoder),
        max_position_embeddings=model["clip"]["text_length"],
        eos_token_id=encoder["end"],
        projection_dim=contrast["width"],
    )
    vision = dict(model_type="clip_vision_model", **image_to(model), projection_dim=contrast["width"])
    result = dict(
        model_type="clip",
        architectures=["CLIPModel"],
        projection_dim=contrast["width"],
        vision_config=vision,
        text_config=text,
    )
    return result, frozenset()


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    vision, text = _sides(config)
    width, patch = vision["hidden_size"], square(vision, "patch_size")
    theirs = "vision_model.embeddings"
    return [
        *patching(f"{theirs}.patch_embedding", f"{VIDEO}.embed", (patch, patch), bias=False),
        zeros(f"{VIDEO}.embed.bias", width),
        class_token(
            f"{theirs}.class_embedding",
            f"{theirs}.position_embedding.weight",
            VIDEO,
            grid_of(vision),
            width,
            batched=False,
        ),
        *norm("vision_model.pre_layrnorm", f"{VIDEO}.norm_embedding"),
        *layers(vision, "vision_model", VIDEO),
        *norm("vision_model.post_layernorm", f"{VIDEO}.stack.norm"),
        *text_rules(text),
        *linear("visual_projection", f"{_CONTRAST}.project_video_all", bias=False),
        *linear("text_projection", f"{_CONTRAST}.project_text_all", bias=False),
        same("logit_scale", f"{_CONTRAST}.log_scale"),
    ]


def _sides(config: Mapping) -> tuple[dict, dict]:
    """Returns the settings of images and of text; a key that ends in _dict, of the first files, goes before."""

    def side(name: str, defaults: Mapping) -> dict:
        return dict(defaults) | dict(config.get(f"{name}_dict") or config.get(name) or {})

    return side("vision_config", _VISION), side("text_config", _TEXT)


# What CLIP and SigLIP share


def text_rules(c: Mapping) -> list[Rule]:
    """Returns the rules of the text encoder."""
    theirs = "text_model.embeddings"
    return [
        scaled(f"{theirs}.token_embedding.weight", f"{TEXT}.embed.table", c["hidden_size"] ** -0.5),
        same(f"{theirs}.position_embedding.weight", f"{TEXT}.positions.table"),
        *layers(c, "text_model", TEXT),
        *norm("text_model.final_layer_norm", f"{TEXT}.stack.norm"),
    ]


def layers(c: Mapping, theirs: str, ours: str) -> list[Rule]:
    """Returns the rules of an encoder's blocks."""
    result = []
    for i in range(c["num_hidden_layers"]):
        layer = f"{theirs}.encoder.layers.{i}"
        names = dict(
            norm_attention=f"{layer}.layer_norm1",
            query=f"{layer}.self_attn.q_proj",
            key=f"{layer}.self_attn.k_proj",
            value=f"{layer}.self_attn.v_proj",
            out=f"{layer}.self_attn.out_proj",
            norm_mlp=f"{layer}.layer_norm2",
            up=f"{layer}.mlp.fc1",
            down=f"{layer}.mlp.fc2",
        )
        result += block(names, f"{ours}.stack.blocks.layer_{i}.block", c["hidden_size"], c["num_attention_heads"])
    return result
