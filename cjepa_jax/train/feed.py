"""Batches on the devices, one ahead of the step."""

import concurrent.futures
import time
from collections.abc import Callable

import grain
import jax
import numpy as np
from jaxtyping import PyTree

from cjepa_jax.batch import Batch
from cjepa_jax.data import waiting
from cjepa_jax.train import sharding


class Feed:
    """Brings batches to the devices; measures for how long the devices stood idle for want of one."""

    seconds_waited = 0.0
    failure: Exception | None = None  # of this process, among several; the others must hear of it before it leaves

    def __init__(
        self, batches: grain.DatasetIterator, shapes: Batch, check: Callable[[Batch], None], timeout: float = 0
    ):
        """Starts reading `batches`, this process's rows of the global batch of `shapes`; `check` sees each of them.

        timeout: seconds that an image may take to be read; 0: any time.
        """
        self._batches, self._shapes, self._check, self._timeout = batches, shapes, check, timeout
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._next = self._thread.submit(self._fetch)

    def __enter__(self):
        return self

    def _fetch(self) -> Batch:
        batch = next(self._batches)
        self._check(batch)
        return jax.tree.map(sharding.from_local_rows, batch, self._shapes)

    def take(self, running: PyTree) -> Batch:
        """Gives the next batch; `running` are results of the step that the devices work on meanwhile.

        Raises what went wrong with the batch, such as StalledError where an image does not come. With several
        processes, it gives zeros then and sets `failure`.
        """
        while not (self._next.done() or all(x.is_ready() for x in jax.tree.leaves(running))):
            time.sleep(0.0005)
        idle_since = time.perf_counter()
        try:
            batch = waiting.result(self._next, timeout=self._timeout)
        except Exception as error:
            if jax.process_count() == 1:
                raise
            self.failure = error
            # For the step that the others take too; its result is never saved.
            with jax.transfer_guard("allow"):
                return jax.tree.map(lambda x: sharding.from_local_rows(_zeros(x), x), self._shapes)
        self.seconds_waited += time.perf_counter() - idle_since
        self._next = self._thread.submit(self._fetch)
        return batch

    def __exit__(self, *_):
        concurrent.futures.wait([self._next], timeout=waiting.HANGS)
        self._thread.shutdown(wait=self._next.done())  # a read may hang
        self._batches.close()


def _zeros(array: jax.ShapeDtypeStruct) -> np.ndarray:
    """Makes zeros in the place of this process's rows."""
    return np.zeros((len(sharding.local_rows(array)), *array.shape[1:]), array.dtype)
