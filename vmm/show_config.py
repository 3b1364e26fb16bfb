"""vmm config: what a config says once its defaults are filled in, how two differ, and what a key means."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence

from vmm.build import class_of, differences, load_config, shown
from vmm.config import Config, full
from vmm.errors import UserError, one_of
from vmm.settings import Setting, config_fields, setting_of


def resolved(reference: str, overrides: Sequence[str] = ()) -> dict:
    """Returns a config with the defaults of all that it leaves out. Arguments: as of build.load_config.

    Raises:
      UserError: a key, kind or value that is wrong.
    """
    from vmm.experiment import Experiment

    config = load_config(reference, overrides)
    Experiment(config)  # checks it
    return full(config)


def lines_of(config: Mapping, given: Mapping = {}, prefix: str = "") -> list[str]:
    """Returns "a.b.c=value" of every leaf, as `vmm train` takes it; those that `given` lacks are marked as defaults."""
    lines = []
    for key, value in config.items():
        own = given.get(key) if isinstance(given, Mapping) else None
        if isinstance(value, Mapping) and value:
            lines += lines_of(value, own or {}, f"{prefix}{key}.")
        else:
            told = isinstance(given, Mapping) and key in given
            lines.append(f"{prefix}{key}={shown(value)}" + ("" if told else "  # default"))
    return lines


def compared(one: str, two: str) -> list[str]:
    """Returns "key: value of one → value of two" for every leaf in which two configs differ, defaults filled in."""
    return differences(resolved(two), resolved(one))


def explain(key: str, config: Mapping | None = None) -> str:
    """Returns what a key is: its type, default, meaning, and who declares it.

    Args:
      key: as "optim.ema"; below a name that the config does not have, a kind: "objectives.contrastive.pairs".
      config: what names stand for; None: kinds alone.

    Raises:
      UserError: there is no such key.
    """
    owner, about, above, value, numerics = Config, Setting(group=Config), "config", config, True
    parts, field = key.split("."), None
    while parts:
        part = parts.pop(0)
        if about.each:  # a name of the config's, or a kind
            spec = value.get(part) if isinstance(value, Mapping) else None
            owner = _kind(about.table, spec if isinstance(spec, Mapping) else {"kind": part}, f"{above}.{part}")
            about, value, above, field = Setting(group=owner), spec, f"{above}.{part}", None
            continue
        if about.table is not None and (part in about.table or value is None):
            owner = _kind(about.table, {"kind": part}, f"{above}.{part}")
            about, value, above, field = (
                Setting(group=owner),
                value if isinstance(value, Mapping) else None,
                f"{above}.{part}",
                None,
            )
            if parts:
                continue
            break
        owner = _kind(about.table, value, above) if about.table is not None else about.schema
        if owner is None:
            raise UserError(f"{key}: {above} has no keys that are declared; its value is free")
        known = config_fields(owner)
        if part not in known:
            raise UserError(f"{key}: {above} has no key {part!r}; {one_of(part, known)}")
        field, about, above = known[part], setting_of(known[part]), f"{above}.{part}"
        numerics = numerics and about.numerics
        value = value.get(part) if isinstance(value, Mapping) else None
    if field is None:
        return "\n".join([f"{key}: {owner.__name__}", "", inspect.getdoc(owner) or ""])
    hint = typing.get_type_hints(owner)[field.name]
    lines = [f"{key}: {_type(hint)}, {_default(field)}"]
    if about.text:
        lines.append(about.text)
    lines.append(
        "The numbers of a run depend on it."
        if numerics
        else "It may change when a run goes on: its numbers do not depend on it."
    )
    inside = about.schema
    if about.table is not None:
        lines.append(f"Kinds: {', '.join(sorted(about.table))}.")
    elif inside is not None:
        lines.append(f"Keys: {', '.join(config_fields(inside))}.")
    lines.append(f"Declared by {owner.__module__}.{owner.__name__}.")
    if not about.text:
        lines += ["", inspect.getdoc(owner) or ""]
    return "\n".join(lines)


def _kind(table: Mapping[str, type] | None, spec, where: str) -> type:
    if table is None:
        raise UserError(f"{where}: is free, no key is declared below it")
    return class_of(table, spec, where)


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"default {shown(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f"default {shown(field.default_factory())}"
    return "a config must give it"


def _type(hint) -> str:
    return hint.__name__ if type(hint) is type else str(hint).replace("typing.", "").replace("collections.abc.", "")
