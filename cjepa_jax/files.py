"""Handles paths on disk and on gs://, reads files that others wrote, and writes files that appear whole."""

import importlib.util
import json
import os
import tempfile
from typing import Any

from etils import epath

from cjepa_jax.errors import UserError, one_line, require

# The packages that read and write files, folders and TensorBoard's events on gs://.
GCS_INSTALL = "pip install gcsfs==2026.10.1 google-cloud-storage==3.17.1"
TEMPORARY = ".tmp"  # ends the name of a file until it is complete
_LARGEST_JSON = 2**26  # bytes of a file; our own have some thousand


def is_remote(path: epath.Path) -> bool:
    """Tells whether a path lies in an object store, such as gs://.

    There are no folders there, a file cannot be appended to, and it appears whole.
    """
    return "://" in str(path)


def absolute(path: epath.Path) -> epath.Path:
    """Returns the path as Orbax wants it; `resolve` would take gs:// for a folder on this machine."""
    return path if is_remote(path) else path.resolve()


def check_bucket_support(path: epath.Path, key: str) -> None:
    """Raises UserError where `path` lies on gs:// and a package for that is missing; `key` names the setting."""
    if str(path).startswith("gs://"):
        lacking = [name for name in ("gcsfs", "google.cloud.storage") if not _is_installed(name)]
        require(not lacking, f"{key} {path}: {' and '.join(lacking)} missing; {GCS_INSTALL}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def check_writable(path: epath.Path, key: str) -> None:
    """Raises UserError where nothing can be written to `path`, a folder, or to a new name in a folder that exists.

    `key` names the setting. A file without a name is made there to see, and is gone at once.
    """
    if is_remote(path):
        return
    try:
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent):
            path.exists()  # whether the name may be that long
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key} {str(path)[:300]!r} cannot be written ({reason}); name another place") from None


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

    A text is stored as UTF-8; names of files that are none, as `os.fsdecode` gives them, become their bytes again.
    """
    raw = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    if is_remote(path):  # where a file appears whole
        path.write_bytes(raw)
        return
    temporary = f"{path}{TEMPORARY}"
    with open(temporary, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
