"""What the commands share: settings from a file and the command line, exit codes, and one line for a mistake."""

import contextlib
import errno
import importlib.util
import os
import pathlib
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from absl import flags, logging
from ml_collections import ConfigDict, config_dict, config_flags

from cjepa_jax import settings
from cjepa_jax.data import waiting
from cjepa_jax.errors import StorageError, UserError, nearest, one_line, out_of_memory, require
from cjepa_jax.tpu import chips

_CONFIG = flags.DEFINE_string("config", None, "The experiment: a file, or the name of a shipped config.")
_OVERRIDE = re.compile(r"--?(no)?config\.([\w.]+)(=.*)?", re.DOTALL)
# Errors about a path that the user gave, which end the command with exit code 2 wherever they are raised.
_MENDABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_overrides: list[str] = []  # --config.GROUP.KEY=VALUE, as given


def read_config(find_class: Callable[[Mapping[str, Any]], type], *, default: str | None = None) -> tuple[str, Any]:
    """Reads --config's file, completes it with defaults, and applies the overrides of the command line.

    find_class: the dataclass of settings that a file's nested settings describe. default: the file where none is
    given. Returns the file's name without .py, and the settings. Raises UserError.
    """
    file = _CONFIG.value or default
    require(file is not None, "--config is missing, e.g. --config=configs/digits.py")
    path = _find(str(file))
    values = _load(path)
    for override in _overrides:  # a method may be chosen on the command line
        if found := re.fullmatch("--?config.method=(.*)", override, re.DOTALL):
            values["method"] = found[1]
    cls = find_class(values)
    _override(values, cls)
    parsed: Any = settings.parse(values, cls)
    if _help_is_wanted():
        print(settings.describe(cls, settings.flatten(parsed)))
        sys.exit(0)
    return path.stem, parsed


def read_values(doc: str) -> tuple[str, dict[str, Any]]:
    """Reads what --config's file gives, for a command whose file is not an experiment and takes no overrides.

    doc: what --help prints. Returns the file's name without .py, and its values. Raises UserError.
    """
    if _help_is_wanted():
        print(doc.strip())
        sys.exit(0)
    require(_CONFIG.value is not None, "--config is missing, e.g. --config=configs/study_collapse_digits.py")
    require(not _overrides, f"{_overrides[:1]}: this command takes no overrides; change the file or a copy of it")
    path = _find(str(_CONFIG.value))
    return path.stem, _load(path)


def load_config(file: str) -> dict[str, Any]:
    """Reads the nested settings of a config file, or of a config of this package by its name. Raises UserError."""
    return _load(_find(file))


def _find(file: str) -> pathlib.Path:
    """Finds a config file: a path, or the name of a config that comes with the package."""
    path, shipped = pathlib.Path(file), _shipped()
    if not _is_file(path) and re.fullmatch("[a-z0-9_]+", file):
        path = shipped / f"{file}.py"
    known = ", ".join(sorted(found.stem for found in shipped.glob("*.py") if found.stem != "__init__"))
    require(_is_file(path), f"--config {file[:300]!r} does not exist; known by name: {known}")
    return path


def _shipped() -> pathlib.Path:
    """Gives the folder of the package's configs: beside the package in a checkout, and in it where it is installed."""
    here = pathlib.Path(__file__).parent
    return next((folder for folder in (here / "configs", here.parent / "configs") if folder.is_dir()), here)


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds what no name may
        return False


def _load(path: pathlib.Path) -> dict[str, Any]:
    """Calls the get_config() of a Python file; other configs can be imported there as `from configs import ...`.

    Raises UserError for a file that cannot be run, or gives no settings.
    """
    require(path.suffix == ".py", f"--config {path} is not a Python file: its name must end in .py")
    before = list(sys.path)
    sys.path[:] = [str(path.resolve().parent.parent), *before, str(_shipped().parent)]
    try:
        spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        require(hasattr(module, "get_config"), f"--config {path} has no function get_config()")
        config = module.get_config()
        values = config.to_dict() if isinstance(config, ConfigDict) else config
    except UserError:
        raise
    except Exception as error:  # whatever a file of the user's may raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = f", line {line}" if line else ""
        raise UserError(f"--config {path}{where}: {type(error).__name__}: {one_line(error)[:300]}") from None
    finally:
        sys.path[:] = before
    require(isinstance(values, Mapping), f"--config {path}: get_config() gave {type(values).__name__}, not settings")
    return dict(values)


def _override(values: dict[str, Any], cls: type) -> None:
    """Puts --config.GROUP.KEY=VALUE into nested settings of the dataclass `cls`; old keys are understood."""
    known = {name: key for key in settings.keys(cls) for name in (key.name, key.formerly) if name}
    nested: dict[str, Any] = {}
    arguments = []
    for override in _overrides:
        match = _OVERRIDE.fullmatch(override)
        assert match
        negation, name, value = match.groups()
        is_group = any(other.startswith(f"{name}.") for other in known)
        require(not is_group, f"--config.{name} is a group of settings; name one of them")
        require(name in known, f"--config has no such setting: {name}; {nearest(name, known)}")
        key = known[name]
        require(value is not None or key.hint is bool, f"--config.{name} has no value: --config.{name}=VALUE")
        if name != key.name:
            print(f"--config.{name} is called --config.{key.name} now", file=sys.stderr)
        place, _, last = key.name.rpartition(".")
        holder = nested.setdefault(place, {}) if place else nested
        holder[last] = config_dict.placeholder(settings.plain_type(key.hint))
        arguments.append(f"--{negation or ''}config.{key.name}{value or ''}")
    overridden, found = ConfigDict(nested), flags.FlagValues()
    config_flags.DEFINE_config_dict("config", overridden, flag_values=found, sys_argv=["", *arguments])
    try:
        found(["", *arguments])
    except (flags.Error, ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(one_line(error)[:500]) from None
    values.update(settings.merged(values, overridden.to_dict()))


def workdir_of(given: str | None, name: str) -> str:
    """Gives --workdir, or the default for a config file of this name, whose parent is made. Raises UserError."""
    if given is None:
        try:
            pathlib.Path("runs").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder runs cannot be made here ({error.strerror}): give --workdir=DIR") from None
    require(given != "", "--workdir is empty")
    return given or f"runs/{name}"


class _Stderr:
    """The standard error stream, without what threads that are not Python's print there, and without its own errors.

    Where a disk is full, TensorStore's threads print a traceback for every array that fails after the first. A reader
    may be gone, such as the `tee` of a pipe after Ctrl-C, or a terminal; the run is to save all the same.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        if type(threading.current_thread()).__name__ != "_DummyThread":
            self._safely(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._safely(self._stream.flush)

    def _safely(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            with contextlib.suppress(OSError):  # so that Python's own flush at the end does not fail, either
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(body: Callable[[], None], doc: str) -> None:
    """Parses the flags and runs the body; `doc` is what --help prints.

    Exit code 0; 2 after a mistake that the user can mend; 1 after other errors.
    """
    # What is compiled is kept for the next start; jax reads this when it is imported, which is later.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/cjepa_jax/xla"))
    if not chips.may_be_here():  # libtpu, where it is installed, would print a dozen lines about that
        for name, value in chips.NO_TPU.items():
            os.environ.setdefault(name, value)
    sys.stderr = _Stderr(sys.stderr)  # type: ignore[assignment]
    with waiting.leaving():
        try:
            logging.set_verbosity("error")  # TFDS' and Orbax' chatter
            _parse_flags(sys.argv, doc)
            body()
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _MENDABLE:
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(2)
        except StorageError as error:
            sys.exit(f"error: {error}")
        except Exception as error:
            if not out_of_memory(error):
                raise
            print(
                f"error: out of memory ({one_line(error)[:200]}); a smaller --config.data.batch_size helps, or a "
                "machine with more",
                file=sys.stderr,
            )
            sys.exit(2)


def _help_is_wanted() -> bool:
    return any(re.fullmatch("--?(help|helpshort|helpfull)", argument) for argument in sys.argv[1:])


def _parse_flags(argv: list[str], doc: str) -> None:
    """Parses flags as absl does, but for the overrides of settings; a mistake is one line."""
    _overrides[:] = [argument for argument in argv[1:] if _OVERRIDE.fullmatch(argument)]
    names_config = any(re.match("--?config(=|$)", argument) for argument in argv[1:])
    if _help_is_wanted() and not names_config:
        print(doc.strip())
        sys.exit(0)
    left = [argument for argument in argv if not _OVERRIDE.fullmatch(argument)]
    left = [argument for argument in left if not re.fullmatch("--?(help|helpshort|helpfull)", argument)]
    try:
        rest = flags.FLAGS(left)[1:]
    except (flags.Error, OSError) as error:
        raise UserError(one_line(error)) from None
    require(not rest, f"unexpected argument {rest[0] if rest else ''!r}; --help explains the command")
