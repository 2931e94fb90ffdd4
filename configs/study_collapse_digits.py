"""Study: what the moving average and the regulariser each do against collapse, on scikit-learn's digits.

    python -m cjepa_jax.study --config=configs/study_collapse_digits.py --plan
    python -m cjepa_jax.study --config=configs/study_collapse_digits.py

I-JEPA and C-JEPA with five coefficients, each with and without EMA; two learning rates are tried for each arm, and the
better one runs with five seeds: 84 runs of 898 steps. Hardware: 2 CPU cores; docs/study.md says how long it takes.
"""

from typing import Any

from configs.study_ablation import AVERAGES


def name(weight: float) -> str:
    """Names the arm with a coefficient."""
    return f"C-JEPA {weight}" if weight else "I-JEPA"


def get_config() -> dict[str, Any]:
    arms = {
        name(weight) + ema: {"settings": {"vicreg": {"weight": weight}, **average}}
        for ema, average in AVERAGES.items()
        for weight in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)
    }
    return dict(
        base="digits",
        arms=arms,
        baseline="I-JEPA",
        tune={"optim.learning_rate": (1e-3, 3e-3)},
        seeds=(0, 1, 2, 3, 4),
        splits=dict(train="train[:80%]", held_out="train[80%:]", test="test"),
        probes=8,
    )
