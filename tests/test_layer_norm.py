"""LayerNorm with a backward pass of its own: values against flax, gradients against PyTorch in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cjepa_jax.models.layer_norm import LAYER_NORM_EPS, LayerNorm, layer_norm


def inputs(shape, *, scale=3.0, offset=1.0):
    """x, the parameters and an upstream gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, gradient = scale * jax.random.normal(keys[0], shape) + offset, jax.random.normal(keys[3], shape)
    params = {"scale": jax.random.normal(keys[1], shape[-1:]), "bias": jax.random.normal(keys[2], shape[-1:])}
    return x, params, gradient


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_those_of_flax(dtype):
    x, params, _ = inputs((4, 9, 48))
    x = x.astype(dtype)
    flax = nn.LayerNorm(LAYER_NORM_EPS, use_fast_variance=False)
    expected = flax.apply({"params": params}, x.astype(jnp.float32))
    found = LayerNorm().apply({"params": params}, x)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(layer_norm(x, params=params), expected)
    assert jax.tree.map(jnp.shape, LayerNorm().init(jax.random.key(0), x)) == jax.tree.map(
        jnp.shape, flax.init(jax.random.key(0), x.astype(jnp.float32))
    )


def in_float64(x, params, gradient):
    """Gradients of x, scale and bias by PyTorch."""
    leaves = [torch.tensor(np.asarray(v, np.float64), requires_grad=True) for v in (x, params["scale"], params["bias"])]
    y = torch.nn.functional.layer_norm(leaves[0], leaves[0].shape[-1:], *leaves[1:], eps=LAYER_NORM_EPS)
    y.backward(torch.tensor(np.asarray(gradient, np.float64)))
    return [leaf.grad.numpy() for leaf in leaves]


@pytest.mark.parametrize(
    "options", [{}, {"offset": 100.0}, {"scale": 1e-3, "offset": 0.0}, {"scale": 0.0}], ids=lambda o: f"{o}"
)
def test_gradients_are_those_of_float64(options):
    """Also where the mean is far above the deviation, where epsilon counts, and where a row is constant."""
    x, params, gradient = inputs((4, 9, 48), **options)
    _, pull = jax.vjp(lambda x, params: layer_norm(x, params=params), x, params)
    d_x, d_params = pull(gradient)
    all_found = d_x, d_params["scale"], d_params["bias"]
    for found, expected in zip(all_found, in_float64(x, params, gradient), strict=True):
        # The mean of numbers near 100 is known to 1e-5 of their deviation.
        tolerance = 1e-4 if "offset" in options and options["offset"] > 10 else 2e-6
        assert np.abs(found - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)


def test_the_gradient_has_the_type_of_x():
    x, params, gradient = inputs((4, 9, 48))
    x = x.astype(jnp.bfloat16)
    _, pull = jax.vjp(lambda x: layer_norm(x, params=params), x)
    (d_x,) = pull(gradient)
    assert d_x.dtype == jnp.bfloat16
    expected, *_ = in_float64(x.astype(jnp.float32), params, gradient)
    assert np.abs(d_x.astype(jnp.float32) - expected).max() <= 2**-8 * np.abs(expected).max()


def test_statistics_are_reduced_once_each():
    """Two means a row in either pass, and the sums of both parameters; with JAX's own derivative there are 10."""
    x, params, gradient = inputs((4, 9, 48))

    def both(x, params, gradient):
        y, pull = jax.vjp(lambda x, params: layer_norm(x, params=params), x, params)
        return y, pull(gradient)

    assert str(jax.make_jaxpr(both)(x, params, gradient)).count("reduce_sum[") == 6
