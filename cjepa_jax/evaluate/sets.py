"""Features with labels: splits, and draws of few labels.

Shapes: n training and m test images, D features.
"""

from typing import NamedTuple

import jax
import numpy as np

from cjepa_jax import sharding
from cjepa_jax.config import require


class Labelled(NamedTuple):
    """Images of one split."""

    features: np.ndarray  # [n, D] float32
    labels: np.ndarray  # [n] int32

    def take(self, index: np.ndarray) -> "Labelled":
        """Some of them."""
        return Labelled(self.features[index], self.labels[index])


class Splits(NamedTuple):
    """The same encoder's features of the images to learn from and of those to judge by."""

    train: Labelled
    test: Labelled


def check_classes(train: np.ndarray, test: np.ndarray, *, names: tuple[str, str]) -> None:
    """Raises UserError where labels [n], [m] are missing, or of other classes than the other split's.

    names: of the splits, for the message.
    """
    for name, labels in zip(names, (train, test), strict=True):
        missing = int((labels < 0).sum())
        require(missing == 0, f"{name}: {missing} of {len(labels)} images have no label; leave them out of the split")
    for name, found, wanted in ((names[1], test, train), (names[0], train, test)):
        lost = np.setdiff1d(wanted, found)
        few = ", ".join(map(str, lost[:10])) + (", ..." if len(lost) > 10 else "")
        require(
            len(lost) == 0,
            f"{name} lacks {len(lost)} classes that the other split has (labels {few}); give splits with the same ones",
        )


def spread(images: Labelled, mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
    """Features and labels on all devices, each a share, filled up with rows of the label -1."""
    more = -len(images.labels) % mesh.size
    padded = np.pad(images.features, ((0, more), (0, 0))), np.pad(images.labels, (0, more), constant_values=-1)
    features, labels = jax.device_put(padded, sharding.batch(mesh))
    return features, labels


def few(labels: np.ndarray, *, shots: int, draws: int, seed: int) -> list[np.ndarray]:
    """`draws` random choices of `shots` images of each class (all, where there are fewer), as row numbers."""
    rng = np.random.default_rng(seed)
    chosen = []
    for _ in range(draws):
        order = rng.permutation(len(labels))
        chosen.append(np.concatenate([order[labels[order] == c][:shots] for c in np.unique(labels)]))
    return chosen
