"""The prediction loss and the regulariser.

Shapes: B images of the global batch, M target blocks, V views, K_t target
tokens, D encoder width, d projected width. Everything here is float32; under
`jit` a mean over B is a mean over all devices and hosts, however B is sharded.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from cjepa_jax.config import Loss, Vicreg

TARGET_NORM_EPS = 1e-5


class Regulariser(struct.PyTreeNode):
    """The terms, before their coefficients."""

    invariance: jax.Array
    variance: jax.Array
    covariance: jax.Array


def target_norm(features: jax.Array) -> jax.Array:
    """LayerNorm over the feature axis without scale and shift, [..., D] -> [..., D]."""
    return jax.nn.standardize(
        features,
        axis=-1,
        epsilon=TARGET_NORM_EPS,
        algorithm="stable",  # type: ignore[call-arg]  # not yet in its stub
    )


def prediction_loss(prediction: jax.Array, target: jax.Array, valid: jax.Array, loss: Loss) -> jax.Array:
    """Mean over the valid tokens and their features; [B, M, K_t, D] twice and [B, M, K_t] -> scalar.

    Smooth L1 with beta 1 as in I-JEPA's code, or the squared error of its paper.
    """
    error = optax.huber_loss(prediction, target) if loss.kind == "smooth_l1" else jnp.square(prediction - target)
    weight = valid[..., None].astype(error.dtype)
    return (error * weight).sum() / (weight.sum() * error.shape[-1])


def variance_term(z: jax.Array, vicreg: Vicreg) -> jax.Array:
    """v(z) [..., B, d] -> [...]: how far each dimension's std over the batch falls short of gamma.

    VICReg (arXiv 2105.04906) equations 1 and 2.
    """
    std = jnp.sqrt(z.var(axis=-2, ddof=1) + vicreg.eps)
    return jax.nn.relu(vicreg.gamma - std).mean(axis=-1)


def covariance_term(z: jax.Array) -> jax.Array:
    """c(z) [..., B, d] -> [...]: squared off-diagonal covariances over the batch, divided by d (equations 3, 4)."""
    batch, d = z.shape[-2:]
    z = z - z.mean(axis=-2, keepdims=True)
    covariance = jnp.einsum("...bi,...bj->...ij", z, z, precision=jax.lax.Precision.HIGHEST) / (batch - 1)
    off_diagonal = covariance * (1 - jnp.eye(d, dtype=z.dtype))
    return jnp.square(off_diagonal).sum(axis=(-2, -1)) / d


def target_blocks(z: jax.Array, vicreg: Vicreg) -> Regulariser:
    """Algorithm 1 of C-JEPA: the M predicted blocks are the views; z [M, B, d].

    Over the ordered pairs i != j: the mean of mean (z_i - z_j)^2, which is twice
    the unbiased variance over the views; of (v(z_i) + v(z_j)) / 2, which is the
    mean of v; and of c(z_i) + c(z_j), which is twice the mean of c.
    """
    return Regulariser(
        invariance=2 * z.var(axis=0, ddof=1).mean(),
        variance=variance_term(z, vicreg).mean(),
        covariance=2 * covariance_term(z).mean(),
    )


def context_target(context: jax.Array, target: jax.Array, vicreg: Vicreg) -> Regulariser:
    """The pseudocode of C-JEPA: pooled context against pooled target, both [B, d]; spread of the context only."""
    return Regulariser(
        invariance=jnp.square(context - target).mean(),
        variance=variance_term(context, vicreg),
        covariance=covariance_term(context),
    )


def weighted(terms: Regulariser, vicreg: Vicreg) -> jax.Array:
    """b_vicreg (b_sim sim + b_std std + b_cov cov), equation 22 of C-JEPA."""
    return vicreg.weight * (
        vicreg.invariance * terms.invariance + vicreg.variance * terms.variance + vicreg.covariance * terms.covariance
    )
