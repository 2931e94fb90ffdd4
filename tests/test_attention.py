"""Maps of attention and components: against PyTorch and NumPy. The weights themselves: test_transformers_parity.py."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from cjepa_jax import plots
from cjepa_jax.config import Model
from cjepa_jax.evaluate import attention
from cjepa_jax.models.attention import attend_xla
from cjepa_jax.models.vit import build_encoder


@pytest.fixture
def weights():
    """Attention of 2 images, 3 heads, 16 patches [2, 3, 16, 16]."""
    scores = np.random.default_rng(0).normal(size=(2, 3, 16, 16))
    return np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("query", [None, 0, 7])
def test_maps_are_means_in_multiples_of_uniform(weights, query):
    found = attention.attended(jnp.asarray(weights, jnp.float32), query)
    expected = np.zeros((2, 16))
    queries = range(16) if query is None else [query]
    for head in range(3):
        for q in queries:
            expected += weights[:, head, q] * 16 / 3 / len(queries)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(found.mean(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("grid, shape", [((4, 4), (32, 32)), ((2, 8), (16, 64))])
def test_maps_are_enlarged_as_pytorch_does(grid, shape):
    maps = np.random.default_rng(0).random((2, 16)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(maps).reshape(2, 1, *grid), size=shape, mode="bilinear", align_corners=False
    )[:, 0]
    np.testing.assert_allclose(attention.enlarged(jnp.asarray(maps), grid=grid, shape=shape), expected, atol=1e-6)


@pytest.mark.parametrize("init, stds", [("normal", (0.02, 0.02)), ("fan_in", (0.02 * 2**0.5, 0.02 / 2**0.5))])
def test_kernels_start_with_their_published_spread(init, stds):
    """0.02, or 0.02 * sqrt(768 / fan_in), of a width of 384 and an MLP of 1,536."""
    model = Model(size="384x1x6", patch_size=2, init=init, dtype="float32", layers="unrolled", remat="none")
    encoder = build_encoder(model, grid=(4, 4))
    block = jax.jit(encoder.init)(jax.random.key(0), jnp.zeros((1, 16, 4)))["params"]["block00"]
    found = [float(jnp.std(block[name]["kernel"])) for name in ("fc1", "fc2")]
    assert found == pytest.approx(stds, rel=0.01)


def test_an_encoder_of_one_layer():
    """Nothing before the last layer but the patches and their positions, which differ: so does the attention."""
    model = Model(size="16x1x2", patch_size=2, init="normal", dtype="float32", layers="unrolled", remat="none")
    encoder = build_encoder(model, grid=(4, 4))
    patches = jax.random.normal(jax.random.key(0), (3, 16, 4))
    params = encoder.init(jax.random.key(1), patches)["params"]
    weights, features = attention.last_layer(encoder, params, patches)
    np.testing.assert_allclose(features, encoder.apply({"params": params}, patches), atol=1e-6)
    assert weights.shape == (3, 2, 16, 16)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert float(jnp.std(weights, axis=-1).min()) > 1e-6


def test_bfloat16_needs_no_tensor_cores_that_have_it(monkeypatch):
    """XLA refuses the products that JAX's attention asks for on GPUs before Ampere, such as the T4."""
    qkv = jax.random.normal(jax.random.key(0), (2, 8, 48)).astype(jnp.bfloat16)
    bias, valid = jnp.zeros(48), jnp.arange(8)[None] < jnp.array([[8], [5]])
    found = {}
    for capability, refused in (("8.0", True), ("7.5", False)):
        here = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda here=here: [here])
        with jax.numpy_dtype_promotion("standard"):  # jax's own attention mixes bfloat16 and float32
            lowered = jax.jit(functools.partial(attend_xla, heads=2)).lower(qkv, bias, valid)
            found[capability] = attend_xla(qkv, bias, valid, heads=2)
        assert ("algorithm" in lowered.as_text()) == refused
        assert found[capability].dtype == jnp.bfloat16
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in found.values()), atol=0.02)


def test_colours_are_principal_components():
    """Against the SVD of all patches of all images, in float64; the same for the same features, turned or not."""
    random = np.random.default_rng(0)
    features = (
        random.normal(size=(5, 16, 6)) @ np.diag([5, 4, 3, 1, 0.5, 0.1]) @ np.linalg.qr(random.normal(size=(6, 6)))[0]
    )
    features += 7
    colours, shares = attention.component_colours(features.astype(np.float32))
    patches = features.reshape(80, 6) - features.reshape(80, 6).mean(axis=0)
    u, s, vt = np.linalg.svd(patches, full_matrices=False)
    np.testing.assert_allclose(shares, (s**2 / (s**2).sum())[:3], rtol=1e-4)
    for c in range(3):
        component = u[:, c] * s[c] * np.sign(vt[c, np.abs(vt[c]).argmax()])
        low, high = np.quantile(component, [0.01, 0.99])
        np.testing.assert_allclose(colours[..., c].ravel(), ((component - low) / (high - low)).clip(0, 1), atol=1e-4)
    backwards = attention.component_colours(features[::-1].astype(np.float32))[0][::-1]
    np.testing.assert_allclose(backwards, colours, atol=1e-4)


def test_pictures_are_drawn(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    columns = {
        "image": random.integers(0, 256, (2, 32, 32, 3), np.uint8),
        "grey": random.integers(0, 256, (2, 32, 32, 1), np.uint8),
        "map": random.random((2, 32, 32)),
        "colours": random.random((2, 4, 4, 3)),
    }
    bars, draw = [], plots.Figure.colorbar
    monkeypatch.setattr(plots.Figure, "colorbar", lambda *args, **kwargs: bars.append(draw(*args, **kwargs)))
    plots.side_by_side(columns, tmp_path / "x.png", title="of two images")
    drawn = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert len(bars) == 2  # the scale of the maps, one for each row
    assert drawn.shape[1] > 1.5 * drawn.shape[0] and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 1000
