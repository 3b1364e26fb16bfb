"""The flags of `vmm plan`; heavy imports wait until it runs."""

from pathlib import Path

from vmm.flags import number, whole


def add(commands) -> None:
    """Adds `vmm plan` to the command's subparsers."""
    plan = commands.add_parser("plan", help="what a train step takes on a machine that is not there")
    plan.add_argument("config", help="configs/NAME.py, optionally NAME.py:VARIANT")
    plan.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes, as batch=2048")
    plan.add_argument("--device", required=True, help="v5e-256, v5p-512, v6e:8x8, tpu7x-128, h200-8x4, cpu-8, …")
    plan.add_argument(
        "--slices", type=whole(1), default=1, help="slices (or nodes) of that device (default %(default)s)"
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    plan.add_argument("--hlo", type=Path, metavar="FILE", help="also write the compiled program there, as text")
    plan.add_argument(
        "--quick",
        action="store_true",
        help="compile with less effort: a third of the time, but activations and memory traffic come out high",
    )
    plan.add_argument(
        "--search", action="store_true", help="look for batch, mesh, remat, accumulation: the fastest that fits"
    )
    plan.add_argument("--minutes", type=number(0), default=20.0, help="of a search at most (default %(default)s)")
    plan.add_argument(
        "--tries", type=whole(1), default=4, help="programs that a search compiles at most (default %(default)s)"
    )
    plan.set_defaults(run=run)


def run(args) -> None:
    """Plans, prints, writes.

    Raises:
      UserError: no such device, config or compiler.
    """
    import json

    from vmm.build import write_text
    from vmm.planning.chips import parse_device
    from vmm.planning.topology import prepare

    target = parse_device(args.device, args.slices)
    prepare(target)
    from vmm.build import load_config
    from vmm.planning.plan import as_json, plan
    from vmm.planning.search import search
    from vmm.planning.table import show
    from vmm.progress import progress

    config, every = load_config(args.config, args.overrides), ()
    if args.search:
        result, every = search(config, target, minutes=args.minutes, tries=args.tries, quick=args.quick)
    else:
        with progress(f"compiling {args.config} for {args.device}"):
            result = plan(config, target, args.quick, args.hlo)
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.json, json.dumps(as_json(result, every), indent=1) + "\n")
