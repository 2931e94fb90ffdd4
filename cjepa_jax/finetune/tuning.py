"""One step of fine-tuning: encoder, mean over the patches, linear classifier.

Shapes: B images of the global batch, N patches, D encoder width, L classes.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct

from cjepa_jax import optimizer, step
from cjepa_jax.config import Model, require
from cjepa_jax.finetune.config import Finetune
from cjepa_jax.finetune.mixing import erase, mix
from cjepa_jax.models.vit import Encoder, build_encoder, drop_path, normalise, patchify

_HEAD_STD = 2e-5  # MAE's


class TunedState(struct.PyTreeNode):
    """All that fine-tuning changes, arrays only."""

    step: jax.Array  # int32, the number of steps taken
    params: Any  # {"encoder", "head": {"kernel" [D, L], "bias" [L]}}, float32
    ema_params: Any  # their moving average
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The network and rules of a fine-tuning for a run of `steps` steps.

    Raises UserError where settings do not fit one another.
    """

    config: Finetune
    model: Model  # the checkpoint's architecture, computed as `config.model` says
    classes: int
    steps: int
    gather: Callable[[Any], Any] | None = None  # as in step.Method

    def __post_init__(self):
        size, patch = self.config.data.image_size, self.model.patch_size
        require(size % patch == 0, f"data.image_size = {size} is not divisible by the checkpoint's patch size, {patch}")
        _ = self.encoder

    @cached_property
    def encoder(self) -> Encoder:
        """Its positions are those of the grid that `data.image_size` gives."""
        return build_encoder(self.model, grid=self.config.data.image_size // self.model.patch_size, gather=self.gather)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with schedules and a factor on the step of each layer."""
        optim = self.config.optim
        scale = optimizer.layer_scale(decay=optim.layer_decay, depth=self.encoder.size.depth)
        return optax.chain(optimizer.adamw(optim, self.steps), scale)

    def logits(self, params: Any, images: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Normalised images [B, H, W, C] float32 -> [B, L]; `keep` as `drop_path` gives it."""
        patches = patchify(images, self.model.patch_size)
        features = cast(jax.Array, self.encoder.apply({"params": params["encoder"]}, patches, keep=keep))
        return features.mean(axis=1) @ params["head"]["kernel"] + params["head"]["bias"]

    def normalised(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] uint8 -> float32."""
        return normalise(images, mean=self.config.data.mean, std=self.config.data.std)


def init_state(rng: jax.Array, method: Tuning) -> TunedState:
    """A random encoder and the classifier at step 0; the average starts as a copy."""
    rng_encoder, rng_head = jax.random.split(rng)
    grid, width = method.encoder.grid, method.encoder.size.width
    values = method.model.patch_size**2 * method.config.data.channels
    head = {
        "kernel": _HEAD_STD * jax.random.normal(rng_head, (width, method.classes)),
        "bias": jnp.zeros(method.classes),
    }
    params = {"encoder": method.encoder.init(rng_encoder, jnp.zeros((1, grid**2, values)))["params"], "head": head}
    return TunedState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=method.optimizer.init(params),
    )


def train_step(
    state: TunedState,
    inputs: tuple[jax.Array, jax.Array],
    rng: jax.Array,
    *,
    method: Tuning,
    gather: step.Place = step.as_they_are,
    scatter: step.Place = step.as_they_are,
) -> tuple[TunedState, dict[str, jax.Array], tuple[()]]:
    """State, (images [B, H, W, C] uint8, labels [B] int32) -> next state, scalar metrics, nothing.

    As step.train_step: all draws depend on the root of the run and the step alone.
    """
    augment, (images, labels) = method.config.augment, inputs
    rng_erase, rng_mix, rng_drop = jax.random.split(jax.random.fold_in(rng, state.step), 3)
    images = erase(rng_erase, method.normalised(images), probability=augment.erase)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, method.classes), augment.label_smoothing)
    images, targets = mix(rng_mix, images, targets, mixup=augment.mixup, cutmix=augment.cutmix)
    depth, rate = method.encoder.size.depth, method.config.model.drop_path
    keep = drop_path(rng_drop, rate=rate, depth=depth, batch=len(images)) if rate else None

    def loss_fn(params: Any) -> jax.Array:
        return optax.softmax_cross_entropy(method.logits(params, images, keep), targets).mean()

    loss, grads = jax.value_and_grad(loss_fn)(gather(state.params))
    params, ema_params, opt_state, metrics = step.update(
        state.params, state.ema_params, state.opt_state, scatter(grads), number=state.step, method=method
    )
    return TunedState(state.step + 1, params, ema_params, opt_state), metrics | {"loss/total": loss}, ()


def score(
    params: Any, inputs: tuple[jax.Array, jax.Array], *, method: Tuning, gather: step.Place = step.as_they_are
) -> dict[str, jax.Array]:
    """Images [B, H, W, C] uint8 and labels [B], negative where an image does not count -> sums over the others.

    "images", and of them "top1" and "top5" right, int32, and "loss", the sum of
    the cross-entropies without smoothing. With fewer than five classes top 5 is all.
    """
    images, labels = inputs
    logits = method.logits(gather(params), method.normalised(images))
    counts = labels >= 0
    labels = jnp.maximum(labels, 0)
    best = jax.lax.top_k(logits, min(5, method.classes))[1] == labels[:, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {
        "images": counts.sum(dtype=jnp.int32),
        "top1": (best[:, 0] & counts).sum(dtype=jnp.int32),
        "top5": (best.any(axis=1) & counts).sum(dtype=jnp.int32),
        "loss": jnp.where(counts, losses, 0).sum(),
    }
