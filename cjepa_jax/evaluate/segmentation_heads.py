"""Heads that segment images, on frozen features of patches: mathematics.

Shapes: B images of a batch, h x w patches (N = h w) of D features, H x W pixels, C classes.
"""

import functools
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jaxtyping import Array, Float, Int, PyTree

from cjepa_jax.config import Grid
from cjepa_jax.evaluate.linear_grid import EPS, Norm

WARMUP = 0.0375  # share of the steps: 1,500 of 40,000, as in DINOv2
_HIDDEN = 256  # channels between convolutions
ROWS = 32  # of an image, whose logits are there at once


class Head(nn.Module):
    """Maps normalised features of patches to logits: some 3 x 3 convolutions with ReLU, and a linear layer."""

    classes: int
    convolutions: int

    @nn.compact
    def __call__(self, maps: Float[Array, "B h w D"]) -> Float[Array, "B h w C"]:
        """Computes the logits of the patches."""
        for _ in range(self.convolutions):
            maps = nn.relu(nn.Conv(_HIDDEN, (3, 3))(maps))
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01))(maps)


class State(NamedTuple):
    """A head in training: its parameters, the batch norm before it, and the optimizer's state."""

    params: PyTree
    norm: Norm
    moments: Any


def adamw(steps: int, *, learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    """Makes AdamW whose rate rises linearly in the first `WARMUP` of the steps, and then falls linearly to zero."""
    rising = max(1, round(WARMUP * steps))
    falling = optax.linear_schedule(learning_rate, 0.0, steps + 1 - rising)
    rates = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, rising), falling], [rising])
    return optax.adamw(lambda count: rates(count + 1), weight_decay=weight_decay)  # no step has the rate zero


def init(head: Head, *, width: int, optimizer: optax.GradientTransformation, rng: jax.Array) -> State:
    """Starts a head on features of a width."""
    params = head.init(rng, jnp.zeros((1, 1, 1, width)))["params"]
    return State(params, Norm(jnp.zeros(()), jnp.zeros(width), jnp.zeros(width)), optimizer.init(params))


def bilinear(large: int, small: int) -> Float[np.ndarray, "large small"]:
    """Computes the weights by which `large` pixels are interpolated from `small` ones.

    It is PyTorch's `interpolate(mode="bilinear", align_corners=False)` along one axis.
    """
    place = ((np.arange(large) + 0.5) * small / large - 0.5).clip(0, small - 1)
    return np.maximum(0, 1 - abs(place[:, None] - np.arange(small))).astype(np.float32)


def _widened(maps: Float[Array, "B h w C"], columns: Float[Array, "B W w"]) -> Float[Array, "B h W C"]:
    return jnp.einsum("bhwc,bxw->bhxc", maps, columns, precision="highest")


def _heightened(maps: Float[Array, "B h W C"], rows: Float[Array, "B H h"]) -> Float[Array, "B H W C"]:
    return jnp.einsum("bhxc,byh->byxc", maps, rows, precision="highest")


def _maps(features: Float[Array, "B N D"], grid: Grid) -> Float[Array, "B h w D"]:
    return rearrange(features, "b (h w) d -> b h w d", h=grid[0])


def loss(
    params: PyTree, head: Head, normalised: Float[Array, "B h w D"], truth: Int[Array, "B H W"]
) -> Float[Array, ""]:
    """Computes the mean cross entropy of the pixels whose class is not negative; logits are enlarged bilinearly."""
    (b, height, width), (_, h, w, _) = truth.shape, normalised.shape
    rows, columns = (jnp.tile(bilinear(*sizes), (b, 1, 1)) for sizes in ((height, h), (width, w)))
    maps = cast(jax.Array, head.apply({"params": params}, normalised))
    logits = _heightened(_widened(maps, columns), rows)
    counted = truth >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(truth, 0).astype(jnp.int32))
    return jnp.where(counted, losses, 0).sum() / jnp.maximum(counted.sum(), 1).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("grid", "head", "optimizer"), donate_argnames="state")
def train_step(
    state: State,
    features: Float[Array, "B N D"],
    truth: Int[Array, "B H W"],
    *,
    grid: Grid,
    head: Head,
    optimizer: optax.GradientTransformation,
) -> tuple[State, Float[Array, ""]]:
    """Takes one step behind a batch norm without affine parameters; gives the loss before it, too."""
    count = jnp.float32(features.shape[0] * features.shape[1])
    mean = features.mean(axis=(0, 1))
    squares = jnp.square(features - mean[None, None]).sum(axis=(0, 1))
    normalised = _maps((features - mean[None, None]) * jax.lax.rsqrt(squares / count + EPS)[None, None], grid)
    value, grads = jax.value_and_grad(loss)(state.params, head, normalised, truth)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and integers
        updates, moments = optimizer.update(grads, state.moments, state.params)
    return State(optax.apply_updates(state.params, updates), state.norm.joined(count, mean, squares), moments), value


@functools.partial(jax.jit, static_argnames=("grid", "head"))
def predict(
    state: State,
    features: Float[Array, "B N D"],
    rows: Float[Array, "B H h"],
    columns: Float[Array, "B W w"],
    *,
    grid: Grid,
    head: Head,
) -> Int[Array, "B H W"]:
    """Finds the class of each pixel of images that are enlarged by weights of `bilinear`; int16.

    The batch norm is that of all features seen in training. H must be a multiple of ROWS.
    """
    norm = state.norm
    scale = jax.lax.rsqrt(norm.squares / norm.images + EPS)
    normalised = _maps((features - norm.mean[None, None]) * scale[None, None], grid)
    maps = _widened(cast(jax.Array, head.apply({"params": state.params}, normalised)), columns)

    def some(rows: Float[Array, "B r h"]) -> Int[Array, "B r W"]:
        return _heightened(maps, rows).argmax(axis=-1).astype(jnp.int16)

    parts = jax.lax.map(some, rearrange(rows, "b (n r) h -> n b r h", r=ROWS))  # bounds the logits
    return rearrange(parts, "n b r w -> b (n r) w")


def confusion(truth: Int[np.ndarray, "H W"], found: Int[np.ndarray, "H W"], classes: int) -> Int[np.ndarray, "C C"]:
    """Counts the pixels of each class (rows) by the class that was found (columns); a negative class does not count."""
    counted = truth >= 0
    both = truth[counted].astype(np.int64) * classes + found[counted]
    return np.bincount(both, minlength=classes**2).reshape(classes, classes)


def scores(matrix: Int[np.ndarray, "C C"]) -> tuple[float, float, list[float | None]]:
    """Computes the mean IoU, the share of pixels that are right, and the IoU of each class, all in [0, 1].

    A class that is neither there nor found has no IoU, and is left out of the mean.
    """
    right = np.diag(matrix)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - right
    each = [float(r / u) if u else None for r, u in zip(right, union, strict=True)]
    return float(np.mean([iou for iou in each if iou is not None])), float(right.sum() / matrix.sum()), each
