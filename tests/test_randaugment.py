"""Every operation of RandAugment against NumPy, and how they are drawn."""

import numpy as np
import pytest
from PIL import Image

from cjepa_jax.data import randaugment
from cjepa_jax.data.randaugment import OPERATIONS, RandAugment

FILL = (10, 20, 30)


@pytest.fixture
def photo() -> np.ndarray:
    """Smooth colours with some contrast, 24 x 20, not the whole range."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(20, 220, (6, 5, 3), np.uint8))
    return np.asarray(coarse.resize((20, 24), Image.Resampling.BICUBIC)).clip(15, 230)


def grey(pixels):
    """ITU-R 601-2 luma, as Pillow's documentation gives it."""
    return pixels @ np.array([299, 587, 114]) / 1000


def blend(degenerate, pixels, factor):
    return np.clip(degenerate + factor * (pixels.astype(float) - degenerate), 0, 255)


def stretch(channel):
    low, high = channel.min(), channel.max()
    return np.clip((channel.astype(float) - low) * 255 / (high - low), 0, 255)


def equalize(channel):
    """Pillow's integer form of histogram equalisation."""
    histogram = np.bincount(channel.ravel(), minlength=256)
    step = (histogram.sum() - histogram[histogram > 0][-1]) // 255
    table = (step // 2 + np.concatenate([[0], np.cumsum(histogram)[:-1]])) // step
    return table.clip(0, 255)[channel]


def smooth(pixels):
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    out = pixels.astype(float).copy()
    out[1:-1, 1:-1] = sum(
        kernel[i, j] * pixels[i : pixels.shape[0] - 2 + i, j : pixels.shape[1] - 2 + j]
        for i in range(3)
        for j in range(3)
    )
    return out


def highest_bits(count):
    return 256 - 2 ** (8 - count)


def by_channel(function):
    return lambda p, m, s: np.stack([function(p[..., c]) for c in range(3)], axis=-1)


BY_THE_BOOK = {  # pixels, magnitude in [0, 1], direction
    "auto_contrast": by_channel(stretch),
    "equalize": by_channel(equalize),
    "invert": lambda p, m, s: 255 - p,
    "posterize": lambda p, m, s: p & highest_bits(max(1, 4 - int(4 * m))),
    "solarize": lambda p, m, s: np.where(p < 256 - int(256 * m), p, 255 - p),
    "solarize_add": lambda p, m, s: np.where(p < 128, np.minimum(255, p.astype(int) + int(110 * m)), p),
    "color": lambda p, m, s: blend(np.round(grey(p))[..., None], p, max(0.1, 1 + 0.9 * m * s)),
    "contrast": lambda p, m, s: blend(np.floor(np.round(grey(p)).mean() + 0.5), p, max(0.1, 1 + 0.9 * m * s)),
    "brightness": lambda p, m, s: blend(0, p, max(0.1, 1 + 0.9 * m * s)),
    "sharpness": lambda p, m, s: blend(smooth(p), p, max(0.1, 1 + 0.9 * m * s)),
}


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("m", [0.4, 0.9, 1.0])
@pytest.mark.parametrize("name", BY_THE_BOOK)
def test_colours(name, m, sign, photo):
    ours = np.asarray(OPERATIONS[name](Image.fromarray(photo), m, sign, FILL)).astype(float)
    rounding = {"auto_contrast": 1, "brightness": 1, "color": 2, "contrast": 2, "sharpness": 2}
    assert np.abs(ours - BY_THE_BOOK[name](photo, m, sign)).max() <= rounding.get(name, 0)
    assert np.abs(ours - photo).max() >= 5


GEOMETRY = {  # (x, y) of the result -> where it comes from
    "rotate": lambda x, y, m, s, w, h: turned(x, y, np.deg2rad(30 * m * s), w, h),
    "shear_x": lambda x, y, m, s, w, h: (x + 0.3 * m * s * y, y),
    "shear_y": lambda x, y, m, s, w, h: (x, y + 0.3 * m * s * x),
    "translate_x": lambda x, y, m, s, w, h: (x + 0.45 * m * s * w, y),
    "translate_y": lambda x, y, m, s, w, h: (x, y + 0.45 * m * s * h),
}


def turned(x, y, angle, w, h):
    """Counter-clockwise on the screen, where y points down, around the centre."""
    dx, dy = x - w / 2, y - h / 2
    return w / 2 + dx * np.cos(angle) - dy * np.sin(angle), h / 2 + dx * np.sin(angle) + dy * np.cos(angle)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("m", [0.5, 1.0])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name, m, sign):
    """Of a picture whose colours are its coordinates, interpolation is exact."""
    w, h = 40, 32
    x, y = np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)
    ramp = np.stack([5 * x, 6 * y, np.full_like(x, 200)], axis=-1)
    ours = np.asarray(OPERATIONS[name](Image.fromarray(ramp.astype(np.uint8)), m, sign, FILL)).astype(float)
    from_x, from_y = GEOMETRY[name](x, y, m, sign, w, h)
    inside = (from_x > 2) & (from_x < w - 2) & (from_y > 2) & (from_y < h - 2)
    outside = (from_x < -1) | (from_x > w + 1) | (from_y < -1) | (from_y > h + 1)
    assert inside.sum() > 200 and outside.sum() > 10
    assert np.abs(ours[..., 0] - 5 * from_x)[inside].max() < 2
    assert np.abs(ours[..., 1] - 6 * from_y)[inside].max() < 2
    assert (ours[outside] == FILL).all()


def test_the_operations_are_those_of_the_recipe():
    assert len(OPERATIONS) == 15 and set(OPERATIONS) == set(BY_THE_BOOK) | set(GEOMETRY)


@pytest.mark.parametrize("channels", [1, 3])
def test_draws(channels, monkeypatch):
    """With replacement, each done half of the time, magnitudes normal and clipped, directions even."""
    done = []
    recording = {
        name: lambda image, m, sign, fill, name=name: done.append((name, m, sign)) or image for name in OPERATIONS
    }
    pixels = np.zeros((8, 8, channels), np.uint8)
    distort = RandAugment(operations=2, probability=0.5, magnitude=9, magnitude_std=0.5, fill=0)
    with monkeypatch.context() as patched:
        patched.setattr(randaugment, "OPERATIONS", recording)
        rng = np.random.default_rng(0)
        for _ in range(3000):
            assert distort(pixels, rng).shape == pixels.shape
    names, magnitudes, signs = zip(*done, strict=True)
    assert abs(len(done) - 3000) < 4 * np.sqrt(6000 / 4)
    counts = np.array([names.count(name) for name in OPERATIONS])
    assert (np.abs(counts - 200) < 4.5 * np.sqrt(200)).all()
    assert max(magnitudes) == 1 and abs(np.median(magnitudes) - 0.9) < 0.005
    below = np.array([m for m in magnitudes if m < 0.9])  # where nothing is clipped
    assert abs(np.sqrt(np.mean((below - 0.9) ** 2)) - 0.05) < 0.003
    assert abs(np.mean(signs)) < 4 / np.sqrt(len(signs))


@pytest.mark.parametrize("channels", [1, 3])
def test_same_draws_same_pixels_and_every_operation_takes_grey(channels):
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, channels), np.uint8)
    fill = 128 if channels == 1 else FILL
    distort = RandAugment(operations=4, probability=1.0, magnitude=9, magnitude_std=0.5, fill=fill)
    for seed in range(20):
        one, two = (distort(pixels, np.random.default_rng(seed)) for _ in range(2))
        assert one.dtype == np.uint8 and one.shape == pixels.shape
        np.testing.assert_array_equal(one, two)
