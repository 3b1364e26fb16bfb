"""Sound as published models take it: front ends, stems and whole encoders against transformers and torch."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from from_torch import AST, WHISPER, norm, randomise, relative, stack
from test_layers import parameters

from vmm.augment import SpecAugment, spec_augment
from vmm.encoders import ENCODERS
from vmm.encoders.frontends import FRONTENDS
from vmm.errors import UserError
from vmm.types import Patches

RATE = 16000
# transformers says of AST's own filters that the lowest fall between two frequencies of the transform.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter:UserWarning")


def sounds(seconds: float) -> np.ndarray:
    """Noise, a sweep with a constant added, a tone that ends in silence, silence: float32 [4 S]."""
    rng, time = np.random.default_rng(0), np.arange(int(seconds * RATE)) / RATE
    noise = 0.1 * rng.normal(size=time.size)
    sweep = 0.3 * np.sin(2 * np.pi * (200 * time + 900 * time**2)) + 1e-3 * noise + 0.05
    tone = 0.5 * np.sin(2 * np.pi * 440 * time) * (time < seconds / 2)
    return np.stack([noise, sweep, tone, 0 * time]).astype(np.float32)


def encoder(**fields):
    return ENCODERS["audio"](**dict(width=32, depth=2, heads=4) | fields)


@functools.cache
def extractors():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.ASTFeatureExtractor, transformers.WhisperFeatureExtractor


# A float32 transform leaves a frame's own rounding in its bins, about 1e-7 of the loudest one's amplitude: in a bin as
# quiet as 1e-4 of that, the logarithm is off by 1e-3. So the mean error and that of the power show a mistake; the
# largest is that of published float32 code: Whisper's torch code is as far from its own float64 one, in NumPy.
@pytest.mark.parametrize(("seconds", "frames"), [(0.73, 0), (0.73, 100), (1.5, 100)], ids=["clip", "padded", "cut"])
def test_kaldi_is_that_of_ast(seconds: float, frames: int):
    extractor = extractors()[0]
    waves = sounds(seconds)
    long = frames or 1 + (waves.shape[1] - 400) // 160
    theirs = extractor(max_length=long, do_normalize=False)(list(waves), sampling_rate=RATE)["input_values"]
    ours = jax.jit(lambda wave: FRONTENDS["kaldi"][0](wave, 128, 400, 160, RATE, frames))(waves)
    error = np.abs(np.asarray(ours) - np.stack(theirs))
    assert ours.shape == (4, long, 128)
    assert error.mean() < 2e-6 * np.abs(theirs).max()
    assert error.max() < 3e-3
    power = np.exp(np.float64(theirs))  # of what a frame has, all is right
    assert (np.abs(np.exp(np.float64(ours)) - power).max(2) < 1e-6 * power.max(2)).all()
    # Standardised, AST's mean and two deviations are the front end's own.
    normal = extractor(max_length=long)(list(waves), sampling_rate=RATE)["input_values"]
    ours = jax.jit(encoder(frontend="kaldi", frames=frames).spectrogram)(waves)
    np.testing.assert_allclose(ours, np.stack(normal), atol=5e-4)


@pytest.mark.parametrize("bins", [80, 128])
def test_whisper_is_that_of_whisper(bins: int):
    extractor = extractors()[1](feature_size=bins, chunk_length=1)
    for seconds in (0.73, 1.0, 1.5):  # padded with silence, whole, cut
        waves = sounds(seconds)
        told = extractor(list(waves), sampling_rate=RATE)["input_features"]
        whole = np.zeros((4, RATE), np.float32)
        whole[:, : waves.shape[1]] = waves[:, :RATE]
        exact = extractor._np_extract_fbank_features(whole, "cpu")
        ours = np.asarray(jax.jit(encoder(frontend="whisper", bins=bins, frames=100).spectrogram)(waves))
        assert ours.shape == (4, 100, bins)
        error = np.abs(ours - exact.transpose(0, 2, 1))
        assert error.mean() < 1e-6
        assert error.max() < max(2e-5, 2 * np.abs(told - exact).max())
    # Without `frames`, as long as the clip.
    waves = sounds(0.73)
    told = extractor(list(waves), sampling_rate=RATE, padding="longest")["input_features"]
    ours = jax.jit(encoder(frontend="whisper", bins=bins).spectrogram)(waves)
    np.testing.assert_allclose(ours, np.transpose(told, (0, 2, 1)), atol=2e-4)


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


def test_overlapping_patches_are_those_of_a_strided_convolution():
    torch = pytest.importorskip("torch")
    model = encoder(bins=20, patch=(6, 8), stride=(4, 5), depth=0)
    wave = sounds(0.25)[:2]
    patches = jax.jit(lambda wave: model.patches(wave).values)(wave)
    assert model.patches(jnp.asarray(wave)).grid == (5, 3)
    mel = np.array(jax.jit(model.spectrogram)(wave))
    kernel = np.random.default_rng(0).normal(size=(7, 6, 8)).astype(np.float32)
    theirs = torch.nn.functional.conv2d(
        torch.from_numpy(mel)[:, None], torch.from_numpy(kernel)[:, None], stride=(4, 5)
    )
    ours = np.asarray(patches) @ kernel.reshape(7, -1).T
    np.testing.assert_allclose(ours.reshape(2, 5, 3, 7), theirs.permute(0, 2, 3, 1), atol=1e-4)


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


@pytest.mark.parametrize("samples", [3200, 3360], ids=["even", "odd"])
def test_convolutional_stem_is_two_convolutions(samples: int):
    """Value, gradient and subset of tokens, with the padding of both convolutions; depth 0 shows the stem alone."""
    torch = pytest.importorskip("torch")
    model = encoder(stem="conv", bins=10, depth=0, positions="none", final_norm=False)
    patches = model.patches(jnp.asarray(sounds(0.3)[:2, :samples]))
    assert patches.grid == (10,)
    assert patches.values.shape == (2, 10, 50)
    params = parameters(model, patches, None)
    kernels = [np.asarray(params[name]["kernel"]).reshape(3, -1, 32) for name in ("embed", "embed_2")]
    first, second = (torch.nn.Conv1d(size, 32, 3, stride=s, padding=1) for size, s in ((10, 1), (32, 2)))
    for conv, kernel, name in ((first, kernels[0], "embed"), (second, kernels[1], "embed_2")):
        conv.load_state_dict(
            {
                "weight": torch.from_numpy(kernel.transpose(2, 1, 0).copy()),
                "bias": torch.from_numpy(np.array(params[name]["bias"])),
            }
        )
    mel = model.spectrogram(jnp.asarray(sounds(0.3)[:2, :samples]))[:, :20]
    x = torch.from_numpy(np.array(mel).transpose(0, 2, 1))
    theirs = torch.nn.functional.gelu(second(torch.nn.functional.gelu(first(x)))).transpose(1, 2)
    cotangent = np.random.default_rng(1).normal(size=(2, 10, 32)).astype(np.float32)
    (theirs * torch.from_numpy(cotangent)).sum().backward()

    @jax.jit
    def ours(params, values, keep):
        def loss(params):
            tokens = model.apply({"params": params}, patches._replace(values=values), keep)
            wanted = cotangent if keep is None else jnp.take_along_axis(cotangent, keep[..., None], 1)
            return (tokens.x * wanted).sum(), tokens.x

        return jax.grad(loss, has_aux=True)(params)

    gradient, x = ours(params, patches.values, None)
    assert relative(x, theirs.detach()) < 1e-5
    for name, conv in (("embed", first), ("embed_2", second)):
        wanted = conv.weight.grad.numpy().transpose(2, 1, 0).reshape(-1, 32)
        assert relative(gradient[name]["kernel"], wanted) < 1e-5
        assert relative(gradient[name]["bias"], conv.bias.grad) < 1e-5
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
    without = model.apply({"params": params}, patches, keep).x - added.reshape(12, -1)[keep]
    plain = encoder(bins=24, patch=(4, 8), depth=0, final_norm=False, positions="none")
    np.testing.assert_allclose(without, plain.apply({"params": params}, patches, keep).x, atol=1e-5)
    assert added.shape == (4, 3, 32)


# Whole encoders, from the waveform on.


@pytest.mark.parametrize("seconds", [0.5, 0.9], ids=["padded", "cut"])
def test_encoder_is_ast(seconds: float):
    extractor = extractors()[0](num_mel_bins=32, max_length=64)
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    fields = dict(num_mel_bins=32, max_length=64, frequency_stride=10, time_stride=10)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    theirs = transformers.ASTModel(transformers.ASTConfig(**fields, **shape))
    values = randomise(theirs)
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
    wave = sounds(seconds)
    with torch.no_grad():
        taken = extractor(list(wave), sampling_rate=RATE, return_tensors="pt")["input_values"]
        wanted = theirs(taken).last_hidden_state.numpy()
    tokens = jax.jit(lambda params, wave: model.apply({"params": params}, model.patches(wave), None))(params, wave)
    got = np.asarray(tokens.x)
    order = np.concatenate([[0, 1], 2 + np.arange(10).reshape(5, 2).T.ravel()])
    error = relative(got[:, order], wanted)
    print("AST", error)
    assert error < 1e-4
    np.testing.assert_array_equal(tokens.at[0], [-1, -1, *range(10)])


@pytest.mark.parametrize("seconds", [0.5, 1.2], ids=["padded", "cut"])
def test_encoder_is_whispers(seconds: float):
    extractor = extractors()[1](feature_size=20, chunk_length=1)
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=32, num_mel_bins=20, max_source_positions=50, vocab_size=60,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    theirs = transformers.WhisperModel(config).encoder
    values = randomise(theirs)

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
    wave = sounds(seconds)
    with torch.no_grad():
        taken = extractor(list(wave), sampling_rate=RATE, return_tensors="pt")["input_features"]
        wanted = theirs(taken).last_hidden_state.numpy()
    tokens = jax.jit(lambda params, wave: model.apply({"params": params}, model.patches(wave), None))(params, wave)
    error = relative(tokens.x, wanted)
    print("Whisper", error)
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
