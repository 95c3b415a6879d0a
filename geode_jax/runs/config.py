"""From a configuration to checked `Settings`: of a file in `configs`, or of a run's `config.json`.

This is the one place that reads a ConfigDict.
"""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from geode_jax.errors import UserError
from geode_jax.exports.files import read_json_object
from geode_jax.runs.settings import Settings, refusal
from geode_jax.runs.summary import SUMMARY
from geode_jax.runs.systems import SYSTEMS
from geode_jax.training.checkpoint_files import has_model
from geode_jax.training.metrics import write_json

CONFIG = "config.json"
_SECTIONS = ("data", "model", "loss", "optimizer", "train", "eval")


def make_settings(config: ml_collections.ConfigDict) -> Settings:
    """Returns the settings that a configuration asks for.

    Args:
        config: of a file in `configs`.

    Raises:
        UserError: a field is unknown, missing, of another type, or breaks its rule.
    """
    values = config.to_dict()
    if values.get("system") not in SYSTEMS:
        known = ", ".join(SYSTEMS)
        raise UserError(f"config: system: {values.get('system')!r} is not one of {known}")
    settings = _settings_of(values, strict=True)
    plain = json.loads(json.dumps(values))  # as it is read back: lists in place of tuples
    return dataclasses.replace(settings, values=plain)


def load_settings(workdir: Path) -> Settings:
    """Returns the settings that a run was started with.

    A field that the run was saved without has the value that runs had before the field existed.

    Raises:
        UserError: the folder is no run, or the file is damaged.
    """
    path = workdir / CONFIG
    if not path.exists():
        if is_begun(workdir):
            raise UserError(
                f"{path}: missing, though the folder has a run's checkpoints or summary: put the "
                "file back from a copy, or use another --workdir"
            )
        raise UserError(f"{path}: no run was started in this folder")
    values = read_json_object(path)
    if values.get("system") not in SYSTEMS:
        raise UserError(f"{path}: system: must be one of {', '.join(SYSTEMS)}")
    for name in _SECTIONS:
        if not isinstance(values.get(name), dict):
            raise UserError(f"{path}: {name}: must be an object")
    try:
        settings = _settings_of(values, strict=False)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return dataclasses.replace(settings, values=values)


def save_settings(settings: Settings, workdir: Path) -> None:
    """Writes the configuration beside the run, for `ask` and for readers of the results."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / CONFIG, dict(settings.values))


def is_begun(workdir: Path) -> bool:
    """Returns whether a folder holds a run, or the rest of one without its `config.json`."""
    return (workdir / CONFIG).exists() or (workdir / SUMMARY).exists() or has_model(workdir)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a tree of dicts as one dict, with names such as `data/root`."""
    out = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}/")
        else:
            out[prefix + name] = value
    return out


# --- From values to dataclasses -------------------------------------------------------------------


def _settings_of(values: Mapping[str, Any], *, strict: bool) -> Settings:
    system = SYSTEMS[values["system"]]
    return _section(system.settings, {**values, "system": system}, "", strict)


def _section(cls: type, values: Mapping[str, Any], prefix: str, strict: bool) -> Any:
    """Returns a dataclass made from the values of its fields.

    Args:
        cls: the dataclass.
        values: field -> value.
        prefix: of the fields' names, as "data.".
        strict: unknown fields are refused, and not left out.

    Raises:
        UserError: a field is unknown, missing, or of another type.
    """
    fields = _fields(cls)
    unknown = [name for name in values if name not in fields]
    if unknown and strict:
        raise UserError(f"config: {prefix}{unknown[0]}: no such field")
    found = {}
    for name, (kind, required) in fields.items():
        if name in values:
            found[name] = _value(kind, values[name], prefix + name, strict)
        elif required:
            raise UserError(f"config: {prefix}{name}: missing")
    return cls(**found)


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """Returns the fields of a dataclass: name -> (type, whether it has no default)."""
    kinds = typing.get_type_hints(cls, include_extras=True)
    kinds["system"] = Any  # was looked up before
    nothing = dataclasses.MISSING
    return {
        f.name: (kinds[f.name], f.default is nothing and f.default_factory is nothing)
        for f in dataclasses.fields(cls)
        if f.name != "values"
    }


def _value(kind: Any, value: Any, name: str, strict: bool) -> Any:
    """Returns a value as a field's type has it: tuples in place of lists, sections as dataclasses.

    Raises:
        UserError: the value is of another type.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise refusal(name, value, "a section of fields")
        return _section(typing.cast(type, kind), value, f"{name}.", strict)
    words = ""
    if typing.get_origin(kind) is typing.Annotated:
        kind, words = typing.get_args(kind)
    if not _is_of(kind, value):
        raise refusal(name, value, words or _words(kind))
    return tuple(value) if isinstance(value, list) else value


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def _is_of(kind: Any, value: Any) -> bool:
    """Returns whether a value is of a type; a whole number is a number, True and False are none."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is typing.Literal:
        return isinstance(value, str) and value in parts
    if origin is types.UnionType:
        return any(_is_of(part, value) for part in parts)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        if parts[1:] == (...,):
            return all(_is_of(parts[0], x) for x in value)
        return len(value) == len(parts) and all(map(_is_of, parts, value))
    if origin is not None:  # a Mapping
        return isinstance(value, dict) and all(_is_of(parts[1], x) for x in value.values())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _words(kind: Any) -> str:
    """Returns the name of a type in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(parts)}"
    if origin is tuple:
        return f"a list, each {_words(parts[0])}"
    return _WORDS[kind] if origin is None else f"a section, each field {_words(parts[1])}"
