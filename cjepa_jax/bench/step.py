"""Measures the training step as it runs, alone or in turns with the same step in PyTorch.

    python -m cjepa_jax.bench.step --config=configs/vitti16.py \\
        --config.data.batch_size=16 --config.model.dtype=float32 --against=torch

--config=FILE            an experiment of pre-training; --config.GROUP.KEY=VALUE overrides a setting
--rounds=10              steps that are timed, after two that are not
--against=torch          takes turns with the same mathematics in PyTorch, for C-JEPA: eager on a CPU, with as many
                         threads as there are cores; compiled and with fused AdamW on a GPU

Images are random and lie on the devices, so that reading them costs nothing. The two ways start from
the same parameters, images and masks, and their first losses are shown. The table shows medians, and
the median of the ratios of neighbouring steps, which a busy machine disturbs least.
"""

import importlib.metadata
import importlib.util
import os
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from cjepa_jax import command
from cjepa_jax.batch import Batch
from cjepa_jax.config import Config
from cjepa_jax.errors import require
from cjepa_jax.methods import METHODS, find_method
from cjepa_jax.methods.cjepa import CJEPA
from cjepa_jax.models.vit import exact
from cjepa_jax.train import memory, optimizer, sharding
from cjepa_jax.train.step import build

_STEPS = 100_000  # of the run whose first steps are timed


def measure(config: Config, *, rounds: int, against_torch: bool) -> str:
    """Times `rounds` steps of each way, in turns, and returns the table.

    Raises UserError where the settings do not fit the devices, or PyTorch's step does not have them.
    """
    kind = METHODS[config.method]
    require(not kind.needs_labels, f"method = {config.method!r}: only steps of pre-training are timed")
    require(not against_torch or kind is CJEPA, f"--against=torch knows the method cjepa only, not {config.method!r}")
    method = kind(config)
    program = build(method, _STEPS, sharding.make_mesh(config.mesh))
    root = jax.random.key(0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, program.batch.images.shape).astype(np.uint8)
    labels = np.zeros(len(images), np.int32)
    batch = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), Batch(images, labels), program.batch)
    state = program.init(root)
    ways: dict[str, Callable[[], float]] = {}
    if against_torch:
        if jax.default_backend() == "cpu":
            import torch

            torch.set_num_threads(os.cpu_count() or 1)
        from cjepa_jax.bench.torch_step import TorchStep

        assert isinstance(method, CJEPA)
        masks = jax.device_get(method.prepare(batch, jax.random.fold_in(root, 0)).masks)
        rate = float(optimizer.learning_rate(config.optim, _STEPS, config.rate_scale)(0))
        ways["PyTorch"] = TorchStep(method, jax.device_get(state.params), images, masks, learning_rate=rate)

    start = time.perf_counter()
    with exact(config.model.dtype):  # as in training
        compiled = memory.compile_step(program, _STEPS)
    compile_seconds = time.perf_counter() - start

    def step() -> float:
        nonlocal state
        state, metrics, _ = compiled(state, batch, root)
        return float(metrics["loss/total"])

    ways["cjepa_jax"] = step
    first = {name: run() for name, run in ways.items()}
    for run in ways.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    size, model = config.data.batch_size, config.model
    lines = [
        f"{model.size}/{model.patch_size}, {size} images, {model.dtype}, {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {rounds} rounds; compiled in {compile_seconds:.0f} s"
    ]
    for name, values in seconds.items():
        median = statistics.median(values)
        lines.append(f"{name:10} {1000 * median:9.1f} ms a step {size / median:9.1f} images/s  loss {first[name]:.6f}")
    if against_torch:
        ratios = [slow / fast for slow, fast in zip(seconds["PyTorch"], seconds["cjepa_jax"], strict=True)]
        lines.append(
            f"cjepa_jax has {statistics.median(ratios):.2f} times the speed of PyTorch "
            f"{importlib.metadata.version('torch')} in the median, {min(ratios):.2f} to {max(ratios):.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the command; exit code 0, 2 after a mistake that the user can mend, 1 after any other error."""
    rounds = flags.DEFINE_integer("rounds", 10, "Steps that are timed.", lower_bound=1)
    against = flags.DEFINE_enum("against", None, ["torch"], "What to take turns with.")

    def run() -> None:
        _, config = command.read_config(lambda values: find_method(values).settings)
        require(
            not against.value or importlib.util.find_spec("torch") is not None,
            "--against=torch needs PyTorch: pip install torch",
        )
        print(measure(config, rounds=rounds.value, against_torch=bool(against.value)))

    command.run(run, __doc__)


if __name__ == "__main__":
    main()
