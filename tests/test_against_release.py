"""Beside I-JEPA's released code, in the user's own clone: the same parameters, images and masks, five steps.

    git clone https://github.com/facebookresearch/ijepa
    python -m pytest -s -m slow -n 0 tests/test_against_release.py --ijepa=ijepa

Its networks, masks, schedules and optimizer are imported and run as they are, in float64; what surrounds them in its
training loop, which wants CUDA, is written anew here. Nothing of it is part of this repository.
"""

import copy
import dataclasses
import importlib
import logging
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cjepa_jax.batch import Batch
from cjepa_jax.interop.torch_names import ENCODER, PREDICTOR, to_torch
from cjepa_jax.methods.cjepa import CJEPA, MaskedImages
from cjepa_jax.models.masking import Masks
from cjepa_jax.settings import parse
from cjepa_jax.train.step import init_state, train_step
from configs import ijepa_vitb16

STEPS, BATCH, WIDTH = 5, 4, 192
EPOCHS, PER_EPOCH = 3, 4  # so that five steps see the warm-up, of one epoch, and the decay
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Given(CJEPA):
    """Our method with masks that are given, one set after another."""

    masks_of_steps: Masks | None = None

    def prepare(self, batch: Batch, rng: jax.Array) -> MaskedImages:
        """Takes the masks of the step that `rng` stands for."""
        return MaskedImages(batch.images, self.masks_of_steps, None)


@pytest.fixture(scope="module")
def release(pytestconfig):
    """The modules of the clone."""
    clone = pytestconfig.getoption("--ijepa")
    if not clone:
        pytest.skip("--ijepa=PATH names a clone of facebookresearch/ijepa")
    assert (pathlib.Path(clone) / "src" / "helper.py").is_file(), f"{clone} is not a clone of facebookresearch/ijepa"
    sys.path.insert(0, str(pathlib.Path(clone).resolve()))
    names = ("helper", "masks.multiblock", "masks.utils", "utils.tensors")
    modules = {name: importlib.import_module(f"src.{name}") for name in names}
    logging.getLogger().setLevel(logging.WARNING)  # it prints its networks
    yield modules
    sys.path.pop(0)


def relative(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def theirs(release, params, images, all_masks):
    """Five steps of the released code: losses, features and gradients of the first step, and parameters at the end."""
    helper = release["helper"]
    torch.manual_seed(0)
    encoder, predictor = helper.init_model(
        "cpu", patch_size=16, model_name="vit_tiny", crop_size=224, pred_depth=2, pred_emb_dim=96
    )
    for net, tree, table in ((encoder, params["encoder"], ENCODER), (predictor, params["predictor"], PREDICTOR)):
        tensors = {name: torch.tensor(np.array(value)) for name, value in to_torch(tree, table, 16).items()}
        left = net.load_state_dict(tensors, strict=False)
        assert not left.unexpected_keys and [name.split("_")[-2:] for name in left.missing_keys] == [["pos", "embed"]]
        net.double()
    target = copy.deepcopy(encoder)
    optimizer, _, rate, decay = helper.init_opt(
        encoder, predictor, PER_EPOCH, start_lr=1e-4, ref_lr=1e-3, warmup=1, num_epochs=EPOCHS, wd=0.04, final_wd=0.4,
        final_lr=1e-6, ipe_scale=1.0,
    )  # fmt: skip
    momenta = [0.996 + i * 0.004 / (PER_EPOCH * EPOCHS) for i in range(STEPS)]
    gather, repeat = release["masks.utils"].apply_masks, release["utils.tensors"].repeat_interleave_batch
    losses, first = [], {}
    for k, (image, (context, targets)) in enumerate(zip(images, all_masks, strict=True)):
        normal = torch.tensor((image / 255 - np.array(MEAN)) / np.array(STD)).permute(0, 3, 1, 2)
        rates = rate.step(), decay.step()
        with torch.no_grad():
            full = target(normal)
            hidden = F.layer_norm(full, (full.size(-1),))
            hidden = repeat(gather(hidden, targets), len(image), repeat=len(context))
        loss = F.smooth_l1_loss(predictor(encoder(normal, context), context, targets), hidden)
        loss.backward()
        if k == 0:
            first = {"features": full.numpy(), "rates": rates}
            first["gradients"] = {
                f"{name}.{key}": p.grad.numpy().copy()
                for name, net in (("encoder", encoder), ("predictor", predictor))
                for key, p in net.named_parameters()
                if p.grad is not None
            }
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, now in zip(target.parameters(), encoder.parameters(), strict=True):
                average.mul_(momenta[k]).add_((1 - momenta[k]) * now)
        losses.append(float(loss.detach()))
    last = {"encoder": encoder, "predictor": predictor, "target_encoder": target}
    return losses, first, {name: net.state_dict() for name, net in last.items()}


def ours(config, state, images, all_masks):
    """The same by our step, in float32: the losses, the gradients' norms, the rates and the last state."""
    losses, seen = [], {}
    for k, (image, (context, targets)) in enumerate(zip(images, all_masks, strict=True)):
        context_idx, target_idx = jnp.asarray(context[0]), jnp.stack([jnp.asarray(t) for t in targets], axis=1)
        masks = Masks(
            context_idx.astype(jnp.int32),
            jnp.ones(context_idx.shape, bool),
            target_idx.astype(jnp.int32),
            jnp.ones(target_idx.shape, bool),
        )
        method = Given(config, masks_of_steps=masks)
        batch = Batch(jnp.asarray(image), jnp.zeros(len(image), jnp.int32))
        if k == 0:
            inputs = method.prepare(batch, jax.random.key(0))
            features = method.encoder.apply({"params": state.averages["target_encoder"]}, method.patches(batch.images))

            def loss(params, averages=state.averages, method=method, inputs=inputs):
                return method.loss(params, method.forward(params, averages, inputs))[0]

            seen = {"features": features, "gradients": jax.grad(loss)(state.params)}
        state, metrics, _ = train_step(state, batch, jax.random.key(0), method=method, steps=PER_EPOCH * EPOCHS)
        if k == 0:
            seen["rates"] = float(metrics["lr"]), float(metrics["weight_decay"])
        losses.append(float(metrics["loss/total"]))
    return losses, seen, state


@pytest.mark.slow
def test_five_steps_are_those_of_the_release(release):
    jax.config.update("jax_default_matmul_precision", "highest")
    values = ijepa_vitb16.get_config().to_dict()
    values["data"] |= {"batch_size": BATCH}
    values["model"] = {"size": f"{WIDTH}x12x3", "patch_size": 16, "dtype": "float32"}
    values["predictor"] = {"width": 96, "depth": 2}
    values["optim"] = {"epochs": float(EPOCHS), "warmup_epochs": 1.0}
    config = parse(values, CJEPA.settings)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (STEPS, BATCH, 224, 224, 3), np.uint8)
    collate = release["masks.multiblock"].MaskCollator(
        input_size=224, patch_size=16, enc_mask_scale=(0.85, 1.0), pred_mask_scale=(0.15, 0.2), nenc=1, npred=4,
        aspect_ratio=(0.75, 1.5), allow_overlap=False, min_keep=10,
    )  # fmt: skip
    torch.manual_seed(0)
    all_masks = [collate([torch.zeros(1)] * BATCH)[1:] for _ in range(STEPS)]

    state = init_state(jax.random.key(0), method=CJEPA(config), steps=PER_EPOCH * EPOCHS)
    start = jax.device_get(state.params)
    wanted, first, last = theirs(release, start, images, all_masks)
    found, seen, state = ours(config, state, images, all_masks)

    worst = {"loss": max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))}
    worst["features"] = relative(seen["features"], first["features"])
    worst["rates"] = max(abs(a / b - 1) for a, b in zip(seen["rates"], first["rates"], strict=True))
    gradients = {
        f"{name}.{key}": value
        for name, table in (("encoder", ENCODER), ("predictor", PREDICTOR))
        for key, value in to_torch(jax.device_get(seen["gradients"][name]), table, 16).items()
    }
    # The bias of the keys has no gradient in exact arithmetic, so it is left out of its leaf.
    for name in [name for name in gradients if name.endswith("qkv.bias")]:
        for some in (gradients, first["gradients"]):
            some[name] = np.delete(some[name], np.s_[len(some[name]) // 3 : 2 * len(some[name]) // 3])
    assert gradients.keys() == first["gradients"].keys()
    worst["gradient"] = max(relative(gradients[name], first["gradients"][name]) for name in gradients)
    trees = {"encoder": ENCODER, "predictor": PREDICTOR, "target_encoder": ENCODER}
    after = {**state.params, **state.averages}
    for name, table in trees.items():
        tensors = to_torch(jax.device_get(after[name]), table, 16)
        begun = to_torch(start["predictor" if name == "predictor" else "encoder"], table, 16)
        exact = {key: last[name][key].numpy() for key in tensors}
        worst[name] = max(relative(tensors[key], exact[key]) for key in tensors if np.abs(exact[key]).max() > 1e-3)
        moved = [np.concatenate([np.ravel(x[key] - begun[key]) for key in tensors]) for x in (tensors, exact)]
        worst[f"{name}, change"] = relative(*moved)
    print("\n" + "\n".join(f"{name}: {value:.1e}" for name, value in worst.items()))
    limits = {"loss": 3e-6, "features": 2e-6, "rates": 1e-6, "gradient": 2e-6, "target_encoder": 1e-6}
    limits |= {"encoder": 3e-5, "predictor": 3e-5, "encoder, change": 3e-5, "predictor, change": 3e-5}
    limits |= {"target_encoder, change": 1e-3}
    assert all(worst[name] < limits[name] for name in worst), worst
