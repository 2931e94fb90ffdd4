"""Yields training batches without end, by Grain, and a split's images in order.

The global stream (shuffle, crops, augmentation) is a function of the seed alone,
and each process takes its rows of every batch of it. So the k-th global batch is
the same, image by image, for any number of processes and threads, and a run can be
resumed from nothing but the number of batches that it has taken.
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
from jaxtyping import Int32, UInt8

from cjepa_jax.batch import NO_LABEL, Batch
from cjepa_jax.config import Data
from cjepa_jax.data import decode, waiting
from cjepa_jax.data.augment import Augmentation, augment
from cjepa_jax.data.sources import Source
from cjepa_jax.errors import UserError, one_line, require

_CHUNK = 8  # images a thread prepares at a time: fewer, larger pieces of work for Grain to keep in order
NO_IMAGE = -2  # in the place of the label of an image that cannot be read
Views = UInt8[np.ndarray, "*V H W C"]  # one image: [H, W, C], or [V, H, W, C] where there are V > 1 views
View = Callable[[int], tuple[UInt8[np.ndarray, "H W C"], int | None]]  # index of an image -> a crop of it, its label
_TRIES = 100  # of images that stand in for an unreadable one


def threads(data: Data) -> int:
    """Returns how many threads decode images in this process."""
    return data.threads or os.cpu_count() or 1


class Reader:
    """Reads crops of a source's images and remembers those that cannot be read. The loader's threads share it."""

    def __init__(self, source: Source, data: Data):
        self.source = source
        self.data = data
        self.unreadable: dict[str, str] = {}  # name -> why
        self._tried = self._expected = 0
        self._lock = threading.Lock()

    def crops(self, index: int, choose_boxes: Sequence[decode.ChooseBox]) -> tuple[list[decode.Crop], int | None]:
        """Reads and decodes an image once; returns one crop [H, W, C] uint8 for each box, and the label.

        Raises UnreadableError, and UserError where too many images cannot be read.
        """
        data = self.data
        with self._lock:
            self._tried += 1
        try:
            record = self.source.read(index)
            pixels = decode.crops(
                record["image"], choose_boxes, shape=data.image_shape, channels=data.channels, decoder=data.decoder
            )
        except decode.UnreadableError as error:
            self._remember(index, one_line(error))
            raise
        return pixels, record["label"]

    def expect(self, count: int) -> None:
        """Says that so many images will be read one after another, so that the first ones are not judged alone."""
        self._expected = max(self._expected, count)

    def _remember(self, index: int, reason: str) -> None:
        name, limit = self.source.name(index), self.data.max_bad_fraction
        with self._lock:
            self.unreadable[name] = reason
            # Of the first few images one alone would be a large share, and of a part of them the share is known to
            # within chance only, of which four standard deviations are left.
            seen = max(self._tried, self._expected, min(1000, len(self.source)))
            chance = 4 * math.sqrt(limit * seen) if seen < len(self.source) else 0.0
        require(
            len(self.unreadable) <= limit * seen + chance,
            f"{len(self.unreadable)} of the {self._tried} images tried cannot be read, more than "
            f"data.max_bad_fraction = {limit} allows; the last one: {name} ({reason})",
        )


def _random_views(
    reader: Reader, index: int, views: Sequence[Augmentation], rng: np.random.Generator
) -> tuple[list[decode.Crop], int | None]:
    """Draws the boxes of all views and then augments one crop after another. Raises as `Reader.crops` does."""
    height, width = reader.data.image_shape
    choose_boxes = []
    for view in views:
        low, high = (ratio * (width / height) for ratio in view.crop_ratio)
        choose_boxes.append(functools.partial(decode.random_box, scale=view.crop_scale, ratio=(low, high), rng=rng))
    crops, label = reader.crops(index, choose_boxes)
    return [augment(crop, view, rng) for crop, view in zip(crops, views, strict=True)], label


@dataclasses.dataclass(frozen=True)
class _RandomViews(grain.transforms.RandomMap):
    """Maps the index of an image to its random views and its label."""

    reader: Reader
    views: tuple[Augmentation, ...]

    def random_map(self, index: int, rng: np.random.Generator) -> tuple[Views, int | None]:
        for _ in range(_TRIES):
            try:
                crops, label = _random_views(self.reader, index, self.views, rng)
                return crops[0] if len(crops) == 1 else np.stack(crops), label
            except decode.UnreadableError:
                index = int(rng.integers(len(self.reader.source)))  # another one takes its place
        raise UserError(f"{_TRIES} images in a row cannot be read, the last one: {self.reader.source.name(index)}")


def _stack(chunks: list[list[tuple[Views, int | None]]]) -> Batch:
    images, labels = zip(*(item for chunk in chunks for item in chunk), strict=True)
    return Batch(np.stack(images), _as_array(labels))


def _as_array(labels: Sequence[int | None]) -> Int32[np.ndarray, " n"]:
    return np.array([NO_LABEL if label is None else label for label in labels], np.int32)


def check_labelled(batch: Batch) -> None:
    """Raises UserError where an image of a training batch has no label."""
    require(bool((batch.labels != NO_LABEL).all()), "data.train_split holds images without a label")


class _Rows(Sequence[Any]):
    """Cuts an endless stream into batches and keeps the given rows of each batch, one after another."""

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
    views: Sequence[Augmentation] | None = None,
) -> grain.DatasetIterator:
    """Returns an endless iterator over `Batch`es, from batch number `start` on.

    Each batch holds the given rows of the global batch, by default all n of them:
    images [n, H, W, C] uint8 and labels [n] int32, NO_LABEL where an image has
    none. `views` says how each view of an image is cropped and augmented; by
    default there is one, as `reader.data` describes it. With V > 1 views, the
    images are [n, V, H, W, C].

    Every image comes once an epoch, in an order that the seed and the epoch
    give; a batch may hold the end of one epoch and the start of the next. A random
    other image stands in for one that cannot be read.

    The iterator raises UserError where too many images cannot be read.
    """
    data = reader.data
    rows = range(data.batch_size) if rows is None else rows
    transform = _RandomViews(reader, (Augmentation.of(data),) if views is None else tuple(views))
    share = len(rows)
    chunk = math.gcd(share, _CHUNK)
    indices = grain.MapDataset.range(len(reader.source)).seed(seed).shuffle().repeat()
    images = grain.MapDataset.source(_Rows(indices.random_map(transform), data.batch_size, rows))
    chunks = images.batch(chunk, drop_remainder=True, batch_fn=list)  # copied once, into the batch
    options = grain.ReadOptions(num_threads=threads(data), prefetch_buffer_size=data.prefetch * share // chunk)
    batches = iter(chunks.to_iter_dataset(options).batch(share // chunk, batch_fn=_stack))
    batches.set_state({"next_index": start * share // chunk})
    return batches


def central_view(reader: Reader, *, crop_fraction: float) -> View:
    """Returns a view of central crops, whose sides are `crop_fraction` of the largest crop of their shape."""
    height, width = reader.data.image_shape
    choose_box = functools.partial(decode.central_box, aspect=width / height, fraction=crop_fraction)

    def view(index: int) -> tuple[decode.Crop, int | None]:
        crops, label = reader.crops(index, [choose_box])
        return crops[0], label

    return view


def random_view(reader: Reader, *, seed: Sequence[int]) -> View:
    """Returns a view of random crops, augmented as `reader.data` says: a function of the seed and the index."""

    def view(index: int) -> tuple[decode.Crop, int | None]:
        rng = np.random.default_rng((*seed, index))
        crops, label = _random_views(reader, index, [Augmentation.of(reader.data)], rng)
        return crops[0], label

    return view


def labelled_batches(
    reader: Reader, indices: Sequence[int], *, size: int, view: View, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yields the images at `indices` in batches of `size`; of each batch the given r rows, by default all.

    A batch has images [r, H, W, C] uint8 and labels [r] int32. An image that cannot
    be read, or lies behind the last one, is zeros with the label NO_IMAGE; an
    image without a label has NO_LABEL.

    Raises UserError where too many images cannot be read, and StalledError where one does not come.
    """
    data, rows = reader.data, range(size) if rows is None else rows
    nothing = np.zeros((*data.image_shape, data.channels), np.uint8), NO_IMAGE
    reader.expect(len(indices) * len(rows) // size)

    def one(position: int) -> tuple[np.ndarray, int | None]:
        if position < len(indices):
            with contextlib.suppress(decode.UnreadableError):
                return view(int(indices[position]))
        return nothing

    pool = concurrent.futures.ThreadPoolExecutor(threads(data))
    try:
        ahead: list[list[concurrent.futures.Future[tuple[np.ndarray, int | None]]]] = []
        for start in range(0, len(indices) + size, size):  # read one batch ahead of what the caller works on
            if start < len(indices):
                ahead.append([pool.submit(one, start + row) for row in rows])
            if start:
                yield _stack([[waiting.result(image, timeout=data.read_timeout) for image in ahead.pop(0)]])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a read may hang


def ordered_batches(
    reader: Reader, *, size: int, crop_fraction: float
) -> Iterator[tuple[UInt8[np.ndarray, "n H W C"], list[int | None]]]:
    """Yields a source's readable images in order, centrally cropped, and their labels; n is at most `size`.

    Raises UserError where too many images cannot be read.
    """
    view = central_view(reader, crop_fraction=crop_fraction)
    for images, labels in labelled_batches(reader, range(len(reader.source)), size=size, view=view):
        read = labels != NO_IMAGE
        if read.any():
            yield images[read], [None if label == NO_LABEL else int(label) for label in labels[read]]
