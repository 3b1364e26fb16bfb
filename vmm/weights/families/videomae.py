"""VideoMAE (Tong et al. 2022): the encoder, and the decoder where the file holds it."""

from collections.abc import Iterable, Mapping

from vmm.errors import UserError
from vmm.weights.families.common import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    UNIT,
    agree,
    square,
    transformer,
    transformer_to,
    video_model,
)
from vmm.weights.layout import Rule, block, linear, norm, patching, reshaped

PREFIX = "videomae."
_ENCODER = "model.encoder_video"
_DECODER = "objective_pixels.video"
PROCESSOR = dict(image_processor_type="VideoMAEImageProcessor")
LEFT = {r"^(fc_norm|classifier)\.": "head: it norms the mean token, ours each token"}


def parts(names: Iterable[str]) -> frozenset[str]:
    # A fine-tuned model norms the mean token in its head, and has no norm here.
    found = {"mask_token": "decoder", f"{PREFIX}layernorm.weight": "norm"}
    return frozenset(part for name, part in found.items() if name in names)


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    c = config
    tubelet = (c["tubelet_size"], c["patch_size"], c["patch_size"])
    encoder = dict(
        kind="video",
        **transformer(c),
        tubelet=tubelet,
        positions="sincos_flat",
        final_norm="norm" in parts,
        mean=IMAGENET_MEAN,
        deviation=IMAGENET_DEVIATION,
    )
    frames = c["num_frames"]  # every fourth of 30 a second
    model = video_model(encoder, frames, square(c, "image_size"), seconds=4 * frames / 30)
    if "decoder" in parts:
        model["views"] = dict(masked=dict(video=dict(kind="tube", ratio=0.9)))
        model["objectives"] = dict(
            pixels=dict(
                kind="masked",
                modalities=("video",),
                context=(),
                width=c["decoder_hidden_size"],
                depth=c["decoder_num_hidden_layers"],
                heads=c["decoder_num_attention_heads"],
                ratio=c["decoder_intermediate_size"] / c["decoder_hidden_size"],
                standardise="colour" if c["norm_pix_loss"] else False,
                pixels=UNIT,
                positions="sincos_flat",
                enter_bias=False,
                block=encoder["block"],
            )
        )
    return model


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    encoder, clip = model["trunk"]["encoders"]["video"], model["clip"]
    decoder = model["objectives"].get("pixels")
    if decoder:
        fixed = dict(
            kind="masked", modalities=("video",), context=(), positions="sincos_flat", enter_bias=False, pixels=UNIT
        )
        agree(decoder, "objectives.pixels", "videomae", **fixed, block=encoder["block"])
        if decoder["standardise"] not in ("colour", False):
            raise UserError(
                f'export to videomae: objectives.pixels.standardise must be "colour" or False, got {decoder["standardise"]!r}'
            )
    result = dict(
        model_type="videomae",
        architectures=["VideoMAEForPreTraining" if decoder else "VideoMAEModel"],
        **transformer_to(encoder),
        tubelet_size=encoder["tubelet"][0],
        patch_size=encoder["tubelet"][1],
        num_frames=clip["frames"],
        image_size=clip["size"],
        num_channels=3,
        qkv_bias=True,
        qv_bias=True,
        use_mean_pooling=not encoder["final_norm"],
        norm_pix_loss=True,
    )
    if decoder:
        result |= dict(
            decoder_hidden_size=decoder["width"],
            decoder_num_hidden_layers=decoder["depth"],
            decoder_num_attention_heads=decoder["heads"],
            decoder_intermediate_size=round(decoder["ratio"] * decoder["width"]),
            norm_pix_loss=decoder["standardise"] == "colour",
        )
    there = {"decoder": decoder, "norm": encoder["final_norm"]}
    return result, frozenset(part for part, has in there.items() if has)


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    c = config
    patch = (c["tubelet_size"], c["patch_size"], c["patch_size"])
    result = patching(f"{PREFIX}embeddings.patch_embeddings.projection", f"{_ENCODER}.embed", patch)
    result += _layers(
        f"{PREFIX}encoder.layer",
        f"{_ENCODER}.stack",
        c["hidden_size"],
        c["num_hidden_layers"],
        c["num_attention_heads"],
    )
    if "norm" in parts:
        result += norm(f"{PREFIX}layernorm", f"{_ENCODER}.stack.norm")
    if "decoder" in parts:
        width = c["decoder_hidden_size"]
        result += linear("encoder_to_decoder", f"{_DECODER}.enter", bias=False)
        result += [reshaped("mask_token", f"{_DECODER}.mask", (1, 1, width), (width,))]
        result += _layers(
            "decoder.decoder_layers", f"{_DECODER}.stack", width, c["decoder_num_hidden_layers"], c["decoder_num_attention_heads"]
        )  # fmt: skip
        result += norm("decoder.norm", f"{_DECODER}.stack.norm") + linear("decoder.head", f"{_DECODER}.head")
    return result


def _layers(theirs: str, ours: str, width: int, depth: int, heads: int) -> list[Rule]:
    result = []
    for i in range(depth):
        layer = f"{theirs}.{i}"
        names = dict(
            norm_attention=f"{layer}.layernorm_before",
            query=f"{layer}.attention.attention.query",
            query_bias=f"{layer}.attention.attention.q_bias",
            key=f"{layer}.attention.attention.key",
            value=f"{layer}.attention.attention.value",
            value_bias=f"{layer}.attention.attention.v_bias",
            out=f"{layer}.attention.output.dense",
            norm_mlp=f"{layer}.layernorm_after",
            up=f"{layer}.intermediate.dense",
            down=f"{layer}.output.dense",
        )
        result += block(names, f"{ours}.blocks.layer_{i}.block", width, heads, "query value")
    return result
