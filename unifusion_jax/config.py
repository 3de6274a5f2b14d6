"""From command-line configs to frozen dataclasses: unknown keys and wrong types are refused with the nearest valid name."""

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections
from absl import app, flags
from ml_collections import config_flags

T = TypeVar("T")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses a command line for `absl.app.run`; a `--config.key` that does not exist ends in one line and exit status 2."""
    try:
        return app.parse_flags_with_usage(argv)
    except (KeyError, AttributeError, TypeError):
        problems = _misspelt(argv)
        if not problems:
            raise
        sys.stderr.writelines(f"--{key} cannot be set: {problem}\n" for key, problem in problems.items())
        sys.exit(2)


def _misspelt(argv: list[str]) -> dict[str, str]:
    """Looks for the keys of a command line in its config file, read without them; returns what is wrong with which."""
    words = [word.lstrip("-") for word in argv if word.startswith("-")]
    files = [word.removeprefix("config=") for word in words if word.startswith("config=")]
    if not files:
        return {}
    alone = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=alone, sys_argv=[])
    alone([argv[0], f"--config={files[-1]}"])
    keys = [word.partition("=")[0] for word in words if word.startswith("config.")]
    problems = {key: _unknown(alone["config"].value, key) for key in keys}
    return {key: problem for key, problem in problems.items() if problem}


def _unknown(values: Any, key: str) -> str | None:
    """Says which part of a dotted key is not there, and which are near; None where all are."""
    where = "config"
    for part in key.split(".")[1:]:
        if not isinstance(values, Mapping | ml_collections.ConfigDict):
            return f"{where} is a value without keys."
        if part not in values:
            near = difflib.get_close_matches(part, list(values), 3)
            hint = f"Did you mean {' or '.join(f'{where}.{name}' for name in near)}? " if near else ""
            return f"{where} has no key {part!r}. {hint}Known keys: {', '.join(sorted(values))}."
        values, where = values[part], f"{where}.{part}"
    return None


def to_config_dict(config: Any) -> Any:
    """Returns a frozen dataclass as an `ml_collections.ConfigDict` that a config file can change.

    Declared `Any`, since the keys of a ConfigDict are beyond type checkers; `from_mapping` checks them.
    """
    return ml_collections.ConfigDict(to_plain(config), convert_dict=True)


def to_plain(value: Any) -> Any:
    """Returns dataclasses as dicts and tuples as they are, recursively."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return tuple(to_plain(item) for item in value)
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_mapping(cls: type[T], values: Mapping[str, Any] | ml_collections.ConfigDict, where: str = "config") -> T:
    """Builds dataclass `cls` from a (nested) mapping such as a ConfigDict or parsed JSON.

    Raises:
      ValueError: for an unknown key, with the nearest valid name and all names.
      TypeError: for a value of another type than the field's.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" Did you mean {where}.{near[0]}?" if near else ""
            raise ValueError(f"Unknown key {where}.{key}.{hint} Known keys: {', '.join(sorted(known))}.")
    return cls(**{key: _convert(known[key], values[key], f"{where}.{key}") for key in values})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Checks one value against its annotation, turning mappings into dataclasses and lists into tuples."""
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_mapping(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where, hint)
    if origin is typing.Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, tuple | list):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(arguments) == len(value):
            return tuple(
                _convert(argument, item, f"{where}[{i}]")
                for i, (argument, item) in enumerate(zip(arguments, value, strict=True))
            )
    elif origin in (dict, Mapping) or hint is Any or origin is not None:
        if hint is Any:
            return value
        if isinstance(value, Mapping):
            return _plain_mapping(value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    expected = hint.__name__ if isinstance(hint, type) and origin is None else str(hint).replace("typing.", "")
    raise TypeError(f"{where} must be {expected}, got {value!r} ({type(value).__name__}).")


def _convert_union(options: tuple[Any, ...], value: Any, where: str, hint: Any) -> Any:
    for option in options:
        if option is type(None):
            if value is None:
                return None
            continue
        try:
            return _convert(option, value, where)
        except TypeError:
            continue
    raise TypeError(f"{where} must be {hint}, got {value!r} ({type(value).__name__}).")


def _plain_mapping(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _plain_mapping(item) if isinstance(item, Mapping) else list(item) if isinstance(item, tuple) else item
        for key, item in value.items()
    }


def to_json(config: Any) -> str:
    """Returns a dataclass config as indented JSON, which `from_mapping` reads back."""
    return json.dumps(to_plain(config), indent=2, sort_keys=True)
