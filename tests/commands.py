"""Commands in processes of their own, which need not import JAX anew: a server that has it forks them."""

import atexit
import functools
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import traceback

from cjepa_jax import signals

# Tests compile much and compute little.
QUICK = (
    "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
ROOT = pathlib.Path(__file__).parents[1]
IMPORTED = [
    *("cjepa_jax.train.loop", "cjepa_jax.evaluate.report", "cjepa_jax.interop.conversion", "tests.commands"),
    *("tensorflow_datasets.rlds", "sklearn.datasets"),  # what digits take
    *("sklearn.decomposition", "sklearn.manifold", "torch"),  # what some commands take
]


@functools.cache
def _forks() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _child(
    module: str, arguments: tuple[str, ...], stdout: str, stderr: str, first: str, variables: dict[str, str]
) -> None:
    os.chdir(ROOT)
    os.environ.update(variables)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = [module, *arguments]
    code: int | str = 0
    try:
        exec(first, {"__name__": "first"})
        if module:
            signals.end_at_once()  # as importing the package does, which this process need not do
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    # In the order in which an interpreter ends, which is not that of a fork.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


class Command:
    """A running `python -m module arguments`, with as much of subprocess.Popen's face as tests need.

    The code `first` runs before the module, or without one where that is "". Its environment is that of this process at
    the first call, and `variables`. What it prints is in one stream, unless `stderr` is a file for the other.
    """

    def __init__(self, module: str, *arguments: str, first: str = "", stderr: str = "", **variables: str):
        self._said = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        where = self._said.name, stderr or self._said.name
        self._process = _forks().Process(target=_child, args=(module, arguments, *where, first, variables))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Gives what it has printed and was not read by `until_said`."""
        self.wait(timeout)
        return self._said.read(), None

    def until_said(self, word: str) -> None:
        said, deadline = "", time.monotonic() + 300
        while word not in said:
            assert time.monotonic() < deadline, said
            ended = self.returncode is not None
            said += self._said.read()
            assert word in said or not ended, said
            time.sleep(0.02)


def run(module: str, *arguments: str, first: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs what `Command` does to its end, and keeps the two streams apart."""
    with tempfile.NamedTemporaryFile("r") as stderr:
        process = Command(module, *arguments, first=first, stderr=stderr.name, **variables)
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
        stdout, _ = process.communicate()
        return subprocess.CompletedProcess([module, *arguments], process.returncode, stdout, stderr.read())
