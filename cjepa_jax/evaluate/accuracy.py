"""Accuracy of networks that have a head: fine-tuned ones."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jaxtyping import Array, Float, Int, PyTree

from cjepa_jax.errors import require
from cjepa_jax.evaluate.base import ERROR, Evaluator, Rows, binomial_error
from cjepa_jax.evaluate.frozen import AVERAGE, Frozen
from cjepa_jax.evaluate.sets import spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy(Evaluator):
    """Judges a network's own head on the test images; it has no settings."""

    name: ClassVar[str] = "accuracy"
    numbers: ClassVar[tuple[str, ...]] = ("loss",)

    def check(self, frozen: Frozen) -> None:
        """Raises UserError where the network has no head, or one for other classes."""
        require(bool(frozen.heads), "accuracy: the checkpoint has no head; fine-tuning gives it one")
        names, split = frozen.test.source.classes, f"data.test_split = {frozen.data.test_split!r}"
        require(bool(names), f"{split} has no labels, with which accuracy compares")
        for head in frozen.heads.values():
            known = head["bias"].shape[0]
            require(len(names) <= known, f"{split} has {len(names)} classes, the head tells {known} apart")
        numbers = {name: number for number, name in enumerate(frozen.origin.networks.classes if frozen.origin else ())}
        moved = [name for number, name in enumerate(names) if numbers.get(name, number) != number]
        require(
            not moved,
            f"{split} numbers classes otherwise than the head does, such as {', '.join(moved[:3])}; give it the "
            "classes that the head was trained on",
        )

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Gives top 1, the mean cross entropy and, where five are at most half of the classes, top 5."""
        rows: Rows = {}
        for name, head in frozen.heads.items():
            test = frozen.test_features[name].last(1)
            sums: dict[str, float] = {}
            for start in range(0, len(test.labels), 4096):  # bounds the logits
                part = test.take(np.arange(start, min(start + 4096, len(test.labels))))
                found = jax.device_get(score(head, *spread(part, frozen.mesh)))
                sums = {key: sums.get(key, 0) + value.item() for key, value in found.items()}
            images = sums.pop("images", 0)
            require(images > 0, f"data.test_split = {frozen.data.test_split!r}: none of its images can be read")
            kept = [key for key in sums if key != "top5" or head["bias"].shape[0] >= 10]
            rows[name] = {key: sums[key] / images for key in kept} | {"images": int(images)}
            shares = {key: rows[name][key] for key in kept if key != "loss"}
            rows[name][ERROR] = {key: binomial_error(share, int(images)) for key, share in shares.items()}
        return rows

    def metrics(self, rows: Rows) -> dict[str, float]:
        """Shows top 1 and any top 5 of the parameters and, as ema_top1 and ema_top5, of their average."""
        prefix = {AVERAGE: "ema_"}
        return {
            prefix.get(name, "") + key: row[key] for name, row in rows.items() for key in ("top1", "top5") if key in row
        }


@jax.jit
def score(head: PyTree, features: Float[Array, "n D"], labels: Int[Array, " n"]) -> dict[str, Array]:
    """Sums over images: their number, those that are right at once or among the best five, and cross entropies.

    An image with a negative label does not count.
    """
    logits = features @ head["kernel"] + head["bias"][None]
    counts = labels >= 0
    labels = jnp.maximum(labels, 0)
    best = jax.lax.top_k(logits, min(5, logits.shape[1]))[1] == labels[:, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {
        "images": counts.sum(dtype=jnp.int32),
        "top1": (best[:, 0] & counts).sum(dtype=jnp.int32),
        "top5": (best.any(axis=1) & counts).sum(dtype=jnp.int32),
        "loss": jnp.where(counts, losses, 0).sum(),
    }
