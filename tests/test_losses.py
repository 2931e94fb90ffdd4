"""The losses as claims, each against a second formula."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from cjepa_jax.config import Mesh
from cjepa_jax.methods import losses
from cjepa_jax.methods.cjepa import CJEPA, MaskedImages
from cjepa_jax.models.masking import Masks
from cjepa_jax.models.projector import Projector
from cjepa_jax.train import sharding

VIEWS = ["target_blocks", "context_target"]
TERMS = ["invariance", "variance", "covariance"]


@pytest.fixture
def vicreg(make_config):
    """The coefficients differ, and gamma lies amid the stds of `draw`."""
    settings = dict(weight=0.01, invariance=25.0, variance=20.0, covariance=3.0, gamma=1.0, eps=1e-4)
    return make_config(**{f"vicreg__{key}": value for key, value in settings.items()}).vicreg


def draw(*shape):
    """Normal numbers; each feature has its own std, from 0.3 to 2, and mean."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=shape) * np.linspace(0.3, 2, shape[-1]) + rng.normal(size=shape[-1])).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def regularise(z, vicreg, views):
    """The terms of [M, B, d]; where the views are context and target, of the first two."""
    return losses.target_blocks(z, vicreg) if views == "target_blocks" else losses.context_target(z[0], z[1], vicreg)


# 1. The three terms are those of the paper, in float64 loops


def v(z, vicreg):
    batch, d = z.shape
    short = 0.0
    for k in range(d):
        mean = sum(z[:, k]) / batch
        variance = sum((x - mean) ** 2 for x in z[:, k]) / (batch - 1)
        short += max(0.0, vicreg.gamma - np.sqrt(variance + vicreg.eps))
    return short / d


def c(z):
    batch, d = z.shape
    total = 0.0
    for k, m in itertools.permutations(range(d), 2):
        mean_k, mean_m = sum(z[:, k]) / batch, sum(z[:, m]) / batch
        total += (sum((z[b, k] - mean_k) * (z[b, m] - mean_m) for b in range(batch)) / (batch - 1)) ** 2
    return total / d


def literal_target_blocks(z, vicreg):
    pairs = list(itertools.permutations(range(len(z)), 2))
    return [
        sum(terms) / len(pairs)
        for terms in zip(
            *(
                (np.mean((z[i] - z[j]) ** 2), (v(z[i], vicreg) + v(z[j], vicreg)) / 2, c(z[i]) + c(z[j]))
                for i, j in pairs
            ),
            strict=True,
        )
    ]


def literal_context_target(z, vicreg):
    return [np.mean((z[0] - z[1]) ** 2), v(z[0], vicreg), c(z[0])]


LITERAL = {"target_blocks": literal_target_blocks, "context_target": literal_context_target}


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("shape", [(2, 2, 3), (4, 16, 8)])
def test_terms_are_those_of_the_pairwise_loops(vicreg, views, shape):
    z = draw(*shape)
    expected = LITERAL[views](z.astype(np.float64), vicreg)
    ours = regularise(z, vicreg, views)
    for term, value in zip(TERMS, expected, strict=True):
        assert value > 0
        assert float(getattr(ours, term)) == pytest.approx(value, rel=1e-5), term


def test_weights_multiply_their_own_terms(vicreg):
    terms = losses.Regulariser(jnp.float32(2), jnp.float32(3), jnp.float32(5))
    assert losses.combined(terms, vicreg) == pytest.approx(25 * 2 + 20 * 3 + 3 * 5, rel=1e-6)


# 2. What the terms are zero for


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("level", [0.0, 0.3, -70.0])
def test_a_collapsed_batch_costs_all_the_variance_and_no_covariance(vicreg, views, level):
    z = np.full((4, 16, 8), level, np.float32) + np.arange(8, dtype=np.float32) / 8  # images the same, features not
    terms = regularise(z, vicreg, views)
    assert terms.variance == pytest.approx(vicreg.gamma - vicreg.eps**0.5, abs=1e-4)
    assert terms.covariance == pytest.approx(0, abs=1e-8)
    assert terms.invariance == 0


@pytest.mark.parametrize("views", VIEWS)
def test_orthogonal_features_of_unit_variance_cost_nothing(vicreg, views):
    signs = np.array([[1.0]])
    for _ in range(4):
        signs = np.kron([[1, 1], [1, -1]], signs)  # Hadamard: orthogonal columns, all but the first of mean 0
    z = np.stack([signs[:, 1:] * np.sqrt(15 / 16) + 3] * 2).astype(np.float32)
    terms = regularise(z, vicreg, views)
    assert (terms.variance, terms.covariance, terms.invariance) == (0, pytest.approx(0, abs=1e-10), 0)
    smaller = regularise(z / 2, vicreg, views)
    assert smaller.variance == pytest.approx(1 - (0.25 + vicreg.eps) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("views", VIEWS)
def test_invariance_is_zero_only_for_equal_views(vicreg, views):
    z = np.stack([draw(16, 8)] * 2)
    assert regularise(z, vicreg, views).invariance == 0
    z[1, 5, 3] += 0.1
    assert regularise(z, vicreg, views).invariance == pytest.approx(0.01 / 128, rel=1e-4)


# 3. What the terms do not depend on


@pytest.mark.parametrize(
    "views, axis", [("target_blocks", 0), ("target_blocks", 1), ("target_blocks", 2), ("context_target", 1)]
)
def test_order_of_views_images_and_features_does_not_matter(vicreg, views, axis):
    z = draw(4, 16, 8)
    order = np.random.default_rng(1).permutation(z.shape[axis])
    before, after = (regularise(x, vicreg, views) for x in (z, np.take(z, order, axis)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), before, after)


@pytest.mark.parametrize("views", VIEWS)
def test_the_batch_is_the_global_one(vicreg, views):
    z, mesh = draw(4, 16, 8), sharding.make_mesh(Mesh(fsdp=1, parameters="replicated"))
    rows = jax.device_put(z.swapaxes(0, 1), sharding.batch(mesh))  # two images a device
    split = jax.jit(lambda z: z.swapaxes(0, 1))(rows)
    assert split.addressable_shards[0].data.shape == (4, 2, 8)
    terms = regularise(split, vicreg, views)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), terms, regularise(z, vicreg, views))


@pytest.mark.parametrize("views", VIEWS)
def test_spread_of_the_target_features_is_not_asked_for(vicreg, views):
    """Only `context_target` has a view that is a target."""
    z = draw(2, 16, 8)
    z[1] = 0
    alone = regularise(z[[0, 0]], vicreg, views)
    both = regularise(z, vicreg, views)
    equal = np.allclose([both.variance, both.covariance], [alone.variance, alone.covariance], rtol=1e-6)
    assert equal == (views == "context_target")


@pytest.mark.parametrize("views", VIEWS)
def test_no_gradient_reaches_the_target_branch(make_config, views):
    config = make_config(vicreg__views=views, vicreg__weight=1.0, vicreg__projector=(12, 8))
    method = CJEPA(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), shapes)
    order = rng.permuted(np.tile(np.arange(16, dtype=np.int32), (6, 1)), axis=1)
    masks = Masks(order[:, :8], np.ones((6, 8), bool), order[:, 8:].reshape(6, 4, 2), np.ones((6, 4, 2), bool))
    images = rng.integers(0, 256, (6, 8, 8, 1), np.uint8)

    def loss(params, averages):
        return method.loss(params, method.forward(params, averages, MaskedImages(images, masks)))[0]

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    online, target = jax.device_get(gradient(params, {"target_encoder": params["encoder"]}))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(target))
    for network, gradients in online.items():
        assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradients)), network


# 4. The prediction loss and the norm of its targets are PyTorch's


@pytest.mark.parametrize(
    "kind, reference", [("smooth_l1", functional.smooth_l1_loss), ("l2", functional.mse_loss)], ids=["smooth_l1", "l2"]
)
def test_prediction_loss_is_the_mean_over_valid_tokens(kind, reference):
    prediction, target = 2 * draw(5, 4, 6, 8), draw(4, 5, 6, 8).swapaxes(0, 1)
    error = np.abs(prediction - target)
    assert (error < 1).mean() > 0.2 and (error > 1).mean() > 0.2  # both pieces of smooth L1
    valid = np.random.default_rng(2).random((5, 4, 6)) < 0.6
    expected = reference(torch.tensor(prediction[valid]), torch.tensor(target[valid]))
    prediction[~valid] = 1e9
    error, terms = losses.prediction_error(jnp.asarray(prediction), jnp.asarray(target), jnp.asarray(valid), kind)
    assert float(error.sum() / terms.sum()) == pytest.approx(float(expected), rel=1e-6)
    assert error.shape == terms.shape == (5,)  # each image by itself
    of_one = reference(torch.tensor(prediction[2][valid[2]]), torch.tensor(target[2][valid[2]]), reduction="sum")
    assert float(error[2]) == pytest.approx(float(of_one), rel=1e-5) and float(terms[2]) == 8 * valid[2].sum()


@pytest.mark.parametrize("scale, offset", [(1, 0), (1, 300), (1e-3, 0), (0, 5)])
def test_target_norm_is_a_layer_norm_without_affine(scale, offset):
    features = scale * draw(3, 7, 32) + np.float32(offset)
    expected = functional.layer_norm(torch.tensor(features, dtype=torch.float64), (32,), eps=1e-5)
    np.testing.assert_allclose(losses.target_norm(jnp.asarray(features)), expected, rtol=1e-4, atol=1e-4)


# 5. The projector is VICReg's expander


@pytest.mark.parametrize("widths", [(), (8,), (24, 8), (24, 20, 8)])
def test_projector_is_that_of_torch_for_each_view(widths):
    views = 3 * draw(3, 16, 12) + np.arange(3, dtype=np.float32)[:, None, None]  # the statistics of the views differ
    module = Projector(widths)
    params = jax.device_get(jax.jit(module.init)(jax.random.key(0), views)).get("params", {})
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), params)

    layers = []
    for i, (before, after) in enumerate(itertools.pairwise((12, *widths))):
        layers.append(torch.nn.Linear(before, after, bias=False))
        layers[-1].weight.data = torch.tensor(params[f"fc{i}"]["kernel"].T)
        if i < len(widths) - 1:
            layers += [torch.nn.BatchNorm1d(after), torch.nn.ReLU()]
            layers[-2].weight.data, layers[-2].bias.data = (torch.tensor(params[f"{n}{i}"]) for n in ("scale", "bias"))
    expected = torch.stack([torch.nn.Sequential(*layers).train()(torch.tensor(view)) for view in views])
    ours = jax.jit(module.apply)({"params": params}, views)
    np.testing.assert_allclose(ours, expected.detach().double(), rtol=1e-4, atol=1e-5)


def test_projector_starts_as_torch_does():
    params = jax.jit(Projector((400, 8)).init)(jax.random.key(0), jnp.zeros((2, 25)))["params"]
    kernel, torch_kernel = params["fc0"]["kernel"], torch.nn.Linear(25, 400).weight.detach()
    assert kernel.std() == pytest.approx(float(torch_kernel.std()), rel=0.03)
    assert jnp.abs(kernel).max() == pytest.approx(float(torch_kernel.abs().max()), rel=0.01)
    assert (params["scale0"] == 1).all() and (params["bias0"] == 0).all()


@pytest.mark.parametrize("weight", [0.001, 0.03])
@pytest.mark.parametrize("kind, factor", [("smooth_l1", 400 / 3), ("l2", 200 / 3)])
def test_what_the_invariance_term_leaves_of_the_differences_between_blocks(kind, factor, weight):
    """The share that docs/study.md calculates, at which prediction error and invariance term together are least."""
    blocks = 0.1 * np.random.default_rng(0).normal(size=(16, 4, 1, 8)).astype(np.float32)
    blocks -= blocks.mean(axis=1, keepdims=True)

    def total(share):
        error, count = losses.prediction_error(share * blocks, blocks, np.ones((16, 4, 1), bool), kind)
        terms = losses.target_blocks(share * blocks[:, :, 0].swapaxes(0, 1), losses.Vicreg())
        return error.sum() / count.sum() + weight * losses.Vicreg().invariance * terms.invariance

    shares = np.linspace(0, 1, 1001, dtype=np.float32)
    best = shares[np.argmin(jax.jit(jax.vmap(total))(shares))]
    assert best == pytest.approx(1 / (1 + factor * weight), abs=2e-3)
