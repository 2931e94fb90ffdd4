"""VICReg, ViT-B/16 on ImageNet-1k: the loss, views, batch and epochs of the paper, with another encoder and optimizer.

    python -m cjepa_jax.main --config=configs/vicreg_vitb16.py

Wants ImageNet-1k prepared by TFDS; where it is not, the command says how to do that.
Hardware: a TPU slice or several GPUs that share the batch; not yet run.
The paper reports 73.2 % with a linear probe, of a ResNet-50 after 1000 epochs of 2048 images by LARS. It reports
nothing for a ViT: ours is one, and trains by AdamW with the rates and the weight decay of MoCo v3 (arXiv 2104.02057),
a published recipe of two views and a ViT: 1.5e-4 times batch / 256, weight decay 0.1, a warm-up of 40 epochs. The
augmentation is that of BYOL, asymmetric in blur and solarisation, as public copies of the authors' code have it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            method="vicreg",
            data=dict(
                source="tfds",
                name="imagenet2012",
                test_split="validation",
                crop_scale=(0.08, 1.0),
                flip=0.5,
                color=0.5,
                batch_size=2048,
            ),
            views=dict(blur=(1.0, 0.1), solarize=(0.0, 0.2), saturation=0.5),
            model=dict(size="B", patch_size=16),
            optim=dict(
                epochs=1000.0,
                warmup_epochs=40.0,
                learning_rate_start=0.0,
                learning_rate=1.2e-3,
                weight_decay_start=0.1,
                weight_decay_end=0.1,
            ),
            checkpoint=dict(keep_every=50_000),
        )
    )
