"""8 simulated devices, strict promotion; warnings are errors (pyproject.toml)."""

import os

# The last two are for speed: these tests compile much and compute little.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from ml_collections import ConfigDict

from cjepa_jax.config import Config
from cjepa_jax.parsing import parse
from configs import digits

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code gives now")


def small(**overrides) -> Config:
    """configs/digits.py with a smaller network, and overrides as `group__key=value`."""
    config = digits.get_config()
    config.model.size, config.predictor.width, config.predictor.depth = "16x1x2", 8, 1
    config.data.batch_size, config.eval.every = 16, 0
    with config.ignore_type():
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
    return parse(ConfigDict(config).to_dict())


@pytest.fixture
def make_config():
    return small
