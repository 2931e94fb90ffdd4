"""Propagation, J and F against their definitions in float64 loops, and on scenes whose answer is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cjepa_jax.evaluate import tracking

ROWS, COLUMNS = 3, 30  # wider than the neighbourhood, so that it cuts


def reference(features, first):
    """Labels of all frames after the first, as the method is written: thresholded affinities, frame by frame."""
    n = ROWS * COLUMNS
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    known = [first]
    for t in range(1, len(features)):
        context = [0, *range(max(1, t - 7), t)]
        labels = np.zeros_like(first)
        for i in range(n):
            affinities = []
            for s in context:
                for j in range(n):
                    if abs(i // COLUMNS - j // COLUMNS) <= 12 and abs(i % COLUMNS - j % COLUMNS) <= 12:
                        affinities.append((math.exp(unit[t, i] @ unit[s, j] / 0.1), s, j))
            best = sorted(affinities)[-5:]
            for affinity, s, j in best:
                labels[i] += affinity * known[s][j] / sum(a for a, *_ in best)
        known.append(labels)
    return known


def test_propagation_is_its_definition():
    """Twelve frames, so that old ones are forgotten; the neighbourhood and the first frame matter."""
    random = np.random.default_rng(0)
    features = random.normal(size=(12, ROWS * COLUMNS, 4))
    first = np.eye(3)[random.integers(0, 3, ROWS * COLUMNS)]
    expected = reference(features, first)
    features = features.astype(np.float32)
    memory = tracking.remember(features[0], jnp.asarray(first, jnp.float32))
    step = jax.jit(tracking.propagate, static_argnames="columns")
    for t in range(1, len(features)):
        labels, memory = step(memory, features[t], columns=COLUMNS)
        np.testing.assert_allclose(labels, expected[t], atol=2e-5)


def test_segments_are_enlarged_as_pytorch_does():
    random = np.random.default_rng(0)
    labels = random.random((6, 4, 3)).astype(np.float32) * [1, 0.1, 0.01]  # each stretched to [0, 1]
    large = torch.nn.functional.interpolate(
        torch.tensor(labels).permute(2, 0, 1)[None], scale_factor=8, mode="bilinear", align_corners=False
    )[0].numpy()
    low, high = large.min(axis=(1, 2), keepdims=True), large.max(axis=(1, 2), keepdims=True)
    expected = np.argmax((large - low) / (high - low), axis=0)
    found = tracking.segment(jnp.asarray(labels.reshape(24, 3), jnp.float32), columns=4, patch_size=8)
    assert (np.asarray(found) == expected).mean() > 0.999 and len(np.unique(expected)) == 3  # but for rounding


@pytest.mark.parametrize("left, right", [(0, 0), (0, 1), (1, 1)])
def test_a_label_that_is_everywhere_or_nowhere(left, right):
    """Its map has nothing to stretch."""
    labels = jnp.eye(3)[jnp.array([left, right, left, right])]
    expected = np.array([[left] * 4 + [right] * 4] * 8)
    np.testing.assert_array_equal(tracking.segment(labels, columns=2, patch_size=4), expected)


def square(top, left, side=10, shape=(48, 64)):
    mask = np.zeros(shape, bool)
    mask[top : top + side, left : left + side] = True
    return mask


EMPTY = np.zeros((48, 64), bool)


@pytest.mark.parametrize(
    "found, truth, expected",
    [
        (square(5, 5), square(5, 5), 1),
        (square(5, 10), square(5, 5), 50 / 150),
        (square(7, 8), square(5, 5), 8 * 7 / (200 - 8 * 7)),
        (square(5, 5, side=5), square(5, 5), 25 / 100),
        (square(5, 30), square(5, 5), 0),
        (EMPTY, square(5, 5), 0),
        (EMPTY, EMPTY, 1),
    ],
)
def test_j_by_hand(found, truth, expected):
    assert tracking.region_similarity(found, truth) == pytest.approx(expected)


def brute_force_f(found, truth):
    """Each boundary pixel and its distance to every pixel of the other boundary."""

    def pixels(mask):
        height, width = mask.shape
        edge = []
        for y in range(height):
            for x in range(width):
                right, below = min(x + 1, width - 1), min(y + 1, height - 1)
                if len({mask[y, x], mask[y, right], mask[below, x], mask[below, right]}) > 1:
                    edge.append((y, x))
        return np.array(edge, float).reshape(-1, 2)

    reach = math.ceil(0.008 * math.sqrt(sum(side**2 for side in truth.shape)))
    edges = pixels(found), pixels(truth)
    if not len(edges[0]) or not len(edges[1]):
        return float(len(edges[0]) == len(edges[1]))
    distances = np.linalg.norm(edges[0][:, None] - edges[1], axis=-1)
    precision, recall = ((distances.min(axis=a) <= reach).mean() for a in (1, 0))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blob(random, shape):
    """A smooth random region, which may touch the borders."""
    field = np.fft.irfft2(np.fft.rfft2(random.normal(size=shape)) * np.exp(-((np.arange(shape[1] // 2 + 1) / 5) ** 2)))
    return np.cumsum(field, axis=0) > 0


def test_f_is_its_definition():
    random = np.random.default_rng(0)
    values = []
    for shape in ((40, 60), (150, 210), (210, 150)):  # within 1 and 3 pixels
        truth = blob(random, shape)
        others = [blob(random, shape), np.roll(truth, 1, axis=1), np.roll(truth, (2, 3), axis=(0, 1)), ~truth]
        for found in [truth, *others, np.zeros(shape, bool), np.ones(shape, bool)]:
            values.append(tracking.boundary_accuracy(found, truth))
            assert values[-1] == pytest.approx(brute_force_f(found, truth), abs=1e-12)
            assert tracking.boundary_accuracy(truth, found) == pytest.approx(values[-1], abs=1e-12)
    assert len(set(np.round(values, 3))) >= 8


@pytest.mark.parametrize("shift, expected", [(0, 1.0), (1, 1.0), (2, 0.5)])
def test_f_by_hand(shift, expected):
    """Stripes of full width, in 48 x 64 pixels: within ceil(0.008 x 80) = 1 pixel, here of one of two edges."""
    truth, found = EMPTY.copy(), EMPTY.copy()
    truth[10:30], found[10 + shift : 30] = True, True
    assert tracking.boundary_accuracy(found, truth) == pytest.approx(expected)


def test_f_of_nothing():
    assert tracking.boundary_accuracy(EMPTY, EMPTY) == 1
    assert tracking.boundary_accuracy(EMPTY, square(5, 5)) == tracking.boundary_accuracy(square(5, 5), EMPTY) == 0


def test_scores_are_means_over_the_frames_between():
    """Two objects; void counts as background; the first and the last frame do not count."""
    truth = np.zeros((4, 48, 64), np.uint8)
    truth[:, 5:15, 5:15], truth[:, 30:40, 30:40] = 1, 2
    truth[:, 44:, :] = tracking.VOID
    found = np.where(truth == tracking.VOID, 0, truth)
    found[[0, 3]] = 0
    assert tracking.score(found, truth) == {"J": [1, 1], "F": [1, 1]}
    found[2, 5:15, 5:15] = 0
    found[2, 5:10, 5:15] = 1
    found[1, 44:, :] = 2
    scores = tracking.score(found, truth)
    assert scores["J"] == pytest.approx([(1 + 0.5) / 2, (100 / (100 + 4 * 64) + 1) / 2])
    assert scores["F"][0] == pytest.approx((1 + brute_force_f(found[2] == 1, truth[2] == 1)) / 2)
