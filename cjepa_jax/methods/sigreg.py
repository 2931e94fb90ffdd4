"""SIGReg, LeJEPA's regulariser (Balestriero and LeCun, arXiv 2511.08544): embeddings like an isotropic Gaussian.

A batch is projected on random unit directions ("slices"), and the Epps-Pulley statistic compares each one-dimensional
sample x of N numbers with N(0, 1) by characteristic functions:

    T(x) = N integral over t in [-5, 5] of |1/N sum_n exp(i t x_n) - exp(-t^2 / 2)|^2 w(t) dt,   w(t) = exp(-t^2 / 2)

by the trapezoid rule on 17 points; SIGReg is the mean of T over the slices, which are drawn anew in every step. N is
the global batch. The paper's text was not at hand. The statistic and its window are those of lightly and of
stable-pretraining, a library of the authors; both take 17 points from 0 to 3, and the same ones below 0. The two rules
differ by 0 to 2 % for samples of a std from 0 to 2, and by 4 % for a sample of N(0, 1), whose T is small.

Shapes: B images of the global batch, d embedding width, S slices.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from cjepa_jax.settings import setting

_LIMIT, _POINTS = 5.0, 17  # of the integral


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigreg:
    """Holds the settings of SIGReg where it is added to a method with another loss, such as C-JEPA."""

    weight: float = setting(
        0.0,
        "Weight of SIGReg of the pooled blocks, after vicreg.projector; 0: none.",
        within="[0, 1e6]",
    )
    slices: int = setting(1024, "Random directions of a step.", within="[1, 1e6]")


def seeds(rng: jax.Array, batch: int) -> UInt32[Array, "B k"]:
    """Gives the seed of a step's directions, once for each image: what `Method.prepare` gives has an image axis."""
    return jnp.broadcast_to(jax.random.key_data(rng)[None], (batch, *jax.random.key_data(rng).shape))


def directions(seeds: UInt32[Array, "B k"], *, width: int, slices: int) -> Float[Array, "d S"]:
    """Draws unit vectors, one in each column; they are the same on all devices."""
    drawn = jax.random.normal(jax.random.wrap_key_data(seeds[0]), (width, slices))
    return drawn / jnp.linalg.norm(drawn, axis=0, keepdims=True)


def epps_pulley(x: Float[Array, "*V B S"]) -> Float[Array, "*V S"]:
    """Computes T of samples along the axis B, against N(0, 1)."""
    total = jnp.zeros((*x.shape[:-2], x.shape[-1]))
    # The integrand is even and 0 at t = 0, so that the points above 0, taken twice, are all.
    points = np.linspace(0.0, _LIMIT, _POINTS // 2 + 1)[1:]
    for t in points:
        normal = float(np.exp(-(t**2) / 2))
        phase = float(t) * x
        distance = jnp.square(jnp.cos(phase).mean(axis=-2) - normal) + jnp.square(jnp.sin(phase).mean(axis=-2))
        end = 0.5 if t == points[-1] else 1.0
        total += float(2 * points[0] * end * normal) * distance
    return x.shape[-2] * total


def statistic(z: Float[Array, "*V B d"], directions: Float[Array, "d S"]) -> Float[Array, "*V"]:
    """Averages the statistic over the slices, for each view."""
    return epps_pulley(jnp.matmul(z, directions, precision=jax.lax.Precision.HIGHEST)).mean(axis=-1)
