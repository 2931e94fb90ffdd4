"""Grain pipelines: the endless stream of training batches, and the images of a probe.

The global stream (shuffle, crops) is a function of the seed alone; process p of
n takes every n-th image of it. So the n-th global batch holds the same images
for any number of processes and threads, and the state of the stream is the
number of batches taken.
"""

import concurrent.futures
import dataclasses
from typing import Any

import grain
import numpy as np

from cjepa_jax.config import Data, require
from cjepa_jax.data import decode
from cjepa_jax.data.sources import Source


@dataclasses.dataclass(frozen=True)
class _RandomCrop(grain.transforms.RandomMap):
    data: Data

    def random_map(self, record: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
        image = decode.open_image(record["image"], self.data.channels)
        box = decode.random_box(*image.size, scale=self.data.crop_scale, ratio=self.data.crop_ratio, rng=rng)
        return decode.resize(image, box, self.data.image_size)


def train_batches(
    source: Source, data: Data, *, seed: int, process: int = 0, processes: int = 1
) -> grain.DatasetIterator:
    """Endless iterator over this process's share of the batches, [B / processes, H, W, C] uint8.

    Every image comes once an epoch, in an order that the seed and the epoch
    give; a batch may hold the end of one epoch and the start of the next.
    """
    require(
        data.batch_size % processes == 0,
        f"data.batch_size = {data.batch_size} is not divisible by the {processes} processes",
    )
    stream = grain.MapDataset.source(source.records).seed(seed).shuffle().repeat().random_map(_RandomCrop(data))
    batches = stream[process::processes].batch(data.batch_size // processes, drop_remainder=True)
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.prefetch)
    return iter(batches.to_iter_dataset(options))


def probe_images(source: Source, data: Data, *, crop_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """All images of a source, centrally cropped, [n, H, W, C] uint8, and their labels [n]."""

    def one(index: int) -> tuple[np.ndarray, int]:
        record = source.records[index]
        image = decode.open_image(record["image"], data.channels)
        box = decode.central_box(*image.size, fraction=crop_fraction)
        return decode.resize(image, box, data.image_size), record["label"]

    with concurrent.futures.ThreadPoolExecutor(data.threads) as pool:
        images, labels = zip(*pool.map(one, range(len(source))), strict=True)
    return np.stack(images), np.array(labels)
