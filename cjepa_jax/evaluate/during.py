"""Evaluation of networks that are still in training, by the evaluators of the command."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from cjepa_jax.config import Config
from cjepa_jax.data import pipeline, sources
from cjepa_jax.errors import nearest, require
from cjepa_jax.evaluate import report
from cjepa_jax.evaluate.base import Rows
from cjepa_jax.evaluate.config import Evaluation
from cjepa_jax.evaluate.features import Extractor, Params, mean_features, pixels
from cjepa_jax.evaluate.frozen import (
    AVERAGE,
    PARAMETERS,
    PIXELS,
    TRAINED,
    UNTRAINED,
    Frozen,
    check_labels,
    warn_of_same_images,
)
from cjepa_jax.evaluate.knn import Knn
from cjepa_jax.evaluate.logistic import Logistic
from cjepa_jax.models.vit import parse_size
from cjepa_jax.settings import flatten
from cjepa_jax.train import sharding


def reader_to_learn_from(config: Config, training: pipeline.Reader) -> pipeline.Reader:
    """Returns the reader of the images that evaluators learn from: by default those that are trained on."""
    data = config.eval.data(config.data)
    same = dataclasses.replace(data, test_split=config.data.test_split) == config.data
    return training if same or not config.eval.every else pipeline.Reader(sources.load(data, data.train_split), data)


class DuringTraining:
    """Runs the evaluators that `eval.evaluators` names, on a bounded number of images."""

    def __init__(self, config: Config, train: pipeline.Reader, mesh: jax.sharding.Mesh):
        """Checks settings and images, of which `train` reads those to learn from; computes nothing.

        Raises UserError for an evaluator that is not known or looks at checkpoints only, and for images without
        labels where one needs some.
        """
        options = config.eval
        settings = Evaluation(
            knn=Knn(neighbours=min(options.neighbours, len(train.source)), shots=options.shots, draws=options.draws),
            logistic=Logistic(fraction=0.0, shots=(options.shots,), draws=options.draws),
        )
        known = {name: one for name, one in settings.evaluators.items() if one.in_training}
        for name in options.evaluators:
            what = "judges checkpoints only" if name in settings.evaluators else "is not known"
            require(name in known, f"eval.evaluators: {name!r} {what}; {nearest(name, known)}")
        self._evaluators = [known[name] for name in options.evaluators]
        data = config.eval.data(config.data)
        test = pipeline.Reader(sources.load(data, data.test_split), data)
        self._config, self._data, self._readers = config, data, {"train": train, "test": test}
        if any(one.needs_labels for one in self._evaluators):
            check_labels(data, train.source, test.source)
        warn_of_same_images(data, train.source, test.source)
        depth = parse_size(config.model.size).depth
        layers = min(depth, max((one.deepest for one in self._evaluators), default=1))
        apply = mean_features(config.model, config.data, trained_shape=config.data.image_shape, layers=layers)
        encoders = dict.fromkeys((TRAINED, UNTRAINED, PARAMETERS, AVERAGE), apply) | {PIXELS: pixels}
        self._extractor = Extractor(encoders, mesh, batch_size=config.data.batch_size)
        self._whole = jax.jit(lambda params: params, out_shardings=sharding.replicated(mesh))
        nothing = self._freeze({}, None)
        for one in self._evaluators:
            if one.name != "accuracy":  # whose heads are there in any case
                one.check(nothing)

    def probe(self, networks: Mapping[str, Params]) -> dict[str, float]:
        """Gives metrics of the networks as they are: "eval/...", and "eval/seconds", that they took."""
        start = time.perf_counter()
        frozen = self._freeze(networks, None)
        metrics: dict[str, float] = {}
        for evaluator in self._evaluators:
            metrics |= evaluator.metrics(evaluator.quick().run(frozen, None))
        metrics["seconds"] = time.perf_counter() - start
        return {f"eval/{name}": value for name, value in metrics.items()}

    def report(
        self, networks: Mapping[str, Params], untrained: Params | None, workdir: epath.Path, *, step: int
    ) -> dict[str, float]:
        """Judges the networks in full and beside them, where `untrained` is given, baselines; gives what `probe` does.

        Process 0 writes WORKDIR/evaluation.json and prints the table.
        """
        start = time.perf_counter()
        frozen = self._freeze(networks, untrained)
        results: dict[str, Rows] = {one.name: one.run(frozen, None) for one in self._evaluators}
        seconds = time.perf_counter() - start
        description = report.describe(frozen, flatten(self._config), checkpoint=str(workdir), step=step)
        report.write(workdir / "evaluation.json", frozen, results, description, seconds=seconds)
        if jax.process_index() == 0:
            for one in self._evaluators:
                print(report.table(one, results[one.name]), flush=True)
        metrics: dict[str, float] = {}
        for one in self._evaluators:
            metrics |= one.metrics(results[one.name])
        return {f"eval/{name}": value for name, value in metrics.items()} | {"eval/seconds": seconds}

    def _freeze(self, networks: Mapping[str, Params], untrained: Params | None) -> Frozen:
        params: dict[str, Any] = {}
        heads: dict[str, Any] = {}
        if "head" in networks:
            for name, prefix in ((PARAMETERS, ""), (AVERAGE, "ema_")):
                if f"{prefix}encoder" in networks:
                    params[name], heads[name] = networks[f"{prefix}encoder"], networks[f"{prefix}head"]
        elif networks:
            params[TRAINED] = networks["target_encoder" if "target_encoder" in networks else "encoder"]
        if untrained is not None:
            params |= {UNTRAINED: untrained, PIXELS: {}}
        config = self._config
        return Frozen(
            params={name: self._whole(tree) for name, tree in params.items()},  # jit would sort the names
            extractor=self._extractor,
            model=config.model,
            trained_shape=config.data.image_shape,
            data=self._data,
            crop_fraction=config.eval.crop_fraction,
            images=config.eval.images,
            heads={name: self._whole(tree) for name, tree in heads.items()},
            readers=dict(self._readers),
        )
