"""Published families of sound: from a waveform through their own extractors and ours to equal outputs, and back."""

import json

import jax
import numpy as np
import pytest
from families import encode, randomise, recipe_of, relative, torch
from safetensors.numpy import load_file, save_file
from test_families_image_text import close, read, save

from vmm.errors import UserError
from vmm.weights.families import FAMILIES
from vmm.weights.published import read_published

transformers = pytest.importorskip("transformers")
# transformers says of AST's own filters that the lowest fall between two frequencies of the transform.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter:UserWarning")

RATE = 16000
AST = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=80, patch_size=16, num_mel_bins=36,
    max_length=64, frequency_stride=10, time_stride=8,
)  # fmt: skip
WHISPER = dict(
    d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=80, decoder_ffn_dim=64, vocab_size=50, num_mel_bins=24, max_source_positions=50,
    max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip


def waves(seconds: float) -> np.ndarray:
    """Noise, and a sweep under noise: float32 [2 S]; no bin is so quiet that its logarithm is rounding."""
    rng, time = np.random.default_rng(0), np.arange(int(seconds * RATE)) / RATE
    noise = 0.1 * rng.normal(size=(2, time.size))
    return (noise + np.stack([0 * time, 0.3 * np.sin(2 * np.pi * (200 * time + 900 * time**2))])).astype(np.float32)


def spectrogram(imported, audio: np.ndarray) -> np.ndarray:
    recipe, params = recipe_of(imported)

    def run(recipe, audio):
        return recipe.model.encoder["audio"].spectrogram(audio)

    return np.asarray(jax.jit(lambda audio: recipe.apply({"params": params}, audio, method=run))(audio))


@pytest.mark.parametrize(("seconds", "head"), [(0.5, False), (1.0, True)], ids=["padded", "cut"])
def test_ast(tmp_path, seconds: float, head: bool):
    cls = transformers.ASTForAudioClassification if head else transformers.ASTModel
    model = randomise(cls(transformers.ASTConfig(**AST, qkv_bias=head)))
    imported = read(model, tmp_path / "theirs")
    assert len(imported.left) == 4 * head
    base = model.audio_spectrogram_transformer if head else model
    audio = waves(seconds)
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=36, max_length=64)
    values = torch.tensor(np.stack(extractor(list(audio), sampling_rate=RATE)["input_values"]))
    mine = torch.tensor(spectrogram(imported, audio))
    assert relative(mine, values) < 1e-4
    ours = encode(imported, audio=audio)["audio"]
    assert (np.asarray(ours.at[0, :3]) == [-1, -1, 0]).all()
    # Theirs has frequency before time.
    tokens = np.concatenate(
        [ours.x[:, :2], np.asarray(ours.x[:, 2:]).reshape(2, 7, 3, 32).swapaxes(1, 2).reshape(2, 21, 32)], axis=1
    )
    close("ast, of one spectrogram", tokens, base, lambda m: m(mine.to(m.dtype)).last_hidden_state)
    close("ast, of a waveform", tokens, base, lambda m: m(values.to(m.dtype)).last_hidden_state, 1e-4)
    again = transformers.ASTModel.from_pretrained(save(imported, tmp_path / "ours")).eval()
    with torch.no_grad():
        assert relative(base(values).last_hidden_state, again(values).last_hidden_state) < 1e-6


@pytest.mark.parametrize(("seconds", "whole"), [(0.7, False), (1.0, True)], ids=["padded", "whole"])
def test_whisper(tmp_path, seconds: float, whole: bool):
    cls = transformers.WhisperForConditionalGeneration if whole else transformers.WhisperModel
    model = randomise(cls(transformers.WhisperConfig(**WHISPER)))
    imported = read(model, tmp_path / "theirs")
    assert imported.left and all(name.startswith("model.decoder.") for name in imported.left)
    base = model.model.encoder if whole else model.encoder
    audio = waves(seconds)
    extractor = transformers.WhisperFeatureExtractor(feature_size=24, chunk_length=1)
    values = torch.tensor(np.stack(extractor(list(audio), sampling_rate=RATE)["input_features"]))
    mine = torch.tensor(spectrogram(imported, audio)).transpose(1, 2)
    assert relative(mine, values) < 1e-4
    tokens = encode(imported, audio=audio)["audio"].x
    close("whisper, of one spectrogram", tokens, base, lambda m: m(mine.to(m.dtype)).last_hidden_state)
    close("whisper, of a waveform", tokens, base, lambda m: m(values.to(m.dtype)).last_hidden_state, 1e-4)
    again, told = transformers.WhisperModel.from_pretrained(save(imported, tmp_path / "ours"), output_loading_info=True)
    assert all(key.startswith("decoder.") for key in told["missing_keys"])
    assert not told["unexpected_keys"] and not told["mismatched_keys"]
    with torch.no_grad():
        assert relative(base(values).last_hidden_state, again.eval().encoder(values).last_hidden_state) < 1e-6


@pytest.mark.parametrize("family", ["audio-spectrogram-transformer", "whisper"])
def test_settings_left_to_their_defaults(family: str):
    cls = {"whisper": transformers.WhisperConfig, "audio-spectrogram-transformer": transformers.ASTConfig}[family]
    whole, module = json.loads(cls().to_json_string(use_diff=False)), FAMILIES[family]
    assert module.describe({}, frozenset()) == module.describe(whole, frozenset())


def test_a_file_that_does_not_fit_its_config_is_refused(tmp_path):
    model = transformers.ASTModel(transformers.ASTConfig(**AST))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"max_length": 64', '"max_length": 72'))
    with pytest.raises(UserError, match="does not fit config.json"):
        read_published(tmp_path)
    tensors = load_file(str(tmp_path / "model.safetensors"))
    save_file({k: v for k, v in tensors.items() if "distillation" not in k}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="distillation_token"):
        read_published(tmp_path)
