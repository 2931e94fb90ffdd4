"""Study: in which range of learning rates variance and covariance alone learn and do not collapse, on CIFAR-10.

    python -m cjepa_jax.study --config=configs/study_rates_terms_cifar10.py --plan
    python -m cjepa_jax.study --config=configs/study_rates_terms_cifar10.py

I-JEPA, and with the coefficient .01 variance and covariance alone, at the learning rates of study_rates_cifar10, from
which the 18 runs of I-JEPA are known; three seeds; nothing is tuned: 36 runs of 1,875 steps of 64 images. Hardware: one
CPU core, 4 minutes a run, or a GPU.
"""

from typing import Any

from configs import study_rates_cifar10


def get_config() -> dict[str, Any]:
    study = study_rates_cifar10.get_config()
    plain = {name: arm for name, arm in study["arms"].items() if name.startswith("I-JEPA")}
    terms = {"weight": 0.01, "invariance": 0.0}
    alone = {
        f"variance and covariance 0.01, rate {rate}": {"settings": {"vicreg": terms, "optim": {"learning_rate": rate}}}
        for rate in study_rates_cifar10.RATES
    }
    return dict(study, arms=plain | alone)
