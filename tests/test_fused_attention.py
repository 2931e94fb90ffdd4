"""The fused attention kernels, in Pallas' interpreter: against float64, on many devices, in a whole step; the choice.

The real TPU compiler meets them in test_compile.py, and here for all its chips where tests are slow.
"""

import functools
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cjepa_jax.batch import Batch
from cjepa_jax.config import Mesh
from cjepa_jax.errors import UserError
from cjepa_jax.methods import CJEPA
from cjepa_jax.models import attention, fused_attention
from cjepa_jax.train import sharding
from cjepa_jax.train.step import build

interpreted = functools.partial(fused_attention.attend, interpret=True)

SIZES = {  # heads and their features
    "Ti": (3, 64),
    "S": (6, 64),
    "B": (12, 64),
    "L": (16, 64),
    "H": (16, 80),
    "g": (16, 88),
    "predictor of Ti": (3, 128),
    "predictor of B": (12, 32),
    "predictor of H": (16, 24),
}


def inputs(heads, head_dim, *, tokens=24, sequences=2, masked=True, dtype="float32"):
    """qkv, its bias, which tokens are valid, and an upstream gradient that is zero where they are not."""
    random, width = np.random.default_rng(0), heads * head_dim
    valid = random.random((sequences, tokens)) < 0.7
    valid[:, 1] = True
    qkv = jnp.asarray(1.5 * random.normal(size=(sequences, tokens, 3 * width)), dtype)
    bias = jnp.asarray(0.3 * random.normal(size=3 * width), jnp.float32)
    gradient = jnp.asarray(random.normal(size=(sequences, tokens, width)) * (valid[..., None] | (not masked)), dtype)
    return qkv, bias, jnp.asarray(valid) if masked else None, gradient


def in_float64(qkv, bias, valid, gradient, heads):
    """Output, and the gradients of qkv and bias, by the formulas."""
    qkv, bias, gradient = (np.asarray(x).astype(np.float64) for x in (qkv, bias, gradient))
    sequences, tokens, width = gradient.shape
    split = (sequences, tokens, heads, width // heads)
    q, k, v = (x.reshape(split) for x in np.split(qkv + bias, 3, axis=-1))
    scale, g = (width // heads) ** -0.5, gradient.reshape(split)
    scores = np.einsum("sqhd,skhd->shqk", q, k) * scale
    if valid is not None:
        scores = np.where(np.asarray(valid)[:, None, None], scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    out = np.einsum("shqk,skhd->sqhd", p, v)
    dp = np.einsum("sqhd,skhd->shqk", g, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    d_q, d_k = np.einsum("shqk,skhd->sqhd", ds, k), np.einsum("shqk,sqhd->skhd", ds, q)
    d_v = np.einsum("shqk,sqhd->skhd", p, g)
    d_qkv = np.concatenate([x.reshape(sequences, tokens, width) for x in (d_q, d_k, d_v)], axis=-1)
    return out.reshape(sequences, tokens, width), d_qkv, d_qkv.sum((0, 1))


@functools.partial(jax.jit, static_argnames=("attend", "heads"))
def value_and_gradients(attend, qkv, bias, valid, gradient, heads):
    out, pull = jax.vjp(lambda qkv, bias: attend(qkv, bias, valid, heads=heads), qkv, bias)
    return out, *pull(gradient)


def errors(found, expected):
    """Largest error of each array, over its largest value."""
    pairs = zip((np.asarray(x).astype(np.float64) for x in found), expected, strict=True)
    return [np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_of_every_size(size):
    heads, head_dim = SIZES[size]
    arrays = inputs(heads, head_dim)
    found = value_and_gradients(interpreted, *arrays, heads)
    assert max(errors(found, in_float64(*arrays, heads))) < 3e-6


@pytest.mark.parametrize(
    "tokens, heads, head_dim, masked", [(37, 4, 64, True), (37, 4, 32, False), (123, 16, 24, True), (196, 2, 64, False)]
)
def test_other_lengths(tokens, heads, head_dim, masked):
    """Most fill no tile of a TPU's memory."""
    arrays = inputs(heads, head_dim, tokens=tokens, masked=masked)
    found = value_and_gradients(interpreted, *arrays, heads)
    assert max(errors(found, in_float64(*arrays, heads))) < 3e-6


@pytest.mark.parametrize("size", [name for name in SIZES if 128 % SIZES[name][1] == 0])
@pytest.mark.parametrize("masked", [True, False])
def test_packed_values_and_gradients(size, masked):
    """XLA's operations with several heads side by side, as wide as a TPU's registers."""
    heads, head_dim = SIZES[size]
    arrays = inputs(heads, head_dim, tokens=37, masked=masked)
    found = value_and_gradients(attention.attend_packed, *arrays, heads)
    assert max(errors(found, in_float64(*arrays, heads))) < 3e-6


@pytest.mark.parametrize("size", ["S", "predictor of B"])
def test_bfloat16_is_as_exact_as_xla(size):
    """Inputs, probabilities and results are rounded to bfloat16, 2^-9: 1 % of the largest value remains at most."""
    heads, head_dim = SIZES[size]
    arrays = inputs(heads, head_dim, tokens=56, dtype="bfloat16")
    qkv, bias, valid, gradient = arrays
    rounded = qkv + bias.astype(jnp.bfloat16)[None, None]  # which both round first
    expected = in_float64(rounded, np.zeros_like(bias), valid, gradient, heads)
    found = value_and_gradients(interpreted, *arrays, heads)
    assert found[0].dtype == found[1].dtype == jnp.bfloat16 and found[2].dtype == jnp.float32
    with jax.numpy_dtype_promotion("standard"):
        xla = value_and_gradients(attention.attend_xla, *arrays, heads)
    fused_errors = errors(found, expected)
    assert max(fused_errors) < 1e-2
    for ours, theirs in zip(fused_errors, errors(xla, expected), strict=True):
        assert ours < 1.2 * theirs


def test_tokens_that_are_not_valid_are_inert():
    heads, head_dim = 8, 32
    qkv, bias, valid, gradient = inputs(heads, head_dim)
    other = jnp.where(valid[..., None], qkv, 1e4 * jnp.flip(qkv))
    one, two = (value_and_gradients(interpreted, x, bias, valid, gradient, heads) for x in (qkv, other))
    assert (one[0] == two[0])[valid].all()
    np.testing.assert_array_equal(one[1], two[1])
    assert (one[1][~valid] == 0).all() and (one[1][valid] != 0).all()


def test_a_sequence_without_a_valid_token_stays_finite():
    qkv, bias, valid, gradient = inputs(4, 64)
    found = value_and_gradients(interpreted, qkv, bias, valid.at[0].set(False), gradient, 4)
    assert all(jnp.isfinite(x).all() for x in found)


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_eight_devices_give_what_one_gives(fsdp):
    mesh = sharding.make_mesh(Mesh(fsdp=fsdp, parameters="replicated" if fsdp == 1 else "zero1"))
    qkv, bias, valid, gradient = inputs(4, 64, sequences=16)
    expected = value_and_gradients(interpreted, qkv, bias, valid, gradient, 4)
    rows, whole = sharding.batch(mesh), sharding.replicated(mesh)
    arrays = (jax.device_put(x, rows) for x in (qkv, valid, gradient))
    qkv, valid, gradient = arrays
    shared = functools.partial(interpreted, per_device=sharding.per_device(mesh))
    found = value_and_gradients(shared, qkv, jax.device_put(bias, whole), valid, gradient, 4)
    for a, b in zip(expected[:2], found[:2], strict=True):
        assert len(b.sharding.device_set) == 8 and not b.sharding.is_fully_replicated
        np.testing.assert_array_equal(a, b)
    assert np.abs(found[2] - expected[2]).max() < 1e-6 * np.abs(expected[2]).max()


# A whole step


def one_step(config, devices):
    program = build(CJEPA(config), 10, sharding.make_mesh(config.mesh, jax.devices()[:devices]))
    images = jax.random.randint(jax.random.key(1), (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
    batch = Batch(images, jnp.zeros(16, jnp.int32))
    after, metrics, _ = program.step(program.init(jax.random.key(0)), batch, jax.random.key(2))
    return jax.device_get((metrics, after.opt_state))


WIDE = {"model__size": "128x1x2", "predictor__width": 128, "vicreg__projector": (256,)}
WAYS = {
    "zero1, scanned": {
        "mesh__parameters": "zero1",
        "mesh__fsdp": 4,
        "model__layers": "scanned",
        "model__remat": "full",
    },
    "fsdp": {"mesh__parameters": "fsdp", "mesh__fsdp": 8, "model__remat": "dots"},
}


@pytest.fixture(scope="module")
def on_one_device():
    from tests.conftest import small

    return one_step(small(**WIDE, model__attention="xla"), 1)


@pytest.mark.parametrize("way", ["zero1, scanned", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_step_is_the_one_that_xla_takes(make_config, monkeypatch, on_one_device, way):
    """Metrics, and AdamW's moments, which are the gradients of every parameter."""
    calls = []

    def recorded(qkv, *rest, **options):
        calls.append(qkv.shape[1:])
        return interpreted(qkv, *rest, **options)

    monkeypatch.setattr(fused_attention, "attend", recorded)
    tpu, real = types.SimpleNamespace(platform="tpu", device_kind="tpu"), attention.choose
    monkeypatch.setattr(attention, "choose", lambda setting, *, device, **known: real(setting, device=tpu, **known))
    metrics, moments = one_step(make_config(**WIDE, model__attention="fused", **WAYS[way]), 8)
    assert {shape[0] for shape in calls} == {16, 9, 9 + 4}  # target, context, predictor
    expected, expected_moments = on_one_device
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    floor = 1e-2 * max(np.abs(x).max() for x in jax.tree.leaves(expected_moments) if x.ndim)
    for a, b in zip(*map(jax.tree.leaves, (expected_moments, moments)), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * max(np.abs(a).max(), floor)


# The choice


def choose(setting, platform="tpu", shapes=(), dtype="bfloat16", **kind):
    device = types.SimpleNamespace(platform=platform, device_kind=platform, **kind)
    return attention.choose(setting, device=device, per_device=lambda f: f, shapes=shapes, dtype=dtype)


def test_auto_is_fused_on_tpu_where_that_can_serve(monkeypatch):
    monkeypatch.setattr(fused_attention, "attend", interpreted)
    qkv, bias, valid, _ = inputs(4, 64)
    assert choose("auto", "cpu") is choose("xla") is attention.attend_xla
    programs = [
        str(jax.make_jaxpr(functools.partial(choose("auto"), heads=heads))(qkv, bias, valid)) for heads in (4, 32)
    ]
    assert ["pallas_call" in text for text in programs] == [True, False]
    called = []
    for name in ("attend_packed", "attend_xla"):
        monkeypatch.setattr(attention, name, lambda qkv, *rest, name=name, **heads: called.append(name))
    for tokens in (320, 322):  # what the kernels do not serve
        choose("auto")(jnp.zeros((1, tokens, 3 * 96)), bias, None, heads=4)
    assert called == ["attend_packed", "attend_xla"]


@pytest.mark.parametrize(
    "shape, says",
    [
        ((196, 200, 4), "the width, 200, is not a multiple of 64"),
        ((196, 256, 32), "heads have 8 features, not 16 to 128"),
        ((784, 256, 4), "a sequence has 784 tokens, more than 320"),
    ],
)
def test_fused_says_what_it_cannot_serve(shape, says):
    with pytest.raises(UserError, match=rf"model\.attention = 'fused' cannot serve: {says}; 'auto' takes XLA there"):
        choose("fused", shapes=[(16, 256, 4), shape])


def test_auto_is_cudnn_on_the_gpus_and_for_the_shapes_that_it_serves(monkeypatch):
    """Here XLA computes what would be asked of cuDNN, which wants a mask of every pair; docs/speed.md has the GPU."""
    old, amd = choose("auto", "gpu", compute_capability="7.5"), choose("auto", "gpu", compute_capability="gfx942")
    assert old is amd is attention.attend_xla
    attend, asked, xla = choose("auto", "gpu", compute_capability="9.0"), [], jax.nn.dot_product_attention

    def ask(q, k, v, *, mask=None, implementation=None):
        asked.append(implementation)
        assert implementation is None or mask is None or mask.shape == (len(q), 1, q.shape[1], k.shape[1])
        with jax.numpy_dtype_promotion("standard"):
            return xla(q, k, v, mask=mask)

    monkeypatch.setattr(jax.nn, "dot_product_attention", ask)
    for dtype, heads, tokens, by in [
        ("bfloat16", 4, 24, "cudnn"),
        ("float32", 4, 24, None),
        ("bfloat16", 64, 24, None),
        ("bfloat16", 4, 23, None),
    ]:
        for masked in (True, False):
            qkv, bias, valid, _ = inputs(4, 64, tokens=tokens, masked=masked, dtype=dtype)
            np.testing.assert_array_equal(
                attend(qkv, bias, valid, heads=heads), attention.attend_xla(qkv, bias, valid, heads=heads)
            )
            assert asked[-2:] == [by, None]


@pytest.mark.parametrize(
    "shape, dtype, says",
    [
        ((196, 256, 64), "bfloat16", "heads have 4 features, which is not a multiple of 8 up to 128"),
        ((55, 256, 4), "bfloat16", "a sequence has 55 tokens, an odd number"),
        ((56, 256, 4), "float32", "cuDNN has no attention in float32"),
    ],
)
def test_fused_says_what_cudnn_cannot_serve(shape, dtype, says):
    with pytest.raises(UserError, match=rf"model\.attention = 'fused' cannot serve: {says}; 'auto' takes XLA there"):
        choose("fused", "gpu", shapes=[(16, 256, 4), shape], dtype=dtype, compute_capability="8.0")


def test_fused_without_a_device_that_has_it_is_one_line(make_config):
    """Before anything is compiled."""
    config = make_config(**WIDE, model__attention="fused")
    with pytest.raises(UserError, match=r"model\.attention = 'fused' needs a TPU or .* kind 'cpu'; 'auto' takes"):
        build(CJEPA(config), 10, sharding.make_mesh(config.mesh))


def test_fused_knows_the_vector_memory_of_the_smallest_chip():
    """The largest of the size table fits in bfloat16, up to the longest sequence; in float32 it does not."""
    choose("fused", shapes=[(320, 1408, 16)])
    choose("fused", shapes=[(196, 768, 12)], dtype="float32")
    with pytest.raises(UserError, match="320 tokens of 1408 features in float32 exceed the vector memory"):
        choose("fused", shapes=[(320, 1408, 16)], dtype="float32")


# The TPU compiler

COMPILE = """
import sys, os
from cjepa_jax.tpu import chips
os.environ.update(chips.ENVIRONMENT)
import functools, jax, jax.numpy as jnp
from cjepa_jax.config import Mesh
from cjepa_jax.models import fused_attention
from cjepa_jax.train import sharding
from cjepa_jax.tpu.compile import make_mesh
mesh = make_mesh(Mesh(), sys.argv[1])
attend = functools.partial(fused_attention.attend, per_device=sharding.per_device(mesh))
rows, whole = sharding.batch(mesh), sharding.replicated(mesh)
for tokens, heads, head_dim, masked, dtype in eval(sys.argv[2]):
    width, sequences = heads * head_dim, 2 * mesh.size
    shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype)
    def both(qkv, bias, valid, gradient):
        out, pull = jax.vjp(lambda qkv, bias: attend(qkv, bias, valid, heads=heads), qkv, bias)
        return out, *pull(gradient)
    with jax.set_mesh(mesh):
        jitted = jax.jit(both, in_shardings=(rows, whole, rows, rows), out_shardings=(rows, rows, whole))
        text = jitted.trace(
            shape(sequences, tokens, 3 * width),
            shape(3 * width, dtype=jnp.float32),
            shape(sequences, tokens, dtype=bool) if masked else None,
            shape(sequences, tokens, width),
        ).lower().compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2, (tokens, heads)
"""


@pytest.mark.slow
@pytest.mark.parametrize("slice", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_every_chip_compiles_every_size(slice):
    """Every size and predictor, at the lengths of the configs, at an odd one, at the longest, and in float32."""
    cases = [(56, *size, True, "bfloat16") for size in SIZES.values()]
    cases += [(196, 3, 64, False, "bfloat16"), (196, 12, 64, False, "bfloat16"), (256, 16, 80, False, "bfloat16")]
    cases += [(96, 12, 32, True, "bfloat16"), (126, 16, 24, True, "bfloat16"), (37, 6, 64, True, "bfloat16")]
    cases += [(16, 4, 16, True, "bfloat16"), (320, 16, 88, True, "bfloat16")]
    cases += [(56, 12, 64, True, "float32"), (160, 16, 88, True, "float32")]
    unset = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_PLATFORMS")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, slice, repr(cases)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
