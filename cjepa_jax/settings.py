"""Settings as dataclasses of groups: documented defaults, and how settings are read, checked, listed and compared.

A setting is a field `key: type = setting(default, "What it means.")` of a frozen dataclass; a group of settings is a
field `name: Group = group(Group, "What it is about.")`. Everywhere else a setting is called "group.key".

A setting that holds numbers also says in which range each of them lies, such as within="(0, 1]". Every range is finite:
`parse` refuses numbers outside it, infinity and NaN included. A pair of floats is an interval, whose start must
not be above its end. `__post_init__` of a group checks only what concerns several settings.

A setting that is new since checkpoints were written needs no care where its default is what the code did before;
otherwise `before` says what it did. A setting or group that was renamed says so by `formerly`.
"""

import dataclasses
import functools
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from cjepa_jax.errors import UserError, nearest, require

T = TypeVar("T")

# Settings that may change between two runs in one workdir, because none of them alters what is trained.
FREE_TO_CHANGE = (
    "data.data_dir",
    "data.threads",
    "data.prefetch",
    "data.read_timeout",
    "data.max_bad_fraction",
    "model.layers",
    "model.attention",
    "model.remat",
    "mesh.",
    "optim.microbatches",
    "log.",
    "checkpoint.",
    "eval.",
)


def setting(
    default: T,
    meaning: str,
    *,
    within: str | None = None,
    before: Any = dataclasses.MISSING,
    formerly: str | None = None,
) -> T:
    """Declares a setting with its default and a sentence about it.

    within: the range of its numbers, with a round bracket at an end that does not belong to it; only a setting without
    numbers has none.
    before: what the code did before the setting existed, where that is not its default.
    formerly: the setting's old key in the same group, which is still understood.
    """
    metadata = {"meaning": meaning, "within": within, "formerly": formerly}
    metadata["before"] = default if before is dataclasses.MISSING else before  # type: ignore[assignment]
    return typing.cast(T, dataclasses.field(default=default, metadata=metadata))


def required(meaning: str, *, within: str | None = None) -> Any:
    """Declares a setting that has no default; its arguments are those of `setting`."""
    return dataclasses.field(metadata={"meaning": meaning, "within": within, "formerly": None})


def group(cls: type[T], meaning: str, *, formerly: str | None = None) -> T:
    """Declares a group of settings of the dataclass `cls`; `formerly` is its old name, which is still understood."""
    return typing.cast(T, dataclasses.field(default_factory=cls, metadata={"meaning": meaning, "formerly": formerly}))


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting of a dataclass of groups."""

    name: str  # "group.key", or "key" outside of all groups
    hint: Any
    meaning: str
    within: str | None  # the range of its numbers
    default: Any  # dataclasses.MISSING where the setting is required
    before: Any  # what a checkpoint that lacks the key was trained with
    formerly: str | None  # the old name, as complete as `name`


@functools.lru_cache
def keys(cls: Any) -> tuple[Key, ...]:
    """Lists every setting of a dataclass of groups, in order."""
    found = []
    for name, hint, field in _fields(cls):
        meaning, formerly = field.metadata.get("meaning", ""), field.metadata.get("formerly")
        within = field.metadata.get("within")
        if not dataclasses.is_dataclass(hint):
            before = field.metadata.get("before", field.default)
            found.append(Key(name, hint, meaning, within, field.default, before, formerly))
            continue
        for key in keys(typing.cast(type, hint)):
            old = f"{formerly or name}.{key.formerly or key.name}" if formerly or key.formerly else None
            found.append(dataclasses.replace(key, name=f"{name}.{key.name}", formerly=old))
    return tuple(found)


@functools.lru_cache
def _fields(cls: type) -> tuple[tuple[str, Any, dataclasses.Field], ...]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if _has_numbers(hints[field.name]) != bool(field.metadata.get("within")):
            raise TypeError(f"{cls.__name__}.{field.name}: a setting has a range, within=..., where it holds numbers")
    return tuple((field.name, hints[field.name], field) for field in dataclasses.fields(cls))


def _has_numbers(hint: Any) -> bool:
    return hint in (int, float) or any(_has_numbers(inside) for inside in typing.get_args(hint))


def _contains(within: str, value: float) -> bool:
    """Tells whether a range such as "[0, 1)" contains a number, which NaN is not."""
    low, high = map(float, within[1:-1].split(","))
    return low < value < high or (within[0] == "[" and value == low) or (within[-1] == "]" and value == high)


def parse(values: Mapping[str, Any], cls: type[T]) -> T:
    """Makes a dataclass of groups from a nested dict, such as `ConfigDict.to_dict()`; defaults complete it.

    Raises UserError for an unknown key, a required one that is missing, a wrong type, or a value that its group
    rejects.
    """
    return typing.cast(T, _build(cls, values, ""))


def parse_flat(flat: Mapping[str, Any], cls: type[T], prefix: str = "") -> T:
    """Makes a dataclass from the flat settings of a checkpoint, of which it takes those that it knows.

    A key that is missing means what the code did before the key existed. `prefix`, such as "model.", selects a group.
    Raises UserError as `parse` does.
    """
    nested: dict[str, Any] = {}
    for key in keys(typing.cast(Any, cls)):
        names = [prefix + name for name in (key.name, key.formerly) if name]
        value = next((flat[name] for name in names if name in flat), key.before)
        if value is not dataclasses.MISSING:
            *above, last = key.name.split(".")
            place = nested
            for name in above:
                place = place.setdefault(name, {})
            place[last] = value
    return typing.cast(T, _build(cls, nested, prefix))


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Puts nested settings over others; a group keeps the settings that the changes do not name."""
    both = dict(values)
    for name, value in changes.items():
        joined = isinstance(value, Mapping) and isinstance(both.get(name), Mapping)
        both[name] = {**both[name], **value} if joined else value
    return both


def flatten(config: Any) -> dict[str, Any]:
    """Gives settings as {"group.key": value}, in order; tuples become lists, as in JSON."""
    flat = {}
    for name, value in dataclasses.asdict(config).items():
        entries = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        flat.update({k: list(v) if isinstance(v, tuple) else v for k, v in entries.items()})
    return flat


def adopt(
    old: Mapping[str, Any], config: T, *, free: tuple[str, ...] = FREE_TO_CHANGE
) -> tuple[T, list[str], list[str]]:
    """Compares the settings of a workdir, as flat as its config.json has them, with those of a command.

    Returns the settings to go on with. They are the command's, except that a setting which is newer than the workdir,
    and has its default in the command, keeps the behaviour that the code had then. Also returns a note about each such
    setting, and "key: old -> new" for each difference that is not allowed; names that begin with one of `free` may
    differ.
    """
    kept, changed, notes = {}, [], []
    flat = flatten(config)
    for key in keys(typing.cast(Any, type(config))):
        names = [name for name in (key.name, key.formerly) if name and name in old]
        was = old[names[0]] if names else _plain(key.before)
        now = flat[key.name]
        if was == now or key.name.startswith(free):
            continue
        if not names and now == _plain(key.default):
            kept[key.name] = key.before
            notes.append(f"{key.name} = {was}, as when this workdir was begun (now the default is {now})")
        else:
            changed.append(f"{key.name}: {was} -> {now}")
    return _replace(config, kept), notes, sorted(changed)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _replace(config: T, values: Mapping[str, Any]) -> T:
    for name, value in values.items():
        group_name, _, key = name.rpartition(".")
        if group_name:
            value = dataclasses.replace(getattr(config, group_name), **{key: value})
        config = dataclasses.replace(config, **{group_name or key: value})  # type: ignore[type-var]
    return config


def describe(cls: type, values: Mapping[str, Any]) -> str:
    """Lists all settings of a dataclass of groups with their meaning; `values` are flat and shown beside the keys."""
    about = {name: field.metadata.get("meaning", "") for name, _, field in _fields(cls)}
    text, seen = [], ""
    for key in keys(cls):
        group_name = key.name.rpartition(".")[0]
        if group_name != seen:
            text.append(f"\n{group_name}: {about[group_name]}")
            seen = group_name
        value = values.get(key.name)
        shown = f"{key.name} = {'(required)' if value is None and key.default is dataclasses.MISSING else repr(value)}"
        text.append(f"  {shown}")
        choices = f" One of {', '.join(typing.get_args(key.hint))}." if typing.get_origin(key.hint) is Literal else ""
        choices += f" In {key.within}." if key.within else ""
        text += textwrap.wrap(key.meaning + choices, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(text)


def _build(cls: Any, values: Any, prefix: str) -> Any:
    require(isinstance(values, Mapping), f"{prefix.rstrip('.')} must be a group of settings, got {values!r}")
    fields = {name: (hint, field) for name, hint, field in _fields(cls)}
    renamed = {field.metadata.get("formerly"): name for name, (_, field) in fields.items()}
    given: dict[str, Any] = {}
    for key, value in values.items():
        name = renamed.get(key, key) if key not in fields else key
        if name not in fields:
            raise UserError(f"unknown key {prefix}{key}: {nearest(str(key), fields)}")
        both = isinstance(value, Mapping) and isinstance(given.get(name), Mapping)  # by its old name and its new one
        given[name] = {**given[name], **value} if both else value
    built = {}
    for name, (hint, field) in fields.items():
        if dataclasses.is_dataclass(hint):
            built[name] = _build(hint, given.get(name, {}), f"{prefix}{name}.")
        elif name in given and (given[name] is not None or _may_be_none(hint)):
            built[name] = _check(hint, given[name], prefix + name, field.metadata)
        else:
            require(field.default is not dataclasses.MISSING, f"{prefix}{name} is missing")
    return cls(**built)


def _may_be_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _check(hint: Any, value: Any, key: str, about: Mapping[str, Any]) -> Any:
    """Returns the value as the type hint and the setting's metadata `about` want it, or raises UserError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # of a type and None
        return None if value is None else _check(args[0], value, key, about)
    if origin is Literal:
        require(value in args, f"{key} must be one of {', '.join(args)}, got {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, tuple | list), f"{key} must be a tuple, got {value!r}")
        kind = getattr(args[0], "__name__", str(args[0]))
        if args[-1] is not Ellipsis:
            require(len(value) == len(args), f"{key} must have {len(args)} numbers, got {value!r}")
        require(all(not isinstance(v, tuple | list) for v in value), f"{key} must hold {kind} only, got {value!r}")
        checked = tuple(_check(args[0], v, key, about) for v in value)
        require(args != (float, float) or checked[0] <= checked[-1], f"{key} must be an increasing pair, got {checked}")
        return checked
    accepted = (int, float) if hint is float else hint
    require(
        isinstance(value, accepted) and isinstance(value, bool) == (hint is bool),
        f"{key} must be {hint.__name__}, got {value!r}",
    )
    within = about.get("within")
    fits = within is None or _contains(within, value)
    require(fits, f"{key} must be in {within}, got {value!r}: {about.get('meaning')}")
    return hint(value)


def plain_type(hint: Any) -> type:
    """Gives the Python type that values of a hint have, such as str for a Literal or for str | None."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return plain_type(args[0])
    return str if origin is Literal else origin or hint
