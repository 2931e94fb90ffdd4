"""Waits for images without being held up: names the file that does not come, and gives up where that is wanted.

A read from a network file system that hangs cannot be ended, only left alone in its thread.
"""

import atexit
import concurrent.futures
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

from tqdm import tqdm

from cjepa_jax.errors import UserError

T = TypeVar("T")

NOTICE = 10.0  # seconds after which a file that is waited for is named
HANGS = 2.0  # seconds of a read after which a stop that is asked for does not wait for it any more

_reads: dict[int, tuple[Callable[[], str], float]] = {}  # thread -> what it reads, and since when
_named: set[str] = set()
_stop: list[Callable[[], bool]] = []  # whether the run is to stop


class StalledError(UserError):
    """An image was not read in time, or not before the run was told to stop."""


@contextlib.contextmanager
def reading(name: Callable[[], str]) -> Iterator[None]:
    """Marks its block as reading the file `name()`, so that `result` can name a file that does not come.

    `name` must not read anything itself. A block within another counts as part of it.
    """
    thread = threading.get_ident()
    if thread in _reads:
        yield
        return
    _reads[thread] = name, time.monotonic()
    try:
        yield
    finally:
        del _reads[thread]


@contextlib.contextmanager
def until(stop: Callable[[], bool]) -> Iterator[None]:
    """Lets `result` give up where an image hangs while `stop()` is true."""
    _stop.append(stop)
    try:
        yield
    finally:
        _stop.remove(stop)


def result(future: "concurrent.futures.Future[T]", *, timeout: float = 0) -> T:
    """Returns the result of a thread that reads images, and says on stderr which file does not come.

    Raises StalledError where one read has taken more than `timeout` seconds (0: never), or hangs when the run is to
    stop.
    """
    while not future.done():
        concurrent.futures.wait([future], timeout=0.2)  # a signal is noticed in between
        find_name, seconds = _longest()
        if future.done() or seconds < HANGS:
            continue
        name = find_name()
        if any(stop() for stop in _stop):
            raise StalledError(f"stopped while waiting for {name}, which was not read within {seconds:.0f} s")
        if timeout and seconds > timeout:
            raise StalledError(
                f"{name} was not read within data.read_timeout = {timeout:g} s; mend the storage and give the same "
                "command again, or wait longer with another data.read_timeout (0: for ever)"
            )
        if seconds > NOTICE and name not in _named:
            _named.add(name)
            patience = f"; gives up after data.read_timeout = {timeout:g} s" if timeout else ""
            tqdm.write(f"waiting for {name}, which was not read within {seconds:.0f} s{patience}", file=sys.stderr)
    return future.result()


def _longest() -> tuple[Callable[[], str], float]:
    """Returns what gives the name of what has been read for the longest time, and for how many seconds."""
    reads = list(_reads.values())
    if not reads:
        return str, 0.0
    name, since = min(reads, key=lambda read: read[1])
    return name, time.monotonic() - since


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Ends the process after the code that runs in it where a read still hangs; Python would wait for its thread."""
    try:
        yield
    finally:
        deadline = time.monotonic() + HANGS
        while _reads and time.monotonic() < deadline:
            time.sleep(0.02)
        if _reads:
            _end(sys.exc_info()[1])


def _end(error: BaseException | None) -> None:
    """Does all that Python does at the end but waiting for threads."""
    code: object = 0
    if isinstance(error, SystemExit):
        code = error.code or 0
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()  # JAX takes leave of the other processes
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
