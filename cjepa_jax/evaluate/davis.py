"""DAVIS-2017: the masks of each video's first frame, propagated by the features of patches, scored by J and F.

The data set is read as it is published (https://davischallenge.org, "TrainVal", 480p):
JPEGImages/480p/VIDEO/*.jpg, Annotations/480p/VIDEO/*.png, ImageSets/2017/val.txt.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree
from matplotlib import colormaps
from PIL import Image

from cjepa_jax import plots
from cjepa_jax.errors import require
from cjepa_jax.evaluate import tracking
from cjepa_jax.evaluate.base import Evaluator, Rows
from cjepa_jax.evaluate.features import encoder_for
from cjepa_jax.evaluate.frozen import PIXELS, Frozen
from cjepa_jax.evaluate.masks import read_frame, read_mask
from cjepa_jax.models.vit import normalise, patchify
from cjepa_jax.settings import setting
from cjepa_jax.train import sharding

Encode = Callable[[np.ndarray], np.ndarray]  # frames [n, H, W, C] uint8 -> features of their patches [n, N, D]

_ROUND_TO = 64  # DINO rounds the long side down to a multiple of it


_VIDEOS, _FRAMES = 6, 4  # in the picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Davis(Evaluator):
    """Propagates masks through DAVIS-2017's videos by the features of patches."""

    data_dir: str = setting("", "The folder that holds JPEGImages, Annotations and ImageSets.")
    short_side: int = setting(480, "Pixels of the frames' short side as they are encoded.", within="[1, 8192]")

    name: ClassVar[str] = "davis"
    needs_labels: ClassVar[bool] = False
    in_training: ClassVar[bool] = False
    reads_data: ClassVar[bool] = False
    pictures: ClassVar[tuple[str, ...]] = ("davis.png",)

    def check(self, frozen: Frozen) -> None:
        """Raises UserError for a folder that is not in DAVIS' layout."""
        find(self.data_dir)

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Gives J and F of the encoder and its baselines; draws STEM.davis.png, the masks that the encoder's found."""
        patch_size, found = frozen.model.patch_size, find(self.data_dir)
        rows: Rows = {}
        for name, params in frozen.params.items():
            follow = functools.partial(
                track,
                encode=functools.partial(patch_features(frozen, name), params),
                channels=frozen.data.channels,
                short_side=self.short_side,
                patch_size=patch_size,
                batch_size=frozen.mesh.size,
            )
            videos = frozen.progress(f"masks, {name}", found, total=len(found), unit="videos")
            results: dict[str, Result] = {}
            for number, video in enumerate(videos):
                result = follow(video)
                shown = name == frozen.judged and number < _VIDEOS
                results[video.name] = result if shown else result._replace(masks=result.masks[:0].copy())
            if name == frozen.judged and stem is not None and jax.process_index() == 0:
                _draw(found[:_VIDEOS], results, stem.with_name(f"{stem.name}.davis.png"))
            rows[name] = summary(results)
        return rows


def patch_features(frozen: Frozen, name: str) -> Callable[[Any, np.ndarray], np.ndarray]:
    """Makes a function of parameters and frames [n, H, W, C] uint8 that gives the features of patches [n, N, D].

    They are the encoder's output, or pixels. n must be a multiple of the devices, which share the work.
    """
    model, data = frozen.model, frozen.data

    def apply(params: PyTree, frames: jax.Array) -> jax.Array:
        patches = patchify(normalise(frames, mean=data.mean, std=data.std), model.patch_size)
        if name == PIXELS:
            return patches
        _, height, width, _ = frames.shape
        encoder = encoder_for(model, image_shape=(height, width), trained_shape=frozen.trained_shape)
        return encoder.apply({"params": params}, patches)  # type: ignore[return-value]

    split = sharding.batch(frozen.mesh)
    compiled = jax.jit(apply, in_shardings=(None, split), out_shardings=split)

    def encode(params: PyTree, frames: np.ndarray) -> np.ndarray:
        batch = jax.ShapeDtypeStruct(frames.shape, frames.dtype, sharding=split)
        mine = frames[np.array(sharding.local_rows(batch))]
        return cast(np.ndarray, sharding.fetch(compiled(params, sharding.from_local_rows(mine, batch))))

    return encode


def _draw(shown: "Sequence[Video]", results: "dict[str, Result]", path: epath.Path) -> None:
    columns: dict[str, list[np.ndarray]] = {}
    for video in shown:
        masks = results[video.name].masks
        for part in range(_FRAMES):
            i = round(part * (len(masks) - 1) / (_FRAMES - 1))
            name = "first frame, given" if part == 0 else f"{part}/{_FRAMES - 1} of the video"
            frame = read_frame(video.frames[i], masks.shape[:0:-1], 3) / 255
            colours = colormaps["tab10"]((masks[i].astype(int) - 1) % 10)[..., :3]
            columns.setdefault(name, []).append(np.where(masks[i][..., None] > 0, 0.5 * frame + 0.5 * colours, frame))
    title = f"Masks propagated through {', '.join(video.name for video in shown)}"
    plots.side_by_side(columns, path, title=title)


class Video(NamedTuple):
    """One sequence; frame i belongs to mask i."""

    name: str
    frames: list[epath.Path]
    masks: list[epath.Path]


class Result(NamedTuple):
    """Holds what was found in one video, and how good it is."""

    scores: dict[str, list[float]]  # "J" and "F" of each object
    masks: np.ndarray  # [T, H, W] uint8, what was found


def find(data_dir: str) -> list[Video]:
    """Finds the videos of the split val, with their frames and masks.

    Raises UserError that names what is missing.
    """
    require(bool(data_dir), "davis.data_dir is empty: --config.davis.data_dir=DAVIS names the folder of JPEGImages")
    root = epath.Path(data_dir).expanduser()
    listing = root / "ImageSets" / "2017" / "val.txt"
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
    """Computes (width, height) at which a frame is encoded.

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
    """Averages J, F and J&F, all in [0, 1], over all objects of all videos; `results` go by the video's name."""
    objects = {name: result.scores for name, result in results.items()}
    j, f = (float(np.mean([x for scores in objects.values() for x in scores[key]])) for key in ("J", "F"))
    return {"J&F": (j + f) / 2, "J": j, "F": f, "objects": objects}
