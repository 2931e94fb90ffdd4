"""SimSiam (Chen and He, CVPR 2021, arXiv 2011.10566), which is figure 2 b of C-JEPA's paper.

Per batch, with z_v [B, d] the projection of view v, p_v = h(z_v) the prediction MLP's output, and sg stop-gradient
(equations 1 to 4; the MLPs are in section 3):

    loss = D(p_0, sg(z_1)) / 2 + D(p_1, sg(z_0)) / 2,   D(p, z) = - mean over the batch of p z / (|p| |z|)

There is no moving average. The projection MLP has batch norm on every layer, the last one included; the prediction MLP
has it on its hidden layer. Their statistics are over the global batch, for each view by itself. With more than two
views the loss is the mean over all ordered pairs of different views. `simsiam.stop_gradient` and `simsiam.predictor`
switch off what keeps the method from collapsing (sections 4.1 and 4.2 of the paper). The last batch norm has no scale
and shift, and the last layer of the prediction MLP has a bias, as in lightly, which has the same MLPs and loss
(docs/differences.md).
"""

import dataclasses
from functools import cached_property
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cjepa_jax.methods.base import Metrics, Outputs, Panels, Params
from cjepa_jax.methods.encoder import FEATURE_PANELS, apply
from cjepa_jax.methods.siamese import Siamese, SiameseConfig
from cjepa_jax.models.projector import Projector
from cjepa_jax.settings import group, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimSiamHeads:
    """The two MLPs, and the switches of the paper's ablations."""

    projector: tuple[int, ...] = setting(
        (2048, 2048, 2048), "Widths of the projection MLP, with batch norm on every layer.", within="[1, 65536]"
    )
    hidden: int = setting(512, "Width of the prediction MLP's hidden layer.", within="[1, 65536]")
    predictor: bool = setting(True, "Whether there is a prediction MLP; without one the features collapse.")
    stop_gradient: bool = setting(
        True, "Whether the other view is a fixed target; where gradients reach it, the features collapse."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimSiamConfig(SiameseConfig):
    """Holds the settings of a run of SimSiam: those of two augmented views, the two MLPs and the ablations."""

    simsiam: SimSiamHeads = group(SimSiamHeads, "Projection and prediction, and the switches of the paper's ablations.")


@dataclasses.dataclass(frozen=True)
class SimSiam(Siamese):
    """Predicts each view's projection from the other's."""

    config: SimSiamConfig

    settings = SimSiamConfig
    panels: ClassVar[Panels] = {
        "Loss": ("loss/total",),
        "Std of the outputs on the sphere (1: spread out)": ("rep/output_std",),
        **FEATURE_PANELS,
    }

    @cached_property
    def projector(self) -> Projector:
        """Builds the projection MLP of the widths `simsiam.projector`, with batch norm on every layer."""
        return Projector(self.config.simsiam.projector, last="norm")

    @cached_property
    def prediction_head(self) -> Projector:
        """Builds the prediction MLP, which maps projections to projections."""
        return Projector((self.config.simsiam.hidden, self._width), last="bias")

    @property
    def _width(self) -> int:
        """Gives the width of projections, d, which without a projection MLP are the pooled features."""
        return (self.config.simsiam.projector or (self.encoder.size.width,))[-1]

    def init(self, rng: jax.Array) -> Params:
        """Draws the parameters of encoder, projection MLP and, where there is one, prediction MLP."""
        rng_base, rng_prediction = jax.random.split(rng)
        params = super().init(rng_base)
        if not self.config.simsiam.predictor:
            return params
        z = jnp.zeros((2, self._width))
        return {**params, "prediction_head": self.prediction_head.init(rng_prediction, z)["params"]}

    def loss(self, params: Params, outputs: Outputs) -> tuple[Float[Array, ""], Metrics]:
        """Averages the negative cosine between each prediction and the projections of the other views.

        rep/output_std is the std over the images of z / |z|, averaged over dimensions and views, times sqrt(d): 1 where
        the outputs spread evenly over the sphere, 0 where all are the same (figure 2 of the paper, but for the factor).
        """
        settings = self.config.simsiam
        z = self.project(params, outputs)
        p = apply(self.prediction_head, params["prediction_head"], z) if settings.predictor else z
        p, z = _unit(p), _unit(z)
        target = jax.lax.stop_gradient(z) if settings.stop_gradient else z
        views, batch, width = z.shape
        # The cosine of each pair of views, without those of a view and itself.
        total = (p * target).sum() - (p.sum(axis=0) * target.sum(axis=0)).sum()
        total = total / (views * (views - 1) * batch)
        spread = z.std(axis=1).mean() * jnp.sqrt(jnp.float32(width))
        return total, {"loss/total": total, "rep/output_std": spread}


def _unit(x: Float[Array, "V B d"]) -> Float[Array, "V B d"]:
    """Scales vectors to length 1; a zero vector stays, with a zero gradient."""
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    return jnp.where(square > 1e-16, x * jax.lax.rsqrt(jnp.maximum(square, 1e-16)), 0.0)
