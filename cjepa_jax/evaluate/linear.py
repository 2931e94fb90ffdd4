"""Linear probe: a grid of linear classifiers on frozen features; their mathematics is in linear_grid.py."""

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.data import pipeline
from cjepa_jax.errors import require
from cjepa_jax.evaluate import linear_grid, report
from cjepa_jax.evaluate.base import ERROR, Evaluator, Rows, binomial_error
from cjepa_jax.evaluate.features import Extractor
from cjepa_jax.evaluate.frozen import PIXELS, Frozen
from cjepa_jax.evaluate.sets import Labelled, last, spread
from cjepa_jax.models.vit import parse_size
from cjepa_jax.settings import setting

_EXPORTED = " (exported)"
Batches = Iterator[tuple[dict[str, jax.Array], jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Evaluator):
    """Trains linear classifiers behind a batch norm without affine, by SGD with Nesterov momentum 0.9.

    Epochs, momentum, decay and batch are VISSL's for ImageNet, which I-JEPA says it follows on other sets.
    """

    layers: tuple[int, ...] = setting(
        (1, 4), "Last blocks whose means are concatenated; each number is a representation to try.", within="[1, 256]"
    )
    learning_rates: tuple[float, ...] = setting(
        (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        "Learning rates of the grid, for 256 images; they scale with batch_size.",
        within="[0, 1000]",
    )
    weight_decays: tuple[float, ...] = setting((0.0, 5e-4, 5e-3), "Weight decays of the grid.", within="[0, 1000]")
    epochs: int = setting(28, "Length of the training, in epochs.", within="[1, 1e5]")
    min_steps: int = setting(
        3000, "Least number of steps; epochs and decay_every are multiplied until it is reached.", within="[1, 1e9]"
    )
    decay_every: int = setting(8, "Epochs after which the learning rate is divided by ten.", within="[1, 1e5]")
    batch_size: int = setting(256, "Images of a step.", within="[2, 1048576]")
    holdout: float = setting(0.1, "Share of the training images that choose the member of the grid.", within="(0, 1)")
    augment: bool = setting(
        False, "Features of new random views each epoch, instead of those of central crops, computed once."
    )

    name: ClassVar[str] = "linear"
    numbers: ClassVar[tuple[str, ...]] = ("layers", "learning rate", "weight decay")

    def __post_init__(self):
        for key in ("layers", "learning_rates", "weight_decays"):
            require(len(getattr(self, key)) > 0, f"linear.{key} is empty")

    @property
    def deepest(self) -> int:
        """Says how many of the encoder's last blocks are read."""
        return max(self.layers)

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Chooses the member of the grid on held-out training images, and gives its accuracy on the test images.

        Without augmentation the member is then trained anew on all training images. With a `stem`, the encoder is
        left as a checkpoint with the classifier of its last layer as a head, STEM.linear.
        """
        frozen.check_labels()
        mesh, seed = frozen.mesh, frozen.seed
        scale = self.batch_size / 256
        rates, decays = linear_grid.grid(tuple(scale * rate for rate in self.learning_rates), self.weight_decays)
        depths = sorted({min(depth, parse_size(frozen.model.size).depth) for depth in self.layers})
        keys = {  # representation -> (encoder, how many layers of it)
            f"{name}, {depth}": (name, depth)
            for name in frozen.params
            for depth in depths
            if name != PIXELS or depth == depths[0]  # pixels have one layer, whatever is asked for
        }
        sets = {depth: frozen.splits(layers=depth) for depth in depths}
        train = {key: sets[depth][name].train for key, (name, depth) in keys.items()}
        test = {key: sets[depth][name].test for key, (name, depth) in keys.items()}
        # Images without augmentation are those whose features are there: not all, if `eval.images` is less.
        n = len(frozen.train.source) if self.augment else len(next(iter(train.values())).labels)
        # Small sets have few batches an epoch.
        longer = max(1, math.ceil(self.min_steps / (self.epochs * max(1, n // self.batch_size))))
        epochs = longer * self.epochs

        def fit(batches: Iterator[Batches], members: Mapping[str, Any], what: str) -> dict[str, linear_grid.Probe]:
            every = longer * self.decay_every
            counted = frozen.progress(what, batches, total=epochs, unit="epochs")
            return linear_grid.fit(counted, members, decay_every=every, classes=frozen.classes)

        def cached(images: Mapping[str, Labelled]) -> Iterator[Batches]:
            return _cached(images, epochs=epochs, batch_size=self.batch_size, seed=seed, mesh=mesh)

        order = np.random.default_rng(seed).permutation(n)
        held = np.sort(order[: max(1, round(self.holdout * len(order)))])
        everything = {key: (rates, decays) for key in keys}
        if self.augment:
            rest = np.setdiff1d(order, held)
            view = pipeline.central_view(frozen.train, crop_fraction=frozen.crop_fraction)
            with frozen.progress("features of held-out images", total=len(held), unit="images") as bar:
                found = frozen.extractor.split(frozen.params, frozen.train, held.tolist(), view, seen=bar.update)
            valid = {key: found[name].last(depth) for key, (name, depth) in keys.items()}
            batches = _augmented(frozen, rest, keys, epochs=epochs, batch_size=self.batch_size)
            probes = fit(batches, everything, f"a grid of {len(rates)} linear probes")
        else:
            rest = np.setdiff1d(order, held)
            valid = {key: images.take(held) for key, images in train.items()}
            some = {key: images.take(rest) for key, images in train.items()}
            probes = fit(cached(some), everything, f"a grid of {len(rates)} linear probes")
        scores = {key: linear_grid.accuracies(probes[key], valid[key], mesh=mesh) for key in keys}
        best = {key: int(score.argmax()) for key, score in scores.items()}
        if self.augment:
            tested = {key: linear_grid.accuracies(probes[key], test[key], mesh=mesh)[best[key]] for key in keys}
        else:
            members = {key: (rates[[i]], decays[[i]]) for key, i in best.items()}
            probes = fit(cached(train), members, "the chosen probes, on all images")
            tested = {key: linear_grid.accuracies(probes[key], test[key], mesh=mesh)[0] for key in keys}

        images = len(next(iter(test.values())).labels)
        results: Rows = {}
        for name in frozen.params:
            mine = [key for key in keys if keys[key][0] == name]
            chosen = max(mine, key=lambda key: scores[key].max())
            results[name] = {
                "linear": float(tested[chosen]),
                "layers": keys[chosen][1],
                "learning rate": float(rates[best[chosen]]),
                "weight decay": float(decays[best[chosen]]),
                "held-out": float(scores[chosen].max()),
                ERROR: {"linear": binomial_error(float(tested[chosen]), images)},
                "all": {
                    f"last {keys[key][1]} layers": {
                        "test": float(tested[key]),
                        ERROR: binomial_error(float(tested[key]), images),
                        "learning rate": float(rates[best[key]]),
                        "weight decay": float(decays[best[key]]),
                        "held-out accuracy of the grid": [
                            [float(rate), float(decay), float(score)]
                            for rate, decay, score in zip(rates, decays, scores[key], strict=True)
                        ],
                    }
                    for key in mine
                },
            }
        if stem is not None and 1 in depths and frozen.data.image_shape == frozen.trained_shape:
            key, path = f"{frozen.judged}, 1", stem.with_name(f"{stem.name}.linear")
            head = linear_grid.fold(probes[key], best[key] if self.augment else 0)
            results[frozen.judged]["exported"] = str(path)
            exported = {name.removeprefix("* "): row for name, row in self.shown(results).items() if _EXPORTED in name}
            _save_with_head(frozen, path, head, exported)
        return results

    def shown(self, rows: Rows) -> Rows:
        """Returns a row a representation, and says which one was chosen and which one's classifier is exported."""
        found: Rows = {}
        for name, row in rows.items():
            for layers, probe in row["all"].items():
                depth = int(layers.split()[1])
                of = "" if name == PIXELS else ", last layer" if depth == 1 else f", last {depth} layers"
                marks = _EXPORTED * ("exported" in row and depth == 1)
                found[f"{'* ' * (depth == row['layers'] and len(row['all']) > 1)}{name}{of}{marks}"] = {
                    "linear": probe["test"],
                    "learning rate": probe["learning rate"],
                    "weight decay": probe["weight decay"],
                    "held-out": max(score for *_, score in probe["held-out accuracy of the grid"]),
                    ERROR: {"linear": probe[ERROR]},
                }
        return found

    def notes(self, rows: Rows) -> list[str]:
        """Says what the marks mean, and where the exported classifier is."""
        judged = next(iter(rows.values()))
        chosen = ["* is the representation that the held-out training images choose"] if len(judged["all"]) > 1 else []
        return chosen + (
            [f"exported with its head, the probe of the last layer: {judged['exported']}"]
            if "exported" in judged
            else ["no probe is exported: linear.layers lacks 1, or images have another size than in training"]
        )

    def metrics(self, rows: Rows) -> dict[str, float]:
        """Shows the accuracy of the judged encoder."""
        return {"linear": next(iter(rows.values()))["linear"]}


def _save_with_head(frozen: Frozen, path: epath.Path, head: dict[str, np.ndarray], row: Rows) -> None:
    """Writes the encoder with a classifier on its features as a checkpoint, in the place of one that may be there.

    One that has been judged is moved aside, to PATH.before. The row of the table that is about this classifier goes
    with the new one, as its evaluation.json.
    """
    assert frozen.origin
    if (path / "evaluation").exists():
        aside = path.with_name(f"{path.name}.before")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}.before")
        path.rename(aside)
        print(f"{path}, which has been judged, is now {aside}", file=sys.stderr, flush=True)
    elif path.exists():
        path.rmtree()
    networks, encoder = frozen.origin.networks, frozen.origin.encoder
    params = {encoder: networks.params[encoder], "head": head}
    networks = networks._replace(params=params, classes=frozen.train.source.classes, predictor=None)
    pretrained.save(path, networks, crop_fraction=frozen.crop_fraction)
    about = {"method": "linear", "checkpoint": str(frozen.origin.workdir), "step": networks.step, "encoder": encoder}
    report.write(path / "evaluation.json", frozen, {"linear": row}, report.describe(frozen, {}, **about), seconds=0.0)


def _cached(
    images: Mapping[str, Labelled], *, epochs: int, batch_size: int, seed: int, mesh: jax.sharding.Mesh
) -> Iterator[Batches]:
    """Yields epochs of shuffled batches of features; what is left over is in another epoch's batches."""
    n = len(next(iter(images.values())).labels)
    rng = np.random.default_rng(seed)

    def batches(order: np.ndarray) -> Batches:
        for start in range(0, max(1, n // batch_size) * batch_size, batch_size):
            rows = order[start : start + batch_size]
            batch = {key: spread(x.take(rows), mesh) for key, x in images.items()}
            yield {key: features for key, (features, _) in batch.items()}, next(iter(batch.values()))[1]

    for _ in range(epochs):
        yield batches(rng.permutation(n))


def _augmented(
    frozen: Frozen, indices: np.ndarray, keys: Mapping[str, tuple[str, int]], *, epochs: int, batch_size: int
) -> Iterator[Batches]:
    """Yields epochs of shuffled batches of the features of random views."""
    extractor = Extractor(frozen.extractor.encoders, frozen.mesh, batch_size=batch_size)
    full = len(indices) // extractor.size * extractor.size or len(indices)

    def batches(epoch: int) -> Batches:
        view = pipeline.random_view(frozen.train, seed=(frozen.seed, epoch))
        order = np.random.default_rng((frozen.seed, epoch)).permutation(indices)[:full]
        for found, labels in extractor.batches(frozen.params, frozen.train, order.tolist(), view):
            yield {key: last(found[name], depth) for key, (name, depth) in keys.items()}, labels

    for epoch in range(epochs):
        yield batches(epoch)
