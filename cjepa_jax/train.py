"""Pre-training, from top to bottom: checks, data, mesh, state, steps, metrics, checkpoints, probes."""

import concurrent.futures
import contextlib
import json
import math
import signal
import sys
import time
from typing import Any

import grain
import jax
import numpy as np
from etils import epath

from cjepa_jax import checkpoint, hosts, metrics, plots, pretrained, sharding
from cjepa_jax.config import Config, UserError, require
from cjepa_jax.data import pipeline, sources
from cjepa_jax.diagnostics import diagnose
from cjepa_jax.evaluate.probes import Probes, format_table
from cjepa_jax.masking import sample_masks
from cjepa_jax.parsing import flatten
from cjepa_jax.step import Method, TrainState, build


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


def train(config: Config, workdir: epath.Path, init: epath.Path | None = None) -> TrainState:
    """Trains to the end, or from where the workdir stands, or until SIGTERM or Ctrl-C; returns the last state.

    `init` is a checkpoint whose encoders and predictor a new run starts from, instead of random ones.

    Raises UserError for settings that do not fit the data, the devices or the
    workdir, before anything is compiled or written; DivergedError when the loss is not
    finite, whereupon the checkpoints are those from before.
    """
    data = config.data
    train_source = sources.load(data, data.train_split)
    steps = round(config.optim.epochs * len(train_source) / data.batch_size)
    require(steps >= 1, f"optim.epochs = {config.optim.epochs} of {len(train_source)} images are less than one batch")
    method = Method(config, steps)
    meta: dict[str, Any] = {"config": flatten(config), "fingerprint": train_source.fingerprint}
    checkpoint.check_workdir(workdir, meta)
    reader = pipeline.Reader(train_source, data)
    mesh = sharding.make_mesh(config.mesh)
    probes = Probes(method, reader, mesh) if config.eval.every and train_source.classes else None
    program = build(method, mesh)
    networks = pretrained.load(init, ("encoder", "predictor", "target_encoder")).params if init else {}
    for tower, params in networks.items():
        wanted = program.state.target_params if tower == "target_encoder" else program.state.params[tower]
        pretrained.check(params, wanted, f"--init {init}: its {tower}")

    if config.model.dtype == "float32":  # else TPUs and GPUs round the operands of float32 products
        jax.config.update("jax_default_matmul_precision", "highest")
    rngs = jax.jit(lambda: tuple(jax.random.split(jax.random.key(config.seed))), out_shardings=program.whole)
    rng_init, rng_step = rngs()

    hosts.meet("workdir checked")  # before the first of them makes it
    checkpoints = checkpoint.Checkpointer(workdir, config.checkpoint, meta)
    restored = checkpoints.restore(program.state)
    state = program.init(rng_init) if restored is None else restored
    if restored is None and networks:
        target = networks.pop("target_encoder")
        state = state.replace(params=state.params | networks, target_params=target)
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.state))
    start = int(state.step)
    rows = sharding.local_rows(program.images)
    batches = pipeline.train_batches(reader, seed=config.seed, start=start, rows=rows)
    checkpoint.write_config(workdir, meta["config"])
    if jax.process_index() == 0:
        print(_headline(method, train_source, state, start), file=sys.stderr, flush=True)
        _draw_masks(reader, method, workdir)

    log = metrics.Metrics(workdir, start=start, steps=steps, batch_size=data.batch_size)
    compiled_diagnose = jax.jit(diagnose)
    votes = hosts.Votes(program.batch, program.whole)
    step, asked, skipped = start, hosts.GO_ON, 0
    running: Any = ()  # the metrics of the step that the devices work on
    pending = None  # metrics are fetched one step late, so that the devices never wait for the host
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(log),
        _Feed(batches, program.images) as feed,
        _Stop() as stop,
    ):
        while step < steps and asked == hosts.GO_ON:
            images = feed.take(running)
            state, step_metrics, features = program.step(state, images, rng_step)
            jax.block_until_ready(running)  # one step ahead is enough; without end, images would pile up there
            asked = votes.result()
            votes.cast(hosts.FAIL if feed.failure else hosts.STOP if stop.requested else hosts.GO_ON)
            running, step = step_metrics, step + 1
            _flush(log, pending)
            pending = None
            log.tick(step, feed.seconds_waited)
            if step % config.log.every == 0 or step == steps:
                pending = step, step_metrics | compiled_diagnose(features) | {"data/skipped": len(reader.unreadable)}
            if checkpoints.due(step) or step == steps or asked != hosts.GO_ON:
                asked = max(asked, votes.result())
                feed.check(failed=asked == hosts.FAIL)
                _check_finite(step, step_metrics)
                checkpoints.save(step, state)
            if probes and step % config.eval.every == 0 and step < steps:
                _flush(log, pending)
                pending = None
                log.pause()
                log.write(step, probes.quick(state))
            for name, reason in list(reader.unreadable.items())[skipped:]:
                log.note(f"skipped {name}: {reason}")
                skipped += 1
        _flush(log, pending)
        if probes and start < step == steps:
            log.write(step, probes.report(state, program.init(rng_init), workdir))
    if jax.process_index() == 0:
        plots.curves(metrics.read(workdir), workdir / "curves.png")
        print(_farewell(workdir, step, steps), file=sys.stderr)
        if (workdir / "evaluation.json").exists():
            print(format_table(json.loads((workdir / "evaluation.json").read_text()), config.eval.shots))
    return state


class _Feed:
    """Batches on the devices, one ahead of the step; knows for how long the devices stood idle for want of one."""

    seconds_waited = 0.0
    failure: Exception | None = None  # of this process, among several; the others must hear of it before it leaves

    def __init__(self, batches: grain.DatasetIterator, images: jax.ShapeDtypeStruct):
        """Images: the global batch; of it `batches` gives this process's rows."""
        self._batches, self._images = batches, images
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._next = self._thread.submit(self._fetch)

    def __enter__(self):
        return self

    def _fetch(self) -> jax.Array:
        return sharding.from_local_rows(next(self._batches), self._images)

    def take(self, running: Any) -> jax.Array:
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
            nothing = np.zeros((len(sharding.local_rows(self._images)), *self._images.shape[1:]), np.uint8)
            # For the step that the others take too; its result is never saved.
            return sharding.from_local_rows(nothing, self._images)
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


def _headline(method: Method, source: sources.Source, state: TrainState, start: int) -> str:
    config = method.config
    classes = f" of {len(source.classes)} classes" if source.classes else ", which have no labels"
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    device = jax.devices()[0]
    return (
        f"{config.model.size}/{config.model.patch_size} on {len(source)} images{classes}, "
        f"{parameters / 1e6:.2f} M parameters, {jax.device_count()} x {device.device_kind}, "
        f"{method.steps} steps of {config.data.batch_size} images" + (f", going on from step {start}" if start else "")
    )


def _farewell(workdir: epath.Path, step: int, steps: int) -> str:
    if step < steps:
        return f"stopped and saved at step {step} of {steps}; the same command goes on from there"
    return f"finished at step {steps}; results are in {workdir}"


def _draw_masks(reader: pipeline.Reader, method: Method, workdir: epath.Path) -> None:
    config = method.config
    first = next(pipeline.ordered_batches(reader, size=6, crop_fraction=1.0))[0]
    sample = jax.jit(lambda key: sample_masks(key, config.mask, grid=config.grid, batch=len(first)))
    plots.masks(first, jax.device_get(sample(jax.random.key(config.seed))), workdir / "masks.png", grid=config.grid)
