"""The two sides of `vmm bench peers`, each a process of its own on one core: a word on stdin → a line of JSON on stdout.

    python -m vmm.bench.sides vmm|torch FOLDER

FOLDER holds what both start from: a published VideoMAE (config.json, model.safetensors) and inputs.npz: `clip` uint8
[B T H W 3], `hidden` bool [B N]. Words: train, infer, bfloat16 (PyTorch alone), peak, memory. Each runs once and says
how many `seconds` it took; what a first call compiles is for the caller to leave out.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

RATE, B1, B2, EPSILON, DECAY = 1e-4, 0.9, 0.95, 1e-8, 0.05  # AdamW, of every parameter, not clipped
_PEAK_SIZE = 2048  # of the square matrices whose product says what a library's float32 reaches


def main() -> None:
    side, folder = sys.argv[1], Path(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is no answer
    with np.load(folder / "inputs.npz") as inputs:
        words = SIDES[side](folder, dict(inputs))
    words["memory"] = lambda: {"peak": _high_water(), "size": _status("VmRSS")}
    print(json.dumps({"words": sorted(words)}), file=answers, flush=True)
    for line in sys.stdin:
        begin, busy = time.perf_counter(), time.process_time()
        told = words[line.strip()]()
        spent = {"seconds": time.process_time() - busy, "wall": time.perf_counter() - begin}
        print(json.dumps(spent | told), file=answers, flush=True)


def _status(field: str) -> int:
    """Returns a number of this process's /proc status in KiB, 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def _high_water() -> int:
    return _status("VmHWM")


def ours(folder: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, Callable[[], dict]]:
    """vmm: its own train step, and its encoder."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import unflatten_dict

    from vmm.model import Recipe, loss_function
    from vmm.training.optim import Optim
    from vmm.training.step import State, make_program
    from vmm.types import Batch
    from vmm.weights.published import read_published

    clip = inputs["clip"]
    count = len(clip)
    published = read_published(folder)
    recipe = Recipe(published.model["trunk"], published.model["views"], published.model["objectives"])
    batch = Batch(
        {"video": jnp.asarray(clip)}, {"video": jnp.ones(count, bool)}, {}, jnp.arange(count), jnp.ones(count, bool)
    )
    loss, key = loss_function(recipe), jax.random.key(SEED)
    optim = Optim(RATE, 0, 1.0, B1, B2, EPSILON, DECAY, clip=0.0, decay_rules=((".*", 1.0),))
    program = make_program(
        lambda key: recipe.init(key, batch, jax.random.split(key, count))["params"],
        lambda params, teacher, batch, _: loss(params, teacher, batch, key),  # the same mask at every step
        optim,
        steps=1_000_000,
        seed=SEED,
        mesh=None,
    )
    # The parameters are copied to the device one by one, the file's array dropped behind it.
    tensors = published.tensors
    params = unflatten_dict({name: jnp.array(tensors.pop(name)) for name in list(tensors)}, sep=".")
    moments = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), program.shapes.optimizer)
    state = [State(jnp.zeros((), jnp.int32), params, moments, (), {})]
    encode = jax.jit(
        lambda params, video: recipe.apply(
            {"params": params},
            video,
            method=lambda m, video: m.model.encode("video", m.model.encoder["video"].patches(video)).x,
        )
    )

    def train() -> dict:
        state[0], metrics = program.step(state[0], batch)
        return {"loss": float(metrics["loss"])}

    def infer() -> dict:
        x = encode(state[0].params, batch.inputs["video"])
        return {"size": float(jnp.abs(x).mean().block_until_ready())}

    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(_PEAK_SIZE, _PEAK_SIZE)), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    return {"train": train, "infer": infer, "peak": lambda: _rate(lambda: product(matrix).block_until_ready())}


def theirs(folder: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, Callable[[], dict]]:
    """`transformers` on PyTorch: fused AdamW, gradients set to None, its fused attention; all as fast as it goes."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model = transformers.VideoMAEForPreTraining.from_pretrained(folder)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(B1, B2), eps=EPSILON, weight_decay=DECAY, fused=True
    )
    clip, hidden = torch.from_numpy(inputs["clip"]), torch.from_numpy(inputs["hidden"])
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 255
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 255

    def pixels():
        return (clip.permute(0, 1, 4, 2, 3).float() - mean) / deviation

    def train(half: bool = False) -> dict:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(pixels(), bool_masked_pos=hidden).loss
        loss.backward()
        optimizer.step()
        return {"loss": float(loss)}

    def infer() -> dict:
        model.eval()
        with torch.no_grad():
            return {"size": float(model.videomae(pixels()).last_hidden_state.abs().mean())}

    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(_PEAK_SIZE, _PEAK_SIZE)).astype(np.float32))
    return {
        "train": train,
        "infer": infer,
        "bfloat16": lambda: train(True),
        "peak": lambda: _rate(lambda: matrix @ matrix),
    }


def _rate(product: Callable) -> dict:
    begin = time.process_time()
    product()
    return {"gflops": 2 * _PEAK_SIZE**3 / (time.process_time() - begin) / 1e9}


SEED = 0
SIDES = {"vmm": ours, "torch": theirs}

if __name__ == "__main__":
    main()
