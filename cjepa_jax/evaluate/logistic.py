"""Multinomial logistic regression on standardised features, by L-BFGS, with all labels and with few.

Shapes: n training and m test images, D features, C classes.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jaxtyping import PyTree

from cjepa_jax.evaluate.base import ERROR, Evaluator, Rows, binomial_error, over_draws
from cjepa_jax.evaluate.frozen import Frozen
from cjepa_jax.evaluate.sets import Labelled, few, spread
from cjepa_jax.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logistic(Evaluator):
    """Fits a logistic regression on all labels and on few."""

    fraction: float = setting(
        0.01, "Share of the labels, in equal shares of the classes, at least one each; 0: none.", within="[0, 1]"
    )
    shots: tuple[int, ...] = setting((1, 5, 10), "Labels of a class.", within="[1, 1e6]")
    draws: int = setting(5, "Draws of the few labels.", within="[1, 1000]")

    name: ClassVar[str] = "logistic"

    def quick(self) -> "Logistic":
        """Gives the same without the draws of few labels."""
        return dataclasses.replace(self, fraction=0.0, shots=())

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Gives the accuracy with all labels, and those of draws of few."""
        rows: Rows = {}
        splits = frozen.splits()
        fits = len(splits) * (1 + self.draws * (len(self.shots) + bool(self.fraction)))
        with frozen.progress("logistic regressions", total=fits, unit="fits") as bar:
            for name, (train, test) in splits.items():

                def judge(some: Labelled, test: Labelled = test) -> float:
                    found = accuracy(some, test, classes=frozen.classes, mesh=frozen.mesh)
                    bar.update()
                    return found

                whole = judge(train)
                rows[name] = {"all labels": whole, ERROR: {"all labels": binomial_error(whole, len(test.labels))}}
                ways = {f"{shots} a class": shots for shots in self.shots}
                if self.fraction:
                    part = max(1, round(self.fraction * len(train.labels) / frozen.classes))
                    ways = {f"{self.fraction:g} of labels": part} | ways
                for way, shots in ways.items():
                    drawn = few(train.labels, shots=shots, draws=self.draws, seed=frozen.seed)
                    rows[name][way] = over_draws([judge(train.take(chosen)) for chosen in drawn])
        return rows

    def metrics(self, rows: Rows) -> dict[str, float]:
        """Shows the accuracy of the judged encoder with all labels."""
        return {"logistic": next(iter(rows.values()))["all labels"]}


class Classifier(NamedTuple):
    """Holds a classifier that `fit` has learned."""

    mean: jax.Array  # [D], of the training features
    std: jax.Array
    kernel: jax.Array  # [D, C]
    bias: jax.Array  # [C]

    def logits(self, features: jax.Array) -> jax.Array:
        """Computes logits [m, C] of features [m, D]."""
        standard = (features - self.mean[None]) / self.std[None]
        return jnp.dot(standard, self.kernel, precision="highest") + self.bias[None]


@functools.partial(jax.jit, static_argnames=("classes", "iterations"))
def fit(
    features: jax.Array, labels: jax.Array, *, classes: int, l2: float = 1.0, tol: float = 1e-4, iterations: int = 1000
) -> Classifier:
    """Minimises mean cross entropy + l2 / (2 n) * |kernel|^2, scikit-learn's objective with C = 1 / l2.

    features [n, D], labels [n]; rows with a negative label do not count. Ends when no component of the gradient
    exceeds `tol`, as in scikit-learn, or after `iterations` iterations.
    """
    counted = (labels >= 0).astype(features.dtype)[:, None]
    n = counted.sum()
    mean = (features * counted).sum(axis=0) / n
    std = jnp.sqrt((jnp.square(features - mean[None]) * counted).sum(axis=0) / n)
    std = jnp.where(std > 1e-6, std, 1.0)
    zero = jnp.zeros((features.shape[1], classes), features.dtype), jnp.zeros(classes, features.dtype)

    def loss(params: PyTree) -> jax.Array:
        logits = Classifier(mean, std, *params).logits(features)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return (losses * counted[:, 0]).sum() / n + l2 / (2 * n) * jnp.square(params[0]).sum()

    solver = optax.lbfgs(memory_size=10)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def unfinished(carry: PyTree) -> jax.Array:
        _, state, iteration = carry
        grad = optax.tree.get(state, "grad")
        largest = optax.tree.max(jax.tree.map(jnp.abs, grad))
        return (iteration == 0) | ((iteration < iterations) & (largest > tol))

    def iterate(carry: PyTree) -> PyTree:
        params, state, iteration = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state, iteration + 1

    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and integers
        params, _, _ = jax.lax.while_loop(unfinished, iterate, (zero, solver.init(zero), 0))
    return Classifier(mean, std, *params)


def accuracy(train: Labelled, test: Labelled, *, classes: int, mesh: jax.sharding.Mesh) -> float:
    """Gives the share of the test images that the classifier gets right; the devices share the images."""
    features, labels = spread(train, mesh)
    classifier = fit(features, labels, classes=classes)
    features, labels = spread(test, mesh)
    right = _right(classifier, features, labels)
    return int(right) / len(test.labels)


@jax.jit
def _right(classifier: Classifier, features: jax.Array, labels: jax.Array) -> jax.Array:
    return (classifier.logits(features).argmax(axis=1) == labels).sum()
