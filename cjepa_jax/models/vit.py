"""Vision Transformer encoder: pre-norm, no class token, fixed sin-cos positions.

Shapes: B images or sequences, N patches in raster order, K kept patches,
D width, F = patch_size^2 * channels values of a patch.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, PyTree, UInt8

from cjepa_jax.config import Grid, Model
from cjepa_jax.errors import UserError, nearest, require
from cjepa_jax.models.attention import Attend, attend_xla, split_heads
from cjepa_jax.models.layer_norm import layer_norm

_LARGEST = 16384, 256, 1024, 64  # width, depth, heads and MLP ratio of a size
_MOST_POSITIONS = 2**25  # numbers of the position embedding; of a ViT-g more than 20,000 patches


class Size(NamedTuple):
    """Describes an encoder: a row of the size table."""

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
    """Reads a name of the table, or "WIDTHxDEPTHxHEADS[xMLP_RATIO]".

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
    require(
        all(0 < number <= most for number, most in zip(parsed, _LARGEST, strict=True)),
        f"model.size = {size!r}: every number must be positive, and WIDTHxDEPTHxHEADSxMLP_RATIO at most "
        f"{'x'.join(map(str, _LARGEST))}",
    )
    require(round(parsed.width * parsed.mlp_ratio) > 0, f"model.size = {size!r}: the MLP has no width")
    require(parsed.width % 4 == 0, f"model.size = {size!r}: the width must be a multiple of 4 (2-D sin-cos positions)")
    require(parsed.width % parsed.heads == 0, f"model.size = {size!r}: the heads must divide the width")
    return parsed


def kernel_init(init: Literal["normal", "fan_in"]) -> nn.initializers.Initializer:
    """Gives a normal with std 0.02 (I-JEPA's cut at +-2 is 100 deviations away), or 0.02 * sqrt(768 / fan_in).

    The second equals the first at B's width; at small widths the first lets the
    position embedding drown the content.
    """
    if init == "normal":
        return nn.initializers.normal(0.02)
    return nn.initializers.variance_scaling(0.02**2 * 768, "fan_in", "normal")


def check_positions(width: int, grid: Grid) -> None:
    """Raises UserError where the position embedding of a grid of patches would need too much memory."""
    rows, columns = grid
    require(
        rows * columns * width <= _MOST_POSITIONS,
        f"{rows}x{columns} patches are too many for a width of {width}: lower data.image_size or raise "
        "model.patch_size",
    )


def sincos_positions(width: int, grid: Grid) -> Float[np.ndarray, "N width"]:
    """Computes position embeddings: the first half of the channels encodes the column, the second the row.

    Each half is [sin, cos] of position / 10000^(i / (width / 4)), i < width / 4.
    """
    omega = 10_000.0 ** -(np.arange(width // 4) / (width / 4))
    row, column = np.divmod(np.arange(math.prod(grid)), grid[1])
    halves = [f(position[:, None] * omega) for position in (column, row) for f in (np.sin, np.cos)]
    return np.concatenate(halves, axis=1).astype(np.float32)


# One program, where the operations of `resize` would be many.
_resize = jax.jit(jax.image.resize, static_argnames=("shape", "method", "antialias", "precision"))


def interpolate_positions(table: Float[np.ndarray, "N D"], old: Grid, new: Grid) -> Float[np.ndarray, "M D"]:
    """Interpolates positions of one grid for another one, as I-JEPA does it.

    Equals PyTorch's `interpolate(mode="bicubic", align_corners=False)`.
    """
    maps = rearrange(table.astype(np.float64), "(h w) d -> h w d", h=old[0])
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        shape = (*new, table.shape[1])
        resized = _resize(maps, shape=shape, method="cubic-pytorch", antialias=False, precision="highest")
        return rearrange(np.asarray(resized, np.float32), "h w d -> (h w) d")


def patchify(images: Float[Array, "B H W C"], patch_size: int) -> Float[Array, "B N F"]:
    """Cuts images into patches, whose values are in (row, column, channel) order."""
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def normalise(
    images: UInt8[Array, "*B H W C"], *, mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "*B H W C"]:
    """Subtracts the mean of each channel and divides by its std; both are of values in [0, 1]."""
    centre, spread = (jnp.expand_dims(jnp.asarray(x, jnp.float32), range(images.ndim - 1)) for x in (mean, std))
    return (images.astype(jnp.float32) / 255 - centre) / spread


def drop_path(rng: jax.Array, *, rate: float, depth: int, batch: int) -> jax.Array:
    """Draws factors on the branches of each block and image, [depth, 2, B]: 0, or 1 / (1 - rate of the block).

    Stochastic depth (arXiv 1603.09382); rates rise linearly from 0 in the first block to
    `rate` in the last; attention and MLP have draws of their own.
    """
    kept = 1 - jnp.linspace(0.0, rate, depth)[:, None, None]
    return jax.random.bernoulli(rng, kept, (depth, 2, batch)).astype(jnp.float32) / kept


def take(tokens: Float[Array, "B N D"], idx: Int[Array, "B *K"]) -> Float[Array, "B *K D"]:
    """Takes the tokens of each image at its indices."""
    flat = jnp.take_along_axis(tokens, idx.reshape(idx.shape[0], -1, 1), axis=1)
    return flat.reshape(*idx.shape, tokens.shape[-1])


def gelu(x: jax.Array) -> jax.Array:
    """Computes the exact GELU, by erf in float32: `jax.nn.gelu` uses erfc, which takes twice the time on CPU."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


class QKV(nn.Module):
    """Computes queries, keys and values as one product, whose bias is left to attention."""

    init_scheme: Literal["normal", "fan_in"]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps x [B, K, D] to the product [B, K, 3D] and the bias [3D]."""
        width = x.shape[-1]
        kernel = self.param("kernel", kernel_init(self.init_scheme), (width, 3 * width))
        bias = self.param("bias", nn.initializers.zeros, (3 * width,))
        return x.astype(self.dtype) @ kernel.astype(self.dtype), bias


class Block(nn.Module):
    """Applies attention and an MLP, each after a LayerNorm and with a residual."""

    heads: int
    mlp_ratio: float
    init_scheme: Literal["normal", "fan_in"]
    dtype: jnp.dtype
    attend: Attend = attend_xla

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None = None, keep: jax.Array | None = None) -> jax.Array:
        """Maps tokens x [B, K, D] to the same shape; those that are not valid [B, K] are not attended to.

        keep [2, B] are factors on the outputs of attention and MLP.
        """
        width = x.shape[-1]

        def dense(features, name):
            return nn.Dense(features, dtype=self.dtype, kernel_init=kernel_init(self.init_scheme), name=name)

        def scaled(branch, number):
            if keep is None:
                return branch
            return (branch.astype(jnp.float32) * keep[number, :, None, None]).astype(branch.dtype)

        y = layer_norm(x, name="norm1")
        qkv, bias = QKV(self.init_scheme, self.dtype, name="qkv")(y)
        self.sow("intermediates", "queries_and_keys", split_heads(qkv, bias, self.heads)[:2])  # where it is mutable
        # Parameters are drawn on a single sequence, which devices cannot share.
        attend = attend_xla if self.is_initializing() else self.attend
        x = x + scaled(dense(width, "proj")(attend(qkv, bias, valid, heads=self.heads)), 0)

        y = layer_norm(x, name="norm2")
        y = gelu(dense(round(width * self.mlp_ratio), "fc1")(y))
        return x + scaled(dense(width, "fc2")(y), 1)


class Layers(NamedTuple):
    """How a stack of blocks is computed; its parameters, and what it computes, are the same for all."""

    scanned: bool  # one compiled block in a loop, rather than `depth` of them
    remat: Literal["none", "dots", "full"]  # what the backward pass computes anew: nothing, all but Dense outputs, all
    gather: Callable[[PyTree], PyTree] | None = None  # makes a block's parameters whole; anew on the way back
    attend: Attend = attend_xla


def apply_blocks(
    module: nn.Module,
    make: Callable[..., Block],
    depth: int,
    layers: Layers,
    x: jax.Array,
    valid: jax.Array | None,
    keep: jax.Array | None = None,
) -> jax.Array:
    """Runs tokens x [B, K, D] through `depth` blocks, children of `module` by the names block00, block01, ...

    keep [depth, 2, B]: of `drop_path`. Unrolled, it sows what goes into the first block and what comes out of each into
    the collection "intermediates", as "blocks".
    """
    names = [f"block{i:02}" for i in range(depth)]
    if module.is_initializing():
        for name in names:
            x = make(name=name)(x, valid)
        return x

    def layer(x: jax.Array, params: PyTree, keep: jax.Array | None) -> jax.Array:
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


def exact(dtype: jax.typing.DTypeLike) -> contextlib.AbstractContextManager[Any]:
    """Keeps products of float32 exact where a model is float32; TPUs and GPUs would round their operands."""
    return jax.default_matmul_precision("highest") if jnp.dtype(dtype) == jnp.float32 else contextlib.nullcontext()


class Encoder(nn.Module):
    """Maps the patches of images, or some of them, to features."""

    size: Size
    grid: Grid
    init_scheme: Literal["normal", "fan_in"]
    dtype: jnp.dtype
    layers: Layers
    trained_grid: Grid | None = None  # where it differs from `grid`: positions are interpolated from this one's

    @nn.compact
    def __call__(
        self,
        patches: jax.Array,
        idx: jax.Array | None = None,
        valid: jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> jax.Array:
        """Maps patches [B, N, F] to features [B, N, D] float32; keep as `drop_path` gives it.

        With idx [B, K] only these patches are encoded, at their positions,
        giving [B, K, D]; valid [B, K] marks those that may be attended to.
        """
        trained = self.trained_grid or self.grid
        table = sincos_positions(self.size.width, trained)
        if self.grid != trained:
            table = interpolate_positions(table, trained, self.grid)
        positions = jnp.asarray(table)[None]
        if idx is not None:  # before the embedding: the same values, and nothing to scatter in the backward pass
            patches = take(patches, idx)
            positions = take(jnp.broadcast_to(positions, (len(idx), *positions.shape[1:])), idx)
        with exact(self.dtype):
            x = nn.Dense(self.size.width, dtype=self.dtype, kernel_init=kernel_init(self.init_scheme), name="embed")(
                patches
            )
            x = x + positions.astype(self.dtype)
            make = functools.partial(
                Block, self.size.heads, self.size.mlp_ratio, self.init_scheme, self.dtype, self.layers.attend
            )
            x = apply_blocks(self, make, self.size.depth, self.layers, x, valid, keep)
        return layer_norm(x, name="norm")


def build_encoder(
    model: Model,
    *,
    grid: Grid,
    gather: Callable[[PyTree], PyTree] | None = None,
    attend: Attend = attend_xla,
    trained_grid: Grid | None = None,
) -> Encoder:
    """Builds the encoder that a config describes; `trained_grid` is its grid in training, where that was another.

    Raises UserError for a size that does not exist, or too many patches.
    """
    size, layers = parse_size(model.size), Layers(model.layers == "scanned", model.remat, gather, attend)
    for some in (grid, trained_grid or grid):
        check_positions(size.width, some)
    return Encoder(size, grid, model.init, jnp.dtype(model.dtype), layers, trained_grid)
