"""Random erasing, mixup and cutmix on the devices; every image has its own draws.

Shapes: B images [B, H, W, C] float32, L classes; targets [B, L] are probabilities.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

_ERASED = 0.02, 1 / 3  # share of the image (timm's, as MAE uses it)
_ASPECT = 0.3  # and aspect ratio, from this to its inverse
_TRIES = 10  # to draw a rectangle that fits


class Box(NamedTuple):
    """A rectangle in each image, int32 [B]: rows top <= y < bottom, columns left <= x < right."""

    top: jax.Array
    left: jax.Array
    bottom: jax.Array
    right: jax.Array

    def mask(self, height: int, width: int) -> jax.Array:
        """Tells of each pixel [B, height, width] whether it lies inside."""
        row, column = jnp.arange(height)[None], jnp.arange(width)[None]
        rows = (row >= self.top[:, None]) & (row < self.bottom[:, None])
        columns = (column >= self.left[:, None]) & (column < self.right[:, None])
        return rows[:, :, None] & columns[:, None, :]

    def area(self) -> jax.Array:
        """Counts the pixels of each rectangle, [B] int32."""
        return (self.bottom - self.top) * (self.right - self.left)


def _offset(rng: jax.Array, room: jax.Array) -> jax.Array:
    """Draws uniformly from 0 ... room, int32 [B]."""
    draw = jnp.floor(jax.random.uniform(rng, room.shape) * (room + 1).astype(jnp.float32)).astype(jnp.int32)
    return jnp.minimum(draw, room)


def erased_box(rng: jax.Array, *, batch: int, height: int, width: int) -> Box:
    """Draws a rectangle in each image for random erasing (arXiv 1708.04896), empty where none of ten draws fits."""
    rng_area, rng_aspect, rng_top, rng_left = jax.random.split(rng, 4)
    area = jax.random.uniform(rng_area, (_TRIES, batch), minval=_ERASED[0], maxval=_ERASED[1]) * (height * width)
    bound = math.log(_ASPECT)
    aspect = jnp.exp(jax.random.uniform(rng_aspect, (_TRIES, batch), minval=bound, maxval=-bound))
    h, w = (jnp.round(jnp.sqrt(x)).astype(jnp.int32) for x in (area * aspect, area / aspect))
    fits = (h < height) & (w < width)
    first = fits.argmax(axis=0)[None]
    h, w = (jnp.take_along_axis(jnp.where(fits, x, 0), first, axis=0)[0] for x in (h, w))
    top, left = _offset(rng_top, height - h), _offset(rng_left, width - w)
    return Box(top, left, top + h, left + w)


def erase(rng: jax.Array, images: jax.Array, *, probability: float) -> jax.Array:
    """Fills a random rectangle of some of the (normalised) images with standard normal noise."""
    if not probability:
        return images
    rng_box, rng_which, rng_noise = jax.random.split(rng, 3)
    batch, height, width, _ = images.shape
    box = erased_box(rng_box, batch=batch, height=height, width=width)
    which = jax.random.bernoulli(rng_which, probability, (batch,))
    inside = box.mask(height, width) & which[:, None, None]
    return jnp.where(inside[..., None], jax.random.normal(rng_noise, images.shape), images)


def cut_box(rng: jax.Array, share: jax.Array, *, height: int, width: int) -> Box:
    """Rectangles of cutmix (arXiv 1905.04899): sides sqrt(1 - share [B]) of the image's, cut off at its border."""
    side = jnp.sqrt(1 - share)
    rng_y, rng_x = jax.random.split(rng)

    def ends(rng: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
        centre = _offset(rng, jnp.full(share.shape, length - 1))
        half = (side * length).astype(jnp.int32) // 2
        return jnp.maximum(centre - half, 0), jnp.minimum(centre + half, length)

    (top, bottom), (left, right) = ends(rng_y, height), ends(rng_x, width)
    return Box(top, left, bottom, right)


def mix(
    rng: jax.Array, images: jax.Array, targets: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes image b and its target with those of image B - 1 - b, by mixup (arXiv 1710.09412) or by cutmix.

    The weight of image b is drawn from a beta distribution with both parameters `mixup`; in cutmix it is the share of
    the pixels outside of the rectangle. Where both are on, each image gets either with probability 0.5. Gives images
    [B, H, W, C] and targets [B, L].
    """
    if not (mixup or cutmix):
        return images, targets
    rng_which, rng_mixup, rng_cutmix, rng_box = jax.random.split(rng, 4)
    batch, height, width, _ = images.shape
    cut = jax.random.bernoulli(rng_which, 0.5 if mixup and cutmix else float(cutmix > 0), (batch,))
    share, weight = jnp.ones(batch), jnp.ones((batch, height, width))
    if mixup:
        share = jax.random.beta(rng_mixup, mixup, mixup, (batch,))
        weight = jnp.broadcast_to(share[:, None, None], weight.shape)
    if cutmix:
        box = cut_box(rng_box, jax.random.beta(rng_cutmix, cutmix, cutmix, (batch,)), height=height, width=width)
        share = jnp.where(cut, 1 - box.area().astype(jnp.float32) / (height * width), share)
        own = 1 - box.mask(height, width).astype(jnp.float32)
        weight = jnp.where(cut[:, None, None], own, weight)
    weight, share = weight[..., None], share[:, None]
    return weight * images + (1 - weight) * images[::-1], share * targets + (1 - share) * targets[::-1]
