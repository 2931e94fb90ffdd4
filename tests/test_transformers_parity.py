"""The encoder against the I-JEPA of transformers, with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

import tests.torch_ijepa  # noqa: F401  (defines what transformers' import needs)

# isort: split
from transformers import IJepaConfig, IJepaModel
from transformers.models.ijepa.modeling_ijepa import IJepaLayer

from cjepa_jax.config import Model
from cjepa_jax.evaluate.attention import last_layer
from cjepa_jax.models.vit import SIZES, Block, build_encoder, patchify, sincos_positions

TOLERANCE = 2e-5  # of a feature; features are of size 1
IMAGE, PATCH = 224, 16
GRID = IMAGE // PATCH
B_16 = Model(size="B", patch_size=PATCH, init="normal", dtype="float32", layers="unrolled", remat="none")


def _weights(module, *inputs):
    """{"name/of/leaf": array}: nothing at its initial value, biases and scales above all."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    random = np.random.default_rng(0)

    def value(name, shape):
        noise = random.normal(size=shape)
        if name.endswith("kernel"):
            return 0.03 * noise
        return (1 if name.endswith("scale") else 0) + 0.2 * noise

    return {name: value(name, x.shape).astype(np.float32) for name, x in flatten_dict(shapes, sep="/").items()}


def _tree(weights):
    return {"params": jax.tree.map(jnp.asarray, unflatten_dict(weights, sep="/"))}


def _layer_state(weights):
    """Weights of one of our blocks -> state of an IJepaLayer."""
    state = {}
    for ours, theirs in {
        "norm1": "layernorm_before",
        "proj": "attention.o_proj",
        "norm2": "layernorm_after",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }.items():
        state |= _affine_state(weights, ours, theirs)
    for part, kernel, bias in zip(
        "qkv", np.split(weights["qkv/kernel"], 3, axis=1), np.split(weights["qkv/bias"], 3), strict=True
    ):
        state[f"attention.{part}_proj.weight"] = torch.tensor(kernel.T)
        state[f"attention.{part}_proj.bias"] = torch.tensor(bias)
    return state


def _affine_state(weights, ours, theirs):
    """A linear layer or a norm."""
    weight = weights[f"{ours}/kernel"].T if f"{ours}/kernel" in weights else weights[f"{ours}/scale"]
    return {f"{theirs}.weight": torch.tensor(weight), f"{theirs}.bias": torch.tensor(weights[f"{ours}/bias"])}


def _of_block(weights, name):
    return {key.removeprefix(f"{name}/"): leaf for key, leaf in weights.items() if key.startswith(f"{name}/")}


def _ijepa_config():
    """B/16 at 224, with the epsilon that I-JEPA's own code has."""
    return IJepaConfig(layer_norm_eps=1e-6, attn_implementation="eager")


def _ijepa(weights):
    """IJepaModel with our weights, every one of its parameters set."""
    with torch.device("meta"):  # initial values are not needed
        model = IJepaModel(_ijepa_config())
    kernel = weights["embed/kernel"].reshape(PATCH, PATCH, 3, -1).transpose(3, 2, 0, 1)
    state = {
        "embeddings.patch_embeddings.projection.weight": torch.tensor(kernel),
        "embeddings.patch_embeddings.projection.bias": torch.tensor(weights["embed/bias"]),
        "embeddings.position_embeddings": torch.tensor(sincos_positions(kernel.shape[0], (GRID, GRID)))[None],
    } | _affine_state(weights, "norm", "layernorm")
    for i in range(len(model.layers)):
        state |= {f"layers.{i}.{key}": x for key, x in _layer_state(_of_block(weights, f"block{i:02}")).items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


@pytest.fixture(scope="module")
def images():
    """Two images [2, H, W, 3] as a normalised batch has them: smooth colours and noise."""
    random = np.random.default_rng(1)
    colours = random.normal(size=(2, 7, 7, 3)).repeat(32, axis=1).repeat(32, axis=2)
    return (colours + 0.5 * random.normal(size=colours.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def patches(images):
    return patchify(jnp.asarray(images), PATCH)


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(B_16, grid=(GRID, GRID))


@pytest.fixture(scope="module")
def weights(encoder):
    return _weights(encoder, jnp.zeros((1, GRID**2, PATCH**2 * 3)))


@pytest.fixture(scope="module")
def ijepa(weights):
    return _ijepa(weights)


def _largest_difference(ours, reference):
    assert ours.shape == tuple(reference.shape)
    return np.abs(np.asarray(ours) - reference.numpy()).max()


def test_all_patches(encoder, weights, ijepa, images, patches):
    ours = encoder.apply(_tree(weights), patches)
    with torch.no_grad():
        reference = ijepa(torch.tensor(images).permute(0, 3, 1, 2)).last_hidden_state
    assert _largest_difference(ours, reference) <= TOLERANCE


def test_last_layers_attention(encoder, weights, ijepa, images, patches):
    attention, features = last_layer(encoder, _tree(weights)["params"], patches)
    with torch.no_grad():
        reference = ijepa(torch.tensor(images).permute(0, 3, 1, 2), output_attentions=True)
    assert _largest_difference(features, reference.last_hidden_state) <= TOLERANCE
    *_, before, last = reference.attentions
    assert _largest_difference(attention, last) <= TOLERANCE * last.max() < _largest_difference(attention, before) / 100


def test_some_patches(encoder, weights, ijepa, images, patches):
    """With idx, the tokens that it names see one another and nothing else; padding is not seen."""
    random = np.random.default_rng(2)
    kept = 60
    idx = np.stack([random.permutation(GRID**2)[: kept + 4] for _ in images]).astype(np.int32)
    valid = np.broadcast_to(np.arange(kept + 4) < kept, idx.shape)
    ours = encoder.apply(_tree(weights), patches, jnp.asarray(idx), jnp.asarray(valid))[:, :kept]
    with torch.no_grad():
        x = ijepa.embeddings(torch.tensor(images).permute(0, 3, 1, 2))
        x = torch.stack([tokens[keep] for tokens, keep in zip(x, torch.tensor(idx[:, :kept]), strict=True)])
        for layer in ijepa.layers:
            x = layer(x)
        reference = ijepa.layernorm(x)
    assert _largest_difference(ours, reference) <= TOLERANCE


def test_block_of_small_inputs():
    """Of the size of the square root of LayerNorm's epsilon; positions hide it from the tests above."""
    size = SIZES["B"]
    block = Block(size.heads, size.mlp_ratio, "normal", jnp.dtype("float32"))
    x = 1e-3 * np.random.default_rng(3).normal(size=(2, 20, size.width)).astype(np.float32)
    weights = _weights(block, jnp.asarray(x))
    layer = IJepaLayer(_ijepa_config())
    layer.load_state_dict(_layer_state(weights))
    with torch.no_grad():
        reference = layer.eval()(torch.tensor(x))
    assert _largest_difference(block.apply(_tree(weights), jnp.asarray(x)), reference) <= TOLERANCE
