"""BERT (Devlin et al. 2019) and what has its layout, MiniLM and sentence encoders too: the encoder.

Token type 0 is part of the positions: what is read is one text, not a pair. Written back, the types are zero.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from vmm.weights.families.common import late, require, transformer, transformer_to
from vmm.weights.layout import Rule, block, norm, same, scaled

PREFIX = "bert."
LEFT = {
    r"\.pooler\.": "the pooler, of next-sentence prediction",
    r"position_ids$": "0, 1, 2, …",
    r"^cls\.|^classifier\.|^qa_outputs\.": "the head of another task",
}
_ENCODER = "model.encoder_text"
_DEFAULTS = dict(
    vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    max_position_embeddings=512, hidden_act="gelu", layer_norm_eps=1e-12, pad_token_id=0, type_vocab_size=2,
)  # fmt: skip
_TYPES = 2


def parts(names: Iterable[str]) -> frozenset[str]:
    # Files of the first years call the weight and bias of a norm so.
    return frozenset({"gamma"}) if any(name.endswith("LayerNorm.gamma") for name in names) else frozenset()


def describe(config: Mapping, parts: frozenset[str]) -> dict:
    c = _DEFAULTS | dict(config)
    require(c, "bert", position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    encoder = dict(
        kind="text",
        vocabulary=c["vocab_size"],
        **transformer(c),
        padding=c["pad_token_id"],
        positions="learned",
        norm_embedding=True,
        final_norm=False,
    )
    encoder["block"] |= dict(norm="post")
    return dict(
        trunk=dict(encoders=dict(text=encoder), fusion=late(encoder)),
        views={},
        objectives={},
        clip=dict(text_length=c["max_position_embeddings"]),
    )


def config(model: Mapping) -> tuple[dict, frozenset[str]]:
    encoder = model["trunk"]["encoders"]["text"]
    result = dict(
        model_type="bert",
        architectures=["BertModel"],
        vocab_size=encoder["vocabulary"],
        **transformer_to(encoder),
        max_position_embeddings=model["clip"]["text_length"],
        type_vocab_size=_TYPES,
        pad_token_id=encoder["padding"],
        position_embedding_type="absolute",
    )
    return result, frozenset()


def rules(config: Mapping, parts: frozenset[str]) -> list[Rule]:
    c = _DEFAULTS | dict(config)
    width, types = c["hidden_size"], c["type_vocab_size"]
    theirs = f"{PREFIX}embeddings"
    table = Rule(
        (f"{theirs}.position_embeddings.weight", f"{theirs}.token_type_embeddings.weight"),
        (f"{_ENCODER}.positions.table",),
        lambda positions, kinds: (positions + kinds[:1],),
        lambda table: (table, np.zeros((types, width), np.float32)),
    )
    result = [scaled(f"{theirs}.word_embeddings.weight", f"{_ENCODER}.embed.table", width**-0.5), table]
    result += norm(f"{theirs}.LayerNorm", f"{_ENCODER}.norm_embedding")
    for i in range(c["num_hidden_layers"]):
        layer = f"{PREFIX}encoder.layer.{i}"
        names = dict(
            query=f"{layer}.attention.self.query",
            key=f"{layer}.attention.self.key",
            value=f"{layer}.attention.self.value",
            out=f"{layer}.attention.output.dense",
            norm_attention=f"{layer}.attention.output.LayerNorm",
            up=f"{layer}.intermediate.dense",
            down=f"{layer}.output.dense",
            norm_mlp=f"{layer}.output.LayerNorm",
        )
        result += block(names, f"{_ENCODER}.stack.blocks.layer_{i}.block", width, c["num_attention_heads"])
    return [_old(rule) for rule in result] if "gamma" in parts else result


def _old(rule: Rule) -> Rule:
    """Returns the rule of a norm with the names of the first years."""
    (name, *_), (ours, *_) = rule.theirs, rule.ours
    stem, _, last = name.rpartition(".")
    if not stem.endswith("LayerNorm"):
        return rule
    return same(f"{stem}.{dict(weight='gamma', bias='beta')[last]}", ours)
