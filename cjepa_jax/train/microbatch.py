"""Batches of any size on any device: the networks see a batch in parts, and the loss sees it whole."""

from collections.abc import Callable

import jax
from jaxtyping import Array

from cjepa_jax.methods.base import KEPT, Inputs, Method, Outputs, Params


def forward(method: Method, microbatches: int) -> Callable[[Params, Params, Inputs], Outputs]:
    """Gives `method.forward`, run on one part of the batch after another.

    The outputs and their gradients are those of the whole batch, up to rounding. Only the outputs of a part and what
    the method marks by `keep` stay in memory; the backward pass computes the rest of each part anew. Where their number
    is still to be chosen, and so 0, the batch is whole.
    """
    if microbatches <= 1:
        return method.forward

    def split(x: Array) -> Array:
        # Neighbours go into different parts, so that every device keeps its own images.
        return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    # In a loop nothing outside can be merged with what is computed anew.
    each = jax.checkpoint(method.forward, policy=policy, prevent_cse=False)

    def run(params: Params, averages: Params, inputs: Inputs) -> Outputs:
        outputs = jax.lax.map(lambda part: each(params, averages, part), jax.tree.map(split, inputs))
        return jax.tree.map(join, outputs)

    return run
