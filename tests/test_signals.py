"""Ctrl-C and SIGTERM at every stage of a command, sent to real processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cjepa_jax import command, signals
from tests.commands import QUICK, Command
from tests.test_train import ROOT, SMALL, lines

DIGITS = ["cjepa_jax.main", "--config=configs/digits.py", *SMALL]


def test_a_run_in_another_thread_leaves_signals_alone():
    """Python lets the main thread only take them."""
    before, failed = signal.getsignal(signal.SIGTERM), []

    def listen():
        try:
            with signals.Stop() as stop:
                stop.listen()
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert not failed and signal.getsignal(signal.SIGTERM) is before


# Where the tests run in the background, SIGINT may be ignored.
HEARD = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"


def start(*arguments: str, first: str = "") -> Command:
    """Runs a command; the code `first` changes its modules before."""
    return Command(*arguments, first=HEARD + first, XLA_FLAGS=QUICK)


def end(process: Command | subprocess.Popen[str], sent: int, *, within: float = 3) -> tuple[int, str]:
    """Sends a signal; returns the exit code and what the process said from then on."""
    process.send_signal(sent)
    since = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - since < within, said
    return process.returncode, said


COMMANDS = ["main", "finetune", "evaluate", "convert", "compile", "study"]
COMMANDS += ["data.prepare", "bench.input", "bench.linear"]


@pytest.mark.parametrize("command", [["-m", "mine"], ["cjepa-mine.py"]])
def test_programs_of_others_keep_their_handlers(tmp_path, command):
    """Only this package's own commands end at once."""
    code = "import signal, cjepa_jax\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    (tmp_path / "mine").mkdir()
    for file in ("mine/__init__.py", "mine/__main__.py", "cjepa-mine.py"):
        (tmp_path / file).write_text(code)
    places = {**os.environ, "PYTHONPATH": f"{ROOT}"}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=places, capture_output=True, text=True)
    assert set(done.stdout.split()) == {"True"}, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_imports_end_at_once_and_without_a_word(name):
    """A process that has imported nothing yet, unlike those that are forked."""
    pause = f"{HEARD}sys.argv[0] = '-m'\nsys.orig_argv[1:] = ['-m', 'cjepa_jax.{name}']\n"
    pause += "import runpy, time, cjepa_jax\nclass Pause:\n def find_spec(name, *_):\n"
    pause += "  if name == 'absl': print('now', flush=True); time.sleep(60)\n"
    pause += f"sys.meta_path.insert(0, Pause)\nrunpy.run_module('cjepa_jax.{name}', run_name='__main__')"
    where = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen([sys.executable, "-c", pause], **where)
    assert process.stdout.readline() == "now\n"
    assert end(process, signal.SIGINT) == (-signal.SIGINT, "")


def test_a_run_that_is_ended_at_any_time_is_no_obstacle_for_the_next(tmp_path):
    """Three starts of one command: ended between two files, in the first compilation, and while it saves."""
    arguments = [*DIGITS, f"--workdir={tmp_path / 'run'}", "--config.checkpoint.every=100000"]
    first = "from cjepa_jax.train import checkpoint; import os; checkpoint.write_config = lambda *a: os._exit(3)"
    process = start(*arguments, first=first)
    assert (process.communicate(timeout=100), process.returncode)[1] == 3
    assert not (tmp_path / "run" / "config.json").exists()

    slow = "from jax._src import compiler; import time; f = compiler.compile_or_get_cached\n"
    slow += "def wait(*a, **k): print('now', file=sys.stderr, flush=True); time.sleep(8); return f(*a, **k)\n"
    slow += "from cjepa_jax.train import memory; g = memory.compile_step\n"
    slow += "def then(*a, **k): compiler.compile_or_get_cached = wait; return g(*a, **k)\nmemory.compile_step = then"
    process = start(*arguments, first=slow)
    process.until_said("now")
    assert end(process, signal.SIGTERM) == (-signal.SIGTERM, "")

    slow = "from cjepa_jax.train import checkpoint; import time\n"
    slow += "def save(*a, **k): print('now', file=sys.stderr, flush=True); time.sleep(60)\n"
    slow += "checkpoint.Checkpointer.save = save"
    process = start(*arguments, first=slow)
    process.until_said("step 3/")
    process.send_signal(signal.SIGINT)
    process.until_said("now")
    assert end(process, signal.SIGINT) == (-signal.SIGINT, "")
    assert [line["step"] for line in lines(tmp_path / "run")][:3] == [1, 2, 3]


def test_what_a_command_makes_for_itself_is_removed(tmp_path):
    """By one signal; the line is for those who can go on."""
    code = "import sys, os, signal, time\nfrom cjepa_jax import signals\nwith signals.cleaned_up('goes on'):\n"
    code += "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(60)\n"
    code += "    finally:\n        print('removed', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "removed\ngoes on\n")


def test_a_signal_that_is_ignored_stays_ignored():
    """As of a job in the background of a script, whose Ctrl-C is meant for others."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.Stop() as stop:
            stop.listen()
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == stop._request
        with signals.cleaned_up():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_screen_that_nobody_reads_any_more_does_not_end_the_run():
    """Ctrl-C ends `tee`, too, and the run is still to save."""
    reader, end_of_pipe = os.pipe()
    os.close(reader)
    with open(end_of_pipe, "w", closefd=False) as stream:
        screen = command._Stderr(stream)
        print("x" * 100_000, file=screen, flush=True)
        print("the next line", file=screen, flush=True)
    os.close(end_of_pipe)
