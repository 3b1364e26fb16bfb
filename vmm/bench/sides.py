"""The two sides of `vmm bench peers`, each a process of its own: a word on stdin → a line of JSON on stdout.

    python -m vmm.bench.sides vmm|torch FOLDER cpu|gpu

FOLDER holds what both start from: a published VideoMAE (config.json, model.safetensors) and inputs.npz: `clip` uint8
[B T H W 3], `hidden` bool [B N]. Words: train, infer, bfloat16 (PyTorch alone), peak, memory. Each runs once and says
how many `seconds` it took; what a first call compiles is for the caller to leave out. On one CPU core both compute in
float32 and seconds are the processor's; on a GPU in bfloat16 (PyTorch: autocast, compiled, its fused attention), a word
stands for TURNS steps, and seconds are the clock's.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

RATE, B1, B2, EPSILON, DECAY = 1e-4, 0.9, 0.95, 1e-8, 0.05  # AdamW, of every parameter, not clipped
_PEAK_SIZE = 2048  # of the square matrices whose product says what a library's float32 reaches


def main() -> None:
    side, folder, gpu = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "gpu"
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is no answer
    with np.load(folder / "inputs.npz") as inputs:
        words = SIDES[side](folder, dict(inputs), gpu)
    words.setdefault("memory", lambda: {"peak": _status("VmHWM")})
    words["forget"] = _forget
    print(json.dumps({"words": sorted(words)}), file=answers, flush=True)
    for line in sys.stdin:
        begin, busy = time.perf_counter(), time.process_time()
        word = line.strip()
        turns = TURNS if gpu and word in ("train", "infer") else 1
        told = [words[word]() for _ in range(turns)][-1]
        wall = (time.perf_counter() - begin) / turns
        spent = {"seconds": wall if gpu else time.process_time() - busy, "wall": wall}
        print(json.dumps(spent | told), file=answers, flush=True)


def _status(field: str) -> int:
    """Returns a number of this process's /proc status in KiB, 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def _forget() -> dict:
    """What was freed goes back to the system, and the most memory so far is what is held now: compiling does not count."""
    from vmm.training.allocator import give_back_freed_memory

    give_back_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return {}


def ours(folder: Path, inputs: Mapping[str, np.ndarray], gpu: bool) -> dict[str, Callable[[], dict]]:
    """vmm: its own train step, and its encoder."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import unflatten_dict

    from vmm.model import Recipe, loss_function
    from vmm.training.allocator import keep_freed_memory
    from vmm.training.optim import Optim
    from vmm.training.step import State, make_program
    from vmm.types import Batch
    from vmm.weights.published import read_published

    if not gpu:
        keep_freed_memory()  # as vmm train does
    clip = inputs["clip"]
    count = len(clip)
    published = read_published(folder)
    dtype = "bfloat16" if gpu else "float32"
    recipe = Recipe(published.model["trunk"], published.model["views"], published.model["objectives"], dtype)
    batch = Batch(
        {"video": jnp.asarray(clip)}, {"video": jnp.ones(count, bool)}, {}, jnp.arange(count), jnp.ones(count, bool)
    )
    loss, key = loss_function(recipe), jax.random.key(SEED)
    optim = Optim(
        learning_rate=RATE, final=1.0, b1=B1, b2=B2, epsilon=EPSILON, weight_decay=DECAY, clip=0.0,
        decay_rules=((".*", 1.0),),
    )  # fmt: skip
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

    product = jax.jit(lambda x: x @ x)

    def peak() -> dict:
        matrix = jnp.asarray(_matrix(), dtype)
        product(matrix).block_until_ready()
        return _rate(lambda: product(matrix).block_until_ready(), gpu)

    words = {"train": train, "infer": infer, "peak": peak}
    if gpu:
        words["memory"] = lambda: {"peak": jax.devices()[0].memory_stats()["peak_bytes_in_use"] // 1024}
    return words


def theirs(folder: Path, inputs: Mapping[str, np.ndarray], gpu: bool) -> dict[str, Callable[[], dict]]:
    """`transformers` on PyTorch: fused AdamW, gradients set to None, its fused attention; all as fast as it goes."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    device = "cuda" if gpu else "cpu"
    if gpu:
        if not torch.cuda.is_available():
            sys.exit("PyTorch sees no GPU: install its CUDA build")
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(1)
    model = transformers.VideoMAEForPreTraining.from_pretrained(folder, attn_implementation="sdpa").to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(B1, B2), eps=EPSILON, weight_decay=DECAY, fused=True
    )
    whole, encoder = (torch.compile(model), torch.compile(model.videomae)) if gpu else (model, model.videomae)
    clip, hidden = torch.from_numpy(inputs["clip"]).to(device), torch.from_numpy(inputs["hidden"]).to(device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None] * 255
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None] * 255

    def pixels():
        return (clip.permute(0, 1, 4, 2, 3).float() - mean) / deviation

    def train(half: bool = gpu) -> dict:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = whole(pixels(), bool_masked_pos=hidden).loss
        loss.backward()
        optimizer.step()
        return {"loss": float(loss)}

    def infer() -> dict:
        model.eval()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=gpu):
            return {"size": float(encoder(pixels()).last_hidden_state.abs().mean())}

    def peak() -> dict:
        matrix = torch.from_numpy(_matrix()).to(device, torch.bfloat16 if gpu else torch.float32)
        wait = torch.cuda.synchronize if gpu else lambda: None

        def product():
            matrix @ matrix
            wait()

        product()
        return _rate(product, gpu)

    words = {"train": train, "infer": infer, "peak": peak}
    if gpu:
        words["memory"] = lambda: {"peak": torch.cuda.max_memory_reserved() // 1024}
    else:
        words["bfloat16"] = lambda: train(True)
    return words


def _matrix() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(_PEAK_SIZE, _PEAK_SIZE)).astype(np.float32)


def _rate(product: Callable, gpu: bool) -> dict:
    clock = time.perf_counter if gpu else time.process_time
    turns, begin = TURNS if gpu else 1, clock()
    for _ in range(turns):
        product()
    return {"gflops": turns * 2 * _PEAK_SIZE**3 / (clock() - begin) / 1e9}


SEED = 0
TURNS = 10  # steps a word stands for on a GPU, where one is too short to time
SIDES = {"vmm": ours, "torch": theirs}

if __name__ == "__main__":
    main()
