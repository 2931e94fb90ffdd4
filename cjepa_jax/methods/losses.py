"""The prediction loss and the regulariser.

Shapes: B images of the global batch, M target blocks, V views, K_t target
tokens, D encoder width, d projected width. Everything here is float32; under
`jit` a mean over B is a mean over all devices and hosts, however B is sharded.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from cjepa_jax.settings import setting

TARGET_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients:
    """VICReg's three terms: invariance * sim + variance * std + covariance * cov."""

    invariance: float = setting(25.0, "Coefficient of the distance between views.", within="[0, 1e6]")
    variance: float = setting(25.0, "Coefficient of the missing standard deviation.", within="[0, 1e6]")
    covariance: float = setting(1.0, "Coefficient of the covariances.", within="[0, 1e6]")
    gamma: float = setting(
        1.0, "The standard deviation that the variance term asks of each dimension.", within="[0, 1000]"
    )
    eps: float = setting(1e-4, "Added to variances before the square root.", within="[1e-20, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Placement:
    weight: float = setting(0.001, "Weight of the regulariser; 0 is I-JEPA.", within="[0, 1e6]")
    views: Literal["target_blocks", "context_target"] = setting(
        "target_blocks", "What is compared: as in the paper's Algorithm 1, or as in its pseudocode."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vicreg(Coefficients, _Placement):
    """The regulariser of C-JEPA: weight * (invariance * sim + variance * std + covariance * cov)."""

    projector: tuple[int, ...] = setting(
        (), "Widths of an MLP with batch norm; () is the identity.", within="[1, 65536]"
    )


class Regulariser(struct.PyTreeNode):
    """Holds the three terms before their coefficients."""

    invariance: jax.Array
    variance: jax.Array
    covariance: jax.Array


def target_norm(features: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Normalises the feature axis as a LayerNorm without scale and shift does."""
    return jax.nn.standardize(
        features,
        axis=-1,
        epsilon=TARGET_NORM_EPS,
        algorithm="stable",  # type: ignore[call-arg]  # not yet in its stub
    )


def prediction_error(
    prediction: Float[Array, "B M K D"],
    target: Float[Array, "B M K D"],
    valid: Bool[Array, "B M K"],
    kind: Literal["smooth_l1", "l2"],
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Sums the error of each image over its valid tokens and their features; also gives the number of terms.

    Smooth L1 with beta 1 as in I-JEPA's code, or the squared error of its paper.
    """
    error = optax.huber_loss(prediction, target) if kind == "smooth_l1" else jnp.square(prediction - target)
    weight = valid[..., None].astype(error.dtype)
    return (error * weight).sum(axis=(1, 2, 3)), weight.sum(axis=(1, 2, 3)) * error.shape[-1]


def variance_term(z: Float[Array, "*V B d"], vicreg: Coefficients) -> Float[Array, "*V"]:
    """Computes v(z): how far each dimension's std over the batch falls short of gamma, on average.

    VICReg (arXiv 2105.04906) equations 1 and 2.
    """
    std = jnp.sqrt(z.var(axis=-2, ddof=1) + vicreg.eps)
    return jax.nn.relu(vicreg.gamma - std).mean(axis=-1)


def covariance_term(z: Float[Array, "*V B d"]) -> Float[Array, "*V"]:
    """Computes c(z): the sum of squared off-diagonal covariances over the batch, over d (equations 3 and 4)."""
    batch, d = z.shape[-2:]
    z = z - z.mean(axis=-2, keepdims=True)
    covariance = jnp.einsum("...bi,...bj->...ij", z, z, precision=jax.lax.Precision.HIGHEST) / (batch - 1)
    off_diagonal = covariance * jnp.expand_dims(1 - jnp.eye(d, dtype=z.dtype), range(z.ndim - 2))
    return jnp.square(off_diagonal).sum(axis=(-2, -1)) / d


def target_blocks(z: Float[Array, "M B d"], vicreg: Coefficients) -> Regulariser:
    """Takes the M predicted blocks as views of an image, as Algorithm 1 of C-JEPA does; VICReg's loss has M = 2.

    Over the ordered pairs i != j: the mean of mean (z_i - z_j)^2, which is twice
    the unbiased variance over the views; of (v(z_i) + v(z_j)) / 2, which is the
    mean of v; and of c(z_i) + c(z_j), which is twice the mean of c.
    """
    return Regulariser(
        invariance=2 * z.var(axis=0, ddof=1).mean(),
        variance=variance_term(z, vicreg).mean(),
        covariance=2 * covariance_term(z).mean(),
    )


def context_target(context: Float[Array, "B d"], target: Float[Array, "B d"], vicreg: Vicreg) -> Regulariser:
    """Compares pooled context with pooled target, as C-JEPA's pseudocode; only the context is to be spread out."""
    return Regulariser(
        invariance=jnp.square(context - target).mean(),
        variance=variance_term(context, vicreg),
        covariance=covariance_term(context),
    )


def combined(terms: Regulariser, vicreg: Coefficients) -> Float[Array, ""]:
    """Adds the terms with their coefficients, VICReg's equation 6: b_sim sim + b_std std + b_cov cov."""
    return (
        vicreg.invariance * terms.invariance + vicreg.variance * terms.variance + vicreg.covariance * terms.covariance
    )
