"""Study: the paper's ablation on 60 classes of Tiny-ImageNet, with the network and budget of study_convergence_cifar10.

    python -m cjepa_jax.study --config=configs/study_convergence_tinyimagenet.py --plan
    python -m cjepa_jax.study --config=configs/study_convergence_tinyimagenet.py

An image has 64 patches of 8x8 pixels, where one of CIFAR-10 has 16. tinyimagenet_a60.npz holds the images as arrays
(docs/data.md), 30,000 to train and 3,000 to test. Eight arms, four trials and three seeds of each: 56 runs of 1,875
steps of 64 images. Hardware: one CPU core, 17 minutes a run, or a GPU.
"""

from typing import Any

from configs import study_convergence_cifar10


def get_config() -> dict[str, Any]:
    study = study_convergence_cifar10.get_config()
    study["base"]["data"] = dict(
        source="npz",
        data_dir="tinyimagenet_a60.npz",
        image_size=64,
        mean=(0.480, 0.448, 0.398),
        std=(0.277, 0.269, 0.282),
        batch_size=64,
    )
    study["base"]["mask"] |= dict(target_scale=(0.15, 0.2), context_tokens=20)
    return dict(study, splits=dict(train="train[:20000]", held_out="train[90%:]", test="test"))
