"""What methods share that train a ViT on the patches of images.

Shapes: B images, N patches, P values of a patch.
"""

import dataclasses
import math
from functools import cached_property
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt8

from cjepa_jax.config import undivided
from cjepa_jax.errors import require
from cjepa_jax.methods.base import Method, Panels
from cjepa_jax.models.vit import Encoder, build_encoder, normalise, patchify

FEATURE_PANELS: Panels = {
    "Std over images": ("rep/std", "rep/cosine"),
    "Effective rank": ("rep/rank",),
    "Evaluation on held-out images": ("eval/knn", "eval/logistic"),
}


def apply(network: nn.Module, params: PyTree, *inputs: Any, **settings: Any) -> jax.Array:
    """Runs a network that has one output."""
    return cast(jax.Array, network.apply({"params": params}, *inputs, **settings))


@dataclasses.dataclass(frozen=True)
class EncoderMethod(Method):
    """Trains an encoder of patches; a method of this kind adds what becomes of the features."""

    indivisible: ClassVar[str] = "model.patch_size = {patch} does not divide {side}"  # the error of images like that

    def __post_init__(self):
        patch = self.config.model.patch_size
        side = undivided(self.config.data.image_shape, patch)
        require(not side, self.indivisible.format(patch=patch, side=side))
        _ = self.encoder

    @cached_property
    def encoder(self) -> Encoder:
        """Builds the network that is to be trained."""
        return build_encoder(self.config.model, grid=self.config.grid, gather=self.gather, attend=self.attend)

    def trains(self, network: str) -> bool:
        """Tells whether a network is trained, and not left as it is by `optim.frozen`."""
        return network not in self.config.optim.frozen

    @property
    def patch_values(self) -> int:
        """Counts the values of a patch, P."""
        return self.config.model.patch_size**2 * self.config.data.channels

    def init_encoder(self, rng: jax.Array) -> PyTree[Array]:
        """Draws the parameters of the encoder."""
        return self.encoder.init(rng, jnp.zeros((1, math.prod(self.config.grid), self.patch_values)))["params"]

    def patches(self, images: UInt8[Array, "B H W C"]) -> Float[Array, "B N P"]:
        """Normalises images and cuts them into patches."""
        data = self.config.data
        return patchify(normalise(images, mean=data.mean, std=data.std), self.config.model.patch_size)
