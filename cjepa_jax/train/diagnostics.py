"""Is it collapsing? Alarms, not quality scores.

Features [B, D]: pooled target features of the batch, one row an image.
"""

import jax
import jax.numpy as jnp


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
    """Computes all of them, by the name of the metric."""
    return {
        "rep/std": feature_std(features),
        "rep/rank": effective_rank(features),
        "rep/cosine": mean_cosine(features),
    }
