"""What a line of metrics says about speed, memory and time, and that it fits the screen."""

import errno
import fcntl
import os
import pty
import re
import struct
import termios
import time
import types

import jax
import pytest
from etils import epath
from jax._src import hardware_utils

from cjepa_jax import plots
from cjepa_jax.errors import StorageError
from cjepa_jax.methods.cjepa import CJEPA
from cjepa_jax.tpu import chips, flops
from cjepa_jax.train import loop, writer
from tests import helpers

METRICS = {"loss/total": 0.123456, "loss/prediction": 0.1, "loss/variance": 0.01, "loss/invariance": 0.02}
METRICS |= {"loss/covariance": 0.03, "rep/std": 0.9, "rep/rank": 123.4, "lr": 5e-4}


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the writer sees; a test moves them."""
    clock = types.SimpleNamespace(now=1_800_000_000.0)
    seconds = types.SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr(writer, "time", seconds)
    return clock


def two_lines(workdir, clock, *, steps=1000, **options) -> list[dict[str, float]]:
    """A run of 4 images a step, of which an epoch has 80: a line after step 1 and one after step 11, 5 s later."""
    log = writer.Writer(epath.Path(workdir), start=0, steps=steps, batch_size=4, images=80, **options)
    for step in (1, 11):
        clock.now += 5.0
        log.tick(step, 0.0)
        log.write(step, METRICS)
    log.close()
    return helpers.lines(workdir)


def test_speed_memory_and_time(tmp_path, clock, capsys, monkeypatch):
    stats = [{"peak_bytes_in_use": 2**30}, {"peak_bytes_in_use": 3 * 2**30}]
    devices = [types.SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    first, second = two_lines(tmp_path, clock, peak=20.0)
    assert (first["time"], first["epoch"]) == (1.8e9 + 5, 0.05) and "images_per_second" not in first
    assert (second["time"], second["epoch"]) == (1.8e9 + 10, 0.55)
    assert second["images_per_second"] == pytest.approx(8) and second["mfu"] == pytest.approx(0.4)
    assert second["seconds_left"] == pytest.approx(494.5) and second["memory_gib"] == 3
    said = capsys.readouterr().err.splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step 1/1000  epoch 0.05/50  loss 0.1235  rank", said[0])
    assert "step 11/1000  epoch 0.55/50  loss 0.1235  img/s 8  mfu 40%" in said[1]
    assert said[1].endswith("lr 0.0005  wait 0%  GiB 3  8 min left")


@pytest.mark.parametrize("seconds, says", [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (7260, "2 h 01 min")])
def test_the_time_left_has_a_unit_that_fits(seconds, says):
    assert writer.duration(seconds) == says


def test_curves_have_labels_and_no_empty_panel(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    lines = [{"step": step, "loss/total": 1.0, "rep/std": 0.5, "images_per_second": 8.0} for step in (1, 2)]
    panels = {"Loss": ("loss/total", "loss/prediction"), "Std": ("rep/std", "rep/cosine"), "Accuracy": ("eval/knn",)}
    plots.curves([*lines, {"step": 2, "rep/cosine": 0.1}], tmp_path / "x.png", panels)
    drawn = [axes for axes in figures[0].axes if axes.axison]
    assert [axes.get_title() for axes in drawn] == ["Loss", "Std", "Throughput"]
    assert [axes.get_ylabel() for axes in drawn] == ["loss/total", "rep", "images_per_second"]
    assert all(axes.lines and axes.get_xlabel() == "step" for axes in drawn)
    assert [axes.get_legend() is not None for axes in drawn] == [False, True, False]


def test_what_is_not_known_is_not_said(tmp_path, clock, capsys):
    """A CPU says nothing of its memory, and its peak is not known."""
    _, second = two_lines(tmp_path, clock)
    assert not {"mfu", "memory_gib"} & second.keys()
    assert "mfu" not in (said := capsys.readouterr().err) and "GiB" not in said


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_a_terminal_shows_as_much_as_fits_beside_the_bar(tmp_path, clock, columns, monkeypatch):
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    with open(terminal, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        two_lines(tmp_path, clock, steps=375_300, peak=20.0)
        shown = b""
        while not shown.endswith(b"\n"):  # of the end of the bar
            shown += os.read(screen, 1 << 16)
    line = shown.decode().rstrip().split("\r")[-1]
    assert len(line) <= columns
    assert len(re.search(r"\|(.*)\|", line)[1]) >= 8
    assert "loss 0.1235  img/s 8" in line
    assert ("lr 0.0005" in line) == (columns == 200)


def test_lines_of_old_runs_are_read_and_gone_on_from(tmp_path, clock):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss/total": 1.0}\n')
    old, *_ = two_lines(tmp_path, clock)
    assert old == {"step": 0, "loss/total": 1.0}


def test_the_peak_counts_what_the_method_needs(make_config, monkeypatch):
    method = CJEPA(make_config())
    assert loop.peak_rate(method) is None
    monkeypatch.setattr(chips, "peak_flops", lambda kind: 1e12)
    needed = flops.step(method.transformers().values())
    assert loop.peak_rate(method) == pytest.approx(jax.device_count() * 1e12 / needed)


def test_peaks_of_known_devices():
    assert chips.peak_flops("NVIDIA L4") == 121e12 and chips.peak_flops("TPU v5 lite") == 197e12
    assert chips.peak_flops("TPU v5e") == 197e12 and chips.peak_flops("TPU v5p") == chips.peak_flops("TPU v5") == 459e12
    assert chips.peak_flops("cpu") is None and chips.peak_flops("NVIDIA L40S") is None


def test_a_tpu_is_known_by_its_number(tmp_path):
    """Where there is none, libtpu is told so instead of complaining, and no other processes are looked for."""
    devices = {"a": ("0x8086", "0x0063"), "gVNIC": ("0x1ae0", "0x0042"), "NVMe": ("0x1ae0", "0x001f")}
    for name, numbers in devices.items():
        (tmp_path / name).mkdir()
        for file, number in zip(("vendor", "device"), numbers, strict=True):
            (tmp_path / name / file).write_text(f"{number}\n")
    assert not chips.may_be_here(str(tmp_path)) and not chips.may_be_here(str(tmp_path / "none"))
    (tmp_path / "NVMe" / "device").write_text("0x0063\n")
    assert chips.may_be_here(str(tmp_path))


def test_jax_knows_no_other_tpus():
    assert hardware_utils._TPU_PCI_DEVICE_IDS.keys() == chips.PCI_DEVICES


class Lost:
    """A file that a file server does not know any more."""

    def write(self, data=b""):
        raise OSError(errno.ESTALE, "Stale file handle")

    close = write


def test_a_file_that_the_server_has_lost_ends_the_run_and_does_not_hang_it(tmp_path, clock):
    """TensorBoard's thread must live on: the run would wait for it for ever."""
    log = writer.Writer(epath.Path(tmp_path), start=0, steps=100, batch_size=4, images=80)
    log._events._file.close()
    log._events._file = Lost()
    deadline = time.monotonic() + 60
    step = 0
    while not log.failure and time.monotonic() < deadline:
        step += 1
        for name in range(30):
            log._board.add_scalar(f"{name}", 1.0, step)
        log._board.flush()
    assert "could not be written: [Errno 116] Stale file handle" in str(log.failure)
    for number in range(100):  # more than its queue holds
        log._board.add_scalar("x", 1.0, number)
    with pytest.raises(StorageError):
        log.close()
