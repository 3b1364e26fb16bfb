"""The example of a published folder: a small clip, the code of its card, and what that gave when it was published."""

import ast
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from vmm.data.samples import Clip
from vmm.errors import UserError
from vmm.foreign import parse_json
from vmm.weights.tensors import save_arrays

CLIP, RECORD = "example.mp4", "example.safetensors"
TEXT = "a bright square moves to the right over a rising tone"
BASE = "path/of/its/base"  # stands in the code of adapters for what only the reader knows
_FPS, _LARGEST = 12, 112
_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # of AAC


def write_clip(path: Path, clip: Clip) -> None:
    """Writes an mp4 that fills the model's window: a square that moves to the right, and a tone that rises.

    At most 112 × 112 pixels: a decoder scales it. The same clip always, on one version of the codecs the same bytes.
    """
    size = max(16, min(_LARGEST, clip.size) // 2 * 2)
    rate = clip.sample_rate if clip.sample_rate in _RATES else 16000
    frames = max(2, round(clip.seconds * _FPS))
    y, x = np.mgrid[:size, :size] / size
    time = np.arange(round(clip.seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * (220 * time + 110 * time**2 / clip.seconds)).astype(np.float32)
    with av.open(str(path), "w", format="mp4") as container:
        seen = container.add_stream("libx264", rate=_FPS)
        seen.width, seen.height, seen.pix_fmt, seen.thread_type = size, size, "yuv420p", "NONE"
        seen.options = {"preset": "veryfast", "crf": "23", "threads": "1"}
        heard = container.add_stream("aac", rate=rate, layout="mono", bit_rate=64000)
        for i in range(frames):
            inside = (np.abs(x - 0.2 - 0.6 * i / (frames - 1)) < 0.15) & (np.abs(y - 0.5) < 0.15)
            picture = np.stack([40 + 60 * x, 40 + 60 * y, np.full_like(x, 90)], -1)
            picture = np.where(inside[..., None], (250, 220, 40), picture).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, _FPS)
            container.mux(seen.encode(frame))
        container.mux(seen.encode(None))
        sound = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
        container.mux(heard.encode(sound))
        container.mux(heard.encode(None))


def inputs(modalities: tuple[str, ...]) -> dict[str, str]:
    """Returns modality → what the example gives of it, as it stands in the code."""
    return {name: TEXT if name == "text" else CLIP for name in sorted(modalities)}


def code(modalities: tuple[str, ...], adapters: bool = False, base: str = "", plugins: Sequence[str] = ()) -> str:
    """Returns the card's Python; it leaves its result in `embeddings`.

    base: the Hub's name of the adapters' base, or "". plugins: modules that the model's kinds name.
    """
    over = f', base="{base or BASE}"' if adapters else ""
    over += f", plugins={json.dumps(list(plugins))}" if plugins else ""
    return _code(inputs(modalities), over)


def _code(given: Mapping[str, str], over: str) -> str:
    given = ", ".join(f'{name}="{value}"' for name, value in given.items())
    return f'import vmm\n\nmodel = vmm.load("."{over})\nembeddings = model.embed({given})'


class Asked(NamedTuple):
    """What a card's example asks for. base: as of vmm.load. given: modality → text, or CLIP."""

    base: str | dict[str, str] | None
    given: dict[str, str]


def asked_of(card: str, base: str | Mapping[str, str] | None, where: Path) -> Asked:
    """Returns what the first Python of a card asks for, over another base where one is given.

    It is read as data, and none of it is run: the three lines of `code`, with other modalities, words or base at most.
    Modules that it names are not imported for it: VMM_PLUGINS says which may be.

    Raises:
      UserError: there is none, it is anything else, or a base is given and the example names none.
    """
    found = re.search(r"^```python\n(.*?)^```", card, re.S | re.M)
    if not found:
        raise UserError(f"{where}: has no example (a block of ```python)")
    try:
        load, embed = (line.value for line in ast.parse(found.group(1)).body[1:])
        over = {word.arg: ast.literal_eval(word.value) for word in load.keywords}
        given = {word.arg: ast.literal_eval(word.value) for word in embed.keywords}
        told, modules = over.get("base", ""), over.get("plugins")
        # Written anew from what was read, it must be the same program: nothing else stands in it.
        again = f', base="{told}"' if "base" in over else ""
        again += f", plugins={json.dumps(modules)}" if modules else ""
        again = _code(given, again)
        same = ast.dump(ast.parse(again)) == ast.dump(ast.parse(found.group(1)))
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        same = False
    if not same:
        raise UserError(
            f"{where}: its example is not the one that `vmm publish` writes (import vmm, load this folder, embed), and "
            "other code is not run; publish the folder again"
        )
    for name, value in given.items():
        if value != CLIP and name != "text":
            raise UserError(f"{where}: its example embeds {value!r}, which is not the folder's own {CLIP}")
    if base is not None and "base" not in over:
        raise UserError(f"{where}: its example names no base: the folder holds a whole model; leave --base out")
    return Asked(base if base is not None else told or None, given)


def absolute(base: str | Mapping[str, str] | None) -> str | dict[str, str] | None:
    """Returns a base for code that runs elsewhere: paths from here are made whole, names of the Hub stay."""
    if isinstance(base, Mapping):
        return {name: absolute(source) for name, source in base.items()}
    return str(Path(base).absolute()) if base is not None and Path(base).exists() else base


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(folder: Path, embeddings: Mapping[str, np.ndarray], names: tuple[str, ...]) -> None:
    """Writes what the example gave, and the SHA-256 of the folder's files. embeddings: modality → [1 E]."""
    digests = {name: sha256(folder / name) for name in names}
    values = {name: np.ascontiguousarray(value) for name, value in embeddings.items()}
    save_arrays(values, folder / RECORD, {"format": "np", "files": json.dumps(digests)})


def read_record(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns (modality → embeddings [1 E], file → SHA-256), as they were when the folder was published.

    Raises:
      UserError: there is no record, or it is broken.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UserError(f"{folder}: holds no {RECORD}, so there is nothing to compare with; publish it again")
    try:
        with safe_open(str(path), "np") as file:
            digests = parse_json((file.metadata() or {})["files"])
        return load_file(str(path)), {str(name): str(value) for name, value in digests.items()}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not the record of an example ({error!r}); publish the folder again") from None
