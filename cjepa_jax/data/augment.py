"""Flip, colour and blur of one crop, off in the paper's recipe: Pillow's operations, as torchvision applies them."""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from cjepa_jax.config import Data


def augment(pixels: np.ndarray, data: Data, rng: np.random.Generator) -> np.ndarray:
    """[H, W, C] uint8 -> the same, after a flip with probability `data.flip`, SimCLR's colours and its blur.

    Colours of strength s = `data.color`: with probability 0.8 brightness,
    contrast and saturation by factors within 1 +- 0.8 s and hue by up to 0.2 s of
    the circle, in random order; then grey with probability 0.2. The blur comes
    with probability `data.blur`, its radius uniform in [0.1, 2] pixels.
    """
    if not (data.flip or data.color or data.blur):
        return pixels
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    if rng.uniform() < data.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if data.color:
        if rng.uniform() < 0.8:
            image = _jitter(image, data.color, rng)
        if rng.uniform() < 0.2:
            image = image.convert("L").convert("RGB")
    if rng.uniform() < data.blur:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    return np.asarray(image).reshape(pixels.shape)


def _jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for operation in rng.permutation(4):
        if operation < 3:
            factor = rng.uniform(max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength)
            image = enhancers[operation](image).enhance(factor)
        else:
            hue, saturation, value = image.convert("HSV").split()
            turn = round(rng.uniform(-0.2, 0.2) * strength * 255)
            image = Image.merge("HSV", (hue.point(lambda h, turn=turn: (h + turn) % 256), saturation, value))
            image = image.convert("RGB")
    return image
