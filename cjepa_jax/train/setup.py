"""All that a run needs, checked before anything is compiled or written."""

import dataclasses
import hashlib
import sys
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree

from cjepa_jax import pretrained
from cjepa_jax.config import Config, Data
from cjepa_jax.data import pipeline, sources
from cjepa_jax.errors import require
from cjepa_jax.evaluate.during import DuringTraining
from cjepa_jax.methods import METHODS, Method
from cjepa_jax.settings import flatten
from cjepa_jax.train import checkpoint, sharding, step


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
    networks: dict[str, Any]  # what a new run starts from instead of random parameters; emptied when it has

    def init(self, rng: jax.Array) -> step.TrainState:
        """Makes the state that a new run starts from."""
        state = self.program.init(rng)
        if self.networks:
            params, averages = self.method.start_from(self.networks)
            self.networks = {}
            state = state.replace(params={**state.params, **params}, averages={**state.averages, **averages})
            state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, self.program.state))
        return state


def set_up(
    config: Config, workdir: epath.Path, init: epath.Path | None, source: sources.Source | None = None
) -> Training:
    """Checks settings, data, devices, workdir and the checkpoint `init` against one another.

    source: the images to train on, where they are not those that `config.data` names.
    Raises UserError, before anything is compiled or written.
    """
    data, kind = config.data, METHODS[config.method]
    source = source or sources.load(data, data.train_split)
    if kind.needs_labels:
        _check_labels(data, source, sources.load(data, data.test_split))
    names = kind.networks_of_init(config)
    loaded = pretrained.load(init, names, flag="--init") if init else None
    config = kind.resolve(config, str(init), loaded)
    data = config.data
    steps = count_steps(config, images=len(source))
    method = kind(config, classes=len(source.classes))
    start: dict[str, Any] = {}
    if kind.needs_labels:
        start = {"classes": list(source.classes)}
        start |= {"init.step": loaded.step, "init.digest": _digest(loaded.params)} if loaded else {}
    config, notes = checkpoint.check_workdir(workdir, config, start)
    notes += _doubts(config, source)
    if jax.process_index() == 0:
        for note in notes:
            print(note, file=sys.stderr, flush=True)
    method = dataclasses.replace(method, config=config)
    reader = pipeline.Reader(source, data)
    mesh = sharding.make_mesh(config.mesh)
    program = step.build(method, steps, mesh)
    evaluation = DuringTraining(config, reader, mesh) if config.eval.every and len(source.classes) > 1 else None
    networks = loaded.params if loaded else {}
    if networks:
        params, averages = method.start_from(networks)
        for found, wanted in ((params, program.state.params), (averages, program.state.averages)):
            for name, tree in found.items():
                pretrained.check(tree, wanted[name], f"--init {init}: its {name}")
    return Training(
        config=config,
        method=program.method,
        program=program,
        steps=steps,
        reader=reader,
        evaluation=evaluation,
        meta={
            "config": flatten(config) | start | ({"init.path": str(init)} if init else {}),
            "fingerprint": source.fingerprint,
        },
        networks=networks,
    )


def _doubts(config: Config, source: sources.Source) -> list[str]:
    """Says what makes the results of a run mean less than they seem to."""
    notes, batch = [], config.data.batch_size
    if len(source) < batch:
        notes.append(
            f"warning: a batch of {batch} images holds each of the {len(source)} training images more than once, which "
            f"statistics over the batch are not made for; lower data.batch_size"
        )
    if config.eval.every and len(source.classes) < 2:
        what = f"are all of one class, {source.classes[0]!r}" if source.classes else "have no labels"
        notes.append(f"warning: eval.every = {config.eval.every} evaluates nothing, because the training images {what}")
    return notes


def count_steps(config: Config, *, images: int) -> int:
    """Gives the number of steps of a run on so many images. Raises UserError for none, or too many."""
    steps = round(config.optim.epochs * images / config.data.batch_size)
    require(steps >= 1, f"optim.epochs = {config.optim.epochs} of {images} images are less than one batch")
    require(steps < 2**31, f"optim.epochs = {config.optim.epochs} of {images} images are {steps} steps; lower it")
    return steps


def _digest(params: PyTree) -> str:
    """Tells these parameters from any others."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]


def _check_labels(data: Data, train: sources.Source, test: sources.Source) -> None:
    """Raises UserError where accuracy on `test` would mean nothing for a classifier that `train` has taught."""
    for key, source in (("train_split", train), ("test_split", test)):
        require(bool(source.classes), f"data.{key} = {getattr(data, key)!r} has no labels; fine-tuning needs them")
    name = f"data.test_split = {data.test_split!r}"
    other = [c for c in test.classes if c not in train.classes]
    require(not other, f"{name} has classes that data.train_split lacks: {_some(other)}")
    labels = test.labels()
    unlabelled = [test.name(index) for index, label in enumerate(labels) if label is None]
    require(not unlabelled, f"{name} holds {len(unlabelled)} images without a label: {_some(unlabelled)}")
    present = {test.classes[label] for label in set(labels) if label is not None}
    missing = [c for c in train.classes if c not in present]
    require(not missing, f"{name} has no image of {len(missing)} of the {len(train.classes)} classes: {_some(missing)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
