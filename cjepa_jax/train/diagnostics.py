"""Is it collapsing? Alarms, not quality scores.

Features [B, D]: pooled target features of the batch, one row an image.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

# Below these shares of its value at the start of a run a diagnostic says collapse; docs/reliability.md shows runs that
# collapse and runs that do not.
LIMITS = {"rep/std": 0.5, "rep/rank": 0.5, "1 - rep/cosine": 0.25}
PATIENCE = 3, 0.05  # A diagnostic must stay there for so many lines of metrics, and for this share of the run's steps.


def feature_std(features: jax.Array) -> jax.Array:
    """Computes the std over the images, averaged over the dimensions; it is 0 when all images look the same."""
    return features.std(axis=0).mean()


def effective_rank(features: jax.Array) -> jax.Array:
    """Computes RankMe (arXiv 2210.02885), exp of the entropy of the normalised singular values, in 1 ... min(B, D)."""
    # Not by the eigenvalues of the Gram matrix: their rounding alone looks like a rank of several.
    singular = jnp.linalg.svd(features, compute_uv=False)
    return jnp.exp(jax.scipy.special.entr(singular / singular.sum()).sum())


def mean_cosine(features: jax.Array) -> jax.Array:
    """Computes the mean cosine between different images; it is 1 when all point the same way."""
    batch = len(features)
    unit = features / jnp.linalg.norm(features, axis=1, keepdims=True)
    return (jnp.square(unit.sum(axis=0)).sum() - batch) / (batch * (batch - 1))


def diagnose(features: jax.Array) -> dict[str, jax.Array]:
    """Computes all diagnostics of features [B, D]: a scalar for the name of each metric."""
    return {
        "rep/std": feature_std(features),
        "rep/rank": effective_rank(features),
        "rep/cosine": mean_cosine(features),
    }


@dataclasses.dataclass
class Course:
    """Follows one diagnostic from the start of a run."""

    start: float
    limit: float
    end: float
    since: int | None = None  # the step since which it has stayed below the limit
    lines: int = 0  # of metrics, from then on


class Watch:
    """Follows the diagnostics line by line and says when they have been those of a collapse for a while."""

    def __init__(self, steps: int):
        """`steps` is the length of the run."""
        self._steps = steps
        self.courses: dict[str, Course] = {}  # by the key of LIMITS

    def look(self, step: int, metrics: Mapping[str, float]) -> str:
        """Takes a line of metrics; describes the collapse where there is one now, else gives ""."""
        found = []
        for key, share in LIMITS.items():
            name = key.removeprefix("1 - ")
            if name not in metrics:
                continue
            value = 1 - metrics[name] if key != name else metrics[name]
            course = self.courses.setdefault(key, Course(start=value, limit=share * value, end=value))
            course.end = value
            below = value < course.limit
            course.since = (course.since or step) if below else None
            course.lines = course.lines + 1 if below else 0
            lines, duration = PATIENCE
            if course.since and course.lines >= lines and step - course.since >= duration * self._steps:
                found.append(
                    f"{key} is {value:.3g}, less than {share} of its {course.start:.3g} at the start, since step "
                    f"{course.since}"
                )
        return "; ".join(found)
