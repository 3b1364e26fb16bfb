"""Makes the references of this folder with PyTorch and transformers.

    python tests/references/make.py [NAME …]      all of them, or those that are named

It asks for requirements-peers.txt, and prints how far each output is from the same in float64. `make test` reads what
is here; `pytest --exhaustive tests/test_references.py` makes every reference again and compares.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from references import CAPTIONS, RATE, below, draw, orders, pixels, scene, sounds, uniform, waves  # noqa: E402


class Made(NamedTuple):
    """What is written of a reference. shapes: of the drawn tensors. stored: of the others, their values. cls: what loads it."""

    config: dict = {}
    prefix: str = ""
    shapes: dict = {}
    stored: dict = {}
    inputs: dict = {}
    outputs: dict = {}
    gradients: dict = {}
    cls: str | None = None


class Published(NamedTuple):
    """A model that `from_pretrained` loads.

    run: (model, inputs) → outputs by name. options: of from_pretrained. prefix: of the base model's names where a file
    holds a head too. again: what loads our export of it, (class, options); None: the same. absent: what the names of
    tensors begin with that an export lacks.
    """

    cls: type
    config: object
    inputs: dict
    run: Callable
    prefix: str = ""
    options: dict = {}
    again: tuple | None = None
    absent: str = "nothing"

    def make(self) -> Made:
        with tempfile.TemporaryDirectory() as folder:
            fresh = self.cls(self.config, **self.options)
            fresh.save_pretrained(folder)
            path = str(Path(folder) / "model.safetensors")
            tensors = load_file(path)
            fixed = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
            stored = {name: table(value) for name, value in tensors.items() if name in fixed}
            shapes = {name: list(value.shape) for name, value in tensors.items() if name not in fixed}
            save_file(draw(shapes, self.prefix) | stored, path, metadata={"format": "pt"})
            model = self.load(folder)
            config = json.loads((Path(folder) / "config.json").read_text())
        outputs = self.run(model, self.inputs)
        exact = self.run(copy.deepcopy(model).double(), self.inputs)
        for name, value in outputs.items():
            print(f"  {name}: {difference(value, exact[name]):.1e} from float64")
        return Made(config, self.prefix, shapes, stored, self.inputs, numpy_of(outputs), cls=self.cls.__name__)

    def load(self, folder):
        return self.cls.from_pretrained(folder, **self.options).eval()

    def load_again(self, folder) -> tuple:
        """Returns (the model of our export, what was told while loading)."""
        cls, options = self.again or (self.cls, self.options)
        model, told = cls.from_pretrained(folder, **options, output_loading_info=True)
        return model.eval(), told


def table(value: np.ndarray) -> np.ndarray:
    """A table of positions that is not trained. Where a fresh model has zeros, published files have sines, and zeros for
    the class token: here, what is drawn."""
    if value.any():
        return value
    drawn = uniform("table", *value.shape).astype(np.float32)
    drawn[:, 0] = 0
    return drawn


def difference(one, other) -> float:
    """Returns the largest difference over the largest value."""
    one, other = (np.asarray(value.detach() if torch.is_tensor(value) else value, np.float64) for value in (one, other))
    return float(np.abs(one - other).max() / np.abs(other).max())


def numpy_of(values: dict) -> dict:
    return {name: np.asarray(value.detach() if torch.is_tensor(value) else value) for name, value in values.items()}


MAKERS: dict[str, Callable[[], Made]] = {}
PUBLISHED: dict[str, Published] = {}


def publish(name: str, *args, **fields) -> None:
    PUBLISHED[name] = Published(*args, **fields)
    MAKERS[name] = PUBLISHED[name].make


def reference(function: Callable) -> Callable:
    MAKERS[function.__name__] = function
    return function


def whole(config) -> dict:
    """Returns a configuration as JSON, defaults and all."""
    return json.loads(config.to_json_string(use_diff=False))


def normalised(video: np.ndarray, mean, deviation) -> torch.Tensor:
    """uint8 [B T H W 3] → what an image processor gives, float32 [B T 3 H W]."""
    x = (video.astype(np.float64) / 255 - np.asarray(mean)) / np.asarray(deviation)
    return torch.tensor(x, dtype=torch.float32).permute(0, 1, 4, 2, 3)


IMAGENET = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
HALF = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
CLIP = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

# Video


def tokens_of(mean, deviation, base: Callable = lambda model: model, **options) -> Callable:
    """Returns the run that gives the last hidden state of a video."""

    def run(model, inputs):
        x = normalised(inputs["video"], mean, deviation).to(model.dtype)
        return dict(tokens=base(model)(x, **options).last_hidden_state)

    return run


VIDEOMAE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8,
    num_frames=4, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
    decoder_intermediate_size=32, use_mean_pooling=False,
)  # fmt: skip
for _name, _cls, _fields in (
    ("videomae", transformers.VideoMAEForPreTraining, {}),
    ("videomae_base", transformers.VideoMAEModel, {}),
    ("videomae_classifier", transformers.VideoMAEForVideoClassification, dict(use_mean_pooling=True)),
):
    publish(
        _name, _cls, transformers.VideoMAEConfig(**VIDEOMAE | _fields), dict(video=pixels(2, 4, 16, 16, 3)),
        tokens_of(*IMAGENET, lambda model: getattr(model, "videomae", model)), "videomae.",
        again=(transformers.VideoMAEModel, {}) if _fields else None,
    )  # fmt: skip


# Processors of pictures as their published models have them, for pictures of 56 pixels.
SQUARE = dict(height=56, width=56)
PROCESSORS = {
    "clip": ("CLIPImageProcessor", dict(size=dict(shortest_edge=56), crop_size=SQUARE)),
    "siglip": ("SiglipImageProcessor", dict(size=SQUARE)),
    "timesformer": (
        "VideoMAEImageProcessor",
        dict(size=dict(shortest_edge=56), crop_size=SQUARE, image_mean=[0.45] * 3, image_std=[0.225] * 3),
    ),
    "videomae": (
        "VideoMAEImageProcessor",
        dict(
            size=dict(shortest_edge=56),
            crop_size=SQUARE,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        ),
    ),
    "vit": ("ViTImageProcessor", dict(size=SQUARE)),
    "vit_mae": (
        "ViTImageProcessor",
        dict(size=SQUARE, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD),
    ),
    "vivit": ("VivitImageProcessor", dict(size=dict(shortest_edge=64), crop_size=SQUARE)),
    "vjepa2": ("VJEPA2VideoProcessor", dict(size=dict(shortest_edge=64), crop_size=SQUARE)),
}


@reference
def processors() -> Made:
    """What the image processors of published families make of one picture."""
    outputs, files = {}, {}
    for family, (name, fields) in PROCESSORS.items():
        processor = getattr(transformers, name)(**fields)
        given = [scene()] * 2 if "Video" in name or family == "vivit" else scene()
        said = processor(list(given) if isinstance(given, list) else given, return_tensors="pt")
        values = said["pixel_values_videos"] if "pixel_values_videos" in said else said["pixel_values"]
        outputs[family] = values.reshape(-1, 3, 56, 56)[0].permute(1, 2, 0)
        told = json.loads(processor.to_json_string())
        keep = (
            "image_processor_type", "video_processor_type", "size", "crop_size", "do_center_crop", "do_resize", "do_rescale",
            "do_normalize", "rescale_factor", "offset", "image_mean", "image_std",
        )  # fmt: skip
        files[family] = {key: told[key] for key in keep if told.get(key) is not None}
    return Made(config=files, outputs=outputs)


@reference
def videomae_step() -> Made:
    """A training pass: loss, predictions and every gradient, with the decoder's last norm as it is and as the others."""
    rows, frames, size, width, decoder = 3, 4, 12, 16, 8
    config = transformers.VideoMAEConfig(
        image_size=size, patch_size=4, num_frames=frames, tubelet_size=2, hidden_size=width, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=2 * width, hidden_act="gelu", decoder_hidden_size=decoder,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=2 * decoder,
        use_mean_pooling=False, norm_pix_loss=True, layer_norm_eps=1e-12,
    )  # fmt: skip
    model = transformers.VideoMAEForPreTraining(config).eval()
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    fill(model, shapes)
    video, count = pixels(rows, frames, size, size, 3), 18
    hidden = orders("hidden", rows, count) < round(0.78 * count)
    outputs, gradients = {}, {}
    # The decoder's last norm has an epsilon of 1e-5 whatever the config says.
    for kind, epsilon in (("own", model.decoder.norm.eps), ("same", config.layer_norm_eps)):
        model.decoder.norm.eps = epsilon
        model.zero_grad()
        said = model(normalised(video, *IMAGENET), bool_masked_pos=torch.tensor(hidden))
        said.loss.backward()
        outputs |= {f"{kind}/loss": said.loss, f"{kind}/prediction": said.logits}
        gradients |= {f"{kind}/{name}": parameter.grad.clone() for name, parameter in model.named_parameters()}
    inputs = dict(video=video, hidden=hidden)
    return Made(whole(config), "", shapes, {}, inputs, numpy_of(outputs), numpy_of(gradients))


SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
# Its processor brings pixels to −1 … 1, and then takes 0.5 off and divides by 0.5.
VIVIT = (0.75, 0.25)


def vivit_run(model, inputs):
    x = normalised(inputs["video"], *VIVIT).to(model.dtype)
    return dict(tokens=model.vivit(x).last_hidden_state, logits=model(x).logits)


publish(
    "vivit", transformers.VivitForVideoClassification,
    transformers.VivitConfig(**SMALL, image_size=16, num_frames=4, tubelet_size=[2, 8, 4], num_labels=5),
    dict(video=pixels(2, 4, 16, 16, 3)), vivit_run, "vivit.",
)  # fmt: skip
publish(
    "vivit_base", transformers.VivitModel,
    transformers.VivitConfig(**SMALL, image_size=16, num_frames=4, tubelet_size=[2, 8, 4], qkv_bias=False),
    dict(video=pixels(2, 4, 16, 16, 3)), tokens_of(*VIVIT), "vivit.",
    again=(transformers.VivitModel, dict(add_pooling_layer=False)),
)  # fmt: skip


@reference
def vivit_pixels() -> Made:
    """What the image processor of ViViT makes of pixels."""
    frame = pixels(1, 1, 16, 16, 3)
    processor = transformers.VivitImageProcessor(do_resize=False, do_center_crop=False)
    values = processor([list(frame[0])], return_tensors="pt")["pixel_values"]
    return Made(inputs=dict(video=frame), outputs=numpy_of(dict(values=values)))


def vjepa2_run(model, inputs):
    x = normalised(inputs["video"], *IMAGENET).to(model.dtype)
    masks = dict(context_mask=[torch.tensor(inputs["keep"])], target_mask=[torch.tensor(inputs["hidden"])])
    return dict(
        tokens=model(x, skip_predictor=True).last_hidden_state,
        predicted=model(x, **masks).predictor_output.last_hidden_state,
    )


_order = orders("vjepa2", 2, 18)
publish(
    "vjepa2", transformers.VJEPA2Model,
    transformers.VJEPA2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, crop_size=24, patch_size=8, frames_per_clip=4,
        mlp_ratio=2.25, pred_hidden_size=32, pred_num_attention_heads=2, pred_num_hidden_layers=1,
        pred_num_mask_tokens=3,
    ),
    dict(video=pixels(2, 4, 24, 24, 3), keep=np.sort(_order[:, :6]), hidden=np.sort(_order[:, 6:])), vjepa2_run,
    "vjepa2.",
)  # fmt: skip


def by_frame(x: torch.Tensor, places: int, frames: int) -> torch.Tensor:
    """Class token and tokens place by place → the same, frame by frame."""
    return torch.cat([x[:, :1], x[:, 1:].unflatten(1, (places, frames)).transpose(1, 2).flatten(1, 2)], dim=1)


def timesformer_run(model, inputs):
    x = normalised(inputs["video"], 0.45, 0.225).to(model.dtype)  # its published models' own statistics
    return dict(tokens=by_frame(model.timesformer(x).last_hidden_state, 9, 4), logits=model(x).logits)


for _kind in ("divided", "joint"):
    publish(
        f"timesformer_{_kind}", transformers.TimesformerForVideoClassification,
        transformers.TimesformerConfig(
            **SMALL, image_size=24, patch_size=8, num_frames=4, attention_type=f"{_kind}_space_time", num_labels=5
        ),
        dict(video=pixels(2, 4, 24, 24, 3)), timesformer_run, "timesformer.",
    )  # fmt: skip

VIDEOPRISM = dict(
    hidden_size=24, num_attention_heads=2, intermediate_size=48, image_size=18, num_frames=3, tubelet_size=[1, 6, 6],
    num_spatial_layers=2, num_temporal_layers=2, attn_logit_softcapping=2.0,
)  # fmt: skip
_prism = transformers.VideoPrismVisionConfig(**VIDEOPRISM)
_larger = transformers.VideoPrismVisionConfig(**VIDEOPRISM, num_auxiliary_layers=1)
_text = dict(vocab_size=8, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
_both = transformers.VideoPrismConfig(vision_config=_larger.to_dict(), text_config=_text)


def vision_of(model):
    """The encoder of frames, alone or in a larger model."""
    model = getattr(model, "video_model", model)
    return getattr(model, "vision_model", model)


for _name, _cls, _config, _prefix in (
    ("videoprism", transformers.VideoPrismVisionModel, _prism, ""),
    ("videoprism_video", transformers.VideoPrismVideoModel, _larger, "vision_model."),
    ("videoprism_clip", transformers.VideoPrismClipModel, _both, "video_model.vision_model."),
):
    publish(
        _name, _cls, _config, dict(video=pixels(2, 3, 18, 18, 3)), tokens_of(0, 1, vision_of), _prefix,
        again=(transformers.VideoPrismVisionModel, {}),
    )  # fmt: skip


class CavMaeBlock(torch.nn.Module):
    """A block of CAV-MAE, written from the paper: norms for both streams, and for each of them alone."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        for name in ("norm1", "norm1_a", "norm1_v", "norm2", "norm2_a", "norm2_v"):
            setattr(self, name, torch.nn.LayerNorm(width))
        self.heads = heads
        self.attn = torch.nn.ModuleDict(dict(qkv=torch.nn.Linear(width, 3 * width), proj=torch.nn.Linear(width, width)))
        self.mlp = torch.nn.ModuleDict(dict(fc1=torch.nn.Linear(width, hidden), fc2=torch.nn.Linear(hidden, width)))

    def forward(self, x):
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attn.qkv(self.norm1(x)).chunk(3, -1)
        )
        weights = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1)
        x = x + self.attn.proj((weights @ value).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(torch.nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class CavMae(torch.nn.Module):
    """CAV-MAE's encoder: sound [B F M] and a picture [B 3 H W] → fused tokens of both, the sound's first."""

    def __init__(self, c: dict):
        super().__init__()
        width, patch = c["hidden_size"], c["patch_size"]
        counts = dict(a=c["num_mel_bins"] // patch * (c["audio_length"] // patch), v=(c["image_size"] // patch) ** 2)
        for stream, channels in (("a", 1), ("v", 3)):
            conv = torch.nn.Conv2d(channels, width, patch, patch)
            setattr(self, f"patch_embed_{stream}", torch.nn.ModuleDict(dict(proj=conv)))
            setattr(self, f"modality_{stream}", torch.nn.Parameter(torch.zeros(1, 1, width)))
            setattr(self, f"pos_embed_{stream}", torch.nn.Parameter(torch.zeros(1, counts[stream], width)))

        def make(depth):
            blocks = [CavMaeBlock(width, c["num_attention_heads"], c["intermediate_size"]) for _ in range(depth)]
            return torch.nn.ModuleList(blocks)

        self.blocks_a, self.blocks_v = make(c["modality_specific_depth"]), make(c["modality_specific_depth"])
        self.blocks_u = make(c["joint_depth"])
        self.norm, self.norm_a, self.norm_v = (torch.nn.LayerNorm(width) for _ in range(3))
        self.decoder_embed = torch.nn.Linear(width, 8)

    def forward(self, sound, picture):
        streams = []
        for stream, x in (("a", sound.transpose(1, 2)[:, None]), ("v", picture)):
            x = getattr(self, f"patch_embed_{stream}").proj(x).flatten(2).transpose(1, 2)
            x = x + getattr(self, f"pos_embed_{stream}") + getattr(self, f"modality_{stream}")
            for block in getattr(self, f"blocks_{stream}"):
                x = block(x)
            streams.append(x)
        x = torch.cat(streams, dim=1)
        for block in self.blocks_u:
            x = block(x)
        return self.norm(x)


@reference
def cav_mae() -> Made:
    config = dict(
        model_type="cav_mae", hidden_size=24, intermediate_size=48, num_attention_heads=2, layer_norm_eps=1e-5,
        modality_specific_depth=2, joint_depth=1, patch_size=8, image_size=16, audio_length=32, num_mel_bins=16,
        audio_mean=-5.081, audio_std=4.4849,
    )  # fmt: skip
    model = CavMae(config).eval()
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    fill(model, shapes)
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=32, do_normalize=False)
    seconds, video = np.float64(0.32), pixels(2, 1, 16, 16, 3)
    mel = features(extractor, waves(seconds))["input_values"]
    sound = torch.tensor((mel - config["audio_mean"]) / config["audio_std"], dtype=torch.float32)
    with torch.no_grad():
        fused = model(sound, normalised(video, *IMAGENET)[:, 0])
    outputs = dict(mel=mel, sound=fused[:, :8], picture=fused[:, 8:])
    named = {f"module.{name}": shape for name, shape in shapes.items()}
    return Made(config, "module.", named, {}, dict(video=video, seconds=seconds), numpy_of(outputs))


def fill(model, shapes: dict) -> None:
    """Gives a module the drawn weights, by the names of its state."""
    state = {name: torch.from_numpy(value) for name, value in draw(shapes).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not set(missing) & {name for name, _ in model.named_parameters()}


# Sound


def features(extractor, audio: np.ndarray, **options) -> dict:
    told = extractor(list(audio), sampling_rate=RATE, **options)
    return {key: np.stack(value) for key, value in told.items()}


AST = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=80, patch_size=16, num_mel_bins=36,
    max_length=64, frequency_stride=10, time_stride=8,
)  # fmt: skip


def ast_run(model, inputs):
    values = features(transformers.ASTFeatureExtractor(num_mel_bins=36, max_length=64), waves(inputs["seconds"]))
    values = torch.tensor(values["input_values"])
    base = getattr(model, "audio_spectrogram_transformer", model)
    x = base(values.to(model.dtype)).last_hidden_state
    # Theirs has frequency before time.
    tokens = torch.cat([x[:, :2], x[:, 2:].unflatten(1, (3, 7)).transpose(1, 2).flatten(1, 2)], dim=1)
    return dict(values=values, tokens=tokens)


for _name, _cls, _bias, _seconds in (
    ("ast_padded", transformers.ASTModel, False, 0.5),
    ("ast_cut", transformers.ASTForAudioClassification, True, 0.75),
):
    publish(
        _name, _cls, transformers.ASTConfig(**AST, qkv_bias=_bias), dict(seconds=np.float64(_seconds)), ast_run,
        "audio_spectrogram_transformer.",
        again=(transformers.ASTModel, {}),
    )  # fmt: skip

WHISPER = dict(
    d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=80, decoder_ffn_dim=64, vocab_size=50, num_mel_bins=24, max_source_positions=50,
    max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip


def whisper_run(model, inputs):
    extractor = transformers.WhisperFeatureExtractor(feature_size=24, chunk_length=1)
    values = torch.tensor(features(extractor, waves(inputs["seconds"]))["input_features"])
    base = getattr(model, "model", model).encoder
    return dict(values=values.transpose(1, 2), tokens=base(values.to(model.dtype)).last_hidden_state)


for _name, _cls, _seconds in (
    ("whisper_padded", transformers.WhisperModel, 0.7),
    ("whisper_whole", transformers.WhisperForConditionalGeneration, 1.0),
):
    publish(
        _name, _cls, transformers.WhisperConfig(**WHISPER), dict(seconds=np.float64(_seconds)), whisper_run, "model.",
        again=(transformers.WhisperModel, {}), absent="decoder.",
    )  # fmt: skip


@reference
def kaldi() -> Made:
    """AST's filterbank of a clip, the same padded, and of a longer one cut."""
    cases = dict(clip=(0.4, 38), padded=(0.4, 60), cut=(0.73, 60))
    outputs = {}
    for name, (seconds, frames) in cases.items():
        make = transformers.ASTFeatureExtractor
        plain = features(make(max_length=frames, do_normalize=False), sounds(seconds))["input_values"]
        extractor = make(max_length=frames)
        normal = features(extractor, sounds(seconds))["input_values"]
        # So the standardised values need no place of their own.
        np.testing.assert_allclose((plain - extractor.mean) / (2 * extractor.std), normal, atol=1e-6)
        outputs |= {name: plain, f"{name}/mean": np.float64(extractor.mean), f"{name}/std": np.float64(extractor.std)}
    inputs = {name: np.float64(seconds) for name, (seconds, _) in cases.items()}
    return Made(inputs=inputs, outputs=outputs)


@reference
def whisper_spectrogram() -> Made:
    """Whisper's spectrogram, padded, whole and cut: in float64, and how far its float32 code is from that; and alone."""
    cases, outputs = dict(padded=0.36, whole=0.5, cut=0.75), {}
    for bins in (80, 128):
        extractor = transformers.WhisperFeatureExtractor(feature_size=bins, chunk_length=1)
        extractor.n_samples, extractor.nb_max_frames = RATE // 2, 50  # half a second
        for name, seconds in cases.items():
            audio = sounds(seconds)
            long = np.zeros((4, RATE // 2), np.float32)
            long[:, : audio.shape[1]] = audio[:, : RATE // 2]
            exact = extractor._np_extract_fbank_features(long, "cpu")
            told = features(extractor, audio)["input_features"]
            outputs[f"{bins}/{name}"] = np.float32(exact).transpose(0, 2, 1)
            outputs[f"{bins}/{name}/rounding"] = np.float64(np.abs(told - exact).max())
        told = features(extractor, sounds(cases["padded"]), padding="longest")["input_features"]
        outputs[f"{bins}/alone"] = told.transpose(0, 2, 1)
    return Made(inputs={name: np.float64(seconds) for name, seconds in cases.items()}, outputs=outputs)


@reference
def strided_convolution() -> Made:
    """A convolution whose windows overlap, over a spectrogram."""
    mel = uniform("mel", 2, 24, 20).astype(np.float32)
    kernel = uniform("kernel", 7, 6, 8).astype(np.float32)
    result = torch.nn.functional.conv2d(
        torch.from_numpy(mel)[:, None], torch.from_numpy(kernel)[:, None], stride=(4, 5)
    )
    return Made(inputs=dict(mel=mel, kernel=kernel), outputs=numpy_of(dict(values=result.permute(0, 2, 3, 1))))


@reference
def two_convolutions() -> Made:
    """Whisper's stem, and its gradients of a sum of the tokens, weighted."""
    shapes = dict(zip(("0.weight", "0.bias", "1.weight", "1.bias"), ([32, 10, 3], [32], [32, 32, 3], [32])))
    convolutions = torch.nn.ModuleList(
        [torch.nn.Conv1d(10, 32, 3, padding=1), torch.nn.Conv1d(32, 32, 3, stride=2, padding=1)]
    )
    fill(convolutions, shapes)
    mel, cotangent = (
        uniform(key, *shape).astype(np.float32) for key, shape in (("mel", (2, 20, 10)), ("out", (2, 10, 32)))
    )
    x = torch.from_numpy(mel).transpose(1, 2)
    for convolution in convolutions:
        x = torch.nn.functional.gelu(convolution(x))
    tokens = x.transpose(1, 2)
    (tokens * torch.from_numpy(cotangent)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in convolutions.named_parameters()}
    inputs = dict(mel=mel, cotangent=cotangent)
    return Made({}, "", shapes, {}, inputs, numpy_of(dict(tokens=tokens)), numpy_of(gradients))


def encoder_of(model, run: Callable, inputs: dict, config) -> Made:
    """A module by the names of its own state, all of it drawn."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    fill(model.eval(), shapes)
    with torch.no_grad():
        outputs = numpy_of(run(model))
    return Made(whole(config), "", shapes, {}, inputs, outputs)


@reference
def ast_encoder() -> Made:
    config = transformers.ASTConfig(
        num_mel_bins=32, max_length=64, frequency_stride=10, time_stride=10, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128,
    )  # fmt: skip
    extractor, cases = transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=64), dict(padded=0.5, cut=0.9)

    def run(model):
        values = {name: features(extractor, sounds(seconds))["input_values"] for name, seconds in cases.items()}
        return {name: model(torch.tensor(value)).last_hidden_state for name, value in values.items()}

    return encoder_of(transformers.ASTModel(config), run, {k: np.float64(v) for k, v in cases.items()}, config)


@reference
def whisper_encoder() -> Made:
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=32, num_mel_bins=20, max_source_positions=50, vocab_size=60,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    extractor = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=1)
    cases = dict(padded=0.5, cut=1.2)

    def run(model):
        values = {name: features(extractor, sounds(seconds))["input_features"] for name, seconds in cases.items()}
        return {name: model(torch.tensor(value)).last_hidden_state for name, value in values.items()}

    inputs = {name: np.float64(seconds) for name, seconds in cases.items()}
    return encoder_of(transformers.WhisperModel(config).encoder, run, inputs, config)


# Encoders of video alone


def between(video: np.ndarray) -> torch.Tensor:
    """The pixels that our encoders see, −1 … 1, [B T C H W]."""
    return torch.from_numpy(video.astype(np.float32).transpose(0, 1, 4, 2, 3) / 127.5 - 1)


@reference
def timesformer_encoder() -> Made:
    config = transformers.TimesformerConfig(
        image_size=12, patch_size=4, num_frames=3, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, attention_type="divided_space_time",
    )  # fmt: skip
    video = pixels(2, 3, 12, 12, 3)

    def run(model):
        return dict(tokens=by_frame(model(between(video)).last_hidden_state, 9, 3))

    return encoder_of(transformers.TimesformerModel(config), run, dict(video=video), config)


@reference
def vjepa2_encoder() -> Made:
    from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Encoder

    config = transformers.VJEPA2Config(
        crop_size=12, patch_size=4, frames_per_clip=4, tubelet_size=2, hidden_size=28, num_attention_heads=2,
        num_hidden_layers=2, mlp_ratio=2.0, attn_implementation="eager",
    )  # fmt: skip
    video = pixels(2, 4, 12, 12, 3)

    def run(model):
        return dict(tokens=model(between(video)).last_hidden_state)

    return encoder_of(VJEPA2Encoder(config), run, dict(video=video), config)


# Images and text

LAYERS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=80)
IMAGE = dict(**LAYERS, image_size=24, patch_size=8)
TEXT = dict(**LAYERS, vocab_size=60, max_position_embeddings=12)


def ids() -> np.ndarray:
    return below("ids", 3, 58, 2, 12).astype(np.int32)


def bert_run(model, inputs):
    text = torch.tensor(inputs["text"].astype(np.int64))
    return dict(tokens=getattr(model, "bert", model)(text, attention_mask=text != 0).last_hidden_state)


_words = ids()
_words[0, 9:] = 0
for _name, _cls in (("bert", transformers.BertModel), ("bert_masked", transformers.BertForMaskedLM)):
    publish(
        _name, _cls, transformers.BertConfig(**TEXT), dict(text=_words), bert_run, "bert.",
        again=(transformers.BertModel, dict(add_pooling_layer=False)),
    )  # fmt: skip


def image_of(mean, deviation):
    """Returns what gives [B 3 H W] of a model's inputs."""
    return lambda model, inputs: normalised(inputs["video"], mean, deviation)[:, 0].to(model.dtype)


def vit_run(model, inputs):
    x = image_of(*HALF)(model, inputs)
    tokens = getattr(model, "vit", model)(x).last_hidden_state
    return dict(tokens=tokens) | (dict(logits=model(x).logits) if hasattr(model, "classifier") else {})


_picture = dict(video=pixels(2, 1, 24, 24, 3))
for _name, _bias in (("vit", True), ("vit_plain", False)):
    publish(
        _name, transformers.ViTModel, transformers.ViTConfig(**IMAGE, qkv_bias=_bias), _picture, vit_run, "vit.",
        dict(add_pooling_layer=_bias), (transformers.ViTModel, dict(add_pooling_layer=False)),
    )  # fmt: skip
publish(
    "vit_classifier", transformers.ViTForImageClassification, transformers.ViTConfig(**IMAGE, num_labels=5), _picture,
    vit_run, "vit.",
)  # fmt: skip


def vit_mae_tokens(model, inputs):
    noise = torch.tensor(np.tile(np.arange(9.0), (2, 1)))  # no shuffling
    return dict(tokens=model(image_of(*IMAGENET)(model, inputs), noise=noise).last_hidden_state)


for _name, _bias in (("vit_mae_encoder", True), ("vit_mae_encoder_plain", False)):
    publish(
        _name, transformers.ViTMAEModel, transformers.ViTMAEConfig(**IMAGE, qkv_bias=_bias, mask_ratio=0.0), _picture,
        vit_mae_tokens, "vit.", again=(transformers.ViTMAEModel, dict(mask_ratio=0.0)),
    )  # fmt: skip


def vit_mae_run(model, inputs):
    order = np.concatenate([inputs["keep"], inputs["hidden"]], axis=1)
    said = model(image_of(*IMAGENET)(model, inputs), noise=torch.tensor(np.argsort(order, axis=1).astype(np.float64)))
    predicted = [row[place] for row, place in zip(said.logits, torch.tensor(inputs["hidden"]))]
    return dict(predicted=torch.stack(predicted), loss=said.loss)


_order = orders("vit_mae", 2, 9)
publish(
    "vit_mae", transformers.ViTMAEForPreTraining,
    transformers.ViTMAEConfig(
        **LAYERS, image_size=48, patch_size=16, decoder_hidden_size=16, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2, decoder_intermediate_size=40, norm_pix_loss=True, mask_ratio=0.67,
    ),
    dict(video=pixels(2, 1, 48, 48, 3), keep=_order[:, :2], hidden=_order[:, 2:]), vit_mae_run, "vit.",
)  # fmt: skip


def contrast_run(mean, deviation):
    def run(model, inputs):
        text = torch.tensor(inputs["text"].astype(np.int64))
        said = model(text, image_of(mean, deviation)(model, inputs), return_loss=True)
        return dict(images=said.image_embeds, text=said.text_embeds, logits=said.logits_per_text, loss=said.loss)

    return run


def ended(last: int) -> np.ndarray:
    """Ids that end with `last`, the first of them before the end of the row."""
    text = ids()
    text[0, 7:], text[1, 11] = last, last
    text[0, 9:] = 0  # whatever is after the end
    return text


# Files of the first years say that texts end with 2, and mean their largest id.
for _name, _end, _act in (("clip", 58, "quick_gelu"), ("clip_first", 2, "gelu")):
    publish(
        _name, transformers.CLIPModel,
        transformers.CLIPConfig(
            text_config=dict(**TEXT, eos_token_id=_end, bos_token_id=1, hidden_act=_act),
            vision_config=IMAGE | dict(hidden_size=48), projection_dim=24,
        ),
        _picture | dict(text=ended(59 if _end == 2 else _end)), contrast_run(*CLIP),
    )  # fmt: skip
_words = ids()
_words[0, 7:] = 1  # padding is a token
publish(
    "siglip", transformers.SiglipModel,
    transformers.SiglipConfig(
        text_config=TEXT | dict(hidden_size=24, intermediate_size=40, projection_size=32),
        vision_config=IMAGE | dict(image_size=26),  # three patches of 8, and two pixels that no patch has
    ),
    dict(video=pixels(2, 1, 26, 26, 3), text=_words), contrast_run(*HALF),
)  # fmt: skip

# Encoders of text alone

V, L, END = 30, 9, 29
SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=V)


def words(padding: int, end: int | None = None) -> np.ndarray:
    """Three texts: of full length, short, and of one word."""
    result = below("words", 3, END, 3, L)
    for row, length in zip(result, (L, 5, 3)):
        row[length:] = padding
        if end is not None:
            row[length - 1] = end
    return result.astype(np.int32)


@reference
def bert_encoder() -> Made:
    config, given = transformers.BertConfig(**SHAPE, max_position_embeddings=12), words(0)

    def run(model):
        mask = torch.from_numpy((given != 0).astype(int))
        return dict(tokens=model(torch.from_numpy(given), attention_mask=mask).last_hidden_state)

    return encoder_of(transformers.BertModel(config, add_pooling_layer=False), run, dict(text=given), config)


@reference
def clip_encoder() -> Made:
    special = dict(bos_token_id=2, eos_token_id=END, pad_token_id=END)
    config, given = transformers.CLIPTextConfig(**SHAPE, max_position_embeddings=12, **special), words(END, END)

    def run(model):
        told = model(torch.from_numpy(given))
        return dict(tokens=told.last_hidden_state, pooled=told.pooler_output)

    return encoder_of(transformers.CLIPTextModel(config), run, dict(text=given), config)


@reference
def siglip_encoder() -> Made:
    special = dict(bos_token_id=2, eos_token_id=1, pad_token_id=1)
    config, given = transformers.SiglipTextConfig(**SHAPE, max_position_embeddings=L, **special), words(1, 1)

    def run(model):
        told = model(torch.from_numpy(given))
        return dict(tokens=told.last_hidden_state, pooled=told.pooler_output)

    return encoder_of(transformers.SiglipTextModel(config), run, dict(text=given), config)


# Tokenizers as they are published, and what transformers makes of texts with them.


def tokenizer_bert() -> tuple:
    """Padded and cut at a fixed length, as sentence-transformers saves it."""
    from tokenizers import Tokenizer

    from vmm.data import text

    tokenizer = Tokenizer.from_str(text.train_tokenizer(CAPTIONS, 120, "wordpiece").to_str())
    tokenizer.enable_padding(length=16, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(max_length=16)
    return tokenizer, "[PAD]", None


def tokenizer_clip() -> tuple:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (start, end)])
    first, last = tokenizer.token_to_id(start), tokenizer.token_to_id(end)
    tokenizer.post_processor = processors.RobertaProcessing((end, last), (start, first), add_prefix_space=False)
    return tokenizer, end, None


def tokenizer_siglip() -> tuple:
    """A SentencePiece with a <pad> that is not what it pads with."""
    from tokenizers import Tokenizer, processors

    from vmm.data import text

    tokenizer = Tokenizer.from_str(text.train_tokenizer(CAPTIONS, 120, "unigram").to_str())
    tokenizer.no_padding()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    return tokenizer, "</s>", {"pad_token": {"content": "</s>"}}


def tokenizer_made(make: Callable) -> Made:
    from tokenizers import Tokenizer

    tokenizer, pad, beside = make()
    # Among equals, training chooses at random: what was trained once stays, until its file is deleted.
    path = HERE / f"{make.__name__}.json"
    if path.is_file():
        tokenizer = Tokenizer.from_str(json.dumps(json.loads(path.read_text())["config"]["tokenizer"]))
    captions = [*CAPTIONS[::20], "", "a star"]
    config = dict(tokenizer=json.loads(tokenizer.to_str()), tokenizer_config=beside, captions=captions)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", pad_token=pad)
    outputs = {"padding": np.int32(tokenizer.token_to_id(pad))}
    for length in (6, 16, 50):
        told = theirs(captions, padding="max_length", truncation=True, max_length=length)["input_ids"]
        outputs[f"{length}"] = np.asarray(told, np.int32)
    return Made(config, outputs=outputs)


for _make in (tokenizer_bert, tokenizer_clip, tokenizer_siglip):
    MAKERS[_make.__name__] = lambda make=_make: tokenizer_made(make)


@reference
def defaults() -> Made:
    """Family → its configuration, every setting at its default."""
    t = transformers
    configs = {
        "audio-spectrogram-transformer": t.ASTConfig, "bert": t.BertConfig, "clip": t.CLIPConfig,
        "siglip": t.SiglipConfig, "timesformer": t.TimesformerConfig, "vit": t.ViTConfig, "vit_mae": t.ViTMAEConfig,
        "vivit": t.VivitConfig, "vjepa2": t.VJEPA2Config, "whisper": t.WhisperConfig,
    }  # fmt: skip
    return Made({family: whole(config()) for family, config in configs.items()})


def write(name: str, made: Made) -> None:
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    head = [
        f' "made_with": {json.dumps(versions)}',
        f' "class": {json.dumps(made.cls)}',
        f' "config": {json.dumps(made.config)}',
    ]
    shapes = ",\n".join(f"  {json.dumps(key)}: {json.dumps(shape)}" for key, shape in made.shapes.items())
    tail = [f' "prefix": {json.dumps(made.prefix)}', f' "tensors": {{\n{shapes}\n }}' if shapes else ' "tensors": {}']
    (HERE / f"{name}.json").write_text("{\n" + ",\n".join(head + tail) + "\n}\n")
    groups = dict(input=made.inputs, output=made.outputs, gradient=made.gradients, tensor=made.stored)
    arrays = {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}
    path = HERE / f"{name}.npz"
    path.unlink(missing_ok=True)
    if arrays:
        np.savez_compressed(path, **arrays)


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(MAKERS))
    if unknown:
        sys.exit(f"no reference {unknown[0]!r}; known: {', '.join(sorted(MAKERS))}")
    for name in names or MAKERS:
        print(name)
        write(name, MAKERS[name]())


if __name__ == "__main__":
    main(sys.argv[1:])
