"""Measures how much faster a grid of linear probes trains at once than member by member.

    python -m cjepa_jax.bench.linear

--images=20000    rows of features
--width=768       features in a row
--classes=10      classes of the labels
--members=18      probes in the grid
--batch-size=256  rows in a batch
--rounds=5        epochs that are timed

Both ways see the same shuffled batches of the same cached features, which are random,
and take turns; each is compiled and warm before the clock starts. The table shows medians.
"""

import statistics
import time

import jax
import numpy as np
from absl import flags

from cjepa_jax import command
from cjepa_jax.errors import require
from cjepa_jax.evaluate import linear_grid


def measure(*, images: int, width: int, classes: int, members: int, batch_size: int, rounds: int) -> str:
    """Times one epoch of each way, in turns, and returns the table of medians."""
    rng = np.random.default_rng(0)
    require(images >= batch_size, f"--images={images} is less than a batch, --batch-size={batch_size}")
    features = rng.normal(size=(images, width)).astype(np.float32)
    labels = rng.integers(0, classes, images).astype(np.int32)
    rates, decays = np.geomspace(0.003, 1, members).astype(np.float32), np.zeros(members, np.float32)

    def epoch(order: np.ndarray):
        for rows in order[: images // batch_size * batch_size].reshape(-1, batch_size):
            yield {"x": features[rows]}, labels[rows]

    def fit(order: np.ndarray, chosen: slice) -> None:
        grid = {"x": (rates[chosen], decays[chosen])}
        jax.block_until_ready(linear_grid.fit([epoch(order)], grid, decay_every=1, classes=classes))

    def one_by_one(order: np.ndarray) -> None:
        for i in range(members):
            fit(order, slice(i, i + 1))

    ways = {"at once": lambda order: fit(order, slice(None)), "one by one": one_by_one}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first one compiles
        order = rng.permutation(images)
        for name, run in ways.items():
            start = time.perf_counter()
            run(order)
            if number:
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [
        f"{members} members, {images} images of {width} features, {classes} classes, batches of {batch_size}, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {rounds} rounds"
    ]
    lines += [f"{name:10} {1000 * value:9.0f} ms an epoch" for name, value in median.items()]
    ratios = [slow / fast for fast, slow in zip(*seconds.values(), strict=True)]
    lines.append(f"{statistics.median(ratios):.1f} times as fast in the median, {min(ratios):.1f} at least")
    return "\n".join(lines)


def main() -> None:
    """Runs the command; exit code 0, 2 after a mistake that the user can mend, 1 after any other error."""
    numbers = [
        flags.DEFINE_integer("images", 20_000, "Rows of features.", lower_bound=1),
        flags.DEFINE_integer("width", 768, "Features in a row.", lower_bound=1),
        flags.DEFINE_integer("classes", 10, "Classes of the labels.", lower_bound=1),
        flags.DEFINE_integer("members", 18, "Probes in the grid.", lower_bound=1),
        flags.DEFINE_integer("batch-size", 256, "Rows in a batch.", lower_bound=1),
        flags.DEFINE_integer("rounds", 5, "Epochs that are timed.", lower_bound=1),
    ]
    flags.DEFINE_alias("batch_size", "batch-size")
    command.run(lambda: print(measure(**{number.name.replace("-", "_"): number.value for number in numbers})), __doc__)


if __name__ == "__main__":
    main()
