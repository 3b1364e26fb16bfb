"""vmm bench peers: one VideoMAE pretraining step here and in `transformers` on PyTorch, in turn, on one core or one GPU.

Same shapes, same random weights, same clip, same mask. On a core float32 on both sides; on a GPU bfloat16, PyTorch compiled
and with its fused attention. Each side is a process of its own (sides.py), pinned to one core where it computes on it, and
works only when it is asked to.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from vmm.bench.sides import SEED
from vmm.bench.wait import Size, clip_flops
from vmm.build import write_text
from vmm.errors import UserError

# Width, depth, heads; the decoder's width, depth, heads (VideoMAE, Tong et al. 2022, appendix); frames and size of a clip.
SIZES = {
    "tiny": ((32, 2, 2), (16, 1, 2), (4, 32)),
    "small": ((384, 12, 6), (192, 4, 3), (16, 224)),
    "base": ((768, 12, 12), (384, 4, 6), (16, 224)),
    "large": ((1024, 24, 16), (512, 4, 8), (16, 224)),
}
_RATIO, _TUBELET, _PATCH = 0.9, 2, 16
_WORDS = {"train": "train step", "infer": "encoder, all tokens"}


def bench_peers(size: str, rounds: int, batch: int = 1, path: Path | None = None, device: str = "cpu") -> dict:
    """Measures and prints; returns what `path` is given as JSON.

    Raises:
      UserError: the libraries compared against are not installed, or a side ends early.
    """
    for library in ("torch", "transformers"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"bench peers: {library} is not here; pip install -r requirements-peers.txt")
    if rounds < 1 or batch < 1:
        raise UserError("bench peers: --rounds and --batch are at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        print(f"VideoMAE {size}, batch {batch}: weights, clip and mask", flush=True)
        _prepare(folder, size, batch)
        sides = {name: _Side(name, folder, device) for name in ("vmm", "torch")}
        try:
            result = _measure(sides, rounds)
        finally:
            for side in sides.values():
                side.close()
    result["gflops_a_clip"] = _gflops(size)
    result |= {"size": size, "batch": batch, "rounds": rounds, "device": device, "python": sys.version.split()[0]}
    _show(result)
    if path is not None:
        write_text(path, json.dumps(result, indent=2) + "\n")
    return result


def _prepare(folder: Path, size: str, batch: int) -> None:
    """Writes what both sides start from: config.json, model.safetensors, inputs.npz."""
    import jax
    import jax.numpy as jnp
    import torch
    import transformers

    from vmm import masking
    from vmm.model import sample_keys

    (width, depth, heads), (narrow, few, fewer), (frames, pixels) = SIZES[size]
    torch.manual_seed(SEED)
    config = transformers.VideoMAEConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
        decoder_hidden_size=narrow, decoder_num_hidden_layers=few, decoder_num_attention_heads=fewer,
        decoder_intermediate_size=4 * narrow, num_frames=frames, image_size=pixels, tubelet_size=_TUBELET,
        patch_size=_PATCH, use_mean_pooling=False,
    )  # fmt: skip
    transformers.utils.logging.disable_progress_bar()
    transformers.VideoMAEForPreTraining(config).save_pretrained(folder)
    grid = (frames // _TUBELET, pixels // _PATCH, pixels // _PATCH)
    count = int(np.prod(grid))
    # The very mask that our step draws, given to both.
    keys = sample_keys(jax.random.key(SEED), jnp.arange(batch))
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, zlib.crc32(b"masked/video"))
    mask = masking.sample("tube", keys, jnp.ones((batch, count), bool), grid, _RATIO)
    hidden = np.zeros((batch, count), bool)
    np.put_along_axis(hidden, np.asarray(mask.hidden), True, axis=1)
    clip = np.random.default_rng(SEED).integers(0, 256, (batch, frames, pixels, pixels, 3), dtype=np.uint8)
    np.savez(folder / "inputs.npz", clip=clip, hidden=hidden)


class _Side:
    """A process of sides.py. ask(word) → its answer."""

    def __init__(self, name: str, folder: Path, device: str):
        pinned = device == "cpu" and hasattr(os, "sched_getaffinity")
        core = max(os.sched_getaffinity(0)) if pinned else None
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        if device == "gpu":  # both share its memory
            environment = os.environ | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, "-m", "vmm.bench.sides", name, str(folder), device]
        if core is not None:
            pin = f"import os, runpy, sys; os.sched_setaffinity(0, {{{core}}}); sys.argv = sys.argv[1:]; "
            run = "runpy.run_module('vmm.bench.sides', run_name='__main__', alter_sys=True)"
            command = [sys.executable, "-c", pin + run, "sides", name, str(folder), device]
        self.name, self.log = name, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self.words = self._answer()["words"]

    def ask(self, word: str) -> dict:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["no word"])[-1]
            raise UserError(f"bench peers: the side {self.name!r} ended with code {self.process.returncode}: {last}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


def _measure(sides: dict, rounds: int) -> dict:
    result: dict = {"memory_mb": {}, "compiling_mb": {}, "losses": {}}
    for word, what in _WORDS.items():
        for name, side in sides.items():
            print(f"{what}: {name} compiles and warms up", flush=True)
            first = [side.ask(word) for _ in range(2)]
            if word == "train":
                result["losses"][name] = [answer["loss"] for answer in first]
                compiling = side.ask("memory")["peak"] / 1024
                side.ask("forget")
                side.ask(word)
                result["memory_mb"][name] = side.ask("memory")["peak"] / 1024
                result["compiling_mb"][name] = compiling
    for word, what in _WORDS.items():
        times: dict = {name: [] for name in sides}
        for turn in range(rounds):
            order = list(sides) if turn % 2 == 0 else list(sides)[::-1]  # A B, B A, …
            for name in order:
                times[name].append(sides[name].ask(word)["seconds"])
            print(f"{what}: round {turn + 1} of {rounds}", flush=True)
        ratios = [theirs / ours for ours, theirs in zip(times["vmm"], times["torch"])]
        low, high = _interval(ratios)
        seconds = {name: statistics.median(values) for name, values in times.items()}
        result[word] = {"seconds": seconds, "ratio": statistics.median(ratios), "low": low, "high": high}
    if "bfloat16" in sides["torch"].words:
        sides["torch"].ask("bfloat16")
        half = statistics.median(sides["torch"].ask("bfloat16")["seconds"] for _ in range(max(1, rounds // 2)))
        result["bfloat16_seconds"] = half
    result["gflops"] = {name: max(side.ask("peak")["gflops"] for _ in range(5)) for name, side in sides.items()}
    return result


def _gflops(size: str) -> dict[str, float]:
    """Returns what a clip costs: three forward passes less the first gradient, and the encoder over all tokens."""
    (width, depth, _), (narrow, few, _), (frames, pixels) = SIZES[size]
    model = Size(width, depth, _RATIO, narrow, few)
    whole = clip_flops(Size(width, depth), frames, pixels, _TUBELET, _PATCH)
    side = pixels // _PATCH
    embed = 2 * frames // _TUBELET * side * side * _TUBELET * _PATCH * _PATCH * 3 * width
    return {"train": clip_flops(model, frames, pixels, _TUBELET, _PATCH) / 1e9, "infer": (whole + embed) / 3e9}


def _interval(values: list) -> tuple[float, float]:
    """Returns the middle 95 % of the median of the values drawn again."""
    rng = np.random.default_rng(0)
    drawn = np.median(rng.choice(values, (2000, len(values))), axis=1)
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def _show(result: dict) -> None:
    gpu = result["device"] == "gpu"
    kind, where = ("bfloat16", "one GPU") if gpu else ("float32", "one core")
    table = Table("", "vmm", "PyTorch", "ratio", title=f"VideoMAE {result['size']}, {kind}, {where}, in turn")
    for word, what in _WORDS.items():
        seconds, told = result[word]["seconds"], result[word]
        ratio = f"{told['ratio']:.2f} ({told['low']:.2f} to {told['high']:.2f})"
        unit = "s" if gpu else "s of processor"
        table.add_row(f"{what}, {unit}", f"{seconds['vmm']:.3f}", f"{seconds['torch']:.3f}", ratio)
        share = [
            100 * result["gflops_a_clip"][word] * result["batch"] / seconds[name] / result["gflops"][name]
            for name in seconds
        ]
        table.add_row("  of that speed of the product below", *(f"{part:.0f} %" for part in share), "")
    rates = {name: result["batch"] / seconds for name, seconds in result["train"]["seconds"].items()}
    table.add_row("clips/s of training", f"{rates['vmm']:,.2f}", f"{rates['torch']:,.2f}", "")
    for key, what in (("memory_mb", "peak memory of a step, MB"), ("compiling_mb", "the same with compiling, MB")):
        memory = result[key]
        part = f"{memory['vmm'] / memory['torch']:.2f} of theirs"
        table.add_row(what, f"{memory['vmm']:.0f}", f"{memory['torch']:.0f}", part)
    peaks, losses = result["gflops"], result["losses"]
    table.add_row(f"{kind} product, GFLOP/s", f"{peaks['vmm']:.0f}", f"{peaks['torch']:.0f}", "")
    if "bfloat16_seconds" in result:
        half = result["bfloat16_seconds"]
        table.add_row(
            "train step, their bfloat16, s", "", f"{half:.3f}", f"{half / result['train']['seconds']['vmm']:.2f}"
        )
    for step in range(2):
        ours, theirs = losses["vmm"][step], losses["torch"][step]
        table.add_row(f"loss of step {step + 1}", f"{ours:.6f}", f"{theirs:.6f}", f"{ours / theirs - 1:+.1e}")
    Console().print(table)
