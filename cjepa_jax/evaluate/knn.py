"""k nearest neighbours by cosine.

Shapes: m queries, n rows of the bank, D features, C classes.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from cjepa_jax.errors import require
from cjepa_jax.evaluate.base import ERROR, Evaluator, Rows, binomial_error, over_draws
from cjepa_jax.evaluate.frozen import Frozen
from cjepa_jax.evaluate.sets import Labelled, few, unit
from cjepa_jax.settings import setting
from cjepa_jax.train import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knn(Evaluator):
    """Classifies test images by their nearest neighbours, with all labels and with few."""

    neighbours: int = setting(20, "Number of neighbours, k.", within="[1, 1e6]")
    temperature: float = setting(
        0.07, "Of the weighted vote: exp(cosine / temperature); DINO's.", within="[0.001, 100]"
    )
    shots: int = setting(10, "Labels of a class, where few are used; 0: they are not.", within="[0, 1e6]")
    draws: int = setting(5, "Draws of the few labels.", within="[1, 1000]")

    name: ClassVar[str] = "knn"

    def quick(self) -> "Knn":
        """Gives the same without the votes of few labels."""
        return dataclasses.replace(self, shots=0)

    def check(self, frozen: Frozen) -> None:
        """Raises UserError where there are fewer training images than neighbours."""
        images = len(frozen.train.source)
        require(
            self.neighbours <= images,
            f"knn.neighbours = {self.neighbours} is more than the {images} training images; lower it",
        )

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Gives accuracies of the weighted and the plain vote, and of the weighted one with few labels."""
        rows: Rows = {}
        splits = frozen.splits()
        banks = len(splits) * (1 + self.draws * bool(self.shots))
        with frozen.progress("nearest neighbours", total=banks, unit="sets of labels") as bar:
            for name, (train, test) in splits.items():
                judge = functools.partial(accuracies, test=test, classes=frozen.classes, mesh=frozen.mesh)
                k = min(self.neighbours, len(train.labels))
                weighted, plain = judge(train, k=k, temperatures=[self.temperature, None])
                bar.update()
                found = {"weighted": weighted, "plain": plain}
                rows[name] = {
                    **found,
                    ERROR: {key: binomial_error(value, len(test.labels)) for key, value in found.items()},
                }
                if self.shots:
                    drawn = []
                    for chosen in few(train.labels, shots=self.shots, draws=self.draws, seed=frozen.seed):
                        k = min(self.neighbours, len(chosen))
                        drawn += judge(train.take(chosen), k=k, temperatures=[self.temperature])
                        bar.update()
                    rows[name][f"weighted, {self.shots} a class"] = over_draws(drawn)
        return rows

    def metrics(self, rows: Rows) -> dict[str, float]:
        """Shows the weighted vote of the judged encoder."""
        return {"knn": next(iter(rows.values()))["weighted"]}


@functools.partial(jax.jit, static_argnames=("k", "chunk"))
def nearest(
    queries: Float[Array, "m D"], bank: Float[Array, "n D"], *, k: int, chunk: int = 8192
) -> tuple[Float[Array, "m k"], Int[Array, "m k"]]:
    """Finds the k rows of the bank that are nearest to each query: their cosines and row numbers, nearest first.

    At most m * chunk similarities are held at a time, and no second copy of the bank.
    """
    n = len(bank)
    chunk = min(chunk, n)
    queries = unit(queries)

    def nearer(best, first):
        start = jnp.minimum(first, n - chunk)  # the last chunk begins with rows that were seen before
        some = unit(jax.lax.dynamic_slice_in_dim(bank, start, chunk))
        numbers = start + jnp.arange(chunk)
        cosine = jnp.einsum("md,nd->mn", queries, some, precision="highest")
        cosine = jnp.where(numbers >= first, cosine, -jnp.inf)
        cosine = jnp.concatenate([best[0], cosine], axis=1)
        numbers = jnp.concatenate([best[1], jnp.broadcast_to(numbers, (len(queries), chunk))], axis=1)
        cosine, position = jax.lax.top_k(cosine, k)
        return (cosine, jnp.take_along_axis(numbers, position, axis=1)), None

    none = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
    return jax.lax.scan(nearer, none, jnp.arange(0, n, chunk))[0]


@functools.partial(jax.jit, static_argnames="classes")
def vote(cosine: jax.Array, labels: jax.Array, *, classes: int, temperature: float | None = None) -> jax.Array:
    """Gives the class with most votes [m] from neighbours' cosines and labels [m, k].

    A vote weighs exp(cosine / temperature) as in DINO, or 1 without a temperature; of a tie the lowest class wins.
    """
    weight = jnp.ones_like(cosine) if temperature is None else jnp.exp((cosine - cosine[:, :1]) / temperature)
    votes = jnp.zeros((len(cosine), classes), weight.dtype).at[jnp.arange(len(cosine))[:, None], labels].add(weight)
    return votes.argmax(axis=1)


def search(
    queries: Float[np.ndarray, "m D"], bank: Float[np.ndarray, "n D"], *, k: int, mesh: jax.sharding.Mesh
) -> Iterator[tuple[Float[Array, "q k"], Int[Array, "q k"]]]:
    """Yields what `nearest` finds for parts of q queries, in their order; the devices share a part.

    The last part is filled up: what it says behind the m-th query means nothing.
    """
    size = -(-min(1024, len(queries)) // mesh.size) * mesh.size
    on_devices = sharding.put(bank, sharding.replicated(mesh))
    for start in range(0, len(queries), size):
        part = queries[start : start + size]
        filled = np.pad(part, ((0, size - len(part)), (0, 0)))
        yield nearest(sharding.put(filled, sharding.batch(mesh)), on_devices, k=k)


def accuracies(
    train: Labelled,
    test: Labelled,
    *,
    k: int,
    classes: int,
    temperatures: Sequence[float | None],
    mesh: jax.sharding.Mesh,
) -> list[float]:
    """Gives the share of the test images whose neighbours vote for their class, by temperature.

    The devices share the test images.
    """
    labels = sharding.put(train.labels, sharding.replicated(mesh))
    right, start = np.zeros(len(temperatures), int), 0
    for cosine, rows in search(test.features, train.features, k=k, mesh=mesh):
        truth = test.labels[start : start + len(cosine)]
        for i, temperature in enumerate(temperatures):
            votes = vote(cosine, labels[rows], classes=classes, temperature=temperature)
            right[i] += (sharding.fetch(votes)[: len(truth)] == truth).sum()
        start += len(cosine)
    return [float(x) for x in right / len(test.labels)]
