"""Opens data sets of images, which give random access to records {"image", "label"}.

An image is the bytes of an image file or pixels [H, W] or [H, W, 3] uint8; a label
is an int, or None. Splits are TFDS split expressions everywhere. `data.source` is one of:

digits  scikit-learn's 1,797 scanned digits; splits train and test.
npz     `data.data_dir` is a file of arrays SPLIT_images [n, H, W] or [n, H, W, 3]
        uint8 and, where there are labels, SPLIT_labels [n] or [n, 1].
folder  `data.data_dir` is a folder of images: see folder.py.
tfds    A data set in ArrayRecord files, by its TFDS name, or, with none, `data.data_dir` itself, as of `prepare`.
webdataset, parquet  `data.data_dir` is a folder of tar shards or of Parquet files.
clevr_count, clevr_distance  TFDS' clevr with the labels of VTAB (arXiv 1910.04867).
own     Images that a program gave: `from_arrays`, or a Source of its own.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Sequence, Sized
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from cjepa_jax.config import Data
from cjepa_jax.data import archives, folder, tars, waiting
from cjepa_jax.data.decode import UnreadableError
from cjepa_jax.errors import UserError, one_line, require
from cjepa_jax.files import check_bucket_support

Record = dict[str, Any]  # {"image", "label"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds one split of a data set."""

    records: Sequence[Record]
    fingerprint: str  # tells this split's content from any other's
    classes: tuple[str, ...]  # names of the labels; () where images have none
    name: Callable[[int], str]  # where record i comes from, for messages
    label: Callable[[int], int | None] | None = None  # of record i, where that is known without reading its image

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> Record:
        """Returns record `index`. Raises UnreadableError where the storage does not give it."""
        try:
            with waiting.reading(lambda: self.name(index)):
                return self.records[index]
        except Exception as error:  # each kind of storage fails in its own way
            raise UnreadableError(f"{type(error).__name__}: {error}") from error

    def label_of(self, index: int) -> int | None:
        """Returns the label of record `index`, None where it is unknown or its image cannot be read."""
        if self.label:
            return self.label(index)
        with contextlib.suppress(UnreadableError):
            return self.read(index)["label"]
        return None

    def labels(self) -> list[int | None]:
        """Returns the labels of all records; where the storage gives them only with the images, these are read.

        An image that cannot be read has the label None, too.
        """
        if self.label:
            return [self.label(index) for index in range(len(self))]
        with concurrent.futures.ThreadPoolExecutor(32) as pool:  # on gs:// each read takes long
            found = pool.map(self.label_of, range(len(self)))
            return list(tqdm(found, "labels", len(self), delay=5, disable=not sys.stderr.isatty(), leave=False))

    def is_labelled(self) -> bool:
        """Tells whether any record has a label; where none of a hundred has one, all are looked at."""
        few = range(0, len(self), -(-len(self) // 100) or 1)
        return any(self.label_of(index) is not None for index in few) or any(x is not None for x in self.labels())


def load(data: Data, split: str) -> Source:
    """Returns a split of the source that `data` names.

    Raises UserError where it does not exist, cannot be prepared, or holds no images.
    """
    check_bucket_support(epath.Path(data.data_dir), "data.data_dir", needs=("gcsfs",))
    source = _LOADERS[data.source](data, split)
    require(len(source) > 0, f"data: split {split!r} of {data.name or data.source} holds no images")
    return source


class Records(Sequence[Record]):
    """Makes records from their indices, on demand."""

    def __init__(self, length: int, read: Callable[[int], Record]):
        self._length, self._read = length, read

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        return self._read(range(self._length)[index])


def from_arrays(
    images: np.ndarray, labels: np.ndarray | None = None, *, name: str = "array", classes: tuple[str, ...] = ()
) -> Source:
    """Makes one split of images [n, H, W] or [n, H, W, 3] uint8 and integer labels [n] or [n, 1], all in memory.

    A negative label is an unknown one. Raises UserError for other shapes and types.
    """
    require(
        images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)),
        f"{name}: images must be [n, H, W] or [n, H, W, 3] uint8, got {images.shape} {images.dtype}",
    )
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    if labels is not None:
        require(
            np.issubdtype(labels.dtype, np.integer) and labels.size == len(images) == len(labels),
            f"{name}: labels must be {len(images)} integers, got {labels.shape} {labels.dtype}",
        )
        labels = labels.reshape(-1).astype(np.int32)
        digest.update(labels.data)
        classes = classes or tuple(str(i) for i in range(labels.max(initial=-1) + 1))

    def label(index: int) -> int | None:
        return None if labels is None or labels[index] < 0 else int(labels[index])

    def read(index: int) -> Record:
        return {"image": images[index], "label": label(index)}

    fingerprint = f"{len(images)} images {digest.hexdigest()[:16]}"
    return Source(Records(len(images), read), fingerprint, classes, lambda index: f"{name}[{index}]", label)


def _digits(data: Data, split: str) -> Source:
    """Loads the digits; a stratified fifth of them is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    splits = {"train": train, "test": test}
    index = np.concatenate([splits[name][part] for name, part in _parts(split, **splits)])
    return from_arrays(images[index], labels[index], name=f"digits {split}")


def _npz(data: Data, split: str) -> Source:
    path = os.path.expanduser(data.data_dir)
    try:
        with open(path, "rb") as file, np.load(file) as stored:
            arrays = dict(stored)
    except Exception as error:  # NumPy raises many kinds for what is damaged or another format
        raise UserError(f"data.data_dir = {data.data_dir!r} is not a readable .npz file: {one_line(error)}") from None
    images = {key.removesuffix("_images"): array for key, array in arrays.items() if key.endswith("_images")}
    require(bool(images), f"{path} holds no array named SPLIT_images, only {', '.join(arrays)}")
    parts = _parts(split, **images)
    labels = [arrays[f"{name}_labels"][part] for name, part in parts if f"{name}_labels" in arrays]
    return from_arrays(
        np.concatenate([images[name][part] for name, part in parts]),
        np.concatenate(labels) if len(labels) == len(parts) else None,
        name=f"{path} {split}",
    )


def _folder(data: Data, split: str) -> Source:
    require(bool(data.data_dir), "data.data_dir is empty: --config.data.data_dir=FOLDER names the folder of images")
    try:
        found = folder.scan(data.data_dir)
    except UserError as error:
        raise UserError(f"data.data_dir: {error}") from None
    files = [file for name, part in _parts(split, **found.splits) for file in found.splits[name][part]]

    def read(index: int) -> Record:
        with open(os.path.join(found.root, files[index].path), "rb") as file:
            return {"image": file.read(), "label": files[index].label}

    classes = found.classes if all(file.label is not None for file in files) else ()
    return Source(
        Records(len(files), read),
        f"{len(files)} files {folder.fingerprint(files)}",
        classes,
        lambda index: os.path.join(found.root, files[index].path),
        lambda index: files[index].label,
    )


def _parts(split: str, **splits: Sized) -> list[tuple[str, slice]]:
    """Returns what a split expression such as "train[:80%]+test" selects of named sequences."""
    import tensorflow_datasets as tfds

    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[len(items)], num_bytes=0) for name, items in splits.items()
    }
    try:
        instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        raise UserError(f"data: split {split!r} cannot be read: {one_line(error)}") from None
    return [(i.splitname, slice(i.from_, i.to)) for i in instructions]


def _tfds(data: Data, split: str) -> Source:
    from cjepa_jax.data import tfds_sets  # which imports TFDS

    found = tfds_sets.load(data, split)
    return Source(Records(found.length, found.read), found.fingerprint, found.classes, found.name)


def _archive(data: Data, split: str) -> Source:
    """Opens tar shards or Parquet files; images stay in them until a thread wants one."""
    require(bool(data.data_dir), "data.data_dir is empty: --config.data.data_dir=FOLDER names the folder of the files")
    from cjepa_jax.data import parquet  # which imports pyarrow

    try:
        found = (parquet if data.source == "parquet" else tars).scan(data.data_dir)
    except UserError as error:
        raise UserError(f"data.data_dir: {error}") from None
    places = {name: range(archive.length) for name, archive in found.splits.items()}
    parts = [(found.splits[name], places[name][part]) for name, part in _parts(split, **places)]
    ends = np.cumsum([len(indices) for _, indices in parts])

    def find(index: int) -> tuple[archives.Archive, int]:
        which = int(np.searchsorted(ends, index, side="right"))
        archive, indices = parts[which]
        return archive, indices[index - int(ends[which])]  # counted from the end of its part

    def label(index: int) -> int | None:
        archive, at = find(index)
        return archive.place(at).label

    def read(index: int) -> Record:
        archive, at = find(index)
        return {"image": archive.read(at), "label": archive.place(at).label}

    def name(index: int) -> str:
        archive, at = find(index)
        return os.path.join(data.data_dir, archive.name(at))

    content = " ".join(f"{one} {archive.fingerprint}" for one, archive in sorted(found.splits.items()))
    length = int(ends[-1]) if parts else 0
    return Source(Records(length, read), f"{length} images of {split}: {content}", found.classes, name, label)


def _own(data: Data, split: str) -> Source:
    raise UserError(
        "data.source = 'own' are images that a program gave to cjepa_jax.train, and they cannot be found again: name "
        "the images by data.source and data.data_dir, or, in training, switch evaluation off by eval.every=0"
    )


_LOADERS: dict[str, Callable[[Data, str], Source]] = {
    "digits": _digits,
    "npz": _npz,
    "folder": _folder,
    "tfds": _tfds,
    "clevr_count": _tfds,
    "clevr_distance": _tfds,
    "webdataset": _archive,
    "parquet": _archive,
    "own": _own,
}
