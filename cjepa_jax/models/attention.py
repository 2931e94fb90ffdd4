"""Multi-head attention; the one place where its implementation is chosen.

Shapes: B sequences, K tokens, h heads of d features.
"""

import jax
from jaxtyping import Array, Bool, Float


def attend(
    q: Float[Array, "B K h d"],
    k: Float[Array, "B K h d"],
    v: Float[Array, "B K h d"],
    valid: Bool[Array, "B K"] | None = None,
) -> Float[Array, "B K h d"]:
    """Attends to the tokens that are valid, by default to all; the softmax is computed in float32."""
    mask = None if valid is None else valid[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)
