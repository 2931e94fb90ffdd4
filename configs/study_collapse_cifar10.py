"""Study: what the moving average and the regulariser each do against collapse, on CIFAR-10.

    python -m cjepa_jax.study --config=configs/study_collapse_cifar10.py --plan
    python -m cjepa_jax.study --config=configs/study_collapse_cifar10.py

I-JEPA and C-JEPA with five coefficients, each with and without EMA, with five seeds; nothing is tuned: 60 runs of
1,875 steps of 64 images, as in study_convergence_cifar10, whose data it wants. Hardware: one CPU core, 4 minutes a
run, or a GPU.
"""

from typing import Any

from configs import study_collapse_digits, study_convergence_cifar10


def get_config() -> dict[str, Any]:
    study = study_convergence_cifar10.get_config()
    study["base"]["optim"] |= dict(learning_rate=1e-3)  # which I-JEPA chose there
    arms = study_collapse_digits.get_config()["arms"]
    return dict(study, arms=arms, seeds=(0, 1, 2, 3, 4), probes=2)
