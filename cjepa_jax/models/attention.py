"""Multi-head attention; the one place where its implementation is chosen.

Shapes: S sequences, N tokens, h heads of d features, D = h d.
"""

import functools
import math
from collections.abc import Iterable
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from cjepa_jax.errors import require
from cjepa_jax.models import fused_attention
from cjepa_jax.models.fused_attention import PerDevice

_LANES = 128  # of a TPU's registers
_SHORT = 320  # tokens, up to which heads side by side were predicted to be faster on TPU


class Attend(Protocol):
    """Computes attention from the product that holds queries, keys and values; `choose` gives an implementation."""

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
    """Attends by operations that XLA compiles for any device and any shape.

    Where a GPU cannot multiply bfloat16 as JAX's attention asks for, the products are of float32.
    """
    mask = None if valid is None else valid[:, None, None, :]
    capability = _capability(jax.devices()[0])
    wide = qkv.dtype == jnp.bfloat16 and capability is not None and capability < 8
    q, k, v = split_heads(qkv.astype(jnp.float32) if wide else qkv, bias, heads)
    return rearrange(jax.nn.dot_product_attention(q, k, v, mask=mask), "s n h d -> s n (h d)").astype(qkv.dtype)


def _capability(device: jax.Device) -> int | None:
    """Gives the major number of CUDA's compute capability; None for what is not an NVIDIA GPU."""
    number = getattr(device, "compute_capability", "").split(".")[0]  # those of AMD's GPUs are not numbers
    return int(number) if number.isdigit() else None


def attend_packed(
    qkv: Float[Array, "S N 3D"], bias: Float[Array, " 3D"], valid: Bool[Array, "S N"] | None, *, heads: int
) -> Float[Array, "S N D"]:
    """Attends by XLA's operations, with so many heads side by side that they fill the 128 lanes of a TPU.

    Where XLA's own attention moves narrow heads about, here nothing moves: the queries of heads that share lanes are
    stacked, each copy with the others' lanes zeroed. The products are no larger, since a TPU pads narrow heads anyway.
    """
    tokens, dim = qkv.shape[1], qkv.shape[2] // 3 // heads
    packed = math.gcd(heads, max(1, _LANES // dim))  # heads that share lanes
    biased = qkv + bias.astype(qkv.dtype)[None, None]
    q, k, v = rearrange(biased, "s n (three g lanes) -> three s n g lanes", three=3, lanes=packed * dim)
    own = np.arange(packed * dim) // dim == np.arange(packed)[:, None]
    own = own[None, None, None]  # [1, 1, 1, p, lanes]
    stacked = jnp.where(own, q[..., None, :], 0)
    scores = jnp.einsum("snhpl,smhl->shpnm", stacked, k, preferred_element_type=jnp.float32) * dim**-0.5
    if valid is not None:
        scores = jnp.where(valid[:, None, None, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(qkv.dtype)
    out = jnp.einsum("shpnm,smhl->snhpl", weights, v)
    return jnp.where(own, out, 0).sum(axis=-2).reshape(-1, tokens, heads * dim)


def attend_cudnn(
    qkv: Float[Array, "S N 3D"], bias: Float[Array, " 3D"], valid: Bool[Array, "S N"] | None, *, heads: int
) -> Float[Array, "S N D"]:
    """Attends by cuDNN's fused kernels for NVIDIA GPUs."""
    q, k, v = split_heads(qkv, bias, heads)
    mask = None
    if valid is not None:  # cuDNN wants a row of its own for every query
        mask = jnp.broadcast_to(valid[:, None, None, :], (len(valid), 1, qkv.shape[1], qkv.shape[1]))
    return rearrange(jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn"), "s n h d -> s n (h d)")


def _cudnn_unsupported(*, tokens: int, width: int, heads: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Says why cuDNN cannot serve sequences of `tokens` x `width`, or returns None where it can."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"cuDNN has no attention in {jnp.dtype(dtype).name}"
    if width // heads % 8 or width // heads > 128:
        return f"heads have {width // heads} features, which is not a multiple of 8 up to 128"
    if tokens % 2:
        return f"a sequence has {tokens} tokens, an odd number"
    return None


def choose(
    setting: Literal["auto", "xla", "fused"],
    *,
    device: jax.Device,
    per_device: PerDevice,
    dtype: str,
    shapes: Iterable[tuple[int, int, int]],
) -> Attend:
    """Gives the attention that `model.attention` asks for on devices like `device`, which need not be present.

    "auto" decides anew for every shape that it meets. shapes: (tokens, width, heads) of what will be attended to, in
    `dtype`.
    Raises UserError where "fused" cannot serve the devices or one of the shapes.
    """
    fused: Attend
    if device.platform == "tpu":
        fused = functools.partial(fused_attention.attend, per_device=per_device)
        unsupported = fused_attention.unsupported
    else:
        fused, unsupported = attend_cudnn, _cudnn_unsupported
    served = device.platform == "tpu" or (_capability(device) or 0) >= 8
    if setting == "fused":
        require(
            served,
            "model.attention = 'fused' needs a TPU or an NVIDIA GPU of compute capability 8.0 or more, and the devices "
            f"are of the kind {device.device_kind!r}; 'auto' takes what there is",
        )
        for tokens, width, heads in shapes:
            reason = unsupported(tokens=tokens, width=width, heads=heads, dtype=dtype)
            require(reason is None, f"model.attention = 'fused' cannot serve: {reason}; 'auto' takes XLA there")
    if setting == "xla" or not served:
        return attend_xla

    def attend(qkv, bias, valid, *, heads):
        _, tokens, width = qkv.shape
        if unsupported(tokens=tokens, width=width // 3, heads=heads, dtype=qkv.dtype):
            packed = device.platform == "tpu" and tokens <= _SHORT
            return (attend_packed if packed else attend_xla)(qkv, bias, valid, heads=heads)
        return fused(qkv, bias, valid, heads=heads)

    return attend
