"""What a search may vary: dotted config key → its values."""

import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vmm.build import build, plain
from vmm.errors import UserError
from vmm.foreign import parse_json


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values, of any kind a config takes."""

    values: tuple

    def check(self, where: str) -> None:
        """Raises UserError if there is nothing to choose from."""
        if not self.values:
            raise UserError(f"{where}: holds no value; list those to try")

    def draw(self, rng: np.random.Generator):
        """Returns a random value."""
        return self.values[int(rng.integers(len(self.values)))]

    def grid(self, where: str) -> tuple:
        """Returns the values of a grid search."""
        return self.values


class _Range:
    """What ranges share: low ≤ value ≤ high; points: how many a grid takes of it."""

    def check(self, where: str) -> None:
        """Raises UserError if the range is empty or cannot be drawn from."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(f"{where}: low {self.low} must be below high {self.high}, both finite")
        if self.logarithmic and self.low <= 0:
            raise UserError(f"{where}: a logarithm needs low above 0, got {self.low}")
        if self.points and self.points < 2:
            raise UserError(f"{where}.points: at least 2, got {self.points}")

    def at(self, share: float) -> float:
        """Returns the value at a share of the range: 0 is low, 1 is high."""
        if self.logarithmic:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return min(max(value, self.low), self.high)

    def grid(self, where: str) -> tuple:
        """Returns `points` values, low and high among them; raises UserError if their number is not given."""
        if not self.points:
            raise UserError(f"{where}: a grid needs points=N, or a list of values in place of the range")
        return tuple(dict.fromkeys(self._neat(self.at(share)) for share in np.linspace(0, 1, self.points)))

    def _neat(self, value: float) -> float:
        """Returns 0.0001 for 0.00010000000000000009: logarithms and exponentials leave dust in the last digits."""
        return min(max(float(f"{value:.12g}"), self.low), self.high) if isinstance(value, float) else value

    def draw(self, rng: np.random.Generator):
        """Returns a random value."""
        return self.at(rng.random())


@dataclasses.dataclass(frozen=True)
class Uniform(_Range):
    """A number, every one as likely."""

    low: float
    high: float
    points: int = 0
    logarithmic = False


@dataclasses.dataclass(frozen=True)
class Log(_Range):
    """A number above 0, every order of magnitude as likely."""

    low: float
    high: float
    points: int = 0
    logarithmic = True


@dataclasses.dataclass(frozen=True)
class Int(_Range):
    """A whole number, both ends among them; log: every order of magnitude as likely."""

    low: int
    high: int
    log: bool = False
    points: int = 0

    @property
    def logarithmic(self) -> bool:
        """Whether shares of the range are of its logarithm."""
        return self.log

    def at(self, share: float) -> int:
        """Returns the value at a share of the range."""
        # Half a step beyond the ends: they are as likely as the others.
        wide = (Log if self.log else Uniform)(self.low - 0.5, self.high + 0.5)
        return min(max(math.floor(wide.at(share) + 0.5), self.low), self.high)


DOMAINS = {"choice": Choice, "uniform": Uniform, "log": Log, "int": Int}
Domain = Choice | Uniform | Log | Int
Space = Mapping[str, Domain]


def make_space(spec: Mapping) -> dict[str, Domain]:
    """Returns the space of key → list of values, or dict(kind="log", low=…, high=…) and its like.

    Raises:
      UserError: nothing varies, an unknown kind or field, an empty list or range.
    """
    if not isinstance(spec, Mapping) or not spec:
        raise UserError(
            'space: empty; give key → values, as {"optim.learning_rate": dict(kind="log", low=1e-4, high=1e-2)}'
        )
    space = {}
    for key, value in plain(spec).items():
        where = f"space.{key}"
        if isinstance(value, tuple):
            value = dict(kind="choice", values=value)
        space[key] = build(DOMAINS, value, where)
        space[key].check(where)
    return space


def read_space(path: Path) -> dict[str, Domain]:
    """Reads a space: a .json file of one object, or a .py file with `SPACE`, a dict.

    Raises:
      UserError: no such file, no JSON, no SPACE; or as make_space.
    """
    if not path.is_file():
        raise UserError(f"space {path}: no such file; it is a .json object or a .py file with SPACE = {{key: values}}")
    if path.suffix == ".json":
        try:
            return make_space(parse_json(path.read_text(encoding="utf-8-sig")))
        except ValueError as error:
            raise UserError(f"space {path}: not valid JSON ({error})") from None
    spec = importlib.util.spec_from_file_location("vmm_space", path)
    if spec is None:
        raise UserError(f"space {path}: must be a .json or a .py file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "SPACE"):
        raise UserError(f"space {path}: defines no SPACE = {{key: values}}")
    return make_space(module.SPACE)


def grid(space: Space) -> list[dict]:
    """Returns every combination, the last key varying first; raises UserError where a range has no points."""
    columns = [domain.grid(f"space.{key}") for key, domain in space.items()]
    return [dict(zip(space, values)) for values in itertools.product(*columns)]


def overrides(parameters: Mapping) -> list[str]:
    """Returns the parameters as "dotted.key=value" strings, which load_config reads back to the same values."""
    return [f"{key}={value!r}" for key, value in parameters.items()]


def corners(space: Space) -> list[dict]:
    """Returns parameters that show every value of a choice and both ends of a range: the first of all, then one changed."""
    ends = {
        key: domain.values if isinstance(domain, Choice) else (domain.low, domain.high) for key, domain in space.items()
    }
    first = {key: values[0] for key, values in ends.items()}
    return [first, *(first | {key: value} for key, values in ends.items() for value in values[1:])]


def text(value) -> str:
    """Returns a value as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def words(parameters: Mapping, keys: Sequence[str] | None = None) -> str:
    """Returns "key=value" of parameters, each key by its last part where that is its alone."""
    keys = list(parameters) if keys is None else keys
    last = [key.rpartition(".")[2] for key in keys]
    return " ".join(
        f"{short if last.count(short) == 1 else key}={text(parameters[key])}" for key, short in zip(keys, last)
    )
