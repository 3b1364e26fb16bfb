"""What a run cost: time, devices, arithmetic and an estimate of energy, from its ledger (training/ledger.py)."""

from collections.abc import Mapping, Sequence

from vmm.training.ledger import totals

# Part of a device's kind → watts of one device as JAX counts them; the longest that fits counts. GPUs: thermal design
# power of NVIDIA's data sheets. TPU v2, v3: that of Jouppi et al. 2021 (table 1), two devices a chip; v4: the highest
# measured by Jouppi et al. 2023 (table 4). Of later TPUs nothing is published.
WATTS = {
    "A100-SXM": 400.0,
    "A100-PCIE-40GB": 250.0,
    "A100 80GB PCIe": 300.0,
    "H100 80GB HBM3": 700.0,
    "H100 PCIe": 350.0,
    "H200": 700.0,
    "H200 NVL": 600.0,
    "B200": 1000.0,
    "TPU v2": 140.0,
    "TPU v3": 225.0,
    "TPU v4": 192.0,
}


def watts_of(kind: str) -> float | None:
    """Returns the power of one device of a kind, None where it is not known."""
    names = [name for name in WATTS if name in kind]
    return WATTS[max(names, key=len)] if names else None


def describe(rows: Sequence[Mapping]) -> list[tuple[str, str]]:
    """Returns (what, how much) lines of a card, from the lines of a goodput.jsonl; what is not recorded is said so."""
    if not rows:
        return [("time, devices, energy", "unknown: the run kept no ledger")]
    seconds = totals(rows)
    wall, held = sum(seconds.values()), sum(seconds.values()) - seconds["down"]
    starts = "1 start" if len(rows) == 1 else f"{len(rows)} starts"
    told = [
        ("time", f"{hours(wall)} in {starts}, {seconds['steps'] / max(wall, 1e-9):.0%} of it in steps that counted"),
        ("devices", _devices(rows)),
    ]
    flops = [row.get("flops") for row in rows]
    done = max(row["step"] for row in rows)
    if flops[-1]:
        total = flops[-1] * done
        told.append(("arithmetic", f"{total:.3g} FLOPs: {flops[-1]:.3g} a step in matrix products × {done} steps"))
    else:
        told.append(("arithmetic", "unknown: not recorded"))
    return [*told, ("energy", energy(rows, held))]


def hours(seconds: float) -> str:
    """Returns a length of time for people."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def energy(rows: Sequence[Mapping], held: float) -> str:
    """Returns the energy of the devices, an estimate: their number × power by data sheet × the time they were held.

    held: seconds of all attempts, without the time between them.
    """
    joules, kinds = 0.0, []
    for row in rows:
        kind = row.get("device")
        if kind is None:
            return "unknown: the run did not record its devices"
        watts = watts_of(kind)
        if watts is None:
            return f"unknown: the power of {kind!r} is not known here; its devices were held for {hours(held)}"
        joules += row["devices"] * watts * sum(row["seconds"].values())
        kinds.append(f"{kind} at {watts:g} W")
    return (
        f"about {joules / 3.6e6:.3g} kWh, an estimate: devices ({', '.join(dict.fromkeys(kinds))}, by data sheet) × the time "
        f"they were held ({hours(held)}); without hosts, network and cooling"
    )


def _devices(rows: Sequence[Mapping]) -> str:
    told = [f"{row['devices']} × {row['device']}" for row in rows if "device" in row]
    return ", then ".join(dict.fromkeys(told)) or "unknown: not recorded"
