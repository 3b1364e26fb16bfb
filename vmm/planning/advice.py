"""What to change where a step does not fit."""

import math
from collections.abc import Iterator, Mapping


def advise(plan) -> list[str]:
    """Returns lines that say what would make a plan fit, most helpful first; [] where it fits."""
    memory, lines = plan.memory, []
    if plan.fits:
        return lines
    split = math.prod(plan.mesh[axis] for axis in ("data", "fsdp"))
    rows = plan.batch // split // plan.accumulate
    room = memory.available - memory.state - memory.program
    state = memory.parameters + memory.optimizer + memory.average
    if room > 0:
        # Temporaries grow with the clips of a part; a tenth is kept back, for what does not.
        fit = int(rows * 0.9 * room / memory.temporaries)
        if fit >= 1:
            lines.append(f"batch={fit * split * plan.accumulate}: {fit} clips a device and part instead of {rows}")
        parts = next((n for n in range(2, rows + 1) if rows % n == 0 and rows // n <= max(fit, 1)), None)
        if parts:
            lines.append(
                f"optim.accumulate={plan.accumulate * parts}: the same batch in {plan.accumulate * parts} parts"
            )
    off = [path for path, value in remat_of(plan.config) if value is not True]
    if off:
        lines.append(f"{off[0]}=True (and {len(off) - 1} more): layers compute their activations again" if len(off) > 1 else f"{off[0]}=True: layers compute their activations again")  # fmt: skip
    if plan.mesh["data"] > 1 and state > memory.available / 8:
        lines.append(
            f"mesh.fsdp={plan.mesh['fsdp'] * plan.mesh['data']} mesh.data=1: parameters and moments in as many shards"
        )
    elif state > memory.available / 2:
        lines.append("optim.offload=True: moments in the host's memory; or more chips")
    if not lines:
        lines.append("more chips, or tensor parallelism: mesh.tensor=2")
    return lines


def remat_of(config: Mapping, path: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted key, value) of every `remat` that a config sets, or leaves out beside a `scan`."""
    for key, value in config.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            if ("scan" in value or "depth" in value) and "remat" not in value and value.get("depth", 1):
                yield f"{here}.remat", False
            yield from remat_of(value, here)
        elif key == "remat":
            yield here, value
