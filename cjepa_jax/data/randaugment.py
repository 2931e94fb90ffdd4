"""Implements RandAugment (arXiv 1909.13719) with Pillow, as timm's `rand-m9-mstd0.5-inc1`, which MAE uses, defines it.

Every operation becomes stronger with its magnitude, from 0 to 10, and keeps the size and mode of the image.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

Fill = int | tuple[int, ...]  # the colour of what moves in from outside


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies random operations to an image; an object of this class is an `augment.Distort`."""

    operations: int  # how many are drawn for each image, with replacement
    probability: float  # that a drawn operation is applied
    magnitude: float
    magnitude_std: float  # of normal noise on the magnitude
    fill: Fill  # MAE's is the mean colour

    def __call__(self, pixels: UInt8[np.ndarray, "H W C"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W C"]:
        """Returns the pixels after the operations that `rng` draws."""
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        for name in rng.choice(list(OPERATIONS), self.operations):
            if rng.random() < self.probability:
                magnitude = float(np.clip(rng.normal(self.magnitude, self.magnitude_std), 0, 10))
                image = OPERATIONS[name](image, magnitude / 10, -1 if rng.random() < 0.5 else 1, self.fill)
        return np.asarray(image).reshape(pixels.shape)


Operation = Callable[
    [Image.Image, float, int, Fill], Image.Image
]  # image, magnitude in [0, 1], direction -1 or 1, fill


def _enhance(kind: type) -> Operation:
    return lambda image, m, sign, fill: kind(image).enhance(max(0.1, 1 + 0.9 * m * sign))


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    """Transforms an image; `matrix` maps a pixel of the result to the place that it comes from."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


def _solarize_add(image: Image.Image, m: float, sign: int, fill: Fill) -> Image.Image:
    table = [min(255, value + int(110 * m)) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, m, sign, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, m, sign, fill: ImageOps.equalize(image),
    "invert": lambda image, m, sign, fill: ImageOps.invert(image),
    "rotate": lambda image, m, sign, fill: image.rotate(
        30 * m * sign, resample=Image.Resampling.BICUBIC, fillcolor=fill
    ),
    # At magnitude 10 timm keeps no bit: a black image.
    "posterize": lambda image, m, sign, fill: ImageOps.posterize(image, max(1, 4 - int(4 * m))),
    "solarize": lambda image, m, sign, fill: ImageOps.solarize(image, 256 - int(256 * m)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, m, sign, fill: _affine(image, (1, 0.3 * m * sign, 0, 0, 1, 0), fill),
    "shear_y": lambda image, m, sign, fill: _affine(image, (1, 0, 0, 0.3 * m * sign, 1, 0), fill),
    "translate_x": lambda image, m, sign, fill: _affine(image, (1, 0, 0.45 * m * sign * image.width, 0, 1, 0), fill),
    "translate_y": lambda image, m, sign, fill: _affine(image, (1, 0, 0, 0, 1, 0.45 * m * sign * image.height), fill),
}
