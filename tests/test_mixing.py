"""Erasing, mixup, cutmix, drop path and soft labels against plain formulas, NumPy draws and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import torch

from cjepa_jax.config import Model
from cjepa_jax.methods import mixing
from cjepa_jax.models.vit import build_encoder, drop_path

MANY = 4000


def images_of_their_number(count: int, side: int) -> jax.Array:
    """Image i holds i everywhere."""
    return jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None, None, None], (count, side, side, 1))


def is_rectangle(mask: np.ndarray) -> bool:
    rows, columns = mask.any(axis=1), mask.any(axis=0)
    filled = np.outer(rows, columns)
    contiguous = all(np.diff(np.flatnonzero(x)).max(initial=1) == 1 for x in (rows, columns))
    return bool((mask == filled).all()) and contiguous


def erased_by_the_book(rng: np.random.Generator, height: int, width: int) -> tuple[int, int]:
    """Sides as random erasing's paper and timm draw them; (0, 0) after ten failures."""
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if h < height and w < width:
            return h, w
    return 0, 0


def test_erased_boxes_have_the_published_distribution():
    height, width = 24, 16
    box = mixing.erased_box(jax.random.key(0), batch=MANY, height=height, width=width)
    top, left, bottom, right = (np.asarray(x) for x in box)
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= height).all() and (right <= width).all()
    assert top.min() == 0 and bottom.max() == height and left.min() == 0 and right.max() == width
    rng = np.random.default_rng(0)
    h, w = np.array([erased_by_the_book(rng, height, width) for _ in range(MANY)]).T
    for ours, theirs in ((bottom - top, h), (right - left, w)):
        assert scipy.stats.ks_2samp(ours, theirs).pvalue > 1e-3
    room = height - (bottom - top)
    assert scipy.stats.kstest((top + 0.5) / (room + 1), "uniform").pvalue > 1e-6  # in steps: roughly uniform
    assert abs(np.mean(top / room) - 0.5) < 0.02


def test_erasing_fills_a_rectangle_of_some_images_with_noise():
    count = 1000
    images = jnp.full((count, 12, 12, 3), 7.0)
    erased = np.asarray(mixing.erase(jax.random.key(1), images, probability=0.25))
    changed = (erased != 7).all(axis=-1)
    assert (changed == (erased != 7).any(axis=-1)).all()
    hit = changed.any(axis=(1, 2))
    assert abs(hit.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / count)
    assert all(is_rectangle(mask) for mask in changed[hit])
    noise = erased[changed]
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size) and abs(noise.std() - 1) < 0.05
    assert mixing.erase(jax.random.key(1), images, probability=0.0) is images


def test_mixup_draws_its_share_from_the_beta_distribution():
    count = MANY
    targets = jax.nn.one_hot(jnp.arange(count), count)
    mixed, soft = mixing.mix(jax.random.key(2), images_of_their_number(count, 2), targets, mixup=0.8, cutmix=0.0)
    own, other = np.arange(count), np.arange(count)[::-1]
    share = np.asarray(soft)[own, own]
    np.testing.assert_allclose(np.asarray(soft)[own, other], 1 - share, atol=1e-6)
    expected = share * own + (1 - share) * other
    np.testing.assert_allclose(mixed, np.broadcast_to(expected[:, None, None, None], mixed.shape), atol=2e-3)
    assert scipy.stats.kstest(share, scipy.stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def cut_by_the_book(rng: np.random.Generator, height: int, width: int) -> float:
    """The share that cutmix' published rectangle leaves, for alpha = 1."""
    ratio = np.sqrt(1 - rng.beta(1, 1))
    h, w = int(height * ratio), int(width * ratio)
    y, x = rng.integers(height), rng.integers(width)
    rows = min(y + h // 2, height) - max(y - h // 2, 0)
    columns = min(x + w // 2, width) - max(x - w // 2, 0)
    return 1 - rows * columns / (height * width)


def test_cutmix_takes_a_rectangle_of_the_other_image():
    count, side = MANY, 16
    targets = jax.nn.one_hot(jnp.arange(count), count)
    mixed, soft = mixing.mix(jax.random.key(3), images_of_their_number(count, side), targets, mixup=0.0, cutmix=1.0)
    own, other = np.arange(count), np.arange(count)[::-1]
    from_other = np.asarray(mixed)[..., 0] == other[:, None, None]
    assert (from_other | (np.asarray(mixed)[..., 0] == own[:, None, None])).all()
    assert all(is_rectangle(mask) for mask in from_other[:500] if mask.any())
    share = 1 - from_other.mean(axis=(1, 2))
    np.testing.assert_allclose(np.asarray(soft)[own, own], share, atol=1e-6)
    np.testing.assert_allclose(np.asarray(soft)[own, other], 1 - share, atol=1e-6)
    rng = np.random.default_rng(0)
    theirs = [cut_by_the_book(rng, side, side) for _ in range(MANY)]
    assert scipy.stats.ks_2samp(share, theirs).pvalue > 1e-3


def test_mixup_and_cutmix_share_the_images():
    count = 2000
    targets = jax.nn.one_hot(jnp.arange(count), count)
    mixed, soft = mixing.mix(jax.random.key(4), images_of_their_number(count, 8), targets, mixup=0.8, cutmix=1.0)
    np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-6)
    flat = np.asarray(mixed).reshape(count, -1)
    cut = np.isin(flat, (0, *range(count))).all(axis=1)  # whole numbers only
    assert abs(cut.mean() - 0.5) < 4 * np.sqrt(0.25 / count)
    expected = np.asarray(soft) @ np.arange(count)  # of image i mixed by its target's shares
    np.testing.assert_allclose(flat.mean(axis=1), expected, rtol=1e-3, atol=1e-2)


def test_smoothed_mixed_labels_and_their_loss_are_those_of_torch():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(16, 7)).astype(np.float32), rng.integers(0, 7, 16)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 7), 0.1)
    theirs = torch.tensor(logits, dtype=torch.float64)
    ours = optax.softmax_cross_entropy(logits, targets).mean()
    expected = torch.nn.functional.cross_entropy(theirs, torch.tensor(labels), label_smoothing=0.1)
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)
    _, soft = mixing.mix(jax.random.key(5), jnp.zeros((16, 4, 4, 1)), targets, mixup=0.8, cutmix=1.0)
    ours = optax.softmax_cross_entropy(logits, soft).mean()
    expected = torch.nn.functional.cross_entropy(theirs, torch.tensor(np.asarray(soft), dtype=torch.float64))
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)


def test_drop_path_drops_at_rates_that_rise_linearly_and_keeps_the_mean():
    keep = np.asarray(drop_path(jax.random.key(6), rate=0.3, depth=4, batch=MANY))
    assert keep.shape == (4, 2, MANY)
    for block, rate in enumerate((0.0, 0.1, 0.2, 0.3)):
        np.testing.assert_allclose(np.unique(keep[block]), [0, 1 / (1 - rate)] if rate else [1], rtol=1e-6)
        assert abs((keep[block] == 0).mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / (2 * MANY))
    both = (keep[3] == 0).all(axis=0).mean()
    assert abs(both - 0.09) < 0.02  # the two branches have draws of their own


@pytest.mark.parametrize("layers, remat", [("unrolled", "none"), ("scanned", "full"), ("unrolled", "dots")])
def test_dropped_branches_leave_the_residual_alone(layers, remat):
    """Image 0 keeps all, image 1 nothing, image 2 only the first block."""
    model = Model(size="16x2x2", patch_size=2, init="fan_in", dtype="float32", layers=layers, remat=remat)
    encoder = build_encoder(model, grid=(3, 3))
    patches = jax.random.normal(jax.random.key(0), (3, 9, 4))
    params = jax.jit(encoder.init)(jax.random.key(1), patches)
    apply = jax.jit(encoder.apply)
    whole = apply(params, patches)
    keep = jnp.ones((2, 2, 3)).at[:, :, 1].set(0).at[1, :, 2].set(0)
    dropped = apply(params, patches, keep=keep)
    np.testing.assert_allclose(dropped[0], whole[0], rtol=1e-6, atol=1e-6)
    first = {"params": {name: value for name, value in params["params"].items() if name != "block01"}}
    none = {"params": {name: value for name, value in first["params"].items() if name != "block00"}}
    for image, kept, depth in ((1, none, 0), (2, first, 1)):
        short = encoder.clone(size=encoder.size._replace(depth=depth), layers=encoder.layers._replace(scanned=False))
        np.testing.assert_allclose(dropped[image], jax.jit(short.apply)(kept, patches)[image], rtol=1e-5, atol=1e-6)
    doubled = apply(params, patches, keep=2 * jnp.ones((2, 2, 3)))
    assert np.abs(doubled - whole).max() > 0.01
