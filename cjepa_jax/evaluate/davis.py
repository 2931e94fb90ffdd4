"""DAVIS-2017: the masks of each video's first frame, propagated by the features of patches, scored by J and F.

The data set is read as it is published (https://davischallenge.org, "TrainVal", 480p):
JPEGImages/480p/VIDEO/*.jpg, Annotations/480p/VIDEO/*.png, ImageSets/2017/val.txt.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from PIL import Image

from cjepa_jax.config import UserError, one_line, require
from cjepa_jax.data.decode import open_picture
from cjepa_jax.evaluate import tracking

Encode = Callable[[np.ndarray], np.ndarray]  # frames [n, H, W, C] uint8 -> features of their patches [n, N, D]

_ROUND_TO = 64  # DINO rounds the long side down to a multiple of it


class Video(NamedTuple):
    """One sequence; frame i belongs to mask i."""

    name: str
    frames: list[epath.Path]
    masks: list[epath.Path]


class Result(NamedTuple):
    """Of one video."""

    scores: dict[str, list[float]]  # "J" and "F" of each object
    masks: np.ndarray  # [T, H, W] uint8, what was found


def find(data_dir: str, *, split: str = "val") -> list[Video]:
    """The videos of a split, with their frames and masks.

    Raises UserError that names what is missing.
    """
    require(bool(data_dir), "davis.data_dir is empty: --config.davis.data_dir=DAVIS names the folder of JPEGImages")
    root = epath.Path(data_dir).expanduser()
    listing = root / "ImageSets" / "2017" / f"{split}.txt"
    require(listing.exists(), f"davis.data_dir = {data_dir!r}: {listing} is missing")
    names = listing.read_text().split()
    require(bool(names), f"{listing} names no videos")
    return [_video(root, name) for name in names]


def _video(root: epath.Path, name: str) -> Video:
    frames, masks = root / "JPEGImages" / "480p" / name, root / "Annotations" / "480p" / name
    for folder in (frames, masks):
        require(folder.is_dir(), f"davis.data_dir = {str(root)!r}: {folder} is missing")
    found = sorted(frames.glob("*.jpg"))
    require(len(found) >= 3, f"{frames} holds {len(found)} .jpg files; the first and the last are not scored")
    wanted = [masks / f"{frame.stem}.png" for frame in found]
    require(wanted[0].exists(), f"{wanted[0]} is missing: the mask of the first frame, which is to be propagated")
    present = {mask.name for mask in masks.glob("*.png")}
    lost = [mask for mask in wanted if mask.name not in present]
    require(not lost, f"{lost[0] if lost else ''} is missing, and {len(lost) - 1} more masks of that video")
    return Video(name, found, wanted)


def frame_size(width: int, height: int, *, short_side: int, patch_size: int) -> tuple[int, int]:
    """(width, height) at which a frame is encoded.

    As in DINO, the short side is `short_side` and the long one keeps the aspect
    ratio, rounded down to a multiple of 64; then both to multiples of the patch.
    """
    long_side = short_side * max(width, height) / min(width, height)
    short, long = short_side // patch_size * patch_size, int(long_side) // _ROUND_TO * _ROUND_TO
    long = long // patch_size * patch_size
    require(min(short, long) > 0, f"davis.short_side = {short_side} is too small for patches of {patch_size} pixels")
    return (long, short) if width >= height else (short, long)


def track(video: Video, encode: Encode, *, channels: int, short_side: int, patch_size: int, batch_size: int) -> Result:
    """Propagates the first mask through the video.

    Raises UserError for masks and frames that cannot be read, and for a first
    mask without objects.
    """
    truth = [read_mask(mask) for mask in video.masks]
    for mask, path in zip(truth, video.masks, strict=True):
        require(mask.shape == truth[0].shape, f"{path} is {mask.shape}, the first mask of the video {truth[0].shape}")
    first = np.where(truth[0] == tracking.VOID, 0, truth[0])
    require(bool(first.any()), f"{video.masks[0]} has no object: nothing to propagate")
    height, width = first.shape
    size = frame_size(width, height, short_side=short_side, patch_size=patch_size)
    columns, rows = size[0] // patch_size, size[1] // patch_size
    small = np.asarray(Image.fromarray(first).resize((columns, rows), Image.Resampling.NEAREST)).ravel()
    labels = np.eye(first.max() + 1, dtype=np.float32)[small]

    memory, found = None, [first]
    for start in range(0, len(video.frames), batch_size):
        paths = video.frames[start : start + batch_size]
        frames = np.stack([read_frame(path, size, channels) for path in paths])
        padded = np.concatenate([frames, np.zeros((batch_size - len(frames), *frames.shape[1:]), np.uint8)])
        for features in encode(padded)[: len(frames)]:
            if memory is None:
                memory = tracking.remember(features, labels)
                continue
            labels, memory = _propagate(memory, features, columns=columns)
            pixels = jax.device_get(_segment(labels, columns=columns, patch_size=patch_size))
            image = Image.fromarray(pixels.astype(np.uint8))
            found.append(np.asarray(image.resize((width, height), Image.Resampling.NEAREST)))
    masks = np.stack(found)
    return Result(tracking.score(masks, np.stack(truth)), masks)


_propagate = jax.jit(tracking.propagate, static_argnames="columns")
_segment = jax.jit(tracking.segment, static_argnames=("columns", "patch_size"))


def summary(results: dict[str, Result]) -> dict[str, Any]:
    """Name of a video -> its result, as JSON: J, F, and their mean J&F, over all objects of all videos, in [0, 1]."""
    objects = {name: result.scores for name, result in results.items()}
    j, f = (float(np.mean([x for scores in objects.values() for x in scores[key]])) for key in ("J", "F"))
    return {"J&F %": (j + f) / 2, "J %": j, "F %": f, "objects": objects}


def read_mask(path: epath.Path) -> np.ndarray:
    """[H, W] uint8: the number of the object at each pixel."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            require(image.mode in ("P", "L"), f"{path} is a {image.mode} image; a mask has a palette, or is grey")
            return np.array(image)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def read_frame(path: epath.Path, size: tuple[int, int], channels: int) -> np.ndarray:
    """[H, W, C] uint8."""
    try:
        picture = open_picture(path.read_bytes(), channels).resize(size, Image.Resampling.BILINEAR)
    except Exception as error:  # a broken file makes the codecs raise almost anything
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    return np.asarray(picture).reshape(*size[::-1], channels)
