"""Study: the regulariser without its invariance term, on CIFAR-10.

    python -m cjepa_jax.study --config=configs/study_terms_cifar10.py --plan
    python -m cjepa_jax.study --config=configs/study_terms_cifar10.py

I-JEPA, and with the coefficient .03 C-JEPA and variance and covariance alone, each with and without EMA; three seeds;
nothing is tuned: 15 runs of 1,875 steps of 64 images, as in study_collapse_cifar10, from which nine of them are known.
Hardware: one CPU core, 4 minutes a run, or a GPU.
"""

from typing import Any

from configs import study_collapse_cifar10
from configs.study_ablation import AVERAGES


def get_config() -> dict[str, Any]:
    study = study_collapse_cifar10.get_config()
    arms = {name: study["arms"][name] for name in ("I-JEPA", "C-JEPA 0.03", "C-JEPA 0.03, no EMA")}
    for ema, average in AVERAGES.items():
        terms = {"weight": 0.03, "invariance": 0.0}
        arms[f"variance and covariance 0.03{ema}"] = {"settings": {"vicreg": terms, **average}}
    return dict(study, arms=arms, seeds=(0, 1, 2))
