"""All that a run needs, checked before anything is compiled or written."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree

from cjepa_jax import pretrained
from cjepa_jax.config import Config, Data
from cjepa_jax.data import pipeline, sources
from cjepa_jax.errors import require, saying, some
from cjepa_jax.evaluate.during import DuringTraining, reader_to_learn_from
from cjepa_jax.files import check_bucket_support, read_json
from cjepa_jax.interop import transformers
from cjepa_jax.interop.tensors import ImportOptions, OpenedCheckpoint
from cjepa_jax.methods import METHODS, Method
from cjepa_jax.models.vit import parse_size
from cjepa_jax.settings import flatten
from cjepa_jax.train import checkpoint, optimizer, orbax, sharding, step, trackers


@dataclasses.dataclass
class Training:
    """Holds a training that was checked and can begin."""

    config: Config
    method: Method
    program: step.Program
    steps: int
    reader: pipeline.Reader
    evaluation: DuringTraining | None
    meta: dict[str, Any]  # the flat config, and the fingerprint of the images
    networks: dict[str, Any]  # what a new run starts from instead of random parameters
    origin: str = ""  # a sentence about what of a new run comes from the checkpoint of --init, and what is fresh
    goes_on: bool = False  # from a checkpoint that is in the workdir
    epochs_before: float | None = None  # the length that the run had before it was made longer

    def init(self, rng: jax.Array) -> step.TrainState:
        """Makes the state that a new run starts from."""
        state = self.program.init(rng)
        if self.networks:
            params, averages = self.method.start_from(self.networks)
            state = state.replace(params={**state.params, **params}, averages={**state.averages, **averages})
            state = jax.tree.map(
                lambda x, like: x if isinstance(x, jax.Array) else sharding.put(x, like.sharding),
                state,
                self.program.state,
            )
        return state

    def untrained_encoder(self, rng: jax.Array) -> PyTree[jax.Array]:
        """Draws the encoder that a new run starts from without --init, and no other part of the state."""
        placed = jax.tree.map(lambda x: x.sharding, self.program.state.params["encoder"])
        return jax.jit(lambda rng: self.method.init(rng)["encoder"], out_shardings=placed)(rng)

    def jump(self, step: int) -> str:
        """Says what becomes of the schedules of a run that was made longer, when it goes on after `step` steps."""
        config, epochs = self.config, self.epochs_before
        assert epochs
        optim = dataclasses.replace(config.optim, epochs=epochs)
        before = count_steps(dataclasses.replace(config, optim=optim), images=len(self.reader.source))
        values = [  # of the last step as it was, and of the next one as it will be
            {
                "learning rate": optimizer.learning_rate(optim, steps, config.rate_scale)(at),
                "weight decay": optimizer.weight_decay(optim, steps)(at),
                "EMA momentum": 1 - optimizer.ema_step_size(config.ema, steps)(at),
            }
            for optim, steps, at in ((optim, before, step - 1), (config.optim, self.steps, step))
        ]
        names = list(values[0])[: 3 if self.method.averaged else 2]
        jumps = (f"{name} {float(values[0][name]):.4g} -> {float(values[1][name]):.4g}" for name in names)
        return (
            f"made longer: {before} -> {self.steps} steps; from step {step} on the schedules are those of the new "
            f"length: {', '.join(jumps)}"
        )


def set_up(
    config: Config,
    workdir: epath.Path,
    init: epath.Path | None,
    source: sources.Source | None = None,
    *,
    extend: bool = False,
) -> Training:
    """Checks settings, data, devices, workdir and the checkpoint `init` against one another.

    source: the images to train on, where they are not those that `config.data` names. extend: whether `config` may
    have more epochs than the run in the workdir.
    Raises UserError, before anything is compiled or written.
    """
    data, kind = config.data, METHODS[config.method]
    trackers.check(config.log.to)
    source = source or sources.load(data, data.train_split)
    if kind.needs_labels:
        require(
            config.eval.data(data) == data,
            "eval.source, .name, .data_dir, .train_split and .test_split are for pre-training; leave them out, as "
            "fine-tuning is judged on data.test_split",
        )
        _check_labels(data, source, sources.load(data, data.test_split))
    loaded, origin = _load_init(init, kind, config) if init and kind.needs_labels else (None, "")
    config = kind.resolve(config, str(init), loaded)
    data = config.data
    require(
        config.checkpoint.keep_best != "ema_top1" or not config.ema.off,
        "checkpoint.keep_best = 'ema_top1': there is no moving average, as ema.start = ema.end = 0; use top1",
    )
    steps = count_steps(config, images=len(source))
    method = kind(config, classes=len(source.classes))
    start: dict[str, Any] = {}
    if kind.needs_labels:
        start = {"classes": list(source.classes)}
        start |= {"init.step": loaded.step, "init.digest": pretrained.digest(loaded.params)} if loaded else {}
    config, notes, epochs_before = checkpoint.check_workdir(workdir, config, start, extend=extend)
    checkpoint.check_images(workdir, source.fingerprint)
    started_from = str(init) if init else None
    goes_on = bool(orbax.saved_steps(workdir))
    if not kind.needs_labels:
        if goes_on:  # and needs nothing more of `init`
            started_from = read_json(workdir / "config.json").get("init.path")
        elif init:
            loaded, origin = _load_init(init, kind, config)
    reader = pipeline.Reader(source, data)
    learn_from = reader_to_learn_from(config, reader)
    notes += doubts(config, source, learn_from.source)
    if jax.process_index() == 0:
        for note in notes:
            print(note, file=sys.stderr, flush=True)
    method = dataclasses.replace(method, config=config)
    mesh = sharding.make_mesh(config.mesh)
    program = step.build(method, steps, mesh)
    evaluates = config.eval.every > 0 and len(learn_from.source.classes) > 1
    evaluation = DuringTraining(config, learn_from, mesh) if evaluates else None
    best, evaluators = config.checkpoint.keep_best, config.eval.evaluators if evaluation else ()
    require(
        not best or ("accuracy" if best.endswith("top1") else best) in evaluators,
        f"checkpoint.keep_best = {best!r} is not evaluated during training: "
        + (f"eval.evaluators are {', '.join(evaluators)}" if evaluation else "nothing is; see eval.every, eval.source"),
    )
    require(
        kind.needs_labels or "accuracy" not in evaluators,
        "eval.evaluators: 'accuracy' judges a head, which only fine-tuning trains; leave it out",
    )
    networks = loaded.params if loaded else {}
    if loaded and networks:
        params, averages = method.start_from(networks)
        for found, wanted in ((params, program.state.params), (averages, program.state.averages)):
            for name, tree in found.items():
                pretrained.check(tree, wanted[name], f"--init {init}: its {name}")
        heads, wanted_heads = (parse_size(size).heads for size in (loaded.model.size, method.config.model.size))
        require(
            heads == wanted_heads,
            f"--init {init}: its encoder has {heads} attention heads, and model.size = {method.config.model.size} asks "
            f"for {wanted_heads}",
        )
        fresh = [name for name, tree in program.state.params.items() if name not in params and jax.tree.leaves(tree)]
        origin += f"; fresh: {', '.join(fresh)}" if fresh else ""
    return Training(
        config=config,
        method=program.method,
        program=program,
        steps=steps,
        reader=reader,
        evaluation=evaluation,
        meta={
            "config": flatten(config) | start | ({"init.path": started_from} if started_from else {}),
            "fingerprint": source.fingerprint,
        },
        networks=networks,
        origin=origin,
        goes_on=goes_on,
        epochs_before=epochs_before,
    )


def _load_init(init: epath.Path, kind: type[Method], config: Config) -> tuple[pretrained.Pretrained, str]:
    """Loads what a new run starts from, by the names of `kind`'s networks, and says in words what it is.

    The checkpoint is our own or a folder of transformers. Where it has one encoder alone, both encoders of the run
    start as that one; where it has no predictor, that is missing in the result, too. Fine-tuning says itself which
    encoder it wants. Raises UserError.
    """
    check_bucket_support(init, "--init")
    with saying("--init", instead_of="--input"):
        if transformers.is_folder(init):
            opened = transformers.open_folder(init, ImportOptions())
        else:
            load = functools.partial(pretrained.load, init, flag="--init")
            opened = OpenedCheckpoint("orbax", pretrained.available(init, flag="--init"), load)
        has = opened.networks
        origins = {name: name for name in kind.networks_of_init(config)}  # name in the run -> in the checkpoint
        if not kind.needs_labels and (encoder := next((name for name in pretrained.ENCODERS if name in has), None)):
            origins = {name: name if name in has else encoder for name in origins}
            origins = {name: of for name, of in origins.items() if name == of or name in pretrained.ENCODERS}
        for name in origins.values():
            others = [other for other in pretrained.ENCODERS if kind.needs_labels and other in has]
            remedy = f"; --config.model.encoder={others[0]} takes that one" if others else ""
            require(name in has, f"--init {init} has no {name}, only {', '.join(has)}{remedy}")
        require(bool(origins) or opened.kind == "orbax", f"--init {init} does not go with model.encoder = 'random'")
        loaded = opened.load(tuple(dict.fromkeys(origins.values())))
    if not origins:
        return loaded, ""
    origin = f"started from {init}" + (f", step {loaded.step}" if loaded.step else "")
    origin += f", with its {', '.join(loaded.params)}"
    if any(name != of for name, of in origins.items()):
        origin += f" as {' and '.join(name for name in origins if name in pretrained.ENCODERS)}"
    # The step gives parameters and averages away, so they must not share memory.
    params = {
        name: jax.tree.map(np.copy, loaded.params[of]) if name != of else loaded.params[of]
        for name, of in origins.items()
    }
    return loaded._replace(params=params), origin


def doubts(config: Config, source: sources.Source, evaluated: sources.Source) -> list[str]:
    """Says what makes the results of a run mean less than they seem to."""
    notes, batch = [], config.data.batch_size
    if len(source) < batch:
        notes.append(
            f"warning: a batch of {batch} images holds some of the {len(source)} training images more than once, which "
            "distorts statistics over the batch; lower data.batch_size"
        )
    if config.eval.every and len(evaluated.classes) < 2:
        what = f"are all of one class, {evaluated.classes[0]!r}" if evaluated.classes else "have no labels"
        notes.append(
            f"warning: eval.every = {config.eval.every} evaluates nothing, because the training images {what}; "
            "eval.source names other images to evaluate on"
        )
    if METHODS[config.method].needs_labels and source.label:  # else all images would have to be read for it
        taught = set(source.labels())
        untaught = [name for number, name in enumerate(source.classes) if number not in taught]
        if untaught:
            notes.append(
                f"warning: data.train_split = {config.data.train_split!r} has no image of {len(untaught)} of the "
                f"{len(source.classes)} classes, so that they cannot be learnt: {some(untaught)}"
            )
    return notes


def count_steps(config: Config, *, images: int) -> int:
    """Gives the number of steps of a run on so many images. Raises UserError for none, or too many."""
    steps = round(config.optim.epochs * images / config.data.batch_size)
    require(steps >= 1, f"optim.epochs = {config.optim.epochs} of {images} images are less than one batch")
    require(steps < 2**31, f"optim.epochs = {config.optim.epochs} of {images} images are {steps} steps; lower it")
    return steps


def _check_labels(data: Data, train: sources.Source, test: sources.Source) -> None:
    """Raises UserError where accuracy on `test` would mean nothing for a classifier that `train` has taught."""
    for key, source in (("train_split", train), ("test_split", test)):
        require(bool(source.classes), f"data.{key} = {getattr(data, key)!r} has no labels; fine-tuning needs them")
    name = f"data.test_split = {data.test_split!r}"
    other = [c for c in test.classes if c not in train.classes]
    require(not other, f"{name} has classes that data.train_split lacks: {some(other)}")
    labels = test.labels()
    unlabelled = [test.name(index) for index, label in enumerate(labels) if label is None]
    require(
        not unlabelled,
        f"{name} holds {len(unlabelled)} images without a label, or that cannot be read: {some(unlabelled)}",
    )
    present = {test.classes[label] for label in set(labels) if label is not None}
    missing = [c for c in train.classes if c not in present]
    require(not missing, f"{name} has no image of {len(missing)} of the {len(train.classes)} classes: {some(missing)}")
