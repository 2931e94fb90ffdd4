"""The methods by which a subject is judged: what each reads, and in which order it calls the mathematics."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from cjepa_jax import metrics, plots
from cjepa_jax.config import require
from cjepa_jax.data import pipeline
from cjepa_jax.diagnostics import diagnose
from cjepa_jax.evaluate import collapse, knn, linear, logistic, patchwise
from cjepa_jax.evaluate.results import Rows
from cjepa_jax.evaluate.sets import Labelled, few, spread
from cjepa_jax.evaluate.subject import CHECKPOINT, PIXELS, Subject


class Method(NamedTuple):
    """A way to judge."""

    judge: Callable[[Subject, epath.Path], Rows]  # the path is that of the JSON; a picture goes beside it
    labels: bool  # whether images need any


def _knn(subject: Subject, path: epath.Path) -> Rows:
    options, images = subject.settings.knn, len(subject.train.source)
    require(
        options.neighbours <= images,
        f"knn.neighbours = {options.neighbours} is more than the {images} training images; lower it",
    )
    rows: Rows = {}
    for name, splits in subject.splits(layers=1).items():
        weighted, plain = knn.accuracies(
            *splits,
            k=options.neighbours,
            classes=subject.classes,
            temperatures=[options.temperature, None],
            mesh=subject.mesh,
        )
        rows[name] = {"weighted %": weighted, "plain %": plain}
    return rows


Batches = Iterator[tuple[dict[str, jax.Array], jax.Array]]


def _linear(subject: Subject, path: epath.Path) -> Rows:
    """The member of the grid is chosen on held-out training images.

    Without augmentation it is then trained anew on all of them.
    """
    options, mesh, seed = subject.settings.linear, subject.mesh, subject.settings.seed
    scale = options.batch_size / 256
    rates, decays = linear.grid(tuple(scale * rate for rate in options.learning_rates), options.weight_decays)
    # Small sets have few batches an epoch.
    n = len(subject.train.source)
    longer = max(1, math.ceil(options.min_steps / (options.epochs * max(1, n // options.batch_size))))
    depths = sorted({min(depth, subject.depth) for depth in options.layers})
    keys = {  # representation -> (encoder, how many layers of it)
        f"{name}, {depth}": (name, depth) for name in subject.params for depth in depths if name != PIXELS or depth == 1
    }
    sets = {depth: subject.splits(layers=depth) for depth in depths}
    train = {key: sets[depth][name].train for key, (name, depth) in keys.items()}
    test = {key: sets[depth][name].test for key, (name, depth) in keys.items()}

    def fit(epochs: Iterator[Batches], members: Mapping[str, Any]) -> dict[str, linear.Probe]:
        return linear.fit(epochs, members, decay_every=longer * options.decay_every, classes=subject.classes)

    def cached(images: Mapping[str, Labelled]) -> Iterator[Batches]:
        return _cached(images, epochs=longer * options.epochs, batch_size=options.batch_size, seed=seed, mesh=mesh)

    order = np.random.default_rng(seed).permutation(len(subject.train.source))
    held = np.sort(order[: max(1, round(options.holdout * len(order)))])
    everything = {key: (rates, decays) for key in keys}
    if options.augment:
        rest = np.setdiff1d(order, held)
        view = pipeline.central_view(subject.train, crop_fraction=subject.crop_fraction)
        found = subject.extractor.split(subject.params, subject.train, held.tolist(), view)
        valid = {
            key: found[name]._replace(features=subject.last(name, found[name].features, layers=depth))
            for key, (name, depth) in keys.items()
        }
        probes = fit(_augmented(subject, rest, keys, epochs=longer * options.epochs), everything)
    else:
        rows = len(next(iter(train.values())).labels)  # fewer than there are images, where some cannot be read
        held = held[held < rows]
        rest = np.setdiff1d(np.arange(rows), held)
        valid = {key: images.take(held) for key, images in train.items()}
        probes = fit(cached({key: images.take(rest) for key, images in train.items()}), everything)
    scores = {key: linear.accuracies(probes[key], valid[key], mesh=mesh) for key in keys}
    best = {key: int(score.argmax()) for key, score in scores.items()}
    if options.augment:
        tested = {key: linear.accuracies(probes[key], test[key], mesh=mesh)[best[key]] for key in keys}
    else:
        probes = fit(cached(train), {key: (rates[[i]], decays[[i]]) for key, i in best.items()})
        tested = {key: linear.accuracies(probes[key], test[key], mesh=mesh)[0] for key in keys}

    if 1 in depths and subject.data.image_size == subject.networks.image_size:  # else positions were interpolated
        key = f"{CHECKPOINT}, 1"
        head = linear.fold(probes[key], best[key] if options.augment else 0)
        subject.save_with_head(path.with_suffix(""), head)

    results: Rows = {}
    for name in subject.params:
        mine = [key for key in keys if keys[key][0] == name]
        chosen = max(mine, key=lambda key: scores[key].max())
        results[name] = {
            "linear %": float(tested[chosen]),
            "layers": keys[chosen][1],
            "learning rate": float(rates[best[chosen]]),
            "weight decay": float(decays[best[chosen]]),
            "held-out %": float(scores[chosen].max()),
            "all": {
                f"last {keys[key][1]} layers": {
                    "test": float(tested[key]),
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
    return results


def _cached(
    images: Mapping[str, Labelled], *, epochs: int, batch_size: int, seed: int, mesh: jax.sharding.Mesh
) -> Iterator[Batches]:
    """Epochs of shuffled batches of features; what is left over is in another epoch's batches."""
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
    subject: Subject, indices: np.ndarray, keys: Mapping[str, tuple[str, int]], *, epochs: int
) -> Iterator[Batches]:
    """Epochs of shuffled batches of the features of random views."""
    options, seed = subject.settings.linear, subject.settings.seed
    extractor = subject.make_extractor(options.batch_size)
    full = len(indices) // extractor.size * extractor.size or len(indices)

    def batches(epoch: int) -> Batches:
        view = pipeline.random_view(subject.train, seed=(seed, epoch))
        order = np.random.default_rng((seed, epoch)).permutation(indices)[:full]
        for found, labels in extractor.batches(subject.params, subject.train, order.tolist(), view):
            last = {key: subject.last(name, found[name], layers=depth) for key, (name, depth) in keys.items()}
            yield last, labels

    for epoch in range(epochs):
        yield batches(epoch)


def _lowshot(subject: Subject, path: epath.Path) -> Rows:
    """Logistic regression on few labels, several draws; the kNN with them, too."""
    options = subject.settings.lowshot
    labels = next(iter(subject.splits(layers=1).values())).train.labels
    a_class = max(1, round(options.fraction * len(labels) / subject.classes))
    ways = {f"{100 * options.fraction:g} % of labels": a_class} | {f"{shots} a class": shots for shots in options.shots}
    rows: Rows = {name: {} for name in subject.params}
    for way, shots in ways.items():
        chosen = few(labels, shots=shots, draws=options.draws, seed=subject.settings.seed)
        for name, (train, test) in subject.splits(layers=1).items():
            found = [logistic.accuracy(train.take(i), test, classes=subject.classes, mesh=subject.mesh) for i in chosen]
            std = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
            rows[name][f"{way} %"] = {"mean": float(np.mean(found)), "std": std, "draws": found}
    return rows


def _collapse(subject: Subject, path: epath.Path) -> Rows:
    """Statistics of central crops, and of random views of some of these images; labels play no part."""
    options, reader, seed = subject.settings.collapse, subject.train, subject.settings.seed
    images = len(reader.source)
    require(
        options.objects <= images,
        f"collapse.objects = {options.objects} is more than the {images} training images; lower it",
    )
    order = np.random.default_rng(seed).permutation(images)
    view = pipeline.central_view(reader, crop_fraction=subject.crop_fraction)
    central = subject.extractor.split(subject.params, reader, np.sort(order[: options.images]).tolist(), view)
    objects = np.sort(order[: options.objects]).tolist()
    drawn = [
        subject.extractor.split(subject.params, reader, objects, pipeline.random_view(reader, seed=(seed, number)))
        for number in range(options.views)
    ]
    spectra = {}
    rows: Rows = {}
    for name in subject.params:
        features = jnp.asarray(subject.last(name, central[name].features, layers=1))
        views = jnp.stack([subject.last(name, found[name].features, layers=1) for found in drawn], axis=1)
        spectra[name] = jax.device_get(collapse.spectrum(features))
        rows[name] = {key.removeprefix("rep/"): float(value) for key, value in diagnose(features).items()}
        rows[name] |= {
            "alignment": float(collapse.alignment(views)),
            "uniformity": float(collapse.uniformity(features)),
            "LiDAR": float(collapse.lidar(views)),
            "spectrum": spectra[name].tolist(),
        }
    rows[CHECKPOINT]["training"] = collapse.first_alarms(metrics.read(subject.workdir))
    path.parent.mkdir(exist_ok=True)
    plots.spectra(spectra, path.with_suffix(".png"))
    return rows


METHODS = {
    "knn": Method(_knn, labels=True),
    "linear": Method(_linear, labels=True),
    "lowshot": Method(_lowshot, labels=True),
    "collapse": Method(_collapse, labels=False),
    "attention": Method(patchwise.attention, labels=False),
    "davis": Method(patchwise.davis, labels=False),
}
