"""Handles paths on disk and on gs://, reads files that others wrote, writes files whole, and tells of full disks."""

import contextlib
import errno
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from cjepa_jax.errors import StorageError, UserError, one_line, require

# The packages that read and write files, folders and TensorBoard's events on gs://.
GCS_INSTALL = "pip install gcsfs==2026.10.1 google-cloud-storage==3.17.1"
TEMPORARY = ".tmp"  # ends the name of a file until it is complete
_LARGEST_JSON = 2**26  # bytes of a file; our own have some thousand


def is_remote(path: epath.Path) -> bool:
    """Tells whether a path lies in an object store, such as gs://.

    There are no folders there, a file cannot be appended to, and it appears whole.
    """
    return "://" in str(path)


def forget_listings(path: epath.Path) -> None:
    """Lets the client of an object store look anew: gcsfs remembers what it saw, not what others wrote since."""
    backend: Any = getattr(path, "_backend", None)  # epath has no other way to it
    if is_remote(path) and hasattr(backend, "fs"):
        backend.fs(path).invalidate_cache()


def absolute(path: epath.Path) -> epath.Path:
    """Returns the path as Orbax wants it; `resolve` would take gs:// for a folder on this machine."""
    return path if is_remote(path) else path.resolve()


def check_bucket_support(path: epath.Path, key: str, needs: Sequence[str] = ("gcsfs", "google.cloud.storage")) -> None:
    """Raises UserError where `path` lies on gs:// and a package for that is missing; `key` names the setting."""
    if str(path).startswith("gs://"):
        lacking = [name for name in needs if not _is_installed(name)]
        require(not lacking, f"{key} {path}: {' and '.join(lacking)} missing; {GCS_INSTALL}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def check_writable(path: epath.Path, key: str) -> None:
    """Raises UserError where no file can be written: in the folder `path`, or, where it does not exist, beside it.

    `key` names the setting in the error. The check makes a temporary file without a name, which is gone at once.
    """
    if is_remote(path):
        return
    try:
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent), contextlib.suppress(FileNotFoundError):
            os.stat(path)  # fails for a name that is too long, and for links in a circle
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key} {str(path)[:300]!r} cannot be written ({reason}); name another place") from None


def printable(name: str) -> str:
    """Returns the name of a file as text: bytes that are none become such as \\xe9."""
    return os.fsencode(name).decode(errors="backslashreplace")


def is_file(path: epath.Path) -> bool:
    """Tells whether a path is a file; epath counts pipes and devices, which could be read without end, among files."""
    return path.is_file() if is_remote(path) else os.path.isfile(path)


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object. Raises UserError for one that is missing, damaged or far too large.

    A pipe or a device counts as missing.
    """
    require(is_file(path), f"{path} is missing, or no file")
    size = epath.Path(path).stat().length
    require(size <= _LARGEST_JSON, f"{path} is damaged: {size} bytes are too many for it")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)})") from None
    require(isinstance(content, dict), f"{path} is damaged: no settings by name")
    return dict(content)


def write_whole(path: epath.Path, content: str | bytes) -> None:
    """Writes a file that is never seen half written, even when the power goes.

    Text is stored as UTF-8; file names that are not valid UTF-8, read by `os.fsdecode`, get their own bytes back.
    """
    raw = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    if is_remote(path):  # where a file appears whole
        path.write_bytes(raw)
        return
    # Another process may write the same file, and have the same number in another container.
    temporary = f"{path}.{os.getpid()}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
    try:
        with storing(path, len(raw)), open(temporary, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
    except StorageError:
        pathlib.Path(temporary).unlink(missing_ok=True)  # what room there is others may need
        raise
    os.replace(temporary, path)


def remove_remains(folder: epath.Path) -> None:
    """Removes what commands that were killed had half written by `write_whole` in a folder."""
    for path in folder.glob(f"*{TEMPORARY}"):
        # Former names had no number.
        if re.search(rf"\.(jsonl?|txt|\d+(\.[0-9a-f]{{8}})?){re.escape(TEMPORARY)}$", path.name) and is_file(path):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def forgiving(path: epath.Path) -> Iterator[None]:
    """Says on stderr what could not be written to an object store, and goes on.

    It is for files that will be written anew: a network that fails for a while should not end a run because of them.
    On a disk, errors stay errors.
    """
    try:
        yield
    except Exception as error:  # the client of gs:// raises many kinds
        if not is_remote(path):
            raise
        print(f"{path} could not be written ({one_line(error)[:300]})", file=sys.stderr, flush=True)


_NO_ROOM = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}


@contextlib.contextmanager
def storing(path: epath.Path, needed: int = 0) -> Iterator[None]:
    """Turns errors of a full disk, an exhausted quota or a limit on a file's size into a StorageError about `path`.

    needed: bytes to be written, where they are known.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        reason = _no_room(error)
        if reason is None:
            raise
        wanted = f", about {_amount(needed)} needed" if needed else ""
        raise StorageError(f"{path} could not be written: {reason}{wanted}{_free(path)}") from error


def _no_room(error: BaseException | None) -> str | None:
    """Gives the reason where an error, or one that it stems from, means that there is no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return _NO_ROOM[error.errno]
        for reason in _NO_ROOM.values():  # Orbax, TensorStore and safetensors have errors of their own
            if reason in str(error):
                return reason
        error = error.__cause__ or error.__context__
    return None


def _free(path: epath.Path) -> str:
    if is_remote(path):
        return ""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    return f", {_amount(shutil.disk_usage(folder).free)} free"


def _amount(size: float) -> str:
    """Writes a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
