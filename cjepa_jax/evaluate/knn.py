"""k nearest neighbours by cosine: mathematics.

Shapes: m queries, n rows of the bank, D features, C classes.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cjepa_jax import sharding
from cjepa_jax.evaluate.sets import Labelled


def unit(features: jax.Array) -> jax.Array:
    """Rows of length 1; a row of zeros stays."""
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames=("k", "chunk"))
def nearest(queries: jax.Array, bank: jax.Array, *, k: int, chunk: int = 8192) -> tuple[jax.Array, jax.Array]:
    """The k rows of bank [n, D] that are nearest to queries [m, D]: cosines and row numbers, [m, k], nearest first.

    At most m * chunk similarities are held at a time.
    """
    n, width = bank.shape
    chunk = max(k, min(chunk, n))
    chunks = -(-n // chunk)
    queries = unit(queries)
    padded = jnp.zeros((chunks * chunk, width), bank.dtype).at[:n].set(unit(bank)).reshape(chunks, chunk, width)
    rows = jnp.arange(chunks * chunk).reshape(chunks, chunk)

    def nearer(best, part):
        some, numbers = part
        cosine = jnp.einsum("md,nd->mn", queries, some, precision="highest")
        cosine = jnp.where(numbers < n, cosine, -jnp.inf)
        cosine = jnp.concatenate([best[0], cosine], axis=1)
        numbers = jnp.concatenate([best[1], jnp.broadcast_to(numbers, (len(queries), chunk))], axis=1)
        cosine, position = jax.lax.top_k(cosine, k)
        return (cosine, jnp.take_along_axis(numbers, position, axis=1)), None

    none = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), rows.dtype)
    return jax.lax.scan(nearer, none, (padded, rows))[0]


@functools.partial(jax.jit, static_argnames="classes")
def vote(cosine: jax.Array, labels: jax.Array, *, classes: int, temperature: float | None = None) -> jax.Array:
    """Neighbours' cosines and labels [m, k] -> the class with most votes [m].

    A vote weighs exp(cosine / temperature) as in DINO, or 1 without a temperature; of a tie the lowest class wins.
    """
    weight = jnp.ones_like(cosine) if temperature is None else jnp.exp((cosine - cosine[:, :1]) / temperature)
    votes = jnp.zeros((len(cosine), classes), weight.dtype).at[jnp.arange(len(cosine))[:, None], labels].add(weight)
    return votes.argmax(axis=1)


def accuracies(
    train: Labelled,
    test: Labelled,
    *,
    k: int,
    classes: int,
    temperatures: Sequence[float | None],
    mesh: jax.sharding.Mesh,
) -> list[float]:
    """Share of the test images whose neighbours vote for their class, by temperature; the devices share them."""
    whole, split = sharding.replicated(mesh), sharding.batch(mesh)
    size = -(-min(1024, len(test.labels)) // mesh.size) * mesh.size
    bank, labels = jax.device_put(tuple(train), whole)
    right = np.zeros(len(temperatures), int)
    for start in range(0, len(test.labels), size):
        part = test.take(np.arange(start, min(start + size, len(test.labels))))
        queries = jax.device_put(np.pad(part.features, ((0, size - len(part.labels)), (0, 0))), split)
        cosine, rows = nearest(queries, bank, k=k)
        for i, temperature in enumerate(temperatures):
            votes = vote(cosine, labels[rows], classes=classes, temperature=temperature)
            right[i] += (jax.device_get(votes)[: len(part.labels)] == part.labels).sum()
    return [float(x) for x in right / len(test.labels)]
