"""Vision Transformer encoder: pre-norm, no class token, fixed sin-cos positions.

Shapes: B images or sequences, N patches in raster order, K kept patches,
D width, F = patch_size^2 * channels values of a patch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from cjepa_jax.config import Model, UserError, nearest, require

LAYER_NORM_EPS = 1e-6


class Size(NamedTuple):
    """A row of the size table."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float


SIZES = {
    "Ti": Size(192, 12, 3, 4),
    "S": Size(384, 12, 6, 4),
    "B": Size(768, 12, 12, 4),
    "L": Size(1024, 24, 16, 4),
    "H": Size(1280, 32, 16, 4),
    "g": Size(1408, 40, 16, 48 / 11),
}


def parse_size(size: str) -> Size:
    """A name of the table, or "WIDTHxDEPTHxHEADS[xMLP_RATIO]".

    Raises UserError for anything else, and for a width that the heads or the
    position embedding do not divide.
    """
    if size in SIZES:
        return SIZES[size]
    try:
        width, depth, heads, *ratio = size.split("x")
        parsed = Size(int(width), int(depth), int(heads), *map(float, ratio or ["4"]))
    except (ValueError, TypeError):
        raise UserError(
            f"model.size = {size!r} is neither WIDTHxDEPTHxHEADS nor a known name: {nearest(size, SIZES)}"
        ) from None
    require(min(parsed) > 0, f"model.size = {size!r}: every number must be positive")
    require(parsed.width % 4 == 0, f"model.size = {size!r}: the width must be a multiple of 4 (2-D sin-cos positions)")
    require(parsed.width % parsed.heads == 0, f"model.size = {size!r}: the heads must divide the width")
    return parsed


def kernel_init(init: Literal["normal", "fan_in"]) -> nn.initializers.Initializer:
    """Normal with std 0.02 (I-JEPA's cut at +-2 is 100 deviations away), or 0.02 * sqrt(768 / fan_in).

    The second equals the first at B's width; at small widths the first lets the
    position embedding drown the content.
    """
    if init == "normal":
        return nn.initializers.normal(0.02)
    return nn.initializers.variance_scaling(0.02**2 * 768, "fan_in", "normal")


def sincos_positions(width: int, grid: int) -> np.ndarray:
    """[N, width] float32: the first half of the channels encodes the column, the second the row.

    Each half is [sin, cos] of position / 10000^(i / (width / 4)), i < width / 4.
    """
    omega = 10_000.0 ** -(np.arange(width // 4) / (width / 4))
    row, column = np.divmod(np.arange(grid * grid), grid)
    halves = [f(position[:, None] * omega) for position in (column, row) for f in (np.sin, np.cos)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def interpolate_positions(table: np.ndarray, rows: int, columns: int | None = None) -> np.ndarray:
    """Positions [N, width] of a square grid -> of another grid [rows * columns, width] float32, as I-JEPA does it.

    A grid without `columns` is square.

    PyTorch's `interpolate(mode="bicubic", align_corners=False)`: Keys' kernel with
    a = -0.75 (`jax.image.resize` has -0.5), borders repeated, no antialiasing.
    """
    old = math.isqrt(len(table))

    def weights(new: int) -> np.ndarray:
        """[new, old]"""
        where = (np.arange(new) + 0.5) * old / new - 0.5  # the new grid's patches, in units of the old one
        first = np.floor(where).astype(int) - 1
        found = np.zeros((new, old))
        for tap in range(4):
            x = np.abs(where - (first + tap))
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            np.add.at(found, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1, near, far))
        return found

    square = table.reshape(old, old, -1).astype(np.float64)
    new = np.einsum("ai,bj,ijd->abd", weights(rows), weights(columns or rows), square)
    return new.reshape(-1, table.shape[-1]).astype(np.float32)


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """[B, H, W, C] -> [B, N, F], values of a patch in (row, column, channel) order."""
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def normalise(images: jax.Array, *, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """[B, H, W, C] uint8 -> float32; mean and std of each channel are of values in [0, 1]."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def drop_path(rng: jax.Array, *, rate: float, depth: int, batch: int) -> jax.Array:
    """Factors on the branches of each block and image, [depth, 2, B]: 0, or 1 / (1 - rate of the block).

    Stochastic depth (arXiv 1603.09382); rates rise linearly from 0 in the first block to
    `rate` in the last; attention and MLP have draws of their own.
    """
    kept = 1 - jnp.linspace(0.0, rate, depth)[:, None, None]
    return jax.random.bernoulli(rng, kept, (depth, 2, batch)).astype(jnp.float32) / kept


def take(tokens: jax.Array, idx: jax.Array) -> jax.Array:
    """Tokens [B, N, D] at idx [B, ...] -> [B, ..., D]."""
    flat = jnp.take_along_axis(tokens, idx.reshape(idx.shape[0], -1, 1), axis=1)
    return flat.reshape(*idx.shape, tokens.shape[-1])


def masked_mean(tokens: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean of tokens [..., K, D] over the K that are valid [..., K] -> [..., D]."""
    weight = valid[..., None].astype(tokens.dtype)
    return (tokens * weight).sum(axis=-2) / weight.sum(axis=-2)


def layer_norm(x: jax.Array, *, name: str | None = None, params: Any = None) -> jax.Array:
    """LayerNorm over the last axis, as a child of the module that calls it, or with given parameters; gives float32."""
    norm, x = nn.LayerNorm(LAYER_NORM_EPS, use_fast_variance=False, name=name), x.astype(jnp.float32)
    return norm(x) if params is None else cast(jax.Array, norm.apply({"params": params}, x))


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, by erf in float32: `jax.nn.gelu` uses erfc, which takes twice the time on CPU."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    heads: int
    mlp_ratio: float
    init_scheme: Literal["normal", "fan_in"]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None = None, keep: jax.Array | None = None) -> jax.Array:
        """x [B, K, D] -> [B, K, D]; tokens that are not valid [B, K] are not attended to.

        keep [2, B]: factors on the outputs of attention and MLP.
        """
        width = x.shape[-1]

        def dense(features, name):
            return nn.Dense(features, dtype=self.dtype, kernel_init=kernel_init(self.init_scheme), name=name)

        def scaled(branch, number):
            if keep is None:
                return branch
            return (branch.astype(jnp.float32) * keep[number, :, None, None]).astype(branch.dtype)

        y = layer_norm(x, name="norm1")
        qkv = rearrange(dense(3 * width, "qkv")(y), "b k (three h d) -> three b k h d", three=3, h=self.heads)
        mask = None if valid is None else valid[:, None, None, :]
        q, k, v = qkv
        self.sow("intermediates", "queries_and_keys", (q, k))  # nothing, unless the caller makes it mutable
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)  # softmax in float32
        x = x + scaled(dense(width, "proj")(rearrange(y, "b k h d -> b k (h d)")), 0)

        y = layer_norm(x, name="norm2")
        y = gelu(dense(round(width * self.mlp_ratio), "fc1")(y))
        return x + scaled(dense(width, "fc2")(y), 1)


class Layers(NamedTuple):
    """How a stack of blocks is computed; its parameters, and what it computes, are the same for all."""

    scanned: bool  # one compiled block in a loop, rather than `depth` of them
    remat: Literal["none", "dots", "full"]  # what the backward pass computes anew: nothing, all but Dense outputs, all
    gather: Callable[[Any], Any] | None = None  # makes a block's parameters whole; anew on the way back


def apply_blocks(
    module: nn.Module,
    make: Callable[..., Block],
    depth: int,
    layers: Layers,
    x: jax.Array,
    valid: jax.Array | None,
    keep: jax.Array | None = None,
) -> jax.Array:
    """x [B, K, D] through `depth` blocks, children of `module` by the names block00, block01, ...

    keep [depth, 2, B]: of `drop_path`. Unrolled, it sows what goes into the first block and what comes out of each into
    the collection "intermediates", as "blocks".
    """
    names = [f"block{i:02}" for i in range(depth)]
    if module.is_initializing():
        for name in names:
            x = make(name=name)(x, valid)
        return x

    def layer(x: jax.Array, params: Any, keep: jax.Array | None) -> jax.Array:
        whole = layers.gather(params) if layers.gather else params
        return cast(jax.Array, make(parent=None).apply({"params": whole}, x, valid, keep))

    if layers.remat != "none":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        # In a loop nothing outside can be merged with what is computed anew.
        layer = jax.checkpoint(layer, policy=dots if layers.remat == "dots" else None, prevent_cse=not layers.scanned)
    params = [module.variables["params"][name] for name in names]
    if layers.scanned:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        return jax.lax.scan(lambda x, each: (layer(x, *each), None), x, (stacked, keep))[0]
    module.sow("intermediates", "blocks", x)  # nothing, unless the caller makes this collection mutable
    for i, p in enumerate(params):
        x = layer(x, p, None if keep is None else keep[i])
        module.sow("intermediates", "blocks", x)
    return x


class Encoder(nn.Module):
    """Patches to features."""

    size: Size
    grid: int
    init_scheme: Literal["normal", "fan_in"]
    dtype: jnp.dtype
    layers: Layers
    trained_grid: int | None = None  # where it differs from `grid`: positions are interpolated from this one's
    columns: int | None = None  # where the grid is not square: then `grid` is its rows

    @nn.compact
    def __call__(
        self,
        patches: jax.Array,
        idx: jax.Array | None = None,
        valid: jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> jax.Array:
        """Patches [B, N, F] -> features [B, N, D] float32; keep as `drop_path` gives it.

        With idx [B, K] only these patches are encoded, at their positions,
        giving [B, K, D]; valid [B, K] marks those that may be attended to.
        """
        trained, columns = self.trained_grid or self.grid, self.columns or self.grid
        table = sincos_positions(self.size.width, trained)
        if (self.grid, columns) != (trained, trained):
            table = interpolate_positions(table, self.grid, columns)
        positions = jnp.asarray(table)[None]
        if idx is not None:  # before the embedding: the same values, and nothing to scatter in the backward pass
            patches = take(patches, idx)
            positions = take(jnp.broadcast_to(positions, (len(idx), *positions.shape[1:])), idx)
        x = nn.Dense(self.size.width, dtype=self.dtype, kernel_init=kernel_init(self.init_scheme), name="embed")(
            patches
        )
        x = x + positions.astype(self.dtype)
        make = functools.partial(Block, self.size.heads, self.size.mlp_ratio, self.init_scheme, self.dtype)
        x = apply_blocks(self, make, self.size.depth, self.layers, x, valid, keep)
        return layer_norm(x, name="norm")


def build_encoder(
    model: Model, *, grid: int, gather: Callable[[Any], Any] | None = None, trained_grid: int | None = None
) -> Encoder:
    """The encoder that a config describes; `trained_grid` is its grid in training, where that was another."""
    layers = Layers(model.layers == "scanned", model.remat, gather)
    return Encoder(parse_size(model.size), grid, model.init, jnp.dtype(model.dtype), layers, trained_grid)
