"""What a config claims, held against the weights beside it before anything is built."""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import vmm
from vmm.encoders.frontends import log_mel
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.layers.positions import sincos, sincos_flat
from vmm.sizes import check_claims, check_numbers

MODEL = {
    "trunk": {
        "encoders": {"video": {"kind": "video", "width": 16, "depth": 1, "heads": 2, "tubelet": (2, 16, 16)}},
        "fusion": {"kind": "late", "width": 16, "depth": 1, "heads": 2},
    },
    "views": {"whole": {}},
    "objectives": {"match": {"kind": "contrastive", "width": 16, "queue": 64}},
}
CONFIG = {"library_name": "vmm", "format": 1, "model": MODEL, "clip": {"frames": 4, "size": 32}, "labels": {}}


def changed(path: str, value) -> dict:
    """CONFIG with one value, at a path of keys with dots."""
    config = copy.deepcopy(CONFIG)
    *groups, last = path.split(".")
    group = config
    for name in groups:
        group = group[name]
    group[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("clip.frames", 10**9, "data.clip: 1000000000 frames of 32 × 32 .* are more than 268,435,456 pixels"),
        ("clip.size", 10**9, "are more than 268,435,456 pixels"),
        ("clip.seconds", 1e12, "or 86,400 s"),
        ("clip.seconds", float("inf"), "must be positive|must be finite"),
        ("model.trunk.encoders.video.width", 10**9, "video.width: 1000000000, but no tensor .* is longer than 24"),
        ("model.trunk.encoders.video.depth", 9000, "video.depth: 9000 layers, but the weights .* are 1 tensors"),
        ("model.trunk.fusion.depth", 10**6, "fusion.depth: 1000000 layers; at most 10,000"),
        ("model.trunk.encoders.video.heads", 0, "video.heads: must be at least 1, got 0"),
        ("model.trunk.encoders.video.width", -16, "video.width: must be at least 0, got -16"),
        ("model.trunk.encoders.video.tubelet", [2, 10**9, 16], r"tubelet\[1\]: 1000000000 is larger than anything"),
        ("model.objectives.match.width", 10**400, "a number of 401 digits, beyond 64 bits"),
        ("model.trunk.encoders.video.ratio", float("nan"), "video.ratio: must be finite, got nan"),
    ],
)
def test_sizes_of_a_stranger_are_one_line_before_anything_is_built(path, value, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(changed(path, value)))
    save_file({"model.a.kernel": np.zeros((24, 3), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        vmm.load(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_sizes_that_the_weights_have_pass():
    shapes = [(3000, 64)] + [(64,)] * 60
    model = changed("model.trunk.encoders.video.width", 3000)["model"]
    check_claims(model, shapes, (), "file")
    model["trunk"]["encoders"]["video"] |= {"width": 16, "depth": 61}
    check_claims(model, shapes, (), "file")
    model["trunk"]["encoders"]["video"]["depth"] = 62
    with pytest.raises(UserError, match="62 layers, but the weights beside it are 61 tensors"):
        check_claims(model, shapes, (), "file")
    check_claims(model, shapes, (62,), "file")  # scanned: one tensor holds the layers


def test_a_familys_config_claims_no_more(tmp_path):
    config = {
        "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 10**9, "num_attention_heads": 2, "patch_size": 16,
        "intermediate_size": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 32, "qkv_bias": True,
        "num_channels": 3, "architectures": ["ViTModel"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"embeddings.cls_token": np.zeros((1, 1, 16), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="depth: 1000000000 layers"):
        vmm.load(tmp_path)


def test_tables_are_bounded_where_they_are_made():
    for make in (sincos, sincos_flat):
        with pytest.raises(UserError, match="positions: 1000000 × 1024 numbers"):
            make((1000000,), 1024)
    with pytest.raises(UserError, match="spectrogram: .* numbers, more than"):
        log_mel(jnp.zeros((1, 60000)), 8, 32768, 1, 16000, 0)


def test_a_config_that_trains_is_held_to_sense_too():
    with pytest.raises(UserError, match="config.optim.rate: must be finite"):
        check_numbers({"optim": {"rate": float("inf")}}, "config")
    config = {"steps": 1, "batch": 1, "data": {"train": ""}, **MODEL}
    config["trunk"] = changed("model.trunk.fusion.heads", 0)["model"]["trunk"]
    with pytest.raises(UserError, match="config.trunk.fusion.heads: must be at least 1, got 0"):
        Experiment(config)


def test_deep_nesting_is_walked_without_recursion():
    deep = {"width": 1}
    for _ in range(5000):
        deep = {"in": deep}
    check_numbers(deep, "config")
