"""Study: what the moving average and the regulariser each do against collapse, on CIFAR-10.

    python -m cjepa_jax.study --config=configs/study_collapse_cifar10.py --plan
    python -m cjepa_jax.study --config=configs/study_collapse_cifar10.py

I-JEPA and C-JEPA with five coefficients, each with and without EMA, with five seeds; nothing is tuned: 60 runs of
1,875 steps of 64 images, as in study_convergence_cifar10, whose data it wants. Hardware: one CPU core, 4 minutes a
run, or a GPU.
"""

from typing import Any

from configs import study_convergence_cifar10

COEFFICIENTS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)


def base() -> dict[str, Any]:
    """The base of study_convergence_cifar10, with the learning rate that I-JEPA chose there."""
    settings: dict[str, Any] = study_convergence_cifar10.get_config()["base"]
    settings["optim"] |= dict(learning_rate=1e-3)
    return settings


def name(weight: float) -> str:
    """The name of the arm with a coefficient."""
    return f"C-JEPA {weight}" if weight else "I-JEPA"


def get_config() -> dict[str, Any]:
    arms = {}
    for ema, average in (("", {}), (", no EMA", {"ema": {"start": 0.0, "end": 0.0}})):
        for weight in COEFFICIENTS:
            arms[name(weight) + ema] = {"settings": {"vicreg": {"weight": weight}, **average}}
    return dict(
        base=base(),
        arms=arms,
        baseline="I-JEPA",
        seeds=(0, 1, 2, 3, 4),
        splits=dict(train="train[:40%]", held_out="train[90%:]", test="test"),
        probes=2,
        evaluators=("knn", "logistic", "collapse"),
    )
