"""Decodes one picture, crops it, resizes the crops with antialiasing, and shrinks files. Runs in threads.

A picture is the bytes of an image file of one of the `FORMATS`, or pixels [H, W] or [H, W, 3] uint8.
EXIF orientation is applied, transparency is laid on white, 16 bits become 8, and
of an animation the first frame counts. The time that a picture takes is linear in
its pixels, and their number has a limit.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

CropBox = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
ChooseBox = Callable[[int, int], CropBox]  # width and height of the upright picture -> the box to crop
Crop = UInt8[np.ndarray, "height width C"]
Decoder = Literal["fast", "pillow"]
Shape = tuple[int, int]  # height and width of images in pixels, after they are cropped and resized

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # others are refused: Pillow would run Ghostscript for an EPS
MAX_PIXELS = 2**27  # of one picture; decoded, that is 400 MB a thread
MAX_SIDE = 65_500  # pixels; libjpeg reads and writes no longer ones
MAX_SCANS = 32  # of a JPEG of MAX_PIXELS, and more of smaller ones: each takes time for all pixels, but few bytes

_REDUCED = 16  # an averaged picture is still so many times as large as the crop, so that the filter shapes the result
_SEGMENTS = 100  # before the first scan of a JPEG that are read one by one

Image.MAX_IMAGE_PIXELS = None  # Pillow would warn at one size and refuse at another; `MAX_PIXELS` is checked here
cv2.setNumThreads(1)  # the loader's threads are parallel already


class UnreadableError(ValueError):
    """Says why a picture cannot be decoded."""


def crop(picture: bytes | np.ndarray, choose_box: ChooseBox, *, shape: Shape, channels: int, decoder: Decoder) -> Crop:
    """Returns one crop of a picture, as `crops` does.

    Raises UnreadableError where the picture cannot be decoded.
    """
    return crops(picture, [choose_box], shape=shape, channels=channels, decoder=decoder)[0]


def crops(
    picture: bytes | np.ndarray, choose_boxes: Sequence[ChooseBox], *, shape: Shape, channels: int, decoder: Decoder
) -> list[Crop]:
    """Decodes the picture once, crops each box that is chosen from it, and resizes each crop to the same shape.

    The decoder "pillow" works as torchvision does: Pillow's `crop` and then its
    bilinear `resize`. "fast" is simplejpeg and OpenCV with much the same filter.

    Raises UnreadableError where the picture cannot be decoded.
    """
    size = shape[::-1]
    with _unreadable():
        if decoder == "fast":
            pixels, boxes, shrink = _decode_fast(picture, choose_boxes, shape, channels)
            resized = [_resize_fast(pixels, box, size, shrink) for box in boxes]
        else:
            opened = open_picture(picture, channels)
            boxes = [choose_box(*opened.size) for choose_box in choose_boxes]
            # resize(box=...) is not used because its filter sees the pixels just outside the box.
            resized = [np.asarray(opened.crop(box).resize(size, Image.Resampling.BILINEAR)) for box in boxes]
    return [pixels.reshape(*shape, channels) for pixels in resized]


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    """Turns whatever a codec raises into UnreadableError: a broken file makes it raise almost anything."""
    try:
        yield
    except UnreadableError:
        raise
    except Exception as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from error


def open_file(picture: bytes) -> Image.Image:
    """Opens an image file as it is stored; its pixels are decoded when they are asked for.

    Raises UnreadableError where it has none of the `FORMATS`, or is too large; Pillow raises other errors for damaged
    files.
    """
    try:
        image = Image.open(io.BytesIO(picture), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnreadableError("not a JPEG, PNG, WebP, BMP or GIF file, or damaged in its first bytes") from None
    _check_size(*image.size)
    if image.format == "JPEG":
        _check_scans(picture, *image.size)
    return image


def open_picture(picture: bytes | np.ndarray, channels: int) -> Image.Image:
    """Returns the whole picture, upright, in greyscale (1 channel) or RGB (3 channels). Raises as `open_file` does."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:  # Pillow would take many types, and make their pixels black
            raise UnreadableError(f"pixels must be uint8, got {picture.dtype}")
        image = Image.fromarray(picture)
    else:
        image = ImageOps.exif_transpose(open_file(picture))
    if image.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
        grey = np.asarray(image)
        unseen = grey == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(unseen, 255, grey >> 8).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def jpeg_size(picture: bytes) -> tuple[int, int] | None:
    """Returns (width, height) of a JPEG file that all decoders read alike: grey or YCbCr, and upright; else None.

    Raises UnreadableError where it is too large; simplejpeg raises other errors for damaged files.
    """
    if not picture.startswith(b"\xff\xd8"):
        return None
    height, width, colours, _ = simplejpeg.decode_jpeg_header(picture)
    _check_size(width, height)
    _check_scans(picture, width, height)
    if colours not in ("Gray", "YCbCr"):
        return None
    if _has_exif(picture) and open_file(picture).getexif().get(0x0112, 1) != 1:
        return None
    return width, height


def _has_exif(jpeg: bytes) -> bool:
    """Tells whether there may be Exif or XMP data, which can turn the image, before the first scan."""
    at = 2
    for _ in range(_SEGMENTS):  # to search the file takes ten times as long
        if jpeg.startswith(b"\xff\xda", at):
            return False
        if not jpeg.startswith(b"\xff", at) or jpeg.startswith(b"\xff\xff", at):
            break
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg.startswith(b"\xff\xe1", at):
            xmp = jpeg.startswith(b"http://ns.adobe.com/xap/", at + 4) and b"tiff:Orientation" in jpeg[at:end]
            if xmp or jpeg.startswith(b"Exif\0\0", at + 4):
                return True
        at = end
    return b"Exif\0\0" in jpeg  # other decoders pass over whatever broke the order


def shrink_file(raw: bytes, *, short_side: int, quality: int) -> bytes:
    """Returns the image file to store for an image file: itself where it is small enough, else a JPEG.

    Raises UnreadableError where the file cannot be decoded.
    """
    with _unreadable():
        if jpeg_size(raw):
            grey = simplejpeg.decode_jpeg_header(raw)[2] == "Gray"
            # Pillow would fill what is damaged with something.
            pixels = simplejpeg.decode_jpeg(raw, "GRAY" if grey else "RGB", strict=True)
            image, as_it_is = Image.fromarray(pixels[..., 0] if grey else pixels), True
        else:
            header = open_file(raw)
            image = open_picture(raw, 1 if Image.getmodebase(header.mode) == "L" else 3)
            as_it_is = header.format in ("PNG", "WEBP", "BMP")
        factor = short_side / min(image.size)
        if as_it_is and factor >= 1:
            return raw
        if factor < 1:
            width, height = (max(short_side, round(side * factor)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def random_box(
    width: int, height: int, *, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> CropBox:
    """Draws the box of a random-resized crop, as torchvision's RandomResizedCrop defines it.

    The share of the area is uniform in `scale`, and the logarithm of the aspect
    ratio is uniform in that of `ratio`. After ten boxes that do not fit, it
    returns the largest central one whose aspect ratio is in range.
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


def central_box(width: int, height: int, *, aspect: float, fraction: float) -> CropBox:
    """Returns the central box of an aspect ratio, width over height, whose sides are `fraction` of the largest one's.

    Of a square, with 224 / 256, it is the usual "resize the short side to 256, then crop 224" in one resampling.
    """
    w = max(1, round(min(width, height * aspect) * fraction))
    h = max(1, round(min(height, width / aspect) * fraction))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"{width} x {height} pixels; more than {MAX_PIXELS} are not decoded")
    if max(width, height) > MAX_SIDE:
        raise UnreadableError(f"{width} x {height} pixels; sides above {MAX_SIDE} are not decoded")


def _check_scans(picture: bytes, width: int, height: int) -> None:
    """Raises UnreadableError for a JPEG file of too many scans."""
    if len(picture) // 10 * width * height <= MAX_SCANS * MAX_PIXELS:
        return  # the head of a scan takes ten bytes, so there are few enough; most files need not be searched
    pairs = (np.frombuffer(picture, "<u2", (len(picture) - offset) // 2, offset) for offset in (0, 1))
    scans = sum(np.count_nonzero(codes == 0xDAFF) for codes in pairs)  # bytes.count takes 50 times as long
    by_chance = len(picture) // 2**15  # scans never hold their marker, but a video behind the picture can
    if (scans - by_chance) * width * height > MAX_SCANS * MAX_PIXELS:
        raise UnreadableError(f"a JPEG of {scans} scans, too many to decode for {width} x {height} pixels")


def _decode_fast(
    picture: bytes | np.ndarray, choose_boxes: Sequence[ChooseBox], shape: Shape, channels: int
) -> tuple[UInt8[np.ndarray, "h w *C"], list[CropBox], int]:
    """Returns pixels, the boxes in the upright original, and by how much the pixels are smaller than the original."""
    found = jpeg_size(picture) if isinstance(picture, bytes) else None
    if found is None:
        opened = open_picture(picture, channels)
        return np.asarray(opened), [choose_box(*opened.size) for choose_box in choose_boxes], 1
    width, height = found
    boxes = [choose_box(width, height) for choose_box in choose_boxes]
    # Large crops are decoded at a half, a quarter or an eighth, which stays at least as large as the result.
    lowest = min(bottom - top for _, top, _, bottom in boxes)
    narrowest = min(right - left for left, _, right, _ in boxes)
    possible = min(lowest // shape[0], narrowest // shape[1])
    shrink = max(factor for factor in (1, 2, 4, 8) if factor <= max(1, possible))
    pixels = simplejpeg.decode_jpeg(
        picture,
        "GRAY" if channels == 1 else "RGB",
        min_width=math.ceil(width / shrink),
        min_height=math.ceil(height / shrink),
        strict=True,  # else libjpeg fills what is damaged with something
    )
    return pixels, boxes, shrink


def _resize_fast(pixels: np.ndarray, box: CropBox, size: tuple[int, int], shrink: int) -> np.ndarray:
    """Resizes to (width, height) by a low-pass filter and linear interpolation.

    Its PSNR to Pillow's triangle filter is 46 dB at 224 pixels; that of OpenCV's INTER_AREA is 45 dB.
    """
    left, top, right, bottom = (side / shrink for side in box)
    x, y = int(left), int(top)
    pixels = pixels[y : math.ceil(bottom), x : math.ceil(right)]
    scale_x, scale_y = (right - left) / size[0], (bottom - top) / size[1]
    if max(scale_x, scale_y) >= 2 * _REDUCED:  # the filter's time grows with its length, that of averaging does not
        height, width = pixels.shape[:2]
        fewer = (math.ceil(n / max(1, scale // _REDUCED)) for n, scale in ((width, scale_x), (height, scale_y)))
        pixels = cv2.resize(pixels, tuple(fewer), interpolation=cv2.INTER_AREA)
        share_y, share_x = pixels.shape[0] / height, pixels.shape[1] / width
        left, top, x, y = (left - x) * share_x, (top - y) * share_y, 0, 0
        scale_x, scale_y = scale_x * share_x, scale_y * share_y
    if max(scale_x, scale_y) > 1:
        pixels = cv2.sepFilter2D(pixels, -1, low_pass(scale_x), low_pass(scale_y), borderType=cv2.BORDER_REPLICATE)
    if shrink == 1:
        return cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    # The edges of the box lie between pixels.
    mapping = np.array([[scale_x, 0, (scale_x - 1) / 2 + left - x], [0, scale_y, (scale_y - 1) / 2 + top - y]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, mapping, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def low_pass(scale: float) -> Float32[np.ndarray, " taps"]:
    """Returns taps that, followed by linear interpolation, come close to the triangle of half-width `scale`.

    They mix the two triangles of the whole half-widths next to `scale`, so that
    the variance of the taps, (scale^2 - 1) / 6, and that of the interpolation add
    up to the variance of the wanted triangle.
    """
    width = max(1, math.floor(scale))
    share = max(0.0, (scale**2 - width**2) / (2 * width + 1))
    half = []  # of Python's floats, which take a third of NumPy's time for so few
    for k in range(width + 1):
        narrow, wide = (1 - k / width) / width, (1 - k / (width + 1)) / (width + 1)
        half.append((1 - share) * narrow + share * wide)
    return np.array(half[:0:-1] + half, np.float32)
