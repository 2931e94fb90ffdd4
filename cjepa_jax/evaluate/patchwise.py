"""The methods that look at single patches: pictures of attention and components, and masks through videos."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from etils import epath
from matplotlib import colormaps

from cjepa_jax import plots, pretrained, sharding
from cjepa_jax.config import require
from cjepa_jax.data import pipeline
from cjepa_jax.evaluate import attention as maps
from cjepa_jax.evaluate import davis as videos
from cjepa_jax.evaluate import features
from cjepa_jax.evaluate.results import Rows
from cjepa_jax.evaluate.subject import CHECKPOINT, PIXELS, UNTRAINED, Subject
from cjepa_jax.models.vit import Encoder, normalise, patchify

_VIDEOS, _FRAMES = 6, 4  # in the picture


class _Tower(NamedTuple):
    """One encoder to show."""

    name: str
    encoder: Encoder
    params: Any
    networks: pretrained.Pretrained


def attention(subject: Subject, path: epath.Path) -> Rows:
    """NAME.attention.png and NAME.components.png: a row an image, a column an encoder: target, context, untrained.

    The rows of the result: the entropy of the attention, and the share of the
    variance that the three components have. Raises UserError for a second
    checkpoint, or a query, that does not fit.
    """
    options = subject.settings.attention
    towers = _towers(subject, subject.workdir / "checkpoints" / str(subject.networks.step))
    if options.other:
        towers += _towers(subject, epath.Path(options.other))
    if UNTRAINED in subject.params:
        towers.append(towers[0]._replace(name=UNTRAINED, params=subject.params[UNTRAINED]))
    grid = towers[0].encoder.grid
    query = _query(options.query, [tower.encoder.grid for tower in towers])
    images = _images(subject)
    shown = images if query is None else _outlined(images, *options.query, patch_size=images.shape[1] // grid)
    attended, components, rows = {"image": shown}, {"image": images}, {}
    for tower in towers:
        weights, found = jax.jit(functools.partial(_look, tower))(tower.params, images)
        large = maps.enlarged(maps.attended(weights, query), image_size=images.shape[1])
        attended[tower.name] = jax.device_get(large)
        colours, shares = maps.component_colours(jax.device_get(found))
        components[tower.name] = colours.reshape(len(images), tower.encoder.grid, tower.encoder.grid, 3)
        rows[tower.name.replace("\n", ", ")] = {
            "entropy of attention / log N": float(maps.entropy(weights)),
            "variance of three components %": sum(shares),
        }
    what = "mean over all patches" if query is None else "patch ({}, {}), outlined".format(*options.query)
    if jax.process_index() == 0:
        path.parent.mkdir(exist_ok=True)
        title = f"Attention of the last layer, mean over heads, in multiples of uniform; query: {what}"
        plots.side_by_side(attended, path.with_suffix(".png"), title=title)
        title = "First three principal components of patch features, as red, green and blue"
        components_path = path.with_name(path.name.replace(".attention.json", ".components.png"))
        plots.side_by_side(components, components_path, title=title)
    return rows


def _look(tower: _Tower, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    networks = tower.networks
    patches = patchify(normalise(images, mean=networks.mean, std=networks.std), networks.model.patch_size)
    return maps.last_layer(tower.encoder, params, patches)


def _towers(subject: Subject, checkpoint: epath.Path) -> list[_Tower]:
    """Both encoders of a checkpoint, for the subject's images; one, where it has but one."""
    names = [name for name in ("target_encoder", "encoder") if name in pretrained.available(checkpoint)]
    networks = pretrained.load(checkpoint, names)
    channels = len(networks.mean)
    require(
        channels == subject.data.channels,
        f"checkpoint {checkpoint} wants images of {channels} channels, the first one of {subject.data.channels}",
    )
    encoder = features.encoder_for(networks.model, image_size=subject.data.image_size, trained_size=networks.image_size)
    workdir, _ = pretrained.describe(checkpoint)
    where = f"{workdir.name}, step {networks.step}"
    kinds = {"target_encoder": "target encoder", "encoder": "context encoder"}
    return [_Tower(f"{where}\n{kinds[name]}", encoder, networks.params[name], networks) for name in names]


def _query(query: Sequence[int], grids: Sequence[int]) -> int | None:
    """The patch's number in raster order; None where it is the mean over all."""
    if not query:
        return None
    row, column = query
    grid = grids[0]
    require(
        min(query) >= 0 and max(query) < grid,
        f"attention.query = {tuple(query)} is no patch: rows and columns are 0 to {grid - 1}",
    )
    require(
        len(set(grids)) == 1, f"attention.query: the checkpoints' grids differ, {min(grids)} and {max(grids)} patches"
    )
    return row * grid + column


def _images(subject: Subject) -> np.ndarray:
    """[n, H, W, C] uint8: some readable images of the test split, evenly spread over it."""
    reader = subject.test
    wanted = min(subject.settings.attention.images, len(reader.source))
    indices = np.linspace(0, len(reader.source) - 1, wanted).round().astype(int)
    view = pipeline.central_view(reader, crop_fraction=subject.crop_fraction)
    ((images, labels),) = pipeline.labelled_batches(reader, indices.tolist(), size=wanted, view=view)
    images = images[labels != pipeline.NO_IMAGE]
    require(len(images) > 0, f"data.test_split = {subject.data.test_split!r}: none of {wanted} images can be read")
    return images


def _outlined(images: np.ndarray, row: int, column: int, *, patch_size: int) -> np.ndarray:
    """The images [n, H, W, C] as RGB, with the edge of a patch in red."""
    images = np.broadcast_to(images, (*images.shape[:-1], 3)).copy()
    patch = images[:, row * patch_size :, column * patch_size :][:, :patch_size, :patch_size]
    for edge in (patch[:, 0], patch[:, -1], patch[:, :, 0], patch[:, :, -1]):
        edge[:] = (255, 0, 0)
    return images


def davis(subject: Subject, path: epath.Path) -> Rows:
    """J and F of the encoder and its baselines, and NAME.davis.png: the masks that the checkpoint's found.

    Raises UserError for a folder that is not in DAVIS' layout.
    """
    options, patch_size = subject.settings.davis, subject.networks.model.patch_size
    found = videos.find(options.data_dir)
    rows: Rows = {}
    for name, params in subject.params.items():
        encode = functools.partial(_encode(subject, name), params)
        track = functools.partial(
            videos.track,
            encode=encode,
            channels=subject.data.channels,
            short_side=options.short_side,
            patch_size=patch_size,
            batch_size=subject.mesh.size,
        )
        results = {video.name: track(video) for video in found}
        if name == CHECKPOINT and jax.process_index() == 0:
            path.parent.mkdir(exist_ok=True)
            _draw(found[:_VIDEOS], results, path.with_suffix(".png"))
        rows[name] = videos.summary(results)
    return rows


def _encode(subject: Subject, name: str) -> Callable[[Any, np.ndarray], np.ndarray]:
    """Parameters, frames [n, H, W, C] uint8 -> features of their patches [n, N, D]: the encoder's output, or pixels.

    n: a multiple of the devices, which share the work.
    """
    networks, data = subject.networks, subject.data
    model = networks.model

    def apply(params: Any, frames: jax.Array) -> jax.Array:
        patches = patchify(normalise(frames, mean=data.mean, std=data.std), model.patch_size)
        if name == PIXELS:
            return patches
        square = features.encoder_for(model, image_size=networks.image_size, trained_size=networks.image_size)
        _, height, width, _ = frames.shape
        encoder = square.clone(grid=height // model.patch_size, columns=width // model.patch_size)
        return encoder.apply({"params": params}, patches)  # type: ignore[return-value]

    split = sharding.batch(subject.mesh)
    compiled = jax.jit(apply, in_shardings=(None, split), out_shardings=split)

    def encode(params: Any, frames: np.ndarray) -> np.ndarray:
        batch = jax.ShapeDtypeStruct(frames.shape, frames.dtype, sharding=split)
        mine = frames[np.array(sharding.local_rows(batch))]
        return cast(np.ndarray, sharding.fetch(compiled(params, sharding.from_local_rows(mine, batch))))

    return encode


def _draw(shown: Sequence[videos.Video], results: dict[str, videos.Result], path: epath.Path) -> None:
    columns: dict[str, list[np.ndarray]] = {}
    for video in shown:
        masks = results[video.name].masks
        for part in range(_FRAMES):
            i = round(part * (len(masks) - 1) / (_FRAMES - 1))
            name = "first frame, given" if part == 0 else f"{part}/{_FRAMES - 1} of the video"
            frame = videos.read_frame(video.frames[i], masks.shape[:0:-1], 3) / 255
            colours = colormaps["tab10"]((masks[i].astype(int) - 1) % 10)[..., :3]
            columns.setdefault(name, []).append(np.where(masks[i][..., None] > 0, 0.5 * frame + 0.5 * colours, frame))
    title = f"Masks propagated through {', '.join(video.name for video in shown)}"
    plots.side_by_side(columns, path, title=title)
