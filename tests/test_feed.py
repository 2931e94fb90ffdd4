"""For how long the devices stand idle for want of images."""

import threading
import types

import jax
import numpy as np
import pytest

from cjepa_jax.batch import Batch
from cjepa_jax.config import Mesh
from cjepa_jax.train import sharding
from cjepa_jax.train.feed import Feed


class Reader:
    """Gives a batch each time that `permits` lets it."""

    def __init__(self):
        self.permits = threading.Semaphore(0)

    def __next__(self):
        self.permits.acquire()
        return Batch(np.zeros((8, 2, 2, 1), np.uint8), np.zeros(8, np.int32))

    def close(self):
        pass


@pytest.fixture
def reader():
    made = Reader()
    yield made
    made.permits.release()


@pytest.fixture
def feed(reader):
    split = sharding.batch(sharding.make_mesh(Mesh()))
    images = jax.ShapeDtypeStruct((8, 2, 2, 1), np.uint8, sharding=split)
    labels = jax.ShapeDtypeStruct((8,), np.int32, sharding=split)
    made = Feed(reader, Batch(images, labels), lambda batch: None)
    with made:
        yield made
        reader.permits.release()


def working(*, ready: bool) -> types.SimpleNamespace:
    """Stands for a result of the step that the devices work on, or have ended."""
    return types.SimpleNamespace(is_ready=lambda: ready)


def test_waiting_of_idle_devices_is_measured(feed, reader):
    threading.Timer(0.5, reader.permits.release).start()
    batch = feed.take(working(ready=True))
    assert batch.images.shape == (8, 2, 2, 1)
    assert feed.seconds_waited > 0.4


def test_images_that_come_while_devices_work_cost_nothing(feed, reader):
    threading.Timer(0.5, reader.permits.release).start()
    feed.take(working(ready=False))
    assert feed.seconds_waited < 0.25
