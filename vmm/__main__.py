"""`vmm <command>`: reads flags, then imports what the command needs; turns errors into one line and an exit code.

Exit codes: 0 done; 2 something to mend in what was given; 3 too many undecodable files; 4 the loss
is not finite; 5 a result could not be written; 6 a step did not end; 7 devices hold different bytes of one array;
42 stopped by a signal, saved, can go on.
"""

import argparse
import codecs
import gc
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vmm.bench.commands import add as add_bench_commands
from vmm.data.commands import add as add_data_commands
from vmm.flags import Parser, number, whole
from vmm.planning.commands import add as add_plan_command
from vmm.search.commands import add as add_sweep_command


def _lighten_children() -> None:
    """In a process that multiprocessing is starting, which imports this module first: what comes next imports no JAX.

    Such processes read and write data. Grain imports JAX and Orbax where they are, twice the work of all else that a
    worker imports, and uses neither there.
    """
    process = sys.modules.get("multiprocessing.process")
    if process is not None and getattr(process.current_process(), "_inheriting", False):
        sys.modules.update(dict.fromkeys(("jax", "orbax")))
        logging.disable(logging.WARNING)  # Grain's about this; loader.py switches them on again


_lighten_children()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vmm", description="Pretrain video models with their sound and their text.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a config, or go on with its run")
    train.add_argument("config", help="configs/NAME.py, optionally NAME.py:VARIANT")
    train.add_argument("--workdir", required=True, help="folder of the run, also gs://…; the same again resumes it")
    train.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes, as optim.learning_rate=3e-4"
    )

    config = commands.add_parser(
        "config", help="a config with its defaults filled in; how two differ; what a key means"
    )
    config.add_argument("config", nargs="?", help="as of vmm train; also the config.json of a run")
    config.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="as of vmm train")
    config.add_argument("--explain", metavar="KEY", help="its type, default and meaning, as optim.ema")
    config.add_argument("--diff", metavar="OTHER", help="a second config: what differs from the first")

    verify = commands.add_parser("verify-resume", help="kill a short run of a config, resume it, and compare")
    verify.add_argument("config", help="configs/NAME.py, optionally NAME.py:VARIANT")
    verify.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes, as optim.learning_rate=3e-4"
    )
    verify.add_argument("--steps", type=whole(2), default=12, help="of the short run (default %(default)s)")
    verify.add_argument("--folder", type=Path, help="where to keep the runs (default: nowhere)")

    supervising = commands.add_parser("supervise", help="train, and start again after a crash, a hang or a preemption")
    supervising.add_argument("config", help="as of vmm train")
    supervising.add_argument("--workdir", required=True, help="as of vmm train")
    supervising.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="as of vmm train")
    supervising.add_argument(
        "--restarts",
        type=whole(0),
        default=8,
        help="give up after so many in a row without a new checkpoint (default 8)",
    )

    evaluate = commands.add_parser("eval", help="evaluate a run's newest checkpoint")
    evaluate.add_argument("run", help="workdir of a run")
    evaluate.add_argument("--again", action="store_true", help="also if it was evaluated already")
    evaluate.add_argument(
        "--suite",
        choices=("standard", "robustness", "calibration", "classes", "all"),
        default="standard",
        help="standard: the config's evals; robustness: under noise; calibration; classes: each class (default %(default)s)",
    )
    evaluate.add_argument(
        "--predictions",
        nargs="?",
        const="",
        metavar="FILE",
        help="also write every clip's predictions (default RUN/predictions.jsonl)",
    )

    averaging = commands.add_parser("average", help="the mean of checkpoints' parameters, as a run of its own")
    averaging.add_argument("runs", nargs="+", metavar="RUN", help="workdirs of runs of one model")
    averaging.add_argument("--out", type=Path, required=True, help="workdir to write")
    which = averaging.add_mutually_exclusive_group()
    which.add_argument(
        "--last", type=whole(1), default=1, metavar="K", help="newest checkpoints of each run (default 1)"
    )
    which.add_argument("--steps", default="", metavar="S,S,…", help="the checkpoints of these steps instead")
    averaging.add_argument(
        "--greedy",
        default="",
        metavar="NAME:max",
        help="take only those with which this number of vmm eval gets better",
    )

    together = commands.add_parser("ensemble", help="evaluate several runs as one model: their predictions, averaged")
    together.add_argument("runs", nargs="+", metavar="RUN", help="workdirs; the evaluators are those of the first")
    together.add_argument("--evals", nargs="+", default=[], metavar="NAME", help="only these of them")
    together.add_argument("--predictions", type=Path, metavar="FILE", help="also write every clip's predictions")

    compare = commands.add_parser("compare", help="two models on the clips that both have, by paired tests")
    compare.add_argument("ours", metavar="A", help="run with predictions, or a file of `vmm eval --predictions`")
    compare.add_argument("theirs", metavar="B", help="the same of another model; differences are B - A")
    compare.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")

    ablate = commands.add_parser("ablate", help="train and compare the variants of a study")
    ablate.add_argument("study", type=Path, help="folder with a study.py, as experiments/0001-fusion")
    ablate.add_argument("--quick", action="store_true", help="the study's small version")
    ablate.add_argument("--out", type=Path, help="where runs and results go (default runs/<study>[-quick])")

    add_sweep_command(commands)

    publish = commands.add_parser("publish", help="write a run's model in the layout of the Hugging Face Hub")
    publish.add_argument("run", help="workdir of a run; with --check alone: what to check")
    publish.add_argument("folder", type=Path, nargs="?", help="where to write; needed, but with --check")
    publish.add_argument("--adapters", action="store_true", help="only what the base (init_from) has not")
    publish.add_argument(
        "--check",
        action="store_true",
        help="run the code of the folder's card in a clean process and compare with what it gave at publishing",
    )
    publish.add_argument(
        "--base",
        nargs="+",
        metavar="SOURCE",
        help="of --check on adapters: their base, or MODALITY=SOURCE each (default: as they were trained)",
    )
    publish.add_argument("--push", metavar="OWNER/NAME", help="also upload it to this repository of the Hub")

    converting = commands.add_parser("convert", help="published weights → ours, or ours → a published family's layout")
    converting.add_argument("source", help="folder, run or Hub repository")
    converting.add_argument("folder", type=Path, help="where to write")
    converting.add_argument("--to", metavar="FAMILY", help="write this family's layout, as videomae or clip")

    index = commands.add_parser("index", help="an index of a dataset's clips, to find those that are alike")
    index.add_argument("model", help="a published folder, a run, or a Hub repository")
    index.add_argument("manifest")
    index.add_argument("folder", type=Path, help="where to write")
    index.add_argument("--streams", nargs="+", default=[], help="streams embedded (default: all but text)")

    index.add_argument(
        "--stride",
        type=number(0),
        default=0.0,
        help="seconds between the windows of long clips (default: the middle one alone)",
    )

    similar = commands.add_parser("similar", help="clips of an index that are like a clip, a file or words")
    similar.add_argument("folder", type=Path, help="what `vmm index` wrote")
    similar.add_argument("--clip", default="", metavar="ID", help="a clip of the index")
    similar.add_argument("--file", default="", help="a media file")
    similar.add_argument("--text", default="", help="words")
    similar.add_argument("--top", type=whole(1), default=10, help="how many (default %(default)s)")
    similar.add_argument("--exact", action="store_true", help="compare with every clip, not by the graph")
    similar.add_argument("--model", default="", help="what the index was made with; default: where the index says")

    summarise = commands.add_parser("summarise", help="the moments of a video that are worth most, as mp4")
    summarise.add_argument("run", help="workdir of a run with a `moments` objective")
    summarise.add_argument("video", help="a media file of any length")
    summarise.add_argument("out", type=Path, help="the mp4 file to write")
    summarise.add_argument(
        "--share", type=number(0, 1, above=True), default=0.15, help="of its length, at most (default %(default)s)"
    )
    summarise.add_argument(
        "--segment", type=number(0, above=True), default=0.5, help="seconds taken or left whole (%(default)s)"
    )

    report = commands.add_parser("report", help="draw a run as one self-contained HTML file")
    report.add_argument("run", help="workdir of a run")
    report.add_argument("--out", type=Path, help="file to write (default RUN/report.html)")
    report.add_argument(
        "--ablation", type=Path, action="append", default=[], help="results of a `vmm ablate` to include"
    )

    add_plan_command(commands)

    data = commands.add_parser("data", help="make datasets").add_subparsers(dest="data", required=True, metavar="WHAT")
    add_data_commands(data)

    bench = commands.add_parser("bench", help="measure speed")
    add_bench_commands(bench.add_subparsers(dest="bench", required=True, metavar="WHAT"))
    return parser


def _run(args) -> int | None:
    if args.command in ("data", "bench", "plan", "sweep"):
        args.run(args)
    elif args.command == "train":
        _train(args)
    elif args.command == "verify-resume":
        from vmm.build import load_config
        from vmm.data.files import check_files

        config = load_config(args.config, args.overrides)
        check_files(config)  # its mistakes come before long imports
        from vmm.verify import verify_resume

        return int(not verify_resume(config, args.steps, args.folder))
    elif args.command == "config":
        _config(args)
    elif args.command == "supervise":
        from vmm.supervise import supervise

        words = [args.config, "--workdir", args.workdir, *args.overrides]
        return supervise(words, args.workdir, args.restarts)
    elif args.command == "eval":
        from vmm.evaluate import evaluate

        suites = ("robustness", "calibration", "classes") if args.suite == "all" else (args.suite,)
        evaluate(args.run, args.again, suites, args.predictions)
    elif args.command == "average":
        _average(args)
    elif args.command == "ensemble":
        from vmm.ensemble import ensemble

        ensemble(args.runs, args.evals, args.predictions)
    elif args.command == "compare":
        from vmm.compare import compare

        compare(args.ours, args.theirs, args.json)
    elif args.command == "ablate":
        from vmm.ablate import ablate

        ablate(args.study, args.quick, args.out)
    elif args.command == "publish":
        _publish(args)
    elif args.command == "convert":
        from vmm.convert import convert
        from vmm.progress import progress

        with progress(f"converting {args.source}"):
            convert(args.source, args.folder, args.to)
    elif args.command == "index":
        from vmm.similar import write_index

        write_index(args.model, args.manifest, args.folder, args.streams, args.stride)
    elif args.command == "similar":
        from vmm.similar import ask

        ask(args.folder, args.clip, args.file, args.text, args.top, args.exact, args.model)
    elif args.command == "summarise":
        from vmm.summarise import summarise_file

        summarise_file(args.run, args.video, args.out, args.share, args.segment)
    elif args.command == "report":
        from vmm.report import report

        print(f"{report(args.run, args.out, args.ablation)}: written")


def _train(args) -> None:
    from vmm.build import load_config
    from vmm.data.files import check_files
    from vmm.errors import UserError
    from vmm.training.cluster import find_place

    try:  # what is wrong here is told before JAX is imported, which takes seconds
        check_files(load_config(args.config, args.overrides))
    except UserError:
        if find_place() is None:  # else in the job, below: all its processes end
            raise
    from vmm.train import train
    from vmm.training import distributed

    with distributed.joined():
        train(load_config(args.config, args.overrides), args.workdir, began=args.began)


def _config(args) -> None:
    from vmm.build import load_config
    from vmm.errors import UserError
    from vmm.show_config import compared, explain, lines_of, resolved

    if args.explain:
        print(explain(args.explain, load_config(args.config, args.overrides) if args.config else None))
    elif args.config is None:
        raise UserError("config: give a config, as `vmm config configs/demo.py`; or --explain KEY")
    elif args.diff:
        print("\n".join(compared(args.config, args.diff)) or "the same")
    else:
        given = load_config(args.config, args.overrides)
        print("\n".join(lines_of(resolved(args.config, args.overrides), given)))


def _average(args) -> None:
    from vmm.average import average
    from vmm.errors import UserError

    steps = [step.strip() for step in args.steps.split(",") if step.strip()]
    if not all(step.isdigit() for step in steps):
        raise UserError(f"average: --steps are numbers, as 100,200; got {args.steps!r}")
    told = average(args.runs, args.out, args.last, [int(step) for step in steps], args.greedy)
    for one in told:
        alone = f", alone {one['score']:.4f}" if "score" in one else ""
        print(f"{'taken' if one.get('taken', True) else 'left '}  {one['run']} at step {one['step']}{alone}")
    count = sum(one.get("taken", True) for one in told)
    print(f"{args.out}: mean of {count} checkpoint{'s' * (count > 1)}; evaluate it with `vmm eval {args.out}`")


def _publish(args) -> None:
    from vmm.errors import UserError
    from vmm.publish import publish, upload
    from vmm.publishing.check import check, parse_base

    folder, base = args.folder, parse_base(args.base)
    if folder is None and not args.check:
        raise UserError("publish: give the folder to write, as `vmm publish RUN FOLDER`; --check FOLDER writes none")
    if folder is None:
        folder = Path(args.run)
    else:
        publish(args.run, folder, adapters=args.adapters)
        print(f'{folder}: published; load it with vmm.load("{folder}")')
    if args.check:
        told = ", ".join(f"{name} {value:.1g}" for name, value in check(folder, base).items())
        print(f"{folder}: checked; its example gives what it gave when it was published (difference: {told})")
    if args.push:  # what does not pass the check is not uploaded
        upload(folder, args.push)


_SIGNS = {
    "→": "->",
    "↔": "<->",
    "…": "...",
    "±": "+-",
    "×": "x",
    "·": "*",
    "−": "-",
    "–": "-",
    "≤": "<=",
    "≥": ">=",
    "²": "2",
}


def _plain(error: UnicodeEncodeError) -> tuple[str, int]:
    return "".join(_SIGNS.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


def _speak_what_can_be_read() -> None:
    """Output of few letters (LC_ALL=C, a pipe of an old system) gets signs of its own in place of a traceback."""
    codecs.register_error("vmm.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if not (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf"):
            stream.reconfigure(errors="vmm.plain")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    began = time.time()
    # Tracing makes millions of objects and hardly a cycle: by Python's default (700) to look for cycles is a quarter of it.
    gc.set_threshold(100_000, 10, 10)
    _speak_what_can_be_read()
    args, rest = _parser().parse_known_args(arguments)
    args.began = began
    if rest:
        # argparse reads overrides only in one run; those behind a flag come back as the rest.
        stray = [
            item
            for item in rest
            if item.startswith("-")
            or args.command not in ("train", "plan", "config", "verify-resume", "supervise", "sweep")
        ]
        if stray:
            _parser().error(f"unrecognized arguments: {' '.join(stray)}")
        args.overrides = [*args.overrides, *rest]
    # XLA's and TensorFlow-style C++ logs would bury the lines meant for people.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from vmm.errors import Preempted, UserError

    try:
        return _run(args) or 0
    except UserError as error:
        print(f"vmm: error: {error}", file=sys.stderr)
        return error.code
    except Preempted as stop:
        print(f"vmm: {stop}", file=sys.stderr)
        return stop.code
    except BrokenPipeError:  # whoever read the output has seen enough, as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("vmm: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
