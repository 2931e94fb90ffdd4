"""What methods share that compare augmented views of an image: one encoder, mean pooling, and an MLP with batch norm.

Shapes: B images of the global batch, V views of each, N patches, D encoder width, d projected width.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from cjepa_jax.batch import Batch
from cjepa_jax.config import Config
from cjepa_jax.data.augment import Augmentation
from cjepa_jax.errors import require
from cjepa_jax.methods.base import Inputs, Outputs, Params, Transformer
from cjepa_jax.methods.encoder import EncoderMethod, apply
from cjepa_jax.models.projector import Projector
from cjepa_jax.models.vit import parse_size
from cjepa_jax.settings import group, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentedViews:
    """How the views of an image differ, beside the random crop, flip and colours that `data` describes for all."""

    blur: tuple[float, ...] = setting(
        (0.5, 0.5), "Probability of SimCLR's Gaussian blur, a number for each view.", within="[0, 1]"
    )
    solarize: tuple[float, ...] = setting(
        (0.0, 0.0), "Probability of solarisation, a number for each view.", within="[0, 1]"
    )
    saturation: float = setting(
        1.0, "Factor on what data.color does to the saturation; BYOL's and VICReg's is 0.5.", within="[0, 10]"
    )

    def __post_init__(self):
        require(
            len(self.blur) == len(self.solarize) >= 2,
            "views.blur and views.solarize must have one number for each view, and at least two, got "
            f"{self.blur} and {self.solarize}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiameseConfig(Config):
    """Settings of a method that compares augmented views."""

    views: AugmentedViews = group(AugmentedViews, "How the augmented views of an image differ.")

    def __post_init__(self):
        super().__post_init__()
        require(self.data.blur == 0, f"data.blur = {self.data.blur} must be 0: views.blur says it for each view")


@dataclasses.dataclass(frozen=True)
class Siamese(EncoderMethod):
    """Encodes every view by the same network; a method of this kind adds `projector` and `loss`.

    The projector's batch norm sees the whole global batch, so it runs in `loss`.
    """

    config: SiameseConfig

    @property
    @abc.abstractmethod
    def projector(self) -> Projector:
        """Builds the network from pooled features to what the loss compares."""

    @property
    def views(self) -> tuple[Augmentation, ...]:
        """Describes the views: the crop, flip and colours of `data`, each with its own blur and solarisation."""
        (shared,) = super().views
        views = self.config.views
        shared = dataclasses.replace(shared, saturation=views.saturation)
        return tuple(
            dataclasses.replace(shared, blur=blur, solarize=solarize)
            for blur, solarize in zip(views.blur, views.solarize, strict=True)
        )

    def init(self, rng: jax.Array) -> Params:
        """Draws the parameters of encoder and projector."""
        rng_encoder, rng_projector = jax.random.split(rng)
        pooled = jnp.zeros((2, self.encoder.size.width))
        return {
            "encoder": self.init_encoder(rng_encoder),
            "projector": self.projector.init(rng_projector, pooled).get("params", {}),
        }

    def prepare(self, batch: Batch, rng: jax.Array) -> Inputs:
        """Gives the views [B, V, H, W, C] uint8; their random draws were made when the images were read."""
        return batch.images

    def forward(self, params: Params, averages: Params, inputs: Inputs) -> Outputs:
        """Computes the mean of the patches' features of each view, "views" [B, V, D]; "features" are the first view's.

        inputs: images [B, V, H, W, C] uint8.
        """
        patches = self.patches(rearrange(inputs, "b v h w c -> (b v) h w c"))
        features = apply(self.encoder, params["encoder"], patches)
        views = rearrange(features.mean(axis=1), "(b v) d -> b v d", v=len(self.views))
        return {"views": views, "features": views[:, 0]}

    def project(self, params: Params, outputs: Outputs) -> Float[Array, "V B d"]:
        """Projects the pooled features of the batch; batch statistics are over the images, separately for each view."""
        return apply(self.projector, params["projector"], rearrange(outputs["views"], "b v d -> v b d"))

    def transformers(self) -> dict[str, Transformer]:
        """Lists the encoder, which runs once for each view."""
        size, tokens, views = parse_size(self.config.model.size), math.prod(self.config.grid), len(self.views)
        embedding = 2 * self.patch_values * size.width * tokens * views
        return {"encoder": Transformer(views, tokens, *size, False, self.trains("encoder"), embedding)}
