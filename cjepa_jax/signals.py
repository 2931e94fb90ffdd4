"""What Ctrl-C (SIGINT) and SIGTERM do to a command: they end it at once, let it clean up, or let it save first."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

BOTH = (signal.SIGINT, signal.SIGTERM)


def end_at_once() -> None:
    """Lets both signals end the process at once and without a word; a shell sees exit code 130 or 143.

    No Python code has to run for that, which could wait for minutes while something compiles. A signal that is ignored,
    as of a job that a script runs in the background, stays ignored.
    """
    handler: Any = signal.SIG_DFL
    if os.getpid() == 1:  # alone in a container, where the kernel drops signals that have no handler
        handler = lambda signum, frame: os._exit(128 + signum)  # noqa: E731
    _handle(handler)


def _handle(handler: Any) -> dict[int, Any]:
    """Sets the handler of both signals, but for one that is ignored; gives the former handlers."""
    heard = [signum for signum in BOTH if signal.getsignal(signum) != signal.SIG_IGN]
    return {signum: signal.signal(signum, handler) for signum in heard}


def end(signum: int) -> None:
    """Ends the process as this signal does."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)


@contextlib.contextmanager
def cleaned_up(says: str = "") -> Iterator[None]:
    """Lets what runs in it clean up after the first signal, by a KeyboardInterrupt, before the process ends.

    says: a line for stderr. A second signal ends the process at once.
    """

    def interrupt(signum, frame):
        end_at_once()
        raise KeyboardInterrupt(signum)

    previous = _handle(interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        if says:
            print(says, file=sys.stderr, flush=True)
        end(*error.args or (signal.SIGINT,))
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class Stop:
    """Once it listens, the first signal is a request to save and leave; a second one does what signals did before.

    A signal that is ignored stays ignored.
    """

    requested = False
    newest: "Stop | None" = None  # the last one entered; a study looks there whether its run was told to stop

    def __init__(self):
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        Stop.newest = self
        return self

    def listen(self) -> None:
        """Says that from now on there is something to save. Python knows signals in its main thread only."""
        if not self._previous and threading.current_thread() is threading.main_thread():
            self._previous = _handle(self._request)

    def _request(self, signum, frame):
        self.requested = True
        self.__exit__()

    def __exit__(self, *_):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
