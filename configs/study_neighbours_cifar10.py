"""Study: the methods beside C-JEPA on CIFAR-10, with the same encoder and number of images.

    python -m cjepa_jax.study --config=configs/study_neighbours_cifar10.py --plan
    python -m cjepa_jax.study --config=configs/study_neighbours_cifar10.py

I-JEPA, C-JEPA with the coefficient .003, SIGReg on pooled blocks, LeJEPA, SimSiam and VICReg: three learning rates and
three seeds of each are 36 runs of 1,875 steps of 64 images, as in study_convergence_cifar10, from which eleven of them
are known. The last three methods see two augmented views of each image. Hardware: one CPU core, 4 to 9 minutes a run,
or a GPU.
"""

from typing import Any

from configs import study_convergence_cifar10


def get_config() -> dict[str, Any]:
    study = study_convergence_cifar10.get_config()
    masked = study["base"]
    shared = {key: masked[key] for key in ("data", "model", "optim", "log", "checkpoint", "eval")}
    # The crops and colours of SimSiam; 32 pixels have no room for blur.
    views = dict(shared, data=shared["data"] | dict(crop_scale=(0.2, 1.0), flip=0.5, color=0.5))
    views["views"] = dict(blur=(0.0, 0.0))
    arms: dict[str, dict[str, Any]] = {
        "I-JEPA": dict(settings=dict(vicreg=dict(weight=0.0))),
        "C-JEPA 0.003": dict(settings=dict(vicreg=dict(weight=0.003))),
        "SIGReg": dict(settings=dict(vicreg=dict(weight=0.0), sigreg=dict(weight=0.02, slices=256))),
        "LeJEPA": dict(base=dict(views, method="lejepa", sigreg=dict(projector=(512, 512, 64), slices=256))),
        "SimSiam": dict(base=dict(views, method="simsiam", simsiam=dict(projector=(512, 512, 512), hidden=128))),
        "VICReg": dict(base=dict(views, method="vicreg", vicreg=dict(projector=(512, 512, 512)))),
    }
    return dict(study, arms=arms, tune={"optim.learning_rate": (1e-3, 2e-3, 4e-3)})
