"""Makes one random view of an image: its crop, flip, colour, blur and solarisation.

All but the crop are off in the paper's recipe. The operations are Pillow's, used as torchvision uses them.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cjepa_jax.config import Data

Pixels = UInt8[np.ndarray, "H W C"]
Distort = Callable[[Pixels, np.random.Generator], Pixels]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Describes the random crop of one view, and what is done to it."""

    crop_scale: tuple[float, float]  # random-resized crop: share of the image's area
    crop_ratio: tuple[float, float]  # and its aspect ratio, drawn in log space, in multiples of the result's
    flip: float = 0.0  # probability of a horizontal flip
    color: float = 0.0  # strength of SimCLR's colour distortion; 1 is SimCLR's own
    blur: float = 0.0  # probability of SimCLR's Gaussian blur
    solarize: float = 0.0  # probability that values from 128 on are inverted, as in BYOL
    saturation: float = 1.0  # factor on the strength of the distortion of saturation; BYOL's is 0.5
    distort: Distort | None = None  # is applied last, for example RandAugment

    @classmethod
    def of(cls, data: Data) -> "Augmentation":
        """Returns the augmentation that the group `data` of the settings describes."""
        return cls(data.crop_scale, data.crop_ratio, data.flip, data.color, data.blur)


def augment(pixels: Pixels, augmentation: Augmentation, rng: np.random.Generator) -> Pixels:
    """Returns the crop after a random flip, SimCLR's colours, its blur, solarisation, and `augmentation.distort`.

    Colours of strength s = `augmentation.color`: with probability 0.8, brightness,
    contrast and saturation change by factors within 1 +- 0.8 s (saturation: 0.8 s
    times `augmentation.saturation`) and hue by up to 0.2 s of the circle, in random
    order; then the crop becomes grey with probability 0.2. The radius of the blur
    is uniform in [0.1, 2] pixels.
    """
    if augmentation.flip or augmentation.color or augmentation.blur or augmentation.solarize:
        pixels = _flip_color_blur(pixels, augmentation, rng)
    return augmentation.distort(pixels, rng) if augmentation.distort else pixels


def _flip_color_blur(pixels: Pixels, augmentation: Augmentation, rng: np.random.Generator) -> Pixels:
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    if rng.uniform() < augmentation.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augmentation.color:
        if rng.uniform() < 0.8:
            image = _jitter(image, augmentation, rng)
        if rng.uniform() < 0.2:
            image = image.convert("L").convert("RGB")
    if rng.uniform() < augmentation.blur:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    if augmentation.solarize and rng.uniform() < augmentation.solarize:
        image = ImageOps.solarize(image, 128)
    return np.asarray(image).reshape(pixels.shape)


def _jitter(image: Image.Image, augmentation: Augmentation, rng: np.random.Generator) -> Image.Image:
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    strengths = augmentation.color, augmentation.color, augmentation.color * augmentation.saturation
    for operation in rng.permutation(4):
        if operation < 3:
            strength = strengths[operation]
            factor = rng.uniform(max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength)
            image = enhancers[operation](image).enhance(factor)
        else:
            hue, saturation, value = image.convert("HSV").split()
            turn = round(rng.uniform(-0.2, 0.2) * augmentation.color * 255)
            image = Image.merge("HSV", (hue.point(lambda h, turn=turn: (h + turn) % 256), saturation, value))
            image = image.convert("RGB")
    return image
