"""kNN and linear probes on frozen features, by scikit-learn.

Shapes: n training and m test images, D features.
"""

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

KNN_TEMPERATURE = 0.07  # of DINO's weighted kNN


class Labelled(NamedTuple):
    """The images of one split."""

    features: np.ndarray  # [n, D]
    labels: np.ndarray  # [n]


def knn(train: Labelled, test: Labelled, *, neighbours: int) -> float:
    """Accuracy of the neighbours' votes, weighted by exp(cosine / 0.07)."""
    classifier = KNeighborsClassifier(
        min(neighbours, len(train.labels)),
        metric="cosine",
        weights=lambda distance: np.exp(-distance / KNN_TEMPERATURE),
    )
    return float(classifier.fit(*train).score(*test))


def linear(train: Labelled, test: Labelled) -> float:
    """Accuracy of logistic regression on standardised features."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(classifier.fit(*train).score(*test))


def few(train: Labelled, *, shots: int, draws: int, seed: int = 0) -> list[Labelled]:
    """`draws` random subsets of the training images with `shots` of each class (all, where there are fewer)."""
    rng = np.random.default_rng(seed)
    subsets = []
    for _ in range(draws):
        order = rng.permutation(len(train.labels))
        chosen = np.concatenate([order[train.labels[order] == c][:shots] for c in np.unique(train.labels)])
        subsets.append(Labelled(train.features[chosen], train.labels[chosen]))
    return subsets


def table(train: Labelled, test: Labelled, *, neighbours: int, shots: int, draws: int) -> dict[str, float]:
    """Accuracies with all labels and, as means over the draws, with few: knn, linear, knn_few, linear_few."""
    subsets = few(train, shots=shots, draws=draws)
    return {
        "knn": knn(train, test, neighbours=neighbours),
        "linear": linear(train, test),
        "knn_few": float(np.mean([knn(subset, test, neighbours=neighbours) for subset in subsets])),
        "linear_few": float(np.mean([linear(subset, test) for subset in subsets])),
    }


def format_table(rows: dict[str, dict[str, float]], shots: int) -> str:
    """Results of `table`, by name, for the screen."""
    lines = [f"\naccuracy on held-out images, %   all labels: kNN  linear   {shots} a class: kNN  linear"]
    for name, row in rows.items():
        cells = zip(("knn", "linear", "knn_few", "linear_few"), (15, 6, 16, 6), strict=True)
        lines.append(f"{name:>30}" + "".join(f"  {100 * row[key]:{width}.1f}" for key, width in cells))
    return "\n".join(lines)
