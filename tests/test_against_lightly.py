"""VICReg's loss and I-JEPA's predictor beside lightly's, from the same parameters, embeddings and masks.

lightly is no requirement of this project. `pip install --no-deps lightly==1.6.0` is enough for these tests:

    python -m pytest -s -m slow -n 0 tests/test_against_lightly.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.methods import losses
from cjepa_jax.methods.vicreg import VICRegLoss
from cjepa_jax.models.masking import Masks
from cjepa_jax.models.predictor import PredictorConfig, build_predictor
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
