"""The loop of every training: feed, steps, metrics one step late, checkpoints, evaluation, and how it is stopped."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import jax
from etils import epath
from jaxtyping import PyTree

from cjepa_jax import plots, signals
from cjepa_jax.config import Config
from cjepa_jax.data import pipeline, sources, waiting
from cjepa_jax.errors import StorageError, UserError
from cjepa_jax.evaluate import report
from cjepa_jax.files import forget_listings, forgiving
from cjepa_jax.methods.base import Method, Metrics
from cjepa_jax.models.vit import exact
from cjepa_jax.tpu import chips, flops
from cjepa_jax.train import checkpoint, distributed, lock, memory, peers, sharding, trackers, writer
from cjepa_jax.train.alarm import Alarm
from cjepa_jax.train.diagnostics import diagnose
from cjepa_jax.train.feed import Feed
from cjepa_jax.train.nonfinite import DivergedError, Recorder
from cjepa_jax.train.setup import Training, set_up
from cjepa_jax.train.step import Program, TrainState
from cjepa_jax.train.trouble import Trouble


def train(
    config: Config,
    workdir: epath.Path,
    init: epath.Path | None = None,
    profile: tuple[int, int] | None = None,
    source: sources.Source | None = None,
    compile_step: Callable[[Program, int], jax.stages.Compiled] | None = None,
    *,
    extend: bool = False,
    baselines: bool = True,
) -> TrainState:
    """Trains to the end, or from where the workdir stands, or until SIGTERM or Ctrl-C; returns the last state.

    `init` is a checkpoint whose networks a new run starts from, instead of random ones. With `profile` = (start, stop),
    a trace of steps start + 1 to stop for xprof or Perfetto is recorded in WORKDIR/profile. `source` holds the images
    to train on, where they are not those that `config.data` names. `compile_step` is `memory.compile_step`, or a
    `memory.SharedSteps` that several runs share which differ only in the seed. `extend` lets `config` have more epochs
    than the run in the workdir, which then goes on with the schedules of the new length. `baselines` makes the
    evaluation at the end judge an untrained encoder and raw pixels as well.

    Raises UserError for settings that do not fit the data, the devices or the workdir, before anything is compiled or
    written, where another run trains in the workdir, and where images or a checkpoint cannot be read; StalledError
    where an image is not read in time; DivergedError when the loss is not finite, whereupon the checkpoints are those
    from before; LockLostError when another run has taken the workdir over, which only happens to a run that was paused
    for long. A single process saves the state before it leaves because of images.
    """
    with peers.training(workdir), peers.leaving_at_once(unless=_all_raise):
        with distributed.refused_together():  # all have checked the workdir before one makes it
            run = set_up(config, workdir, init, source, extend=extend)
        with (
            lock.Lock(workdir) as held,
            _connect(run, workdir) as following,
            memory.explained(run.config),
            exact(run.config.model.dtype),
        ):
            return _train(run, workdir, held, following, profile, compile_step or memory.compile_step, baselines)


def _train(
    run: Training,
    workdir: epath.Path,
    held: lock.Lock,
    following: trackers.Trackers,
    profile: tuple[int, int] | None,
    compile_step: Callable[[Program, int], jax.stages.Compiled],
    baselines: bool,
) -> TrainState:
    """Trains what was checked, in a workdir that nobody else writes to."""
    config, program, steps, reader = run.config, run.program, run.steps, run.reader
    compiled = compile_step(program, steps)
    root = jax.jit(lambda: tuple(jax.random.split(jax.random.key(config.seed))), out_shardings=program.whole)
    rng_init, rng_step = root()

    forget_listings(workdir)  # the owner before may have saved since they were made
    checkpoints = checkpoint.Checkpointer(workdir, config.checkpoint, run.meta)
    restored = checkpoints.restore(program.state)
    state = run.init(rng_init) if restored is None else restored
    run.networks.clear()  # which take as much memory as the run's own
    start = int(jax.device_get(state.step))
    check = pipeline.check_labelled if run.method.needs_labels else lambda batch: None
    rows = sharding.local_rows(program.batch.images)
    batches = pipeline.train_batches(reader, seed=config.seed, start=start, rows=rows, views=run.method.views)
    trouble, before = Trouble(), [line for line in writer.read(workdir) if line["step"] <= start]
    for line in before:
        trouble.observe(line)
        checkpoints.judge(int(line["step"]), line)
    alarm = Alarm(config.log, steps, before)
    log = writer.Writer(
        workdir,
        start=start,
        steps=steps,
        batch_size=config.data.batch_size,
        images=len(reader.source),
        peak=peak_rate(run.method),
        trackers=following,
        is_ours=held.is_ours,
    )
    checkpoint.write_config(workdir, run.meta["config"])  # after metrics.jsonl, by which its steps are judged
    if jax.process_index() == 0:
        print(_headline(run, state, start), file=sys.stderr, flush=True)
        if restored is None and run.origin:
            print(run.origin, file=sys.stderr, flush=True)
        if run.epochs_before:
            print(run.jump(start), file=sys.stderr, flush=True)
        with peers.leaving_at_once():
            _draw_masks(run, workdir)

    consensus = distributed.Consensus(program.split, program.whole)
    recorder = Recorder(workdir, seed=config.seed, start=start, params=state.params)
    observe = jax.jit(diagnose)
    curves = Curves(workdir, run.method)
    step, asked, skipped = start, distributed.GO_ON, 0
    failed: waiting.StalledError | UserError | None = None  # images do not come, or cannot be read; the run saves
    running: PyTree = ()  # the metrics of the step that the devices work on
    pending = None  # metrics are fetched one step late, so that the devices never wait for the host

    def probe() -> None:
        assert run.evaluation
        log.pause()
        with peers.leaving_at_once(unless=lambda error: isinstance(error, waiting.StalledError)):  # the loop leaves
            metrics = run.evaluation.probe(run.method.networks(state.params, state.averages))
        log.write(step, metrics)
        checkpoints.judge(step, metrics)

    probes = range(config.eval.every, steps, config.eval.every) if run.evaluation else ()
    with (
        _naming_what_is_left(checkpoints),
        signals.Stop() as stop,  # outside of what waits for the last checkpoint
        contextlib.closing(checkpoints),
        contextlib.closing(log),
        Feed(batches, program.batch, check, config.data.read_timeout) as feed,
        waiting.until(lambda: stop.requested),
        _Profiler(workdir, profile) as profiler,
        peers.leaving_at_once(unless=_all_raise),  # innermost, because closing the checkpoints waits for the others
        memory.explained(config),
    ):
        if start in probes and not distributed.told_by_first(log.has_evaluation(start)):  # the run ended meanwhile
            probe()
        while step < steps and asked == distributed.GO_ON:
            profiler.tick(step, running)
            with jax.transfer_guard("disallow"):  # nothing moves between host and devices unless it is asked for
                try:
                    batch = feed.take(running)
                except (waiting.StalledError, UserError) as error:
                    failed = error
                    break
                state, step_metrics, observed = compiled(state, batch, rng_step)
                stop.listen()  # until the first step is compiled, there is nothing to save
                distributed.wait_for(running)  # one step ahead is enough; without this wait, batches would pile up
                asked = consensus.result()
            saves = checkpoints.due(step + 1) or step + 1 == steps or asked != distributed.GO_ON
            saves = saves or (config.checkpoint.keep_best != "" and step + 1 in probes)
            if saves:
                held.look()
            requested = distributed.STOP if stop.requested or alarm.wants_stop else distributed.GO_ON
            failure = feed.failure or held.failure or checkpoints.watch() or log.failure
            if isinstance(failure, StorageError) and jax.process_count() > 1:
                raise failure  # the others cannot stop with this one, as they wait for what it was to write
            consensus.ask(distributed.FAIL if failure else requested)
            running, step = step_metrics, step + 1
            recorder.keep(step, step_metrics, observed.grad_norms)
            log.tick(step, feed.seconds_waited)  # before lines are written: they are about the time until now
            _flush(log, recorder, alarm, trouble, pending)
            pending = None
            if step % config.log.every == 0 or step in (1, steps):  # the first is what later ones are compared with
                seen = observe(observed.features) if observed.features is not None else {}
                pending = step, step_metrics | seen | {"data/skipped": len(reader.unreadable)}
            if saves:
                asked = max(asked, consensus.result())
                if asked == distributed.FAIL:
                    raise failure or UserError(distributed.ELSEWHERE)
                recorder.check(step, step_metrics, saved=True)
                trouble.observe(jax.device_get(step_metrics))
            if saves or step in probes:  # a run that goes on from a checkpoint finds the metrics up to it
                _flush(log, recorder, alarm, trouble, pending)
                pending = None
            if saves:
                log.upload()
                checkpoints.save(step, state, calm=not trouble.found)
            if step in probes:
                try:
                    probe()
                except (waiting.StalledError, UserError) as error:
                    failed = error
                    break
            if (saves or step in probes) and curves.is_due():
                log.pause()
                curves.draw()
            for name, reason in list(reader.unreadable.items())[skipped:]:
                log.note(f"skipped {name}: {reason}")
                skipped += 1
        profiler.end(running)
        _flush(log, recorder, alarm, trouble, pending)
        held.check()
        if failed:
            if step > start and jax.process_count() == 1:  # several would have to save together
                recorder.check(step, running, saved=True)
                trouble.observe(jax.device_get(running))
                checkpoints.save(step, state, calm=not trouble.found)
            if not stop.requested or jax.process_count() > 1:
                raise failed
            log.note(str(failed))
        owes = run.evaluation is not None and step == steps
        owes = owes and not distributed.told_by_first(log.has_evaluation(step) and report.is_of(workdir, step))
        if run.evaluation and owes and asked == distributed.GO_ON:
            owes = False
            networks = run.method.networks(state.params, state.averages)
            baselines = baselines and not run.method.needs_labels
            untrained = run.untrained_encoder(rng_init) if baselines else None
            checkpoints.finish()  # no evaluation.json without the checkpoint that it is about
            with peers.leaving_at_once():
                metrics = run.evaluation.report(networks, untrained, workdir, step=step)
            if not log.has_evaluation(step):
                log.write(step, metrics)
            checkpoints.judge(step, metrics)
    if jax.process_index() == 0:
        curves.draw()
        print(_farewell(workdir, step, steps, owes=owes) + checkpoints.best(), file=sys.stderr)
    if step < steps:
        alarm.check(step)
    return state


def _connect(run: Training, workdir: epath.Path) -> trackers.Trackers:
    """Connects process 0 with the trackers of `log.to`. All processes raise UserError where that fails."""
    with distributed.refused_together():
        names = run.config.log.to if jax.process_index() == 0 else ()
        return trackers.connect(names, workdir, run.meta["config"], goes_on=run.goes_on)


def _all_raise(error: Exception) -> bool:
    """Tells whether all processes leave with such an error after the same step."""
    out_of_memory = isinstance(error.__cause__, jax.errors.JaxRuntimeError)
    if isinstance(error, waiting.StalledError) or out_of_memory:
        return False
    return isinstance(error, UserError | DivergedError | lock.LockLostError)


class Curves:
    """Draws curves.png, in process 0; while the run goes on every few minutes at most, because it takes a second."""

    SECONDS = 300.0  # from one picture to the next

    def __init__(self, workdir: epath.Path, method: Method):
        self._workdir, self._method, self._drawn = workdir, method, time.monotonic()

    def is_due(self) -> bool:
        """Tells whether the last picture is old."""
        return jax.process_index() == 0 and time.monotonic() - self._drawn >= self.SECONDS

    def draw(self) -> None:
        """Draws all lines that metrics.jsonl has so far."""
        with forgiving(self._workdir):
            plots.curves(writer.read(self._workdir), self._workdir / "curves.png", self._method.panels)
        self._drawn = time.monotonic()


class _Profiler:
    """Records a trace of the steps from one number to another, where that is asked for."""

    def __init__(self, workdir: epath.Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._running = workdir / "profile", steps, False

    def __enter__(self):
        return self

    def tick(self, step: int, running: PyTree) -> None:
        """Starts or ends the trace before a step; `running` are results of the one before."""
        if self._steps and not self._running and self._steps[0] <= step < self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._steps and step >= self._steps[1]:
            self.end(running)

    def end(self, running: PyTree = ()) -> None:
        """Ends the trace, if there is one, when the step is over that gives `running`."""
        if self._running:
            jax.block_until_ready(running)
            jax.profiler.stop_trace()
            self._running = False

    def __exit__(self, *_):
        self.end()


@contextlib.contextmanager
def _naming_what_is_left(checkpoints: checkpoint.Checkpointer) -> Iterator[None]:
    """Adds to the error of a run that has diverged which checkpoint is from before that."""
    try:
        yield
    except DivergedError as error:
        where = checkpoints.before_trouble()
        raise DivergedError(f"{error}; {where}" if where else str(error)) from None


def _flush(
    log: writer.Writer, recorder: Recorder, alarm: Alarm, trouble: Trouble, pending: tuple[int, Metrics] | None
) -> None:
    """Fetches, writes and watches the metrics that wait, if any do."""
    if pending:
        step, values = pending
        metrics = {name: float(value) for name, value in jax.device_get(values).items()}
        collapsed, warning = alarm.look(step, metrics)
        log.write(step, metrics | collapsed)
        if warning and jax.process_index() == 0:
            log.note(warning)
        recorder.check(step, values)
        trouble.observe(metrics)


def peak_rate(method: Method) -> float | None:
    """Gives the images per second of all devices at their peak, where that and the method's products are known."""
    peak, needed = chips.peak_flops(jax.devices()[0].device_kind), flops.step(method.transformers().values())
    return peak * jax.device_count() / needed if peak and needed else None


def _headline(run: Training, state: TrainState, start: int) -> str:
    """Says what is about to be trained on what."""
    model, source, device = run.config.model, run.reader.source, jax.devices()[0]
    of_classes = f" of {len(source.classes)} classes" if source.classes else ", which have no labels"
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    return (
        f"{run.config.method}: {model.size}/{model.patch_size} on {len(source)} images{of_classes}, "
        f"{parameters / 1e6:.2f} M parameters, {jax.device_count()} x {device.device_kind}, "
        f"{run.steps} steps of {run.config.data.batch_size} images" + (f", going on from step {start}" if start else "")
    )


def _draw_masks(run: Training, workdir: epath.Path) -> None:
    """Draws masks.png, where the method hides something."""
    sampled = jax.jit(lambda: run.method.masks(jax.random.key(run.config.seed), min(6, len(run.reader.source))))()
    if sampled is not None:
        images = next(pipeline.ordered_batches(run.reader, size=6, crop_fraction=1.0))[0]
        plots.masks(images, jax.device_get(sampled), workdir / "masks.png", grid=run.config.grid)


def _farewell(workdir: epath.Path, step: int, steps: int, *, owes: bool) -> str:
    if step < steps or owes:
        return f"stopped and saved at step {step} of {steps}; the same command goes on from there"
    return f"finished at step {steps}; results are in {workdir}"
