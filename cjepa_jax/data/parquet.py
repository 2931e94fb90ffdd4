"""Finds images in Parquet files as Hugging Face's `datasets` writes them; a row group is read for each image."""

import contextlib
import functools
import json
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from etils import epath

from cjepa_jax.data.archives import Archive, Archives, Place, digest, find_files, relative_names
from cjepa_jax.errors import UserError, one_line, require
from cjepa_jax.files import is_remote

_LARGEST_GROUP = 2**28  # bytes of a row group
_TABLES = 2  # row groups that a thread keeps


def scan(root: str) -> Archives:
    """Opens the Parquet files below a folder, on disk or gs://, as Hugging Face's `datasets` writes them.

    The image is a column of structs {bytes, path}, or of bytes; a column of integers named "label", or whatever the
    features of the file call a ClassLabel, gives the labels. Raises UserError where there are none, or one is damaged.
    """
    splits: dict[str, Archive] = {}
    named, most = set(), -1
    for split, files in find_files(root, ".parquet").items():
        splits[split], classes, largest = _parquet_split(files, split, root)
        named |= {classes} if classes else set()
        most = max(most, largest)
    require(len(named) <= 1, f"the splits of {root} have different classes")
    classes = named.pop() if named else tuple(str(i) for i in range(most + 1))
    require(most < len(classes), f"{root}: there is a label {most}, and the files name {len(classes)} classes")
    return Archives(splits, classes)


def _open(path: epath.Path, metadata: Any = None) -> Any:
    source = path.open("rb") if is_remote(path) else os.fspath(path)
    return pyarrow.parquet.ParquetFile(source, metadata=metadata, memory_map=not is_remote(path))


def _parquet_split(files: Sequence[epath.Path], split: str, root: str) -> tuple[Archive, tuple[str, ...], int]:
    """Opens a split. Gives the names of its classes, or, where the files do not name them, () and the largest label."""
    metadata, groups, columns, named = [], [], set(), set()
    for number, path in enumerate(files):
        try:
            with _open(path) as opened:
                metadata.append(opened.metadata)
                image, label, classes = _columns(opened.schema_arrow, path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable Parquet file: {one_line(error)[:200]}") from None
        columns.add((image, label))
        named |= {classes} if classes else set()
        same = len(columns) == 1 and len(named) <= 1
        require(same, f"{path} has other columns of images and labels, or other classes, than {files[0]}")
        for group in range(metadata[-1].num_row_groups):
            about = metadata[-1].row_group(group)
            require(
                about.total_byte_size <= _LARGEST_GROUP,
                f"{path}: row group {group} has {about.total_byte_size / 2**20:.0f} MiB, which would be read for each "
                "image: write the set with groups of about 100 images, as `datasets` does for images",
            )
            groups.append((number, group, about.num_rows))
    classes = named.pop() if named else ()
    ends = np.cumsum([rows for *_, rows in groups])
    local = threading.local()

    def table(which: int) -> Any:
        """Reads the images of a row group; a thread keeps the last ones."""
        kept: dict[int, Any] = local.__dict__.setdefault("tables", {})
        if which not in kept:
            number, group, _ = groups[which]
            while len(kept) >= _TABLES:
                kept.pop(next(iter(kept)))
            with _open(files[number], metadata[number]) as opened:
                kept[which] = opened.read_row_group(group, columns=[image], use_threads=False).column(image)
        return kept[which]

    def find(index: int) -> tuple[int, int]:
        which = int(np.searchsorted(ends, index, side="right"))
        return which, index - int(ends[which - 1] if which else 0)

    def read(index: int) -> bytes:
        which, row = find(index)
        try:
            value = table(which)[row].as_py()
        except pyarrow.ArrowException as error:
            raise OSError(f"the row is damaged: {one_line(error)[:200]}") from None
        raw = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(raw, bytes):
            raise OSError("the row holds no bytes of an image")
        return raw

    labels = _Labels(files, metadata, label)

    names = relative_names(files, root)

    def name(index: int) -> str:
        which, row = find(index)
        number, group, _ = groups[which]
        return f"{names[number]}[group {group}, row {row}]"

    def place(index: int) -> Place:
        return Place(name(index), 0, labels[index] if label else None)

    content = json.dumps([[meta.num_rows, meta.num_row_groups, meta.serialized_size] for meta in metadata])
    length = int(ends[-1]) if groups else 0
    require(length > 0, f"the .parquet files of the split {split} hold no images")
    archive = Archive(length, name, place, read, f"{length} images {digest(files, content)}")
    return archive, classes, labels.most if label and not classes else -1


class _Labels:
    """Reads the labels of a split when the first of them is asked for."""

    def __init__(self, files: Sequence[epath.Path], metadata: Sequence[Any], column: str):
        self._files, self._metadata, self._column = files, metadata, column
        self._lock = threading.Lock()

    @functools.cached_property
    def _all(self) -> np.ndarray:
        columns = []
        for path, metadata in zip(self._files, self._metadata, strict=True):
            with _open(path, metadata) as opened:
                columns.append(opened.read(columns=[self._column]).column(0).to_numpy())
        # A label that is missing makes the column one of floats.
        return np.nan_to_num(np.concatenate(columns).astype(np.float64), nan=-1).astype(np.int64)

    @property
    def most(self) -> int:
        """Returns the largest label, -1 where there is none."""
        with self._lock:
            return int(self._all.max(initial=-1))

    def __getitem__(self, index: int) -> int | None:
        with self._lock:
            value = int(self._all[index])
        return None if value < 0 else value


def _columns(schema: Any, path: epath.Path) -> tuple[str, str, tuple[str, ...]]:
    """Finds the columns of image and label, "" where there is none, and the names of the classes."""
    features: dict[str, Any] = {}
    with contextlib.suppress(KeyError, TypeError, ValueError):  # not written by `datasets`
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]

    def holds_bytes(field: Any) -> bool:
        kind = field.type
        if pyarrow.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    images = [field.name for field in schema if holds_bytes(field)]
    require(bool(images), f"{path} has no column of images (bytes, or {{bytes, path}}), only {', '.join(schema.names)}")
    named = {
        name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    integers = [field.name for field in schema if pyarrow.types.is_integer(field.type)]
    labels = [name for name in integers if name in named] or [name for name in integers if name in ("label", "labels")]
    label = "label" if "label" in labels else labels[0] if labels else ""
    classes = tuple(features[label].get("names", ())) if label in named else ()
    return "image" if "image" in images else images[0], label, classes
