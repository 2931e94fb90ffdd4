"""FLOPs that the method needs for one image: its matrix products, 2 * m * n * k each.

Counted are the towers (patch embedding, qkv, attention scores and values, projection, MLP, the predictor's embedding
and head) on the static token counts of the masks, padding included. Elementwise work and the regulariser are not.
"""

from typing import NamedTuple

from cjepa_jax.config import Config
from cjepa_jax.masking import target_tokens
from cjepa_jax.models.vit import parse_size

BACKWARD = 3  # forward and backward over forward: each product has one gradient for either factor


class Flops(NamedTuple):
    """FLOPs an image, of one forward pass of each tower."""

    context: float
    target: float
    predictor: float

    @property
    def step(self) -> float:
        """One training step: the target encoder has no backward pass."""
        return BACKWARD * self.context + self.target + BACKWARD * self.predictor


def block(tokens: int, width: int, mlp_ratio: float) -> float:
    """Forward FLOPs of one transformer block on a sequence: qkv, scores and values, projection, MLP."""
    hidden = round(width * mlp_ratio)
    return 2 * tokens * width * (3 * width + 2 * tokens + width + 2 * hidden)


def forward(config: Config) -> Flops:
    """The towers that a config describes. Raises UserError as `target_tokens` and `parse_size` do."""
    size, predictor, mask = parse_size(config.model.size), config.predictor, config.mask
    values = config.model.patch_size**2 * config.data.channels
    kept, hidden = mask.context_tokens, target_tokens(mask, config.grid)

    def encoder(tokens):
        return 2 * tokens * values * size.width + size.depth * block(tokens, size.width, size.mlp_ratio)

    ends = 2 * size.width * predictor.width * (kept + mask.targets * hidden)  # embedding and head
    towers = mask.targets * predictor.depth * block(kept + hidden, predictor.width, 4)
    return Flops(encoder(kept), encoder(config.grid**2), ends + towers)
