"""Pre-training: its data, method, state and probes; the loop is in loop.py."""

import json
import sys
from typing import Any

import grain
import jax
import numpy as np
from etils import epath

from cjepa_jax import checkpoint, loop, plots, pretrained, sharding
from cjepa_jax.config import Config, require
from cjepa_jax.data import pipeline, sources
from cjepa_jax.diagnostics import diagnose
from cjepa_jax.evaluate import probe
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
        print(probe.format_table(json.loads((workdir / "evaluation.json").read_text()), config.eval.shots))
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
        if self.probe_every:
            self._probes = Probes(self._method, self.reader)
        self.program = build(self._method, sharding.make_mesh(config.mesh))
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


class Probes:
    """kNN and linear probes on the images of both splits, with the target encoder's features."""

    def __init__(self, method: Method, train: pipeline.Reader):
        config = method.config
        test_source = sources.load(config.data, config.data.test_split)
        require(
            bool(test_source.classes),
            f"data.test_split = {config.data.test_split!r} has no labels; eval.every=0 goes without",
        )
        self._options = config.eval
        self._readers = train, pipeline.Reader(test_source, config.data)
        self._features = jax.jit(method.features)

    def _labelled(self, encoders: dict[str, Any]) -> dict[str, list[probe.Labelled]]:
        """Name -> the training and the test images as features of its encoder, or as pixels where that is None."""
        sets: dict[str, list[probe.Labelled]] = {name: [] for name in encoders}
        for reader in self._readers:
            features: dict[str, list[np.ndarray]] = {name: [] for name in encoders}
            labels: list[int | None] = []
            size = reader.data.batch_size
            for images, batch_labels in pipeline.ordered_batches(
                reader, size=size, crop_fraction=self._options.crop_fraction
            ):
                padded = np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), np.uint8)])
                for name, params in encoders.items():
                    found = _thumbnails(images) if params is None else jax.device_get(self._features(params, padded))
                    features[name].append(found[: len(images)])
                labels.extend(batch_labels)
            for name in encoders:
                sets[name].append(probe.Labelled(np.concatenate(features[name]), np.array(labels)))
        return sets

    def quick(self, state: TrainState) -> dict[str, float]:
        """`eval/knn` and `eval/linear` of the state."""
        train, test = self._labelled({"trained": state.target_params})["trained"]
        return {
            "eval/knn": probe.knn(train, test, neighbours=self._options.neighbours),
            "eval/linear": probe.linear(train, test),
        }

    def report(self, state: TrainState, untrained: TrainState, workdir: epath.Path) -> dict[str, float]:
        """Trained, untrained and raw pixels into `evaluation.json`; returns what `quick` does."""
        encoders = {"trained": state.target_params, "untrained": untrained.target_params, "raw pixels": None}
        options = {key: getattr(self._options, key) for key in ("neighbours", "shots", "draws")}
        rows = {name: probe.table(*sets, **options) for name, sets in self._labelled(encoders).items()}
        if jax.process_index() == 0:
            (workdir / "evaluation.json").write_text(json.dumps(rows, indent=1) + "\n")
        return {f"eval/{name}": rows["trained"][name] for name in ("knn", "linear")}


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """[n, H, W, C] uint8 -> pixels, every k-th where the sides are longer than 32, as features [n, D] in [0, 1]."""
    stride = max(1, images.shape[1] // 32)
    return images[:, stride // 2 :: stride, stride // 2 :: stride].reshape(len(images), -1) / 255


def _draw_masks(reader: pipeline.Reader, method: Method, workdir: epath.Path) -> None:
    config = method.config
    first = next(pipeline.ordered_batches(reader, size=6, crop_fraction=1.0))[0]
    sample = jax.jit(lambda key: sample_masks(key, config.mask, grid=config.grid, batch=len(first)))
    plots.masks(first, jax.device_get(sample(jax.random.key(config.seed))), workdir / "masks.png", grid=config.grid)
