"""Whisper (Radford et al. 2022): the encoder of speech. The decoder is left; written back, there is none."""

from collections.abc import Iterable, Mapping

from vmm.weights.families.common import activation_of, activation_to, late
from vmm.weights.layout import Rule, block, norm, patching, same

PREFIX = "model."
LEFT = {r"^model\.decoder\.|^proj_out\.": "the decoder, which writes text"}
_ENCODER = "model.encoder_audio"
_RATE, _WINDOW, _HOP = 16000, 400, 160
_DEFAULTS = dict(
    d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, activation_function="gelu",
    num_mel_bins=80, max_source_positions=1500,
)  # fmt: skip
_EPSILON = 1e-5


def parts(names: Iterable[str]) -> frozenset[str]:
    return frozenset()


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    c = _DEFAULTS | dict(config)
    encoder = dict(
        kind="audio",
        width=c["d_model"],
        depth=c["encoder_layers"],
        heads=c["encoder_attention_heads"],
        ratio=c["encoder_ffn_dim"] / c["d_model"],
        frontend="whisper",
        bins=c["num_mel_bins"],
        window=_WINDOW,
        hop=_HOP,
        sample_rate=_RATE,
        frames=2 * c["max_source_positions"],
        stem="conv",
        positions="learned",
        block=dict(activation=activation_of(c["activation_function"]), epsilon=_EPSILON),
    )
    return dict(
        trunk=dict(encoders=dict(audio=encoder), fusion=late(encoder)),
        views={},
        objectives={},
        clip=dict(seconds=encoder["frames"] * _HOP / _RATE, sample_rate=_RATE),
    )


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    encoder = model["trunk"]["encoders"]["audio"]
    width, heads = encoder["width"], encoder["heads"]
    result = dict(
        model_type="whisper",
        architectures=["WhisperModel"],
        d_model=width,
        encoder_layers=encoder["depth"],
        encoder_attention_heads=heads,
        encoder_ffn_dim=round(encoder["ratio"] * width),
        activation_function=activation_to(encoder["block"]["activation"]),
        num_mel_bins=encoder["bins"],
        max_source_positions=encoder["frames"] // 2,
        decoder_layers=0,
        decoder_attention_heads=heads,
    )
    return result, frozenset()


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    c = _DEFAULTS | dict(config)
    width, theirs = c["d_model"], f"{PREFIX}encoder"
    result = [
        *patching(f"{theirs}.conv1", f"{_ENCODER}.embed", (3,), c["num_mel_bins"]),
        *patching(f"{theirs}.conv2", f"{_ENCODER}.embed_2", (3,), width),
        same(f"{theirs}.embed_positions.weight", f"{_ENCODER}.positions.table"),
    ]
    for i in range(c["encoder_layers"]):
        layer = f"{theirs}.layers.{i}"
        names = dict(
            norm_attention=f"{layer}.self_attn_layer_norm",
            query=f"{layer}.self_attn.q_proj",
            key=f"{layer}.self_attn.k_proj",
            value=f"{layer}.self_attn.v_proj",
            out=f"{layer}.self_attn.out_proj",
            norm_mlp=f"{layer}.final_layer_norm",
            up=f"{layer}.fc1",
            down=f"{layer}.fc2",
        )
        ours = f"{_ENCODER}.stack.blocks.layer_{i}.block"
        result += block(names, ours, width, c["encoder_attention_heads"], "query value")
    return result + norm(f"{theirs}.layer_norm", f"{_ENCODER}.stack.norm")
