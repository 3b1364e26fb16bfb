"""The sizes that a config claims: none that makes no sense, and none that the weights beside it cannot have.

A published config is data of whoever wrote it; what it claims is held against the shapes of its tensors before a model
is built, as building alone takes memory and time that grow with them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

from vmm.errors import UserError

# Fields that count layers, of which each has tensors; and such as are the length of an axis of some tensor.
_LAYERS = ("depth", "layers", "temporal_depth")
_AXES = ("width", "heads", "vocabulary", "classes", "rank", "latents", "bottlenecks", "registers", "prototypes",
         "participants", "bins")  # fmt: skip
_POSITIVE = ("heads", "bins", "rank", "tubelet", "patch", "hop")
_WHOLE, _REAL, _DEEPEST = 2**53, 3e38, 10_000  # whole numbers of any machine; float32; layers that anybody trains
_SMALL, _SHALLOW, _OTHER = 1024, 48, 2**20  # what costs nothing, and is told of no one
_TABLE = 2**29  # numbers in a table that is made while a model is built: 2 GiB


def _numbers(spec, where: str) -> Iterator[tuple[str, str, int | float]]:
    """Yields (where it stands, the nearest key, number) of all numbers in a group."""
    # A stack, not recursion: how deep a config goes is also its writer's choice.
    waiting = [(where, where.rpartition(".")[2], spec)]
    while waiting:
        place, key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting.extend((f"{place}.{name}", str(name), item) for name, item in value.items())
        elif isinstance(value, (list, tuple)):
            waiting.extend((f"{place}[{i}]", key, item) for i, item in enumerate(value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield place, key, value


def _short(value: int | float) -> str:
    """A number for an error line: of a whole one with more digits than can be read, how many it has."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    return repr(value)


def check_numbers(spec, where: str) -> None:
    """Raises UserError: a number of a config that is not finite, or beyond what machines hold, or a size below 1."""
    for place, key, value in _numbers(spec, where):
        if isinstance(value, int) and abs(value) > _WHOLE:
            raise UserError(f"{place}: {_short(value)} is too large")
        if not math.isfinite(value):
            raise UserError(f"{place}: must be finite, got {value}")
        if abs(value) > _REAL:
            raise UserError(f"{place}: {value} is beyond float32")
        if key in _LAYERS and value > _DEEPEST:
            raise UserError(f"{place}: {value} layers; at most {_DEEPEST:,}")
        if key in _AXES and value >= 2**31:
            raise UserError(f"{place}: {value}; an axis has fewer than 2³¹ places")
        least = 1 if key in _POSITIVE else 0 if key in _LAYERS + _AXES else None
        if least is not None and value < least:
            raise UserError(f"{place}: must be at least {least}, got {value}")


def check_claims(model: Mapping, shapes: Iterable[tuple], scanned: Iterable[int], where: str) -> None:
    """Holds the sizes in a model's config against the tensors that came with it.

    Args:
      model: {"trunk", "objectives", …}. shapes: of the tensors. scanned: lengths of axes that count layers. where: the file.

    Raises:
      UserError: as check_numbers, or a size that no tensor has.
    """
    shapes = list(shapes)
    longest = max((extent for shape in shapes for extent in shape), default=0)
    layers = max([len(shapes), *scanned])
    for part in ("trunk", "objectives"):
        check_numbers(model.get(part), f"{where}: {part}")
        for place, key, value in _numbers(model.get(part), f"{where}: {part}"):
            if key in _LAYERS and value > max(layers, _SHALLOW):
                raise UserError(f"{place}: {value} layers, but the weights beside it are {len(shapes)} tensors")
            if key in _AXES and value > max(longest, _SMALL):
                raise UserError(f"{place}: {value}, but no tensor of the weights beside it is longer than {longest}")
            if abs(value) > max(longest, _OTHER):
                raise UserError(f"{place}: {value} is larger than anything in the weights beside it")


def check_table(what: str, *extents: int) -> None:
    """Raises UserError: a table of these extents would be too large to make while a model is built."""
    if math.prod(extents) > _TABLE:
        raise UserError(
            f"{what}: {' × '.join(str(extent) for extent in extents)} numbers, more than {_TABLE:,}; use shorter or "
            "smaller clips, or larger patches"
        )
