"""The flags of `vmm data …` and what each does; heavy imports wait until a command runs."""

import functools
import os
from pathlib import Path

from vmm.flags import number, whole


def add(data) -> None:
    """Adds the commands below `vmm data` to its subparsers."""
    world = data.add_parser("world", help="write the synthetic world: mp4 files whose labels are known")
    world.add_argument("folder", type=Path)
    world.add_argument("--train", type=whole(0), default=4608, help="clips of the training split (default %(default)s)")
    world.add_argument("--validation", type=whole(0), default=576, help="default %(default)s")
    world.add_argument("--test", type=whole(0), default=288, help="default %(default)s")
    world.add_argument("--seed", type=whole(0), default=0)
    world.add_argument(
        "--missing", type=number(0, 1), default=1 / 9, help="share of clips without sound or caption (default 1/9)"
    )
    world.set_defaults(run=_world)

    scenes = data.add_parser("scenes", help="write longer synthetic clips: events, places, subtitles, questions")
    scenes.add_argument("folder", type=Path)
    scenes.add_argument("--train", type=whole(0), default=512, help="clips of the training split (default %(default)s)")
    scenes.add_argument("--validation", type=whole(0), default=64, help="default %(default)s")
    scenes.add_argument("--test", type=whole(0), default=128, help="default %(default)s")
    scenes.add_argument("--seed", type=whole(0), default=0)
    scenes.set_defaults(run=_scenes)

    tokenizer = data.add_parser("tokenizer", help="train a tokenizer on a manifest's captions")
    tokenizer.add_argument("manifest", type=Path)
    tokenizer.add_argument("out", type=Path)
    tokenizer.add_argument("--vocabulary", type=whole(1), default=512, help="entries at most (default %(default)s)")
    tokenizer.add_argument(
        "--kind", choices=("bpe", "wordpiece", "unigram"), default="bpe",
        help="of CLIP, of BERT, or SentencePiece's, of SigLIP (default %(default)s)",
    )  # fmt: skip
    tokenizer.set_defaults(run=_tokenizer)

    build = data.add_parser("build", help="turn files, tables or tars into shards and a manifest")
    build.add_argument("source", type=Path, help="a folder of media, a .csv, .tsv, .jsonl or .tar, or a TFDS folder")
    build.add_argument("out", type=Path, help="folder to write; the same command again goes on with it")
    build.add_argument("--kind", help="what the source is, as `vmm data sources` lists (default: told by its name)")
    build.add_argument("--media", type=Path, help="folder that a table's paths are relative to, or that is searched")
    build.add_argument("--label", default="", help="column (or, of folders and datasets, a name) of the classes")
    build.add_argument("--column", action="append", default=[], metavar="FIELD=NAME", help="a column by another name")
    build.add_argument("--split", help="split of a dataset that has several")
    build.add_argument("--clips", action="store_true", help="media named by a video's id alone are cut clips already")
    build.add_argument("--links", action="store_true", help="follow links that lead out of a folder")
    build.add_argument("--keep", action="store_true", help="store the original bytes")
    build.add_argument(
        "--short-side", type=whole(16), default=256, help="pixels, never scaled up (default %(default)s)"
    )
    build.add_argument("--gop", type=whole(1), default=30, help="frames between key frames (default %(default)s)")
    build.add_argument("--cut", choices=("whole", "windows", "shots"), default="whole", help="clips without a span")
    build.add_argument(
        "--seconds", type=number(0, above=True), default=10.0, help="length of windows, longest shot (%(default)s)"
    )
    build.add_argument("--shard", type=whole(1), default=512, help="source clips a shard (default %(default)s)")
    build.add_argument(
        "--workers", type=whole(1), default=os.cpu_count(), help="decoding processes (default: all cores)"
    )
    build.add_argument(
        "--timeout",
        type=number(0, above=True),
        default=120.0,
        help="processor seconds for one file (default %(default)s)",
    )
    build.add_argument(
        "--memory", type=number(0, above=True), default=2.0, help="GiB for one file (default %(default)s)"
    )
    build.add_argument("--max-bytes", type=number(1), default=1e9, help="of one file (default %(default)s)")
    build.add_argument("--max-frames", type=whole(1), default=50000, help="of one clip (default %(default)s)")
    build.add_argument("--classes", type=Path, help="classes.json of another split: the same indices")
    build.add_argument(
        "--budget", type=number(0, 1), default=0.01, help="share that may be left out (default %(default)s)"
    )
    build.add_argument("--runner", help="build shards in an Apache Beam pipeline, as DirectRunner, FlinkRunner")
    build.add_argument("--runner-option", action="append", default=[], metavar="--FLAG=VALUE", help="of the pipeline")
    build.set_defaults(run=_build)

    sources = data.add_parser("sources", help="what `vmm data build` reads: all kinds, or the layout of one")
    sources.add_argument("name", nargs="?", help="a kind: say exactly which files and fields it expects")
    sources.set_defaults(run=_sources)

    check = data.add_parser("check", help="verify every hash and count of a dataset, and say what is in it")
    check.add_argument("dataset", type=Path, help="folder of a build, or a manifest")
    check.add_argument("--sample", type=whole(0), metavar="N", help="verify N clips (default: all); files always are")
    check.add_argument("--json", type=Path, metavar="FILE", help="also write what is found as JSON")
    check.set_defaults(run=_check)

    compare = data.add_parser("compare", help="the clips that two datasets share, and a digest to quote")
    compare.add_argument("a", type=Path, help="folder of a build, or a manifest")
    compare.add_argument("b", type=Path, help="another")
    compare.add_argument("--out", type=Path, metavar="PREFIX", help="write the shared clips: PREFIX-a.jsonl, -b.jsonl")
    compare.set_defaults(run=_compare)

    show = data.add_parser("show", help="draw clips and what was left out as one self-contained HTML page")
    show.add_argument("dataset", type=Path, help="folder of a build, or a manifest")
    show.add_argument("--out", type=Path, required=True, help="the page to write")
    show.add_argument("--clips", type=whole(1), default=24, help="drawn at random (default %(default)s)")
    show.add_argument("--seed", type=whole(0), default=0, help="which ones (default %(default)s)")
    show.set_defaults(run=_show)


def _world(args) -> None:
    from vmm.data import world

    _generate(args, functools.partial(world.generate, missing=args.missing))


def _scenes(args) -> None:
    from vmm.data import scenes

    _generate(args, scenes.generate)


def _generate(args, generate) -> None:
    from vmm.progress import progress

    sizes = {"train": args.train, "validation": args.validation, "test": args.test}
    with progress("writing clips") as tell:
        generate(args.folder, sizes, args.seed, progress=tell)
    print(f"{args.folder}: {sum(sizes.values())} clips, {', '.join(f'{k} {v}' for k, v in sizes.items())}")


def _tokenizer(args) -> None:
    from vmm.data.manifest import read_manifest
    from vmm.data.text import train_tokenizer
    from vmm.errors import UserError

    captions = [text for row in read_manifest(args.manifest) for text in row.captions]
    if not captions:
        raise UserError(
            f"dataset {args.manifest}: no clip has a caption to train a tokenizer on; a model without text needs none"
        )
    tokenizer = train_tokenizer(captions, args.vocabulary, args.kind)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out))
    print(f"{args.out}: {tokenizer.get_vocab_size()} entries from {len(captions)} captions")


def _build(args) -> None:
    from vmm.data.building.build import Settings, build
    from vmm.data.building.classes import read_classes
    from vmm.data.building.transcode import Storage
    from vmm.data.sandbox import Limits
    from vmm.data.sources import open_source
    from vmm.progress import progress

    columns = dict(item.partition("=")[::2] for item in args.column)
    options = {
        "media": args.media,
        "label": args.label,
        "columns": columns,
        "split": args.split,
        "clips": args.clips,
        "links": args.links,
    }
    kind, entries, words = open_source(args.source, args.kind, options)
    storage = Storage(
        keep=args.keep, short_side=args.short_side, gop=args.gop, cut=args.cut, seconds=args.seconds,
        frames=args.max_frames, bytes=int(args.max_bytes),
    )  # fmt: skip
    limits = Limits(args.timeout, int(args.memory * 2**30), 2 * int(args.max_bytes))
    classes = read_classes(args.classes) if args.classes else {}
    settings = Settings(words, storage, limits, args.shard, args.budget, classes)
    spread = None
    if args.runner:
        from vmm.data.building.beam import spread_over_beam

        spread = functools.partial(spread_over_beam, str(args.out.resolve()), args.runner, args.runner_option)
    with progress(f"building from {kind}") as tell:
        told = build(entries, args.out, settings, args.workers, tell, spread)
    lost = ", ".join(f"{count} {reason}" for reason, count in told["left_out"].items()) or "none"
    print(
        f"{args.out}: {told['clips']} clips in {len(told['files']) - 4} shards; left out: {lost}; "
        f"{told['duplicates']} look like another clip"
    )
    if told.get("remarks"):
        print("stored, but not just as in the file: " + ", ".join(f"{n} {name}" for name, n in told["remarks"].items()))


def _sources(args) -> None:
    import inspect

    from vmm.data.sources import SOURCES
    from vmm.errors import UserError, one_of

    if args.name is None:
        for name, source in ((name, SOURCES.find(name)) for name in SOURCES.names()):
            print(f"{name:24}{inspect.getdoc(source).splitlines()[0]}")
        print('Media that a dataset names and you lack are left out as "missing"; --budget says how many may be.')
    elif SOURCES.find(args.name) is None:
        raise UserError(f"no source {args.name!r}: {one_of(args.name, SOURCES.names())}")
    else:
        print(f"vmm data build SOURCE OUT --kind {args.name}\n\n{inspect.getdoc(SOURCES.find(args.name))}")


def _check(args) -> None:
    import json
    import sys

    from vmm.data.inspection.check import check
    from vmm.data.inspection.survey import print_survey, survey
    from vmm.errors import StorageError, UserError
    from vmm.progress import progress

    with progress("reading") as tell:
        found = check(
            args.dataset, args.sample, progress=lambda what, done, total: tell(done, total, f"reading {what}")
        )
    told = {"dataset": str(args.dataset), "files_checked": found.files, "clips_checked": found.clips}
    if found.dataset is not None:
        numbers = survey(found.dataset)
        print_survey(str(args.dataset), numbers)
        told |= numbers
    if args.json:
        try:
            args.json.write_text(json.dumps(told | {"problems": found.problems}, indent=1) + "\n")
        except OSError as error:
            raise StorageError(f"{args.json}: cannot be written ({error.strerror})") from None
    for problem in found.problems[:20]:
        print(problem, file=sys.stderr)
    if len(found.problems) > 20:
        print(f"… and {len(found.problems) - 20} more problems", file=sys.stderr)
    if found.problems:
        count = f"{len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}"
        raise UserError(f"{args.dataset}: {count}; restore what is named above from a good copy, or build again")
    print(f"{args.dataset}: no problems; hashes of {found.files} files and {found.clips} clips verified")
    if not found.clips and found.dataset.rows and args.sample != 0:
        print("no clip has a sha256: that every file is there is all that can be said")


def _compare(args) -> None:
    from vmm.data.inspection.compare import compare, print_compared, write_common
    from vmm.data.inspection.dataset import open_dataset

    a, b = open_dataset(args.a), open_dataset(args.b)
    compared = compare(a, b)
    print_compared(a, b, compared)
    if args.out:
        for path in write_common(a, b, compared, args.out):
            print(f"{path}: {len(compared.pairs)} clips")


def _show(args) -> None:
    from vmm.data.inspection.show import show
    from vmm.progress import progress

    with progress("drawing clips") as tell:
        count, failed = show(args.dataset, args.out, args.clips, args.seed, tell)
    print(f"{args.out}: {count} clips" + (f", {failed} of them could not be decoded" if failed else ""))
