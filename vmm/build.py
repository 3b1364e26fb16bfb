"""Config → object: load a config file, override its keys, build what a `kind` names, save it as JSON."""

import ast
import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import sys
import typing
from collections.abc import Mapping
from pathlib import Path

from beartype import BeartypeConf
from beartype.door import is_bearable

from vmm.errors import UserError, one_of
from vmm.foreign import parse_json
from vmm.paths import is_remote, to_path
from vmm.plugins import Kinds, admit, admitted

# An int is welcome where a float is asked for (PEP 484's numeric tower).
_TYPES = BeartypeConf(is_pep484_tower=True)
LINEN = ("parent", "name")  # fields of every Linen module


def make(cls: type, spec: Mapping, where: str, **given):
    """Returns cls(**spec, **given); the dataclass fields of cls are the schema of the spec.

    Args:
      cls: a dataclass (every Linen module is one).
      spec: field → value, from a config; must not name what is in `given`.
      where: the config key that holds the spec, for the error line.
      given: further fields, set by code.

    Raises:
      UserError: an unknown key, a missing one, or a value of another type.
    """
    if not isinstance(spec, Mapping):
        raise UserError(f"{where}: expected a group of keys, got {shown(spec)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in LINEN}
    known = [name for name in fields if name not in given]
    hints = typing.get_type_hints(cls)
    for key, value in spec.items():
        if key not in known:
            raise UserError(f"{where}.{key}: no such key; {one_of(key, known)}")
        if not _fits(value, hints[key]):
            expected = getattr(hints[key], "__name__", str(hints[key]))
            raise UserError(f"{where}.{key}: expected {expected}, got {shown(value)}")
    for name in known:
        field = fields[name]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in spec:
            raise UserError(f"{where}.{name}: missing; give it a value in the config")
    return cls(**spec, **given)


def shown(value) -> str:
    """A value in one line: Linen holds groups in dicts whose repr has several."""
    return " ".join(repr(value).split())


def _fits(value, hint) -> bool:
    """Whether a value is of a type; beartype looks at one random item of a container, this at all."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and inner[-1:] == (...,) and isinstance(value, tuple):
        return all(_fits(item, inner[0]) for item in value)
    if origin is Mapping and isinstance(value, Mapping):
        return all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items())
    return is_bearable(value, hint, conf=_TYPES)


def build(table: Mapping[str, type], spec: Mapping, where: str, **given):
    """Returns table[kind](**fields) for spec = {"kind": kind, **fields}.

    Raises:
      UserError: as `make` or `class_of`.
    """
    cls = class_of(table, spec, where)
    return make(cls, {key: value for key, value in spec.items() if key != "kind"}, where, **given)


def class_of(table: Mapping[str, type], spec: Mapping, where: str) -> type:
    """Returns what the kind of a spec names: an entry of the table, or a class by its import path (plugins.py).

    Raises:
      UserError: there is no such kind (the line lists the kinds).
    """
    if not isinstance(spec, Mapping) or "kind" not in spec:
        raise UserError(f"{where}.kind: missing; {one_of('', names_of(table))}")
    kind = spec["kind"]
    find = table.find if isinstance(table, Kinds) else table.get
    found = (find(kind) or admitted(kind)) if isinstance(kind, str) else None
    if found is None:
        raise UserError(
            f'{where}.kind: unknown kind {shown(kind)}; {one_of(kind, names_of(table))}; or one of yours: "package.module:Class"'
        )
    return found


def names_of(table: Mapping) -> list[str]:
    """Returns the kinds of a table, of installed packages too."""
    return table.names() if isinstance(table, Kinds) else sorted(table)


def plain(value):
    """Returns the value with mappings as dicts and sequences as tuples, all the way down."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    return value


def load_config(
    reference: str, overrides: typing.Sequence[str] = (), plugins: typing.Collection[str] | None = None
) -> dict:
    """Reads a config, applies overrides, and imports what its kinds name by import path.

    Args:
      reference: path of a Python file with `get_config(variant="")`, optionally followed by
        `:variant`, or of a JSON file that `save_config` wrote.
      overrides: "dotted.key=value" strings; values are Python literals, else strings. "~dotted.key" takes a key out.

      plugins: modules that may be imported for that, see plugins.admit; None: any, it is a config of one's own.

    Returns:
      The config as nested dicts and tuples.

    Raises:
      UserError: no such file, an override that is not key=value or reaches into a value, or nothing to take out.
    """
    path, _, variant = (reference, "", "") if is_remote(reference) else reference.partition(":")
    file = to_path(path)
    if not file.is_file():
        near = sorted(str(p) for p in Path("configs").glob("*.py") if p.stem != "common")
        raise UserError(f"config {path}: no such file; {one_of(path, near)}")
    if file.suffix == ".json":
        try:
            config = plain(parse_json(file.read_text(encoding="utf-8-sig")))
        except ValueError as error:
            raise UserError(f"config {path}: not valid JSON ({error})") from None
    else:
        try:
            config = plain(_run(file).get_config(variant))
        except ValueError as error:  # what a config says of a variant that it has not
            raise UserError(f"config {reference}: {error}") from None
    for override in overrides:
        _override(config, override)
    admit(config, plugins, file.parent if file.suffix == ".json" else None)
    return config


def _run(file: Path):
    # Configs may import their folder's common.py, and nothing of it may stay behind: two
    # folders may both hold a common.py.
    spec = importlib.util.spec_from_file_location(f"vmm_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and Path(origin).resolve().parent == file.parent.resolve():
                del sys.modules[name]
    if not hasattr(module, "get_config"):
        raise UserError(f"config {file}: defines no get_config(variant)")
    return module


def _remove(config: dict, override: str) -> None:
    *groups, last = override[1:].split(".")
    group = config
    for depth, name in enumerate((*groups, last)):
        if not isinstance(group, dict) or name not in group:
            above = ".".join(groups[:depth]) or "the config"
            hint = one_of(name, group) if isinstance(group, dict) else f"it is a value ({group!r})"
            raise UserError(f"{override}: nothing to take out: {above} has no key {name!r}; {hint}")
        if depth < len(groups):
            group = group[name]
    del group[last]


def _override(config: dict, override: str) -> None:
    if override.startswith("~"):
        return _remove(config, override)
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(
            f"{override}: an override is written key=value, as in optim.learning_rate=3e-4, or ~key to take a key out"
        )
    *groups, last = key.split(".")
    group = config
    for depth, name in enumerate(groups):
        # A group or key that the file leaves to its defaults may be named; whether it exists is
        # for the schema to say, with the list of what does.
        if group.get(name) == "auto":  # what was left to be chosen is now told
            group[name] = {}
        group = group.setdefault(name, {})
        if not isinstance(group, dict):
            raise UserError(f"{override}: {'.'.join(groups[: depth + 1])} is a value ({group!r}), not a group of keys")
    try:
        value = plain(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    group[last] = value


def save_config(config: Mapping, path: Path) -> None:
    """Writes the config as JSON, whole or not at all."""
    write_text(path, json.dumps(config, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file through a temporary neighbour, so that a reader never sees half of it."""
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def digest(value) -> str:
    """Returns a short hash of a config or of any JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def differences(ours: Mapping, theirs: Mapping, prefix: str = "") -> list[str]:
    """Returns "key: theirs → ours" for every leaf in which two configs differ."""
    lines = []
    for key in sorted(set(ours) | set(theirs)):
        one, two = ours.get(key), theirs.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            lines += differences(one, two, f"{prefix}{key}.")
        elif one != two:
            lines.append(f"{prefix}{key}: {two!r} → {one!r}")
    return lines
