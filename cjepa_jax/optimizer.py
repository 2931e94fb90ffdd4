"""AdamW and the schedules; all of them functions of the step alone."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from cjepa_jax.config import Ema, Optim


def learning_rate(optim: Optim, steps: int) -> optax.Schedule:
    """Linear from start to peak in the warm-up, then a cosine to the end value at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=optim.learning_rate_start,
        peak_value=optim.learning_rate,
        warmup_steps=min(round(steps * optim.warmup_epochs / optim.epochs), steps - 1),
        decay_steps=steps,
        end_value=optim.learning_rate_end,
    )


def weight_decay(optim: Optim, steps: int) -> optax.Schedule:
    """A cosine from start to end over all steps."""
    start, end = optim.weight_decay_start, optim.weight_decay_end
    return lambda step: end + (start - end) * (1 + jnp.cos(jnp.pi * step / steps)) / 2


def ema_step_size(ema: Ema, steps: int) -> optax.Schedule:
    """1 - momentum, linear; computed as such, for near 1 a float32 momentum has few digits left."""
    return optax.linear_schedule(1 - ema.start, 1 - ema.end, steps)


def decay_mask(params: Any) -> Any:
    """True where weight decay acts: on every parameter that is not 1-D, which leaves out all biases and norms."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def layer_scale(*, decay: float, depth: int) -> optax.GradientTransformation:
    """Updates of {"encoder", "head"} times decay^(depth + 1 - layer), as MAE has it.

    The embedding is layer 0, block i is layer i + 1, final norm and head are layer depth + 1.
    """

    def factor(path: Any) -> float:
        name = path[1].key  # of {"encoder": {name: ...}} or {"head": {name: ...}}
        layer = 0 if name == "embed" else int(name[5:]) + 1 if name.startswith("block") else depth + 1
        return decay ** (depth + 1 - layer)

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(lambda path, u: u * factor(path), updates))


def adamw(optim: Optim, steps: int) -> optax.GradientTransformation:
    """Decay is decoupled and multiplied by the learning rate, as in PyTorch's AdamW."""
    return optax.adamw(
        learning_rate(optim, steps),
        b1=optim.beta1,
        b2=optim.beta2,
        eps=optim.eps,
        weight_decay=weight_decay(optim, steps),
        mask=decay_mask,
    )
