"""The flags of `vmm bench …`; heavy imports wait until a command runs."""

import os
from pathlib import Path

from vmm.flags import number, whole

PARTS = ("decode", "workers", "wait", "memory")
MODELS = ("vit_b", "videomae_b")
STEPS = ("configs/pretrain_videomae.py:B", "configs/pretrain_videomae.py:L", "configs/pretrain_siglip_video.py:B")


def add(bench) -> None:
    """Adds the commands below `vmm bench` to its subparsers."""
    data = bench.add_parser("data", help="clips a second by codec, by workers; waiting for input; memory")
    data.add_argument("--scratch", type=Path, default=Path("runs/bench"), help="folder of test files (%(default)s)")
    data.add_argument(
        "--seconds", type=number(0, above=True), default=8.0, help="of each measurement (default %(default)s)"
    )
    data.add_argument("--only", choices=PARTS, help="one part")
    data.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    data.add_argument("--data", type=Path, help="manifest for workers and memory (default: stored test clips)")
    data.add_argument("--tokenizer", type=Path, help="of --data")
    data.add_argument(
        "--length", type=number(0, above=True), default=30.0, help="seconds of a test file (default %(default)s)"
    )
    data.add_argument("--cores", type=whole(1), default=os.cpu_count(), help="workers at most (default: all cores)")
    data.add_argument("--batch", type=whole(1), default=8, help="clips (default %(default)s)")
    data.add_argument("--batches", type=whole(1), default=400, help="for memory, after warm-up (default %(default)s)")
    data.add_argument("--model", action="append", help=f"for waiting (default {' and '.join(MODELS)})")
    data.add_argument(
        "--step-ms", type=number(0, above=True), help="for waiting: a step's time on the device, instead of --model"
    )
    data.add_argument("--step-clips", type=whole(1), default=64, help="clips of that step (default %(default)s)")
    data.add_argument(
        "--device-tflops", type=number(0, above=True), default=989.0, help="peak (default: NVIDIA H200, bfloat16)"
    )
    data.add_argument(
        "--utilisation",
        type=number(0, 1, above=True),
        default=0.4,
        help="share of the peak reached (default %(default)s)",
    )
    data.add_argument("--device-cores", type=whole(1), default=16, help="cores for each device (default %(default)s)")
    data.set_defaults(run=_data)

    peers = bench.add_parser("peers", help="a VideoMAE training step against transformers on PyTorch")
    peers.add_argument(
        "--size", choices=("tiny", "small", "base", "large"), default="small", help="default %(default)s"
    )
    peers.add_argument("--rounds", type=whole(1), default=10, help="paired, in turn (default %(default)s)")
    peers.add_argument("--batch", type=whole(1), default=1, help="clips a step (default %(default)s)")
    peers.add_argument(
        "--device", choices=("cpu", "gpu"), default="cpu", help="one core of this, or one GPU (%(default)s)"
    )
    peers.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    peers.set_defaults(run=_peers)

    step = bench.add_parser(
        "step", help="the train step of configs on the devices here: steps/s, MFU, memory, compiling"
    )
    step.add_argument(
        "configs", nargs="*", default=[], metavar="CONFIG", help=f"configs, or KEY=VALUE (default {' '.join(STEPS)})"
    )
    step.add_argument("--steps", type=whole(1), default=20, help="that are timed (default %(default)s)")
    step.add_argument("--trace", type=Path, metavar="FOLDER", help="a profile of the last steps, for a trace viewer")
    step.add_argument("--input", action="store_true", help="feed the config's data, and say how long that waits")
    step.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    step.set_defaults(run=_step)


def _peers(args) -> None:
    from vmm.bench.peers import bench_peers

    bench_peers(args.size, args.rounds, args.batch, args.json, args.device)


def _step(args) -> None:
    from vmm.bench.step import bench_step

    overrides = [word for word in args.configs if "=" in word or word.startswith("~")]
    configs = [word for word in args.configs if word not in overrides] or list(STEPS)
    bench_step(configs, overrides, args.steps, args.trace, args.input, args.json)


def _data(args) -> None:
    from vmm.bench.data import Settings, bench_data

    bench_data(
        Settings(
            scratch=args.scratch, seconds=args.seconds, parts=(args.only,) if args.only else PARTS, json=args.json,
            data=args.data, tokenizer=args.tokenizer, length=args.length, cores=args.cores, batch=args.batch,
            batches=args.batches, models=tuple(args.model or MODELS), step_ms=args.step_ms,
            step_clips=args.step_clips, device_tflops=args.device_tflops, utilisation=args.utilisation,
            device_cores=args.device_cores,
        )
    )  # fmt: skip
