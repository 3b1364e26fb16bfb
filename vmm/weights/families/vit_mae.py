"""ViT-MAE (He et al. 2022): the encoder, and the decoder where the file holds it.

Both have fixed sin-cos positions there, and the same numbers as learned tables here. Where pixels are not normalised
by patch, its targets are ImageNet's standardised colours, ours −1 … 1: predictions are the same, the loss is not.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from vmm.errors import UserError
from vmm.weights.families.common import IMAGENET_DEVIATION, IMAGENET_MEAN, agree, require, video_model
from vmm.weights.families.vit import grid_of, image_encoder, image_rules, image_to, layers, size_of
from vmm.weights.layout import Rule, linear, norm, reshaped

PREFIX = "vit."
LEFT = {}
_PIXELS = (IMAGENET_MEAN, IMAGENET_DEVIATION)  # of its targets too
PROCESSOR = dict(image_processor_type="ViTImageProcessor")
_DECODER = "objective_pixels.video"
_DEFAULTS = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act="gelu",
    layer_norm_eps=1e-12, image_size=224, patch_size=16, qkv_bias=True, decoder_hidden_size=512,
    decoder_num_hidden_layers=8, decoder_num_attention_heads=16, decoder_intermediate_size=2048, mask_ratio=0.75,
    norm_pix_loss=False,
)  # fmt: skip


def parts(names: Iterable[str]) -> frozenset[str]:
    names = list(names)
    if "decoder.mask_token" not in names:
        return frozenset()
    # The published files and later ones call the decoder's blocks differently.
    later = any(name.startswith("decoder.decoder_encoder.") for name in names)
    return frozenset({"decoder", "later"} if later else {"decoder"})


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    c = _DEFAULTS | dict(config)
    require(c, "vit_mae", num_channels=3)
    encoder = image_encoder(c, IMAGENET_MEAN, IMAGENET_DEVIATION)
    model = video_model(encoder, 1, size_of(c), crop=0.0)  # its processor squeezes the whole image
    if "decoder" in parts:
        pixels = dict(
            kind="masked",
            modalities=("video",),
            width=c["decoder_hidden_size"],
            depth=c["decoder_num_hidden_layers"],
            heads=c["decoder_num_attention_heads"],
            ratio=c["decoder_intermediate_size"] / c["decoder_hidden_size"],
            standardise="unbiased" if c["norm_pix_loss"] else False,
            pixels=_PIXELS,
            positions="learned",
            enter_bias=True,
            block=encoder["block"],
        )
        model |= dict(
            views=dict(masked=dict(video=dict(kind="random", ratio=c["mask_ratio"]))), objectives=dict(pixels=pixels)
        )
    return model


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    decoder = model["objectives"].get("pixels")
    if decoder:
        style = model["trunk"]["encoders"]["video"]["block"]
        agree(
            decoder, "objectives.pixels", "vit_mae", positions="learned", enter_bias=True, block=style, pixels=_PIXELS
        )
    result = dict(
        model_type="vit_mae",
        architectures=["ViTMAEForPreTraining" if decoder else "ViTMAEModel"],
        **image_to(model),
        qkv_bias=True,
    )
    if decoder:
        result |= dict(
            decoder_hidden_size=decoder["width"],
            decoder_num_hidden_layers=decoder["depth"],
            decoder_num_attention_heads=decoder["heads"],
            decoder_intermediate_size=round(decoder["ratio"] * decoder["width"]),
            norm_pix_loss=decoder["standardise"] == "unbiased",
            mask_ratio=model["views"]["masked"]["video"]["ratio"],
        )
    return result, frozenset({"decoder"}) if decoder else frozenset()


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    c = _DEFAULTS | dict(config)
    result = image_rules(c, PREFIX)
    if "decoder" in parts:
        width = c["decoder_hidden_size"]
        decoder = dict(
            hidden_size=width,
            num_hidden_layers=c["decoder_num_hidden_layers"],
            num_attention_heads=c["decoder_num_attention_heads"],
            qkv_bias=c["qkv_bias"],
        )
        blocks = "decoder.decoder_encoder.layer" if "later" in parts else "decoder.decoder_layers"
        result += [
            *linear("decoder.decoder_embed", f"{_DECODER}.enter"),
            reshaped("decoder.mask_token", f"{_DECODER}.mask", (1, 1, width), (width,)),
            _positions("decoder.decoder_pos_embed", f"{_DECODER}.positions.table", (*grid_of(c), width)),
            *layers(decoder, blocks, f"{_DECODER}.stack"),
            *norm("decoder.decoder_norm", f"{_DECODER}.stack.norm"),
            *linear("decoder.decoder_pred", f"{_DECODER}.head"),
        ]
    return result


def _positions(theirs: str, ours: str, shape: tuple[int, ...]) -> Rule:
    """Positions [1 1+N D] of which the class token's is zero ↔ a table over the grid."""

    def load(table):
        if np.abs(table[:, 0]).max() > 0:
            raise UserError(f"weights: {theirs} is not zero for the class token, and here that has no position")
        return (table[:, 1:].reshape(shape),)

    def save(table):
        rows = table.reshape(1, -1, shape[-1])
        return (np.concatenate([np.zeros_like(rows[:, :1]), rows], axis=1),)

    return Rule((theirs,), (ours,), load, save)
