"""Images -> features, on all devices.

Shapes: B images of a batch, N patches, D width, n images of a split.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from cjepa_jax import sharding
from cjepa_jax.config import Data, Model, require
from cjepa_jax.data import pipeline
from cjepa_jax.evaluate.sets import Labelled
from cjepa_jax.models.vit import Encoder, build_encoder, layer_norm, normalise, parse_size, patchify

Apply = Callable[[Any, jax.Array], jax.Array]  # parameters, images [B, H, W, C] uint8 -> features [B, D] float32


def encoder_for(model: Model, *, image_size: int, trained_size: int) -> Encoder:
    """The encoder for images of another size than in training, perhaps: positions are then interpolated.

    Raises UserError where the patches do not divide the images.
    """
    require(
        image_size % model.patch_size == 0,
        f"data.image_size = {image_size} is not divisible by the encoder's patch size, {model.patch_size}",
    )
    grid, trained_grid = (size // model.patch_size for size in (image_size, trained_size))
    model = dataclasses.replace(model, layers="unrolled", remat="none")  # so that it sows what blocks give
    return build_encoder(model, grid=grid, trained_grid=trained_grid)


def mean_features(model: Model, data: Data, *, trained_size: int, layers: int = 1) -> Apply:
    """Means over the patches of the last `layers` blocks' outputs, side by side, [B, layers * D].

    Each block's output goes through the encoder's final norm, as DINO's do, so
    that the last D are the encoder's own features; whether I-JEPA norms the others
    is not known. Raises UserError where the encoder has fewer blocks.
    """
    encoder = encoder_for(model, image_size=data.image_size, trained_size=trained_size)
    depth = parse_size(model.size).depth
    require(layers <= depth, f"{layers} layers are asked for; the encoder has {depth}")

    def apply(params: Any, images: jax.Array) -> jax.Array:
        patches = patchify(normalise(images, mean=data.mean, std=data.std), model.patch_size)
        variables = {"params": params}
        if layers == 1:
            return cast(jax.Array, encoder.apply(variables, patches)).mean(axis=1)
        _, state = encoder.apply(variables, patches, mutable=["intermediates"])  # type: ignore[misc]
        blocks = state["intermediates"]["blocks"][-layers:]
        return jnp.concatenate([layer_norm(x, params=params["norm"]).mean(axis=1) for x in blocks], axis=1)

    return apply


def pixels(params: Any, images: jax.Array) -> jax.Array:
    """[B, H, W, C] uint8 -> values in [0, 1], of sides longer than 32 every k-th pixel."""
    stride = max(1, images.shape[1] // 32)
    return images[:, stride // 2 :: stride, stride // 2 :: stride].reshape(len(images), -1).astype(jnp.float32) / 255


class Extractor:
    """Features of the same images by several encoders, in one pass over them.

    Processes share the reading, devices the work, without a word to one another.
    """

    def __init__(self, encoders: Mapping[str, Apply], mesh: jax.sharding.Mesh, *, batch_size: int):
        """batch_size is rounded up to a multiple of the devices."""
        self.size = math.ceil(batch_size / mesh.size) * mesh.size
        self._batch = sharding.batch(mesh)
        self._encoders = {
            name: jax.jit(apply, in_shardings=(None, self._batch), out_shardings=self._batch)
            for name, apply in encoders.items()
        }

    def batches(
        self, params: Mapping[str, Any], reader: pipeline.Reader, indices: Sequence[int], view: pipeline.View
    ) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
        """Encoder's name -> features [size, D], with labels [size], on the devices; rows of NO_IMAGE hold nothing.

        params: encoder's name -> parameters, whole on every device.
        """
        data = reader.data
        shape = (self.size, data.image_size, data.image_size, data.channels)
        images = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=self._batch)
        labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=self._batch)
        rows = sharding.local_rows(images)
        for mine, my_labels in pipeline.labelled_batches(reader, indices, size=self.size, view=view, rows=rows):
            batch = sharding.from_local_rows(mine, images)
            found = {name: self._encoders[name](p, batch) for name, p in params.items()}
            yield found, sharding.from_local_rows(my_labels, labels)

    def split(
        self, params: Mapping[str, Any], reader: pipeline.Reader, indices: Sequence[int], view: pipeline.View
    ) -> dict[str, Labelled]:
        """Encoder's name -> the readable images at `indices`."""
        features: dict[str, list[np.ndarray]] = {name: [] for name in params}
        kept: list[np.ndarray] = []
        waiting: list[Any] = []  # a batch is fetched while the devices work on the next

        def fetch() -> None:
            found, labels = sharding.fetch(waiting.pop())
            read = labels != pipeline.NO_IMAGE
            for name, values in found.items():
                features[name].append(values[read])
            kept.append(labels[read])

        for batch in self.batches(params, reader, indices, view):
            if waiting:
                fetch()
            waiting.append(batch)
        fetch()
        return {name: Labelled(np.concatenate(values), np.concatenate(kept)) for name, values in features.items()}
