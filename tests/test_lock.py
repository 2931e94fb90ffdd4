"""The lock of a workdir: who gets it, who is refused, who has to wait, and who notices that it is gone."""

import concurrent.futures
import contextlib
import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
import types

import pytest
from etils import epath

from cjepa_jax.errors import UserError
from cjepa_jax.files import write_whole
from cjepa_jax.train import lock, loop
from cjepa_jax.train.lock import Lock


class PreconditionFailed(Exception):  # noqa: N818
    pass


class NotFound(Exception):  # noqa: N818
    pass


class Bucket:
    """One of Cloud Storage, as its client shows it: whole objects, and changes on condition of their generation."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.generations = iter(range(1, 1_000_000))
        self.atomic = threading.Lock()

    def get_blob(self, name, timeout):
        blob = self.blob(name)
        blob.generation = self.objects.get(name, (b"", 0))[1]
        return blob if blob.generation else None

    def blob(self, name):
        return Blob(self, name)


class Blob:
    generation = None

    def __init__(self, bucket, name):
        self.bucket, self.name = bucket, name

    def _require(self, generation):
        if self.bucket.objects.get(self.name, (b"", 0))[1] != generation:
            raise PreconditionFailed

    def download_as_bytes(self, if_generation_match, timeout):
        with self.bucket.atomic:
            self._require(if_generation_match)
            return self.bucket.objects[self.name][0]

    def upload_from_string(self, content, if_generation_match, timeout):
        with self.bucket.atomic:
            self._require(if_generation_match)
            self.bucket.objects[self.name] = content, next(self.bucket.generations)

    def delete(self, if_generation_match, timeout):
        with self.bucket.atomic:
            self._require(if_generation_match)
            del self.bucket.objects[self.name]


class Store:
    """Where the lock of a workdir lies, seen from outside."""

    def __init__(self, workdir: epath.Path, bucket: Bucket | None):
        self.workdir, self._bucket = workdir, bucket

    def read(self) -> dict | None:
        if self._bucket:
            found = self._bucket.objects.get("run/lock.json")
            return found and json.loads(found[0])
        path = self.workdir / "lock.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, owner: dict | None) -> None:
        """Puts another owner there, or gives another sign of life of the same one."""
        if self._bucket:
            content = json.dumps(owner).encode()
            self._bucket.objects["run/lock.json"] = content, next(self._bucket.generations)
        else:
            self.workdir.mkdir(exist_ok=True)
            write_whole(self.workdir / "lock.json", json.dumps(owner))

    def delete(self) -> None:
        if self._bucket:
            self._bucket.objects.clear()
        else:
            (self.workdir / "lock.json").unlink()


@pytest.fixture(params=["disk", "gs"])
def store(request, tmp_path, monkeypatch) -> Store:
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "LEASE", 1.0)
    monkeypatch.setattr(lock, "POLL", 0.1)
    if request.param == "disk":
        return Store(epath.Path(tmp_path / "run"), None)
    bucket = Bucket()
    storage = types.SimpleNamespace(Client=lambda: types.SimpleNamespace(bucket=lambda name: bucket))
    exceptions = types.SimpleNamespace(NotFound=NotFound, PreconditionFailed=PreconditionFailed)
    modules = {"google.cloud": types.SimpleNamespace(storage=storage), "google.cloud.storage": storage}
    for name, module in (modules | {"google.api_core.exceptions": exceptions}).items():
        monkeypatch.setitem(sys.modules, name, module)
    return Store(epath.Path("gs://bucket/run"), bucket)


def owner(**changes) -> dict:
    """This process as an owner of a lock."""
    me = {"host": "tpu-7", "process": os.getpid(), "since": "2026-11-25 10:00:00 UTC", "token": "x"}
    return me | {"machine": lock.this_machine(), "started": lock.start_time(os.getpid())} | changes


def until(true) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_second_is_told_by_whom_and_since_when_and_the_lock_is_given_back(store):
    with Lock(store.workdir):
        found = store.read()
        said = f"is in use by process {os.getpid()} on {found['host']} since {found['since']}; stop that run first"
        with pytest.raises(UserError, match=re.escape(said)), Lock(store.workdir):
            pass
        assert store.read() == found
    assert store.read() is None
    with Lock(store.workdir):
        assert store.read()["token"] != found["token"]


def ended() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def zombie() -> int:
    process = subprocess.Popen(["true"], stdout=subprocess.DEVNULL)
    until(lambda: lock.start_time(process.pid) is None)
    zombies.append(process)
    return process.pid


zombies: list[subprocess.Popen] = []


@pytest.mark.parametrize(
    "dead",
    [lambda: {"process": ended()}, lambda: {"process": zombie()}, lambda: {"started": "1"}],
    ids=["ended", "ended, not waited for", "its number is another process'"],
)
def test_a_dead_owner_on_this_machine_holds_nobody_up(store, dead, capsys):
    store.write(owner(**dead()))
    with Lock(store.workdir):
        assert store.read()["token"] != "x"
    assert capsys.readouterr().err == ""
    for process in zombies:
        process.wait()


@pytest.mark.parametrize("found", [owner(machine="other"), {}, None], ids=["other machine", "nothing known", "null"])
def test_a_silent_owner_holds_up_for_the_lease_and_this_is_said(store, found, capsys):
    store.write(found)
    start = time.monotonic()
    with Lock(store.workdir):
        assert 1.0 < time.monotonic() - start < 3.0
        assert len(store.read()["token"]) == 32
    said = capsys.readouterr().err
    assert "waiting up to 1 s for a sign of life" in said and said.count("\n") == 1
    assert ("process that lock.json does not name" if not found else "on tpu-7 since 2026-11-25") in said


def test_a_sign_of_life_from_another_machine_is_seen(store):
    store.write(owner(machine="other"))
    timer = threading.Timer(0.5, lambda: store.write(owner(machine="other")))
    timer.start()
    start = time.monotonic()
    with pytest.raises(UserError, match=r"is in use by process .* on tpu-7"), Lock(store.workdir):
        pass
    assert time.monotonic() - start < 0.9
    timer.join()


def test_an_owner_on_another_machine_that_leaves_holds_nobody_up(store):
    store.write(owner(machine="other"))
    timer = threading.Timer(0.3, store.delete)
    timer.start()
    start = time.monotonic()
    with Lock(store.workdir):
        assert time.monotonic() - start < 0.9
    timer.join()


def test_the_owner_gives_signs_of_life(store, monkeypatch):
    """To someone who cannot see its process."""
    with Lock(store.workdir):
        monkeypatch.setattr(lock, "this_machine", lambda: "other")
        with pytest.raises(UserError, match="is in use by"), Lock(store.workdir):
            pass


def test_a_lock_that_another_has_taken_is_noticed_and_left_alone(store):
    with Lock(store.workdir) as held:
        held.check()
        time.sleep(0.3)
        assert held.failure is None
        store.write(owner())
        with pytest.raises(lock.LockLostError, match=r"was taken over by process \d+ on tpu-7 since 2026"):
            held.check()
    with Lock(epath.Path(str(store.workdir) + "2")):
        pass
    assert store.read() == owner()


def test_the_heartbeat_alone_notices_it_too(store):
    with Lock(store.workdir) as held:
        store.write(owner())
        until(lambda: held.failure)


def test_a_lock_that_was_deleted_is_written_anew(store):
    with Lock(store.workdir):
        mine = store.read()
        store.delete()

        def is_back() -> bool:
            with contextlib.suppress(ValueError):  # it is being written
                return store.read() == mine
            return False

        until(is_back)


@pytest.mark.parametrize("found", [None, owner(process=2**22 + 1)], ids=["free", "of a dead owner"])
def test_of_many_who_want_it_one_gets_it(store, found):
    for _ in range(5):
        if found:
            store.write(found)
        begin, done = threading.Barrier(8), threading.Event()

        def want(begin=begin, done=done):
            held = Lock(store.workdir)
            begin.wait()
            try:
                with held:
                    done.wait(5)
                    return True
            except UserError:
                return False

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            wanted = [threads.submit(want) for _ in range(8)]
            until(lambda wanted=wanted: sum(one.done() for one in wanted) >= 7)
            done.set()
        assert sum(one.result() for one in wanted) == 1


def test_a_full_disk_ends_no_heartbeat(tmp_path, monkeypatch):
    """Nor does a time of errors: when it is over, there are signs of life again."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    path, utime = tmp_path / "run" / "lock.json", os.utime

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Lock(epath.Path(tmp_path / "run")) as held:
        monkeypatch.setattr(os, "pwrite", full)  # a sign of life writes nothing
        before = path.stat().st_mtime_ns
        until(lambda: path.stat().st_mtime_ns > before)
        monkeypatch.setattr(os, "utime", full)
        time.sleep(0.3)
        monkeypatch.setattr(os, "utime", utime)
        before = path.stat().st_mtime_ns
        until(lambda: path.stat().st_mtime_ns > before)
        assert held.failure is None


def test_a_workdir_that_cannot_be_written_to_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with (
        pytest.raises(UserError, match=r"run cannot be written to .*No space left"),
        Lock(epath.Path(tmp_path / "run")),
    ):
        pass


def test_a_number_that_another_user_has_now_is_not_the_owner(monkeypatch):
    def refuse(process, signum):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert lock._is_alive(owner()) and not lock._is_alive(owner(started="1"))
    monkeypatch.setattr(lock, "start_time", lambda process: None)  # the system does not say
    assert lock._is_alive({"process": os.getpid(), "started": "1"})


def test_training_refuses_a_workdir_in_use_and_writes_nothing(make_config, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    with Lock(workdir), pytest.raises(UserError, match="is in use by process"):
        loop.train(make_config(), workdir)
    assert not list(workdir.iterdir())


def test_training_that_was_taken_over_stops_and_saves_nothing(make_config, tmp_path, monkeypatch):
    """The other one comes after step 5; no heartbeat tells of it, but a look before the checkpoint of step 7."""
    workdir = epath.Path(tmp_path / "run")
    write = loop.writer.Writer.write

    def then_another(log, step, metrics):
        write(log, step, metrics)
        if step == 5:
            write_whole(workdir / "lock.json", json.dumps(owner()))

    monkeypatch.setattr(loop.writer.Writer, "write", then_another)
    with pytest.raises(lock.LockLostError, match="was taken over by process"):
        loop.train(make_config(checkpoint__every=7, log__every=1), workdir)
    assert not [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert json.loads((workdir / "lock.json").read_text()) == owner()
