"""SimSiam's loss and its ablations against PyTorch, float64; what keeps it from collapsing can be switched off."""

import jax
import numpy as np
import pytest
import torch

from cjepa_jax.methods import simsiam
from cjepa_jax.methods.simsiam import SimSiamHeads
from tests.siamese import WIDTH, check_loss, mlp, pairs, small_method


def negative_cosine(p, z):
    return -torch.nn.functional.cosine_similarity(p, z, dim=1).mean()


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("predictor, stop_gradient", [(True, True), (False, True), (True, False), (False, False)])
def test_loss_and_gradient_are_those_of_torch(views, predictor, stop_gradient):
    switches = {"simsiam__predictor": predictor, "simsiam__stop_gradient": stop_gradient}
    several = {"views__blur": (0.0,) * views, "views__solarize": (0.0,) * views}
    method = small_method("simsiam", **switches, **several)
    found = []

    def reference(params, pooled):
        z = [mlp(params["projector"], view, last="norm") for view in pooled]
        p = [mlp(params["prediction_head"], x, last="bias") for x in z] if predictor else z
        fixed = [x.detach() for x in z] if stop_gradient else z
        unit = torch.stack([torch.nn.functional.normalize(x, dim=1) for x in z])
        found.append(unit.std(dim=1, unbiased=False).mean().item() * unit.shape[-1] ** 0.5)
        return sum(negative_cosine(p[i], fixed[j]) for i, j in pairs(views)) / len(pairs(views))

    metrics = check_loss(method, reference, views=views)
    assert float(metrics["rep/output_std"]) == pytest.approx(found[0], rel=1e-4)


def test_the_networks_are_the_papers():
    heads = SimSiamHeads()
    assert (heads.projector, heads.hidden, heads.predictor, heads.stop_gradient) == ((2048,) * 3, 512, True, True)
    params = jax.eval_shape(small_method("simsiam").init, jax.random.key(0))
    assert set(params) == {"encoder", "projector", "prediction_head"}
    assert "bias2" not in params["projector"] and params["prediction_head"]["fc1"]["bias"].shape == (8,)
    alone = jax.eval_shape(small_method("simsiam", simsiam__predictor=False).init, jax.random.key(0))
    assert set(alone) == {"encoder", "projector"}


def test_outputs_that_are_all_the_same_have_no_std_and_no_nan():
    method = small_method("simsiam")
    params = method.init(jax.random.key(0))
    same = np.ones((8, 2, WIDTH), np.float32)
    (total, metrics), gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))(params, {"views": same})
    assert abs(float(metrics["rep/output_std"])) < 1e-3 and np.isfinite(total)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_without_a_projection_mlp_the_features_are_projected_by_none():
    method = small_method("simsiam", simsiam__projector=())
    params = method.init(jax.random.key(0))
    assert "fc0" not in params["projector"] and params["prediction_head"]["fc1"]["bias"].shape == (WIDTH,)
    views = np.random.default_rng(0).normal(size=(8, 2, WIDTH)).astype(np.float32)
    assert np.isfinite(method.loss(params, {"views": views})[0])


def test_a_vector_of_zeros_has_no_gradient():
    gradient = jax.grad(lambda x: simsiam._unit(x).sum())(np.zeros((1, 2, 3), np.float32))
    np.testing.assert_array_equal(gradient, 0)
