"""What must not change unnoticed. `python -m pytest tests/test_golden.py --update-golden` accepts a change.

Do that when a change of the parameters, the recipe or the numerics is meant,
and say in the commit message why; never to make a red test green.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from cjepa_jax.batch import Batch
from cjepa_jax.methods import METHODS, find_method
from cjepa_jax.methods.cjepa import CJEPA
from cjepa_jax.settings import flatten, parse
from cjepa_jax.train.optimizer import decay_mask
from cjepa_jax.train.sharding import make_mesh
from cjepa_jax.train.step import build, init_state, train_step

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILES = (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
CONFIGS = sorted(p.stem for p in FILES if not p.stem.startswith(("__", "evaluate", "study_")))
PRETRAINING = [name for name in CONFIGS if not name.startswith("finetune_")]  # others take a checkpoint's architecture


def resolved(name: str) -> Any:
    values = importlib.import_module(f"configs.{name}").get_config().to_dict()
    return parse(values, find_method(values).settings)


def check(path: pathlib.Path, text: str, request) -> None:
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert path.read_text() == text, f"{path.name} differs; if that is meant, run with --update-golden"


@pytest.fixture
def standard_promotion():
    """jax.nn.dot_product_attention itself mixes bfloat16 and float32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_in_full(name, request):
    """A config states differences; here is every setting that follows, so that a changed default is seen."""
    check(GOLDEN / f"{name}.json", json.dumps(flatten(resolved(name)), indent=1) + "\n", request)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", PRETRAINING)
def test_parameters_and_decay(name, request):
    """Every config builds from shapes alone, one whole step included; its parameters, and which of them decay.

    The layers of the step are scanned, which does not change its shapes and is traced ten times as fast.
    """
    config = resolved(name)
    method = METHODS[config.method](config)
    state = jax.eval_shape(functools.partial(init_state, method=method, steps=1000), jax.random.key(0))
    lines = []
    decayed = jax.tree.leaves(decay_mask(state.params))
    for (path, leaf), decays in zip(jax.tree.leaves_with_path(state.params), decayed, strict=True):
        shape = "x".join(map(str, leaf.shape))
        lines.append(f"{jax.tree_util.keystr(path, simple=True, separator='/')} {shape} {'decay' if decays else '-'}\n")
    check(GOLDEN / f"{name}.txt", "".join(lines), request)

    data, size = config.data, max(8, config.optim.microbatches)
    views = (len(method.views),) if len(method.views) > 1 else ()
    images = jax.ShapeDtypeStruct((size, *views, *data.image_shape, data.channels), jnp.uint8)
    batch = Batch(images, jax.ShapeDtypeStruct((size,), jnp.int32))
    scanned = dataclasses.replace(config, model=dataclasses.replace(config.model, layers="scanned"))
    step = functools.partial(train_step, method=METHODS[config.method](scanned), steps=1000)
    after, metrics, _ = jax.eval_shape(step, state, batch, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["vitb16_one_device", "stl10", "imagenet100"])
def test_configs_for_one_accelerator(name):
    """One device can share the batch out to the microbatches, and the predictor's tokens suit the fused kernels."""
    config = resolved(name)
    method = CJEPA(config)
    program = build(method, 1000, make_mesh(config.mesh, jax.devices()[:1]))
    assert config.optim.microbatches > 1 and len(program.batch.images.sharding.device_set) == 1
    assert method.transformers()["predictor"].tokens % 8 == 0


def dot_dtypes(jaxpr) -> list[tuple[str, ...]]:
    """The operands' dtypes of every matrix product, inner functions included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(tuple(str(v.aval.dtype) for v in equation.invars))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += dot_dtypes(inner)
    return found


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_have_the_configured_precision(make_config, dtype):
    """Parameters are float32 always (test above); of the products only the covariance stays float32."""
    method = CJEPA(make_config(model__dtype=dtype))
    state = jax.eval_shape(functools.partial(init_state, method=method, steps=10), jax.random.key(0))
    batch = Batch(jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.uint8), jax.ShapeDtypeStruct((8,), jnp.int32))
    jaxpr = jax.make_jaxpr(functools.partial(train_step, method=method, steps=10))(state, batch, jax.random.key(0))
    dots = dot_dtypes(jaxpr.jaxpr)
    assert len(dots) > 30
    if dtype == "float32":
        assert set(dots) == {("float32", "float32")}
    else:
        assert dots.count(("float32", "float32")) == 3  # the covariance and its two gradients
        mixed = [d for d in dots if len(set(d)) == 2]  # jax's attention: float32 gradients of q k^T
        assert len(mixed) == 2 * 2  # context encoder and predictor, a block each


def test_metrics_after_three_steps(make_config, request):
    """Every metric within a thousandth: what a reader of a log would notice, and no machine's rounding."""
    method = CJEPA(make_config(vicreg__projector=(12, 8), optim__schedule_offset=0))
    state = jax.jit(functools.partial(init_state, method=method, steps=10))(jax.random.key(0))
    step = jax.jit(functools.partial(train_step, method=method, steps=10))
    images = jax.random.randint(jax.random.key(1), (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
    for _ in range(3):
        state, metrics, _ = step(state, Batch(images, jnp.zeros(16, jnp.int32)), jax.random.key(2))
    path = GOLDEN / "metrics.json"
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps({k: float(f"{v:.5g}") for k, v in sorted(metrics.items())}, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert golden.keys() == metrics.keys()
    for name, value in metrics.items():
        assert float(value) == pytest.approx(golden[name], rel=1e-3), f"{name}; if meant, run with --update-golden"
