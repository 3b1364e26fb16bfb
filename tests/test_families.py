"""Published families: outputs equal those of `transformers` with the same random weights; exported, they load there."""

import numpy as np
import pytest
from families import assert_same_state, encode, export_and_load, randomise, relative, save_and_read, torch

from vmm.weights.families import reason
from vmm.weights.families.common import IMAGENET_DEVIATION, IMAGENET_MEAN
from vmm.weights.published import read_published

transformers = pytest.importorskip("transformers")


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def normalised(video: np.ndarray, mean, deviation):
    """uint8 [B T H W 3] → what an image processor gives, [B T 3 H W]."""
    x = (video.astype(np.float64) - np.asarray(mean)) / np.asarray(deviation)
    return torch.tensor(x, dtype=torch.float32).permute(0, 1, 4, 2, 3)


VIDEOMAE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, num_frames=4,
    decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32,
    use_mean_pooling=False,
)  # fmt: skip


@pytest.mark.parametrize("decoder", [True, False])
def test_videomae(tmp_path, decoder: bool):
    cls = transformers.VideoMAEForPreTraining if decoder else transformers.VideoMAEModel
    model = randomise(cls(transformers.VideoMAEConfig(**VIDEOMAE)))
    imported = save_and_read(model, tmp_path / "theirs")
    video = pixels(2, 4, 32, 32, 3)
    tokens = encode(imported, video=video)["video"]
    base = model.videomae if decoder else model
    expected = base(normalised(video, IMAGENET_MEAN, IMAGENET_DEVIATION)).last_hidden_state
    assert relative(tokens.x, expected) < 1e-5
    assert_same_state(export_and_load(imported, cls, tmp_path / "ours"), model)


def test_a_fine_tuned_videomae_is_read_without_its_head(tmp_path):
    config = transformers.VideoMAEConfig(**VIDEOMAE | dict(use_mean_pooling=True))
    model = randomise(transformers.VideoMAEForVideoClassification(config))
    model.save_pretrained(tmp_path)
    imported = read_published(tmp_path)
    assert imported.left == ["classifier.bias", "classifier.weight", "fc_norm.bias", "fc_norm.weight"]
    assert all("head" in reason("videomae", name) for name in imported.left)
    video = pixels(2, 4, 32, 32, 3)
    expected = model.videomae(normalised(video, IMAGENET_MEAN, IMAGENET_DEVIATION)).last_hidden_state
    assert relative(encode(imported, video=video)["video"].x, expected) < 1e-5
