"""One of several processes is killed, paused or has a full disk; docs/reliability.md has the figures."""

import pathlib
import re
import resource
import signal
import time

import pytest

from tests.commands import Command
from tests.test_hosts import SHARED, finish, start

EVERY = 10  # steps between two checkpoints
LONG = ["--config.optim.epochs=1000", f"--config.checkpoint.every={EVERY}"]
LIMIT = 120  # seconds within which the others must have ended
OTHERS = re.compile(
    r"[-:\d ]*step |\[Gloo\]|connecting with|cjepa: |E\d{4} .*Polled an error from coordination service"
)
THEN = "so all have ended; start all again: the same command goes on from checkpoint "


def wait_for(workdir: pathlib.Path, step: int, processes: list[Command]) -> None:
    """Returns when there is a checkpoint of this step."""
    deadline = time.monotonic() + 600
    while not (workdir / "checkpoints" / str(step)).exists():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.05)


def ends(processes: list[Command], workdir: pathlib.Path, reason: str) -> tuple[float, int]:
    """Checks that each process ends in time with one line; gives the seconds, and the newest checkpoint."""
    since = time.monotonic()
    try:
        said = [process.communicate(timeout=max(1, since + LIMIT - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    took = time.monotonic() - since
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 1, text
        line, *more = [line for line in text.splitlines() if not OTHERS.match(line)]
        assert not more and re.match(f"error: {reason}, {THEN}", line) and line.endswith(f"/checkpoints/{newest}"), text
    return took, newest


def goes_on(workdir: pathlib.Path, newest: int, count: int, *settings: str) -> None:
    """Checks that the same command goes on from the newest checkpoint."""
    processes = start(count, 1, f"--workdir={workdir}", *LONG, *settings)
    wait_for(workdir, newest + EVERY, processes)
    processes[-1].send_signal(signal.SIGTERM)
    said = finish(processes)
    assert f"going on from step {newest}" in said[0] and "stopped and saved" in said[0]


def lose(workdir: pathlib.Path, count: int, victim: int, sent: signal.Signals) -> int:
    """Loses one process of a run and checks what becomes of the others; gives the newest checkpoint."""
    processes = start(count, 1, f"--workdir={workdir}", *LONG)
    wait_for(workdir, EVERY, processes)
    lost = processes.pop(victim)
    lost.send_signal(sent)
    took, newest = ends(processes, workdir, rf"process {victim} was lost \(killed, paused or cut off\)")
    lost.kill()
    lost.communicate()
    print(f"\n{count} processes, {sent.name} of {victim}: the others ended within {took:.0f} s")
    return newest


def test_the_first_of_two_is_killed(tmp_path):
    """The slow tests also see that the same command goes on."""
    lose(tmp_path / "run", 2, 0, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("count, victim", [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)])
def test_one_is_killed(count, victim, tmp_path):
    goes_on(tmp_path / "run", lose(tmp_path / "run", count, victim, signal.SIGKILL), count)


@pytest.mark.slow
@pytest.mark.parametrize("count, victim", [(2, 0), (2, 1), (4, 2)])
def test_one_is_paused(count, victim, tmp_path):
    goes_on(tmp_path / "run", lose(tmp_path / "run", count, victim, signal.SIGSTOP), count)


@pytest.mark.slow
@pytest.mark.parametrize("count, victim", [(2, 0), (2, 1), (4, 3)])
def test_one_can_write_no_more(count, victim, tmp_path):
    """A limit on the size of files stands for a full disk; each process writes its shards."""
    workdir, settings = tmp_path / "run", [f"--config.mesh.fsdp={count}", *SHARED]
    processes = start(count, 1, f"--workdir={workdir}", *LONG, *settings)
    wait_for(workdir, EVERY, processes)
    resource.prlimit(processes[victim].pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    reason = rf"process {victim} cannot go on \(.*could not be written: File too large.*\)"
    took, newest = ends(processes, workdir, reason)
    goes_on(workdir, newest, count, *settings)
    print(f"\n{count} processes, {victim} can write no more: all ended within {took:.0f} s")
