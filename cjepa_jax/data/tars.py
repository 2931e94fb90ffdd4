"""Finds images in tar shards as WebDataset writes them; an index of all members is made once and kept in the cache."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from cjepa_jax.data.archives import Archive, Archives, Place, digest, find_files, relative_names
from cjepa_jax.data.folder import SUFFIXES
from cjepa_jax.errors import UserError, one_line, require

_BLOCK = 512  # bytes; headers and contents of a tar begin at multiples of it


class _Members(NamedTuple):
    """The images of tar files, as arrays [n]."""

    file: np.ndarray  # which of the files
    offset: np.ndarray  # of the content, in bytes
    size: np.ndarray
    label: np.ndarray  # -1 where there is none
    key: np.ndarray  # the member's name


def scan(root: str) -> Archives:
    """Opens the tar shards below a folder on disk: KEY.jpg (or .png, .webp, .bmp), and perhaps KEY.cls or KEY.json.

    A .cls file holds the class as a number, a .json file as "label" or "cls". The members of one key lie together.
    Raises UserError where there are no such files, or one is damaged.
    """
    require("://" not in root, f"tar shards must lie on a disk, got {root!r}; prepare them, or use Parquet there")
    splits, most = {}, -1
    for split, files in find_files(root, ".tar").items():
        members = _index(files)
        require(len(members.file) > 0, f"the .tar files of the split {split} in {root} hold no images")
        splits[split] = _tar_split(files, members, root)
        most = max(most, int(members.label.max()))
    return Archives(splits, tuple(str(i) for i in range(most + 1)))


def _tar_split(files: Sequence[epath.Path], members: _Members, root: str) -> Archive:
    def read(index: int) -> bytes:
        size = int(members.size[index])
        with open(
            files[int(members.file[index])], "rb", buffering=0
        ) as file:  # there may be more files than can be open
            raw = os.pread(file.fileno(), size, int(members.offset[index]))
        if len(raw) < size:
            raise OSError(f"{file.name} ends in the midst of this image")
        return raw

    names = relative_names(files, root)

    def name(index: int) -> str:
        return f"{names[int(members.file[index])]}/{os.fsdecode(bytes(members.key[index]))}"

    def place(index: int) -> Place:
        label = int(members.label[index])
        return Place(name(index), int(members.size[index]), None if label < 0 else label)

    content = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in members)).hexdigest()
    return Archive(len(members.file), name, place, read, f"{len(members.file)} images {digest(files, content)}")


def _index(files: Sequence[epath.Path]) -> _Members:
    """Finds all images; the index is kept in the cache for as long as the files have the same sizes and times."""
    stamps = [[str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in files]
    name = hashlib.sha256(json.dumps(["tar 2", stamps]).encode()).hexdigest()[:32]
    cache = pathlib.Path(os.path.expanduser("~/.cache/cjepa_jax/tar"))
    kept = cache / f"{name}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError), open(kept, "rb") as file:
        return _Members(*(np.load(file, allow_pickle=False) for _ in _Members._fields))
    found: list[_Members] = []
    for number, path in enumerate(tqdm(files, "indexing", unit="file", disable=not sys.stderr.isatty())):
        found.append(_read_tar(path, number))
    together = _Members(*map(np.concatenate, zip(*found, strict=True)))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{name}.{os.getpid()}.tmp", "wb") as new:
            for array in together:
                np.save(new, array)
        os.replace(new.name, kept)
    except OSError:  # then it is made anew next time
        pass
    return together


def _read_tar(path: epath.Path, number: int) -> _Members:
    rows: list[tuple[int, int, int, int, bytes]] = []
    labels: dict[bytes, int] = {}  # by the key of the image
    with open(path, "rb", buffering=0) as file:
        for name, offset, size in _headers(file.fileno(), path):
            key, dot, suffix = name.rpartition(b".")
            kind = (dot + suffix).lower().decode("latin1")
            if name.rpartition(b"/")[2].startswith(b"."):  # hidden, such as what macOS adds to each file
                continue
            if kind in SUFFIXES:
                rows.append((number, offset, size, -1, name))
            elif kind in (".cls", ".json") and size < 2**16:
                labels[key] = _label(kind, os.pread(file.fileno(), size, offset), path, name)
    rows = [(*row[:3], labels.get(row[4].rpartition(b".")[0], -1), row[4]) for row in rows]
    columns: list[Any] = list(zip(*rows, strict=True)) or [[]] * 5
    kinds: tuple[Any, ...] = (np.int32, np.int64, np.int64, np.int32, np.bytes_)
    return _Members(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def _headers(file: int, path: epath.Path) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, place and size of each regular member; POSIX' and GNU's long names are understood."""
    position, long_name, end = 0, b"", os.fstat(file).st_size
    while position + _BLOCK <= end:
        header = os.pread(file, _BLOCK, position)
        if header == bytes(_BLOCK):
            return
        try:
            size = _number(header[124:136])
            total = _number(header[148:156])
            require(total == sum(header[:148]) + sum(header[156:]) + 8 * 32, "its checksum differs")
            require(position + _BLOCK + size <= end, "it reaches beyond the end")
        except (ValueError, UserError) as error:
            raise UserError(f"{path} is damaged at byte {position}: {one_line(error)}") from None
        kind, content = header[156:157], position + _BLOCK
        if kind in (b"L", b"x"):  # a long name of the next member, by GNU or POSIX
            text = os.pread(file, size, content)
            found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", text) if kind == b"x" else None
            long_name = text.rstrip(b"\0") if kind == b"L" else found[1] if found else long_name
        elif kind in (b"0", b"\0"):
            prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
            short = header[:100].split(b"\0")[0]
            yield long_name or (prefix + b"/" + short if prefix else short), content, size
        if kind not in (b"L", b"x", b"K", b"g"):  # a member of any kind has taken the name
            long_name = b""
        position = content + -(-size // _BLOCK) * _BLOCK


def _number(field: bytes) -> int:
    """Reads a number of a header: octal, or, where it is large, GNU's binary form."""
    return int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b"\0 ") or b"0", 8)


def _label(kind: str, raw: bytes, path: epath.Path, name: bytes) -> int:
    try:
        value = int(raw) if kind == ".cls" else json.loads(raw)
        if isinstance(value, dict):
            value = value.get("label", value.get("cls", -1))
        return int(value) if isinstance(value, int | str) and -1 <= int(value) < 2**31 else -1
    except (ValueError, RecursionError):
        if kind == ".json":  # any other description of the image
            return -1
        raise UserError(f"{path}: {os.fsdecode(name)} holds no number of a class") from None
