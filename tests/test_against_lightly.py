"""Losses and networks beside lightly's, from the same parameters, embeddings, directions and masks.

lightly is not a requirement of this project. `pip install --no-deps lightly==1.6.0` is enough for these tests:

    python -m pytest -s -m slow -n 0 tests/test_against_lightly.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.methods import losses, sigreg
from cjepa_jax.methods.vicreg import VICRegLoss
from cjepa_jax.models.masking import Masks
from cjepa_jax.models.predictor import PredictorConfig, build_predictor
from tests.siamese import WIDTH, small_method
from tests.test_convert import make_networks, to

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of lightly's own imports


def relative(found, wanted) -> float:
    """The difference as a share of the norm of what is wanted."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("dimensions", [64, 2048])
def test_vicreg(dimensions):
    """The loss of two views of 256 images, and its gradient."""
    theirs = pytest.importorskip("lightly.loss.vicreg_loss").VICRegLoss()
    noise = np.random.default_rng(0).standard_normal((3, 256, dimensions), np.float32)
    views = 0.6 * noise[:2] + 0.5 * noise[2]

    def ours(z):
        return losses.combined(losses.target_blocks(z, VICRegLoss()), VICRegLoss())

    loss, gradient = jax.value_and_grad(ours)(jnp.asarray(views))
    z = torch.tensor(views, dtype=torch.float64, requires_grad=True)
    expected = theirs(*z)
    expected.backward()
    found = abs(float(loss) / expected.item() - 1), relative(gradient, z.grad)
    print(f"VICReg, 256 x {dimensions}: loss {found[0]:.1e}, gradient {found[1]:.1e}")
    assert max(found) < 2e-6


def test_lejepa():
    """The loss of two global views and its gradient, with the directions of a step and our points of the integral."""
    module = pytest.importorskip("lightly.loss.lejepa_loss")
    method = small_method("lejepa", sigreg__projector=(), sigreg__slices=256)
    seeds = sigreg.seeds(jax.random.key(0), 256)
    noise = np.random.default_rng(0).standard_normal((3, 256, WIDTH), np.float32)
    views = (0.6 * noise[:2] + 0.5 * noise[2]).swapaxes(0, 1)

    def ours(views):
        return method.loss({"projector": {}}, {"views": views, "features": views[:, 0], "seeds": seeds})[0]

    loss, gradient = jax.value_and_grad(ours)(jnp.asarray(views))
    theirs = module.SIGReg(knots=9, t_max=5.0, num_vectors=256).double()
    slices = np.asarray(sigreg.directions(seeds, width=WIDTH, slices=256), np.float64)
    theirs._generate_unit_vectors = lambda *_: torch.tensor(slices)
    z = torch.tensor(views, dtype=torch.float64, requires_grad=True)
    projected = z.transpose(0, 1)
    distance = module.lejepa_invariance_loss(all_proj=projected, global_proj=projected)
    weight = module.LeJEPALoss().lambda_param
    assert weight == type(method.config.sigreg)().weight == 0.05
    expected = weight * theirs(projected) + (1 - weight) * distance
    expected.backward()
    found = abs(float(loss) / expected.item() - 1), relative(gradient, z.grad)
    print(f"LeJEPA, 256 x {WIDTH}: loss {found[0]:.1e}, gradient {found[1]:.1e}")
    assert max(found) < 5e-6


def test_simsiam():
    """The two MLPs, the loss, and its gradient for the pooled features and every parameter."""
    heads = pytest.importorskip("lightly.models.modules.heads")
    method = small_method("simsiam", simsiam__projector=(48, 48, 32), simsiam__hidden=24)
    random = np.random.default_rng(0)
    params = {name: tree for name, tree in method.init(jax.random.key(0)).items() if name != "encoder"}
    params = jax.tree.map(lambda p: random.normal(0.1, 0.4, p.shape).astype(np.float32), params)
    views = random.standard_normal((64, 2, WIDTH), np.float32)

    def ours(params, views):
        return method.loss(params, {"views": views, "features": views[:, 0]})[0]

    loss, (of_params, of_views) = jax.value_and_grad(ours, argnums=(0, 1))(params, jnp.asarray(views))

    def tensors(tree):
        """The tensors of an MLP in the order of lightly's parameters: a layer's kernel and bias, then its norm's."""
        layers = range(sum(name.startswith("fc") for name in tree))
        found = [
            (tree[f"fc{i}"]["kernel"].T, tree[f"fc{i}"].get("bias"), tree.get(f"scale{i}"), tree.get(f"bias{i}"))
            for i in layers
        ]
        return [np.asarray(tensor, np.float64) for layer in found for tensor in layer if tensor is not None]

    theirs = {
        "projector": heads.SimSiamProjectionHead(WIDTH, 48, 32).double(),
        "prediction_head": heads.SimSiamPredictionHead(32, 24, 32).double(),
    }
    for name, module in theirs.items():
        for parameter, tensor in zip(module.parameters(), tensors(params[name]), strict=True):
            assert parameter.shape == tensor.shape
            parameter.data = torch.tensor(tensor)
    inputs = torch.tensor(views, dtype=torch.float64, requires_grad=True)
    z = [theirs["projector"](inputs[:, view]) for view in (0, 1)]
    p = [theirs["prediction_head"](one) for one in z]
    distance = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    expected = 0.5 * (distance(p[0], z[1].detach()) + distance(p[1], z[0].detach()))
    expected.backward()
    reached = {"loss": abs(float(loss) / expected.item() - 1), "gradient of views": relative(of_views, inputs.grad)}
    for name, module in theirs.items():
        for i, (parameter, tensor) in enumerate(zip(module.parameters(), tensors(of_params[name]), strict=True)):
            reached[f"gradient of {name} {i}"] = relative(tensor, parameter.grad)
    assert len(reached) == 2 + 7 + 5
    print("\n".join(f"{what}: {share:.1e}" for what, share in sorted(reached.items(), key=lambda item: -item[1])[:4]))
    assert max(reached.values()) < 5e-6


def test_predictor_of_ijepa(tmp_path):
    """Predictions of four blocks of each image, their loss, and its gradient for the context and every parameter."""
    module = pytest.importorskip("lightly.models.modules.ijepa_timm")
    images, blocks, context_tokens, target_tokens, depth = 3, 4, 50, 30, 4
    networks = make_networks("96x1x3", image=224, patch=16, predictor=PredictorConfig(width=48, depth=depth))
    params = networks.params["predictor"]
    random = np.random.default_rng(1)
    order = np.stack([random.permutation(196) for _ in range(images)])
    visible = np.sort(order[:, :context_tokens])
    hidden = np.stack(
        [[random.permutation(row[context_tokens:])[:target_tokens] for _ in range(blocks)] for row in order]
    )
    context = random.standard_normal((images, context_tokens, 96), np.float32)
    target = random.standard_normal((images, blocks, target_tokens, 96), np.float32)
    masks = Masks(visible, np.ones(visible.shape, bool), hidden, np.ones(hidden.shape, bool))
    predictor = build_predictor(networks.predictor, networks.model, grid=networks.grid)

    def ours(params, context):
        found = predictor.apply({"params": params}, context, jax.tree.map(jnp.asarray, masks))
        sums, count = losses.prediction_error(found, jnp.asarray(target), jnp.asarray(masks.target_valid), "smooth_l1")
        return sums.sum() / count.sum(), found

    (loss, found), (of_params, of_context) = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(params, context)

    def tensors(name, tree):
        """The predictor's tensors under I-JEPA's names, which lightly reads."""
        pretrained.save(epath.Path(tmp_path / name), networks._replace(params=networks.params | {"predictor": tree}))
        to(tmp_path / name, tmp_path / f"{name}.pth.tar", "ijepa")
        return torch.load(tmp_path / f"{name}.pth.tar", weights_only=True)["predictor"]

    theirs = module.IJEPAPredictorTIMM(196, depth, mlp_dim=96, predictor_embed_dim=48, num_heads=3)
    theirs.load_state_dict(tensors("params", params))
    theirs = theirs.double().eval()
    z = torch.tensor(context, dtype=torch.float64, requires_grad=True)
    predicted = theirs(z, [torch.tensor(visible)], [torch.tensor(hidden[:, block]) for block in range(blocks)])
    predicted = predicted.reshape(blocks, images, target_tokens, 96).transpose(0, 1)
    expected = torch.nn.functional.smooth_l1_loss(predicted, torch.tensor(target, dtype=torch.float64))
    expected.backward()

    reached = {"predictions": relative(found, predicted.detach()), "gradient of context": relative(of_context, z.grad)}
    reached["loss"] = abs(float(loss) / expected.item() - 1)
    gradients = tensors("gradients", of_params)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:  # the positions are fixed
            continue
        old = name.removeprefix("decoder.")
        old = f"predictor_{old}" if old.startswith(("blocks.", "norm.")) else old
        pair = gradients[old].numpy(), parameter.grad.numpy()
        if name.endswith("qkv.bias"):  # the exact gradient of the keys' bias is 0
            pair = tuple(np.delete(bias.reshape(3, -1), 1, axis=0) for bias in pair)
        reached[f"gradient of {old}"] = relative(*pair)
    assert len(reached) == 3 + 12 * depth + 7
    print("\n".join(f"{what}: {share:.1e}" for what, share in sorted(reached.items(), key=lambda item: -item[1])[:6]))
    assert max(reached.values()) < 5e-6
