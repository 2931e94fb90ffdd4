"""Study: at which EMA momenta the regulariser gains, with the learning rate tuned at each, on CIFAR-10.

    python -m cjepa_jax.study --config=configs/study_momenta_cifar10.py --plan
    python -m cjepa_jax.study --config=configs/study_momenta_cifar10.py

I-JEPA and C-JEPA with the coefficient .01, with five momenta at the start (all end at 1); three trials over the
learning rate and five seeds of each: 80 runs of 1,875 steps of 64 images, as in study_collapse_cifar10, from which
ten of them are known if both arms with the momentum .98 choose the rate .001. Hardware: one CPU core, 4 minutes a run,
or a GPU. Not yet run.
"""

from typing import Any

from configs import study_collapse_cifar10
from configs.study_collapse_digits import name


def get_config() -> dict[str, Any]:
    arms = {
        f"{name(weight)}, momentum {start}": dict(settings=dict(vicreg=dict(weight=weight), ema=dict(start=start)))
        for start in (0.5, 0.8, 0.9, 0.95, 0.98)
        for weight in (0.0, 0.01)
    }
    study = study_collapse_cifar10.get_config()
    return dict(study, arms=arms, baseline="I-JEPA, momentum 0.98", tune={"optim.learning_rate": (5e-4, 1e-3, 2e-3)})
