"""LeJEPA (Balestriero and LeCun, arXiv 2511.08544): views agree with their mean, and SIGReg keeps them Gaussian.

Per batch, with z_v [B, d] the projection of view v of V views:

    loss = (1 - lambda) mean_{v, b, k} (z_v - mean_u z_u)^2  +  lambda mean_v SIGReg(z_v),   lambda = 0.05

There is neither a moving average, nor a predictor, nor a stop-gradient. In the paper the mean is over the global
views, and further local views, which are smaller crops, are compared with it; here all views are global and of one
size. The paper's text was not at hand: that the squared distance is a mean over the d dimensions, the two weights and
the shape of the projector are as in lightly, whose loss is written after the authors' code (docs/differences.md).
methods/sigreg.py has the formula of SIGReg.
"""

import dataclasses
from functools import cached_property
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cjepa_jax.batch import Batch
from cjepa_jax.methods import sigreg
from cjepa_jax.methods.base import Inputs, Metrics, Outputs, Panels, Params
from cjepa_jax.methods.encoder import FEATURE_PANELS
from cjepa_jax.methods.siamese import Siamese, SiameseConfig
from cjepa_jax.models.projector import Projector
from cjepa_jax.settings import group, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigregOfViews(sigreg.Sigreg):
    """SIGReg as one of two parts of the loss, and the projector whose output it sees."""

    weight: float = setting(0.05, "The paper's lambda; the distance of the views has 1 - lambda.", within="[0, 1]")
    projector: tuple[int, ...] = setting(
        (2048, 2048, 64), "Widths of an MLP with batch norm; () is the identity.", within="[1, 65536]"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeJEPAConfig(SiameseConfig):
    """Holds the settings of a run of LeJEPA: those of its augmented views, SIGReg and the projector."""

    sigreg: SigregOfViews = group(SigregOfViews, "The regulariser, its weight against the prediction, the projector.")


@dataclasses.dataclass(frozen=True)
class LeJEPA(Siamese):
    """Pulls the views of an image to their mean and makes the embeddings of a batch look like N(0, I)."""

    config: LeJEPAConfig

    settings = LeJEPAConfig
    panels: ClassVar[Panels] = {
        "Loss": ("loss/total", "loss/prediction"),
        "SIGReg": ("loss/sigreg",),
        **FEATURE_PANELS,
    }

    @cached_property
    def projector(self) -> Projector:
        """Builds the network whose outputs are to be Gaussian."""
        return Projector(self.config.sigreg.projector, last="bias")

    def prepare(self, batch: Batch, rng: jax.Array) -> Inputs:
        """Gives the views and the seed of the step's directions."""
        return {"images": batch.images, "seeds": sigreg.seeds(rng, len(batch.images))}

    def forward(self, params: Params, averages: Params, inputs: Inputs) -> Outputs:
        """Encodes the views, and hands the seeds on."""
        return {**super().forward(params, averages, inputs["images"]), "seeds": inputs["seeds"]}

    def loss(self, params: Params, outputs: Outputs) -> tuple[Float[Array, ""], Metrics]:
        """Adds the distance of the views from their mean and SIGReg, weighted."""
        z, settings = self.project(params, outputs), self.config.sigreg
        prediction = jnp.square(z - z.mean(axis=0, keepdims=True)).mean()
        slices = sigreg.directions(outputs["seeds"], width=z.shape[-1], slices=settings.slices)
        gaussian = sigreg.statistic(z, slices).mean()
        total = (1 - settings.weight) * prediction + settings.weight * gaussian
        return total, {"loss/total": total, "loss/prediction": prediction, "loss/sigreg": gaussian}
