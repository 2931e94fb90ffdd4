"""Ends a process with one line when another one of the same run is lost or cannot go on.

Each process gives signs of life in JAX's store of keys and values, which process 0 keeps, and looks for those of the
others there. The first that misses one, or cannot go on itself, leaves a note in the store, and all end by that note.
When the store itself is gone, so is process 0.
"""

import atexit
import contextlib
import ctypes
import functools
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from etils import epath
from jax._src import distributed  # which alone gives the store
from jax._src.lib import _jax  # where the client is made that tells of the loss of process 0

from cjepa_jax.errors import StorageError, UserError, one_line

BEAT = 2.0  # seconds between two signs of life
PATIENCE = 25  # how many looks in a row may find the same sign of life
_DOUBT = 5  # as PATIENCE, when an error shows that a process may be lost
_ENDED = "ended"
_LOST = "process {} was lost (killed, paused or cut off)"
_KEYS = "cjepa_jax/peers"

_leaving = threading.Lock()  # taken once, and never given back
_watch: "_Watch | None" = None


class _Watch(threading.Thread):
    """Gives signs of life and looks for those of the others."""

    patience = PATIENCE
    workdir: epath.Path | None = None  # of the run, as soon as it is known

    def __init__(self):
        super().__init__(daemon=True, name="peers")
        self._client: Any = distributed.global_state.client
        self._process, self._stopping = distributed.global_state.process_id, threading.Event()

    def run(self) -> None:
        count, seen = 0, dict[str, tuple[str, int]]()  # each sign of life, and how many looks have found it
        while not self._stopping.wait(BEAT):
            unanswered = threading.Timer(PATIENCE * BEAT, _leave, [_LOST.format(0)])  # process 0 is paused, say
            unanswered.start()
            try:
                self._client.key_value_set(f"{_KEYS}/{self._process}", str(count), allow_overwrite=True)
                found = dict(self._client.key_value_dir_get(_KEYS))
            except jax.errors.JaxRuntimeError:
                _leave(_LOST.format(0))
            finally:
                unanswered.cancel()
            count += 1
            if note := found.pop(f"{_KEYS}/note", None):
                if self._process == 0:
                    time.sleep(2 * BEAT)  # until all have read it
                _leave(note)
            for key, sign in found.items():
                before, looks = seen.get(key, ("", 0))
                seen[key] = (sign, looks + 1 if sign == before else 0)
                if sign != _ENDED and seen[key][1] > self.patience:
                    self.tell(_LOST.format(key.rpartition("/")[2]))

    def tell(self, note: str) -> None:
        """Leaves a note that all end by, unless there is one."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_KEYS}/note", note)

    def stop(self) -> None:
        """Ends the thread that gives signs of life; the others then miss this process."""
        self._stopping.set()
        self.join()

    def end(self) -> None:
        """Ends the signs of life, and lets nobody miss them."""
        self.stop()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_KEYS}/{self._process}", _ENDED, allow_overwrite=True)


def watch() -> None:
    """Begins to watch the other processes of the run, where there are some."""
    global _watch
    if distributed.global_state.num_processes > 1:
        _watch = _Watch()
        _watch.start()
        atexit.register(_watch.stop)  # before the store is taken from it


@contextlib.contextmanager
def training(workdir: epath.Path) -> Iterator[None]:
    """Watches until the training ends: this process may go before the others do."""
    if _watch:
        _watch.workdir = workdir
    try:
        yield
    finally:
        if _watch:
            _watch.end()


@contextlib.contextmanager
def leaving_at_once(*, unless: Callable[[Exception], bool] = lambda error: False) -> Iterator[None]:
    """Ends this process and the others after an error, without cleaning up, which would be to wait for one another.

    Where `unless(error)` is true, the error is raised as usual, because all processes raise one after the same step,
    or because the caller handles it.
    """
    try:
        yield
    except Exception as error:
        if _watch is None or unless(error):
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):  # most likely because another process is gone
            _doubt()
        if not isinstance(error, StorageError | UserError):
            traceback.print_exception(error)
        _watch.tell(f"process {jax.process_index()} cannot go on ({one_line(error)[:1000]})")
        time.sleep(10 * BEAT)  # the watch leaves meanwhile
        _leave(_LOST.format(0))


def _doubt() -> None:
    """Gives the watch the time to find out, sooner than usual, that another process is lost, and to leave."""
    if _watch and _watch.is_alive():
        _watch.patience = _DOUBT
        host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
        for _ in range(3 * _DOUBT):  # process 0 leaves last, and looks may be slow
            try:
                socket.create_connection((host, int(port)), timeout=BEAT).close()
            except OSError:  # the store is gone, but the watch still waits for an answer
                _leave(_LOST.format(0))
            time.sleep(BEAT)


def _leave(reason: str) -> NoReturn:
    """Ends this process with one line; of several threads, the first."""
    _leaving.acquire()
    then = f"error: {reason}, so all have ended; start all again: the same command goes on from {_newest()}\n"
    os.write(2, f"{chr(10) if os.isatty(2) else ''}{then}".encode())
    os._exit(1)


def _newest() -> str:
    """Names the newest checkpoint, where the workdir tells of it soon."""
    found = ["the newest checkpoint"]

    def look() -> None:
        with contextlib.suppress(Exception):
            from cjepa_jax.train import orbax  # which takes long to import, and has been imported if there is a workdir

            assert _watch and _watch.workdir
            steps = orbax.saved_steps(_watch.workdir)
            newest = _watch.workdir / "checkpoints" / str(max(steps, default=0))
            found.append(f"checkpoint {newest}" if steps else "its beginning")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(10)
    return found[-1]


@contextlib.contextmanager
def without_abort() -> Iterator[None]:
    """Keeps JAX's client and other C++ code from aborting when a process is lost: the watch is to say which one it is.

    When process 0 dies, the client would abort the process with a stack trace. It would call a function instead, but
    cannot convert the status for it, and raises std::bad_cast in a thread of C++ where nobody catches it. Gloo, which
    connects CPUs, does so with errors of its own. The handler that is set here gets them all.
    """
    make_client = _jax.get_distributed_runtime_client
    if _set_handler():
        replaced = functools.partial(make_client, missed_heartbeat_callback=lambda status: _doubt())
        _jax.get_distributed_runtime_client = replaced
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make_client


@functools.cache  # and keeps the handler, of which C++ holds no more than a pointer
def _set_handler() -> Any | None:
    """Lets an exception of C++ that nobody catches wait for the watch, where the system has libstdc++."""
    try:
        set_handler = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):
        return None
    set_handler.restype = ctypes.c_void_p

    @ctypes.CFUNCTYPE(None)
    def handler() -> None:
        _doubt()
        ctypes.CFUNCTYPE(None)(before)()

    before = set_handler(handler)
    return handler
