"""Study: the paper's ablation on CIFAR-10 at a size that a CPU can train, with curves over the images seen.

    python -m cjepa_jax.study --config=configs/study_convergence_cifar10.py --plan
    python -m cjepa_jax.study --config=configs/study_convergence_cifar10.py

I-JEPA, with variance and covariance, with invariance, with all three, each with and without EMA; four trials and three
seeds of each: 56 runs of 1,875 steps of 64 images. Wants TFDS' cifar10 in ArrayRecord files; in a copy of this file,
data=dict(source="npz", data_dir=FILE) reads arrays instead (docs/data.md). Hardware: one CPU core, 4 minutes a run.
"""

from typing import Any

from configs.study_ablation import DATA, terms


def get_config() -> dict[str, Any]:
    base = dict(
        method="cjepa",
        data=dict(DATA, batch_size=64),
        model=dict(size="96x4x3", patch_size=8, init="fan_in", dtype="float32"),
        predictor=dict(width=48, depth=2),
        mask=dict(recipe="corrected", target_scale=(0.2, 0.3), min_keep=4, context_tokens=9, keep="random"),
        vicreg=dict(weight=0.01),
        optim=dict(epochs=6.0, warmup_epochs=1.0, learning_rate=2e-3),
        ema=dict(start=0.98),  # over a short run 0.996 would leave much of the initial weights in the target
        log=dict(every=50),
        checkpoint=dict(every=1000),
        eval=dict(crop_fraction=1.0),
    )
    rates = {"optim.learning_rate": (5e-4, 1e-3, 2e-3, 4e-3)}
    both = {"optim.learning_rate": (1e-3, 2e-3), "vicreg.weight": (0.003, 0.01)}
    return dict(
        base=base,
        arms=terms(rates, both),
        baseline="I-JEPA",
        seeds=(0, 1, 2),
        splits=dict(train="train[:40%]", held_out="train[90%:]", test="test"),
        probes=10,
        evaluators=("knn", "logistic", "collapse"),
    )
