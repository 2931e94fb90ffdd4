"""Predictor: a narrow ViT from context features to the features of hidden blocks.

Shapes: B images, M target blocks, K_c context and K_t target tokens, D encoder
width, P predictor width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import PyTree

from cjepa_jax.config import Grid, Model
from cjepa_jax.errors import require
from cjepa_jax.models.attention import Attend, attend_xla
from cjepa_jax.models.layer_norm import layer_norm
from cjepa_jax.models.masking import Masks
from cjepa_jax.models.vit import (
    Block,
    Layers,
    apply_blocks,
    check_positions,
    kernel_init,
    parse_size,
    sincos_positions,
)
from cjepa_jax.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """The narrow ViT that predicts hidden blocks; it has the encoder's number of heads."""

    width: int = setting(384, "Width of the predictor.", within="[4, 16384]")
    depth: int = setting(6, "Number of its blocks; I-JEPA: 6 for S and B, 12 for L and H, 16 for g.", within="[1, 256]")


class Predictor(nn.Module):
    """Predicts each target block separately, from a sequence [context, block] of K_c + K_t tokens."""

    width: int
    depth: int
    heads: int
    features: int
    grid: Grid
    init_scheme: Literal["normal", "fan_in"]
    dtype: jnp.dtype
    layers: Layers

    @nn.compact
    def __call__(self, context: jax.Array, masks: Masks) -> jax.Array:
        """Predicts features [B, M, K_t, D] float32 of the blocks from context features [B, K_c, D]."""
        _, blocks, length = masks.target_idx.shape

        def dense(features, name):
            return nn.Dense(features, dtype=self.dtype, kernel_init=kernel_init(self.init_scheme), name=name)

        positions = jnp.asarray(sincos_positions(self.width, self.grid)).astype(self.dtype)
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        x = dense(self.width, "embed")(context) + positions[masks.context_idx]
        x = repeat(x, "b k p -> (b m) k p", m=blocks)
        targets = mask_token.astype(self.dtype) + positions[rearrange(masks.target_idx, "b m k -> (b m) k")]
        valid = jnp.concatenate(
            [
                repeat(masks.context_valid, "b k -> (b m) k", m=blocks),
                rearrange(masks.target_valid, "b m k -> (b m) k"),
            ],
            axis=1,
        )
        x = jnp.concatenate([x, targets], axis=1)
        make = functools.partial(Block, self.heads, 4, self.init_scheme, self.dtype, self.layers.attend)
        x = apply_blocks(self, make, self.depth, self.layers, x, valid)
        x = layer_norm(x[:, -length:], name="norm")
        return rearrange(dense(self.features, "head")(x), "(b m) k d -> b m k d", m=blocks).astype(jnp.float32)


def build_predictor(
    predictor: PredictorConfig,
    model: Model,
    *,
    grid: Grid,
    gather: Callable[[PyTree], PyTree] | None = None,
    attend: Attend = attend_xla,
) -> Predictor:
    """Builds the predictor that a config describes, with the encoder's heads.

    Raises UserError for a width that the heads or the positions do not divide.
    """
    size = parse_size(model.size)
    require(
        predictor.width % size.heads == 0 and predictor.width % 4 == 0,
        f"predictor.width = {predictor.width} must be a multiple of 4 and of the encoder's {size.heads} heads",
    )
    check_positions(predictor.width, grid)
    return Predictor(
        width=predictor.width,
        depth=predictor.depth,
        heads=size.heads,
        features=size.width,
        grid=grid,
        init_scheme=model.init,
        dtype=jnp.dtype(model.dtype),
        layers=Layers(model.layers == "scanned", model.remat, gather, attend),
    )
