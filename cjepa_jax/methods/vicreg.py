"""VICReg (Bardes, Ponce and LeCun, ICLR 2022, arXiv 2105.04906): views of an image agree, and the batch is spread out.

Per batch, with z_v [B, d] the expander's output for view v (equations 1 to 6; the expander is in section 4.2):

    loss = 25 mean (z_0 - z_1)^2  +  25 (v(z_0) + v(z_1)) / 2  +  c(z_0) + c(z_1)
    v(z) = mean_k max(0, 1 - sqrt(Var_k(z) + 1e-4)),   c(z) = sum_{k != l} Cov(z)_kl^2 / d

There is neither a moving average nor a predictor. The paper's equation 5 sums the squared distance over the d
dimensions and its equation 6 adds v of both views; the means here are those that go with the coefficients 25, 25 and 1
in lightly, whose loss is written after the authors' code (docs/differences.md). With more than two views each term is
the mean over all pairs.
"""

import dataclasses
from functools import cached_property
from typing import ClassVar

from jaxtyping import Array, Float

from cjepa_jax.methods import losses
from cjepa_jax.methods.base import Metrics, Outputs, Panels, Params
from cjepa_jax.methods.encoder import FEATURE_PANELS
from cjepa_jax.methods.siamese import Siamese, SiameseConfig
from cjepa_jax.models.projector import Projector
from cjepa_jax.settings import group, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class VICRegLoss(losses.Coefficients):
    """VICReg's three terms, of what the expander makes of the pooled features."""

    projector: tuple[int, ...] = setting(
        (8192, 8192, 8192),
        "Widths of the expander, an MLP with batch norm; () is the identity.",
        within="[1, 65536]",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VICRegConfig(SiameseConfig):
    """Holds the settings of a run of VICReg: those of two augmented views, the loss and the expander."""

    vicreg: VICRegLoss = group(VICRegLoss, "The loss, invariance + variance + covariance, and the expander.")


@dataclasses.dataclass(frozen=True)
class VICReg(Siamese):
    """Pulls the views of an image together and keeps the variance of each dimension up and the covariances down."""

    config: VICRegConfig

    settings = VICRegConfig
    panels: ClassVar[Panels] = {
        "Loss": ("loss/total",),
        "Its terms": ("loss/variance", "loss/invariance", "loss/covariance"),
        **FEATURE_PANELS,
    }

    @cached_property
    def projector(self) -> Projector:
        """Builds the expander, an MLP of the widths `vicreg.projector` whose last layer has no batch norm."""
        return Projector(self.config.vicreg.projector)

    def loss(self, params: Params, outputs: Outputs) -> tuple[Float[Array, ""], Metrics]:
        """Computes the weighted sum of the three terms over the whole batch."""
        terms = losses.target_blocks(self.project(params, outputs), self.config.vicreg)
        total = losses.combined(terms, self.config.vicreg)
        return total, {
            "loss/total": total,
            "loss/variance": terms.variance,
            "loss/invariance": terms.invariance,
            "loss/covariance": terms.covariance,
        }
