"""What the tests of the methods that compare augmented views share: small settings, and their losses in PyTorch."""

import importlib
import itertools

import jax
import numpy as np
import pytest
import torch

from cjepa_jax.methods import METHODS
from cjepa_jax.methods.base import Method
from cjepa_jax.settings import parse

WIDTH = 16  # of the encoder
SMALL = {"model.size": f"{WIDTH}x1x2", "data.batch_size": 16, "data.threads": 1, "eval.every": 0}
HEADS = {
    "vicreg": {"vicreg.projector": (12, 8)},
    "simsiam": {"simsiam.projector": (12, 12, 8), "simsiam.hidden": 6},
    "lejepa": {"sigreg.projector": (12, 8), "sigreg.slices": 32},
}


def small_config(name: str, **overrides):
    """configs/NAME_digits.py with a smaller network, and overrides as `group__key=value`."""
    values = importlib.import_module(f"configs.{name}_digits").get_config().to_dict()
    changes = SMALL | HEADS[name] | {key.replace("__", "."): value for key, value in overrides.items()}
    for key, value in changes.items():
        group, _, last = key.rpartition(".")
        values.setdefault(group, {})[last] = value
    return parse(values, METHODS[name].settings)


def small_method(name: str, **overrides) -> Method:
    return METHODS[name](small_config(name, **overrides))


def mlp(params, x: torch.Tensor, *, last: str) -> torch.Tensor:
    """The projector of models/projector.py in PyTorch, of one view [B, D] and in the tensors' precision."""
    count = sum(name.startswith("fc") for name in params)
    for i in range(count):
        layer = params[f"fc{i}"]
        x = torch.nn.functional.linear(x, layer["kernel"].T, layer.get("bias"))
        if i < count - 1:
            scale, bias = params[f"scale{i}"], params[f"bias{i}"]
            x = torch.relu(torch.nn.functional.batch_norm(x, None, None, scale, bias, training=True))
        elif last == "norm":
            x = torch.nn.functional.batch_norm(x, None, None, training=True)
    return x


def check_loss(method: Method, reference, *, views: int = 2, **outputs):
    """Compares loss and gradient with those of `reference(params, views [V, B, D])`, in PyTorch's float64.

    The gradient is that of the networks of the loss and of the pooled features. Returns the metrics.
    """
    rng = np.random.default_rng(0)
    shapes = {k: v for k, v in jax.eval_shape(method.init, jax.random.key(0)).items() if k != "encoder"}
    params = jax.tree.map(lambda p: rng.normal(0.1, 0.4, p.shape).astype(np.float32), shapes)
    means = rng.normal(size=(20, 1, WIDTH))
    pooled = (means + 0.5 * rng.normal(size=(20, views, WIDTH))).astype(np.float32)  # views of an image are alike

    def loss(params, pooled):
        return method.loss(params, {"views": pooled, "features": pooled[:, 0], **outputs})

    (total, metrics), found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, pooled)
    leaf = lambda x: torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)  # noqa: E731
    theirs, their_pooled = jax.tree.map(leaf, params), leaf(pooled)
    expected = reference(theirs, their_pooled.transpose(0, 1))
    expected.backward()
    assert float(total) == pytest.approx(expected.item(), rel=2e-5)
    leaves = [*jax.tree.leaves(theirs), their_pooled]
    assert leaves
    for ours, wanted in zip(jax.tree.leaves(found), leaves, strict=True):
        gradient = np.zeros(ours.shape) if wanted.grad is None else wanted.grad.numpy()
        np.testing.assert_allclose(ours, gradient, rtol=1e-3, atol=2e-5 * max(1e-3, np.abs(gradient).max()))
    return metrics


def pairs(count: int):
    """Ordered pairs of different views."""
    return list(itertools.permutations(range(count), 2))
