"""Linear probes, a grid of them at once: mathematics.

A batch norm without affine, which all share, and a linear layer each, trained by
SGD with Nesterov momentum and weight decay as PyTorch has them.

Shapes: B images of a batch, m test images, G members of the grid, D features,
C classes.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from cjepa_jax.evaluate.sets import Labelled, spread

EPS = 1e-5  # of the batch norm
MOMENTUM = 0.9


class Norm(NamedTuple):
    """Mean and variance of all features seen: what the test images are normalised with."""

    images: jax.Array
    mean: jax.Array  # [D]
    squares: jax.Array  # [D], summed squared distances from the mean

    def joined(self, count: jax.Array, mean: jax.Array, squares: jax.Array) -> "Norm":
        """Returns the statistics of these features and of others, by Chan's formula."""
        total = self.images + count
        difference = mean - self.mean
        return Norm(
            total,
            self.mean + difference * count / total,
            self.squares + squares + jnp.square(difference) * self.images * count / total,
        )


class Probe(NamedTuple):
    """G classifiers, and what their training carries along."""

    norm: Norm
    params: dict[str, jax.Array]  # kernel [G, D, C], bias [G, C]
    momentum: PyTree


def grid(learning_rates: tuple[float, ...], weight_decays: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs every rate with every decay: gives learning rates [G] and weight decays [G]."""
    rates, decays = np.meshgrid(learning_rates, weight_decays, indexing="ij")
    return rates.ravel().astype(np.float32), decays.ravel().astype(np.float32)


def _optimizer(learning_rate: jax.Array, weight_decay: jax.Array) -> optax.GradientTransformation:
    decayed = {"kernel": True, "bias": False}
    sgd = optax.sgd(learning_rate, momentum=MOMENTUM, nesterov=True)
    return optax.chain(optax.add_decayed_weights(weight_decay, mask=decayed), sgd)


def fit(
    epochs: Iterable[Iterable[tuple[Mapping[str, jax.Array], jax.Array]]],
    members: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    decay_every: int,
    classes: int,
) -> dict[str, Probe]:
    """Trains probes on several representations in one pass over the batches; gives them by the representation's name.

    epochs: of batches: the features [B, D] by name, and labels [B]. members: name
    -> learning rates [G] and weight decays [G]; a rate is a tenth after every
    `decay_every` epochs.
    """
    probes: dict[str, Probe] = {}
    for epoch, batches in enumerate(epochs):
        factor = np.float32(0.1 ** (epoch // decay_every))
        now = {name: (rates * factor, decays) for name, (rates, decays) in members.items()}
        for features, labels in batches:
            if not probes:
                widths = {name: features[name].shape[1] for name in members}
                probes = {n: init(len(x[0]), width=widths[n], classes=classes) for n, x in members.items()}
            jax.block_until_ready(probes)  # one batch ahead of the devices is enough
            probes = train_steps(probes, features, labels, now)
    return probes


def init(members: int, *, width: int, classes: int) -> Probe:
    """Starts all members at zero, which is as good as any start, since the problem is convex."""
    params = {"kernel": jnp.zeros((members, width, classes)), "bias": jnp.zeros((members, classes))}
    norm = Norm(jnp.zeros(()), jnp.zeros(width), jnp.zeros(width))
    return Probe(norm, params, jax.vmap(_optimizer(jnp.zeros(()), jnp.zeros(())).init)(params))


def _logits(params: dict[str, jax.Array], normalised: jax.Array) -> jax.Array:
    """Maps features [B, D] to the logits [G, B, C] of all members."""
    return jnp.einsum("bd,gdc->gbc", normalised, params["kernel"]) + params["bias"][:, None]


@functools.partial(jax.jit, donate_argnums=0)
def train_steps(
    probes: dict[str, Probe],
    features: Mapping[str, jax.Array],
    labels: jax.Array,
    members: Mapping[str, tuple[jax.Array, jax.Array]],
) -> dict[str, Probe]:
    """Takes the `train_step` of every representation, as one program."""
    return {name: train_step(probe, features[name], labels, *members[name]) for name, probe in probes.items()}


def train_step(
    probe: Probe, features: jax.Array, labels: jax.Array, learning_rates: jax.Array, weight_decays: jax.Array
) -> Probe:
    """Takes one step of all members on features [B, D], labels [B]; rows with a negative label do not count."""
    counted = (labels >= 0).astype(features.dtype)[:, None]
    count = counted.sum()
    mean = (features * counted).sum(axis=0) / count
    squares = (jnp.square(features - mean[None]) * counted).sum(axis=0)
    normalised = (features - mean[None]) * jax.lax.rsqrt(squares / count + EPS)[None]

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        logits = _logits(params, normalised)
        wanted = jnp.broadcast_to(jnp.maximum(labels, 0), logits.shape[:2])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return (losses * counted[None, :, 0]).sum() / count  # over the members too: each has a gradient of its own

    def update(rate: jax.Array, decay: jax.Array, grads: PyTree, momentum: PyTree, params: PyTree) -> PyTree:
        updates, momentum = _optimizer(rate, decay).update(grads, momentum, params)
        return optax.apply_updates(params, updates), momentum

    grads = jax.grad(loss)(probe.params)
    params, momentum = jax.vmap(update)(learning_rates, weight_decays, grads, probe.momentum, probe.params)

    return Probe(probe.norm.joined(count, mean, squares), params, momentum)


@jax.jit
def predict(probe: Probe, features: jax.Array) -> jax.Array:
    """Classifies features [m, D] by every member of the grid: classes [G, m]."""
    norm = probe.norm
    normalised = (features - norm.mean[None]) * jax.lax.rsqrt(norm.squares / norm.images + EPS)[None]
    return _logits(probe.params, normalised).argmax(axis=-1)


def fold(probe: Probe, member: int) -> dict[str, np.ndarray]:
    """Folds the batch norm of one member into its classifier, for features as they come: kernel [D, C], bias [C]."""
    norm, params = jax.device_get((probe.norm, probe.params))
    kernel = params["kernel"][member] / np.sqrt(norm.squares / norm.images + EPS)[:, None]
    return {"kernel": kernel, "bias": params["bias"][member] - norm.mean @ kernel}


def accuracies(probe: Probe, test: Labelled, *, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Computes the share of the test images that each member gets right, [G]; the devices share the images."""
    right = np.zeros(len(probe.params["bias"]), int)
    for start in range(0, len(test.labels), 4096):  # bounds the logits
        features, labels = spread(test.take(np.arange(start, min(start + 4096, len(test.labels)))), mesh)
        right += jax.device_get((predict(probe, features) == labels[None]).sum(axis=1))
    return right / len(test.labels)
