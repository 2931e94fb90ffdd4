"""One picture: decode, crop, resize with antialiasing. Runs in loader threads.

A picture is the bytes of an image file, or pixels [H, W] or [H, W, 3] uint8.
EXIF orientation is applied, transparency is laid on white, 16 bits become 8, and
of an animation the first frame counts.
"""

import io
import math
from collections.abc import Callable
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
Decoder = Literal["fast", "pillow"]

MAX_PIXELS = 2**27  # of one picture; decoded, that is 400 MB a thread

Image.MAX_IMAGE_PIXELS = None  # Pillow would warn at one size and refuse at another; `MAX_PIXELS` is checked here
cv2.setNumThreads(1)  # the loader's threads are parallel already


class UnreadableError(ValueError):
    """A picture that cannot be decoded, and why."""


def crop(
    picture: bytes | np.ndarray,
    choose_box: Callable[[int, int], Box],
    *,
    size: int,
    channels: int,
    decoder: Decoder,
) -> np.ndarray:
    """The box `choose_box(width, height)` of the upright picture -> [size, size, channels] uint8.

    Decoder "pillow" is torchvision's way, Pillow's `crop` and then its bilinear
    `resize`; "fast" is simplejpeg and OpenCV with much the same filter.

    Raises UnreadableError.
    """
    try:
        if decoder == "fast":
            pixels, box, shrink = _decode_fast(picture, choose_box, size, channels)
            resized = _resize_fast(pixels, box, size, shrink)
        else:
            opened = open_picture(picture, channels)
            # Not resize(box=...), whose filter sees the pixels just outside the box.
            cropped = opened.crop(choose_box(*opened.size))
            resized = np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR))
    except UnreadableError:
        raise
    except Exception as error:  # a broken file makes the codecs raise almost anything
        reason = str(error).split(" <_io")[0]  # Pillow names the object in memory
        raise UnreadableError(f"{type(error).__name__}: {reason}") from error
    return resized.reshape(size, size, channels)


def open_picture(picture: bytes | np.ndarray, channels: int) -> Image.Image:
    """The whole picture, upright, greyscale (1 channel) or RGB (3).

    Raises UnreadableError for too large a one; Pillow raises others.
    """
    if isinstance(picture, np.ndarray):
        image = Image.fromarray(picture)
    else:
        image = Image.open(io.BytesIO(picture))
        _check_pixels(*image.size)
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def jpeg_size(picture: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG file that any decoder reads alike: grey or YCbCr, upright; else None."""
    if not picture.startswith(b"\xff\xd8"):
        return None
    height, width, colours, _ = simplejpeg.decode_jpeg_header(picture)
    if colours not in ("Gray", "YCbCr"):
        return None
    if picture.find(b"Exif\0\0", 0, 65536) > 0 and Image.open(io.BytesIO(picture)).getexif().get(0x0112, 1) != 1:
        return None
    return width, height


def random_box(
    width: int, height: int, *, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """(left, top, right, bottom) of a random-resized crop, as torchvision's RandomResizedCrop defines it.

    Area uniform in `scale`, aspect ratio in `ratio` uniform in its logarithm; ten
    tries, then the largest central crop whose aspect ratio is in range.
    """
    low, high = map(math.log, ratio)
    for _ in range(10):  # rng.random() takes a tenth of rng.uniform()'s time
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
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


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"{width} x {height} pixels; more than {MAX_PIXELS} are not decoded")


def _decode_fast(
    picture: bytes | np.ndarray, choose_box: Callable[[int, int], Box], size: int, channels: int
) -> tuple[np.ndarray, Box, int]:
    """-> pixels, the box in the upright original, and by how much the pixels are smaller than the original."""
    found = jpeg_size(picture) if isinstance(picture, bytes) else None
    if found is None:
        opened = open_picture(picture, channels)
        return np.asarray(opened), choose_box(*opened.size), 1
    width, height = found
    _check_pixels(width, height)
    box = choose_box(width, height)
    # A large crop is decoded at a half, a quarter or an eighth, which stays at least as large as the result.
    shrink = max(f for f in (1, 2, 4, 8) if f == 1 or min(box[2] - box[0], box[3] - box[1]) >= f * size)
    pixels = simplejpeg.decode_jpeg(
        picture,
        "GRAY" if channels == 1 else "RGB",
        min_width=math.ceil(width / shrink),
        min_height=math.ceil(height / shrink),
        strict=True,  # else libjpeg fills what is damaged with something
    )
    return pixels, box, shrink


def _resize_fast(pixels: np.ndarray, box: Box, size: int, shrink: int) -> np.ndarray:
    """Low-pass, then linear interpolation: against Pillow's triangle filter 46 dB at 224, INTER_AREA has 45."""
    left, top, right, bottom = (side / shrink for side in box)
    x, y = int(left), int(top)
    pixels = pixels[y : math.ceil(bottom), x : math.ceil(right)]
    scale_x, scale_y = (right - left) / size, (bottom - top) / size
    if max(scale_x, scale_y) > 1:
        pixels = cv2.sepFilter2D(pixels, -1, _low_pass(scale_x), _low_pass(scale_y), borderType=cv2.BORDER_REPLICATE)
    if shrink == 1:
        return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)
    # The edges of the box lie between pixels.
    mapping = np.array([[scale_x, 0, (scale_x - 1) / 2 + left - x], [0, scale_y, (scale_y - 1) / 2 + top - y]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, mapping, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _low_pass(scale: float) -> np.ndarray:
    """Taps that make of linear interpolation about the triangle of half-width `scale`.

    Their variances add up to its: those of the two triangles of whole half-width
    beside it, in the mixture whose variance is (scale^2 - 1) / 6.
    """
    width = max(1, math.floor(scale))
    share = max(0.0, (scale**2 - width**2) / (2 * width + 1))
    offsets = np.abs(np.arange(-width, width + 1))
    narrow, wide = (np.maximum(0, 1 - offsets / w) / w for w in (width, width + 1))
    return ((1 - share) * narrow + share * wide).astype(np.float32)
