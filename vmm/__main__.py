"""`vmm <command>`: reads flags, then imports what the command needs; turns errors into one line and an exit code.

Exit codes: 0 done; 2 something to mend in what was given; 3 too many undecodable files; 4 the loss
is not finite; 5 a result could not be written; 42 stopped by a signal, saved, can go on.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vmm", description="Pretrain video models with their sound and their text.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a config, or go on with its run")
    train.add_argument("config", help="configs/NAME.py, optionally NAME.py:VARIANT")
    train.add_argument("--workdir", required=True, type=Path, help="folder of the run; the same again resumes it")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes, as optim.learning_rate=3e-4")

    evaluate = commands.add_parser("eval", help="evaluate a run's newest checkpoint")
    evaluate.add_argument("run", type=Path, help="workdir of a run")
    evaluate.add_argument("--again", action="store_true", help="also if it was evaluated already")

    ablate = commands.add_parser("ablate", help="train and compare the variants of a study")
    ablate.add_argument("study", type=Path, help="folder with a study.py, as experiments/0001-fusion")
    ablate.add_argument("--quick", action="store_true", help="the study's small version")
    ablate.add_argument("--out", type=Path, help="where runs and results go (default runs/<study>[-quick])")

    publish = commands.add_parser("publish", help="write a run's model in the layout of the Hugging Face Hub")
    publish.add_argument("run", type=Path, help="workdir of a run")
    publish.add_argument("folder", type=Path, help="where to write")
    publish.add_argument("--push", metavar="OWNER/NAME", help="also upload it to this repository of the Hub")

    report = commands.add_parser("report", help="draw a run as one self-contained HTML file")
    report.add_argument("run", type=Path, help="workdir of a run")
    report.add_argument("--out", type=Path, help="file to write (default RUN/report.html)")
    report.add_argument(
        "--ablation", type=Path, action="append", default=[], help="results of a `vmm ablate` to include"
    )

    data = commands.add_parser("data", help="make datasets").add_subparsers(dest="data", required=True, metavar="WHAT")
    world = data.add_parser("world", help="write the synthetic world: mp4 files whose labels are known")
    world.add_argument("folder", type=Path)
    world.add_argument("--train", type=int, default=2304, help="clips of the training split (default %(default)s)")
    world.add_argument("--validation", type=int, default=288, help="default %(default)s")
    world.add_argument("--test", type=int, default=288, help="default %(default)s")
    world.add_argument("--seed", type=int, default=0)
    world.add_argument(
        "--missing", type=float, default=1 / 9, help="share of clips without sound or caption (default 1/9)"
    )
    tokenizer = data.add_parser("tokenizer", help="train a byte-pair tokenizer on a manifest's captions")
    tokenizer.add_argument("manifest", type=Path)
    tokenizer.add_argument("out", type=Path)
    tokenizer.add_argument("--vocabulary", type=int, default=512, help="entries at most (default %(default)s)")
    return parser


def _world(args) -> None:
    from rich.progress import Progress

    from vmm.data import world

    sizes = {"train": args.train, "validation": args.validation, "test": args.test}
    with Progress(transient=True) as bar:
        task = bar.add_task("writing clips", total=sum(sizes.values()))
        world.generate(
            args.folder, sizes, args.seed, args.missing,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    print(f"{args.folder}: {sum(sizes.values())} clips, {', '.join(f'{k} {v}' for k, v in sizes.items())}")


def _tokenizer(args) -> None:
    from vmm.data.manifest import read_manifest
    from vmm.data.text import train_tokenizer
    from vmm.errors import UserError

    captions = [text for row in read_manifest(args.manifest) for text in row.captions]
    if not captions:
        raise UserError(f"dataset {args.manifest}: no clip has a caption, so there is nothing to train a tokenizer on")
    tokenizer = train_tokenizer(captions, args.vocabulary)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out))
    print(f"{args.out}: {tokenizer.get_vocab_size()} entries from {len(captions)} captions")


def _run(args) -> None:
    if args.command == "data":
        {"world": _world, "tokenizer": _tokenizer}[args.data](args)
    elif args.command == "train":
        from vmm.build import load_config
        from vmm.train import train

        train(load_config(args.config, args.overrides), args.workdir)
    elif args.command == "eval":
        from vmm.evaluate import evaluate

        evaluate(args.run, args.again)
    elif args.command == "ablate":
        from vmm.ablate import ablate

        ablate(args.study, args.quick, args.out)
    elif args.command == "publish":
        from vmm.publish import publish

        folder = publish(args.run, args.folder, args.push)
        print(f'{folder}: published; load it with vmm.load("{folder}")')
    elif args.command == "report":
        from vmm.report import report

        print(f"{report(args.run, args.out, args.ablation)}: written")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    args, rest = _parser().parse_known_args(arguments)
    if rest:
        # argparse reads overrides only in one run; those behind a flag come back as the rest.
        stray = [item for item in rest if item.startswith("-") or args.command != "train"]
        if stray:
            _parser().error(f"unrecognized arguments: {' '.join(stray)}")
        args.overrides = [*args.overrides, *rest]
    # XLA's and TensorFlow-style C++ logs would bury the lines meant for people.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from vmm.errors import Preempted, UserError

    try:
        _run(args)
    except UserError as error:
        print(f"vmm: error: {error}", file=sys.stderr)
        return error.code
    except Preempted as stop:
        print(f"vmm: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("vmm: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
