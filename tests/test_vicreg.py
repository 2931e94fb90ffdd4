"""VICReg's loss against its formulas in PyTorch, float64."""

import pytest
import torch

from tests.siamese import check_loss, mlp, pairs, small_method


def terms(z, w, gamma=1.0, eps=1e-4):
    """Invariance, variance and covariance of two views [B, d], as VICReg states them."""
    invariance = torch.nn.functional.mse_loss(z, w)
    variance = sum(torch.relu(gamma - torch.sqrt(x.var(dim=0, unbiased=True) + eps)).mean() for x in (z, w)) / 2
    covariance = 0.0
    for x in (z, w):
        matrix = torch.cov(x.T)
        covariance = covariance + (matrix.square().sum() - matrix.diagonal().square().sum()) / x.shape[1]
    return torch.stack([invariance, variance, covariance])


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("coefficients", [(25.0, 25.0, 1.0), (3.0, 5.0, 7.0)])
def test_loss_and_gradient_are_those_of_torch(views, coefficients):
    names = ("vicreg__invariance", "vicreg__variance", "vicreg__covariance")
    several = {"views__blur": (0.0,) * views, "views__solarize": (0.0,) * views}
    method = small_method("vicreg", **dict(zip(names, coefficients, strict=True)), **several)
    found = []

    def reference(params, pooled):
        z = [mlp(params["projector"], view, last="plain") for view in pooled]
        mean = sum(terms(z[i], z[j]) for i, j in pairs(views)) / len(pairs(views))
        found.append(mean.detach())
        return (mean * torch.tensor(coefficients, dtype=mean.dtype)).sum()

    metrics = check_loss(method, reference, views=views)
    for name, value in zip(("invariance", "variance", "covariance"), found[0].tolist(), strict=True):
        assert value > 0
        assert float(metrics[f"loss/{name}"]) == pytest.approx(value, rel=1e-4)


def test_the_defaults_are_the_papers():
    from cjepa_jax.methods.vicreg import VICRegLoss

    loss = VICRegLoss()
    assert (loss.invariance, loss.variance, loss.covariance) == (25, 25, 1)
    assert loss.projector == (8192,) * 3 and (loss.gamma, loss.eps) == (1, 1e-4)


def test_there_is_neither_average_nor_predictor():
    method = small_method("vicreg")
    assert method.averaged == {} and method.config.vicreg.projector == (12, 8)
