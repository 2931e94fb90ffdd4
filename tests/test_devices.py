"""One device against eight: the same numbers, statistics over the global batch included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cjepa_jax import sharding
from cjepa_jax.masking import sample_masks
from cjepa_jax.step import Method, init_state, loss_fn, train_step

BATCH = 16


def initial(method: Method):
    return jax.jit(functools.partial(init_state, method=method))(jax.random.key(0))


def loss_and_gradients(method: Method, devices: int):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    whole, split = sharding.replicated(mesh), sharding.batch(mesh)
    state = jax.device_put(initial(method), whole)
    images = jax.random.randint(jax.random.key(1), (BATCH, 8, 8, 1), 0, 256).astype(jnp.uint8)

    def loss(params, images, rng):
        masks = sample_masks(rng, method.config.mask, grid=method.config.grid, batch=BATCH)
        return loss_fn(params, state.target_params, method.patches(images), masks, method)

    gradient = jax.jit(
        jax.value_and_grad(loss, has_aux=True),
        in_shardings=(whole, split, whole),
        out_shardings=((whole, (whole, split)), whole),
    )
    compiled = gradient.lower(state.params, images, jax.random.key(2)).compile()
    (total, (parts, features)), grads = compiled(state.params, images, jax.random.key(2))
    assert len(features.sharding.device_set) == devices
    return jax.device_get((total, parts, features, grads)), compiled.as_text()


@pytest.mark.parametrize("views", ["target_blocks", "context_target"])
def test_same_loss_and_gradients(make_config, views):
    config = make_config(vicreg__views=views, vicreg__weight=0.01, vicreg__projector=(12, 8))
    method = Method(config, steps=10)
    one, _ = loss_and_gradients(method, 1)
    eight, program = loss_and_gradients(method, 8)
    assert "all-reduce" in program
    np.testing.assert_allclose(one[0], eight[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one[1:3]), jax.tree.leaves(eight[1:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    # A leaf far below the whole gradient (a bias before a norm) holds little but rounding.
    floor = 1e-2 * np.linalg.norm([np.linalg.norm(g) for g in jax.tree.leaves(one[3])])
    for a, b in zip(jax.tree.leaves(one[3]), jax.tree.leaves(eight[3]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(a), floor)


def test_statistics_are_those_of_the_global_batch(make_config):
    """Not the mean of eight local ones: with two images a device those differ by far."""
    method = Method(make_config(vicreg__weight=1.0), steps=10)
    (_, parts, _, _), _ = loss_and_gradients(method, 8)
    state = initial(method)
    images = jax.random.randint(jax.random.key(1), (BATCH, 8, 8, 1), 0, 256).astype(jnp.uint8)
    masks = sample_masks(jax.random.key(2), method.config.mask, grid=method.config.grid, batch=BATCH)

    @jax.jit
    def covariance(images, masks):
        _, (parts, _) = loss_fn(state.params, state.target_params, method.patches(images), masks, method)
        return parts["loss/covariance"]

    shares = [slice(2 * i, 2 * i + 2) for i in range(8)]
    local = np.mean([covariance(images[s], jax.tree.map(lambda x, s=s: x[s], masks)) for s in shares])
    assert abs(parts["loss/covariance"] - covariance(images, masks)) < 1e-5
    assert abs(parts["loss/covariance"] - local) > 0.1 * local


def test_fifty_steps_compile_once(make_config):
    method = Method(make_config(), steps=50)
    state = initial(method)
    step = jax.jit(functools.partial(train_step, method=method), donate_argnums=0)
    images = jax.random.randint(jax.random.key(1), (BATCH, 8, 8, 1), 0, 256).astype(jnp.uint8)
    losses = []
    for _ in range(50):
        state, metrics, _ = step(state, images, jax.random.key(2))
        losses.append(float(metrics["loss/prediction"]))
    assert step._cache_size() == 1
    assert len(set(losses)) == 50
    assert int(state.step) == 50
