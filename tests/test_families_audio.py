"""Published families of sound: from a waveform through their own extractors and ours to equal outputs, and back."""

import jax
import numpy as np
import pytest
import references
from families import assert_exported, assert_initialised, batch_of, close, encode, read, recipe_of, relative
from safetensors.numpy import load_file, save_file

from vmm.encoders.frontends import FRONTENDS
from vmm.errors import UserError
from vmm.weights.families import FAMILIES
from vmm.weights.published import read_published


def spectrogram(imported, audio: np.ndarray) -> np.ndarray:
    recipe, params = recipe_of(imported)

    def run(recipe, audio):
        return recipe.model.encoder["audio"].spectrogram(audio)

    return np.asarray(jax.jit(lambda audio: recipe.apply({"params": params}, audio, method=run))(audio))


def encode_spectrograms(imported, *mels: np.ndarray) -> tuple[list, np.ndarray]:
    """Returns the tokens of each spectrogram [B F M], taken as the front end's, and their places."""
    kind, mel = imported.model["trunk"]["encoders"]["audio"]["frontend"], np.concatenate(mels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FRONTENDS, kind, (lambda wave, bins, *_: wave.reshape(len(wave), -1, bins), 0.0, 1.0))
        tokens = encode(imported, audio=mel.reshape(len(mel), -1))["audio"]
    return np.split(np.asarray(tokens.x), len(mels)), np.asarray(tokens.at)


def check(imported, reference, audio: np.ndarray):
    """The spectrogram, the tokens of theirs and those of ours are the published model's; returns places of tokens."""
    mine, theirs = spectrogram(imported, audio), reference.outputs["values"]
    assert relative(mine, theirs) < 1e-4
    (of_mine, of_theirs), at = encode_spectrograms(imported, mine, theirs)
    close("of one spectrogram", of_theirs, reference.outputs["tokens"])
    close("of a waveform", of_mine, reference.outputs["tokens"], 1e-4)
    return at


@pytest.mark.parametrize(("name", "head"), [("padded", False), ("cut", True)])
def test_ast(tmp_path, name: str, head: bool):
    reference, imported = read(f"ast_{name}", tmp_path / "theirs")
    assert len(imported.left) == 4 * head
    audio = references.waves(reference.inputs["seconds"])
    assert_initialised(imported, batch_of(audio=audio))
    at = check(imported, reference, audio)
    assert (at[0, :3] == [-1, -1, 0]).all()
    heads = dict(architectures=(["ASTForAudioClassification"], ["ASTModel"]))
    merged = ("cls_token", "distillation_token", "position_embeddings")
    assert_exported(imported, reference, tmp_path / "ours", merged, heads if head else dict(qkv_bias=(False, True)))


@pytest.mark.parametrize(("name", "whole"), [("padded", False), ("whole", True)])
def test_whisper(tmp_path, name: str, whole: bool):
    reference, imported = read(f"whisper_{name}", tmp_path / "theirs")
    assert imported.left and all(name.startswith("model.decoder.") for name in imported.left)
    audio = references.waves(reference.inputs["seconds"])
    assert_initialised(imported, batch_of(audio=audio))
    check(imported, reference, audio)
    changed = dict(decoder_layers=(1, 0))
    changed |= dict(architectures=(["WhisperForConditionalGeneration"], ["WhisperModel"])) if whole else {}
    assert_exported(imported, reference, tmp_path / "ours", changed=changed)


@pytest.mark.parametrize("family", ["audio-spectrogram-transformer", "whisper"])
def test_settings_left_to_their_defaults(family: str):
    whole, module = references.read("defaults").config[family], FAMILIES[family]
    assert module.describe({}, frozenset()) == module.describe(whole, frozenset())


def test_a_file_that_does_not_fit_its_config_is_refused(tmp_path):
    references.read("ast_padded").publish(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"max_length": 64', '"max_length": 72'))
    with pytest.raises(UserError, match="does not fit config.json"):
        read_published(tmp_path)
    tensors = load_file(str(tmp_path / "model.safetensors"))
    save_file({k: v for k, v in tensors.items() if "distillation" not in k}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="distillation_token"):
        read_published(tmp_path)
