"""CAV-MAE (Gong et al. 2022): an encoder of sound, one of pictures, and joint blocks over both.

Published as PyTorch checkpoints of its authors' repository, to be converted to safetensors first; the folder's
config.json is ours:

    model_type "cav_mae", hidden_size, intermediate_size, num_attention_heads, layer_norm_eps (1e-5 there),
    modality_specific_depth (11), joint_depth (1), patch_size (16), image_size (224),
    audio_length (1024 frames of sound), num_mel_bins (128), audio_mean, audio_std: of the log-mel values,
    −5.081 and 4.4849 where it was trained on AudioSet.

Read is the pass over both streams together. The norms for one stream alone (norm1_a, norm_v, …) and the decoder are
left. A picture is a clip of one frame.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from vmm.errors import UserError
from vmm.weights.families.common import IMAGENET_DEVIATION, IMAGENET_MEAN, require
from vmm.weights.layout import Rule, fused_attention, linear, norm

PREFIX = "module."
LEFT = {
    r"norm\d?_[av]\.": "a norm for one stream alone, or of no use",
    r"decoder_|mask_token$": "the decoder",
    r"mlp_head\.": "the classifier, with a norm of its own",
}
_VIDEO, _AUDIO = "model.encoder_video", "model.encoder_audio"


def parts(names: Iterable[str]) -> frozenset[str]:
    return frozenset()


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    c = config
    require(c, "cav_mae", hidden_act="gelu")
    width, heads, patch = c["hidden_size"], c["num_attention_heads"], c["patch_size"]
    ratio, style = c["intermediate_size"] / width, dict(activation="gelu", epsilon=c["layer_norm_eps"])
    common = dict(
        width=width, depth=c["modality_specific_depth"], heads=heads, ratio=ratio, positions="learned", block=style,
        final_norm=False,
    )  # fmt: skip
    video = dict(kind="video", tubelet=(1, patch, patch), mean=IMAGENET_MEAN, deviation=IMAGENET_DEVIATION, **common)
    audio = dict(
        kind="audio",
        frontend="kaldi",
        bins=c["num_mel_bins"],
        frames=c["audio_length"],
        patch=(patch, patch),
        mean=c["audio_mean"],
        deviation=c["audio_std"],
        **common,
    )
    return dict(
        trunk=dict(
            encoders=dict(video=video, audio=audio),
            fusion=dict(kind="joint", width=width, depth=c["joint_depth"], heads=heads, ratio=ratio, block=style),
        ),
        views={},
        objectives={},
        clip=dict(frames=1, size=c["image_size"], seconds=c["audio_length"] / 100),
    )


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    encoders, fusion = model["trunk"]["encoders"], model["trunk"]["fusion"]
    video, audio = encoders["video"], encoders["audio"]
    if fusion["kind"] != "joint" or model["clip"]["frames"] != 1:
        raise UserError("export to cav_mae: asks for the fusion 'joint' and clips of one frame")
    result = dict(
        model_type="cav_mae",
        hidden_size=video["width"],
        intermediate_size=round(video["ratio"] * video["width"]),
        num_attention_heads=video["heads"],
        hidden_act="gelu",
        layer_norm_eps=video["block"]["epsilon"],
        modality_specific_depth=video["depth"],
        joint_depth=fusion["depth"],
        patch_size=video["tubelet"][1],
        image_size=model["clip"]["size"],
        audio_length=audio["frames"],
        num_mel_bins=audio["bins"],
        audio_mean=audio["mean"],
        audio_std=audio["deviation"],
    )
    return result, frozenset()


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    c = config
    patch, depth, heads = c["patch_size"], c["modality_specific_depth"], c["num_attention_heads"]
    side = c["image_size"] // patch
    result = [
        *_entrance("v", _VIDEO, (0, 1), (patch, patch, 3), (side, side)),
        # Its spectrograms lie on their side: rows are mel bins, columns frames.
        *_entrance("a", _AUDIO, (1, 0), (patch, patch, 1), (c["num_mel_bins"] // patch, c["audio_length"] // patch)),
    ]
    for stream, modality, ours in (("v", "video", _VIDEO), ("a", "audio", _AUDIO)):
        for i in range(depth):
            own = f"model.fuse.enter.modality_{modality}" if i == depth - 1 else None
            result += _block(f"{PREFIX}blocks_{stream}.{i}", f"{ours}.stack.blocks.layer_{i}.block", heads, own)
    for i in range(c["joint_depth"]):
        result += _block(f"{PREFIX}blocks_u.{i}", f"model.fuse.stack.blocks.layer_{i}.block", heads, None)
    return result + norm(f"{PREFIX}norm", "model.fuse.stack.norm")


def _entrance(stream: str, ours: str, axes: tuple[int, int], patch: tuple, grid: tuple) -> list[Rule]:
    """Patches and positions of one stream. axes: which of theirs, (row, column), is our first and our second; patch,
    grid: theirs. The modality's vector is added to all tokens, as is the embedding's bias: it becomes part of it."""
    rows, columns, channels = patch
    turned = tuple((rows, columns)[axis] for axis in axes)

    def load_kernel(w):
        return (w.transpose(2 + axes[0], 2 + axes[1], 1, 0).reshape(-1, w.shape[0]),)

    def save_kernel(kernel):
        w = kernel.reshape(*turned, channels, -1)
        return (w.transpose(3, 2, *np.argsort(axes)),)

    def load_table(table):
        table = table.reshape(*grid, -1).transpose(*axes, 2)
        return (table[None] if stream == "v" else table,)

    def save_table(table):
        table = (table[0] if stream == "v" else table).transpose(*np.argsort(axes), 2)
        return (table.reshape(1, -1, table.shape[-1]),)

    theirs = f"{PREFIX}patch_embed_{stream}.proj"
    return [
        Rule((f"{theirs}.weight",), (f"{ours}.embed.kernel",), load_kernel, save_kernel),
        Rule(
            (f"{theirs}.bias", f"{PREFIX}modality_{stream}"),
            (f"{ours}.embed.bias",),
            lambda bias, modality: (bias + modality.reshape(-1),),
            lambda bias: (bias, np.zeros((1, 1, bias.size), np.float32)),
        ),
        Rule((f"{PREFIX}pos_embed_{stream}",), (f"{ours}.positions.table",), load_table, save_table),
    ]


def _block(theirs: str, ours: str, heads: int, modality: str | None) -> list[Rule]:
    """A block; modality: a vector of ours that is added to all tokens after it, as its last bias is."""
    down = linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.down")
    if modality is not None:
        both = (f"{ours}.mlp.down.bias", modality)
        down[1] = Rule(down[1].theirs, both, lambda b: (b, np.zeros_like(b)), lambda b, vector: (b + vector,))
    return [
        *norm(f"{theirs}.norm1", f"{ours}.norm_attention"),
        *fused_attention(f"{theirs}.attn.qkv", f"{theirs}.attn.proj", f"{ours}.attention", heads),
        *norm(f"{theirs}.norm2", f"{ours}.norm_mlp"),
        *linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.up"),
        *down,
    ]
