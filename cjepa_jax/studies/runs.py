"""Runs a study by the ordinary loop and evaluators, tells how far it is, and how long the rest will take."""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Collection

import jax

from cjepa_jax import signals
from cjepa_jax.data import pipeline
from cjepa_jax.errors import nearest, require
from cjepa_jax.evaluate.checkpoint import judge
from cjepa_jax.evaluate.collapse import Collapse
from cjepa_jax.evaluate.config import Evaluation, Images
from cjepa_jax.evaluate.knn import Knn
from cjepa_jax.files import write_whole
from cjepa_jax.methods import METHODS
from cjepa_jax.models.vit import exact
from cjepa_jax.studies import results
from cjepa_jax.studies.design import Arm, Run, Study
from cjepa_jax.tpu import flops
from cjepa_jax.train import loop, memory, orbax, setup, sharding, writer
from cjepa_jax.train.feed import Feed
from cjepa_jax.train.nonfinite import DivergedError

_TIMED_STEPS = 5


def run(study: Study, only: Collection[str] = ()) -> bool:
    """Runs all that is left of a study, or until SIGTERM or Ctrl-C; tells whether it is finished.

    With names of arms in `only`, runs and judges what is left of these, and leaves the tables to a call without: so
    several processes share out a study. Raises UserError for settings that do not fit the data or the devices, before
    anything is compiled or written, and what else `cjepa_jax.train.loop.train` raises, but for a run that diverges,
    which is an outcome.
    """
    arms = _selected(study, only)
    _check(study)
    study.workdir.mkdir(exist_ok=True)
    if not (study.workdir / "study.json").exists():
        write_whole(study.workdir / "study.json", json.dumps(study.describe(), indent=1) + "\n")
    done = _train_arms(study, arms, tables=not only)
    if done:
        for arm in arms:
            for one in results.finals(study, arm).values():
                _judge(study, arm, one)
    if not only:
        results.write(study)
    if not done:
        print("the study has stopped; the same command goes on from there", file=sys.stderr, flush=True)
        return False
    _say(study, progress(study, arms))
    if not only:
        print(f"finished; the tables and figures are in {study.workdir}", file=sys.stderr, flush=True)
    return True


def _train_arms(study: Study, arms: Collection[Arm], *, tables: bool) -> bool:
    """Trains the trials and then the seeds of arms, as far as they are left; tells whether it got to the end."""
    shared = memory.SharedSteps()
    for arm in arms:
        for number in range(len(arm.trials)):
            if not _train(study, arms, arm, study.trial(arm, number), shared):
                return False
    for arm in arms:
        for one in results.finals(study, arm).values():
            if not _train(study, arms, arm, one, shared):
                return False
        if tables:
            results.write(study)
    return True


def _selected(study: Study, only: Collection[str]) -> list[Arm]:
    """Lists the arms of these names, all where there is no name. Raises UserError for a name of none."""
    for name in only:
        require(name in study.arms, f"--arm={name!r}: the study has no such arm; {nearest(name, study.arms)}")
    return [arm for name, arm in study.arms.items() if name in only or not only]


def _check(study: Study) -> None:
    """Raises UserError where an arm does not fit the devices, its evaluators or the workdir."""
    for arm in study.arms.values():
        setup.set_up(_runs(study, arm)[0].config, study.workdir, None)


def _train(study: Study, arms: Collection[Arm], arm: Arm, one: Run, compile_step: memory.SharedSteps) -> bool:
    """Trains one run of `arms` to its end, or on from where it stands; tells whether it got there."""
    if results.finished(one):
        return True
    signals.Stop.newest = None
    _say(study, progress(study, arms, (arm, one)))
    one.folder.parent.mkdir(parents=True, exist_ok=True)
    # The tables have the baselines once for each seed; on raw pixels a probe can take as long as the training.
    baselines = arm.name == study.baseline and one.config.seed in study.seeds
    try:
        loop.train(one.config, one.folder, compile_step=compile_step, baselines=baselines)
    except DivergedError as error:
        write_whole(one.folder / "diverged.txt", f"{error}\n")
        print(f"{one.folder}: {error}; the study goes on", file=sys.stderr, flush=True)
    asked = signals.Stop.newest is not None and signals.Stop.newest.requested  # perhaps while the run was judged
    return results.finished(one) and not asked


def _judge(study: Study, arm: Arm, one: Run) -> None:
    """Judges the last checkpoint of a run on the test split, where that has not been done."""
    files = zip(study.evaluators, results.test_files(study, one), strict=True)
    wanted = [name for name, path in files if not path.exists()]
    if results.diverged(one) or not wanted:
        return
    saved = orbax.saved_steps(one.folder)
    require(
        not saved or one.steps in saved,
        f"{one.folder} lacks the checkpoint of its last step, {one.steps}: delete its evaluation.json, and the same "
        "command trains what is missing",
    )
    data = one.config.data
    evaluation = Evaluation(
        seed=one.config.seed,
        data=Images(
            data_dir=data.data_dir,  # which may have moved since the run was trained
            test_split=study.splits["test"],
            batch_size=arm.batch_size,
            threads=data.threads,
        ),
        knn=Knn(neighbours=min(one.config.eval.neighbours, arm.images)),
        collapse=Collapse(objects=min(Collapse().objects, arm.images)),
    )
    judge(one.folder, evaluation, wanted, baselines=arm.name == study.baseline, name=results.TEST)


def _say(study: Study, text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    write_whole(study.workdir / "progress.txt", text + "\n")


def _speed(one: Run) -> float | None:
    """Estimates from its log the seconds of a whole run, with evaluations, without compiling; None without a log."""
    lines = writer.read(one.folder)
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line and "lr" in line]
    probes = [line["eval/seconds"] for line in lines if "eval/seconds" in line]
    if not speeds:
        return None
    config = one.config
    seconds = one.steps * config.data.batch_size / statistics.median(speeds)
    return seconds + (-(-one.steps // config.eval.every) * statistics.median(probes) if probes else 0.0)


def _runs(study: Study, arm: Arm) -> list[Run]:
    """Lists the runs of an arm; before its settings are chosen, with those of its first trial."""
    best = results.chosen(study, arm)
    settings = (arm.trials[0] if arm.trials else {}) if best is None else best
    return [
        *(study.trial(arm, number) for number in range(len(arm.trials))),
        *(study.final(arm, settings, seed) for seed in study.seeds),
    ]


def _cost(study: Study, arm: Arm) -> float:
    """Counts the products of a run of an arm, by which its time is guessed from another's."""
    config = _runs(study, arm)[0].config
    return flops.step(METHODS[config.method](config).transformers().values()) * arm.images_seen


def seconds_per_run(study: Study) -> dict[str, float]:
    """Gives the seconds of a run of each arm, as measured or guessed from other arms; {} where nothing has run."""
    found = {
        name: statistics.median(speeds)
        for name, arm in study.arms.items()
        if (speeds := [speed for one in _runs(study, arm) if (speed := _speed(one)) is not None])
    }
    if not found:
        return {}
    costs = {name: _cost(study, arm) for name, arm in study.arms.items()}
    if not all(costs.values()):  # a method does not say what it computes
        costs = {name: float(arm.images_seen) for name, arm in study.arms.items()}
    rate = statistics.median(seconds / costs[name] for name, seconds in found.items())
    return {name: found.get(name, rate * cost) for name, cost in costs.items()}


def _left(study: Study, arm: Arm) -> float:
    """Counts the runs of an arm that are left, one that has begun by its part that is left."""
    left = 0.0
    for one in _runs(study, arm):
        if not results.finished(one):
            lines = writer.read(one.folder)
            left += 1 - (lines[-1]["step"] / one.steps if lines else 0.0)
    return left


def progress(study: Study, arms: Collection[Arm], now: tuple[Arm, Run] | None = None) -> str:
    """Says of each arm which of its runs are done, which one is `now`, and how long the rest of `arms` takes."""
    seconds = seconds_per_run(study)
    width, text, done, count = max(map(len, study.arms)), [], 0, 0
    for name, arm in study.arms.items():
        runs = _runs(study, arm)
        over = [results.finished(one) for one in runs]
        done, count, trials = done + sum(over), count + len(over), len(arm.trials)
        line = f"  {name:{width}}  trials {sum(over[:trials])}/{trials}  seeds {sum(over[trials:])}/{len(study.seeds)}"
        if seconds:
            line += f"  about {writer.duration(seconds[name])} a run"
        text.append(line + (f"  <- {now[1].folder.name} of {now[1].steps} steps" if now and now[0] is arm else ""))
    left = sum(seconds[arm.name] * _left(study, arm) for arm in arms) if seconds else None
    rest = "how long is left is known after the first run" if left is None else f"about {writer.duration(left)} left"
    rest += " for the arms of this process" if len(arms) < len(study.arms) else ""
    judged = all(
        path.exists() or results.diverged(one)
        for arm in study.arms.values()
        for one in results.finals(study, arm).values()
        for path in results.test_files(study, one)
    )
    rest = rest if done < count else f"the test split is {'judged' if judged else 'to be judged'}"
    return "\n".join([f"study: {done} of {count} runs done, {rest}", *text])


def plan(study: Study, only: Collection[str] = ()) -> str:
    """Says what will run and how long it will take; in a new workdir by taking a few steps of each arm.

    `only` names the arms that are meant, as for `run`.
    """
    arms = _selected(study, only)
    _check(study)
    tuned = f"each has {study.trials} trials, chosen by {study.choose_by} on {study.splits['held_out']}, and then"
    text = [
        f"{len(arms)} arms; {tuned if study.trials else 'nothing is tuned; each has'} {len(study.seeds)} seeds; "
        f"{study.probes} probes per run; at the end {', '.join(study.evaluators)} judge once on {study.splits['test']}"
    ]
    if seconds_per_run(study):
        return "\n".join([*text, progress(study, arms)])
    total, width = 0.0, max(len(arm.name) for arm in arms)
    for arm in arms:
        compiling, step, probe = _measure(study, arm)
        count = len(arm.trials) + len(study.seeds)
        seconds = count * (arm.steps * step + study.probes * probe) + (len(arm.trials) + 1) * compiling
        total += seconds
        text.append(
            f"  {arm.name:{width}}  {count} runs of {arm.steps} steps, {arm.images_seen:,} images: {1000 * step:.3g} "
            f"ms a step, {probe:.2g} s a probe, {compiling:.2g} s to compile; {writer.duration(seconds)} in all"
        )
    text.append(
        f"about {writer.duration(total)} in all, by {_TIMED_STEPS} steps of each arm on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}; the evaluation of finished runs is not in it"
    )
    return "\n".join(text)


def _measure(study: Study, arm: Arm) -> tuple[float, float, float]:
    """Times compiling the step of an arm, its steps and an evaluation, in seconds; writes nothing."""
    config = _runs(study, arm)[0].config
    with exact(config.model.dtype):
        training = setup.set_up(config, study.workdir, None)
        program = training.program
        rng = jax.device_put(jax.random.key(0), program.whole)
        state, times = training.init(rng), [time.perf_counter()]
        compiled = memory.compile_step(program, training.steps)
        rows = sharding.local_rows(program.batch.images)
        views = training.method.views
        batches = pipeline.train_batches(training.reader, seed=0, start=0, rows=rows, views=views)
        with Feed(batches, program.batch, lambda batch: None, config.data.read_timeout) as feed:
            for _ in range(1 + _TIMED_STEPS):
                state, _, _ = compiled(state, feed.take(()), rng)
                jax.block_until_ready(state)
                times.append(time.perf_counter())
        took = [after - before for before, after in itertools.pairwise(times)]
        assert training.evaluation
        networks = training.method.networks(state.params, state.averages)
        probe = [training.evaluation.probe(networks)["eval/seconds"] for _ in range(2)][-1]
    step = statistics.median(took[1:])
    return took[0] - step, step, probe
