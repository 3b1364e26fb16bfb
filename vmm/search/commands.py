"""The flags of `vmm sweep`; heavy imports wait until it runs."""

from pathlib import Path

from vmm.flags import whole


def add(commands) -> None:
    """Adds `vmm sweep` to the command's subparsers."""
    sweep = commands.add_parser("sweep", help="search over a config's keys: grid, random, Bayesian")
    sweep.add_argument("config", help="configs/NAME.py, optionally NAME.py:VARIANT")
    sweep.add_argument("space", type=Path, help="what varies: a .py file with SPACE = {key: values}, or a .json object")
    sweep.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes of every trial, as steps=300"
    )
    sweep.add_argument("--out", type=Path, required=True, help="folder of the sweep; the same again goes on")
    sweep.add_argument(
        "--metric", default="loss:min", help="NAME:min or NAME:max, of training or of vmm eval (default %(default)s)"
    )
    sweep.add_argument("--method", default="bayes", help="bayes, random or grid (default %(default)s)")
    sweep.add_argument(
        "--trials", type=whole(1), default=30, help="how many (default %(default)s; a grid: at most its own)"
    )
    sweep.add_argument(
        "--parallel", type=whole(1), default=1, metavar="N", help="trials at a time (default %(default)s)"
    )
    sweep.add_argument("--prune", default="none", help="stop bad trials early: median or asha (default %(default)s)")
    sweep.add_argument("--watch", help="NAME:min or NAME:max in metrics.jsonl, to prune by (default: the metric)")
    sweep.add_argument("--seed", type=whole(0), default=0, help="of the search (default %(default)s)")
    sweep.add_argument("--print", action="store_true", help="print one `vmm train …` a trial, run nothing")
    sweep.set_defaults(run=run)


def run(args) -> None:
    """Searches; prints the table, writes best.json and the picture.

    Raises:
      UserError: as sweep.run.
    """
    import jax

    # This process looks at configs alone: the accelerators are the trials'.
    jax.config.update("jax_platforms", "cpu")
    from vmm.search import sweep as sweeping
    from vmm.search.picture import draw
    from vmm.search.space import read_space
    from vmm.search.table import show

    metric = sweeping.parse_metric(args.metric)
    watch = sweeping.parse_metric(args.watch) if args.watch else None
    sweep = sweeping.Sweep(
        args.config, read_space(args.space), args.out, tuple(args.overrides), metric, args.method, args.trials,
        args.parallel, args.prune, watch, args.seed,
    )  # fmt: skip
    if args.print:
        print("\n".join(sweeping.lines(sweep)))
        return
    trials = sweeping.run(sweep)
    show(trials, sweep.space, *metric)
    best = sweeping.write_best(sweep, trials)
    draw(trials, sweep.space, *metric, [args.out / "sweep.svg", args.out / "sweep.png"])
    print(f"{best}: the best trial's config; {args.out / 'sweep.png'}: a picture")
