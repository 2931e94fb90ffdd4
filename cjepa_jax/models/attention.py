"""Multi-head attention; the one place where its implementation is chosen.

Shapes: S sequences, N tokens, h heads of d features, D = h d.
"""

from collections.abc import Iterable
from typing import Literal, Protocol

import jax
from einops import rearrange
from jaxtyping import Array, Bool, Float

from cjepa_jax.errors import require
from cjepa_jax.models import fused_attention
from cjepa_jax.models.fused_attention import PerDevice


class Attend(Protocol):
    """An implementation of attention."""

    def __call__(
        self, qkv: Float[Array, "S N 3D"], bias: Float[Array, " 3D"], valid: Bool[Array, "S N"] | None, *, heads: int
    ) -> Float[Array, "S N D"]:
        """Attends to the tokens that are valid, by default to all; the softmax is computed in float32.

        qkv is the product that gives queries, keys and values, before its bias is added.
        """


def split_heads(
    qkv: Float[Array, "S N 3D"], bias: Float[Array, " 3D"], heads: int
) -> tuple[Float[Array, "S N h d"], Float[Array, "S N h d"], Float[Array, "S N h d"]]:
    """Adds the bias and gives queries, keys and values."""
    biased = qkv + bias.astype(qkv.dtype)[None, None]
    q, k, v = rearrange(biased, "s n (three h d) -> three s n h d", three=3, h=heads)
    return q, k, v


def attend_xla(
    qkv: Float[Array, "S N 3D"], bias: Float[Array, " 3D"], valid: Bool[Array, "S N"] | None, *, heads: int
) -> Float[Array, "S N D"]:
    """Attends by operations that XLA compiles for any device and any shape."""
    mask = None if valid is None else valid[:, None, None, :]
    return rearrange(jax.nn.dot_product_attention(*split_heads(qkv, bias, heads), mask=mask), "s n h d -> s n (h d)")


def choose(
    setting: Literal["auto", "xla", "fused"],
    *,
    platform: str,
    per_device: PerDevice,
    dtype: str,
    shapes: Iterable[tuple[int, int, int]],
) -> Attend:
    """Gives what `model.attention` asks for on devices of a platform, such as "tpu" or "cpu".

    "auto" decides anew for every shape that it meets. shapes: (tokens, width, heads) of what will be attended to, in
    `dtype`.
    Raises UserError where "fused" cannot serve the platform or one of the shapes.
    """
    if setting == "fused":
        require(
            platform == "tpu",
            f"model.attention = 'fused' runs on TPU only, and the devices are of the kind {platform!r}; 'auto' takes "
            "what there is",
        )
        for tokens, width, heads in shapes:
            reason = fused_attention.unsupported(tokens=tokens, width=width, heads=heads, dtype=dtype)
            require(reason is None, f"model.attention = 'fused' cannot serve: {reason}; 'auto' takes XLA there")
    if setting == "xla" or platform != "tpu":
        return attend_xla

    def attend(qkv, bias, valid, *, heads):
        _, tokens, width = qkv.shape
        if fused_attention.unsupported(tokens=tokens, width=width // 3, heads=heads, dtype=qkv.dtype):
            return attend_xla(qkv, bias, valid, heads=heads)
        return fused_attention.attend(qkv, bias, valid, heads=heads, per_device=per_device)

    return attend
