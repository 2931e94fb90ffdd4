"""The loop of every training: feed, steps, metrics one step late, checkpoints, probes, and how it is stopped."""

import concurrent.futures
import contextlib
import math
import signal
import sys
import time
from typing import Any, Protocol

import grain
import jax
import numpy as np
from etils import epath

from cjepa_jax import checkpoint, hosts, metrics, plots, sharding
from cjepa_jax.config import Checkpoint, Log, Optim, UserError, require
from cjepa_jax.data import pipeline
from cjepa_jax.step import Program


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


class Training(Protocol):
    """What the loop wants to know of one training. Its states have a `step`, its metrics loss/total and grad_norm."""

    program: Program
    seed: int
    steps: int
    reader: pipeline.Reader
    log: Log
    checkpoint: Checkpoint
    meta: dict[str, Any]  # the flat config, and the fingerprint of the images
    panels: plots.Panels  # of curves.png
    probe_every: int  # steps between probes; 0: none, and no report

    def fresh(self, rng: jax.Array) -> Any:
        """The state that a new run starts from."""

    def batches(self, start: int, rows: list[int]) -> grain.DatasetIterator:
        """Of the batches from `start` on, the given rows."""

    def begin(self, state: Any, start: int) -> None:
        """On process 0, before the first step."""

    def observe(self, seen: Any) -> dict[str, jax.Array]:
        """Further metrics of a step that is logged, from the third result of `program.step`."""

    def probe(self, state: Any) -> dict[str, float]:
        """Metrics of a state, in between."""

    def report(self, state: Any, rng: jax.Array) -> dict[str, float]:
        """Metrics of the last state; `rng` is what `fresh` got, or would have got."""


def count_steps(optim: Optim, *, images: int, batch_size: int) -> int:
    """Of a whole run. Raises UserError where there are none."""
    steps = round(optim.epochs * images / batch_size)
    require(steps >= 1, f"optim.epochs = {optim.epochs} of {images} images are less than one batch")
    return steps


def set_precision(dtype: str) -> None:
    """Makes products of float32 exact where they are asked for: TPUs and GPUs would round their operands."""
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")


def run(training: Training, workdir: epath.Path) -> Any:
    """Trains to the end, or from where the workdir stands, or until SIGTERM or Ctrl-C; returns the last state.

    For a workdir that `checkpoint.check_workdir` has accepted. Raises UserError
    where the images or the checkpoint cannot be read; DivergedError when the loss is not
    finite, whereupon the checkpoints are those from before.
    """
    program, steps, reader = training.program, training.steps, training.reader
    rngs = jax.jit(lambda: tuple(jax.random.split(jax.random.key(training.seed))), out_shardings=program.whole)
    rng_init, rng_step = rngs()

    hosts.meet("workdir checked")  # before the first of them makes it
    checkpoints = checkpoint.Checkpointer(workdir, training.checkpoint, training.meta)
    restored = checkpoints.restore(program.state)
    state = training.fresh(rng_init) if restored is None else restored
    start = int(state.step)
    batches = training.batches(start, sharding.local_rows(jax.tree.leaves(program.inputs)[0]))
    checkpoint.write_config(workdir, training.meta["config"])
    if jax.process_index() == 0:
        training.begin(state, start)

    log = metrics.Metrics(workdir, start=start, steps=steps, batch_size=reader.data.batch_size)
    votes = hosts.Votes(program.batch, program.whole)
    step, asked, skipped = start, hosts.GO_ON, 0
    running: Any = ()  # the metrics of the step that the devices work on
    pending = None  # metrics are fetched one step late, so that the devices never wait for the host
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(log),
        _Feed(batches, program.inputs) as feed,
        _Stop() as stop,
    ):
        while step < steps and asked == hosts.GO_ON:
            inputs = feed.take(running)
            state, step_metrics, seen = program.step(state, inputs, rng_step)
            jax.block_until_ready(running)  # one step ahead is enough; without end, images would pile up there
            asked = votes.result()
            votes.cast(hosts.FAIL if feed.failure else hosts.STOP if stop.requested else hosts.GO_ON)
            running, step = step_metrics, step + 1
            _flush(log, pending)
            pending = None
            log.tick(step, feed.seconds_waited)
            if step % training.log.every == 0 or step == steps:
                pending = step, step_metrics | training.observe(seen) | {"data/skipped": len(reader.unreadable)}
            if checkpoints.due(step) or step == steps or asked != hosts.GO_ON:
                asked = max(asked, votes.result())
                feed.check(failed=asked == hosts.FAIL)
                _check_finite(step, step_metrics)
                checkpoints.save(step, state)
            if training.probe_every and step % training.probe_every == 0 and step < steps:
                _flush(log, pending)
                pending = None
                log.pause()
                log.write(step, training.probe(state))
            for name, reason in list(reader.unreadable.items())[skipped:]:
                log.note(f"skipped {name}: {reason}")
                skipped += 1
        _flush(log, pending)
        if training.probe_every and start < step == steps:
            log.write(step, training.report(state, rng_init))
    if jax.process_index() == 0:
        plots.curves(metrics.read(workdir), workdir / "curves.png", training.panels)
        print(_farewell(workdir, step, steps), file=sys.stderr)
    return state


def headline(training: Training, state: Any, start: int, *, network: str, classes: int) -> str:
    """What is about to be trained on what, for the screen."""
    of_classes = f" of {classes} classes" if classes else ", which have no labels"
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    device = jax.devices()[0]
    return (
        f"{network} on {len(training.reader.source)} images{of_classes}, "
        f"{parameters / 1e6:.2f} M parameters, {jax.device_count()} x {device.device_kind}, "
        f"{training.steps} steps of {training.reader.data.batch_size} images"
        + (f", going on from step {start}" if start else "")
    )


class _Feed:
    """Batches on the devices, one ahead of the step; knows for how long the devices stood idle for want of one."""

    seconds_waited = 0.0
    failure: Exception | None = None  # of this process, among several; the others must hear of it before it leaves

    def __init__(self, batches: grain.DatasetIterator, inputs: Any):
        """Inputs: shapes of the global batch; of it `batches` gives this process's rows."""
        self._batches, self._inputs = batches, inputs
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._next = self._thread.submit(self._fetch)

    def __enter__(self):
        return self

    def _fetch(self) -> Any:
        return jax.tree.map(sharding.from_local_rows, next(self._batches), self._inputs)

    def take(self, running: Any) -> Any:
        """The next batch; `running` are results of the step that the devices work on meanwhile."""
        while not (self._next.done() or all(x.is_ready() for x in jax.tree.leaves(running))):
            time.sleep(0.0005)
        idle_since = time.perf_counter()
        try:
            batch = self._next.result()
        except Exception as error:
            if jax.process_count() == 1:
                raise
            self.failure = error
            # For the step that the others take too; its result is never saved.
            return jax.tree.map(lambda x: sharding.from_local_rows(_nothing(x), x), self._inputs)
        self.seconds_waited += time.perf_counter() - idle_since
        self._next = self._thread.submit(self._fetch)
        return batch

    def check(self, *, failed: bool) -> None:
        """Raises where the batches of some process have failed."""
        if failed:
            raise self.failure or UserError("another process could not read its images and says why; all have stopped")

    def __exit__(self, *_):
        self._thread.shutdown()
        self._batches.close()


def _nothing(array: jax.ShapeDtypeStruct) -> np.ndarray:
    """Zeros in the place of this process's rows."""
    return np.zeros((len(sharding.local_rows(array)), *array.shape[1:]), array.dtype)


class _Stop:
    """SIGTERM or Ctrl-C asks the loop to save and leave; a second one ends the process at once."""

    requested = False

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _request(self, signum, frame):
        self.requested = True
        self.__exit__()

    def __exit__(self, *_):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


def _flush(log: metrics.Metrics, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
    """Fetches and writes the metrics that wait, if any do."""
    if pending:
        step, values = pending
        log.write(step, {name: float(value) for name, value in jax.device_get(values).items()})
        _check_finite(step, values)


def _check_finite(step: int, values: dict[str, jax.Array]) -> None:
    """With a finite loss and gradient the state after the step is finite too."""
    for name in ("loss/total", "grad_norm"):
        if not math.isfinite(float(values[name])):
            raise DivergedError(
                f"{name} is not finite at step {step}; lower optim.learning_rate or lengthen optim.warmup_epochs"
            )


def _farewell(workdir: epath.Path, step: int, steps: int) -> str:
    if step < steps:
        return f"stopped and saved at step {step} of {steps}; the same command goes on from there"
    return f"finished at step {steps}; results are in {workdir}"
