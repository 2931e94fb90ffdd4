"""Metrics to the progress bar, `metrics.jsonl`, TensorBoard and other trackers, from process 0 only."""

import contextlib
import datetime
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable

import jax
from etils import epath
from tqdm import tqdm

from cjepa_jax.errors import StorageError, one_line
from cjepa_jax.files import forgiving, is_file, is_remote, storing, write_whole
from cjepa_jax.train.trackers import Trackers

# TensorBoardX imports PyTorch where it is installed, for a type hint. That would take longer than all other imports.
if _hidden := "torch" not in sys.modules:
    sys.modules["torch"] = None  # type: ignore[assignment]
from tensorboardX import SummaryWriter
from tensorboardX.record_writer import register_writer_factory

if _hidden:
    del sys.modules["torch"]
logging.getLogger("tensorboardX.x2num").setLevel("ERROR")  # it would say of each NaN that it is one

_SHOWN = {  # metric -> its name and form on the screen, where the first come first
    "loss/total": ("loss", ".4g"),
    "images_per_second": ("img/s", ".4g"),
    "mfu": ("mfu", ".0%"),
    "rep/rank": ("rank", ".4g"),
    "loss/prediction": ("pred", ".4g"),
    "loss/variance": ("var", ".4g"),
    "loss/invariance": ("inv", ".4g"),
    "loss/covariance": ("cov", ".4g"),
    "rep/std": ("std", ".4g"),
    "lr": ("lr", ".3g"),
    "data/wait_fraction": ("wait", ".0%"),
    "memory_gib": ("GiB", ".3g"),
}
# What in a line depends on the clock and the machine, and so differs between two runs that are equal.
TIMED = frozenset({"time", "images_per_second", "mfu", "seconds_left", "memory_gib", "data/wait_fraction"})
UPLOAD_SECONDS = 60.0  # from one upload of metrics.jsonl to the next, as it is uploaded whole and training waits
_PROBES = ("eval/knn", "eval/logistic", "eval/linear", "eval/top1", "eval/ema_top1")


class _EventFile:
    """A file for TensorBoard's events; it remembers its first failure, and ignores what is written after that.

    TensorBoard's writer works in a thread of its own. An error would end it, and the run would wait for it forever.
    """

    failure: StorageError | None = None

    def __init__(self, path: epath.Path):
        self._path, self._file = path, open(path, "wb", buffering=0)  # noqa: SIM115

    def write(self, data: bytes) -> None:
        try:
            with storing(self._path, len(data)):
                if not self.failure:
                    self._file.write(data)
        except StorageError as error:
            self.failure = error
        except OSError as error:  # such as that of a file server that has lost the file
            self.failure = StorageError(f"{self._path} could not be written: {one_line(error)}")

    def flush(self) -> None:
        """Does nothing: nothing is kept back."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class _Upload:
    """An object in a store, which is written anew when it has grown; what fails is tried again at the next time.

    content: what the object holds already.
    """

    failure = None  # there is no disk that is full

    def __init__(self, path: epath.Path, content: bytes = b""):
        self._path, self._content, self._written = path, bytearray(content), len(content)

    def write(self, data: bytes) -> None:
        self._content += data

    def flush(self) -> None:
        """Brings the object up to date."""
        if len(self._content) == self._written:
            return
        with forgiving(self._path):
            self._path.write_bytes(bytes(self._content))
            self._written = len(self._content)

    def close(self) -> None:
        """Brings the object up to date for the last time."""
        self.flush()


class _EventFiles:
    """Opens the files of TensorBoard's writer whose path starts with PREFIX."""

    PREFIX = "ours:"
    newest: _EventFile | _Upload

    def directory_check(self, path: str) -> None:
        folder = epath.Path(path.removeprefix(self.PREFIX))
        if not is_remote(folder):  # where there are no folders
            os.makedirs(folder, exist_ok=True)

    def open(self, path: str) -> _EventFile | _Upload:
        file = epath.Path(path.removeprefix(self.PREFIX))
        self.newest = _Upload(file) if is_remote(file) else _EventFile(file)
        return self.newest


_EVENT_FILES = _EventFiles()
register_writer_factory(_EventFiles.PREFIX.rstrip(":"), _EVENT_FILES)


class Writer:
    """Writes one line a call; also measures how fast the run is, how long it will take, and the devices' memory."""

    _failure: StorageError | None = None  # in writing metrics.jsonl
    _events: _EventFile | _Upload | None = None
    _object: _Upload | None = None  # metrics.jsonl where it cannot be appended to
    _uploaded = -math.inf

    def __init__(
        self,
        workdir: epath.Path,
        *,
        start: int,
        steps: int,
        batch_size: int,
        images: int,
        peak: float | None = None,
        trackers: Trackers | None = None,
        is_ours: Callable[[], bool] = lambda: True,
    ):
        """Lines of steps after `start`, left by a run that was cut off, will come again and are dropped.

        images: those of an epoch. peak: images per second if the devices did nothing but the method's products, at
        their full rate; None where that is not known. trackers: get each line, too, but for those that a run that was
        cut off has sent already. They stay open when the writer is closed. is_ours: tells whether the workdir is still
        this run's; into one that is another's nothing is written.
        """
        self._batch_size, self._steps, self._peak, self._is_ours = batch_size, steps, peak, is_ours
        self._epochs_per_step = batch_size / images
        self._clock: float | None = None
        self._step = start
        self._waited = self._waited_before = 0.0
        self._line = time.perf_counter()
        self._active = jax.process_index() == 0
        self._evaluated: set[float] = set()
        if not self._active:
            return
        self._path = workdir / "metrics.jsonl"
        lines = read(workdir)
        self._trackers = trackers or Trackers(())
        # A run that begins anew has new records there.
        self._sent = {(line["step"], _is_evaluation(line)) for line in lines} if start else set()
        kept = [line for line in lines if line["step"] <= start]
        self._evaluated = {line["step"] for line in kept if _is_evaluation(line)}
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self._path, text)
        if is_remote(self._path):
            self._object = _Upload(self._path, text.encode())
        folder = workdir / "tensorboard"
        with storing(folder):
            self._board = SummaryWriter(
                f"{_EventFiles.PREFIX}{folder}",
                purge_step=start + 1,
                flush_secs=120 if is_remote(workdir) else 10,  # there the whole file is written anew
            )
        self._events = _EVENT_FILES.newest
        self._bar = tqdm(
            total=steps,
            initial=start,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{n_fmt}/{total_fmt} |{bar}| [{elapsed}<{remaining}{postfix}]",
        )

    def has_evaluation(self, step: int) -> bool:
        """Tells whether there is a line with the evaluation of this step; process 0 knows."""
        return self._active and step in self._evaluated

    def tick(self, step: int, seconds_waited: float) -> None:
        """Moves the bar to `step`, which has been taken; starts the clock after the first one, which compiles.

        seconds_waited: that the devices stood idle for want of images, in all.
        """
        self._waited = seconds_waited
        if self._clock is None:
            self._clock, self._step = time.perf_counter(), step
        if self._active:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a line, of training or of evaluation; a step may have one of each, with no metric in common.

        All lines of metrics.jsonl get `time` (seconds since 1970) and `epoch` (passes over the images so far); trackers
        get `epoch` alone, and TensorBoard neither. Training's also get, about the time since the last line,
        `data/wait_fraction`, `images_per_second`, `mfu` where the peak is known, and `seconds_left` at this speed; and
        `memory_gib`, the most that a device of this process has had in use so far, where the devices tell.
        """
        now = time.perf_counter()
        if _is_evaluation(metrics):
            self._evaluated.add(step)
        else:
            waited = (self._waited - self._waited_before) / (now - self._line)
            metrics = {**metrics, "data/wait_fraction": waited, **_memory()}
        self._waited_before, self._line = self._waited, now
        if self._clock is not None and step > self._step:
            per_second = (step - self._step) / (now - self._clock)
            speed = self._batch_size * per_second
            metrics = {**metrics, "images_per_second": speed, "seconds_left": (self._steps - step) / per_second}
            metrics |= {"mfu": speed / self._peak} if self._peak else {}
            self._clock, self._step = now, step
        if not self._active:
            return
        epoch = step * self._epochs_per_step
        line = json.dumps({"step": step, "time": time.time(), "epoch": epoch, **metrics}) + "\n"
        if self._object:
            self._object.write(line.encode())
            if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
                self.upload()
        elif not self._is_ours():
            return
        else:
            try:
                with storing(self._path, len(line)), self._path.open("a") as file:
                    file.write(line)
            except StorageError as error:
                self._failure = error
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if (step, _is_evaluation(metrics)) not in self._sent:
            self._trackers.write(step, {"epoch": epoch, **metrics})
        self._show(step, epoch, metrics)

    def _show(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Shows a line: on a terminal as much of it as fits beside the bar, elsewhere all of it."""
        shown = [f"{name} {metrics[key]:{form}}" for key, (name, form) in _SHOWN.items() if key in metrics]
        probes = "  ".join(f"{name} {value:.1%}" for name, value in metrics.items() if name in _PROBES)
        if self._bar.disable:
            date = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
            place = f"step {step}/{self._steps}", f"epoch {epoch:.4g}/{self._steps * self._epochs_per_step:.4g}"
            left = [f"{duration(metrics['seconds_left'])} left"] if "seconds_left" in metrics else []
            print("  ".join([date, *place, *shown, *left, *filter(None, [probes])]), file=sys.stderr, flush=True)
            return
        columns = self._bar.format_dict["ncols"]
        # Ten of the bar, and what stands around it when step and times have their full length.
        room = columns - len(f"{self._steps}/{self._steps} |{'':10}| [100:00:00<99:00:00, ]") if columns else 1000
        while shown and len("  ".join(shown)) > room:
            shown.pop()
        self._bar.set_postfix_str("  ".join(shown), refresh=False)
        if probes:
            self._bar.write(f"step {step}: {probes}", file=sys.stderr)

    def upload(self) -> None:
        """Brings metrics.jsonl up to date, where it is an object in a store; a file on a disk always is."""
        if self._active and self._object and self._is_ours():
            self._object.flush()
            self._uploaded = time.monotonic()

    def note(self, text: str) -> None:
        """Prints one line for the reader of the screen, above the bar."""
        tqdm.write(text, file=sys.stderr)

    def pause(self) -> None:
        """Stops the clock until the next `tick`: what follows, such as a probe, is not training."""
        self._clock = None

    @property
    def failure(self) -> StorageError | None:
        """Gives the error that a full disk has caused, after which nothing that is written may be complete."""
        return self._failure or (self._events.failure if self._events else None)

    def close(self) -> None:
        """Ends the bar and flushes TensorBoard's events. Raises StorageError where anything could not be written."""
        if self._active:
            self._bar.close()
            self.upload()
            self._board.close()
            if self.failure:
                raise self.failure


def _memory() -> dict[str, float]:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return {"memory_gib": max(peaks) / 2**30} if peaks else {}


def duration(seconds: float) -> str:
    """Writes a time for people to read: seconds, minutes, or hours and minutes."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def _is_evaluation(metrics: dict[str, float]) -> bool:
    return any(name.startswith("eval/") for name in metrics)


def read(workdir: epath.Path) -> list[dict[str, float]]:
    """Reads the lines of `metrics.jsonl`, none where there is no file, up to one that is cut off or damaged."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().decode(errors="replace").splitlines() if is_file(path) else []
    parsed = []
    for line in lines:
        try:
            found = json.loads(line)
            if not isinstance(found["step"], int):
                break
        except (ValueError, LookupError, TypeError, RecursionError):
            break
        parsed.append(found)
    return parsed
