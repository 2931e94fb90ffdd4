"""Counts the FLOPs that a method needs for one image: its matrix products, 2 * m * n * k each.

The count covers the transformers that a method lists (qkv, attention scores and values, projection, MLP, and what
surrounds the blocks) on static token counts, padding included. It leaves out elementwise work and the loss.
"""

from collections.abc import Iterable

from cjepa_jax.methods.base import Transformer

BACKWARD = 3  # forward and backward over forward: each product has one gradient for either factor


def block(tokens: int, width: int, mlp_ratio: float) -> float:
    """Counts the forward FLOPs of one transformer block on a sequence: qkv, scores and values, projection, MLP."""
    hidden = round(width * mlp_ratio)
    return 2 * tokens * width * (3 * width + 2 * tokens + width + 2 * hidden)


def forward(stack: Transformer) -> float:
    """Counts the FLOPs per image of one forward pass."""
    blocks = stack.sequences * stack.depth * block(stack.tokens, stack.width, stack.mlp_ratio)
    return blocks + stack.other_flops


def step(stacks: Iterable[Transformer]) -> float:
    """Counts the FLOPs per image of one training step; what is not trained has no backward pass."""
    return sum(forward(stack) * (BACKWARD if stack.trained else 1) for stack in stacks)
