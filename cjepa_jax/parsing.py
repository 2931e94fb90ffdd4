"""A config file's nested dict -> the checked dataclasses of config.py, and what two of them differ in."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from cjepa_jax.config import Config, nearest, require

# What may change between two runs in one workdir: none of it alters the training.
FREE_TO_CHANGE = (
    "data.data_dir",
    "data.threads",
    "data.prefetch",
    "data.max_bad_fraction",
    "model.layers",
    "model.remat",
    "mesh.",
    "log.",
    "checkpoint.",
    "eval.",
    "init.path",
)


def parse(config: Mapping[str, Any], cls: Any = Config) -> Any:
    """Nested dict of groups (`ConfigDict.to_dict()`) -> Config, or another dataclass of groups.

    Raises UserError for an unknown or missing key, a wrong type, or a value
    that its group rejects.
    """
    return _build(cls, config, "")


def flatten(config: Any) -> dict[str, Any]:
    """What `parse` gives -> {"group.key": value}, in order; tuples become lists, as JSON has them."""
    flat = {}
    for group, value in dataclasses.asdict(config).items():
        entries = {f"{group}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {group: value}
        flat.update({k: list(v) if isinstance(v, tuple) else v for k, v in entries.items()})
    return flat


def group(cls: Any, flat: Mapping[str, Any], name: str) -> Any:
    """The dataclass of one group from a flat config, without the keys that it does not know.

    Raises UserError for a missing key, a wrong type, or a rejected value.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    values = {key.removeprefix(f"{name}."): value for key, value in flat.items() if key.startswith(f"{name}.")}
    return _build(cls, {key: value for key, value in values.items() if key in known}, f"{name}.")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Two flat configs -> "key: old -> new" for each key that may not change within a workdir."""
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]


def _build(cls: Any, values: Any, prefix: str) -> Any:
    require(isinstance(values, Mapping), f"{prefix.rstrip('.')} must be a group of settings, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        require(key in hints, f"unknown key {prefix}{key}: {nearest(key, hints)}")
    for key in hints:
        require(key in values, f"{prefix}{key} is missing")
    fields = {}
    for key, hint in hints.items():
        build = _build if dataclasses.is_dataclass(hint) else _check
        fields[key] = build(hint, values[key], f"{prefix}{key}." if build is _build else prefix + key)
    return cls(**fields)


def _check(hint: Any, value: Any, key: str) -> Any:
    """The value as the type hint wants it, or UserError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # of a type and None
        return None if value is None else _check(args[0], value, key)
    if origin is Literal:
        require(value in args, f"{key} must be one of {', '.join(args)}, got {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, tuple | list), f"{key} must be a tuple, got {value!r}")
        if args[-1] is not Ellipsis:
            require(len(value) == len(args), f"{key} must have {len(args)} numbers, got {value!r}")
        return tuple(_check(args[0], v, key) for v in value)
    accepted = (int, float) if hint is float else hint
    require(
        isinstance(value, accepted) and isinstance(value, bool) == (hint is bool),
        f"{key} must be {hint.__name__}, got {value!r}",
    )
    return hint(value)
