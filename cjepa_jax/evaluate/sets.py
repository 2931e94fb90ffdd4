"""Features with labels: the images of a split, draws of few labels, and checks.

Shapes: n images, L layers, D features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cjepa_jax.errors import require
from cjepa_jax.train import sharding


class Labelled(NamedTuple):
    """The images of one split: an encoder's features [n, L, D], or [n, D] where they are laid flat, and labels."""

    features: Float[np.ndarray, "n *L D"]
    labels: Int[np.ndarray, " n"]

    def take(self, rows: Int[np.ndarray, " m"]) -> "Labelled":
        """Returns some of the images, by row number."""
        return Labelled(self.features[rows], self.labels[rows])

    def last(self, layers: int) -> "Labelled":
        """Lays the last layers of features [n, L, D] side by side: [n, layers * D]."""
        return Labelled(last(self.features, layers), self.labels)


class Splits(NamedTuple):
    """One encoder's features of the images to learn from and of those to judge by."""

    train: Labelled
    test: Labelled


def last(features: Any, layers: int) -> Any:
    """Lays the last layers of features [n, L, D] side by side: [n, layers * D], fewer where there are fewer."""
    return features[:, -layers:].reshape(len(features), -1)


def unit(features: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """Scales rows to length 1; a row of zeros stays."""
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def check_classes(
    train: Int[np.ndarray, " n"], test: Int[np.ndarray, " m"], *, names: tuple[str, str], classes: Sequence[str]
) -> None:
    """Raises UserError where a label is missing, or where the images to learn from lack a class of the others.

    `names` are those of the two splits and `classes` those of the labels, for the message.
    """
    for name, labels in zip(names, (train, test), strict=True):
        missing = int((labels < 0).sum())
        require(missing == 0, f"{name}: {missing} of {len(labels)} images have no label; leave them out of the split")
    lost = lacking(train, test, classes)
    require(not lost, f"{names[0]} lacks {lost} that {names[1]} has; give splits with the same ones")


def lacking(found: Int[np.ndarray, " n"], wanted: Int[np.ndarray, " m"], classes: Sequence[str]) -> str:
    """Names the classes of `wanted` labels that are not among those that were `found`; "" where all are."""
    lost = [classes[label] for label in np.setdiff1d(wanted, found)]
    few = ", ".join(lost[:10]) + (", ..." if len(lost) > 10 else "")
    return f"{len(lost)} class{'es' if len(lost) > 1 else ''} ({few})" if lost else ""


def spread(images: Labelled, mesh: jax.sharding.Mesh) -> tuple[Float[Array, "m D"], Int[Array, " m"]]:
    """Shares features [n, D] and labels among all devices; rows with the label -1 fill up the last share."""
    more = -len(images.labels) % mesh.size
    padded = np.pad(images.features, ((0, more), (0, 0))), np.pad(images.labels, (0, more), constant_values=-1)
    features, labels = (sharding.put(x, sharding.batch(mesh)) for x in padded)
    return features, labels


def few(labels: Int[np.ndarray, " n"], *, shots: int, draws: int, seed: int) -> list[Int[np.ndarray, " m"]]:
    """Draws `shots` images of each class at random, or all where there are fewer, several times; gives row numbers."""
    rng = np.random.default_rng(seed)
    chosen = []
    for _ in range(draws):
        order = rng.permutation(len(labels))
        chosen.append(np.concatenate([order[labels[order] == c][:shots] for c in np.unique(labels)]))
    return chosen
