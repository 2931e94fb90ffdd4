"""The endless stream of training batches, by Grain, and a split's images in order.

The global stream (shuffle, crops, augmentation) is a function of the seed alone,
and a process takes its rows of each batch of it. So the k-th global batch is the
same, image by image, for any number of processes and threads, and the number of
batches taken says all there is to know to go on.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from cjepa_jax.config import Data, UserError, one_line, require
from cjepa_jax.data import decode
from cjepa_jax.data.augment import augment
from cjepa_jax.data.sources import Source

_CHUNK = 8  # images a thread prepares at a time: fewer, larger pieces of work for Grain to keep in order
NO_LABEL, NO_IMAGE = -1, -2  # in the place of a label
View = Callable[[int], tuple[np.ndarray, int | None]]  # index of an image -> a crop of it [H, W, C] uint8, its label
Distort = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # a crop -> one of the same shape
_TRIES = 100  # of images that stand in for an unreadable one


def threads(data: Data) -> int:
    """How many threads decode."""
    return data.threads or os.cpu_count() or 1


class Reader:
    """Crops of a source's images; remembers those that cannot be read. Shared by the loader's threads."""

    def __init__(self, source: Source, data: Data):
        self.source = source
        self.data = data
        self.unreadable: dict[str, str] = {}  # name -> why
        self._tried = 0
        self._lock = threading.Lock()

    def crop(self, index: int, choose_box: Callable[[int, int], decode.Box]) -> tuple[np.ndarray, int | None]:
        """([H, W, C] uint8, label) of an image.

        Raises UnreadableError, and UserError where there are too many such images.
        """
        data = self.data
        with self._lock:
            self._tried += 1
        try:
            record = self.source.read(index)
            pixels = decode.crop(
                record["image"], choose_box, size=data.image_size, channels=data.channels, decoder=data.decoder
            )
        except decode.UnreadableError as error:
            self._remember(index, one_line(error))
            raise
        return pixels, record["label"]

    def _remember(self, index: int, reason: str) -> None:
        name, limit = self.source.name(index), self.data.max_bad_fraction
        with self._lock:
            self.unreadable[name] = reason
            # Not of the first few alone, where one is already a large share.
            share = len(self.unreadable) / max(self._tried, min(1000, len(self.source)))
        require(
            share <= limit,
            f"{share:.1%} of the images tried cannot be read, more than data.max_bad_fraction = {limit}; "
            f"the last one: {name} ({reason})",
        )


@dataclasses.dataclass(frozen=True)
class _RandomCrop(grain.transforms.RandomMap):
    """Index of an image -> its random crop [H, W, C] uint8, and its label."""

    reader: Reader
    distort: Distort | None

    def random_map(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int | None]:
        data = self.reader.data
        choose_box = functools.partial(decode.random_box, scale=data.crop_scale, ratio=data.crop_ratio, rng=rng)
        for _ in range(_TRIES):
            try:
                pixels, label = self.reader.crop(index, choose_box)
                pixels = augment(pixels, data, rng)
                return (self.distort(pixels, rng) if self.distort else pixels), label
            except decode.UnreadableError:
                index = int(rng.integers(len(self.reader.source)))  # another one takes its place
        raise UserError(f"{_TRIES} images in a row cannot be read, the last one: {self.reader.source.name(index)}")


def _stack(chunks: list[list[tuple[np.ndarray, int | None]]]) -> np.ndarray:
    return np.stack([image for chunk in chunks for image, _ in chunk])


def _stack_labelled(chunks: list[list[tuple[np.ndarray, int | None]]]) -> tuple[np.ndarray, np.ndarray]:
    labels = [label for chunk in chunks for _, label in chunk]
    require(None not in labels, "data.train_split holds images without a label")
    return _stack(chunks), np.array(labels, np.int32)


class _Rows(Sequence[Any]):
    """Of an endless stream cut into batches, the given rows of each batch, one after another."""

    def __init__(self, stream: Sequence[Any], batch_size: int, rows: Sequence[int]):
        self._stream, self._batch_size, self._rows = stream, batch_size, rows

    def __len__(self) -> int:
        return len(self._stream) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        batch, row = divmod(index, len(self._rows))
        return self._stream[batch * self._batch_size + self._rows[row]]


def train_batches(
    reader: Reader,
    *,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
    labelled: bool = False,
    distort: Distort | None = None,
) -> grain.DatasetIterator:
    """Endless iterator over the batches from `start` on: of each the given rows, by default all, [n, H, W, C] uint8.

    With `labelled` each is a pair with the labels [n] int32. `distort` is done to a
    crop after all that `reader.data` asks for.

    Every image comes once an epoch, in an order that the seed and the epoch
    give; a batch may hold the end of one epoch and the start of the next. In the
    place of an image that cannot be read stands a random other one.

    Raises UserError, in the midst, where too many images cannot be read, and where a label is missing.
    """
    data = reader.data
    rows = range(data.batch_size) if rows is None else rows
    share = len(rows)
    chunk = math.gcd(share, _CHUNK)
    indices = grain.MapDataset.range(len(reader.source)).seed(seed).shuffle().repeat()
    images = grain.MapDataset.source(_Rows(indices.random_map(_RandomCrop(reader, distort)), data.batch_size, rows))
    chunks = images.batch(chunk, drop_remainder=True, batch_fn=list)  # copied once, into the batch
    options = grain.ReadOptions(num_threads=threads(data), prefetch_buffer_size=data.prefetch * share // chunk)
    stack = _stack_labelled if labelled else _stack
    batches = iter(chunks.to_iter_dataset(options).batch(share // chunk, batch_fn=stack))
    batches.set_state({"next_index": start * share // chunk})
    return batches


def central_view(reader: Reader, *, crop_fraction: float) -> View:
    """Central crops, whose side is `crop_fraction` of the image's short side."""
    choose_box = functools.partial(decode.central_box, fraction=crop_fraction)
    return lambda index: reader.crop(index, choose_box)


def random_view(reader: Reader, *, seed: Sequence[int]) -> View:
    """Random crops and augmentation as `reader.data` has them, a function of the seed and the index."""
    data = reader.data

    def view(index: int) -> tuple[np.ndarray, int | None]:
        rng = np.random.default_rng((*seed, index))
        choose_box = functools.partial(decode.random_box, scale=data.crop_scale, ratio=data.crop_ratio, rng=rng)
        pixels, label = reader.crop(index, choose_box)
        return augment(pixels, data, rng), label

    return view


def labelled_batches(
    reader: Reader, indices: Sequence[int], *, size: int, view: View, rows: Sequence[int] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The images at `indices` in batches of `size`, of each the given rows, by default all.

    Yields [r, H, W, C] uint8 and their labels [r] int32. Where an image cannot be
    read, and behind the last one, there are zeros and the label NO_IMAGE; an
    image without a label has NO_LABEL.

    Raises UserError where too many cannot be read.
    """
    data, rows = reader.data, range(size) if rows is None else rows
    nothing = np.zeros((data.image_size, data.image_size, data.channels), np.uint8), NO_IMAGE

    def one(position: int) -> tuple[np.ndarray, int | None]:
        if position < len(indices):
            with contextlib.suppress(decode.UnreadableError):
                return view(int(indices[position]))
        return nothing

    with concurrent.futures.ThreadPoolExecutor(threads(data)) as pool:
        ahead: list[Iterator[tuple[np.ndarray, int | None]]] = []
        for start in range(0, len(indices) + size, size):  # read one batch ahead of what the caller works on
            if start < len(indices):
                ahead.append(pool.map(one, [start + row for row in rows]))
            if start:
                found = list(ahead.pop(0))
                labels = [NO_LABEL if label is None else label for _, label in found]
                yield np.stack([pixels for pixels, _ in found]), np.array(labels, np.int32)


def ordered_batches(
    reader: Reader, *, size: int, crop_fraction: float
) -> Iterator[tuple[np.ndarray, list[int | None]]]:
    """A source's readable images, centrally cropped: ([n, H, W, C] uint8, n labels), n at most `size`.

    Raises UserError where too many cannot be read.
    """
    view = central_view(reader, crop_fraction=crop_fraction)
    for images, labels in labelled_batches(reader, range(len(reader.source)), size=size, view=view):
        read = labels != NO_IMAGE
        if read.any():
            yield images[read], [None if label == NO_LABEL else int(label) for label in labels[read]]
