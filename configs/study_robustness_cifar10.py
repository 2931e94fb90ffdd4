"""Study: for which EMA momenta and initialisations I-JEPA and C-JEPA do not collapse, on CIFAR-10.

    python -m cjepa_jax.study --config=configs/study_robustness_cifar10.py --plan
    python -m cjepa_jax.study --config=configs/study_robustness_cifar10.py

I-JEPA and C-JEPA with the coefficient .01: three momenta at the start (.98, .9 and .996; all end at 1) and two
initialisations, one changed at a time, with three seeds; nothing is tuned: 24 runs of 1,875 steps of 64 images, as in
study_collapse_cifar10, from which six of them are known. Hardware: one CPU core, 4 minutes a run, or a GPU.
"""

from typing import Any

from configs import study_collapse_cifar10
from configs.study_collapse_digits import name


def get_config() -> dict[str, Any]:
    changes: dict[str, dict[str, Any]] = {
        "": {},
        ", momentum 0.9": dict(ema=dict(start=0.9)),
        ", momentum 0.996": dict(ema=dict(start=0.996)),
        ", normal init": dict(model=dict(init="normal")),
    }
    arms = {
        name(weight) + change: dict(settings=dict(vicreg=dict(weight=weight), **settings))
        for weight in (0.0, 0.01)
        for change, settings in changes.items()
    }
    return dict(study_collapse_cifar10.get_config(), arms=arms, seeds=(0, 1, 2))
