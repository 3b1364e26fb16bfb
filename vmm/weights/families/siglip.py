"""SigLIP (Zhai et al. 2023) and SigLIP 2 of one resolution (Tschannen et al. 2025): both encoders, heads, scale, bias.

Its text is as long as it was trained with, filled up with its padding id, which is a token like others.
"""

from collections.abc import Iterable, Mapping

from vmm.weights.families.clip import VIDEO, layers, text_rules
from vmm.weights.families.common import HALF, agree, late, require, square, transformer, transformer_to
from vmm.weights.families.vit import grid_of, image_encoder, image_to, size_of
from vmm.weights.layout import Rule, fused_attention, linear, norm, patching, reshaped

PREFIX = ""
LEFT = {r"position_ids$": "0, 1, 2, …"}
PROCESSOR = dict(image_processor_type="SiglipImageProcessor")
_CONTRAST = "objective_contrast"
_STYLE = dict(
    hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    intermediate_size=3072,
)  # fmt: skip
_HEADS = dict(
    variant="sigmoid",
    pooling=dict(video="attention_mlp", text="last"),
    project=dict(video="none", text="affine"),
    separate=False,
)
_VISION = dict(**_STYLE, image_size=224, patch_size=16)
_TEXT = dict(**_STYLE, vocab_size=32000, max_position_embeddings=64)


def parts(names: Iterable[str]) -> frozenset[str]:
    return frozenset()


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    vision, text = _sides(config)
    width = vision["hidden_size"]
    require(vision, "siglip", num_channels=3, vision_use_head=True)
    require(text, "siglip, with images of that width,", projection_size=width)
    encoders = dict(
        video=image_encoder(vision, HALF, HALF) | dict(registers=0),
        text=dict(kind="text", vocabulary=text["vocab_size"], **transformer(text), padding=-1, positions="learned"),
    )
    video = encoders["video"]
    contrast = dict(
        kind="contrastive",
        width=width,
        pairs=(("video", "text"),),
        max_scale=1000.0,
        **_HEADS,
        heads=video["heads"],
        block=dict(ratio=video["ratio"], **video["block"]),
    )
    return dict(
        trunk=dict(encoders=encoders, fusion=late(video) | dict(width=0)),
        views=dict(clean={}),
        objectives=dict(contrast=contrast),
        clip=dict(frames=1, size=size_of(vision), crop=0.0, text_length=text["max_position_embeddings"]),
    )


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    encoder, contrast = model["trunk"]["encoders"]["text"], model["objectives"]["contrast"]
    width, video = contrast["width"], model["trunk"]["encoders"]["video"]
    head = dict(heads=video["heads"], block=dict(ratio=video["ratio"], **video["block"]))
    agree(contrast, "objectives.contrast", "siglip", **_HEADS, **head)
    text = dict(
        model_type="siglip_text_model",
        vocab_size=encoder["vocabulary"],
        **transformer_to(encoder),
        max_position_embeddings=model["clip"]["text_length"],
        projection_size=width,
    )
    vision = dict(model_type="siglip_vision_model", **image_to(model), vision_use_head=True)
    result = dict(model_type="siglip", architectures=["SiglipModel"], vision_config=vision, text_config=text)
    return result, frozenset()


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    vision, text = _sides(config)
    width, heads, patch = vision["hidden_size"], vision["num_attention_heads"], square(vision, "patch_size")
    theirs, head, pool = "vision_model.embeddings", "vision_model.head", f"{_CONTRAST}.pool_video_all"
    grid = grid_of(vision)
    return [
        *patching(f"{theirs}.patch_embedding", f"{VIDEO}.embed", (patch, patch)),
        reshaped(
            f"{theirs}.position_embedding.weight",
            f"{VIDEO}.positions.table",
            (grid[1] * grid[2], width),
            (*grid, width),
        ),
        *layers(vision, "vision_model", VIDEO),
        *norm("vision_model.post_layernorm", f"{VIDEO}.stack.norm"),
        reshaped(f"{head}.probe", f"{pool}.query", (1, 1, width), (1, width)),
        *fused_attention(f"{head}.attention.in_proj", f"{head}.attention.out_proj", f"{pool}.attention", heads),
        *norm(f"{head}.layernorm", f"{pool}.norm"),
        *linear(f"{head}.mlp.fc1", f"{pool}.mlp.up"),
        *linear(f"{head}.mlp.fc2", f"{pool}.mlp.down"),
        *text_rules(text),
        *linear("text_model.head", f"{_CONTRAST}.project_text_all"),
        reshaped("logit_scale", f"{_CONTRAST}.log_scale", (1,), ()),
        reshaped("logit_bias", f"{_CONTRAST}.logit_bias", (1,), ()),
    ]


def _sides(config: Mapping) -> tuple[dict, dict]:
    """Returns the settings of images and of text, which files write down only where they are not the default."""
    vision = _VISION | dict(config.get("vision_config") or {})
    text = _TEXT | dict(config.get("text_config") or {})
    return vision, text | dict(projection_size=text.get("projection_size") or text["hidden_size"])
