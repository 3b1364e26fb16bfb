"""Fields of a config's groups: each is declared once, with its default, its documentation and what its value is made of."""

import dataclasses
import importlib
from collections.abc import Mapping

from vmm.build import LINEN, class_of, plain

_KEY = "setting"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of a field beside its type and default.

    Attributes:
      text: one line of documentation.
      group: dataclass whose fields the value has, or its import path "module:Class"; None: a value, or free keys.
      table: kind → class, where the value is {"kind": kind, **fields}.
      each: whether the value is name → such a group, of any names.
      optional: whether an empty group says that there is none of it.
      numerics: whether the numbers of a run depend on it; else it may change when a run goes on.
    """

    text: str = ""
    group: type | str | None = None
    table: Mapping[str, type] | None = None
    each: bool = False
    optional: bool = False
    numerics: bool = True

    @property
    def schema(self) -> type | None:
        """The dataclass of the group, imported where it is named by its path."""
        if not isinstance(self.group, str):
            return self.group
        module, _, name = self.group.partition(":")
        return getattr(importlib.import_module(module), name)


def setting(default=dataclasses.MISSING, text: str = "", **more) -> dataclasses.Field:
    """Returns a field of a config's group.

    Args:
      default: its value where a config gives none; of a mapping, a copy each time. Missing: a config must give it.
      text: one line of documentation.
      more: fields of Setting.
    """
    metadata = {_KEY: Setting(text, **more)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def setting_of(field: dataclasses.Field) -> Setting:
    """Returns what `setting` said of a field; of another field, nothing."""
    return field.metadata.get(_KEY, Setting())


def config_fields(cls: type) -> dict[str, dataclasses.Field]:
    """Returns the fields of a class that a config may give, by name."""
    return {field.name: field for field in dataclasses.fields(cls) if field.init and field.name not in LINEN}


def filled(cls: type, spec: Mapping, where: str = "config", leave: tuple[str, ...] = ()) -> dict:
    """Returns a group with the defaults of all that it leaves out, all the way down.

    Args:
      cls: the dataclass of the group. spec: field → value, checked before. where: its key, for error lines.
      leave: fields that are set by code and are no keys of a config.

    Raises:
      UserError: a kind that there is not.
    """
    result = {}
    for name, field in config_fields(cls).items():
        if name in leave:
            continue
        if name in spec:
            value = spec[name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            continue
        result[name] = plain(_within(setting_of(field), value, f"{where}.{name}"))
    return result


def _within(about: Setting, value, where: str):
    if not isinstance(value, Mapping) or (about.optional and not value):
        return value
    if about.each:
        one = dataclasses.replace(about, each=False)
        return {name: _within(one, item, f"{where}.{name}") for name, item in value.items()}
    if about.table is not None:
        rest = {key: item for key, item in value.items() if key != "kind"}
        return {"kind": value["kind"], **filled(class_of(about.table, value, where), rest, where, ("dtype",))}
    return filled(about.schema, value, where, ("dtype",)) if about.group is not None else value
