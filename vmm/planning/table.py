"""A plan as tables on a terminal."""

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vmm.planning.plan import Plan, grouped


def size(count: float) -> str:
    """Bytes for people: "1.50 GB"."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.2f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for people: "12.3 ms"."""
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.3g} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.3g} µs"
    )


def show(plan: Plan, console: Console | None = None) -> None:
    """Prints a plan."""
    console = console or Console(highlight=False, width=None if Console().is_terminal else 120)
    mesh = " × ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1) or "one device"
    devices, m = plan.target.devices, plan.memory
    console.print(f"[bold]{plan.target.describe()}[/bold]")
    console.print(
        f"mesh {mesh}; batch {plan.batch} = {plan.batch / devices:g} clips a device"
        + (f", in {plan.accumulate} parts" if plan.accumulate > 1 else "")
        + f"; {plan.parameters / 1e6:.1f} M parameters; compiled in {plan.seconds:.0f} s, {plan.processor:.0f} of processor time",
        soft_wrap=True,
    )
    table = Table("memory of a device", "bytes", "share", title=None)
    for name in ("parameters", "optimizer", "average", "rest", "batch", "padding", "temporaries", "program"):
        value = getattr(m, name)
        if value or name in ("parameters", "optimizer", "batch", "temporaries"):
            label = "activations, gradients, gathered parameters" if name == "temporaries" else name
            table.add_row(label, size(value), f"{value / m.available:.1%}")
    verdict = "fits" if plan.fits else "[red]does not fit[/red]"
    table.add_row(
        "[bold]peak[/bold]", f"{size(m.peak)} of {size(m.available)}", f"{m.peak / m.available:.1%}, {verdict}"
    )
    if m.host:
        table.add_row("in the host's memory", size(m.host), "")
    console.print(table)
    if plan.whole:
        _exchanges(plan, console)
        _roofline(plan, console)
    else:
        console.print("[red]XLA found no room for the step[/red]: exchanges and traffic are not known")
    for line in plan.findings:
        console.print(f"[yellow]lint[/yellow] {escape(line)}", soft_wrap=True)
    if plan.whole and not plan.findings:
        console.print("lint: no activation gathered, no parameter above 1 MB whole under fsdp, exchanges as expected")
    for line in plan.advice:
        console.print(f"[red]to fit[/red] {escape(line)}", soft_wrap=True)


def _exchanges(plan: Plan, console: Console) -> None:
    rows = grouped(plan)
    if not rows:
        return
    table = Table("exchange", "of", "axis", "runs a step", "sent by a device")
    for row in rows:
        if row["bytes"] >= 1e-3 * rows[0]["bytes"]:
            table.add_row(row["kind"], row["of"], "+".join(row["axes"]), f"{row['count']:g}", size(row["bytes"]))
    console.print(table)
    table = Table("axis", "sent", "closed form", "ratio")
    for axis, row in plan.ratios.items():
        ratio = "–" if math.isinf(row["ratio"]) else f"{row['ratio']:.2f}"
        table.add_row(axis, size(row["sent"]), size(row["expected"]), ratio)
    console.print(table)


def _roofline(plan: Plan, console: Console) -> None:
    t, chip = plan.times, plan.target.chip
    table = Table("roofline", "amount a device", "speed", "time")
    table.add_row(
        "compute",
        f"{plan.flops / plan.target.devices / 1e12:.3g} TFLOP",
        f"{chip.peak / 1e12:g} TFLOP/s",
        duration(t.compute),
    )
    table.add_row("main memory", size(plan.traffic), f"{size(chip.bandwidth)}/s", duration(t.memory))
    if plan.exchanges:
        table.add_row("links", size(t.links * chip.link), f"{size(chip.link)}/s a link, in effect", duration(t.links))
    if t.network:
        table.add_row("network", size(t.network * chip.network), f"{size(chip.network)}/s", duration(t.network))
    console.print(table)
    console.print(
        f"bound by [bold]{t.bound}[/bold]: a step takes at least {duration(t.step)} (without any overlap {duration(t.apart)}): "
        f"MFU at most {plan.utilisation:.1%}, {plan.clips:.0f} clips/s, {plan.days:.2f} days for {plan.steps} steps"
    )
