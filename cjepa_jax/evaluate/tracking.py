"""Masks propagated through a video by the similarity of patch features, and how good they are.

The propagation is that of Jabri et al. (arXiv 2006.14613) with the settings of DINO
(arXiv 2104.14294); J and F are those of the DAVIS challenge (Perazzi et al., CVPR 2016;
Pont-Tuset et al., arXiv 1704.00675).

Shapes: N patches of a frame in raster order, D width, K labels (background and
objects), M frames in memory, T frames of a video, H x W pixels.
"""

import math
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from cjepa_jax.evaluate.sets import unit

# DINO's, for all its networks.
CONTEXT_FRAMES = 7  # the last ones; the first frame, whose mask is given, is always there too
RADIUS = 12  # patches to each side of a patch's place where its neighbours may lie
NEIGHBOURS = 5
TEMPERATURE = 0.1
# The challenge's.
TOLERANCE = 0.008  # of the image's diagonal, in matching boundaries
VOID = 255  # counts as background


class Memory(NamedTuple):
    """The frames that labels come from: the first one, then the last CONTEXT_FRAMES, the newest at the end."""

    features: jax.Array  # [M, N, D], of length 1
    labels: jax.Array  # [M, N, K], the share of each label
    valid: jax.Array  # [M], which of them there are yet


def remember(features: jax.Array, labels: jax.Array) -> Memory:
    """Makes the memory after the first frame: features [N, D], labels [N, K]."""
    frames = 1 + CONTEXT_FRAMES
    return Memory(jnp.tile(unit(features), (frames, 1, 1)), jnp.tile(labels, (frames, 1, 1)), jnp.arange(frames) == 0)


def propagate(memory: Memory, features: jax.Array, *, columns: int) -> tuple[jax.Array, Memory]:
    """Gives the labels [N, K] of the next frame from its features [N, D], and the memory with this frame.

    A patch has the mean label of its most similar patches in memory, weighted by
    exp(cosine / TEMPERATURE). `columns`: patches in a row.
    """
    features = unit(features)
    row, column = jnp.divmod(jnp.arange(len(features)), columns)
    near = (abs(row[:, None] - row[None]) <= RADIUS) & (abs(column[:, None] - column[None]) <= RADIUS)
    cosine = jnp.einsum("nd,msd->nms", features, memory.features, precision="highest")
    cosine = jnp.where(near[:, None, :] & memory.valid[None, :, None], cosine, -jnp.inf)
    best, idx = jax.lax.top_k(rearrange(cosine, "n m s -> n (m s)"), NEIGHBOURS)
    weights = jax.nn.softmax(best / TEMPERATURE, axis=-1)
    labels = jnp.einsum("nb,nbk->nk", weights, rearrange(memory.labels, "m s k -> (m s) k")[idx])

    def newest(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([old[:1], old[2:], new[None]])

    return labels, Memory(*map(newest, memory, (features, labels, jnp.bool_(True))))


def segment(labels: jax.Array, *, columns: int, patch_size: int) -> jax.Array:
    """Gives the label of each pixel [H, W] int32 from the labels of patches [N, K].

    Each label's map is enlarged bilinearly and stretched to [0, 1] before the
    largest one is taken, as DINO does: an object that faded is not lost.
    """
    maps = rearrange(labels, "(h w) k -> h w k", w=columns)
    height, width, count = maps.shape
    maps = jax.image.resize(maps, (height * patch_size, width * patch_size, count), "bilinear")
    low, high = (f(axis=(0, 1), keepdims=True) for f in (maps.min, maps.max))
    return jnp.argmax(jnp.where(high > low, (maps - low) / (high - low), maps), axis=-1)


def region_similarity(found: np.ndarray, truth: np.ndarray) -> float:
    """Computes J, the intersection over union of two masks [H, W] bool; 1 where both are empty."""
    union = np.sum(found | truth)
    return float(np.sum(found & truth) / union) if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Marks the pixels [H, W] that differ from their right, lower or lower right neighbour."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def boundary_accuracy(found: np.ndarray, truth: np.ndarray) -> float:
    """Computes F, the harmonic mean of precision and recall of the boundaries of two masks [H, W] bool.

    A boundary pixel is right where the other boundary is within TOLERANCE. An
    empty boundary has precision or recall 1; where both are empty, F is 1.
    """
    reach = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= reach**2).astype(np.uint8)
    edges = boundary(found), boundary(truth)
    near = [cv2.dilate(edge.astype(np.uint8), disk).astype(bool) for edge in edges]
    precision, recall = (
        float(edge[other].sum() / edge.sum()) if edge.any() else 1.0
        for edge, other in zip(edges, reversed(near), strict=True)
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def score(found: np.ndarray, truth: np.ndarray) -> dict[str, list[float]]:
    """Computes J and F of each object, 1, 2, ... of the first frame, as means over all frames but first and last.

    found, truth: labels of the pixels [T, H, W], T at least 3. A frame without
    boundaries of its own in one of the two has F = 0, in both 1.
    """
    truth = np.where(truth == VOID, 0, truth)
    measures = {"J": region_similarity, "F": boundary_accuracy}
    return {
        name: [
            float(np.mean([measure(f == k, t == k) for f, t in zip(found[1:-1], truth[1:-1], strict=True)]))
            for k in range(1, int(truth[0].max()) + 1)
        ]
        for name, measure in measures.items()
    }
