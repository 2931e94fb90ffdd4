"""What must not change unnoticed. `python -m pytest tests/test_golden.py --update-golden` accepts a change.

Do that when a change of the parameters, the recipe or the numerics is meant,
and say in the commit message why; never to make a red test green.
"""

import functools
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from cjepa_jax.config import parse
from cjepa_jax.optimizer import decay_mask
from cjepa_jax.step import Method, init_state, train_step

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIGS = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py") if p.stem != "__init__")


def compare(name: str, text: str, request) -> None:
    path = GOLDEN / name
    if request.config.getoption("--update-golden"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"{path.name} differs; if that is meant, run this test with --update-golden"


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_decay(name, request):
    """Every config builds from shapes alone, one whole step included; its parameters, and which of them decay."""
    config = parse(importlib.import_module(f"configs.{name}").get_config().to_dict())
    method = Method(config, steps=1000)
    state = jax.eval_shape(functools.partial(init_state, method=method), jax.random.key(0))
    lines = []
    decayed = jax.tree.leaves(decay_mask(state.params))
    for (path, leaf), decays in zip(jax.tree.leaves_with_path(state.params), decayed, strict=True):
        shape = "x".join(map(str, leaf.shape))
        lines.append(f"{jax.tree_util.keystr(path, simple=True, separator='/')} {shape} {'decay' if decays else '-'}\n")
    compare(f"{name}.txt", "".join(lines), request)

    data = config.data
    images = jax.ShapeDtypeStruct((8, data.image_size, data.image_size, data.channels), jnp.uint8)
    after, metrics, _ = jax.eval_shape(functools.partial(train_step, method=method), state, images, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


def test_metrics_of_one_step(make_config, request):
    """Three digits of each metric after three steps: what a reader of a log would notice."""
    method = Method(make_config(vicreg__projector=(12, 8)), steps=10)
    state = jax.jit(functools.partial(init_state, method=method))(jax.random.key(0))
    step = jax.jit(functools.partial(train_step, method=method))
    images = jax.random.randint(jax.random.key(1), (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
    for _ in range(3):
        state, metrics, _ = step(state, images, jax.random.key(2))
    compare("metrics.json", json.dumps({k: f"{v:.3g}" for k, v in sorted(metrics.items())}, indent=1) + "\n", request)
