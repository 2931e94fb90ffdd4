"""Pictures and the masks that belong to them, in files."""

import dataclasses
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int16
from PIL import Image

from cjepa_jax.data.decode import open_file, open_picture
from cjepa_jax.data.folder import SUFFIXES
from cjepa_jax.errors import UserError, one_line, require

IGNORED = -1  # in the place of the class of a pixel that does not count


class Pair(NamedTuple):
    """A picture and the classes of its pixels."""

    image: epath.Path
    mask: epath.Path


@dataclasses.dataclass(frozen=True)
class Values:
    """What the values of masks mean: `first` and the following ones are classes, `ignored` ones do not count."""

    classes: int
    first: int
    ignored: tuple[int, ...]

    def __contains__(self, value: int) -> bool:
        return self.first <= value < self.first + self.classes


def find(data_dir: str, split: str) -> list[Pair]:
    """Lists the pairs DATA_DIR/images/SPLIT/NAME.jpg and DATA_DIR/annotations/SPLIT/NAME.png, by name.

    Raises UserError where a folder, a picture or a mask is missing.
    """
    root = epath.Path(data_dir).expanduser()
    images = _named(root / "images" / split, SUFFIXES, data_dir)
    masks = _named(root / "annotations" / split, (".png",), data_dir)
    for name in sorted(images.keys() ^ masks.keys()):
        path, other = (images[name], "mask") if name in images else (masks[name], "image")
        place = root / ("annotations" if other == "mask" else "images") / split
        raise UserError(f"{path} has no {other}: {place} holds no file {name}{'.png' if other == 'mask' else '.jpg'}")
    return [Pair(images[name], masks[name]) for name in sorted(images)]


def _named(folder: epath.Path, suffixes: tuple[str, ...], data_dir: str) -> dict[str, epath.Path]:
    """Lists the files of a folder by their names without suffixes; hidden ones are left out."""
    require(folder.is_dir(), f"segmentation.data_dir = {data_dir!r}: the folder {folder} is missing")
    found: dict[str, epath.Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            require(path.stem not in found, f"{found.get(path.stem)} and {path} have the same name: remove one of them")
            found[path.stem] = path
    require(bool(found), f"segmentation.data_dir = {data_dir!r}: {folder} holds no files {', '.join(suffixes)}")
    return found


def inspect(pair: Pair, values: Values) -> set[int]:
    """Reads a pair as a whole and returns the classes, from 0 on, that the mask holds.

    Raises UserError where one of them cannot be read, where they differ in size, or where a value has no meaning.
    """
    mask = read_mask(pair.mask)
    width, height = _open(pair.image, 3).size
    require(
        mask.shape == (height, width),
        f"{pair.mask} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {pair.image} {width} x {height}",
    )
    found = np.unique(mask).tolist()
    strange = [value for value in found if value not in values and value not in values.ignored]
    require(
        not strange,
        f"{pair.mask} holds the value {strange[0] if strange else ''}, which is neither a class ({values.first} to "
        f"{values.first + values.classes - 1}, by segmentation.first_class and segmentation.classes) nor one of "
        f"segmentation.ignored = {values.ignored}",
    )
    return {value - values.first for value in found if value in values}


def read_classes(path: epath.Path, values: Values) -> Int16[np.ndarray, "H W"]:
    """Reads the class of each pixel, from 0 on, or IGNORED. Raises UserError as `read_mask` does."""
    mask = read_mask(path).astype(np.int32)
    return np.where(np.isin(mask, values.ignored), IGNORED, mask - values.first).astype(np.int16)


def read_mask(path: epath.Path) -> np.ndarray:
    """Reads the number at each pixel, [H, W] of unsigned integers. Raises UserError."""
    try:
        raw = path.read_bytes()
        image = open_file(raw)
        require(
            image.mode in ("1", "P", "L", "I;16", "I"),
            f"{path} is a {image.mode} image; a mask has a palette, or is grey: one number a pixel",
        )
        mask = np.array(image)
    except UserError:
        raise
    except Exception as error:  # a broken file makes the codecs raise almost anything
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    bits = raw[24] if image.format == "PNG" else 8
    if image.mode == "L" and bits < 8:  # which Pillow stretches to 0 to 255
        mask //= 255 // (2**bits - 1)
    return mask.astype(np.uint8) if mask.dtype == bool else mask


def read_frame(path: epath.Path, size: tuple[int, int], channels: int) -> np.ndarray:
    """Reads a picture and resizes it to (width, height): [H, W, C] uint8. Raises UserError."""
    picture = _open(path, channels).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(*size[::-1], channels)


def _open(path: epath.Path, channels: int) -> Image.Image:
    try:
        return open_picture(path.read_bytes(), channels)
    except Exception as error:  # a broken file makes the codecs raise almost anything
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
