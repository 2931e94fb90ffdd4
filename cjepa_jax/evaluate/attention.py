"""Pictures of what the last layer attends to, and of the main directions of patch features as colours.

Shapes: B images, N patches in raster order, D width.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from etils import epath
from jaxtyping import Array, Float, PyTree, UInt8

from cjepa_jax import plots, pretrained
from cjepa_jax.config import Grid
from cjepa_jax.errors import nearest, require
from cjepa_jax.evaluate.base import Evaluator, Rows
from cjepa_jax.evaluate.features import encoder_for
from cjepa_jax.evaluate.frozen import UNTRAINED, Frozen
from cjepa_jax.models.vit import Block, Encoder, normalise, patchify
from cjepa_jax.settings import setting

FLAG = "--config.attention.other"
OTHER = "other."  # before the name of an encoder of the second checkpoint
COLUMNS = (*pretrained.ENCODERS, *(OTHER + name for name in pretrained.ENCODERS), UNTRAINED)


class Shown(NamedTuple):
    """Names one encoder that is shown, with what it takes to run it."""

    name: str
    encoder: Encoder
    params: PyTree
    networks: pretrained.Pretrained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(Evaluator):
    """Draws the last layer's attention and the main components of patch features."""

    images: int = setting(8, "Images of the test split, evenly spread.", within="[1, 1000]")
    query: tuple[int, ...] = setting(
        (), "(row, column) of the patch that asks; () is the mean over all patches.", within="[0, 8191]"
    )
    other: str = setting("", "A second checkpoint to show beside the first; empty: none.")
    columns: tuple[str, ...] = setting((), f"Encoders to show, in this order, of {', '.join(COLUMNS)}; (): all.")

    name: ClassVar[str] = "attention"
    needs_labels: ClassVar[bool] = False
    in_training: ClassVar[bool] = False
    reads_checkpoint: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]] = ("entropy of attention / log N",)
    pictures: ClassVar[tuple[str, ...]] = ("attention.png", "attention_overlaid.png", "components.png")

    def __post_init__(self):
        require(len(self.query) in (0, 2), f"attention.query must be () or (row, column), got {self.query}")
        for name in self.columns:
            require(name in COLUMNS, f"attention.columns: {name!r} is not known; {nearest(name, COLUMNS)}")
        require(len(set(self.columns)) == len(self.columns), "attention.columns names a column twice")

    def check(self, frozen: Frozen) -> None:
        """Raises UserError where a checkpoint lacks an encoder that is to be shown."""
        self._shown(frozen)

    def _shown(self, frozen: Frozen) -> Sequence[str]:
        """Lists the columns to draw, by their names in COLUMNS."""
        assert frozen.origin, "attention looks at checkpoints"
        there = list(pretrained.available(frozen.origin.checkpoint))
        if self.other:
            there += [OTHER + name for name in pretrained.available(epath.Path(self.other), flag=FLAG)]
        if UNTRAINED in frozen.params:
            there.append(UNTRAINED)
        there = [name for name in COLUMNS if name in there]
        for name in self.columns:
            of_other = name.startswith(OTHER) and not self.other
            hint = f"; {FLAG}=DIR names the second checkpoint" if of_other else ""
            require(name in there, f"attention.columns: there is no {name}, but {', '.join(there)}{hint}")
        return self.columns or there

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Draws STEM.attention.png, STEM.attention_overlaid.png and STEM.components.png.

        A row is an image, a column an encoder. The rows of the result hold the entropy of the attention, and the share
        of the variance that the three components have. Raises UserError for a second checkpoint, or a query, that does
        not fit.
        """
        names = self._shown(frozen)
        assert frozen.origin, "attention looks at checkpoints"
        checkpoints = {"": frozen.origin.checkpoint} | ({OTHER: epath.Path(self.other)} if self.other else {})
        found = _encoders(frozen, checkpoints, names)
        encoders = [found[name] for name in names]
        query = _query_number(self.query, [shown.encoder.grid for shown in encoders])
        images = frozen.spread_images(self.images)
        shape = images.shape[1:3]
        patch_size = shape[0] // encoders[0].encoder.grid[0]
        seen = images if query is None else _outlined(images, *self.query, patch_size=patch_size)
        maps, components, rows = {"image": seen}, {"image": images}, {}
        for shown in encoders:
            weights, found = jax.jit(functools.partial(_look, shown))(shown.params, images)
            grid = shown.encoder.grid
            maps[shown.name] = jax.device_get(enlarged(attended(weights, query), grid=grid, shape=shape))
            colours, shares = component_colours(jax.device_get(found))
            components[shown.name] = colours.reshape(len(images), *grid, 3)
            rows[shown.name.replace("\n", ", ")] = {
                "entropy of attention / log N": float(entropy(weights)),
                "variance of three components": sum(shares),
            }
        what = "mean over all patches" if query is None else "patch ({}, {}), outlined".format(*self.query)
        if stem is not None and jax.process_index() == 0:
            title = f"Attention of the last layer, mean over heads, in multiples of uniform; query: {what}"
            plots.side_by_side(maps, stem.with_name(f"{stem.name}.attention.png"), title=title)
            path = stem.with_name(f"{stem.name}.attention_overlaid.png")
            plots.side_by_side(maps, path, title=title, under=images)
            title = "First three principal components of patch features, as red, green and blue"
            plots.side_by_side(components, stem.with_name(f"{stem.name}.components.png"), title=title)
        return rows


def _look(shown: Shown, params: PyTree, images: UInt8[Array, "B H W C"]) -> tuple[jax.Array, jax.Array]:
    networks = shown.networks
    patches = patchify(normalise(images, mean=networks.mean, std=networks.std), networks.model.patch_size)
    return last_layer(shown.encoder, params, patches)


def _encoders(frozen: Frozen, checkpoints: Mapping[str, epath.Path], columns: Sequence[str]) -> dict[str, Shown]:
    """Loads the encoders that columns show, for the images at hand; each checkpoint is named by its columns' prefix."""
    found: dict[str, Shown] = {}
    runs = run_names([pretrained.describe(path)[0] for path in checkpoints.values()])
    for run, (prefix, path) in zip(runs, checkpoints.items(), strict=True):
        kinds = {"target_encoder": "target encoder", "encoder": "context encoder"}
        if "target_encoder" not in pretrained.available(path):
            kinds["encoder"] = "encoder"
        names = [name for name in kinds if prefix + name in columns]
        titles = [shown.name for shown in found.values()]
        networks = pretrained.load(path, names)
        channels = len(networks.mean)
        require(
            channels == frozen.data.channels,
            f"checkpoint {path} takes images of {channels} channels, the first one of {frozen.data.channels}",
        )
        encoder = encoder_for(networks.model, image_shape=frozen.data.image_shape, trained_shape=networks.image_shape)
        for name in names:
            title = f"{run}, step {networks.step}\n{kinds[name]}"
            require(title not in titles, f"{FLAG} {path} is the checkpoint itself; name another one")
            found[prefix + name] = Shown(title, encoder, networks.params[name], networks)
        if not prefix and UNTRAINED in columns:
            found[UNTRAINED] = Shown(UNTRAINED, encoder, frozen.params[UNTRAINED], networks)
    return found


def run_names(workdirs: Sequence[epath.Path]) -> list[str]:
    """Names workdirs by the fewest last parts of their paths that tell them apart, such as I-JEPA/seed0."""
    for count in range(1, max(len(workdir.parts) for workdir in workdirs)):
        names = ["/".join(workdir.parts[-count:]) for workdir in workdirs]
        if len(set(names)) == len(set(workdirs)):
            return names
    return [str(workdir) for workdir in workdirs]


def _query_number(query: Sequence[int], grids: Sequence[Grid]) -> int | None:
    """Gives the patch's number in raster order; None where the query is the mean over all."""
    if not query:
        return None
    row, column = query
    rows, columns = grids[0]
    require(
        row < rows and column < columns,
        f"attention.query = {tuple(query)} is not a patch: rows are 0 to {rows - 1}, columns 0 to {columns - 1}",
    )
    lowest, highest = ("x".join(map(str, choose(grids))) for choose in (min, max))
    require(lowest == highest, f"attention.query: the checkpoints' grids differ, {lowest} and {highest} patches")
    return row * columns + column


def _outlined(images: np.ndarray, row: int, column: int, *, patch_size: int) -> np.ndarray:
    """Gives the images [n, H, W, C] as RGB, with the edge of a patch in red."""
    images = np.broadcast_to(images, (*images.shape[:-1], 3)).copy()
    patch = images[:, row * patch_size :, column * patch_size :][:, :patch_size, :patch_size]
    for edge in (patch[:, 0], patch[:, -1], patch[:, :, 0], patch[:, :, -1]):
        edge[:] = (255, 0, 0)
    return images


def last_layer(
    encoder: Encoder, params: PyTree, patches: Float[Array, "B N F"]
) -> tuple[Float[Array, "B heads N N"], Float[Array, "B N D"]]:
    """Computes the attention of the last block, queries before keys, and the features; float32.

    The encoder's layers must be unrolled.
    """
    features, state = encoder.apply({"params": params}, patches, mutable=["intermediates"])  # type: ignore[misc]
    *_, before, _ = state["intermediates"]["blocks"]
    size = encoder.size
    block = Block(size.heads, size.mlp_ratio, encoder.init_scheme, encoder.dtype)
    last = params[f"block{size.depth - 1:02}"]
    _, state = block.apply({"params": last}, before, mutable=["intermediates"])  # type: ignore[misc]
    ((q, k),) = state["intermediates"]["queries_and_keys"]
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / q.shape[-1] ** 0.5
    return jax.nn.softmax(scores, axis=-1), cast(jax.Array, features)


def entropy(attention: Float[Array, "B heads N N"]) -> Float[Array, ""]:
    """Averages the entropy of attention over heads and queries, and divides it by log N: 1 is uniform."""
    return -(attention * jnp.log(attention.clip(1e-30))).sum(axis=-1).mean() / jnp.log(attention.shape[-1])


def attended(attention: Float[Array, "B heads N N"], query: int | None) -> Float[Array, "B N"]:
    """Tells how often each patch is attended to, in multiples of 1 / N.

    This is the mean over the heads, of the patch `query`, or, where it is None, over all patches.
    """
    rows = attention.mean(axis=1)
    return (rows.mean(axis=1) if query is None else rows[:, query]) * rows.shape[-1]


def enlarged(maps: Float[Array, "B N"], *, grid: Grid, shape: tuple[int, int]) -> Float[Array, "B H W"]:
    """Enlarges maps of a grid of patches to maps of the pixels of images of a shape, bilinearly."""
    maps = rearrange(maps, "b (h w) -> b h w", h=grid[0])
    return jax.image.resize(maps, (len(maps), *shape), "bilinear")


def component_colours(features: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Gives the first three principal components of features [B, N, D] as colours [B, N, 3] in [0, 1], and shares.

    There is one PCA for all patches of all images; each component is stretched so that one
    patch in a hundred is beyond either end. Its sign is such that its largest
    weight is positive. The shares are those of the variance.
    """
    from sklearn.decomposition import PCA  # here, because it takes a second

    pca = PCA(3, svd_solver="full")
    components = pca.fit_transform(rearrange(features, "b n d -> (b n) d"))  # scikit-learn fixes the signs
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    colours = ((components - low) / (high - low)).clip(0, 1)
    return rearrange(colours, "(b n) c -> b n c", b=len(features)), pca.explained_variance_ratio_.tolist()
