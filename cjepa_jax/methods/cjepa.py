"""C-JEPA (Mo and Tong 2024, arXiv 2410.19560): I-JEPA's prediction of hidden blocks, plus VICReg's terms.

Shapes: B images, N patches, M target blocks, K_c context and K_t target tokens, D encoder width, P values of a patch.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, UInt8, UInt32

from cjepa_jax.batch import Batch
from cjepa_jax.config import Config
from cjepa_jax.methods import losses, sigreg
from cjepa_jax.methods.base import Metrics, Outputs, Panels, Params, Transformer, keep
from cjepa_jax.methods.encoder import FEATURE_PANELS, EncoderMethod, apply
from cjepa_jax.methods.sigreg import Sigreg
from cjepa_jax.models.masking import Mask, Masks, context_tokens, sample_masks, target_tokens
from cjepa_jax.models.predictor import Predictor, PredictorConfig, build_predictor
from cjepa_jax.models.projector import Projector
from cjepa_jax.models.vit import parse_size, take
from cjepa_jax.settings import group, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictionLoss:
    """Which distance the prediction is to make small."""

    kind: Literal["smooth_l1", "l2"] = setting("smooth_l1", "As in I-JEPA's code, or as in its paper.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CJEPAConfig(Config):
    """Settings of C-JEPA; I-JEPA is vicreg.weight = 0 without SIGReg."""

    predictor: PredictorConfig = group(PredictorConfig, "The narrow ViT that predicts hidden blocks.")
    mask: Mask = group(Mask, "Multi-block masking.")
    loss: PredictionLoss = group(PredictionLoss, "The prediction loss.")
    vicreg: losses.Vicreg = group(losses.Vicreg, "The regulariser, weight * (invariance + variance + covariance).")
    sigreg: Sigreg = group(Sigreg, "Another regulariser: pooled features like an isotropic Gaussian.")


class MaskedImages(NamedTuple):
    """Images of a batch, and what is hidden of each."""

    images: UInt8[Array, "B H W C"]
    masks: Masks
    seeds: UInt32[Array, "B k"] | None = None  # of SIGReg's directions, where it is on


@dataclasses.dataclass(frozen=True)
class CJEPA(EncoderMethod):
    """Predicts features of hidden blocks; the targets come from the moving average of the encoder."""

    config: CJEPAConfig

    settings = CJEPAConfig
    averaged: ClassVar[Mapping[str, str]] = {"target_encoder": "encoder"}
    panels: ClassVar[Panels] = {
        "Loss": ("loss/total", "loss/prediction"),
        "Regulariser's terms": ("loss/variance", "loss/invariance", "loss/covariance", "loss/sigreg"),
        "Error of the block mean": ("rep/block_mean_error",),
        **FEATURE_PANELS,
    }

    def __post_init__(self):
        super().__post_init__()
        target_tokens(self.config.mask, self.config.grid)
        _ = self.predictor

    @cached_property
    def predictor(self) -> Predictor:
        """Builds the network from context features to target features."""
        config = self.config
        return build_predictor(config.predictor, config.model, grid=config.grid, gather=self.gather, attend=self.attend)

    @cached_property
    def projector(self) -> Projector:
        """Builds the network from pooled features to what the regulariser sees."""
        return Projector(self.config.vicreg.projector)

    def init(self, rng: jax.Array) -> Params:
        """Draws the parameters of encoder, predictor and projector."""
        config = self.config
        rng_encoder, rng_predictor, rng_projector = jax.random.split(rng, 3)
        width = self.encoder.size.width
        masks = Masks(
            jnp.zeros((1, 1), jnp.int32),
            jnp.ones((1, 1), bool),
            jnp.zeros((1, config.mask.targets, 1), jnp.int32),
            jnp.ones((1, config.mask.targets, 1), bool),
        )
        return {
            "encoder": self.init_encoder(rng_encoder),
            "predictor": self.predictor.init(rng_predictor, jnp.zeros((1, 1, width)), masks)["params"],
            "projector": self.projector.init(rng_projector, jnp.zeros((2, width))).get("params", {}),
        }

    def masks(self, rng: jax.Array, batch: int) -> Masks:
        """Draws context and target blocks of `batch` images."""
        return sample_masks(rng, self.config.mask, grid=self.config.grid, batch=batch)

    def prepare(self, batch: Batch, rng: jax.Array) -> MaskedImages:
        """Draws the masks of all images of a batch, and the seed of SIGReg's directions where it is on."""
        count = len(batch.images)
        seeds = sigreg.seeds(jax.random.fold_in(rng, 1), count) if self.config.sigreg.weight else None
        return MaskedImages(batch.images, self.masks(rng, count), seeds)

    def forward(self, params: Params, averages: Params, inputs: MaskedImages) -> Outputs:
        """Runs target encoder, context encoder and predictor.

        Gives for each image the summed prediction error and its number of terms [B], the mean prediction and the mean
        target of each block [B, M, D], the mean target feature [B, D] and, with vicreg.views = "context_target", the
        means of its context and of its targets [B, D].
        """
        patches, masks = self.patches(inputs.images), inputs.masks
        full_target = jax.lax.stop_gradient(
            losses.target_norm(apply(self.encoder, averages["target_encoder"], patches))
        )
        target = keep(take(full_target, masks.target_idx))

        context = apply(self.encoder, params["encoder"], patches, masks.context_idx, masks.context_valid)
        prediction = apply(self.predictor, params["predictor"], context, masks)
        error, terms = losses.prediction_error(prediction, target, masks.target_valid, self.config.loss.kind)
        outputs = {
            "error": error,
            "terms": terms,
            "block_means": prediction.mean(axis=2, where=masks.target_valid[..., None]),  # [B, M, D]
            "target_block_means": target.mean(axis=2, where=masks.target_valid[..., None]),
            "features": full_target.mean(axis=1),
        }
        if self.config.vicreg.views == "context_target":
            # Many target blocks can cover all of a context, whose mean is 0 then.
            kept = masks.context_valid.sum(axis=1, keepdims=True, dtype=jnp.float32)
            outputs |= {
                "context_mean": context.sum(axis=1, where=masks.context_valid[..., None]) / jnp.maximum(kept, 1),
                "target_mean": target.mean(axis=(1, 2), where=masks.target_valid[..., None]),
            }
        return outputs if inputs.seeds is None else {**outputs, "seeds": inputs.seeds}

    def loss(self, params: Params, outputs: Outputs) -> tuple[Float[Array, ""], Metrics]:
        """Adds the mean prediction error and the weighted regulariser, equations 21 and 22 of the paper, and SIGReg."""
        vicreg, block_means = self.config.vicreg, outputs["block_means"]
        prediction_loss = outputs["error"].sum() / outputs["terms"].sum()
        if vicreg.views == "target_blocks":
            z = apply(self.projector, params["projector"], rearrange(block_means, "b m d -> m b d"))
            terms = losses.target_blocks(z, vicreg)
        else:
            views = jnp.stack([outputs["context_mean"], outputs["target_mean"]])
            z = apply(self.projector, params["projector"], views)
            terms = losses.context_target(z[0], z[1], vicreg)
        total = prediction_loss + vicreg.weight * losses.combined(terms, vicreg)
        metrics = {}
        if self.config.sigreg.weight:
            slices = sigreg.directions(outputs["seeds"], width=z.shape[-1], slices=self.config.sigreg.slices)
            # Of context and target, only the context is to be spread out, as in VICReg's terms.
            gaussian = sigreg.statistic(z if vicreg.views == "target_blocks" else z[:1], slices).mean()
            total += self.config.sigreg.weight * gaussian
            metrics = {"loss/sigreg": gaussian}
        return total, metrics | {
            "loss/total": total,
            "loss/prediction": prediction_loss,
            "loss/variance": terms.variance,
            "loss/invariance": terms.invariance,
            "loss/covariance": terms.covariance,
            "rep/block_mean_error": jnp.square(block_means - outputs["target_block_means"]).mean(),
        }

    @classmethod
    def networks_of_init(cls, config: Any) -> tuple[str, ...]:
        """Names both encoders and the predictor."""
        return ("encoder", "predictor", "target_encoder")

    def start_from(self, networks: Params) -> tuple[Params, Params]:
        """Starts both encoders and, where there is one, the predictor; the projector stays fresh."""
        params = {name: networks[name] for name in ("encoder", "predictor") if name in networks}
        return params, {"target_encoder": networks["target_encoder"]}

    def transformers(self) -> dict[str, Transformer]:
        """Lists context encoder, target encoder and predictor."""
        config, size = self.config, parse_size(self.config.model.size)
        mask, predictor, patches = config.mask, config.predictor, math.prod(config.grid)
        hidden, kept = target_tokens(mask, config.grid), context_tokens(mask, config.grid)
        ends = 2 * size.width * predictor.width * (kept + mask.targets * hidden)
        encoder = (size.width, size.depth, size.heads, size.mlp_ratio)
        embedding = 2 * self.patch_values * size.width  # FLOPs per token
        return {
            "context": Transformer(1, kept, *encoder, True, self.trains("encoder"), embedding * kept),
            "target": Transformer(1, patches, *encoder, False, False, embedding * patches),
            "predictor": Transformer(
                mask.targets,
                kept + hidden,
                predictor.width,
                predictor.depth,
                size.heads,
                4,
                True,
                self.trains("predictor") or self.trains("encoder"),  # whose gradient passes through it
                ends,
            ),
        }
