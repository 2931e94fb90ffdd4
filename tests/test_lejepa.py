"""SIGReg and LeJEPA's loss against formulas of their own in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cjepa_jax.methods import sigreg
from cjepa_jax.methods.cjepa import CJEPA
from tests.siamese import WIDTH, check_loss, mlp, small_method


def closed_form(x):
    """T by the integral over the whole line, which has a closed form, of one sample [N] in float64."""
    x, n = np.asarray(x, np.float64), len(x)
    among = np.exp(-np.square(x[:, None] - x[None]) / 2).mean()
    return n * (np.sqrt(2 * np.pi) * among - 2 * np.sqrt(np.pi) * np.exp(-(x**2) / 4).mean() + np.sqrt(2 * np.pi / 3))


def by_trapezoid(x):
    """T of samples along the first axis, by complex numbers and all 17 points, in PyTorch."""
    t = torch.linspace(-5, 5, 17, dtype=torch.float64)
    empirical = torch.exp(1j * x[..., None] * t).mean(dim=0)
    normal = torch.exp(-(t**2) / 2)
    return len(x) * torch.trapezoid((empirical - normal).abs().square() * normal, t, dim=-1)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.0, 0.3), (0.7, 1.0), (0.0, 0.0)])
def test_the_statistic_is_its_closed_form(mean, std):
    x = (mean + std * np.random.default_rng(0).normal(size=(50, 3))).astype(np.float32)
    found = jax.jit(sigreg.epps_pulley)(x)
    np.testing.assert_allclose(found, [closed_form(column) for column in x.T], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, by_trapezoid(torch.tensor(x, dtype=torch.float64)), rtol=1e-4, atol=1e-5)


def test_a_normal_sample_costs_least():
    normal = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
    slices = sigreg.directions(sigreg.seeds(jax.random.key(0), 1), width=4, slices=16)
    statistic = jax.jit(sigreg.statistic)
    least = float(statistic(normal, slices))
    assert 0 < least < 3  # of the order of 1 however large the batch is
    for other in (0.7 * normal, normal + 0.3, np.sign(normal), normal[:, :1] * np.ones((1, 4), np.float32)):
        assert statistic(other.astype(np.float32), slices) > 10 * least


def test_directions_are_unit_vectors_and_anew_in_each_step():
    draws = [sigreg.directions(sigreg.seeds(jax.random.key(i), 3), width=6, slices=2000) for i in (0, 0, 1)]
    np.testing.assert_allclose(np.linalg.norm(draws[0], axis=0), 1, rtol=1e-5)
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 0.1
    np.testing.assert_allclose(draws[0] @ draws[0].T / 2000, np.eye(6) / 6, atol=0.02)  # in all directions alike


@pytest.mark.parametrize("views, weight", [(2, 0.05), (3, 0.5), (2, 1.0)])
def test_loss_and_gradient_are_those_of_torch(views, weight):
    several = {"views__blur": (0.0,) * views, "views__solarize": (0.0,) * views}
    method = small_method("lejepa", sigreg__weight=weight, **several)
    seeds = sigreg.seeds(jax.random.key(3), 20)
    slices = torch.tensor(np.asarray(sigreg.directions(seeds, width=8, slices=32)), dtype=torch.float64)

    def reference(params, pooled):
        z = torch.stack([mlp(params["projector"], view, last="bias") for view in pooled])
        prediction = (z - z.mean(dim=0)).square().mean()
        gaussian = torch.stack([by_trapezoid(view @ slices).mean() for view in z]).mean()
        return (1 - weight) * prediction + weight * gaussian

    metrics = check_loss(method, reference, views=views, seeds=seeds)
    total = (1 - weight) * metrics["loss/prediction"] + weight * metrics["loss/sigreg"]
    assert float(metrics["loss/total"]) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("views", ["target_blocks", "context_target"])
def test_cjepa_adds_sigreg_of_the_pooled_blocks(make_config, views):
    """And without it, by default, nothing of it is computed."""
    config = make_config(vicreg__views=views, vicreg__weight=0.3, sigreg__weight=0.2, sigreg__slices=32)
    rng = np.random.default_rng(0)
    outputs = {
        "error": rng.random(6),
        "terms": np.full(6, 2.0),
        "block_means": rng.normal(size=(6, 4, WIDTH)),
        "target_block_means": rng.normal(size=(6, 4, WIDTH)),
        "context_mean": rng.normal(size=(6, WIDTH)),
        "target_mean": rng.normal(size=(6, WIDTH)),
    }
    outputs = {name: jnp.asarray(x, jnp.float32) for name, x in outputs.items()}
    seeds = sigreg.seeds(jax.random.key(3), 6)
    plain, metrics = CJEPA(make_config(vicreg__views=views, vicreg__weight=0.3)).loss({"projector": {}}, outputs)
    total, more = CJEPA(config).loss({"projector": {}}, {**outputs, "seeds": seeds})
    assert set(more) - set(metrics) == {"loss/sigreg"}
    slices = np.asarray(sigreg.directions(seeds, width=WIDTH, slices=32), np.float64)
    seen = [outputs["block_means"][:, i] for i in range(4)] if views == "target_blocks" else [outputs["context_mean"]]
    wanted = np.mean([[closed_form(column) for column in (np.asarray(z, np.float64) @ slices).T] for z in seen])
    assert float(more["loss/sigreg"]) == pytest.approx(wanted, rel=1e-3)
    assert float(total) == pytest.approx(float(plain) + 0.2 * wanted, rel=1e-3)


def test_cjepas_directions_are_those_of_the_step_and_not_of_the_masks(make_config):
    from cjepa_jax.batch import Batch

    batch = Batch(np.zeros((16, 8, 8, 1), np.uint8), np.zeros(16, np.int32))
    with_it, without = CJEPA(make_config(sigreg__weight=0.1)), CJEPA(make_config())
    first, again, other = (with_it.prepare(batch, jax.random.key(i)) for i in (0, 0, 1))
    assert without.prepare(batch, jax.random.key(0)).seeds is None
    jax.tree.map(np.testing.assert_array_equal, first.masks, without.prepare(batch, jax.random.key(0)).masks)
    np.testing.assert_array_equal(first.seeds, again.seeds)
    assert (first.seeds != other.seeds).any() and first.seeds.shape[0] == 16
