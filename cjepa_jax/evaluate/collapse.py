"""How spread out features are, with no labels: mathematics. std, rank and cosine of a batch are in diagnostics.py.

Shapes: n images, Q views of each, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cjepa_jax.evaluate.knn import unit

LIDAR_DELTA = 1e-4  # of the paper: added to the covariance within objects

# Below these shares of its value at the start of a run a diagnostic says collapse. Of configs/digits.py without EMA and
# regulariser, three seeds, the ends stood at .14 to .43 (std), .45 (rank) and .11 at most (1 - cosine) of what an
# untrained encoder has.
ALARMS = {"rep/std": 0.5, "rep/rank": 0.5, "1 - rep/cosine": 0.25}


@jax.jit
def spectrum(features: jax.Array) -> jax.Array:
    """Standard deviations along the principal axes of [n, D], largest first, [min(n, D)]."""
    centred = features - features.mean(axis=0)
    return jnp.linalg.svd(centred, compute_uv=False) / jnp.sqrt(jnp.float32(len(features)))


@jax.jit
def alignment(views: jax.Array) -> jax.Array:
    """Mean squared distance between two views of an image on the unit sphere, [n, Q, D], over all pairs; 0 is best.

    Wang and Isola 2020 (arXiv 2005.10242), with alpha = 2.
    """
    on_sphere = unit(views)
    count = views.shape[1]
    # The mean over ordered pairs of |x - y|^2 is 2 Q / (Q - 1) times the mean squared distance from the centre.
    centred = on_sphere - on_sphere.mean(axis=1, keepdims=True)
    return 2 * count / (count - 1) * jnp.square(centred).sum(axis=-1).mean()


@jax.jit
def uniformity(features: jax.Array) -> jax.Array:
    """Log of the mean of exp(-2 |x - y|^2) over pairs of [n, D] on the unit sphere: 0 when all coincide, at least -4.

    Wang and Isola 2020, with t = 2.
    """
    on_sphere = unit(features)
    n = len(features)

    def one(row: jax.Array) -> jax.Array:
        return jnp.exp(-2 * jnp.square(on_sphere - row).sum(axis=1)).sum()

    return jnp.log((jax.lax.map(one, on_sphere, batch_size=64).sum() - n) / (n * (n - 1)))


@jax.jit
def lidar(views: jax.Array) -> jax.Array:
    """Effective rank of what tells images apart in views [n, Q, D], in units of how the views of an image differ.

    Thilak et al. 2023 (arXiv 2312.04000): exp of the entropy of the normalised
    eigenvalues of S_w^-1/2 S_b S_w^-1/2, with S_b the covariance of the images'
    means and S_w that of the views about them plus 1e-4 on the diagonal. At most
    min(n - 1, D).
    """
    n, count, _ = views.shape
    means = views.mean(axis=1)
    between = (means - means.mean(axis=0)) / jnp.sqrt(jnp.float32(n))
    within = (views - means[:, None]) / jnp.sqrt(jnp.float32(n * count))
    covariance = jnp.einsum("nqd,nqe->de", within, within, precision="highest")
    values, vectors = jnp.linalg.eigh(covariance)
    scale = jax.lax.rsqrt(jnp.maximum(values, 0) + LIDAR_DELTA)
    whitened = jnp.dot(between, vectors * scale, precision="highest")
    eigenvalues = jnp.square(jnp.linalg.svd(whitened, compute_uv=False))
    return jnp.exp(jax.scipy.special.entr(eigenvalues / eigenvalues.sum()).sum())


def first_alarms(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What would have told us, from the lines of metrics.jsonl: by diagnostic its start, end, limit, and alarm.

    The alarm is the step since which it stayed below its limit (ALARMS); None where it does not.
    """
    found = {}
    for name, share in ALARMS.items():
        series = [
            (line["step"], 1 - line["rep/cosine"] if name.startswith("1 - ") else line[name])
            for line in lines
            if name.removeprefix("1 - ") in line
        ]
        if not series:
            continue
        limit = share * series[0][1]
        since = None
        for step, value in series:
            since = None if value >= limit else since or step
        found[name] = {"start": series[0][1], "end": series[-1][1], "limit": limit, "alarm since step": since}
    return found
