"""One device against eight, for every way to share: the same numbers, and shards where they should be."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import PartitionSpec

from cjepa_jax.batch import Batch
from cjepa_jax.config import Mesh
from cjepa_jax.errors import UserError
from cjepa_jax.methods.cjepa import CJEPA, MaskedImages
from cjepa_jax.models.masking import sample_masks
from cjepa_jax.train import sharding
from cjepa_jax.train.checkpoint import Checkpointer
from cjepa_jax.train.step import build, init_state, train_step
from tests.conftest import small

BATCH = 16


def initial(method: CJEPA):
    return jax.jit(functools.partial(init_state, method=method, steps=10))(jax.random.key(0))


def labelled(images) -> Batch:
    return Batch(images, jnp.zeros(len(images), jnp.int32))


def loss_of(method: CJEPA, params, averages, inputs):
    """The loss, with its parts and the features."""
    outputs = method.forward(params, averages, inputs)
    total, parts = method.loss(params, outputs)
    return total, (parts, outputs["features"])


def loss_and_gradients(method: CJEPA, devices: int):
    mesh = sharding.make_mesh(method.config.mesh, jax.devices()[:devices])
    whole, split = sharding.replicated(mesh), sharding.batch(mesh)
    state = jax.device_put(initial(method), whole)
    shape = (BATCH, *method.config.data.image_shape, 1)
    images = jax.random.randint(jax.random.key(1), shape, 0, 256).astype(jnp.uint8)

    def loss(params, images, rng):
        return loss_of(method, params, state.averages, method.prepare(labelled(images), rng))

    gradient = jax.jit(
        jax.value_and_grad(loss, has_aux=True),
        in_shardings=(whole, split, whole),
        out_shardings=((whole, (whole, split)), whole),
    )
    compiled = gradient.lower(state.params, images, jax.random.key(2)).compile()
    (total, (parts, features)), grads = compiled(state.params, images, jax.random.key(2))
    assert len(features.sharding.device_set) == devices
    return jax.device_get((total, parts, features, grads)), compiled.as_text()


@pytest.mark.parametrize("views, width", [("target_blocks", 0), ("context_target", 0), ("target_blocks", 16)])
def test_same_loss_and_gradients(make_config, views, width):
    config = make_config(vicreg__views=views, vicreg__weight=0.01, vicreg__projector=(12, 8), data__image_width=width)
    method = CJEPA(config)
    one, _ = loss_and_gradients(method, 1)
    eight, program = loss_and_gradients(method, 8)
    assert "all-reduce" in program
    np.testing.assert_allclose(one[0], eight[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one[1:3]), jax.tree.leaves(eight[1:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    # A leaf far below the whole gradient (a bias before a norm) holds little but rounding.
    floor = 1e-2 * np.linalg.norm([np.linalg.norm(g) for g in jax.tree.leaves(one[3])])
    for a, b in zip(jax.tree.leaves(one[3]), jax.tree.leaves(eight[3]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(a), floor)


def test_statistics_are_those_of_the_global_batch(make_config):
    """Not the mean of eight local ones: with two images a device those differ by far."""
    method = CJEPA(make_config(vicreg__weight=1.0))
    (_, parts, _, _), _ = loss_and_gradients(method, 8)
    state = initial(method)
    images = jax.random.randint(jax.random.key(1), (BATCH, 8, 8, 1), 0, 256).astype(jnp.uint8)
    draw = functools.partial(sample_masks, mask=method.config.mask, grid=method.config.grid, batch=BATCH)
    images, masks = jax.device_get((images, jax.jit(draw)(jax.random.key(2))))

    @jax.jit
    def covariance(images, masks):
        _, (parts, _) = loss_of(method, state.params, state.averages, MaskedImages(images, masks))
        return parts["loss/covariance"]

    shares = [slice(2 * i, 2 * i + 2) for i in range(8)]
    local = np.mean([covariance(images[s], jax.tree.map(lambda x, s=s: x[s], masks)) for s in shares])
    assert abs(parts["loss/covariance"] - covariance(images, masks)) < 1e-5
    assert abs(parts["loss/covariance"] - local) > 0.1 * local


def test_fifty_steps_compile_once(make_config):
    method = CJEPA(make_config())
    state = initial(method)
    step = jax.jit(functools.partial(train_step, method=method, steps=50), donate_argnums=0)
    images = jax.random.randint(jax.random.key(1), (BATCH, 8, 8, 1), 0, 256).astype(jnp.uint8)
    losses = []
    for _ in range(50):
        state, metrics, _ = step(state, labelled(images), jax.random.key(2))
        losses.append(float(metrics["loss/prediction"]))
    assert step._cache_size() == 1
    assert len(set(losses)) == 50
    assert int(state.step) == 50


# Ways to share the parameters and to compute the layers


WIDE = {"model__size": "128x2x4", "predictor__width": 64, "predictor__depth": 2, "vicreg__projector": (128,)}
WAYS = {  # parameters, fsdp, layers, remat
    "replicated": ("replicated", 1, "unrolled", "none"),
    "scanned": ("replicated", 1, "scanned", "none"),
    "dots": ("replicated", 1, "unrolled", "dots"),
    "zero1 of 4": ("zero1", 4, "unrolled", "none"),
    "zero1 of 8, scanned": ("zero1", 8, "scanned", "full"),
    "fsdp of 4": ("fsdp", 4, "unrolled", "dots"),
    "fsdp of 8, scanned": ("fsdp", 8, "scanned", "full"),
}


def program(way="replicated", devices=8):
    keys = ("mesh__parameters", "mesh__fsdp", "model__layers", "model__remat")
    config = small(**WIDE, **dict(zip(keys, WAYS[way], strict=True)))
    return build(CJEPA(config), 10, sharding.make_mesh(config.mesh, jax.devices()[:devices]))


# The other ways are put together of these.
USUAL = ("replicated", "zero1 of 8, scanned", "fsdp of 8, scanned")
EACH = [way if way in USUAL else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]


@functools.cache  # compiling is what takes time
def compiled(way="replicated", devices=8):
    built = program(way, devices)
    return built._replace(step=built.step.lower(built.state, batch(), jax.random.key(2)).compile())


def batch() -> Batch:
    return labelled(jax.random.randint(jax.random.key(1), (BATCH, 8, 8, 1), 0, 256).astype(jnp.uint8))


def three_steps(program):
    state, metrics = program.init(jax.random.key(0)), []
    for _ in range(3):
        state, step_metrics, _ = program.step(state, batch(), jax.random.key(2))
        metrics.append(step_metrics)
    return jax.device_get(metrics), state


@pytest.mark.parametrize("way", EACH)
def test_every_way_takes_the_same_steps(way):
    expected, reference = three_steps(compiled(devices=1))
    found, state = three_steps(compiled(way))
    for a, b in zip(expected, found, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-6, err_msg=name)
    # Adam divides a gradient by its own size: where that is rounding, so is the step, of learning rate's size at most.
    for a, b in zip(*map(jax.tree.leaves, jax.device_get((reference.params, state.params))), strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a) + 1e-5 * a.size**0.5


@pytest.mark.parametrize("way", EACH)
def test_shards_are_where_they_should_be(way):
    built = compiled(way)
    _, shards, _, _ = WAYS[way]
    state = built.init(jax.random.key(0))
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(state)
    }
    trees = ("params/encoder", "averages/target_encoder", "opt_state")
    for tree in trees:
        found = [x for name, x in kernels.items() if name.startswith(tree) and name.endswith("fc1/kernel")]
        assert found
        for x in found:
            assert x.sharding.shard_shape(x.shape) == (x.shape[0] // shards, x.shape[1])
            assert len(x.sharding.device_set) == 8
    assert kernels["step"].sharding.spec == PartitionSpec()
    after, _, _ = built.step(state, batch(), jax.random.key(2))
    for a, b in zip(jax.tree.leaves(built.state), jax.tree.leaves(after), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim)


@pytest.mark.parametrize("way", EACH)
def test_the_collectives_are_those_expected(way):
    """Gradients and statistics are summed; parameters are gathered where they are cut, and nothing else is moved."""
    text = compiled(way).step.as_text()
    found = re.findall(r"= (\S+?\[[\d,]*\]).* (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", text)
    kinds = collections.Counter(kind for _, kind in found)
    assert kinds.keys() == {"all-reduce", "all-gather"}
    sizes = [
        math.prod(map(int, re.findall(r"\d+", shape.split("[")[1]))) for shape, kind in found if kind == "all-gather"
    ]
    cut = WAYS[way][1] > 1
    assert (max(sizes) > 10_000) == cut  # indices of tokens are gathered in any case


def test_nothing_is_whole_on_one_device_at_the_start():
    built = program("fsdp of 8, scanned")
    analysis = built.init.lower(jax.random.key(0)).compile().memory_analysis()
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(built.state))
    assert analysis.output_size_in_bytes + analysis.temp_size_in_bytes < 0.3 * total


@pytest.mark.parametrize("other", ["zero1 of 4", pytest.param("scanned", marks=pytest.mark.slow), "one device"])
def test_a_checkpoint_restores_onto_another_mesh_bit_for_bit(make_config, tmp_path, other):
    saved = compiled("fsdp of 8, scanned")
    state, _, _ = saved.step(saved.init(jax.random.key(0)), batch(), jax.random.key(2))
    expected = jax.device_get(state)
    options = make_config().checkpoint
    writer = Checkpointer(epath.Path(tmp_path), options, {"fingerprint": ""})
    writer.save(1, state)
    writer.close()
    built = program(devices=1) if other == "one device" else program(other)
    restored = Checkpointer(epath.Path(tmp_path), options, {"fingerprint": ""}).restore(built.state)
    jax.tree.map(np.testing.assert_array_equal, expected, jax.device_get(restored))
    for a, b in zip(jax.tree.leaves(built.state), jax.tree.leaves(restored), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"mesh__fsdp": 3, "mesh__parameters": "zero1"}, r"mesh\.fsdp = 3 does not divide the 8 devices"),
        ({"mesh__fsdp": 16, "mesh__parameters": "zero1"}, r"mesh\.fsdp = 16 does not divide the 8 devices"),
        (
            {"mesh__fsdp": 8, "mesh__parameters": "zero1", "model__size": "40x2x2", "predictor__width": 40},
            r"mesh\.fsdp = 8: only 0% of the parameters can be cut",
        ),
        (
            {"mesh__fsdp": 2, "mesh__parameters": "replicated"},
            r"mesh\.fsdp = 2 does not go with mesh\.parameters = 'replicated'",
        ),
        ({"mesh__fsdp": 8, "mesh__parameters": "fsdp"}, r"needs model\.remat = 'dots' or 'full'"),
        ({"data__batch_size": 12}, r"data\.batch_size = 12 is not divisible by the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(make_config, settings, says):
    with pytest.raises(UserError, match=says):
        config = make_config(**(WIDE | settings))
        build(CJEPA(config), 10, sharding.make_mesh(config.mesh))


@pytest.mark.parametrize(
    "devices, settings, shape",
    [
        (1, {}, (1, 1)),
        (8, {}, (8, 1)),
        (24, {}, (24, 1)),
        (16, {}, (1, 16)),
        (64, {}, (4, 16)),
        (64, {"parameters": "fsdp"}, (4, 16)),
        (64, {"parameters": "replicated"}, (64, 1)),
        (64, {"fsdp": 1}, (64, 1)),
        (64, {"fsdp": 4}, (16, 4)),
    ],
)
def test_parameters_are_cut_over_sixteen_devices_where_there_are_so_many(monkeypatch, devices, settings, shape):
    monkeypatch.setattr(
        sharding.mesh_utils, "create_device_mesh", lambda shape, devices, **_: np.full(shape, devices[0])
    )
    monkeypatch.setattr(sharding, "Mesh", lambda grid, *_, **__: grid)
    assert sharding.make_mesh(Mesh(**settings), jax.devices()[:1] * devices).shape == shape


def test_a_network_too_small_for_sixteen_shards_stays_whole(make_config, monkeypatch):
    """Only where mesh.fsdp is left open, here to the 8 devices that there are."""
    monkeypatch.setattr(sharding, "SHARDS", 8)
    config = make_config(model__size="40x2x2", predictor__width=40)
    mesh = sharding.make_mesh(config.mesh)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8}
    metrics, state = three_steps(build(CJEPA(config), 10, mesh))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    assert np.isfinite(metrics[-1]["loss/total"])


def test_the_default_cuts_where_it_can_and_one_device_has_no_constraints(make_config, monkeypatch):
    monkeypatch.setattr(sharding, "SHARDS", 8)
    config = make_config(**WIDE)
    cut = build(CJEPA(config), 10, sharding.make_mesh(config.mesh))
    asked = make_config(**WIDE, mesh__fsdp=8)
    asked = build(CJEPA(asked), 10, sharding.make_mesh(asked.mesh))
    lowered = [built.step.lower(built.state, batch(), jax.random.key(2)).as_text() for built in (cut, asked)]
    assert lowered[0] == lowered[1]
    one = build(CJEPA(config), 10, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    before = program(devices=1)  # what was the default: whole everywhere
    lowered = [built.step.lower(built.state, batch(), jax.random.key(2)).as_text() for built in (one, before)]
    assert lowered[0] == lowered[1]
