"""Multinomial logistic regression on standardised features, by L-BFGS: mathematics.

Shapes: n training and m test images, D features, C classes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cjepa_jax.evaluate.sets import Labelled, spread


class Classifier(NamedTuple):
    """What `fit` learns."""

    mean: jax.Array  # [D], of the training features
    std: jax.Array
    kernel: jax.Array  # [D, C]
    bias: jax.Array  # [C]

    def logits(self, features: jax.Array) -> jax.Array:
        """[m, D] -> [m, C]."""
        standard = (features - self.mean) / self.std
        return jnp.dot(standard, self.kernel, precision="highest") + self.bias


@functools.partial(jax.jit, static_argnames=("classes", "iterations"))
def fit(
    features: jax.Array, labels: jax.Array, *, classes: int, l2: float = 1.0, tol: float = 1e-4, iterations: int = 1000
) -> Classifier:
    """Minimises mean cross entropy + l2 / (2 n) * |kernel|^2, scikit-learn's objective with C = 1 / l2.

    features [n, D], labels [n]; rows with a negative label do not count. Ends when no
    component of the gradient exceeds `tol`, scikit-learn's rule too.
    """
    counted = (labels >= 0).astype(features.dtype)[:, None]
    n = counted.sum()
    mean = (features * counted).sum(axis=0) / n
    std = jnp.sqrt((jnp.square(features - mean) * counted).sum(axis=0) / n)
    std = jnp.where(std > 1e-6, std, 1.0)
    zero = jnp.zeros((features.shape[1], classes), features.dtype), jnp.zeros(classes, features.dtype)

    def loss(params: Any) -> jax.Array:
        logits = Classifier(mean, std, *params).logits(features)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return (losses * counted[:, 0]).sum() / n + l2 / (2 * n) * jnp.square(params[0]).sum()

    solver = optax.lbfgs(memory_size=10)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def unfinished(carry: Any) -> jax.Array:
        _, state, iteration = carry
        grad = optax.tree.get(state, "grad")
        largest = optax.tree.max(jax.tree.map(jnp.abs, grad))
        return (iteration == 0) | ((iteration < iterations) & (largest > tol))

    def iterate(carry: Any) -> Any:
        params, state, iteration = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state, iteration + 1

    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and integers
        params, _, _ = jax.lax.while_loop(unfinished, iterate, (zero, solver.init(zero), 0))
    return Classifier(mean, std, *params)


def accuracy(train: Labelled, test: Labelled, *, classes: int, mesh: jax.sharding.Mesh) -> float:
    """Share of the test images that the classifier gets right; the devices share the images."""
    features, labels = spread(train, mesh)
    classifier = fit(features, labels, classes=classes)
    features, labels = spread(test, mesh)
    right = _right(classifier, features, labels)
    return int(right) / len(test.labels)


@jax.jit
def _right(classifier: Classifier, features: jax.Array, labels: jax.Array) -> jax.Array:
    return (classifier.logits(features).argmax(axis=1) == labels).sum()
