"""One image: decode, crop, resize with antialiasing. Runs in loader threads."""

import io
import math

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


def open_image(image: bytes | Image.Image, channels: int) -> Image.Image:
    """Bytes of an image file, or an image, -> a greyscale (1 channel) or RGB (3) image."""
    opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    return opened.convert("L" if channels == 1 else "RGB")


def random_box(
    width: int, height: int, *, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """(left, top, right, bottom) of a random-resized crop, as torchvision's RandomResizedCrop defines it.

    Area uniform in `scale`, aspect ratio in `ratio` uniform in its logarithm; ten
    tries, then the largest central crop whose aspect ratio is in range.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def central_box(width: int, height: int, *, fraction: float) -> Box:
    """(left, top, right, bottom) of the central square whose side is `fraction` of the short side.

    224 / 256 is the usual "resize the short side to 256, then crop 224" in one resampling.
    """
    side = max(1, round(min(width, height) * fraction))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def resize(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """The box of the image, bilinear with antialiasing -> [size, size, C] uint8."""
    # Not resize(box=...), whose filter sees the pixels just outside the box.
    resized = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BILINEAR))
    return resized.reshape(size, size, -1)
