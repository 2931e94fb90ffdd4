"""From images to features, on all devices.

Shapes: B images of a batch, N patches, L layers, D width, n images of a split.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cjepa_jax.config import Data, Model, grid_of, undivided
from cjepa_jax.data import pipeline
from cjepa_jax.data.decode import Shape
from cjepa_jax.errors import require
from cjepa_jax.evaluate.sets import Labelled
from cjepa_jax.models.layer_norm import layer_norm
from cjepa_jax.models.vit import Encoder, build_encoder, normalise, parse_size, patchify
from cjepa_jax.train import sharding

Params = Mapping[str, Any]
# Maps parameters and images to features.
Apply = Callable[[Params, UInt8[Array, "B H W C"]], Float[Array, "B L D"]]


def encoder_for(model: Model, *, image_shape: Shape, trained_shape: Shape) -> Encoder:
    """Builds the encoder for images of any shape; positions are interpolated where it is not that of training.

    Raises UserError where the patches do not divide the images.
    """
    side = undivided(image_shape, model.patch_size)
    require(not side, f"{side} is not divisible by the encoder's patch size, {model.patch_size}")
    grid, trained_grid = (grid_of(shape, model.patch_size) for shape in (image_shape, trained_shape))
    model = dataclasses.replace(model, layers="unrolled", remat="none")  # so that it sows what blocks give
    return build_encoder(model, grid=grid, trained_grid=trained_grid)


def patch_features(
    model: Model, *, image_shape: Shape, trained_shape: Shape, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Params, UInt8[Array, "B H W C"]], Float[Array, "B N D"]]:
    """Returns a function that maps parameters and images to the features of their patches, in raster order, float32.

    mean and std are of each channel, as in training. Raises UserError as `encoder_for` does.
    """
    encoder = encoder_for(model, image_shape=image_shape, trained_shape=trained_shape)

    def apply(params: Params, images: UInt8[Array, "B H W C"]) -> Float[Array, "B N D"]:
        patches = patchify(normalise(images, mean=mean, std=std), model.patch_size)
        return cast(jax.Array, encoder.apply({"params": params}, patches))

    return apply


def mean_features(model: Model, data: Data, *, trained_shape: Shape, layers: int = 1) -> Apply:
    """Returns a function that averages the outputs of the last `layers` blocks over the patches: [B, layers, D].

    Each block's output goes through the encoder's final norm, as DINO's do, so that the last layer is the encoder's
    own output; whether I-JEPA norms the others is not known. Raises UserError where the encoder has fewer blocks.
    """
    shapes = {"image_shape": data.image_shape, "trained_shape": trained_shape}
    encoder = encoder_for(model, **shapes)
    last = patch_features(model, **shapes, mean=data.mean, std=data.std)
    depth = parse_size(model.size).depth
    require(layers <= depth, f"{layers} layers are asked for; the encoder has {depth}")

    def apply(params: Params, images: UInt8[Array, "B H W C"]) -> Float[Array, "B L D"]:
        if layers == 1:
            return last(params, images).mean(axis=1)[:, None]
        patches = patchify(normalise(images, mean=data.mean, std=data.std), model.patch_size)
        _, state = encoder.apply({"params": params}, patches, mutable=["intermediates"])  # type: ignore[misc]
        blocks = state["intermediates"]["blocks"][-layers:]
        return jnp.stack([layer_norm(x, params=params["norm"]).mean(axis=1) for x in blocks], axis=1)

    return apply


def pixels(params: Params, images: UInt8[Array, "B H W C"]) -> Float[Array, "B 1 D"]:
    """Returns the images' values in [0, 1], flattened; of a side of S >= 64 pixels it takes every (S // 32)-th."""
    rows, columns = (slice(k // 2, None, k) for side in images.shape[1:3] for k in [max(1, side // 32)])
    thinned = images[:, rows, columns]
    return thinned.reshape(len(images), 1, -1).astype(jnp.float32) / 255


class Extractor:
    """Computes features of the same images by several encoders, in one pass over the images.

    The processes share the reading and the devices share the work; each process reads its own rows of a batch.
    """

    def __init__(self, encoders: Mapping[str, Apply], mesh: jax.sharding.Mesh, *, batch_size: int):
        """Rounds `batch_size` up to a multiple of the devices."""
        self.encoders, self.mesh = encoders, mesh
        self.size = math.ceil(batch_size / mesh.size) * mesh.size
        self._batch = sharding.batch(mesh)
        self._compiled = {
            name: jax.jit(apply, in_shardings=(None, self._batch), out_shardings=self._batch)
            for name, apply in encoders.items()
        }

    def batches(
        self, params: Mapping[str, Params], reader: pipeline.Reader, indices: Sequence[int], view: pipeline.View
    ) -> Iterator[tuple[dict[str, Float[Array, "B L D"]], Int[Array, " B"]]]:
        """Yields features by the encoder's name, and labels, on the devices; rows labelled NO_IMAGE hold nothing.

        `params` are each encoder's parameters, whole on every device.
        """
        data = reader.data
        shape = (self.size, *data.image_shape, data.channels)
        images = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=self._batch)
        labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=self._batch)
        rows = sharding.local_rows(images)
        for mine, my_labels in pipeline.labelled_batches(reader, indices, size=self.size, view=view, rows=rows):
            batch = sharding.from_local_rows(mine, images)
            found = {name: self._compiled[name](p, batch) for name, p in params.items()}
            yield found, sharding.from_local_rows(my_labels, labels)

    def split(
        self,
        params: Mapping[str, Params],
        reader: pipeline.Reader,
        indices: Sequence[int],
        view: pipeline.View,
        *,
        seen: Callable[[int], object] = lambda images: None,
    ) -> dict[str, Labelled]:
        """Returns features [n, L, D] and labels of the readable images at `indices`, by the encoder's name.

        `seen` is called after each batch with the number of its images.
        """
        features: dict[str, list[np.ndarray]] = {name: [] for name in params}
        kept: list[np.ndarray] = []
        waiting: list[Any] = []  # a batch is fetched while the devices work on the next
        left = len(indices)

        def fetch() -> None:
            nonlocal left
            found, labels = sharding.fetch(waiting.pop())
            read = labels != pipeline.NO_IMAGE
            for name, values in found.items():
                features[name].append(values[read])
            kept.append(labels[read])
            seen(min(len(labels), left))
            left -= len(labels)

        for batch in self.batches(params, reader, indices, view):
            if waiting:
                fetch()
            waiting.append(batch)
        fetch()
        return {name: Labelled(np.concatenate(values), np.concatenate(kept)) for name, values in features.items()}
