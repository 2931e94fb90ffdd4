"""Projector: an MLP with batch norm between pooled features and a loss.

Used only during pre-training, so batch norm needs nothing but the statistics
of the (global) batch, and the module stays a pure function.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

BATCH_NORM_EPS = 1e-5


class Projector(nn.Module):
    """VICReg's expander (arXiv 2105.04906, section 4.2), or another MLP of its kind; no widths: the identity.

    `last` says what follows the last layer, whose activation is linear: nothing as in the expander, a bias, or batch
    norm without scale and shift, as in SimSiam's projection (arXiv 2011.10566, section 3).
    """

    widths: tuple[int, ...]
    last: Literal["plain", "bias", "norm"] = "plain"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., B, D] to [..., B, widths[-1]] float32; batch statistics are over B, separately for each view."""
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default for a linear layer
        for i, width in enumerate(self.widths):
            is_last = i == len(self.widths) - 1
            x = nn.Dense(width, use_bias=is_last and self.last == "bias", kernel_init=init, name=f"fc{i}")(x)
            if not is_last or self.last == "norm":
                x = x - x.mean(axis=-2, keepdims=True)
                x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-2, keepdims=True) + BATCH_NORM_EPS)
            if not is_last:
                scale = self.param(f"scale{i}", nn.initializers.ones, (width,))
                bias = self.param(f"bias{i}", nn.initializers.zeros, (width,))
                scale, bias = (jnp.expand_dims(p, range(x.ndim - 1)) for p in (scale, bias))
                x = nn.relu(x * scale + bias)
        return x
