"""One training step of C-JEPA, and the state it maps to the next one.

Shapes: B images of the global batch, N patches, M target blocks, K_c context
and K_t target tokens, D encoder width.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import struct

from cjepa_jax import losses, optimizer, sharding
from cjepa_jax.config import Config, require
from cjepa_jax.masking import Masks, sample_masks, target_tokens
from cjepa_jax.models.predictor import Predictor, build_predictor
from cjepa_jax.models.projector import Projector
from cjepa_jax.models.vit import Encoder, build_encoder, masked_mean, normalise, patchify, take


class TrainState(struct.PyTreeNode):
    """All that training changes, arrays only."""

    step: jax.Array  # int32, the number of steps taken
    params: Any  # {"encoder", "predictor", "projector"}, float32
    target_params: Any  # the EMA of params["encoder"]
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Method:
    """The networks and rules that a config describes, for a run of `steps` steps.

    Raises UserError where settings do not fit one another.
    """

    config: Config
    steps: int
    gather: Callable[[Any], Any] | None = None  # where blocks do not hold their parameters whole: models.vit.Layers

    def __post_init__(self):
        size, patch = self.config.data.image_size, self.config.model.patch_size
        require(size % patch == 0, f"model.patch_size = {patch} does not divide data.image_size = {size}")
        target_tokens(self.config.mask, self.config.grid)
        _ = self.encoder, self.predictor

    @cached_property
    def encoder(self) -> Encoder:
        """For context and target alike."""
        return build_encoder(self.config.model, grid=self.config.grid, gather=self.gather)

    @cached_property
    def predictor(self) -> Predictor:
        """From context features to target features."""
        return build_predictor(self.config.predictor, self.config.model, grid=self.config.grid, gather=self.gather)

    @cached_property
    def projector(self) -> Projector:
        """From pooled features to what the regulariser sees."""
        return Projector(self.config.vicreg.projector)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with both schedules inside."""
        return optimizer.adamw(self.config.optim, self.steps)

    def patches(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, C] uint8 -> normalised patches [B, N, F] float32."""
        data = self.config.data
        return patchify(normalise(images, mean=data.mean, std=data.std), self.config.model.patch_size)


def init_state(rng: jax.Array, method: Method) -> TrainState:
    """The state at step 0; the target encoder starts as a copy of the encoder."""
    config = method.config
    rng_encoder, rng_predictor, rng_projector = jax.random.split(rng, 3)
    values = config.model.patch_size**2 * config.data.channels
    width = method.encoder.size.width
    masks = Masks(
        jnp.zeros((1, 1), jnp.int32),
        jnp.ones((1, 1), bool),
        jnp.zeros((1, config.mask.targets, 1), jnp.int32),
        jnp.ones((1, config.mask.targets, 1), bool),
    )
    encoder = method.encoder.init(rng_encoder, jnp.zeros((1, config.grid**2, values)))["params"]
    params = {
        "encoder": encoder,
        "predictor": method.predictor.init(rng_predictor, jnp.zeros((1, 1, width)), masks)["params"],
        "projector": method.projector.init(rng_projector, jnp.zeros((2, width))).get("params", {}),
    }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        target_params=jax.tree.map(jnp.copy, encoder),
        opt_state=method.optimizer.init(params),
    )


def _apply(module: nn.Module, params: Any, *inputs: Any) -> jax.Array:
    return cast(jax.Array, module.apply({"params": params}, *inputs))


def loss_fn(
    params: Any, target_params: Any, patches: jax.Array, masks: Masks, method: Method
) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
    """The total loss of a batch of patches [B, N, F], with (its parts, pooled target features [B, D])."""
    vicreg = method.config.vicreg
    full_target = jax.lax.stop_gradient(losses.target_norm(_apply(method.encoder, target_params, patches)))
    target = take(full_target, masks.target_idx)

    context = _apply(method.encoder, params["encoder"], patches, masks.context_idx, masks.context_valid)
    prediction = _apply(method.predictor, params["predictor"], context, masks)
    prediction_loss = losses.prediction_loss(prediction, target, masks.target_valid, method.config.loss)

    block_means = masked_mean(prediction, masks.target_valid)  # [B, M, D]
    target_means = masked_mean(target, masks.target_valid)
    if vicreg.views == "target_blocks":
        z = _apply(method.projector, params["projector"], rearrange(block_means, "b m d -> m b d"))
        terms = losses.target_blocks(z, vicreg)
    else:
        seen = rearrange(masks.target_valid, "b m k -> b (m k)")
        target_mean = masked_mean(rearrange(target, "b m k d -> b (m k) d"), seen)
        views = jnp.stack([masked_mean(context, masks.context_valid), target_mean])
        z = _apply(method.projector, params["projector"], views)
        terms = losses.context_target(z[0], z[1], vicreg)

    total = prediction_loss + losses.weighted(terms, vicreg)
    parts = {
        "loss/total": total,
        "loss/prediction": prediction_loss,
        "loss/variance": terms.variance,
        "loss/invariance": terms.invariance,
        "loss/covariance": terms.covariance,
        "rep/block_mean_error": jnp.square(block_means - target_means).mean(),
    }
    return total, (parts, full_target.mean(axis=1))


Place = Callable[[Any], Any]  # puts a tree of arrays where they are wanted; the values stay


def as_they_are(tree: Any) -> Any:
    """Where nothing is to be placed."""
    return tree


def _outside_blocks(place: Place, params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, x: x if "block" in jax.tree_util.keystr(path) else place(x), params)


def update(
    params: Any, average: Any, opt_state: Any, grads: Any, *, number: jax.Array, method: Any, part: str | None = None
) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
    """What a step makes of its gradients: parameters, their average, the optimizer's state, and metrics.

    `number` is the step's; `method` has `optimizer`, `config.optim`, `config.ema` and
    `steps`; `part` is the key of what is averaged, by default all parameters.
    """
    config, steps = method.config, method.steps
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats with its integer step count
        updates, opt_state = method.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        step_size = optimizer.ema_step_size(config.ema, steps)(number)
        average = optax.incremental_update(params[part] if part else params, average, step_size)
        metrics = {
            "lr": optimizer.learning_rate(config.optim, steps)(number),
            "weight_decay": optimizer.weight_decay(config.optim, steps)(number),
            "ema_momentum": 1 - step_size,
            "grad_norm": optax.tree.norm(grads),
        }
    return params, average, opt_state, metrics


def train_step(
    state: TrainState,
    images: jax.Array,
    rng: jax.Array,
    *,
    method: Method,
    gather: Place = as_they_are,
    scatter: Place = as_they_are,
) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
    """State and images [B, H, W, C] uint8 -> next state, scalar metrics, pooled target features [B, D].

    `rng` is the constant root of the run; the masks of a step depend on it and
    on the step alone. `gather` places the parameters for the passes, `scatter` the
    gradients for the update.
    """
    config = method.config
    masks = sample_masks(jax.random.fold_in(rng, state.step), config.mask, grid=config.grid, batch=len(images))
    grads, (metrics, features) = jax.grad(loss_fn, has_aux=True)(
        gather(state.params), gather(state.target_params), method.patches(images), masks, method
    )
    params, target_params, opt_state, of_update = update(
        state.params,
        state.target_params,
        state.opt_state,
        scatter(grads),
        number=state.step,
        method=method,
        part="encoder",
    )
    metrics |= of_update
    return TrainState(state.step + 1, params, target_params, opt_state), metrics, features


class Program(NamedTuple):
    """The compiled parts of a run on a mesh, and where their arrays live."""

    init: Any  # rng -> state
    step: Any  # state, inputs, rng -> state, metrics, what is seen of each image; the first argument is given away
    state: Any  # shapes, dtypes and shardings
    inputs: Any  # of a global batch: images [B, H, W, C] uint8, or with labels [B] int32
    batch: jax.sharding.NamedSharding
    whole: jax.sharding.NamedSharding
    method: Any  # that the step runs
    gather: Place  # places parameters for a pass of it


def build(
    method: Any,
    mesh: jax.sharding.Mesh,
    *,
    init: Callable[..., Any] = init_state,
    take_step: Callable[..., Any] = train_step,
    labelled: bool = False,
) -> Program:
    """Nothing is computed yet. Raises UserError where the mesh does not fit the batch or the parameters.

    `method` has a `config` with groups `data` and `mesh`, and the field `gather`;
    `init` and `take_step` have the signatures of `init_state` and `train_step`, and a state has `params`.
    """
    config, data = method.config, method.config.data
    sharding.check_batch(data.batch_size, mesh)
    whole, split = sharding.replicated(mesh), sharding.batch(mesh)
    init = functools.partial(init, method=method)
    shapes = jax.eval_shape(init, jax.random.key(0))
    placed = sharding.parameters(shapes, mesh)
    whole_again = functools.partial(jax.lax.with_sharding_constraint, shardings=whole)
    gather = scatter = as_they_are
    if config.mesh.parameters != "replicated":
        gather = whole_again
        scatter = functools.partial(jax.lax.with_sharding_constraint, shardings=placed.params)
    if config.mesh.parameters == "fsdp":  # blocks gather for themselves, one at a time
        gather = functools.partial(_outside_blocks, whole_again)
        method = dataclasses.replace(method, gather=whole_again)
    images = jax.ShapeDtypeStruct(
        (data.batch_size, data.image_size, data.image_size, data.channels), jnp.uint8, sharding=split
    )
    labels = jax.ShapeDtypeStruct((data.batch_size,), jnp.int32, sharding=split)
    return Program(
        init=jax.jit(init, out_shardings=placed),
        step=jax.jit(
            functools.partial(take_step, method=method, gather=gather, scatter=scatter),
            in_shardings=(placed, split, whole),
            out_shardings=(placed, whole, split),
            donate_argnums=0,
        ),
        state=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed),
        inputs=(images, labels) if labelled else images,
        batch=split,
        whole=whole,
        method=method,
        gather=gather,
    )
