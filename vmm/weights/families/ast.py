"""AST (Gong et al. 2021): the encoder of Kaldi's filterbank; class and distillation token are two registers."""

from collections.abc import Iterable, Mapping

import numpy as np

from vmm.weights.families.common import late, require, square, transformer, transformer_to
from vmm.weights.families.vit import layers
from vmm.weights.layout import Rule, norm, same

PREFIX = "audio_spectrogram_transformer."
LEFT = {r"^classifier\.": "the classifier, of both tokens' mean and with a norm of its own"}
_ENCODER = "model.encoder_audio"
_RATE, _WINDOW, _HOP = 16000, 400, 160
_DEFAULTS = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act="gelu",
    layer_norm_eps=1e-12, patch_size=16, qkv_bias=True, frequency_stride=10, time_stride=10, max_length=1024,
    num_mel_bins=128,
)  # fmt: skip


def parts(names: Iterable[str]) -> frozenset[str]:
    return frozenset()


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    c = _DEFAULTS | dict(config)
    require(c, "audio-spectrogram-transformer", num_channels=1)
    patch, frames = square(c, "patch_size"), c["max_length"]
    encoder = dict(
        kind="audio",
        **transformer(c),
        frontend="kaldi",
        bins=c["num_mel_bins"],
        window=_WINDOW,
        hop=_HOP,
        sample_rate=_RATE,
        frames=frames,
        patch=(patch, patch),
        stride=(c["time_stride"], c["frequency_stride"]),
        positions="learned",
        registers=2,
    )
    return dict(
        trunk=dict(encoders=dict(audio=encoder), fusion=late(encoder)),
        views={},
        objectives={},
        clip=dict(seconds=frames * _HOP / _RATE, sample_rate=_RATE),
    )


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    encoder = model["trunk"]["encoders"]["audio"]
    patch, stride = encoder["patch"], encoder["stride"] or encoder["patch"]
    result = dict(
        model_type="audio-spectrogram-transformer",
        architectures=["ASTModel"],
        **transformer_to(encoder),
        patch_size=patch[0],
        qkv_bias=True,
        frequency_stride=stride[1],
        time_stride=stride[0],
        max_length=encoder["frames"],
        num_mel_bins=encoder["bins"],
    )
    return result, frozenset()


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    c = _DEFAULTS | dict(config)
    patch, width, theirs = square(c, "patch_size"), c["hidden_size"], f"{PREFIX}embeddings"
    rows = (c["max_length"] - patch) // c["time_stride"] + 1
    columns = (c["num_mel_bins"] - patch) // c["frequency_stride"] + 1
    projection = f"{theirs}.patch_embeddings.projection"
    return [
        _patches(f"{projection}.weight", f"{_ENCODER}.embed.kernel", patch),
        same(f"{projection}.bias", f"{_ENCODER}.embed.bias"),
        _tokens(theirs, rows, columns, width),
        *layers(c, f"{PREFIX}encoder.layer", f"{_ENCODER}.stack"),
        *norm(f"{PREFIX}layernorm", f"{_ENCODER}.stack.norm"),
    ]


def _patches(theirs: str, ours: str, patch: int) -> Rule:
    """Convolution [O 1 bins frames] ↔ Dense [(frames bins) O]."""

    def save(kernel):
        return (kernel.reshape(patch, patch, 1, -1).transpose(3, 2, 1, 0),)

    return Rule((theirs,), (ours,), lambda w: (w.transpose(3, 2, 1, 0).reshape(-1, w.shape[0]),), save)


def _tokens(theirs: str, rows: int, columns: int, width: int) -> Rule:
    """Two tokens [1 1 D] and positions [1 2+N D], time the faster axis ↔ two registers and a table [f m D]."""

    def load(first, second, table):
        registers = np.concatenate([first, second], axis=1) + table[:, :2]
        return registers[0], table[0, 2:].reshape(columns, rows, width).transpose(1, 0, 2)

    def save(registers, table):
        table = table.transpose(1, 0, 2).reshape(-1, width)
        return (
            registers[None, :1],
            registers[None, 1:],
            np.concatenate([np.zeros((2, width), np.float32), table])[None],
        )

    names = tuple(f"{theirs}.{name}" for name in ("cls_token", "distillation_token", "position_embeddings"))
    return Rule(names, (f"{_ENCODER}.registers", f"{_ENCODER}.positions.table"), load, save)
