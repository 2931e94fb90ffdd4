"""Schedules, decay and moving average against plain formulas and PyTorch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cjepa_jax.batch import Batch
from cjepa_jax.errors import UserError
from cjepa_jax.methods.base import Method
from cjepa_jax.methods.cjepa import CJEPA
from cjepa_jax.train import optimizer
from cjepa_jax.train.sharding import make_mesh
from cjepa_jax.train.step import build, init_state, train_step

STEPS = 1000
RATES = dict(learning_rate_start=1e-4, learning_rate=1e-3, learning_rate_end=1e-6)


@pytest.fixture(autouse=True)
def promotion():
    """As in the training step: optax multiplies floats with its integer step count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def make_optim(make_config):
    def make(warmup=15.0, **overrides):
        settings = dict(epochs=100.0, warmup_epochs=warmup, weight_decay_start=0.04, weight_decay_end=0.4)
        settings |= dict(beta1=0.9, beta2=0.999, schedule_offset=0)
        return make_config(**{f"optim__{k}": v for k, v in (settings | RATES | overrides).items()}).optim

    return make


def cosine(start, end, progress):
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def rate(number, warmup):
    start, peak, end = RATES.values()
    if number < warmup:
        return start + (peak - start) * number / warmup
    return cosine(peak, end, (number - warmup) / (STEPS - warmup))


@pytest.mark.parametrize("warmup", [0, 15, 40])
@pytest.mark.parametrize("number", [0, 1, 75, 149, 150, 151, 400, 401, 575, 999, 1000])
def test_learning_rate_warms_up_linearly_and_decays_on_a_cosine(make_optim, warmup, number):
    ours = optimizer.learning_rate(make_optim(float(warmup)), STEPS)(jnp.int32(number))
    assert float(ours) == pytest.approx(rate(number, 10 * warmup), rel=1e-4, abs=1e-9)


def test_ends_of_the_learning_rate(make_optim):
    ours = [float(optimizer.learning_rate(make_optim(), STEPS)(jnp.int32(s))) for s in (0, 150, STEPS)]
    assert ours == pytest.approx(list(RATES.values()), rel=1e-4)


@pytest.mark.parametrize("number", [0, 1, 250, 500, 999, 1000])
def test_weight_decay_rises_on_a_cosine_over_all_steps(make_optim, number):
    ours = optimizer.weight_decay(make_optim(), STEPS)(jnp.int32(number))
    assert float(ours) == pytest.approx(cosine(0.04, 0.4, number / STEPS), rel=1e-5)


@pytest.mark.parametrize("start, end", [(0.996, 1.0), (0.9, 0.99), (0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("number", [0, 1, 500, 99_999, 100_000])
def test_ema_momentum_is_linear(make_config, start, end, number):
    steps = 100_000  # the last step sizes are 4e-8, less than what 1 - momentum in float32 can tell from 0
    ours = optimizer.ema_step_size(make_config(ema__start=start, ema__end=end).ema, steps)(jnp.int32(number))
    assert float(ours) == pytest.approx(1 - start - (end - start) * number / steps, rel=1e-5, abs=1e-9)


def test_decay_acts_on_kernels_and_the_mask_token_only(make_config):
    method = CJEPA(make_config(vicreg__projector=(12, 8)))
    params = jax.eval_shape(method.init, jax.random.key(0))
    decays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): decay
        for path, decay in jax.tree.leaves_with_path(optimizer.decay_mask(params))
    }
    assert params["predictor"]["mask_token"].shape == (1, 1, 8)
    assert {name.split("/")[0] for name in decays} == {"encoder", "predictor", "projector"}
    for name, decay in decays.items():
        assert decay == name.endswith(("/kernel", "/mask_token")), name
    assert len(decays) > 2 * sum(decays.values())  # a bias for each kernel but the projector's, and the norms


def test_adamw_with_its_schedules_is_that_of_torch(make_optim, make_config):
    """Decay multiplied by the learning rate of the step, and none on vectors."""
    optim = make_optim(learning_rate=0.02, learning_rate_start=0.004, eps=1e-3)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(5, 4)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float32)}
    theirs = {name: torch.nn.Parameter(torch.tensor(p, dtype=torch.float64)) for name, p in params.items()}
    adamw = torch.optim.AdamW([{"params": [p]} for p in theirs.values()], betas=(0.9, 0.999), eps=1e-3)
    ours = optimizer.build(Products(dataclasses.replace(make_config(), optim=optim)), 20, params)
    state = ours.init(params)
    for number in range(20):
        grads = {name: rng.normal(size=p.shape).astype(np.float32) for name, p in params.items()}
        updates, state = ours.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        for group, (name, p) in zip(adamw.param_groups, theirs.items(), strict=True):
            group["lr"] = 0.004 + 0.016 * number / 3 if number < 3 else cosine(0.02, 1e-6, (number - 3) / 17)
            group["weight_decay"] = cosine(0.04, 0.4, number / 20) if name == "kernel" else 0
            p.grad = torch.tensor(grads[name], dtype=torch.float64)
        adamw.step()
    for name, p in theirs.items():
        np.testing.assert_allclose(params[name], p.detach(), rtol=1e-5, atol=1e-6)


def test_the_rate_that_is_applied_is_that_of_the_batch(make_config):
    params = {"kernel": jnp.array([[1.0, -2.0]])}

    def update(meant):
        adamw = optimizer.build(Products(make_config(optim__rates_for_batch=meant, data__batch_size=16)), 10, params)
        return adamw.update({"kernel": jnp.array([[3.0, -1.0]])}, adamw.init(params), params)[0]["kernel"]

    np.testing.assert_allclose(update(64), update(0) / 2, rtol=1e-6)


def test_clipping_scales_the_gradient_down_where_its_norm_is_above_the_limit(make_config):
    """An AdamW that sees the gradient scaled by hand does the same; 0 and a high limit change nothing, not a bit."""
    params = {"x": jnp.array([[1.0, -2.0]]), "y": jnp.array([0.5])}
    grads = {"x": jnp.array([[3.0, 0.0]]), "y": jnp.array([4.0])}  # of norm 5

    def moments(clip_norm, grads):
        """AdamW's moments after a step; its first update itself hardly depends on the gradient's scale."""
        adamw = optimizer.build(CJEPA(make_config(optim__clip_norm=clip_norm)), 10, params)
        state = adamw.update(grads, adamw.init(params), params)[1]
        (found,) = (part for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu"))
        return found.mu, found.nu

    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-6))
    same(moments(10.0, grads), moments(0.0, grads))
    close(moments(2.5, grads), moments(0.0, jax.tree.map(lambda x: x / 2, grads)))
    with pytest.raises(AssertionError):
        close(moments(2.5, grads), moments(0.0, grads))
    assert optimizer.build(CJEPA(make_config()), 10, params).init(params)[0].mu  # the state of old checkpoints


def test_frozen_parts_stay_and_the_others_move_as_ever(make_config):
    """On eight devices that share the parameters; what is frozen has no moments either."""
    shared = dict(mesh__fsdp=2, data__batch_size=8, model__size="128x2x4", predictor__width=128)
    states = {}
    for frozen in ((), ("encoder/embed", "encoder/block00", "predictor")):
        config = make_config(optim__frozen=frozen, **shared)
        program = build(CJEPA(config), 10, make_mesh(config.mesh))
        first = program.init(jax.random.key(0))
        before = jax.device_get(first.params)
        images = np.random.default_rng(0).integers(0, 256, program.batch.images.shape, np.uint8)
        batch = jax.device_put(Batch(images, np.zeros(len(images), np.int32)), program.split)
        state, *_ = program.step(first, batch, jax.random.key(1))
        states[frozen] = jax.device_get(state.params), len(jax.tree.leaves(state.opt_state))
    (free, free_leaves), (partly, partly_leaves) = states.values()
    stays = optimizer.frozen(config.optim, before)
    assert free_leaves - partly_leaves == 2 * sum(jax.tree.leaves(stays)) > 0
    for path, kept in jax.tree.leaves_with_path(stays):
        start, moved, now = (functools.reduce(lambda tree, key: tree[key.key], path, x) for x in (before, free, partly))
        name = jax.tree_util.keystr(path)
        assert kept == (path[0].key == "predictor" or path[1].key in ("embed", "block00")), name
        assert np.array_equal(now, start) == kept, name
        if not kept:
            np.testing.assert_allclose(now, moved, rtol=1e-6, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "names, says",
    [
        (("encodr",), "optim.frozen: 'encodr' is not known; did you mean 'encoder'?"),
        (("encoder/blocks",), "optim.frozen: 'encoder/blocks' is not known; did you mean 'encoder/block0"),
        (("encoder", "predictor"), "leaves nothing to train"),
    ],
)
def test_a_name_that_freezes_nothing_or_all_is_refused(make_config, names, says):
    config = make_config(optim__frozen=names)
    with pytest.raises(UserError, match=says):
        build(CJEPA(config), 10, make_mesh(config.mesh))


def test_target_starts_as_a_copy_of_the_encoder(make_config):
    init = functools.partial(init_state, method=CJEPA(make_config()), steps=10)
    state = jax.jit(init)(jax.random.key(0))
    assert state.step == 0
    jax.tree.map(np.testing.assert_array_equal, state.averages["target_encoder"], state.params["encoder"])


@dataclasses.dataclass(frozen=True)
class Products(Method):
    """Two matrices whose product is to fit an image: the rule of the average knows no network."""

    averaged = {"average": "encoder"}

    def init(self, rng):
        return {"encoder": {"a": jnp.ones((3, 4)), "b": jnp.full((4, 4), 0.1)}}

    def prepare(self, batch, rng):
        return batch.images.astype(jnp.float32)

    def forward(self, params, averages, inputs):
        return {"sum": inputs.sum(axis=(1, 2, 3))}

    def loss(self, params, outputs):
        goal = 2 + jnp.cos(outputs["sum"].sum() + jnp.arange(12.0)).reshape(3, 4)
        return jnp.square(params["encoder"]["a"] @ params["encoder"]["b"] - goal).sum(), {}


@pytest.mark.parametrize("start, end", [(0.9, 1.0), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0)])
def test_target_is_the_moving_average_of_the_encoder_after_each_step(make_config, start, end):
    """In float64, for all but the rounding."""
    leaves, steps = jax.tree.leaves, 8
    rates = dict(optim__learning_rate_start=0.04, optim__learning_rate=0.04, optim__warmup_epochs=0.0)
    method = Products(make_config(ema__start=start, ema__end=end, **rates))
    state = init_state(jax.random.key(0), method=method, steps=steps)
    first = state.params["encoder"]
    equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    jitted = jax.jit(functools.partial(train_step, method=method, steps=steps))
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)

    def take_step(state):
        return jitted(state, Batch(images, np.zeros(8, np.int32)), jax.random.key(1))

    average = jax.tree.map(lambda p: np.asarray(p, np.float64), first)
    for number in range(steps):
        momentum = start + (end - start) * number / steps
        state, metrics, _ = take_step(state)
        average = jax.tree.map(lambda a, p, m=momentum: m * a + (1 - m) * p, average, state.params["encoder"])
        assert float(metrics["ema_momentum"]) == pytest.approx(momentum, rel=1e-6)
    moved = [float(np.abs(a - b).max()) for a, b in zip(leaves(first), leaves(state.params["encoder"]), strict=True)]
    assert min(moved) > 0.1, moved
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), state.averages["average"], average
    )
    if end == 0:  # no average: an exact copy
        equal(state.averages["average"], state.params["encoder"])
    if start == 1:
        equal(state.averages["average"], first)
    if end == 1:  # reached at `steps`, one past the last step of a run
        equal(take_step(state)[0].averages["average"], state.averages["average"])


@pytest.mark.parametrize("offset", [0, 1])
def test_schedules_advance_before_they_are_used(make_config, offset):
    """As in I-JEPA's released code, step k takes rate and decay of k + 1 and the momentum of k; before, all of k."""
    steps, warmup = 8, 4
    rates = dict(learning_rate_start=0.0, learning_rate=0.02, learning_rate_end=0.002)
    rates |= dict(epochs=8.0, warmup_epochs=4.0)
    rates |= dict(weight_decay_start=0.1, weight_decay_end=0.5, schedule_offset=offset, eps=1e-12)
    config = make_config(**{f"optim__{key}": value for key, value in rates.items()}, ema__start=0.5, ema__end=1.0)
    method = Products(config)
    take_step = jax.jit(functools.partial(train_step, method=method, steps=steps))
    state = init_state(jax.random.key(0), method=method, steps=steps)
    theirs = {name: torch.tensor(np.array(p), dtype=torch.float64) for name, p in state.params["encoder"].items()}
    theirs = {name: torch.nn.Parameter(p) for name, p in theirs.items()}
    adamw = torch.optim.AdamW(theirs.values(), betas=(0.9, 0.999), eps=1e-12)
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    total = np.float32(images.sum()) + np.arange(12, dtype=np.float32)
    goal = torch.tensor(2 + np.cos(total), dtype=torch.float64).reshape(3, 4)
    for number in range(steps):
        state, metrics, _ = take_step(state, Batch(images, np.zeros(8, np.int32)), jax.random.key(1))
        at = number + offset
        lr = 0.02 * at / warmup if at < warmup else cosine(0.02, 0.002, (at - warmup) / (steps - warmup))
        decay = cosine(0.1, 0.5, at / steps)
        assert float(metrics["lr"]) == pytest.approx(lr, rel=1e-5, abs=1e-9)
        assert float(metrics["weight_decay"]) == pytest.approx(decay, rel=1e-5)
        assert float(metrics["ema_momentum"]) == pytest.approx(0.5 + 0.5 * number / steps, rel=1e-5)
        adamw.param_groups[0]["lr"], adamw.param_groups[0]["weight_decay"] = lr, decay
        adamw.zero_grad()
        (theirs["a"] @ theirs["b"] - goal).square().sum().backward()
        adamw.step()
        for name, p in theirs.items():
            np.testing.assert_allclose(state.params["encoder"][name], p.detach(), rtol=2e-4, atol=1e-5)
        moved = np.abs(np.asarray(state.params["encoder"]["b"]) - 0.1).max() > 1e-4
        assert moved == (number > 0 or offset == 1)
