"""AdamW and the schedules; all schedules are functions of the step alone."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from cjepa_jax.config import Ema, Optim
from cjepa_jax.errors import nearest, require
from cjepa_jax.methods.base import Method, Params


def learning_rate(optim: Optim, steps: int, scale: float = 1.0) -> optax.Schedule:
    """Gives the schedule step -> learning rate: linear in the warm-up, then a cosine down to the end value at `steps`.

    scale: a factor on all three, `Config.rate_scale`.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=scale * optim.learning_rate_start,
        peak_value=scale * optim.learning_rate,
        warmup_steps=min(round(steps * optim.warmup_epochs / optim.epochs), steps - 1),
        decay_steps=steps,
        end_value=scale * optim.learning_rate_end,
    )
    return lambda step: schedule(step + optim.schedule_offset)


def weight_decay(optim: Optim, steps: int) -> optax.Schedule:
    """Gives the schedule step -> weight decay: a cosine from start to end over all steps."""
    start, end, offset = optim.weight_decay_start, optim.weight_decay_end, optim.schedule_offset
    return lambda step: end + (start - end) * (1 + jnp.cos(jnp.pi * (step + offset) / steps)) / 2


def ema_step_size(ema: Ema, steps: int) -> optax.Schedule:
    """Gives 1 - momentum, linear in the step; computed as such, since float32 has few digits left near 1.

    With `ema.warmup` it is 9 / (10 + step) at least: else the average of a short run stays near to its start.
    """
    linear = optax.linear_schedule(1 - ema.start, 1 - ema.end, steps)
    return (lambda step: jnp.maximum(linear(step), 9 / (10 + step))) if ema.warmup else linear


def decay_mask(params: PyTree) -> PyTree:
    """Tells where weight decay acts: on every parameter that is not 1-D, which leaves out all biases and norms."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def frozen(optim: Optim, params: Params) -> PyTree:
    """Tells which parameters stay as they are, because `optim.frozen` names them or a part that they belong to.

    Raises UserError for a name that no parameter has, and where nothing would be trained.
    """

    def parts(path: jax.tree_util.KeyPath) -> set[str]:
        return {jax.tree_util.keystr(path[:end], simple=True, separator="/") for end in range(1, len(path) + 1)}

    known = set().union(*(parts(path) for path, _ in jax.tree.leaves_with_path(params)))
    for name in optim.frozen:
        alike = [part for part in known if part.count("/") == name.count("/")]
        require(name in known, f"optim.frozen: {name!r} is not known; {nearest(name, alike)}")
    found = jax.tree_util.tree_map_with_path(lambda path, _: not parts(path).isdisjoint(optim.frozen), params)
    require(not all(jax.tree.leaves(found)), f"optim.frozen = {optim.frozen} leaves nothing to train")
    return found


def build(method: Method, steps: int, params: Params) -> optax.GradientTransformation:
    """Builds AdamW with the schedules of a run of `steps` steps, clipping, and the method's factor on each update.

    Decay is decoupled and multiplied by the learning rate, as in PyTorch's AdamW. Raises UserError as `frozen` does.
    """
    optim, scale = method.config.optim, method.update_scale(params)
    adamw = optax.adamw(
        learning_rate(optim, steps, method.config.rate_scale),
        b1=optim.beta1,
        b2=optim.beta2,
        eps=optim.eps,
        weight_decay=weight_decay(optim, steps),
        mask=decay_mask,
    )
    parts = [optax.clip_by_global_norm(optim.clip_norm), adamw] if optim.clip_norm else [adamw]
    if optim.frozen:
        parts = [optax.selective_transform(optax.chain(*parts), freeze_mask=frozen(optim, params))]
    if scale is not None:
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scale)))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]  # a chain of one has another state
