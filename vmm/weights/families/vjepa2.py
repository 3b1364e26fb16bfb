"""V-JEPA 2 (Assran et al. 2025): the encoder, and the predictor as an objective.

Of its ten mask tokens, one for each kind of mask, the second is read: that of long-range masks, and the one that
`transformers` predicts with. Written back, all ten are the one.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from vmm.weights.families.common import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    activation_of,
    activation_to,
    agree,
    late,
    margin,
    require,
    square,
)
from vmm.weights.layout import Rule, block, linear, norm, patching

PREFIX = "vjepa2."
LEFT = {r"^pooler\.|^classifier\.": "the attentive classifier"}
_ENCODER = "model.encoder_video"
PROCESSOR = dict(video_processor_type="VJEPA2VideoProcessor")
_PREDICTOR = "objective_latent.video"
_DEFAULTS = dict(
    patch_size=16, crop_size=256, frames_per_clip=64, tubelet_size=2, hidden_size=1024, num_attention_heads=16,
    num_hidden_layers=24, mlp_ratio=4.0, layer_norm_eps=1e-6, qkv_bias=True, hidden_act="gelu", pred_hidden_size=384,
    pred_num_attention_heads=12, pred_num_hidden_layers=12, pred_num_mask_tokens=10,
)  # fmt: skip


def parts(names: Iterable[str]) -> frozenset[str]:
    return frozenset({"predictor"}) if f"{PREFIX}predictor.proj.weight" in names else frozenset()


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    c = _DEFAULTS | dict(config)
    require(c, "vjepa2", in_chans=3, pred_mlp_ratio=4.0)
    patch = square(c, "patch_size")
    style = dict(activation=activation_of(c["hidden_act"]), epsilon=c["layer_norm_eps"])
    encoder = dict(
        kind="video",
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        ratio=int(c["hidden_size"] * c["mlp_ratio"]) / c["hidden_size"],
        tubelet=(c["tubelet_size"], patch, patch),
        positions="rotary_vjepa2",
        block=style,
        mean=IMAGENET_MEAN,
        deviation=IMAGENET_DEVIATION,
    )
    predictor = dict(
        kind="latent",
        modalities=("video",),
        width=c["pred_hidden_size"],
        depth=c["pred_num_hidden_layers"],
        heads=c["pred_num_attention_heads"],
        positions="rotary_vjepa2",
        block=style,
    )
    masked = dict(video=dict(kind="multiblock", ratio=0.9, blocks=2, scale=0.7))
    return dict(
        trunk=dict(encoders=dict(video=encoder), fusion=late(encoder)),
        views=dict(masked=masked, target=dict(teacher=True)) if "predictor" in parts else {},
        objectives=dict(latent=predictor) if "predictor" in parts else {},
        # Four frames a second; its processor cuts 256 out of 292.
        clip=dict(
            frames=c["frames_per_clip"],
            size=c["crop_size"],
            seconds=c["frames_per_clip"] / 4,
            crop=margin(c["crop_size"]),
        ),
    )


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    encoder, clip = model["trunk"]["encoders"]["video"], model["clip"]
    predictor = model["objectives"].get("latent")
    if predictor:
        fixed = dict(kind="latent", modalities=("video",), positions="rotary_vjepa2", block=encoder["block"])
        agree(predictor, "objectives.latent", "vjepa2", **fixed)
    result = dict(
        model_type="vjepa2",
        architectures=["VJEPA2Model"],
        hidden_size=encoder["width"],
        num_hidden_layers=encoder["depth"],
        num_attention_heads=encoder["heads"],
        mlp_ratio=encoder["ratio"],
        hidden_act=activation_to(encoder["block"]["activation"]),
        layer_norm_eps=encoder["block"]["epsilon"],
        tubelet_size=encoder["tubelet"][0],
        patch_size=encoder["tubelet"][1],
        frames_per_clip=clip["frames"],
        crop_size=clip["size"],
        in_chans=3,
        qkv_bias=True,
    )
    if predictor:
        result |= dict(
            pred_hidden_size=predictor["width"],
            pred_num_hidden_layers=predictor["depth"],
            pred_num_attention_heads=predictor["heads"],
            pred_num_mask_tokens=10,
        )
    return result, frozenset({"predictor"}) if predictor else frozenset()


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    c = _DEFAULTS | dict(config)
    patch, theirs = square(c, "patch_size"), f"{PREFIX}encoder"
    tubelet = (c["tubelet_size"], patch, patch)
    biases = "query key value" if c["qkv_bias"] else ""
    shape = c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], biases
    result = [
        *patching(f"{theirs}.embeddings.patch_embeddings.proj", f"{_ENCODER}.embed", tubelet),
        *_layers(theirs, f"{_ENCODER}.stack", *shape),
    ]
    if "predictor" in parts:
        theirs, width, count = f"{PREFIX}predictor", c["pred_hidden_size"], c["pred_num_mask_tokens"]
        shape = width, c["pred_num_hidden_layers"], c["pred_num_attention_heads"], biases
        result += [
            *linear(f"{theirs}.embeddings.predictor_embeddings", f"{_PREDICTOR}.enter_video"),
            Rule(
                (f"{theirs}.embeddings.mask_tokens",),
                (f"{_PREDICTOR}.mask",),
                lambda tokens: (tokens[1 % count].reshape(width),),
                lambda token: (np.tile(token, (count, 1, 1, 1)),),
            ),
            *_layers(theirs, f"{_PREDICTOR}.stack", *shape),
            *linear(f"{theirs}.proj", f"{_PREDICTOR}.head"),
        ]
    return result


def _layers(theirs: str, ours: str, width: int, depth: int, heads: int, biases: str) -> list[Rule]:
    result = []
    for i in range(depth):
        layer = f"{theirs}.layer.{i}"
        names = dict(
            norm_attention=f"{layer}.norm1",
            query=f"{layer}.attention.query",
            key=f"{layer}.attention.key",
            value=f"{layer}.attention.value",
            out=f"{layer}.attention.proj",
            norm_mlp=f"{layer}.norm2",
            up=f"{layer}.mlp.fc1",
            down=f"{layer}.mlp.fc2",
        )
        result += block(names, f"{ours}.blocks.layer_{i}.block", width, heads, biases)
    return result + norm(f"{theirs}.layernorm", f"{ours}.norm")
