"""Kinds of one's own: a config may name a class by its import path, kind="mypackage.fusion:MyFusion".

A config that one runs is code of one's own; that of a published folder is data, and imports nothing that its reader did
not name. What may be imported is imported once, by `admit`; building only looks up what was admitted.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from vmm.errors import UserError

VARIABLE = "VMM_PLUGINS"
_ADMITTED: dict[str, type] = {}


class Kinds(dict):
    """kind → class (of sources: function). Beside what vmm has itself, kinds of installed packages, which declare them as
    entry points of the group "vmm.<group>": `my_fusion = "my_package.fusion:MyFusion"`.

    A name of vmm's own always means vmm's own.
    """

    def __init__(self, group: str, own: Mapping):
        super().__init__(own)
        self.group = f"vmm.{group}"

    @functools.cached_property
    def _installed(self) -> dict[str, list]:
        found: dict[str, list] = {}
        for point in importlib.metadata.entry_points(group=self.group):
            found.setdefault(point.name, []).append(point)
        return found

    def names(self) -> list[str]:
        """Returns every kind: vmm's own in the table's order, then those of installed packages."""
        return [*self, *sorted(set(self._installed) - set(self))]

    def find(self, kind: str):
        """Returns what a kind names, imported where a package declares it; None: there is no such kind.

        Raises:
          UserError: two packages declare it, or its package cannot be imported.
        """
        if kind in self or kind not in self._installed:
            return self.get(kind)
        points = self._installed[kind]
        if len({point.value for point in points}) > 1:
            places = ", ".join(sorted(point.value for point in points))
            raise UserError(
                f"kind {kind!r}: two installed packages declare it in {self.group} ({places}); take one out"
            )
        try:
            return points[0].load()
        except Exception as error:  # whatever a module does while it is imported
            raise UserError(
                f"kind {kind!r}: {points[0].value}, declared in {self.group}, cannot be imported ({type(error).__name__}: "
                f"{error})"
            ) from None


def modules(config) -> list[str]:
    """Returns the modules that a config's kinds name, sorted."""
    return sorted({kind.partition(":")[0] for kind in _kinds(config)})


def admit(config, allowed: Collection[str] | None = None, folder: Path | None = None) -> None:
    """Imports the classes that a config's kinds name by import path.

    Args:
      config: nested mappings and sequences. allowed: modules, or packages with all that is in them, that may be imported,
        beside those of $VMM_PLUGINS (comma-separated); None: any, of a config of one's own.
      folder: where a config that is not one's own lies: nothing is imported from there.

    Raises:
      UserError: a module that is not allowed or cannot be imported, lies in the folder, or has no such class.
    """
    for kind in _kinds(config):
        if kind in _ADMITTED:
            continue
        module, _, name = kind.partition(":")
        if allowed is not None and not _within(module, {*allowed, *os.environ.get(VARIABLE, "").split(",")}):
            top = module.partition(".")[0]
            raise UserError(
                f"kind {kind!r}: is code of the module {module}, which a published model does not import by itself; if you "
                f'know it, allow it: vmm.load(…, plugins=("{top}",)), or {VARIABLE}={top} for commands'
            )
        try:
            if allowed is not None and folder is not None and _lies_in(module, folder):
                raise UserError(
                    f"kind {kind!r}: {module} lies in {folder} itself; a published folder is data, never code"
                )
            found = getattr(importlib.import_module(module), name)
        except AttributeError:
            raise UserError(f"kind {kind!r}: the module {module} has no {name!r}") from None
        except Exception as error:  # whatever a module does while it is imported
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"kind {kind!r}: {module} cannot be imported ({type(error).__name__}: {error}); install its package, or let "
                "PYTHONPATH name its folder"
            ) from None
        if not isinstance(found, type) or not dataclasses.is_dataclass(found):
            raise UserError(f"kind {kind!r}: {name} is no dataclass or Linen module, whose fields would be its config")
        _ADMITTED[kind] = found


def admitted(kind: str) -> type | None:
    """Returns the class of an import path that was admitted, else None."""
    return _ADMITTED.get(kind)


def _kinds(config) -> Iterator[str]:
    if isinstance(config, Mapping):
        kind = config.get("kind")
        if isinstance(kind, str) and ":" in kind:
            yield kind
        for value in config.values():
            yield from _kinds(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _kinds(value)


def _within(module: str, allowed: Collection[str]) -> bool:
    return any(name and (module == name or module.startswith(f"{name}.")) for name in allowed)


def _lies_in(module: str, folder: Path) -> bool:
    top = module.partition(".")[0]
    spec = importlib.util.find_spec(top) if top not in sys.modules else sys.modules[top].__spec__
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    return any(
        place and folder.resolve() in (Path(place).resolve(), *Path(place).resolve().parents) for place in places
    )
