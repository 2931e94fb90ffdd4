"""Multi-block masks, sampled on the device with static lengths.

Shapes: B images, M target blocks, N = rows * columns patches in raster order,
K_c context tokens (`context_tokens`), K_t target tokens (the largest
block that the settings can give).
"""

import dataclasses
import functools
import math
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cjepa_jax.config import Grid
from cjepa_jax.errors import require
from cjepa_jax.settings import setting

# Placements drawn for each image; the first that leaves min_keep context patches
# is taken, or else the one that leaves most. On 14x14 the first always does.
ATTEMPTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Multi-block masking; lengths are static, and a validity mask marks what is padding."""

    recipe: Literal["released", "corrected"] = setting(
        "released", "I-JEPA's code as released, or masking as its paper describes it."
    )
    targets: int = setting(4, "Blocks of an image that are predicted.", within="[2, 64]")
    target_scale: tuple[float, float] = setting((0.15, 0.2), "Share of the patches in a block.", within="(0, 1]")
    target_aspect: tuple[float, float] = setting((0.75, 1.5), "Height of a block over its width.", within="[0.01, 100]")
    context_scale: tuple[float, float] = setting(
        (0.85, 1.0),
        "Share of the patches in the context block, which is shaped like the image.",
        within="(0, 1]",
    )
    min_keep: int = setting(
        10,
        "The fewest context patches that an image may be left with; where none of eight draws leaves so many, the one "
        "that leaves most is taken.",
        within="[1, 65536]",
    )
    context_tokens: int = setting(
        56,
        "Static length of the context; 0: what an image is left with on average, rounded up to a multiple of 8.",
        within="[0, 65536]",
    )
    keep: Literal["random", "raster"] = setting("raster", "Which context tokens stay when there are more.")

    def __post_init__(self):
        require(
            self.context_tokens == 0 or self.context_tokens >= self.min_keep,
            f"mask.context_tokens must be at least mask.min_keep = {self.min_keep}, got {self.context_tokens}",
        )


class Masks(NamedTuple):
    """Indices into the N patches; where `valid` is False the index is padding and must have no influence."""

    context_idx: jax.Array  # [B, K_c] int32
    context_valid: jax.Array  # [B, K_c] bool
    target_idx: jax.Array  # [B, M, K_t] int32
    target_valid: jax.Array  # [B, M, K_t] bool


def sample_masks(rng: jax.Array, mask: Mask, *, grid: Grid, batch: int) -> Masks:
    """Draws target blocks of `batch` images, and as context the context block minus all target blocks.

    Source: for `corrected`, section 3 of I-JEPA (arXiv 2301.08243); for `released`, its released code, which draws
    the sizes once per step: one number sets the scale and the aspect ratio of all target blocks of the batch, a second
    one the scale of all context blocks. Raises UserError as `target_tokens` does.
    """
    length, patches = target_tokens(mask, grid), math.prod(grid)
    rng_size, rng_corner, rng_keep = jax.random.split(rng, 3)
    per_image = mask.recipe == "corrected"
    size = _size(rng_size, mask, grid, (batch if per_image else 1, mask.targets))
    size = jnp.broadcast_to(size, (batch, *size.shape[1:]))  # [B, M + 1, 2], the context block last

    # The released code excludes the end, so the last row and column are never reached.
    reach = jnp.asarray(grid, jnp.int32)[None, None] + (1 if per_image else 0)
    stop = (reach - size)[None]  # [1, B, M + 1, 2]: the same for every attempt
    uniform = jax.random.uniform(rng_corner, (ATTEMPTS, *size.shape))
    corner = jnp.minimum((uniform * stop.astype(jnp.float32)).astype(jnp.int32), stop - 1)  # it may round up to stop
    inside = _inside(corner, size[None], grid)  # [A, B, M + 1, N]
    context = inside[:, :, -1] & ~inside[:, :, :-1].any(axis=2)

    kept = context.sum(axis=-1)  # [A, B]
    turn = jnp.arange(ATTEMPTS)[:, None]
    choice = jnp.where(kept >= mask.min_keep, patches + ATTEMPTS - turn, kept).argmax(axis=0)
    images = jnp.arange(batch)
    corner, context = corner[choice, images], context[choice, images]

    target_idx, target_valid = _patches_of(corner[:, :-1], size[:, :-1], grid, length)
    if mask.keep == "random":
        rank = jax.random.uniform(rng_keep, context.shape)
    else:  # raster: the first ones stay, so it is the bottom of the image that is lost
        rank = jnp.broadcast_to(1.0 - jnp.arange(patches) / patches, context.shape)
    score, context_idx = jax.lax.top_k(jnp.where(context, rank, -1.0), context_tokens(mask, grid))
    context_valid = score >= 0
    return Masks(jnp.where(context_valid, context_idx, 0), context_valid, target_idx, target_valid)


def target_tokens(mask: Mask, grid: Grid) -> int:
    """Computes K_t, the patches of the largest block that the settings can give on rows x columns patches.

    Raises UserError where that grid cannot give the blocks or the context that
    the settings ask for.
    """
    name, patches = "x".join(map(str, grid)), math.prod(grid)
    require(
        min(_longest_sides(mask, grid)) >= 2,
        f"a grid of {name} patches is too small for masking: use smaller model.patch_size",
    )
    r = np.linspace(0, 1, 100_001, dtype=np.float32)  # as they are drawn: a product that is whole may be rounded down
    scale = _between(mask.target_scale, r)
    if mask.recipe == "corrected":  # every aspect ratio with the fewest and the most patches: sides grow with them
        scale = (np.floor(patches * np.array(mask.target_scale, np.float32))[:, None] + np.float32(0.5)) / patches
    height, width = _rectangle(mask, grid, scale, _between(mask.target_aspect, r), np)
    require(
        min(height.min(), width.min()) >= 1,
        f"mask.target_scale = {mask.target_scale} gives empty blocks on {name} patches: raise its start",
    )
    largest = _largest_context(mask, grid)
    # Of the length that follows from the blocks, only min_keep can be too large.
    require(
        mask.context_tokens > 0 or mask.min_keep <= largest,
        f"mask.min_keep = {mask.min_keep} is more than the largest context block on {name} patches holds: {largest}",
    )
    require(
        mask.context_tokens <= largest,
        f"mask.context_tokens = {mask.context_tokens} is more than the largest context block on {name} patches holds: "
        f"{largest}",
    )
    return int((height * width).max())


@functools.lru_cache
def context_tokens(mask: Mask, grid: Grid) -> int:
    """Gives K_c, the static length of the context on rows x columns patches.

    Where mask.context_tokens is 0, it is the mean number of context patches that the recipe leaves of an image, rounded
    up to a multiple of 8, but at least mask.min_keep and at most the largest context block. Shorter contexts are
    padded, and longer ones lose patches.
    """
    if mask.context_tokens:
        return mask.context_tokens
    r = (np.arange(64) + 0.5) / 64
    # The released code draws one number for scale and aspect ratio of all target blocks of an image.
    released = mask.recipe == "released"
    scale, aspect = (r, r) if released else (x.reshape(-1) for x in np.meshgrid(r, r))
    inside = _coverage(mask, grid, _between(mask.target_scale, scale), _between(mask.target_aspect, aspect))
    outside = ((1 - inside) ** mask.targets).mean(axis=0) if released else (1 - inside.mean(axis=0)) ** mask.targets
    context = _coverage(mask, grid, _between(mask.context_scale, r), np.full(len(r), _context_aspect(grid))).mean(
        axis=0
    )
    mean = int(np.ceil((context * outside).sum() / 8)) * 8
    return max(mask.min_keep, min(mean, _largest_context(mask, grid)))


def _context_aspect(grid: Grid) -> float:
    """Gives height over width of the context block, which are the grid's, so that it can cover the whole image."""
    rows, columns = grid
    return rows / columns


def _largest_context(mask: Mask, grid: Grid) -> int:
    """Gives the patches of the largest context block."""
    height, width = _rectangle(mask, grid, np.array(mask.context_scale[1:]), _context_aspect(grid), np)
    return int(height[0] * width[0])


def _coverage(mask: Mask, grid: Grid, scale: np.ndarray, aspect: np.ndarray) -> np.ndarray:
    """Gives the probability that each patch lies in a block of given scale and aspect ratio [n]: [n, rows, columns]."""
    share = []
    for length, side in zip(grid, _rectangle(mask, grid, scale, aspect, np), strict=True):
        patch = np.arange(length)
        corners = (length - side + (0 if mask.recipe == "released" else 1))[:, None]
        # Of the corners 0 ... corners - 1, how many let the side reach over the patch.
        share.append((np.minimum(patch, corners - 1) - np.maximum(patch - side[:, None], -1)).clip(0) / corners)
    return share[0][:, :, None] * share[1][:, None, :]


def _between(interval: tuple[float, float], r: Any) -> Any:
    return interval[0] + r * (interval[1] - interval[0])


def _longest_sides(mask: Mask, grid: Grid) -> Grid:
    """Gives the greatest height and width of a block; the released code cuts them to one less than the grid's."""
    rows, columns = grid
    return (rows - 1, columns - 1) if mask.recipe == "released" else grid


def _rectangle(mask: Mask, grid: Grid, scale: Any, aspect: Any, xp: ModuleType) -> tuple[Any, Any]:
    """Maps a share of the patches and an aspect ratio to height and width in patches."""
    patches = xp.floor(math.prod(grid) * scale)
    height, width = xp.round(xp.sqrt(patches * aspect)), xp.round(xp.sqrt(patches / aspect))
    highest, widest = _longest_sides(mask, grid)
    return xp.minimum(height, highest).astype(np.int32), xp.minimum(width, widest).astype(np.int32)


def _size(rng: jax.Array, mask: Mask, grid: Grid, shape: tuple[int, int]) -> jax.Array:
    """Draws height and width of M target blocks and a context block, [B, M + 1, 2] for shape (B, M)."""
    batch, targets = shape
    r = jax.random.uniform(rng, (2, batch, targets + 1))
    target_scale, target_aspect = r[0, :, :-1], r[1, :, :-1]
    if mask.recipe == "released":  # one number for all target blocks, and for both their scale and aspect
        target_scale = target_aspect = jnp.broadcast_to(r[0, :, :1], target_scale.shape)
    scale = [_between(mask.target_scale, target_scale), _between(mask.context_scale, r[0, :, -1:])]
    aspect = [_between(mask.target_aspect, target_aspect), jnp.full((batch, 1), _context_aspect(grid))]
    sides = _rectangle(mask, grid, jnp.concatenate(scale, axis=1), jnp.concatenate(aspect, axis=1), jnp)
    return jnp.stack(sides, axis=-1)


def _inside(corner: jax.Array, size: jax.Array, grid: Grid) -> jax.Array:
    """Tells of blocks [..., 2] whether each patch lies inside, [..., N] bool."""
    patch = jnp.stack(jnp.divmod(jnp.arange(math.prod(grid)), grid[1]), axis=-1)  # [N, 2]: row and column
    corner, size = corner[..., None, :], size[..., None, :]
    patch = jnp.expand_dims(patch, range(corner.ndim - 2))
    return ((patch >= corner) & (patch < corner + size)).all(axis=-1)


def _patches_of(corner: jax.Array, size: jax.Array, grid: Grid, length: int) -> tuple[jax.Array, jax.Array]:
    """Lists the patches of blocks [..., 2] in raster order, padded with 0, and validity, both [..., length]."""
    (top, left), (height, width) = (jnp.split(x, 2, axis=-1) for x in (corner, size))
    row, column = jnp.divmod(jnp.expand_dims(jnp.arange(length), range(width.ndim - 1)), width)
    valid = row < height
    return jnp.where(valid, (top + row) * grid[1] + left + column, 0), valid
