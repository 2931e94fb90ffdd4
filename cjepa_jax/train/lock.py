"""One run at a time in a workdir: WORKDIR/lock.json names the process that trains there, and shows that it lives.

The lock is a lease. Its owner gives a sign of life every BEAT seconds, and who finds the lock waits for one: no clocks
of two machines are compared. Without a sign for LEASE seconds the owner counts as dead. On the machine of the owner
nobody has to wait, because there its process can be looked for.

On disk, changes are made under `flock` where the file system has it. On gs:// every change is conditional on the
generation of the object that was read, so of two who want it one gets it. Neither can stop an owner that was paused for
longer than LEASE in the middle of a write; it notices afterwards, and stops before its next checkpoint.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from cjepa_jax.errors import UserError, one_line
from cjepa_jax.files import is_remote
from cjepa_jax.train import distributed

BEAT = 10.0  # seconds between two signs of life
LEASE = 50.0  # seconds without one after which an owner counts as dead
POLL = 1.0
SEEN = 60.0  # seconds until all processes see what one has written: network disks answer from memory for a while


class LockLostError(RuntimeError):
    """Another run has taken the workdir over."""


class Lock:
    """Holds the lock of a workdir for all processes of a run; process 0 does the work."""

    failure: LockLostError | None = None  # set when another run has taken the lock over

    def __init__(self, workdir: epath.Path):
        self._workdir = workdir
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        me = {"host": socket.gethostname(), "process": os.getpid()}
        me |= {"since": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")}
        self._token = uuid.uuid4().hex
        me |= {"machine": this_machine(), "started": start_time(os.getpid()), "token": self._token}
        self._content = json.dumps(me).encode()

    def __enter__(self):
        """Takes the lock, and makes the workdir for it.

        Raises UserError in every process where another run has it, and where the processes do not share the workdir.
        """
        with distributed.refused_together():
            if jax.process_index() == 0:
                try:
                    self._file = _Object(self._workdir) if is_remote(self._workdir) else _File(self._workdir)
                    self._acquire()
                except UserError:
                    raise
                except Exception as error:  # the client of gs:// raises many kinds
                    why = f"--workdir {self._workdir} cannot be written to ({one_line(error)[:300]})"
                    raise UserError(why) from error
        if jax.process_index() == 0:
            self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)
            self._thread.start()
        if not is_remote(self._workdir) and distributed.any_of_them(not self._is_seen()):
            self.__exit__()
            raise UserError(
                f"--workdir {self._workdir} is not one folder for all processes: some do not see what process 0 wrote "
                "there; name a folder on a disk that all share, or on gs://"
            )
        return self

    def _is_seen(self) -> bool:
        """Tells whether this process sees the lock that process 0 has written; on one machine it does at once."""
        token, deadline = distributed.text_of_first(self._token), time.monotonic() + SEEN
        while jax.process_index() > 0:
            with contextlib.suppress(OSError):
                if token in (self._workdir / "lock.json").read_text():
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True

    def _acquire(self) -> None:
        """Returns with the lock; raises UserError when its owner is alive."""
        first, since = None, time.monotonic()
        while True:
            content, version = self._file.read()
            owner = _parse(content)
            here = owner.get("machine") == this_machine()
            silent = version == first and time.monotonic() - since > LEASE
            if content is None or silent or (here and not _is_alive(owner)):
                if self._file.swap(version, self._content):
                    return
                continue  # someone else was quicker
            if here or version != (first or version):
                raise UserError(
                    f"--workdir {self._workdir} is in use by {_name(owner)}; stop that run first, or use another "
                    "--workdir"
                )
            if first is None:
                first = version
                print(
                    f"{self._workdir} was in use by {_name(owner)}; waiting up to {LEASE:.0f} s for a sign of life",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(POLL)

    def look(self) -> None:
        """Reads the lock now, rather than at the next sign of life, and sets `failure` if it is another's."""
        if self._thread is None:
            return
        with contextlib.suppress(Exception):  # a network that fails says nothing about the owner
            self._look()

    def _look(self) -> Any:
        content, version = self._file.read()
        if content not in (None, self._content):
            self.failure = LockLostError(
                f"{self._workdir} was taken over by {_name(_parse(content))}; this run has stopped, and has saved "
                "nothing since"
            )
        return content, version

    def is_ours(self) -> bool:
        """Tells whether the workdir is still this run's, as far as can be told; looks at the lock."""
        self.look()
        return self.failure is None

    def check(self) -> None:
        """Raises LockLostError if another run has taken the lock over."""
        self.look()
        if self.failure:
            raise self.failure

    def _keep(self) -> None:
        """Gives signs of life until the end, whatever fails: a disk that is full today may have room tomorrow."""
        while not self._end.wait(BEAT) and not self.failure:
            with contextlib.suppress(Exception):
                content, version = self._look()
                if content is None:  # someone has deleted it
                    self._file.swap(None, self._content)
                elif content == self._content:
                    self._file.touch(version)

    def __exit__(self, *_):
        """Gives the lock back, unless it is another's by now."""
        if self._thread is None:
            return
        self._end.set()
        self._thread.join(BEAT)
        with contextlib.suppress(Exception):
            content, version = self._file.read()
            if content == self._content:
                self._file.remove(version)


class _File:
    """The lock on disk; its version is the content with the time of the last sign of life."""

    def __init__(self, workdir: epath.Path):
        self._path = os.fspath(workdir / "lock.json")
        workdir.mkdir(exist_ok=True)

    def read(self) -> tuple[bytes | None, Any]:
        """Reads content and version; opening the file makes NFS ask its server."""
        try:
            with open(self._path, "rb") as file:
                return self._read(file.fileno())
        except FileNotFoundError:
            return None, None

    @staticmethod
    def _read(file: int) -> tuple[bytes | None, Any]:
        content = os.pread(file, 1 << 16, 0)
        return (content, (content, os.fstat(file).st_mtime_ns)) if content else (None, None)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[int]:
        """Opens the file, which is empty where there was none, while nobody else changes it."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                for _ in range(50):  # others need no more than a moment
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        time.sleep(0.1)
                    except OSError:  # some network file systems know no such locks
                        break
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file), os.stat(self._path)):  # not removed meanwhile
                        yield file
                        return
            finally:
                os.close(file)

    def swap(self, version: Any, content: bytes) -> bool:
        """Writes new content, unless what is there is no longer of this version."""
        with self._guarded() as file:
            if self._read(file)[1] != version:
                return False
            os.pwrite(file, content, 0)
            os.ftruncate(file, len(content))  # afterwards: a file that is empty for a moment would look free
            return True

    def touch(self, version: Any) -> None:
        """Gives a sign of life, which needs no room on the disk."""
        os.utime(self._path)

    def remove(self, version: Any) -> None:
        with self._guarded():
            os.unlink(self._path)


class _Object:
    """The lock in an object store; its version is the generation of the object."""

    def __init__(self, workdir: epath.Path):
        if not str(workdir).startswith("gs://"):
            raise UserError(f"--workdir {workdir}: results go to a disk or to gs://")
        from google.cloud import storage  # type: ignore[import-not-found]

        bucket, _, name = str(workdir / "lock.json").removeprefix("gs://").partition("/")
        self._bucket, self._name = storage.Client().bucket(bucket), name
        self._options = {"timeout": BEAT}

    def read(self) -> tuple[bytes | None, Any]:
        from google.api_core.exceptions import NotFound, PreconditionFailed  # type: ignore[import-not-found]

        while True:
            blob = self._bucket.get_blob(self._name, **self._options)
            if blob is None:
                return None, None
            try:
                content = blob.download_as_bytes(if_generation_match=blob.generation, **self._options)
                return content, blob.generation
            except (NotFound, PreconditionFailed):  # replaced between the two requests
                pass

    def swap(self, version: Any, content: bytes) -> bool:
        """Writes new content, unless what is there is no longer of this version."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._name)
        try:
            blob.upload_from_string(content, if_generation_match=version or 0, **self._options)
            return True
        except PreconditionFailed:  # or the answer to a first try was lost
            return self.read()[0] == content

    def touch(self, version: Any) -> None:
        """Gives a sign of life: the same content has a new generation."""
        content, found = self.read()
        if found == version and content is not None:
            self.swap(version, content)

    def remove(self, version: Any) -> None:
        self._bucket.blob(self._name).delete(if_generation_match=version, **self._options)


def _parse(content: bytes | None) -> dict[str, Any]:
    """Reads who the owner is, of whom nothing is known where the file is damaged."""
    try:
        owner = json.loads(content or b"{}")
    except ValueError:
        owner = {}
    return owner if isinstance(owner, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    if "process" not in owner:
        return "a process that lock.json does not name"
    return f"process {owner['process']} on {owner.get('host')} since {owner.get('since')}"


def this_machine() -> str:
    """Gives a text that no other machine or container has, and this one only until it restarts."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def start_time(process: int) -> str | None:
    """Tells a process from a later one of the same number; None where it has ended or the system does not say."""
    try:
        state, *others = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else others[18]


def _is_alive(owner: dict[str, Any]) -> bool:
    """Tells whether the owner, on this machine, still runs."""
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is someone else's, whose number the owner may have had before
        return start_time(owner["process"]) in (None, owner.get("started"))
    return start_time(owner["process"]) == owner.get("started")
