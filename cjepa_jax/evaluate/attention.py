"""What the last layer attends to, and the main directions of patch features as colours.

Shapes: B images, N patches in raster order, D width.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from sklearn.decomposition import PCA

from cjepa_jax.models.vit import Block, Encoder


def last_layer(encoder: Encoder, params: Any, patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Patches [B, N, F] -> attention of the last block [B, heads, N queries, N keys], features [B, N, D]; float32.

    The encoder's layers must be unrolled.
    """
    features, state = encoder.apply({"params": params}, patches, mutable=["intermediates"])  # type: ignore[misc]
    *_, before, _ = state["intermediates"]["blocks"]
    size = encoder.size
    block = Block(size.heads, size.mlp_ratio, encoder.init_scheme, encoder.dtype)
    last = params[f"block{size.depth - 1:02}"]
    _, state = block.apply({"params": last}, before, mutable=["intermediates"])  # type: ignore[misc]
    ((q, k),) = state["intermediates"]["queries_and_keys"]
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / q.shape[-1] ** 0.5
    return jax.nn.softmax(scores, axis=-1), cast(jax.Array, features)


def entropy(attention: jax.Array) -> jax.Array:
    """Mean over heads and queries of the entropy of attention [B, heads, N, N], over log N: 1 is uniform; scalar."""
    return -(attention * jnp.log(attention.clip(1e-30))).sum(axis=-1).mean() / jnp.log(attention.shape[-1])


def attended(attention: jax.Array, query: int | None) -> jax.Array:
    """Attention [B, heads, N, N] -> [B, N]: how often each patch is attended to, in multiples of 1 / N.

    The mean over the heads, of the patch `query`, or, where it is None, over all patches.
    """
    rows = attention.mean(axis=1)
    return (rows.mean(axis=1) if query is None else rows[:, query]) * rows.shape[-1]


def enlarged(maps: jax.Array, *, image_size: int) -> jax.Array:
    """Maps of patches [B, N] -> of pixels [B, H, W], bilinear; images are square."""
    grid = round(maps.shape[-1] ** 0.5)
    maps = rearrange(maps, "b (h w) -> b h w", w=grid)
    return jax.image.resize(maps, (len(maps), image_size, image_size), "bilinear")


def component_colours(features: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Features [B, N, D] -> (the first three principal components as red, green, blue [B, N, 3] in [0, 1], shares).

    One PCA for all patches of all images; each component is stretched so that one
    patch in a hundred is beyond either end. Its sign is such that its largest
    weight is positive. The shares are those of the variance.
    """
    pca = PCA(3, svd_solver="full")
    components = pca.fit_transform(rearrange(features, "b n d -> (b n) d"))  # scikit-learn fixes the signs
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    colours = ((components - low) / (high - low)).clip(0, 1)
    return rearrange(colours, "(b n) c -> b n c", b=len(features)), pca.explained_variance_ratio_.tolist()
