"""vmm publish: a run → a folder in the layout of the Hugging Face Hub; vmm.load: that folder → a model."""

import json
import math
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

import vmm
from vmm.build import write_text
from vmm.data import media, text
from vmm.data.reading.sound import filled_up
from vmm.errors import StorageError, UserError
from vmm.experiment import Experiment
from vmm.model import Recipe
from vmm.plugins import modules
from vmm.publishing import example
from vmm.publishing.card import model_card
from vmm.publishing.check import embed_as
from vmm.run import Run, from_where, open_run, weights
from vmm.source import FORMAT, asked_of, base_tensors, experiment_of, fingerprint, open_source
from vmm.told import note_own, tell
from vmm.weights import parameter_tree, save_params

FILES = ("model.safetensors", "config.json", "tokenizer.json", "README.md", example.CLIP, example.RECORD)
_CHUNK = 64  # clips embedded at a time
_CHANNELS = 8  # of sound, at most
_LOUDEST = 2.0  # resampling goes a little beyond 1; integers of 16 bits go to 32768


def publish(workdir: str | Path, folder: str | Path, push: str | None = None, adapters: bool = False) -> Path:
    """Writes model.safetensors, config.json, tokenizer.json, README.md (the model card), and the card's example.

    example.mp4 is what the card's example embeds, example.safetensors what that gave: see publishing/check.py. What a
    run's adapters make of its base is written, as a model that has no adapters.

    Args:
      workdir: of a run. folder: where to write; made whole or not at all.
      push: repository id on the Hub to upload to ("owner/name"), None: do not.
      adapters: write adapters.safetensors instead of the model: the parameters that are not, to the bit, those of
        `init_from`: adapters, heads, and what else was trained. vmm.load puts them on that base again.

    Raises:
      UserError: no run, adapters without a base, or the upload was refused. StorageError: the folder cannot be written.
    """
    run = open_run(workdir)
    folder = Path(folder).absolute()  # "." has no name
    spells = "text" in run.experiment.modalities
    if spells and not Path(run.experiment.data.tokenizer).is_file():
        raise UserError(
            f"run {workdir}: its tokenizer {run.experiment.data.tokenizer} is not there{from_where(run.config)}"
        )
    params, config = weights(run.state), _published_config(run)
    files = tuple(name for name in FILES if spells or name != "tokenizer.json")
    if adapters:
        own, about = _adapters(run, folder)
        params, config, files = unflatten_dict(own, sep="."), config | about, ("adapters.safetensors", *files[1:])
    else:
        params = run.experiment.merged(jax.device_get(params))
    building = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        save_params(params, building / files[0], {"step": str(run.step)})
        write_text(building / "config.json", json.dumps(config, indent=2) + "\n")
        note_own(building / "config.json")
        if spells:  # saved, not copied: its padding may stand in another file beside it
            write_text(building / "tokenizer.json", text.load_tokenizer(run.experiment.data.tokenizer).to_str(True))
        write_text(building / "README.md", str(model_card(run, adapters)))
        example.write_clip(building / example.CLIP, run.experiment.clip)
        example.write_record(
            building,
            _example(building, run, adapters),
            tuple(name for name in files if name not in ("README.md", example.RECORD)),
        )
        # Only our own files are replaced: a folder may be a clone with a history.
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            (building / name).replace(folder / name)
        building.rmdir()
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror}: {error.filename})") from None
    if push:
        upload(folder, push)
    return folder


def upload(folder: Path, name: str) -> None:
    """Uploads what `publish` wrote into a folder to a repository of the Hub ("owner/name"); raises UserError: refused."""
    files = (*example.read_record(folder)[1], "README.md", example.RECORD)
    try:
        api = HfApi(library_name="vmm", library_version=vmm.__version__)
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(files))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"push {name}: refused ({line}); log in with `hf auth login`; {folder} is whole") from None


def _example(folder: Path, run: Run, adapters: bool) -> dict[str, np.ndarray]:
    """Returns what the card's example gives. On a CPU, as in publishing/check.py: the same numbers anywhere."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS left it out
        base = example.absolute(run.experiment.config.init_from) if adapters else None
        card = folder / "README.md"
        return embed_as(folder, example.asked_of(card.read_text(encoding="utf-8"), base, card))
    given = example.inputs(run.experiment.modalities)
    given = {name: str(folder / value) if value == example.CLIP else value for name, value in given.items()}
    with jax.default_device(cpu):
        return load_published(folder, plugins=modules((run.config["trunk"], run.config["objectives"]))).embed(**given)


def _published_config(run: Run) -> dict:
    c = run.config
    return {
        "library_name": "vmm",
        "format": FORMAT,
        "version": vmm.__version__,
        "step": run.step,
        "model": {key: c[key] for key in ("trunk", "views", "objectives", "balance") if key in c},
        "clip": c["data"].get("clip", {}),
        "labels": c["data"].get("labels", {}),
        **asked_of(c["data"]),
    }


def _adapters(run: Run, folder: Path) -> tuple[dict, dict]:
    """Returns the parameters of a run that its base has not, path with dots → array, and what `folder` says of them."""
    base = run.experiment.config.init_from
    if not base:
        raise UserError(f"publish --adapters: {run.workdir} has no init_from, so there is no base to put adapters on")
    under = base_tensors(base, run.experiment)
    ours = {name: np.asarray(x) for name, x in flatten_dict(jax.device_get(weights(run.state)), sep=".").items()}
    own = {name: x for name, x in ours.items() if name not in under or x.tobytes() != under[name].tobytes()}
    under = {name: x for name, x in under.items() if name not in own}
    return own, {"base": tell(base, folder), "base_sha256": fingerprint(under), "adapt": run.experiment.config.adapt}


def load_published(
    source: str | Path, base: str | Mapping[str, str] | None = None, plugins: Collection[str] = ()
) -> "Model":
    """Returns the model of a folder or Hub repository, ours or of a known family; see vmm.load."""
    opened = open_source(source, base, plugins)
    experiment = experiment_of(opened)
    return Model(experiment, parameter_tree(opened.tensors, nn.unbox(experiment.shapes), source))


class Model:
    """A published model. recipe, params: the Linen module and its parameters, for use in other code."""

    def __init__(self, experiment: Experiment, params):
        self.experiment: Experiment = experiment
        self.recipe: Recipe = experiment.recipe
        self.params = params
        takes_text = "text" in experiment.modalities and experiment.data.tokenizer
        self.tokenizer = text.load_tokenizer(experiment.data.tokenizer) if takes_text else None
        self._embed = jax.jit(lambda params, inputs: self.recipe.apply({"params": params}, inputs, method="embed"))

    def embed(self, video=None, audio=None, text=None) -> dict[str, np.ndarray]:
        """Returns modality → embeddings, for what is given.

        With a contrastive objective these are its unit vectors [n E], comparable across modalities
        by their dot product; else the encoder's mean tokens [n D].

        Args:
          video: paths of media files (their middle window is taken), or uint8 arrays [T H W 3].
          audio: paths of media files, or float arrays [S] in [-1, 1] at the clip's sample rate; of [S, channels] and
            [channels, S] (at most 8 channels) the mean is taken.
          text: strings. Each may be one or a list; lists given together must be of one length.

        Raises:
          UserError: a file cannot be decoded, an array has another shape or values, or the model lacks the modality.
        """
        given = {"video": video, "audio": audio, "text": text}
        given = {name: _as_list(value) for name, value in given.items() if value is not None}
        lacking = set(given) - set(self.experiment.config.trunk["encoders"])
        if not given or lacking:
            raise UserError(
                f"embed: the model takes {sorted(self.experiment.config.trunk['encoders'])}, got {sorted(given)}"
            )
        lengths = {name: len(value) for name, value in given.items()}
        if len(set(lengths.values())) != 1 or not all(lengths.values()):
            raise UserError(f"embed: lists given together must be of one length, got {lengths}")
        return self._rows(given, len(next(iter(given.values()))))

    def _rows(self, given: Mapping[str, list], count: int) -> dict[str, np.ndarray]:
        # Full chunks and one power of two: few shapes, so few compilations, whatever the count.
        results = []
        for start in range(0, count, _CHUNK):
            size = min(_CHUNK, count - start)
            padded = 1 << (size - 1).bit_length()
            inputs = {}
            for name, values in given.items():
                rows = np.stack([getattr(self, f"_{name}")(value) for value in values[start : start + size]])
                inputs[name] = np.pad(rows, ((0, padded - size), *((0, 0),) * (rows.ndim - 1)))
            values = jax.device_get(self._embed(self.params, inputs))
            results.append({name: np.asarray(value[:size], np.float32) for name, value in values.items()})
        return {name: np.concatenate([result[name] for result in results]) for name in given}

    def _decode(self, path, want: str) -> np.ndarray:
        clip = self.experiment.clip
        try:
            decoded = media.decode(
                path,
                pick=lambda length: max(0.0, ((length or 0.0) - clip.seconds) / 2),
                seconds=clip.seconds,
                frames=clip.frames,
                size=clip.size,
                sample_rate=clip.sample_rate,
                crop=media.Crop(share=clip.crop),
                want=(want,),
            )
        except media.DecodeError as error:
            raise UserError(f"{path}: cannot be decoded ({error})") from None
        if getattr(decoded, want) is None:
            raise UserError(f"{path}: has no {want}")
        return getattr(decoded, want)

    def _video(self, value) -> np.ndarray:
        if isinstance(value, (str, Path)):
            return self._decode(value, "video")
        array, clip = np.asarray(value), self.experiment.clip
        expected = (clip.frames, clip.size, clip.size, 3)
        if array.dtype != np.uint8 or array.shape != expected:
            raise UserError(f"embed: a video array must be uint8 {expected}, got {array.dtype} {array.shape}")
        return array

    def _audio(self, value) -> np.ndarray:
        if isinstance(value, (str, Path)):
            return self._decode(value, "audio")
        array, samples = np.asarray(value), self.experiment.clip.samples
        if array.ndim == 2 and min(array.shape) <= _CHANNELS < max(array.shape):
            array = array.mean(int(np.argmin(array.shape)))
        if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.floating):
            raise UserError(f"embed: an audio array must be float [S] in [-1, 1], got {array.dtype} {array.shape}")
        largest = float(np.abs(array).max())
        if not largest <= _LOUDEST:  # also where it is not a number
            raise UserError(
                f"embed: an audio array must be in [-1, 1], got values up to {largest:g}; divide integers of 16 bits by 32768"
                if math.isfinite(largest)
                else "embed: an audio array must be in [-1, 1], and holds values that are not finite"
            )
        return filled_up(array.astype(np.float32), samples)

    def _text(self, value) -> np.ndarray:
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"embed: text must be a string that is not empty, got {value!r}")
        if self.tokenizer is None:
            raise UserError("embed: the model was published without a tokenizer.json; put its own beside config.json")
        return text.encode(self.tokenizer, value, self.experiment.clip.text_length)


def _as_list(value) -> list:
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.shape[0] <= _CHANNELS < value.shape[1]:
        rows = value.shape[0]
        if rows > 1:
            raise UserError(
                f"embed: an array {list(value.shape)} may be {rows} clips or {rows} channels; give list(array) for clips, "
                "[array] for channels, whose mean is then taken"
            )
    several = isinstance(value, np.ndarray) and value.ndim == 5  # videos
    waves = isinstance(value, np.ndarray) and value.ndim == 2 and value.shape[1] > _CHANNELS
    return list(value) if several or waves else [value]
