"""Projector: what the regulariser sees of the pooled features.

Used only during pre-training, so batch norm needs nothing but the statistics
of the (global) batch, and the module stays a pure function.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

BATCH_NORM_EPS = 1e-5


class Projector(nn.Module):
    """VICReg's expander (arXiv 2105.04906, section 4.2); no widths: the identity."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., B, D] to [..., B, widths[-1]] float32; statistics are over B, apart for each view before it."""
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default for a linear layer
        for i, width in enumerate(self.widths):
            last = i == len(self.widths) - 1
            x = nn.Dense(width, use_bias=False, kernel_init=init, name=f"fc{i}")(x)
            if not last:
                x = x - x.mean(axis=-2, keepdims=True)
                x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-2, keepdims=True) + BATCH_NORM_EPS)
                scale = self.param(f"scale{i}", nn.initializers.ones, (width,))
                bias = self.param(f"bias{i}", nn.initializers.zeros, (width,))
                scale, bias = (jnp.expand_dims(p, range(x.ndim - 1)) for p in (scale, bias))
                x = nn.relu(x * scale + bias)
        return x
