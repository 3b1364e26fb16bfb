"""Sound as published models take it: front ends, stems and whole encoders against those of transformers and PyTorch."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from from_torch import AST, WHISPER, norm, relative, stack
from references import RATE, sounds
from test_layers import parameters

from vmm.augment import SpecAugment, spec_augment
from vmm.encoders import ENCODERS
from vmm.encoders.frontends import FRONTENDS
from vmm.errors import UserError
from vmm.types import Patches


def encoder(**fields):
    return ENCODERS["audio"](**dict(width=32, depth=2, heads=4) | fields)


def given(monkeypatch, mel: np.ndarray) -> np.ndarray:
    """Makes of the front end "log_mel" one that takes the spectrogram itself; returns it as its waveform [B S]."""
    monkeypatch.setitem(FRONTENDS, "log_mel", (lambda wave, bins, *_: wave.reshape(len(wave), -1, bins), 0.0, 1.0))
    return mel.reshape(len(mel), -1)


# A float32 transform leaves a frame's own rounding in its bins, about 1e-7 of the loudest one's amplitude: in a bin as
# quiet as 1e-4 of that, the logarithm is off by 1e-3. So the mean error and that of the power show a mistake; the
# largest is that of published float32 code: Whisper's torch code is as far from its own float64 one, in NumPy.
@pytest.mark.parametrize(("name", "frames"), [("clip", 0), ("padded", 60), ("cut", 60)])
def test_kaldi_is_that_of_ast(name: str, frames: int):
    reference = references.read("kaldi")
    waves, theirs = sounds(reference.inputs[name]), reference.outputs[name]
    long = frames or 1 + (waves.shape[1] - 400) // 160

    def both(wave):
        plain = FRONTENDS["kaldi"][0](wave, 128, 400, 160, RATE, frames)
        return plain, encoder(frontend="kaldi", frames=frames).spectrogram(wave)

    ours, normal = jax.jit(both)(waves)
    error = np.abs(np.asarray(ours) - theirs)
    assert ours.shape == (4, long, 128)
    assert error.mean() < 2e-6 * np.abs(theirs).max()
    assert error.max() < 3e-3
    power = np.exp(np.float64(theirs))  # of what a frame has, all is right
    assert (np.abs(np.exp(np.float64(ours)) - power).max(2) < 1e-6 * power.max(2)).all()
    # Standardised, AST's mean and two deviations are the front end's own.
    mean, deviation = reference.outputs[f"{name}/mean"], 2 * reference.outputs[f"{name}/std"]
    np.testing.assert_allclose(normal, (theirs - mean) / deviation, atol=5e-4)


@pytest.mark.parametrize("bins", [80, 128])
def test_whisper_is_that_of_whisper(bins: int):
    reference = references.read("whisper_spectrogram")
    for name in ("padded", "whole", "cut"):  # with silence; half a second
        told = reference.outputs[f"{bins}/{name}"]
        waves = sounds(reference.inputs[name])
        ours = np.asarray(jax.jit(encoder(frontend="whisper", bins=bins, frames=50).spectrogram)(waves))
        assert ours.shape == (4, 50, bins)
        error = np.abs(ours - told)
        assert error.mean() < 1e-6
        assert error.max() < max(2e-5, 2 * reference.outputs[f"{bins}/{name}/rounding"])
    # Without `frames`, as long as the clip.
    ours = jax.jit(encoder(frontend="whisper", bins=bins).spectrogram)(sounds(reference.inputs["padded"]))
    np.testing.assert_allclose(ours, reference.outputs[f"{bins}/alone"], atol=2e-4)


def test_our_front_end_can_be_cut_and_padded_too():
    waves = sounds(0.5)
    function = jax.jit(FRONTENDS["log_mel"][0], static_argnums=(1, 2, 3, 4, 5))
    whole = function(waves, 32, 400, 160, RATE, 0)
    assert whole.shape == (4, 50, 32)
    np.testing.assert_array_equal(function(waves, 32, 400, 160, RATE, 20), whole[:, :20])
    padded = function(waves, 32, 400, 160, RATE, 60)
    np.testing.assert_array_equal(padded[:, :50], whole)
    np.testing.assert_allclose(padded[:, 50:], np.log(1e-6), rtol=1e-6)


def test_sound_that_does_not_fit_is_refused():
    wave = jnp.zeros((1, 1600))
    wrong = {
        "unknown frontend 'mfcc'": [dict(frontend="mfcc")],
        "unknown stem 'lstm'": [dict(stem="lstm")],
        "does not fit": [dict(frontend="kaldi"), dict(stride=(8, 8)), dict(patch=(4, 5)), dict(stem="conv", hop=1600)],
    }
    for words, cases in wrong.items():
        for fields in cases:
            with pytest.raises(UserError, match=words):
                jax.eval_shape(encoder(**fields).patches, wave)


# Stems.


def test_overlapping_patches_are_those_of_a_strided_convolution(monkeypatch):
    reference = references.read("strided_convolution")
    model = encoder(bins=20, patch=(6, 8), stride=(4, 5), depth=0)
    patches = model.patches(jnp.asarray(given(monkeypatch, reference.inputs["mel"])))
    assert patches.grid == (5, 3)
    ours = np.asarray(patches.values) @ reference.inputs["kernel"].reshape(7, -1).T
    np.testing.assert_allclose(ours.reshape(2, 5, 3, 7), reference.outputs["values"], atol=1e-4)


def test_spec_augment_of_overlapping_patches_is_of_the_spectrogram():
    frames, bins = 40, 20
    for fields in (dict(patch=(6, 8), stride=(4, 5)), dict(stem="conv")):
        model = encoder(bins=bins, **fields)
        patch, stride = model.windows
        rows, columns = (frames - patch[0]) // stride[0] + 1, (bins - patch[1]) // stride[1] + 1
        grid = (rows, columns) if model.stem == "patch" else (rows,)
        ones = Patches(
            jnp.ones((16, rows * columns, patch[0] * patch[1])), jnp.ones((16, rows * columns), bool), grid, 0
        )
        keys = jax.random.split(jax.random.key(0), 16)
        spec = SpecAugment(time_width=12, mel_width=7)
        cut = jax.jit(
            lambda keys, f=functools.partial(spec_augment, ones, patch, spec=spec, stride=stride): f(keys=keys).values
        )
        values = cut(keys)
        values = np.asarray(values).reshape(16, rows, columns, *patch)
        # Each cell of the spectrogram has one value, whichever patch it is read from, and cells are rows or columns.
        whole = np.full((16, frames, bins), np.nan)
        for i in range(rows):
            for j in range(columns):
                part = whole[:, i * stride[0] :, j * stride[1] :][:, : patch[0], : patch[1]]
                assert (np.isnan(part) | (part == values[:, i, j])).all()
                part[:] = values[:, i, j]
        whole = whole[:, : (rows - 1) * stride[0] + patch[0], : (columns - 1) * stride[1] + patch[1]]
        expected = whole.any(2)[:, :, None] * whole.any(1)[:, None]
        np.testing.assert_array_equal(whole, expected)
        assert 0.3 < whole.mean() < 0.95


def test_convolutional_stem_is_two_convolutions(monkeypatch):
    """Value, gradient and subset of tokens, with the padding of both convolutions; depth 0 shows the stem alone."""
    reference = references.read("two_convolutions")
    model = encoder(stem="conv", bins=10, depth=0, positions="none", final_norm=False)
    mel, cotangent = reference.inputs["mel"], reference.inputs["cotangent"]
    patches = model.patches(jnp.asarray(given(monkeypatch, mel)))
    assert patches.grid == (10,)
    assert patches.values.shape == (2, 10, 50)
    # An odd frame at the end is left out.
    odd = model.patches(jnp.asarray(given(monkeypatch, np.concatenate([mel, 7 * mel[:, :1]], axis=1))))
    np.testing.assert_array_equal(odd.values, patches.values)

    def ours_of(arrays: dict) -> dict:
        """Theirs, [out in taps] and [out], as a kernel [(taps in) out] and a bias."""
        return {
            name: {
                "kernel": arrays[f"{i}.weight"].transpose(2, 1, 0).reshape(-1, 32),
                "bias": arrays[f"{i}.bias"],
            }
            for i, name in enumerate(("embed", "embed_2"))
        }

    params = ours_of(reference.tensors)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, dict(parameters(model, patches, None)))

    @jax.jit
    def ours(params, values, keep):
        def loss(params):
            tokens = model.apply({"params": params}, patches._replace(values=values), keep)
            wanted = cotangent if keep is None else jnp.take_along_axis(cotangent, keep[..., None], 1)
            return (tokens.x * wanted).sum(), tokens.x

        return jax.grad(loss, has_aux=True)(params)

    gradient, x = ours(params, patches.values, None)
    assert relative(x, reference.outputs["tokens"]) < 1e-5
    for name, wanted in ours_of(reference.gradients).items():
        assert relative(gradient[name]["kernel"], wanted["kernel"]) < 1e-5
        assert relative(gradient[name]["bias"], wanted["bias"]) < 1e-5
    keep = jnp.asarray([[0, 3, 9], [8, 0, 1]])
    np.testing.assert_allclose(
        ours(params, patches.values, keep)[1], np.take_along_axis(x, keep[..., None], 1), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["learned", "factorised"])
def test_positions_of_time_and_frequency(kind: str):
    model = encoder(bins=24, patch=(4, 8), depth=0, final_norm=False, positions=kind)
    patches = model.patches(jnp.zeros((1, 2560)))
    assert patches.grid == (4, 3)
    keep = jnp.asarray([[0, 4, 11, 6]])
    params = parameters(model, patches, keep)
    table = params["positions"]
    added = table["table"] if kind == "learned" else table["first"][:, None] + table["rest"]
    plain = encoder(bins=24, patch=(4, 8), depth=0, final_norm=False, positions="none")
    both = jax.jit(lambda params: [one.apply({"params": params}, patches, keep).x for one in (model, plain)])
    with_positions, without = map(np.asarray, both(params))
    np.testing.assert_allclose(with_positions - np.asarray(added).reshape(12, -1)[keep], without, atol=1e-5)
    assert added.shape == (4, 3, 32)


# Whole encoders, from the waveform on.


def tokens_of(model, params: dict, reference) -> dict:
    """Returns name → tokens of the sounds of a reference, which have as many frames each."""
    patches = {name: jax.jit(model.patches)(sounds(seconds)) for name, seconds in reference.inputs.items()}
    one = next(iter(patches.values()))
    grid = tuple(map(int, one.grid))
    run = jax.jit(lambda params, values: model.apply({"params": params}, Patches(values, one.valid, grid, 0), None))
    return {name: run(params, each.values) for name, each in patches.items()}


def test_encoder_is_ast():
    """Of sounds that are padded and cut."""
    reference = references.read("ast_encoder")
    values = reference.tensors
    table = values["embeddings.position_embeddings"][0]
    first = np.concatenate([values["embeddings.cls_token"], values["embeddings.distillation_token"]], 1)[0]
    kernel = values["embeddings.patch_embeddings.projection.weight"][:, 0]  # [D bins frames]
    params = {
        "registers": first + table[:2],
        "embed": {
            "kernel": kernel.transpose(2, 1, 0).reshape(-1, 32),
            "bias": values["embeddings.patch_embeddings.projection.bias"],
        },
        # Theirs go through frequency first.
        "positions": {"table": table[2:].reshape(2, 5, 32).swapaxes(0, 1)},
        "stack": {"blocks": stack(values, "layers.", AST, 2, 4), "norm": norm(values, "layernorm")},
    }
    block = dict(activation="gelu", epsilon=1e-12)
    model = encoder(
        frontend="kaldi", bins=32, frames=64, stride=(10, 10), positions="learned", registers=2, block=block
    )
    order = np.concatenate([[0, 1], 2 + np.arange(10).reshape(5, 2).T.ravel()])
    for name, tokens in tokens_of(model, params, reference).items():
        error = relative(np.asarray(tokens.x)[:, order], reference.outputs[name])
        print("AST", name, error)
        assert error < 1e-4
        np.testing.assert_array_equal(tokens.at[0], [-1, -1, *range(10)])


def test_encoder_is_whispers():
    """Of sounds that are padded and cut."""
    reference = references.read("whisper_encoder")
    values = reference.tensors

    def convolution(name: str) -> dict:
        return {"kernel": values[f"{name}.weight"].transpose(2, 1, 0).reshape(-1, 32), "bias": values[f"{name}.bias"]}

    params = {
        "embed": convolution("conv1"),
        "embed_2": convolution("conv2"),
        "positions": {"table": values["embed_positions.weight"]},
        "stack": {"blocks": stack(values, "layers.", WHISPER, 2, 4), "norm": norm(values, "layer_norm")},
    }
    block = dict(activation="gelu", epsilon=1e-5)
    model = encoder(frontend="whisper", bins=20, frames=100, stem="conv", positions="learned", block=block)
    for name, tokens in tokens_of(model, params, reference).items():
        error = relative(tokens.x, reference.outputs[name])
        print("Whisper", name, error)
        assert error < 1e-4


@pytest.mark.parametrize("name", FRONTENDS)
def test_a_spectrogram_of_split_clips_gathers_nothing(name: str):
    """On eight devices each makes those of its own clips, the numbers are the same, and no collective is compiled."""
    from vmm.sharding import MeshShape, batch_sharding, make_mesh

    waves = np.random.default_rng(0).normal(0, 0.1, (8, 16000)).astype(np.float32)
    function = FRONTENDS[name][0]
    alone = jax.jit(lambda x: function(x, 64, 400, 160, 16000))(waves)
    mesh = make_mesh(MeshShape(4, 2))
    with jax.set_mesh(mesh):
        split = jax.jit(lambda x: function(x, 64, 400, 160, 16000), out_shardings=batch_sharding(mesh))
        compiled = split.lower(jax.ShapeDtypeStruct(waves.shape, waves.dtype, sharding=batch_sharding(mesh))).compile()
        np.testing.assert_allclose(compiled(jax.device_put(waves, batch_sharding(mesh))), alone, atol=1e-4)
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
