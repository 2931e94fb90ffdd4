"""Metrics to the progress bar, `metrics.jsonl` and TensorBoard, from process 0 only."""

import json
import os
import sys
import time

import jax
from etils import epath
from tensorboardX import SummaryWriter
from tensorboardX.record_writer import register_writer_factory
from tqdm import tqdm

from cjepa_jax.errors import StorageError
from cjepa_jax.files import is_file, is_remote, storing, write_whole

_BAR = {  # metric -> its name on the bar
    "loss/total": "loss",
    "loss/prediction": "pred",
    "loss/variance": "var",
    "loss/invariance": "inv",
    "loss/covariance": "cov",
    "rep/std": "std",
    "rep/rank": "rank",
    "images_per_second": "img/s",
    "data/wait_fraction": "wait",
}
_PROBES = ("eval/knn", "eval/logistic", "eval/top1", "eval/ema_top1")


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

    def flush(self) -> None:
        """Does nothing: nothing is kept back."""

    def close(self) -> None:
        self._file.close()


class _EventFiles:
    """Opens the files of TensorBoard's writer whose path starts with PREFIX."""

    PREFIX = "local:"
    newest: _EventFile

    def directory_check(self, path: str) -> None:
        os.makedirs(path.removeprefix(self.PREFIX), exist_ok=True)

    def open(self, path: str) -> _EventFile:
        self.newest = _EventFile(epath.Path(path.removeprefix(self.PREFIX)))
        return self.newest


_EVENT_FILES = _EventFiles()
register_writer_factory(_EventFiles.PREFIX.rstrip(":"), _EVENT_FILES)


class Writer:
    """Writes one line a call; also measures images per second, and the share of time spent waiting for them."""

    _failure: StorageError | None = None  # in writing metrics.jsonl
    _events: _EventFile | None = None

    def __init__(self, workdir: epath.Path, *, start: int, steps: int, batch_size: int):
        """Lines of steps after `start`, left by a run that was cut off, will come again and are dropped."""
        self._batch_size = batch_size
        self._clock: float | None = None
        self._step = start
        self._waited = self._waited_before = 0.0
        self._line = time.perf_counter()
        self._active = jax.process_index() == 0
        self._evaluated: set[float] = set()
        if not self._active:
            return
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read(workdir) if line["step"] <= start]
        self._evaluated = {line["step"] for line in kept if _is_evaluation(line)}
        self._text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self._path, self._text)
        folder = workdir / "tensorboard"
        with storing(folder):
            self._board = SummaryWriter(
                f"{'' if is_remote(folder) else _EventFiles.PREFIX}{folder}",
                purge_step=start + 1,
                flush_secs=120 if is_remote(workdir) else 10,  # there the whole file is written anew
            )
        self._events = None if is_remote(folder) else _EVENT_FILES.newest
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def has_evaluation(self, step: int) -> bool:
        """Tells whether there is a line with the evaluation of this step; process 0 knows."""
        return self._active and step in self._evaluated

    def tick(self, step: int, seconds_waited: float) -> None:
        """`step` has been taken: moves the bar, and starts the clock once the first one, which compiles, is over.

        seconds_waited: that the devices stood idle for want of images, in all.
        """
        self._waited = seconds_waited
        if self._clock is None:
            self._clock, self._step = time.perf_counter(), step
        if self._active:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a line; training's get `data/wait_fraction` and `images_per_second`, both since the last line.

        A step may have a line of training and one of evaluation, which have no metric in common.
        """
        now = time.perf_counter()
        if _is_evaluation(metrics):
            self._evaluated.add(step)
        else:
            waited = (self._waited - self._waited_before) / (now - self._line)
            metrics = {**metrics, "data/wait_fraction": waited}
        self._waited_before, self._line = self._waited, now
        if self._clock is not None and step > self._step:
            metrics = {**metrics, "images_per_second": self._batch_size * (step - self._step) / (now - self._clock)}
            self._clock, self._step = now, step
        if not self._active:
            return
        line = json.dumps({"step": step, **metrics}) + "\n"
        if is_remote(self._path):  # no appending there
            self._text += line
            self._path.write_text(self._text)
        else:
            try:
                with storing(self._path, len(line)), self._path.open("a") as file:
                    file.write(line)
            except StorageError as error:
                self._failure = error
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        text = "  ".join(f"{short} {metrics[name]:.4g}" for name, short in _BAR.items() if name in metrics)
        probes = "  ".join(f"{name} {value:.1%}" for name, value in metrics.items() if name in _PROBES)
        if self._bar.disable:
            print(f"step {step}/{self._bar.total}  {text}  {probes}".rstrip(), file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(text, refresh=False)
            if probes:
                self._bar.write(f"step {step}: {probes}", file=sys.stderr)

    def note(self, text: str) -> None:
        """One line for the reader of the screen, above the bar."""
        tqdm.write(text, file=sys.stderr)

    def pause(self) -> None:
        """What follows, a probe say, is not training: the clock starts again at the next `tick`."""
        self._clock = None

    @property
    def failure(self) -> StorageError | None:
        """Gives the error that a full disk has caused, after which nothing that is written may be complete."""
        return self._failure or (self._events.failure if self._events else None)

    def close(self) -> None:
        """Ends the bar and flushes TensorBoard's events. Raises StorageError where anything could not be written."""
        if self._active:
            self._bar.close()
            self._board.close()
            if self.failure:
                raise self.failure


def _is_evaluation(metrics: dict[str, float]) -> bool:
    return any(name.startswith("eval/") for name in metrics)


def read(workdir: epath.Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`, none where there is no file; what is cut off or damaged ends them."""
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
