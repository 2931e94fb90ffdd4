"""Study: in which range of learning rates, EMA momenta and initialisations an arm does not collapse, on CIFAR-10.

    python -m cjepa_jax.study --config=configs/study_robustness_cifar10.py --plan
    python -m cjepa_jax.study --config=configs/study_robustness_cifar10.py

I-JEPA and C-JEPA with the coefficient .01: six learning rates, three momenta at the start (.98, .9 and .996; all end at
1) and two initialisations, one changed at a time, with three seeds; nothing is tuned: 54 runs of 1,875 steps of 64
images, as in study_collapse_cifar10, from which six of them are known.

Hardware: one CPU core, 4 minutes a run, or a GPU.
"""

from typing import Any

from configs import study_collapse_cifar10
from configs.study_collapse_digits import name


def get_config() -> dict[str, Any]:
    changes: dict[str, dict[str, Any]] = {
        f"rate {rate}": dict(optim=dict(learning_rate=rate)) for rate in (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
    }
    changes |= {f"momentum {start}": dict(ema=dict(start=start)) for start in (0.9, 0.996)}
    changes["normal init"] = dict(model=dict(init="normal"))
    arms = {
        f"{name(weight)}, {change}": dict(settings=dict(vicreg=dict(weight=weight), **settings))
        for weight in (0.0, 0.01)
        for change, settings in changes.items()
    }
    return dict(
        study_collapse_cifar10.get_config(),
        arms=arms,
        baseline="I-JEPA, rate 0.001",
        seeds=(0, 1, 2),
    )
