"""Published families: outputs equal those of `transformers` with the same weights; written back, they are the same."""

import pytest
from families import assert_exported, assert_initialised, batch_of, close, encode, read

from vmm.weights.families import reason


@pytest.mark.parametrize("decoder", [True, False])
def test_videomae(tmp_path, decoder: bool):
    reference, imported = read("videomae" if decoder else "videomae_base", tmp_path / "theirs")
    assert imported.left == []
    video = reference.inputs["video"]
    assert_initialised(imported, batch_of(video=video))
    close("videomae", encode(imported, video=video)["video"].x, reference.outputs["tokens"])
    assert_exported(imported, reference, tmp_path / "ours", changed=dict(qkv_bias=(None, True)))


def test_a_fine_tuned_videomae_is_read_without_its_head(tmp_path):
    reference, imported = read("videomae_classifier", tmp_path)
    assert imported.left == ["classifier.bias", "classifier.weight", "fc_norm.bias", "fc_norm.weight"]
    assert all("head" in reason("videomae", name) for name in imported.left)
    video = reference.inputs["video"]
    assert_initialised(imported, batch_of(video=video))
    close("videomae", encode(imported, video=video)["video"].x, reference.outputs["tokens"])
