"""8 simulated devices, strict promotion; warnings are errors (pyproject.toml)."""

import gc
import os

from tests.commands import QUICK, ROOT

# Where there are no more cores than workers, each worker stays on one: XLA's threads then fit it, and take less time.
if hasattr(os, "sched_setaffinity") and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= int(os.environ["PYTEST_XDIST_WORKER_COUNT"]):
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"
# Threads of XLA. With one for each simulated device, a device that waits in two collectives at once can take the last
# one, and those that it waits for never begin.
os.environ["PJRT_NPROC"] = "16"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests, and the commands that they start, mostly compile programs that an earlier one, or the last run, has compiled.
os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{ROOT}/.pytest_cache/jax"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

from cjepa_jax.methods.cjepa import CJEPAConfig
from cjepa_jax.settings import parse
from configs import digits

gc.set_threshold(200_000, 10, 1000)  # tracing makes many objects, and looking through them takes a third of its time

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code gives now")
    parser.addoption("--ijepa", help="a clone of facebookresearch/ijepa, for tests/test_against_release.py")


def pytest_collection_finish():
    gc.freeze()  # what the imports have made stays, and need not be looked through again


def small(**overrides) -> CJEPAConfig:
    """configs/digits.py with a smaller network, and overrides as `group__key=value`."""
    values = digits.get_config().to_dict()
    small = {"model__size": "16x1x2", "predictor__width": 8, "predictor__depth": 1, "data__batch_size": 16}
    for name, value in (small | {"eval__every": 0} | overrides).items():
        *above, last = name.split("__")
        place = values
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    return parse(values, CJEPAConfig)


@pytest.fixture(autouse=True, scope="module")
def _forget():
    """Frees the programs of a file when it is through: gigabytes of them make all that follows slower."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def make_config():
    return small
