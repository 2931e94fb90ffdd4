"""kNN and logistic regression during and after pre-training, on a bounded number of images."""

import json
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from cjepa_jax import sharding
from cjepa_jax.checkpoint import write_whole
from cjepa_jax.config import Eval, require
from cjepa_jax.data import pipeline, sources
from cjepa_jax.evaluate import features, knn, logistic
from cjepa_jax.evaluate.config import KNN_TEMPERATURE
from cjepa_jax.evaluate.sets import Splits, few
from cjepa_jax.step import Method, TrainState


class Probes:
    """Judges the target encoder by images of both splits, a sample that stays the same where there are many."""

    def __init__(self, method: Method, train: pipeline.Reader, mesh: jax.sharding.Mesh):
        """Raises UserError where the test split has no labels."""
        config = method.config
        test_source = sources.load(config.data, config.data.test_split)
        require(
            bool(test_source.classes),
            f"data.test_split = {config.data.test_split!r} has no labels; eval.every=0 goes without",
        )
        self._options, self._mesh = config.eval, mesh
        self._classes = len(train.source.classes)
        self._readers = train, pipeline.Reader(test_source, config.data)
        apply = features.mean_features(config.model, config.data, trained_size=config.data.image_size)
        encoders = {"trained": apply, "untrained": apply, "raw pixels": features.pixels}
        self._whole = jax.jit(lambda params: params, out_shardings=sharding.replicated(mesh))
        self._extractor = features.Extractor(encoders, mesh, batch_size=config.data.batch_size)

    def _splits(self, params: Mapping[str, Any]) -> dict[str, Splits]:
        params = self._whole(params)
        sets = []
        for reader in self._readers:
            images = len(reader.source)
            sample = np.random.default_rng(0).permutation(images)[: self._options.images or images]
            view = pipeline.central_view(reader, crop_fraction=self._options.crop_fraction)
            sets.append(self._extractor.split(params, reader, np.sort(sample).tolist(), view))
        train, test = sets
        return {name: Splits(train[name], test[name]) for name in params}

    def quick(self, state: TrainState) -> dict[str, float]:
        """`eval/knn`, `eval/linear` of the state, and `eval/seconds`, that they took."""
        start = time.perf_counter()
        splits = self._splits({"trained": state.target_params})["trained"]
        found = _all_labels(splits, self._options, self._classes, self._mesh)
        return {f"eval/{name}": value for name, value in found.items()} | {"eval/seconds": time.perf_counter() - start}

    def report(self, state: TrainState, untrained: TrainState, workdir: epath.Path) -> dict[str, float]:
        """Trained, untrained and raw pixels into `evaluation.json`; returns what `quick` does."""
        start = time.perf_counter()
        params = {"trained": state.target_params, "untrained": untrained.target_params, "raw pixels": {}}
        rows = {
            name: table(splits, self._options, classes=self._classes, mesh=self._mesh)
            for name, splits in self._splits(params).items()
        }
        if jax.process_index() == 0:
            write_whole(workdir / "evaluation.json", json.dumps(rows, indent=1) + "\n")
        found = {f"eval/{name}": rows["trained"][name] for name in ("knn", "linear")}
        return found | {"eval/seconds": time.perf_counter() - start}


def table(splits: Splits, options: Eval, *, classes: int, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Accuracies with all labels and, as means over the draws, with few: knn, linear, knn_few, linear_few."""
    chosen = few(splits.train.labels, shots=options.shots, draws=options.draws, seed=0)
    drawn = [_all_labels(splits._replace(train=splits.train.take(i)), options, classes, mesh) for i in chosen]
    return _all_labels(splits, options, classes, mesh) | {
        f"{name}_few": float(np.mean([row[name] for row in drawn])) for name in ("knn", "linear")
    }


def _all_labels(splits: Splits, options: Eval, classes: int, mesh: jax.sharding.Mesh) -> dict[str, float]:
    k = min(options.neighbours, len(splits.train.labels))
    (votes,) = knn.accuracies(*splits, k=k, classes=classes, temperatures=[KNN_TEMPERATURE], mesh=mesh)
    return {"knn": votes, "linear": logistic.accuracy(*splits, classes=classes, mesh=mesh)}


def format_table(rows: dict[str, dict[str, float]], shots: int) -> str:
    """Results of `table`, by name, for the screen."""
    lines = [f"\naccuracy on held-out images, %   all labels: kNN  linear   {shots} a class: kNN  linear"]
    for name, row in rows.items():
        cells = zip(("knn", "linear", "knn_few", "linear_few"), (15, 6, 16, 6), strict=True)
        lines.append(f"{name:>30}" + "".join(f"  {100 * row[key]:{width}.1f}" for key, width in cells))
    return "\n".join(lines)
