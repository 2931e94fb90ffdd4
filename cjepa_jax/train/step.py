"""One training step of any method, and the state that it maps to the next one."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, PyTree

from cjepa_jax.batch import Batch
from cjepa_jax.methods.base import Method, Metrics, Params
from cjepa_jax.models import attention
from cjepa_jax.train import microbatch, optimizer, sharding
from cjepa_jax.train.sharding import Place


class TrainState(struct.PyTreeNode):
    """Holds all that training changes, arrays only."""

    step: Int[Array, ""]  # the number of steps taken
    params: Params  # name of a network -> its parameters, float32
    averages: Params  # the moving averages of `method.averaged`
    opt_state: PyTree[Array]


class Observed(NamedTuple):
    """What a step computes in any case, and what only diagnostics look at."""

    features: Float[Array, "B D"] | None  # whatever the method's `forward` calls so
    grad_norms: Float[Array, " L"]  # of the gradient's leaves, in the order of the parameters' tree


def init_state(rng: jax.Array, *, method: Method, steps: int) -> TrainState:
    """Gives the state at step 0 of a run of `steps` steps; averages start as copies."""
    params = method.init(rng)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        averages={name: jax.tree.map(jnp.copy, params[of]) for name, of in method.averaged.items()},
        opt_state=optimizer.build(method, steps, params).init(params),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
    *,
    method: Method,
    steps: int,
    gather: Place = lambda tree: tree,
    scatter: Place = lambda tree: tree,
) -> tuple[TrainState, Metrics, Observed]:
    """Maps state and batch to the next state, scalar metrics, and what diagnostics look at.

    `rng` is the constant root of the run; all draws of a step depend on it and on the step alone. `gather` places the
    parameters for the passes, `scatter` the gradients for the update.
    """
    config = method.config
    inputs = method.prepare(batch, jax.random.fold_in(rng, state.step))
    averages = gather(state.averages)
    forward = microbatch.forward(method, config.optim.microbatches)

    def loss_fn(params: Params) -> tuple[Float[Array, ""], tuple[Metrics, Any]]:
        if config.optim.frozen:  # so that their gradients are not computed
            stays = optimizer.frozen(config.optim, params)
            params = jax.tree.map(lambda x, is_frozen: jax.lax.stop_gradient(x) if is_frozen else x, params, stays)
        outputs = forward(params, averages, inputs)
        loss, metrics = method.loss(params, outputs)
        return loss, (metrics, outputs.get("features"))

    grads, (metrics, features) = jax.grad(loss_fn, has_aux=True)(gather(state.params))
    grads = scatter(grads)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats with its integer step count
        with jax.named_scope("update"):  # by which tpu/cost.py knows it
            updates, opt_state = optimizer.build(method, steps, state.params).update(
                grads, state.opt_state, state.params
            )
            params = optax.apply_updates(state.params, updates)
            step_size = optimizer.ema_step_size(config.ema, steps)(state.step)
            current = {name: params[of] for name, of in method.averaged.items()}
            averages = optax.incremental_update(current, state.averages, step_size)
        metrics |= {
            "lr": optimizer.learning_rate(config.optim, steps, config.rate_scale)(state.step),
            "weight_decay": optimizer.weight_decay(config.optim, steps)(state.step),
            "ema_momentum": 1 - step_size,
            "grad_norm": optax.tree.norm(grads),
        }
        # The sums of squares are those of grad_norm, so that they cost nothing.
        grad_norms = jnp.stack([optax.tree.norm(leaf) for leaf in jax.tree.leaves(grads)])
    return TrainState(state.step + 1, params, averages, opt_state), metrics, Observed(features, grad_norms)


class Program(NamedTuple):
    """The jitted parts of a run on a mesh, and where their arrays live."""

    init: Callable[[jax.Array], TrainState]  # rng -> state
    step: jax.stages.Wrapped  # state, batch, rng -> state, metrics, Observed; the first argument is given away
    state: TrainState  # shapes, dtypes and shardings
    batch: Batch  # the same, of a global batch
    split: jax.sharding.NamedSharding  # the first axis over all devices
    whole: jax.sharding.NamedSharding
    method: Method  # the method that the step runs


def build(method: Method, steps: int, mesh: jax.sharding.Mesh) -> Program:
    """Jits a run of `steps` steps; nothing is computed yet.

    Raises UserError where the mesh does not fit the batch or the parameters, or `model.attention` the devices.
    """
    data = method.config.data
    sharding.check_batch(data.batch_size, method.config.optim.microbatches, mesh)
    whole, split = sharding.replicated(mesh), sharding.batch(mesh)
    init = functools.partial(init_state, method=method, steps=steps)
    shapes = jax.eval_shape(init, jax.random.key(0))
    placed = sharding.parameters(shapes, method.config.mesh, mesh)
    gather, gather_block, scatter = sharding.places(method.config.mesh, mesh, placed.params)
    attend = attention.choose(
        method.config.model.attention,
        device=mesh.devices.flat[0],
        per_device=sharding.per_device(mesh),
        dtype=method.config.model.dtype,
        shapes=[(stack.tokens, stack.width, stack.heads) for stack in method.transformers().values()],
    )
    method = dataclasses.replace(method, gather=gather_block, attend=attend)
    views = (len(method.views),) if len(method.views) > 1 else ()
    images = (data.batch_size, *views, *data.image_shape, data.channels)
    return Program(
        init=jax.jit(init, out_shardings=placed),
        step=jax.jit(
            functools.partial(train_step, method=method, steps=steps, gather=gather, scatter=scatter),
            in_shardings=(placed, split, whole),
            out_shardings=(placed, whole, Observed(split, whole)),  # type: ignore[arg-type]
            donate_argnums=0,
        ),
        state=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed),
        batch=Batch(
            images=jax.ShapeDtypeStruct(images, jnp.uint8, sharding=split),
            labels=jax.ShapeDtypeStruct(images[:1], jnp.int32, sharding=split),
        ),
        split=split,
        whole=whole,
        method=method,
    )
