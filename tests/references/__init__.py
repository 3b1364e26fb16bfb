"""References: what PyTorch and transformers compute, made once by make.py and read here without either of them.

A reference is two files:

    NAME.json   "made_with": versions; "class": of transformers, which loads it; "config": its config.json;
                "tensors": name → shape; "prefix": of names that other files do without
    NAME.npz    arrays: "input/…" what went in, "output/…" and "gradient/…" what came out, "tensor/…" weights

Weights are drawn, not stored, but for the few that are not trained (tables of positions).
"""

import functools
import json
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
RATE = 16000
CAPTIONS = [
    f"a {colour} {shape} moves {way} in silence, {number}"
    for colour in ("red", "blue", "green")
    for shape in ("circle", "square", "star")
    for way in ("left", "right", "up")
    for number in ("one", "two", "three")
]


class Reference(NamedTuple):
    """A model's config.json and weights by their published names; what goes in, comes out and flows back, by name."""

    config: dict
    tensors: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]

    def publish(self, folder: Path) -> Path:
        """Writes the model as it is published: config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return folder


@functools.cache
def read(name: str) -> Reference:
    """Reads a reference. Its arrays are everyone's: do not write into them."""
    told = json.loads((HERE / f"{name}.json").read_text())
    groups = {"input": {}, "output": {}, "gradient": {}, "tensor": {}}
    if (HERE / f"{name}.npz").is_file():
        with np.load(HERE / f"{name}.npz", allow_pickle=False) as file:
            for key in file.files:
                group, _, rest = key.partition("/")
                groups[group][rest] = file[key]
    tensors = draw(told["tensors"], told["prefix"]) | groups["tensor"]
    return Reference(told["config"], tensors, groups["input"], groups["output"], groups["gradient"])


# What is drawn: from the bits of PCG64, which NumPy keeps from version to version, by sums and products alone.


def uniform(key: str, *shape: int) -> np.ndarray:
    """Returns float64 of mean 0 and deviation 1, even between −√3 and √3; another key gives other values."""
    bits = np.random.PCG64(zlib.crc32(key.encode())).random_raw(math.prod(shape))
    return ((bits >> 11) * 2.0**-52 - 1).reshape(shape) * math.sqrt(3)


def draw(shapes: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """Draws weights, none at a special value, the scales of norms around one: name → float32.

    Files with and without the prefix have the same values.
    """
    tensors = {}
    for name, shape in shapes.items():
        around = float("norm" in name.lower() and name.endswith("weight"))
        tensors[name] = np.asarray(around + 0.2 * uniform(name.removeprefix(prefix), *shape), np.float32)
    return tensors


def below(key: str, low: int, high: int, *shape: int) -> np.ndarray:
    """Returns int64 of low … high − 1."""
    bits = np.random.PCG64(zlib.crc32(key.encode())).random_raw(math.prod(shape))
    return low + ((bits >> 32) % (high - low)).astype(np.int64).reshape(shape)


def pixels(*shape: int) -> np.ndarray:
    return below("pixels", 0, 256, *shape).astype(np.uint8)


def scene(height: int = 84, width: int = 168) -> np.ndarray:
    """Returns a picture uint8 [height width 3] of slow waves, unlike in every part: what is shown of it can be told."""
    y, x = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    waves = [3 * x + 2 * y, 5 * x - y, x + 4 * y]
    return np.stack([127.5 + 110 * np.sin(np.pi * (wave + 0.3)) for wave in waves], -1).round().astype(np.uint8)


def orders(key: str, rows: int, count: int) -> np.ndarray:
    """Returns a permutation of 0 … count − 1 in each row."""
    return np.argsort(uniform(key, rows, count), axis=1)


def sounds(seconds: float) -> np.ndarray:
    """Noise, a sweep with a constant added, a tone that ends in silence, silence: float32 [4 S]."""
    time = np.arange(int(seconds * RATE)) / RATE
    noise = 0.1 * uniform("noise", time.size)
    sweep = 0.3 * np.sin(2 * np.pi * (200 * time + 900 * time**2)) + 1e-3 * noise + 0.05
    tone = 0.5 * np.sin(2 * np.pi * 440 * time) * (time < seconds / 2)
    return np.stack([noise, sweep, tone, 0 * time]).astype(np.float32)


def waves(seconds: float) -> np.ndarray:
    """Noise, and a sweep under noise: float32 [2 S]; no bin is so quiet that its logarithm is rounding."""
    time = np.arange(int(seconds * RATE)) / RATE
    noise = 0.1 * uniform("waves", 2, time.size)
    return (noise + np.stack([0 * time, 0.3 * np.sin(2 * np.pi * (200 * time + 900 * time**2))])).astype(np.float32)
