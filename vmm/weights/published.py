"""Folders of published models, read and written: config.json beside safetensors, in the layout of a family."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vmm.build import write_text
from vmm.errors import UserError
from vmm.foreign import parse_json
from vmm.sizes import check_claims
from vmm.weights.families import FAMILIES, videoprism
from vmm.weights.layout import beyond, load, save
from vmm.weights.tensors import load_tensors, save_arrays

_PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")


class Imported(NamedTuple):
    """A published model as ours.

    family: its name. model: {"trunk", "views", "objectives", "clip"}, as in a config, and "labels", "classes" of a classifier. tensors: parameter path with
    dots → float32. left: names of theirs that nothing of ours is made of. tokenizer: its tokenizer.json, or None.
    """

    family: str
    model: dict
    tensors: dict
    left: list
    tokenizer: Path | None


def read_config(folder: Path) -> dict:
    """Reads a folder's config.json. Raises UserError: there is none, or it is not JSON of an object."""
    path = folder / "config.json"
    try:
        config = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError:
        raise UserError(
            f"{folder}: holds no model published by vmm or in a known family's layout (no config.json)"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold an object, got {type(config).__name__}")
    return config


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Reads model.safetensors, the files that model.safetensors.index.json lists, or one .npz.

    Raises:
      UserError: none of them is there, or one is broken. Pickles (.bin, .pt) are never read.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    arrays = sorted(folder.glob("*.npz"))
    try:
        if single.is_file():
            files = [single]
        elif index.is_file():
            files = _listed(folder, parse_json(index.read_text(encoding="utf-8-sig")))
        elif len(arrays) == 1:
            with np.load(arrays[0], allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        else:
            pickles = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
            hint = (
                f" ({pickles[0]} is a pickle, which can run code: convert it to safetensors first)" if pickles else ""
            )
            raise UserError(f"{folder}: holds no model.safetensors{hint}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: weights cannot be read ({error})") from None
    tensors = {}
    for file in files:
        tensors |= load_tensors(file)
    return tensors


def _listed(folder: Path, index: Mapping) -> list[Path]:
    """Returns the files of an index; raises UserError: it is none, or names a file that does not lie in the folder."""
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{folder}/model.safetensors.index.json: weight_map must be tensor → file name")
    for name in places.values():
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise UserError(f"{folder}/model.safetensors.index.json: {name!r} is no name of a file in its folder")
    return [folder / name for name in sorted(set(places.values()))]


def read_processor(path: Path) -> tuple[dict, dict]:
    """Returns what an image or video processor's file says: (fields of the video encoder, fields of the clip).

    Such a processor gives (p · rescale_factor − offset − image_mean) / image_std of a pixel p: mean and deviation of ours,
    in pixel values 0 … 255. It brings the shorter side to `size` and cuts `crop_size` out of the middle, or squeezes the
    whole picture into a square: `crop`. What the file does not say is in neither.

    Raises:
      UserError: the file is not of a processor, or its pictures are not square.
    """
    try:
        told = parse_json(path.read_text(encoding="utf-8-sig"))
        clip = _geometry(told)
        if "image_mean" not in told or not told.get("do_normalize", True):
            return {}, clip
        factor = told.get("rescale_factor")
        scale = float(1 / 255 if factor is None else factor) if told.get("do_rescale", True) else 1.0
        shift = 1.0 if told.get("offset") else 0.0
        mean = tuple((float(value) + shift) / scale for value in told["image_mean"])
        deviation = tuple(float(value) / scale for value in told["image_std"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not an image processor's file ({error!r})") from None
    if len(mean) != 3 or len(deviation) != 3 or 0 in deviation:
        raise UserError(f"{path}: image_mean and image_std must be three numbers each, image_std none of them 0")
    return {"mean": mean, "deviation": deviation}, clip


def _geometry(told: Mapping) -> dict:
    """Returns {"crop": share} of a processor's file, {} where it does not resize."""
    size, cut = told.get("size"), told.get("crop_size")
    if not size or not told.get("do_resize", True):
        return {}
    cuts = told.get("do_center_crop", bool(cut)) and bool(cut)
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else size if cuts else None
    if edge is None:  # height and width, or one number of old files without a cut
        return {"crop": 0.0}
    cut = (cut.get("height") if isinstance(cut, Mapping) else cut) if cuts else edge
    return {"crop": min(1.0, float(cut) / float(edge))}


def write_processor(folder: Path, family: str, encoder: Mapping, clip: Mapping) -> None:
    """Writes the file that read_processor reads, for a family that has one; nothing for a model that does not see."""
    known = vars(FAMILIES[family]).get("PROCESSOR")
    if known is None or "mean" not in encoder:
        return
    size, crop = clip["size"], clip.get("crop", 1.0)
    scale, shift = known.get("rescale_factor", 1 / 255), 1.0 if known.get("offset") else 0.0
    square = {"height": size, "width": size}
    geometry = {"size": square, "do_center_crop": False}
    if crop:
        geometry = {"size": {"shortest_edge": round(size / crop)}, "do_center_crop": True, "crop_size": square}
    pixels = {
        "do_resize": True,
        **geometry,
        "do_rescale": True,
        "rescale_factor": scale,
        "do_normalize": True,
        "image_mean": [value * scale - shift for value in encoder["mean"]],
        "image_std": [value * scale for value in encoder["deviation"]],
        **known,
    }
    write_text(folder / _PROCESSORS["video_processor_type" in known], json.dumps(pixels, indent=2) + "\n")


_SIZE = re.compile(
    r"(^|_)(size|heads|layers|dim|frames|stride|bins|channels|depth|frames_per_clip|position_embeddings)$"
)


def check_sizes(config: Mapping, where: str) -> None:
    """Raises UserError: a size in a config.json, of a group in it too, that is no whole number of at least 1."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if key.endswith("_config"):
                check_sizes(value, f"{where}: {key}")
        elif _SIZE.search(key) and value is not None:
            least = 0 if key.endswith("layers") else 1  # Whisper's encoder may stand without its decoder
            for size in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(size, bool) or not isinstance(size, int) or size < least:
                    raise UserError(f"{where}: {key}: expected a whole number of at least {least}, got {value!r}")
        elif key.endswith(("_eps", "_ratio")) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{where}: {key}: expected a number, got {value!r}")


def read_published(folder: str | Path) -> Imported:
    """Reads a folder in a family's layout as a model of ours.

    Raises:
      UserError: the folder is not whole, its family is not known, or its tensors do not fit its config.
    """
    folder = Path(folder)
    theirs = None
    if not (folder / "config.json").is_file() and any(folder.glob("*.npz")):
        theirs = read_tensors(folder)
        config = videoprism.infer(theirs)  # the one family that is published so
    else:
        config = read_config(folder)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{folder / 'config.json'}: model_type {kind!r} is no family known here; known: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[kind]
    theirs = read_tensors(folder) if theirs is None else theirs
    if family.PREFIX and not any(name.startswith(family.PREFIX) for name in theirs):
        theirs = {family.PREFIX + name: value for name, value in theirs.items()}
    parts = family.parts(theirs)
    check_sizes(config, str(folder / "config.json"))
    try:
        model = family.describe(config, parts)
        check_claims(model, [value.shape for value in theirs.values()], (), str(folder / "config.json"))
        rules = family.rules(config, parts)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'}: has no {error}, which {kind} needs") from None
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{folder / 'config.json'}: is not the config of a {kind} model ({error})") from None
    for name in _PROCESSORS if "video" in model["trunk"]["encoders"] else ():
        if (folder / name).is_file():
            pixels, clip = read_processor(folder / name)
            model["trunk"]["encoders"]["video"] |= pixels
            model["clip"] |= clip
    tensors, left = load(rules, theirs)
    if more := beyond(rules, left):
        raise UserError(
            f"{folder / 'config.json'}: tells of fewer layers than the weights beside it have ({more} is left over)"
        )
    tokenizer = folder / "tokenizer.json"
    return Imported(kind, model, tensors, left, tokenizer if tokenizer.is_file() else None)


def write_published(folder: str | Path, family: str, model: Mapping, tensors: Mapping[str, np.ndarray]) -> dict:
    """Writes config.json and model.safetensors in a family's layout, for `from_pretrained`; returns the config.

    Args:
      model: {"trunk", "views", "objectives", "clip"} with every field given. tensors: parameter path → array.

    Raises:
      UserError: the model is not one that the family can describe, or has a parameter it has no place for.
    """
    folder, module = Path(folder), FAMILIES[family]
    try:
        config, parts = module.config(model)
    except (KeyError, TypeError) as error:
        raise UserError(f"export to {family}: the model is not of this family ({error!r})") from None
    theirs = save(module.rules(config, parts), tensors)
    folder.mkdir(parents=True, exist_ok=True)
    save_arrays(theirs, folder / "model.safetensors", {"format": "pt"})
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_processor(folder, family, model["trunk"]["encoders"].get("video", {}), model["clip"])
    return config
