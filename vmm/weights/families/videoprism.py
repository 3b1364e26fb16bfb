"""VideoPrism (Zhao et al. 2024): layers within frames, then layers along time at each place; capped logits.

Read are the layout of `transformers` and that of the original release: one .npz of flattened Flax names, layers stacked,
without a config.json. Of a model with a text encoder, its video encoder is read. Norms are stored as their scale − 1.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from vmm.errors import UserError
from vmm.weights.families.common import activation_of, activation_to, late, require, square
from vmm.weights.layout import Rule, attention, linear, patching, reshaped, same

PREFIX = ""
LEFT = {
    r"^(video_model\.)?(auxiliary_layers|head|head_layernorm|classifier)\.": "the pooling head and what follows it",
    r"^text_model\.": "the text encoder",
    r"^params/(auxiliary_encoder|contrastive_vision_pooler|text_encoder)/": "the pooling head and the text encoder",
}
PROCESSOR = {}
_ENCODER = "model.encoder_video"
# Where the encoder's tensors lie: in the layout of `transformers`, alone or in a larger model; in the original one.
_LAYOUTS = ("", "vision_model.", "video_model.vision_model.")
_ARRAYS = ("params/", "params/vision_encoder/")
_DEFAULTS = dict(
    image_size=288, num_frames=16, tubelet_size=(1, 18, 18), hidden_size=768, num_attention_heads=12,
    intermediate_size=3072, hidden_act="gelu_python", layer_norm_eps=1e-6, qkv_bias=True, num_spatial_layers=12,
    num_temporal_layers=4, attn_logit_softcapping=50.0,
)  # fmt: skip


def parts(names: Iterable[str]) -> frozenset[str]:
    """Returns the prefix of the encoder's tensors."""
    names = set(names)
    found = [layout for layout in _LAYOUTS if f"{layout}layernorm1.weight" in names]
    found += [layout for layout in _ARRAYS if f"{layout}spatial_ln/scale" in names]
    if not found:
        raise UserError(
            "weights: the file holds no encoder of VideoPrism (no tensor of its norm after the spatial layers)"
        )
    return frozenset(found[:1])


def infer(arrays: Mapping[str, np.ndarray]) -> dict:
    """Returns the config.json that an original release does without, from its arrays' shapes."""
    (prefix,) = parts(arrays)
    if prefix not in _ARRAYS:
        raise UserError("weights: an .npz in VideoPrism's layout holds names that begin with params/")
    shape = {name.removeprefix(prefix): value.shape for name, value in arrays.items()}
    layers = "{}_encoder/transformers_stack/x_layers/"
    try:
        depth, width, heads, _ = shape[layers.format("spatial") + "self_attention/query/w"]
        patch = math.isqrt(shape["patch_projection/linear/kernel"][0] // 3)
        side = math.isqrt(shape["spatial_pos_emb/emb_var"][0])
        return dict(
            model_type="videoprism_vision_model",
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=shape[layers.format("spatial") + "ff_layer/ffn_layer1/linear/kernel"][-1],
            num_spatial_layers=depth,
            num_temporal_layers=shape[layers.format("temporal") + "layer_norm/scale"][0],
            tubelet_size=[1, patch, patch],
            image_size=side * patch,
            num_frames=shape["temporal_pos_emb/emb_var"][0],
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"weights: the .npz is not in VideoPrism's layout ({error})") from None


def _vision(config: Mapping) -> dict:
    return _DEFAULTS | dict(config.get("vision_config", config))


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    c = _vision(config)
    require(c, "videoprism", num_channels=3, qkv_bias=True)
    if c["tubelet_size"][0] != 1:
        raise UserError(
            f"config.json tubelet_size: videoprism is read with one frame a tubelet, got {c['tubelet_size']}"
        )
    encoder = dict(
        kind="video",
        width=c["hidden_size"],
        depth=c["num_spatial_layers"] + c["num_temporal_layers"],
        heads=c["num_attention_heads"],
        ratio=c["intermediate_size"] / c["hidden_size"],
        tubelet=tuple(c["tubelet_size"]),
        attention="factorised_places",
        temporal_depth=c["num_temporal_layers"],
        positions="places",
        block=dict(
            activation=activation_of(c["hidden_act"]),
            epsilon=c["layer_norm_eps"],
            cap=float(c["attn_logit_softcapping"] or 0.0),
        ),
        mean=(0.0, 0.0, 0.0),
        deviation=(255.0, 255.0, 255.0),
    )
    return dict(
        trunk=dict(encoders=dict(video=encoder), fusion=late(encoder)),
        views={},
        objectives={},
        # Its paper spreads the frames over a clip, of no told length: two a second. The whole picture is squeezed.
        clip=dict(frames=c["num_frames"], size=square(c, "image_size"), seconds=c["num_frames"] / 2, crop=0.0),
    )


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    encoder, clip = model["trunk"]["encoders"]["video"], model["clip"]
    if not encoder["block"].get("cap"):
        raise UserError("export to videoprism: asks for capped logits, block.cap above 0")
    result = dict(
        model_type="videoprism_vision_model",
        architectures=["VideoPrismVisionModel"],
        hidden_size=encoder["width"],
        num_spatial_layers=encoder["depth"] - encoder["temporal_depth"],
        num_temporal_layers=encoder["temporal_depth"],
        num_attention_heads=encoder["heads"],
        intermediate_size=round(encoder["ratio"] * encoder["width"]),
        hidden_act={"gelu": "gelu_python"}.get(style := activation_to(encoder["block"]["activation"]), style),
        layer_norm_eps=encoder["block"]["epsilon"],
        attn_logit_softcapping=encoder["block"]["cap"],
        tubelet_size=list(encoder["tubelet"]),
        num_frames=clip["frames"],
        image_size=clip["size"],
        num_channels=3,
        qkv_bias=True,
    )
    return result, frozenset({""})


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    c, (prefix,) = _vision(config), parts
    width, frames, patch = c["hidden_size"], c["num_frames"], tuple(c["tubelet_size"])
    side = square(c, "image_size") // patch[1]
    depths = dict(spatial=c["num_spatial_layers"], temporal=c["num_temporal_layers"])
    first, rest = f"{_ENCODER}.stack.positions.first", f"{_ENCODER}.positions.rest"
    places, result = (side, side, width), []
    if prefix in _ARRAYS:
        result += [
            same(f"{prefix}patch_projection/linear/kernel", f"{_ENCODER}.embed.kernel"),
            same(f"{prefix}patch_projection/linear/bias", f"{_ENCODER}.embed.bias"),
            reshaped(f"{prefix}spatial_pos_emb/emb_var", rest, (side * side, width), places),
            same(f"{prefix}temporal_pos_emb/emb_var", first),
            *_norm(f"{prefix}spatial_ln/scale", f"{prefix}spatial_ln/bias", f"{_ENCODER}.stack.norm_spatial"),
            *_norm(f"{prefix}temporal_ln/scale", f"{prefix}temporal_ln/bias", f"{_ENCODER}.stack.norm"),
        ]
    else:
        embeddings = f"{prefix}spatial_embeddings"
        result += [
            *patching(f"{embeddings}.patch_embeddings.projection", f"{_ENCODER}.embed", patch),
            reshaped(f"{embeddings}.position_embeddings", rest, (1, side * side, width), places),
            reshaped(f"{prefix}temporal_embeddings.position_embeddings", first, (1, frames, width), (frames, width)),
            *_norm(f"{prefix}layernorm1.weight", f"{prefix}layernorm1.bias", f"{_ENCODER}.stack.norm_spatial"),
            *_norm(f"{prefix}layernorm2.weight", f"{prefix}layernorm2.bias", f"{_ENCODER}.stack.norm"),
        ]
    for (kind, depth), stack in zip(depths.items(), ("blocks", "temporal")):
        ours = [f"{_ENCODER}.stack.{stack}.layer_{i}.block" for i in range(depth)]
        if prefix in _ARRAYS:
            result += _stacked_layers(f"{prefix}{kind}_encoder/transformers_stack/x_layers", ours)
        else:
            for i, block in enumerate(ours):
                result += _layer(f"{prefix}{kind}_layers.{i}", block, width, c["num_attention_heads"])
    return result


def _norm(scale: str, bias: str, ours: str) -> list[Rule]:
    plus = Rule((scale,), (f"{ours}.scale",), lambda x: (x + 1.0,), lambda x: (x - 1.0,))
    return [plus, same(bias, f"{ours}.bias")]


def _layer(theirs: str, ours: str, width: int, heads: int) -> list[Rule]:
    letters = dict(query="q", key="k", value="v", out="o")
    names = {part: f"{theirs}.attention.{letter}_proj" for part, letter in letters.items()}
    return [
        *_norm(f"{theirs}.layernorm_before.weight", f"{theirs}.layernorm_before.bias", f"{ours}.norm_attention"),
        *attention(names, f"{ours}.attention", width, heads, "query key value"),
        *_norm(f"{theirs}.layernorm_after.weight", f"{theirs}.layernorm_after.bias", f"{ours}.norm_mlp"),
        *linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.up"),
        *linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.down"),
    ]


def _stacked_layers(theirs: str, ours: Sequence[str]) -> list[Rule]:
    """All layers of one kind, whose tensors stand in one array each, [layers …]."""
    keep, turn = (lambda x: x), (lambda w: w.transpose(1, 2, 0))  # out: [D A d] there

    def stacked(name: str, own: str, load: Callable = keep, save: Callable = keep) -> Rule:
        return Rule(
            (f"{theirs}/{name}",),
            tuple(f"{block}.{own}" for block in ours),
            lambda arrays: tuple(load(array) for array in arrays),
            lambda *arrays: (np.stack([save(array) for array in arrays]),),
        )

    result = []
    for norm, own in (("layer_norm", "norm_attention"), ("ff_layer/layer_norm", "norm_mlp")):
        result.append(stacked(f"{norm}/scale", f"{own}.scale", lambda x: x + 1.0, lambda x: x - 1.0))
        result.append(stacked(f"{norm}/bias", f"{own}.bias"))
    for part in ("query", "key", "value"):
        result.append(stacked(f"self_attention/{part}/w", f"attention.{part}.kernel"))
        result.append(stacked(f"self_attention/{part}/b", f"attention.{part}.bias"))
    result.append(stacked("self_attention/post/w", "attention.out.kernel", turn, lambda w: w.transpose(2, 0, 1)))
    result.append(stacked("self_attention/post/b", "attention.out.bias"))
    for name, own in (("ffn_layer1", "up"), ("ffn_layer2", "down")):
        result.append(stacked(f"ff_layer/{name}/linear/kernel", f"mlp.{own}.kernel"))
        result.append(stacked(f"ff_layer/{name}/linear/bias", f"mlp.{own}.bias"))
    return result
