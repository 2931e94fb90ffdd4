"""Study: in which range of learning rates I-JEPA and C-JEPA learn and do not collapse, on CIFAR-10.

    python -m cjepa_jax.study --config=configs/study_rates_cifar10.py --plan
    python -m cjepa_jax.study --config=configs/study_rates_cifar10.py

I-JEPA and C-JEPA with the coefficient .01 at six learning rates, with three seeds; nothing is tuned: 36 runs of
1,875 steps of 64 images, as in study_collapse_cifar10, from which six of them are known. Hardware: one CPU core, 4
minutes a run, or a GPU.
"""

from typing import Any

from configs import study_collapse_cifar10
from configs.study_collapse_digits import name

RATES = 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016


def get_config() -> dict[str, Any]:
    arms = {
        f"{name(weight)}, rate {rate}": dict(settings=dict(vicreg=dict(weight=weight), optim=dict(learning_rate=rate)))
        for weight in (0.0, 0.01)
        for rate in RATES
    }
    return dict(study_collapse_cifar10.get_config(), arms=arms, baseline="I-JEPA, rate 0.001", seeds=(0, 1, 2))
