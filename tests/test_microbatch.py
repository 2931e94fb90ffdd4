"""A batch that goes through the networks in parts gives the gradient of the whole batch, at the promised cost."""

import collections
import functools
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from cjepa_jax.batch import Batch
from cjepa_jax.config import Model
from cjepa_jax.errors import UserError
from cjepa_jax.methods.cjepa import CJEPA
from cjepa_jax.methods.supervised import Supervised
from cjepa_jax.models.vit import build_encoder
from cjepa_jax.settings import parse
from cjepa_jax.train import microbatch, sharding
from cjepa_jax.train.step import build, init_state
from configs import finetune_digits
from tests.conftest import small
from tests.test_devices import initial

BATCH = 32
CASES = {
    "target_blocks": {"vicreg__weight": 0.1},
    "projector with batch norm": {"vicreg__weight": 0.1, "vicreg__projector": (12, 8)},
    "context_target": {"vicreg__weight": 0.1, "vicreg__views": "context_target", "vicreg__projector": (12, 8)},
    "l2, scanned and computed anew": {"loss__kind": "l2", "model__layers": "scanned", "model__remat": "dots"},
}


def cjepa(case: str) -> CJEPA:
    return CJEPA(small(data__batch_size=BATCH, **CASES[case]))


def supervised() -> Supervised:
    values = finetune_digits.get_config().to_dict()
    values["model"] |= {"encoder": "random", "size": "16x2x2", "patch_size": 2, "drop_path": 0.5}
    values["augment"] = {"mixup": 0.8, "cutmix": 1.0, "erase": 0.5}
    return Supervised(parse(values, Supervised.settings), classes=10)


def batch() -> Batch:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, 8, 8, 1)).astype(np.uint8)
    return Batch(images, rng.integers(0, 10, BATCH).astype(np.int32))


def gradient(method, microbatches: int, devices: int = 1, data: Batch | None = None, spread: float = 1.0):
    """The loss, its parts, all outputs and the gradient; also the compiled program.

    spread: a factor on the encoder's kernels, so that the features of images lie apart.
    """
    data = batch() if data is None else data
    mesh = sharding.make_mesh(method.config.mesh, jax.devices()[:devices])
    whole, split = sharding.replicated(mesh), sharding.batch(mesh)
    state = initial(method)
    encoder = jax.tree.map(lambda p: spread * p if p.ndim > 1 else p, jax.device_get(state.params["encoder"]))
    params = {**state.params, "encoder": encoder}
    # Averages that are not the parameters.
    averages = jax.tree.map(lambda x: 1.1 * x, jax.device_get(state.averages))
    forward = microbatch.forward(method, microbatches)

    def loss(params, batch, rng):
        outputs = forward(params, averages, method.prepare(batch, rng))
        total, metrics = method.loss(params, outputs)
        return total, (metrics, outputs)

    program = jax.jit(
        jax.value_and_grad(loss, has_aux=True),
        in_shardings=(whole, split, whole),
        out_shardings=((whole, (whole, split)), whole),
    )
    inputs = jax.device_put((params, data, jax.random.key(1)), (whole, split, whole))
    compiled = program.lower(*inputs).compile()
    return jax.device_get(compiled(*inputs)), compiled.as_text()


@functools.cache
def of_the_whole_batch(case: str):
    return gradient(supervised() if case == "supervised" else cjepa(case), 1)[0]


def assert_same(found, wanted, tolerance=1e-6):
    (total, aux), grads = found
    (wanted_total, wanted_aux), wanted_grads = wanted
    np.testing.assert_allclose(total, wanted_total, rtol=tolerance)
    for a, b in zip(jax.tree.leaves(aux), jax.tree.leaves(wanted_aux), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # A leaf far below the whole gradient (a bias before a norm) holds little but rounding.
    floor = 1e-1 * np.linalg.norm([np.linalg.norm(g) for g in jax.tree.leaves(wanted_grads)])
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), floor)


def exchanges(program: str) -> collections.Counter[str]:
    """Counts what the devices send one another, by kind and shape."""
    return collections.Counter(re.findall(r"= (\S+ (?:all-gather|all-to-all|collective-permute)\()", program))


@pytest.mark.parametrize("microbatches", [2, 32])
def test_same_outputs_and_gradient_on_one_device(microbatches):
    found, _ = gradient(cjepa("target_blocks"), microbatches)
    assert_same(found, of_the_whole_batch("target_blocks"))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if case.startswith(("context_target", "l2")) else case
        for case in (*CASES, "supervised")
    ],
)
def test_same_outputs_and_gradient_on_eight_devices(case):
    """No image leaves its device: nothing is exchanged but what the draws and sums of the whole batch need."""
    method = supervised() if case == "supervised" else cjepa(case)
    found, program = gradient(method, 4, devices=8)
    assert_same(found, of_the_whole_batch(case))
    assert not [x for x in exchanges(program) if re.match(r"\(?u8", x)]
    if case == "target_blocks":
        assert exchanges(program) == exchanges(gradient(method, 1, devices=8)[1])


def test_a_mean_of_gradients_of_small_batches_is_another_objective():
    """What accumulation does elsewhere; the statistics of the regulariser are those of the batch."""
    method = cjepa("target_blocks")
    _, wanted = of_the_whole_batch("target_blocks")
    state = initial(method)
    averages = jax.tree.map(lambda x: 1.1 * x, jax.device_get(state.averages))
    inputs = jax.device_get(jax.jit(method.prepare)(batch(), jax.random.key(1)))

    @jax.jit
    @jax.grad
    def part(params, inputs):
        return method.loss(params, method.forward(params, averages, inputs))[0]

    parts = [jax.device_get(part(state.params, jax.tree.map(lambda x, i=i: x[i::4], inputs))) for i in range(4)]
    mean = jax.tree.map(lambda *x: sum(x) / 4, *parts)
    distance = [np.linalg.norm(a - b) for a, b in zip(*map(jax.tree.leaves, (mean, wanted)), strict=True)]
    assert np.linalg.norm(distance) > 1e-2 * np.linalg.norm([np.linalg.norm(x) for x in jax.tree.leaves(wanted)])


def flops_of_products(jaxpr) -> int:
    """The FLOPs of all matrix products of a program, those in loops as often as the loop turns."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = np.prod([left[axis] for axis in contracted])
            total += int(2 * inner * np.prod(equation.outvars[0].aval.shape))
        turns = equation.params.get("length", 1)
        for inside in jax.extend.core.jaxprs_in_params(equation.params):
            total += turns * flops_of_products(inside)
    return total


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_what_is_not_kept_is_computed_again(layers):
    """By model.remat: nothing; attention's scores and values; all of the blocks but their last product."""

    def products(remat, gradient=True):
        model = Model(size="16x3x2", patch_size=2, init="normal", dtype="float32", layers=layers, remat=remat)
        encoder, patches = build_encoder(model, grid=(4, 4)), jax.ShapeDtypeStruct((3, 16, 4), jnp.float32)
        params = jax.eval_shape(encoder.init, jax.random.key(0), patches)["params"]
        summed = lambda params, patches: encoder.apply({"params": params}, patches).sum()  # noqa: E731
        return flops_of_products(jax.make_jaxpr(jax.grad(summed) if gradient else summed)(params, patches).jaxpr)

    none, dots, full = map(products, ("none", "dots", "full"))
    attention, last = 9 * 2 * (2 * 16 * 16 * 16), 9 * (2 * 16 * 64 * 16)  # of three images in three blocks
    embedding = 3 * (2 * 16 * 4 * 16)
    assert dots - none == attention
    assert full - none == products("none", gradient=False) - embedding - last


def test_the_target_encoder_runs_once():
    """The other networks run twice forward; what is kept of the targets makes their encoder unnecessary then."""
    method = cjepa("target_blocks")
    state = jax.eval_shape(functools.partial(init_state, method=method, steps=10), jax.random.key(0))

    def program(microbatches):
        forward = microbatch.forward(method, microbatches)

        def loss(params, averages, inputs):
            return method.loss(params, forward(params, averages, inputs))[0]

        inputs = jax.eval_shape(method.prepare, batch(), jax.random.key(1))
        return flops_of_products(jax.make_jaxpr(jax.grad(loss))(state.params, state.averages, inputs).jaxpr)

    def forward_only(params, averages, inputs):
        return method.forward(params, averages, inputs)["error"]

    inputs = jax.eval_shape(method.prepare, batch(), jax.random.key(1))
    once = flops_of_products(jax.make_jaxpr(forward_only)(state.params, state.averages, inputs).jaxpr)
    patches = jax.eval_shape(method.patches, inputs.images)
    encode = lambda params, patches: method.encoder.apply({"params": params}, patches)  # noqa: E731
    target = flops_of_products(jax.make_jaxpr(encode)(state.averages["target_encoder"], patches).jaxpr)
    assert program(4) - program(1) == once - target


def test_a_run_in_parts_is_the_same_run(make_config):
    """The second step's loss tells of every parameter that the first one has changed."""
    runs = []
    for microbatches in (1, 4):
        config = make_config(data__batch_size=BATCH, optim__microbatches=microbatches)
        program = build(CJEPA(config), 10, sharding.make_mesh(config.mesh))
        data = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), batch(), program.batch)
        state, *first = program.step(program.init(jax.random.key(0)), data, jax.random.key(1))
        _, *second = program.step(state, data, jax.random.key(1))
        runs.append(jax.device_get((first, second)))
    for a, b in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_parts_that_the_devices_cannot_share(make_config):
    config = make_config(data__batch_size=BATCH, optim__microbatches=8)
    says = r"optim\.microbatches = 8: data\.batch_size = 32 is not divisible by so many parts on 8 devices"
    with pytest.raises(UserError, match=says):
        build(CJEPA(config), 10, sharding.make_mesh(config.mesh))
    with pytest.raises(UserError, match=r"optim\.microbatches must be in \[0, 1e6\], got -1"):
        make_config(optim__microbatches=-1)
