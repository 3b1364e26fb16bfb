"""Parameters of transformers' modules laid out as ours, by hand: what the importers must arrive at."""

import numpy as np

# Ours → transformers' names of a layer's parts, by family.
AST = dict(
    query="attention.q_proj", key="attention.k_proj", value="attention.v_proj", out="attention.o_proj",
    norm_attention="layernorm_before", norm_mlp="layernorm_after", up="mlp.fc1", down="mlp.fc2",
)  # fmt: skip
BERT = dict(
    query="attention.self.query", key="attention.self.key", value="attention.self.value", out="attention.output.dense",
    norm_attention="attention.output.LayerNorm", norm_mlp="output.LayerNorm", up="intermediate.dense",
    down="output.dense",
)  # fmt: skip
CLIP = dict(
    query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", out="self_attn.out_proj",
    norm_attention="layer_norm1", norm_mlp="layer_norm2", up="mlp.fc1", down="mlp.fc2",
)  # fmt: skip
WHISPER = CLIP | dict(norm_attention="self_attn_layer_norm", norm_mlp="final_layer_norm", up="fc1", down="fc2")


def norm(values: dict, name: str) -> dict:
    return {"scale": values[f"{name}.weight"], "bias": values[f"{name}.bias"]}


def dense(values: dict, name: str) -> dict:
    weight = values[f"{name}.weight"].T
    return {"kernel": weight, "bias": values.get(f"{name}.bias", np.zeros(weight.shape[-1], np.float32))}


def stack(values: dict, prefix: str, names: dict, depth: int, heads: int) -> dict:
    """Parameters of Stack's blocks from layers called prefix0, prefix1, …"""
    layers = {}
    for i in range(depth):
        layer = {ours: f"{prefix}{i}.{theirs}" for ours, theirs in names.items()}
        attention = {}
        for name in ("query", "key", "value"):
            both = dense(values, layer[name])
            width = both["bias"].size
            attention[name] = {
                "kernel": both["kernel"].reshape(width, heads, -1),
                "bias": both["bias"].reshape(heads, -1),
            }
        out = dense(values, layer["out"])
        attention["out"] = {"kernel": out["kernel"].reshape(heads, -1, width), "bias": out["bias"]}
        block = {"attention": attention, "mlp": {name: dense(values, layer[name]) for name in ("up", "down")}}
        block |= {name: norm(values, layer[name]) for name in ("norm_attention", "norm_mlp")}
        layers[f"layer_{i}"] = {"block": block}
    return layers


def relative(ours, theirs) -> float:
    """Largest difference over the largest of theirs."""
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
