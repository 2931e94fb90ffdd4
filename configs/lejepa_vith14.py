"""LeJEPA, ViT-H/14 on ImageNet-1k: the paper's loss on two global views.

    python -m cjepa_jax.main --config=configs/lejepa_vith14.py

Wants ImageNet-1k prepared by TFDS; where it is not, the command says how to do that.
Hardware: a large TPU slice; not yet run.
The paper's abstract reports 79 % with a linear probe of a ViT-H/14. It trains with further local views, which are
smaller crops, and its text was not at hand: AdamW with a rate of 5e-4, a weight decay of 0.05 and crops of 0.3 to 1
are those of a test of stable-pretraining 0.1.8, a library of the authors; 100 epochs are as remembered; batch, warm-up
and augmentation (that of SimCLR, with solarisation in a fifth of the views) are to be checked.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            method="lejepa",
            data=dict(
                source="tfds",
                name="imagenet2012",
                test_split="validation",
                crop_scale=(0.3, 1.0),
                flip=0.5,
                color=1.0,
                batch_size=1024,
            ),
            views=dict(blur=(0.5, 0.5), solarize=(0.2, 0.2)),
            model=dict(size="H", patch_size=14, layers="scanned", remat="dots"),
            optim=dict(
                epochs=100.0,
                warmup_epochs=10.0,
                learning_rate_start=0.0,
                learning_rate=5e-4,
                weight_decay_start=0.05,
                weight_decay_end=0.05,
            ),
            checkpoint=dict(keep_every=50_000),
        )
    )
