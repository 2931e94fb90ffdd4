"""Study: how the coefficient that serves best moves with the width and the batch size, on CIFAR-10.

    python -m cjepa_jax.study --config=configs/study_coefficient_cifar10.py --plan
    python -m cjepa_jax.study --config=configs/study_coefficient_cifar10.py

Widths of 48, 96 and 192, and batches of 32, 64 and 256 images, one changed at a time; I-JEPA and three coefficients in
each, and the variance term with a gamma of 0.6 instead of 1; three seeds: 66 runs of 120,000 images, as in
study_collapse_cifar10, from which twelve of them are known. The learning rate follows the square root of the batch
size; nothing is tuned. Hardware: one CPU core, 2 to 10 minutes a run, or a GPU.
"""

from typing import Any

from configs import study_collapse_cifar10
from configs.study_collapse_digits import name


def get_config() -> dict[str, Any]:
    cells: dict[str, dict[str, Any]] = {"base": {}}
    for width, heads in ((48, 3), (192, 3)):
        settings = dict(model=dict(size=f"{width}x4x{heads}"), predictor=dict(width=width // 2))
        cells[f"width {width}"] = settings
    for batch in (32, 256):
        rate = 1e-3 * (batch / 64) ** 0.5
        cells[f"batch {batch}"] = dict(data=dict(batch_size=batch), optim=dict(learning_rate=rate))
    arms = {
        f"{cell}, {name(weight)}": dict(settings=dict(vicreg=dict(weight=weight), **settings))
        for cell, settings in cells.items()
        for weight in (0.0, 0.01, 0.03, 0.1)
    }
    for weight in (0.03, 0.1):
        arms[f"gamma 0.6, {name(weight)}"] = dict(settings=dict(vicreg=dict(weight=weight, gamma=0.6)))
    return dict(study_collapse_cifar10.get_config(), arms=arms, baseline="base, I-JEPA", seeds=(0, 1, 2))
