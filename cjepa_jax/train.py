"""Pre-training: its data, method, state and probes; the loop is in loop.py."""

import json
import sys
from typing import Any

import grain
import jax
from etils import epath

from cjepa_jax import checkpoint, loop, plots, pretrained, sharding
from cjepa_jax.config import Config
from cjepa_jax.data import pipeline, sources
from cjepa_jax.diagnostics import diagnose
from cjepa_jax.evaluate.probes import Probes, format_table
from cjepa_jax.masking import sample_masks
from cjepa_jax.parsing import flatten
from cjepa_jax.step import Method, TrainState, build


def train(config: Config, workdir: epath.Path, init: epath.Path | None = None) -> TrainState:
    """Trains to the end, or from where the workdir stands, or until SIGTERM or Ctrl-C; returns the last state.

    `init` is a checkpoint whose encoders and predictor a new run starts from, instead of random ones.

    Raises UserError for settings that do not fit the data, the devices or the
    workdir, before anything is compiled or written; DivergedError as `loop.run` does.
    """
    state: TrainState = loop.run(Pretraining(config, workdir, init), workdir)
    if jax.process_index() == 0 and (workdir / "evaluation.json").exists():
        print(format_table(json.loads((workdir / "evaluation.json").read_text()), config.eval.shots))
    return state


class Pretraining:
    """C-JEPA, as `loop.Training`."""

    panels = plots.PRETRAINING

    def __init__(self, config: Config, workdir: epath.Path, init: epath.Path | None):
        """Checks everything."""
        data = config.data
        source = sources.load(data, data.train_split)
        self.seed, self.log, self.checkpoint = config.seed, config.log, config.checkpoint
        self.steps = loop.count_steps(config.optim, images=len(source), batch_size=data.batch_size)
        self._method = Method(config, self.steps)
        self._workdir = workdir
        self.meta: dict[str, Any] = {"config": flatten(config), "fingerprint": source.fingerprint}
        checkpoint.check_workdir(workdir, self.meta)
        self.reader = pipeline.Reader(source, data)
        self.probe_every = config.eval.every if source.classes else 0
        mesh = sharding.make_mesh(config.mesh)
        if self.probe_every:
            self._probes = Probes(self._method, self.reader, mesh)
        self.program = build(self._method, mesh)
        self._networks = pretrained.load(init, ("encoder", "predictor", "target_encoder")).params if init else {}
        state = self.program.state
        for tower, params in self._networks.items():
            wanted = state.target_params if tower == "target_encoder" else state.params[tower]
            pretrained.check(params, wanted, f"--init {init}: its {tower}")
        loop.set_precision(config.model.dtype)
        self._diagnose = jax.jit(diagnose)

    def fresh(self, rng: jax.Array) -> TrainState:
        """With the networks of `init`, where one was given."""
        state = self.program.init(rng)
        networks, self._networks = self._networks, {}
        if networks:
            target = networks.pop("target_encoder")
            state = state.replace(params=state.params | networks, target_params=target)
            state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, self.program.state))
        return state

    def batches(self, start: int, rows: list[int]) -> grain.DatasetIterator:
        """Images."""
        return pipeline.train_batches(self.reader, seed=self.seed, start=start, rows=rows)

    def begin(self, state: TrainState, start: int) -> None:
        """Says what is trained on what, and draws masks."""
        model, classes = self._method.config.model, len(self.reader.source.classes)
        network = f"{model.size}/{model.patch_size}"
        print(loop.headline(self, state, start, network=network, classes=classes), file=sys.stderr, flush=True)
        _draw_masks(self.reader, self._method, self._workdir)

    def observe(self, seen: jax.Array) -> dict[str, jax.Array]:
        """Of features [B, D]."""
        return self._diagnose(seen)

    def probe(self, state: TrainState) -> dict[str, float]:
        """Quick ones."""
        return self._probes.quick(state)

    def report(self, state: TrainState, rng: jax.Array) -> dict[str, float]:
        """The whole table."""
        return self._probes.report(state, self.program.init(rng), self._workdir)


def _draw_masks(reader: pipeline.Reader, method: Method, workdir: epath.Path) -> None:
    config = method.config
    first = next(pipeline.ordered_batches(reader, size=6, crop_fraction=1.0))[0]
    sample = jax.jit(lambda key: sample_masks(key, config.mask, grid=config.grid, batch=len(first)))
    plots.masks(first, jax.device_get(sample(jax.random.key(config.seed))), workdir / "masks.png", grid=config.grid)
